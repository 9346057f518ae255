"""The cache on the device: `CacheState`, `Plan`, and the pure functions on them. Everything here runs inside `jit`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache import kernels
from jaxcache.optimizers import RowOptimizer, Rows
from jaxcache.tables import Group

if TYPE_CHECKING:
    from jaxcache.store import HostStore


# `jax.Array` on the device, NumPy on the way there.
Array = Any


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "buffer",
        "slot_table",
        "counts",
        "dirty",
        "scalars",
        "hyperparameters",
        "step",
        "exchanged",
        "fault",
    ],
    meta_fields=["group", "optimizer"],
)
@dataclass(frozen=True)
class CacheState:
    """The cache: a pytree of fixed shapes that describes itself. It is threaded through the steps and donated to them.

    Attributes:
        buffer: `Rows` with a leading axis of slots.
        slot_table: `int32[slots, 3]`, the row that each slot holds: position of its table in `group` (FREE where the
            slot is free), high and low 32 bits of its id.
        counts: `int32[slots]`, lookups of the row since it came in, at most 2**31 - 1; 0 where free.
        dirty: `bool[slots]`, whether the row was updated since it came in or was last flushed.
        scalars: the optimizer's scalars, such as step counts; they advance once an update.
        hyperparameters: constants of the optimizer, such as its rate.
        step: `int32[]`, updates done.
        exchanged: `int32[]`, exchanges done; one ahead of `step` between a step's exchange and its update.
        fault: `int32[]`, 0, or the reason why cache and plan did not fit; from then on nothing changes the rows.
        group: the tables, static.
        optimizer: the row optimizer, static.
    """

    FREE: ClassVar[int] = -1
    NO_FAULT: ClassVar[int] = 0
    EXCHANGE_MISMATCH: ClassVar[int] = 1
    UPDATE_MISMATCH: ClassVar[int] = 2

    buffer: Rows
    slot_table: Array
    counts: Array
    dirty: Array
    scalars: tuple[Array, ...]
    hyperparameters: tuple[Array, ...]
    step: Array
    exchanged: Array
    fault: Array
    group: Group
    optimizer: RowOptimizer

    @property
    def slots(self) -> int:
        """Number of rows that the cache can hold."""
        return self.counts.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["unique_slots", "inverse", "occurrences", "step", "samples"],
    meta_fields=["shapes"],
)
@dataclass(frozen=True)
class Plan:
    """Where a batch finds its rows. L is its number of lookups, over all features; U a bound on its unique rows.

    For lookups of rows a, b, a (L = 3) with a in slot 7, b in slot 4 and U = 4 in a cache of 9 slots:
    `unique_slots = [7, 4, 9, 9]`, `inverse = [0, 1, 0]`, `occurrences = [2, 1, 0, 0]`.

    Attributes:
        unique_slots: `int32[U]`, the slot of each unique row in order of first occurrence; then padding, equal to the
            number of slots.
        inverse: `int32[L]`, for each lookup the position of its row in `unique_slots`; U for the padding of a short
            batch. Features follow each other in the order of `shapes`, each in C order.
        occurrences: `int32[U]`, lookups of each unique row.
        step: `int32[]`, the number of the batch: the updates that come before it.
        samples: `int32[]`, samples in the batch, without padding.
        shapes: pairs of feature name and shape of its ids, static; the first axis is of samples.
    """

    unique_slots: Array
    inverse: Array
    occurrences: Array
    step: Array
    samples: Array
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def mask(self) -> jax.Array:
        """`bool[samples in the padded batch]`, false for the padding of a short batch. For the loss."""
        return jnp.arange(self.shapes[0][1][0], dtype=jnp.int32) < self.samples


def init(store: HostStore, slots: int) -> CacheState:
    """An empty cache for the tables of `store`.

    Args:
        store: gives tables, optimizer, its scalars and the step to go on from.
        slots: rows that the cache can hold, below 2**31.

    Returns:
        A state whose slots are all free.
    """
    optimizer, group = store.optimizer, store.group
    return CacheState(
        buffer=Rows(
            jnp.zeros((slots, group.dim), jnp.float32),
            tuple(jnp.zeros((slots, *leaf.shape), leaf.dtype) for leaf in optimizer.row_shapes),
        ),
        slot_table=jnp.full((slots, 3), CacheState.FREE, jnp.int32),
        counts=jnp.zeros(slots, jnp.int32),
        dirty=jnp.zeros(slots, bool),
        scalars=tuple(jnp.array(scalar) for scalar in store.scalars),
        hyperparameters=tuple(jnp.array(value) for value in optimizer.hyperparameters),
        step=jnp.array(store.step, jnp.int32),
        exchanged=jnp.array(store.step, jnp.int32),
        fault=jnp.array(CacheState.NO_FAULT, jnp.int32),
        group=group,
        optimizer=optimizer,
    )


def _ready(cache: CacheState, plan: Plan) -> jax.Array:
    """Whether `cache` stands between the exchange and the update of the batch of `plan`."""
    return (cache.step == plan.step) & (cache.exchanged == plan.step + 1) & (cache.fault == CacheState.NO_FAULT)


def lookup(cache: CacheState, plan: Plan) -> dict[str, jax.Array]:
    """The rows of a batch, to be handed to the model. Differentiate with respect to its result, not through it.

    Args:
        cache: a state that went through this batch's `exchange`.
        plan: the batch's plan.

    Returns:
        For each feature an array of the shape of its ids with a last axis of `dim`. If cache and plan do not belong
        together (another batch's plan, no exchange, a stale cache) every row is NaN.

    For one feature "user" with ids `[5, 6, 5]` and dim 2, `lookup(cache, plan)["user"]` is `[[a, b], [c, d], [a, b]]`.
    """
    rows = kernels.gather(cache.buffer.weights, plan.unique_slots, plan.inverse)
    rows = jnp.where(_ready(cache, plan), rows, jnp.nan)
    # What the model makes of the rows must not depend on how XLA would fuse it with a cache of this or that size.
    rows = jax.lax.optimization_barrier(rows)
    features, start = {}, 0
    for name, shape in plan.shapes:
        count = int(np.prod(shape))
        features[name] = rows[start : start + count].reshape(*shape, cache.group.dim)
        start += count
    return features


def update(cache: CacheState, plan: Plan, row_gradients: Mapping[str, jax.Array]) -> CacheState:
    """Sums the gradients of each row's lookups and applies the row optimizer to the rows of the batch, and no other.

    Args:
        cache: the state given to `lookup`.
        plan: the batch's plan.
        row_gradients: gradients of the loss with respect to the result of `lookup`, same features and shapes.

    Returns:
        The state after this step. Duplicate ids are summed in order of lookup, so that the result does not depend on
        the cache. If cache and plan do not belong together nothing changes but `fault`, which the pipeline reports.

    Raises:
        ValueError: while tracing, for features or shapes other than those of the plan, or for the cache of an
            evaluation, which cannot be updated.

    With sgd(0.5), weights 1.0 of a row with two lookups whose gradients are 0.25 and 0.5 become 1 - 0.5 * 0.75 = 0.625.
    """
    expected = {name: (*shape, cache.group.dim) for name, shape in plan.shapes}
    found = {name: gradient.shape for name, gradient in row_gradients.items()}
    if found != expected:
        raise ValueError(
            "update needs the gradients of what lookup returned, jax.grad(loss, argnums=...)(..., rows, ...): "
            f"expected shapes {expected}, got {found}"
        )
    if len(cache.hyperparameters) != len(cache.optimizer.hyperparameters):
        raise ValueError("update got the cache of an evaluation, which holds weights alone: train with the other one")
    gradients = jnp.concatenate(
        [row_gradients[name].reshape(-1, cache.group.dim).astype(jnp.float32) for name, _ in plan.shapes]
    )
    unique = plan.unique_slots.shape[0]
    summed = jax.lax.optimization_barrier(kernels.sum_occurrences(gradients, plan.inverse, unique))
    accept = _ready(cache, plan)
    scalars = cache.scalars

    def updated(old):
        nonlocal scalars
        rows, counts, dirty = old
        weights, state, scalars = cache.optimizer.update(
            summed, rows.weights, rows.state, cache.scalars, cache.hyperparameters
        )
        most = jnp.iinfo(counts.dtype).max  # a hot row of a long run stays there
        counts = jnp.where(counts > most - plan.occurrences, most, counts + plan.occurrences)
        return Rows(weights, state), counts, jnp.ones_like(dirty)

    buffer, counts, dirty = kernels.update(
        (cache.buffer, cache.counts, cache.dirty), plan.unique_slots, updated, accept
    )
    return dataclasses.replace(
        cache,
        buffer=buffer,
        counts=counts,
        dirty=dirty,
        scalars=jax.tree.map(lambda new, old: jnp.where(accept, new, old), scalars, cache.scalars),
        step=cache.step + accept.astype(jnp.int32),
        fault=_fault(cache, accept, CacheState.UPDATE_MISMATCH),
    )


def _fault(cache: CacheState, accept: jax.Array, reason: int) -> jax.Array:
    """The first fault stays: it is the cause of those that follow."""
    return jnp.where(accept | (cache.fault != CacheState.NO_FAULT), cache.fault, reason)


class Exchange(NamedTuple):
    """What moves before a batch's step. M is a size class: the first rows are real, the others padding.

    Attributes:
        slots: `int32[M]`, where the incoming rows go; padding is the number of slots.
        slot_table: `int32[M, 3]`, the entries of the slot table for the incoming rows.
        rows: the incoming `Rows`, `[M, ...]`.
        step: `int32[]`, number of the batch.
    """

    slots: Array
    slot_table: Array
    rows: Rows
    step: Array


class Receipt(NamedTuple):
    """What comes back from an exchange.

    Attributes:
        rows: the outgoing `Rows`, `[M, ...]`: what was in the slots that were filled.
        record: `int32[4]`: `fault`, `step` and `exchanged` of the cache as found, and 1 if the exchange was made.
    """

    rows: Rows
    record: Array


def apply_exchange(cache: CacheState, exchange: Exchange) -> tuple[CacheState, Receipt]:
    """Takes the victims of a batch out of their slots and puts its missed rows in. Pure; `LookAhead.exchange` calls it.

    Nothing changes, and `fault` is set, unless the cache stands right after the update of the batch before.
    """
    accept = (cache.step == exchange.step) & (cache.exchanged == exchange.step) & (cache.fault == CacheState.NO_FAULT)
    fault = _fault(cache, accept, CacheState.EXCHANGE_MISMATCH)
    record = jnp.stack([fault, cache.step, cache.exchanged, accept.astype(jnp.int32)])
    size = exchange.slots.shape
    (buffer, slot_table, counts, dirty), (outgoing, *_) = kernels.exchange(
        (cache.buffer, cache.slot_table, cache.counts, cache.dirty),
        exchange.slots,
        (exchange.rows, exchange.slot_table, jnp.zeros(size, jnp.int32), jnp.zeros(size, bool)),
        accept,
    )
    state = dataclasses.replace(
        cache,
        buffer=buffer,
        slot_table=slot_table,
        counts=counts,
        dirty=dirty,
        exchanged=cache.exchanged + accept.astype(jnp.int32),
        fault=fault,
    )
    return state, Receipt(outgoing, record)


def slot_entries(group: Group, keys: np.ndarray) -> np.ndarray:
    """Entries `int32[N, 3]` of the slot table for rows given by `keys` (`int64[N]`), in NumPy."""
    table, ids = group.locate(keys)
    words = ids.astype("<i8").view("<i4").reshape(-1, 2)
    return np.stack([table.astype(np.int32), words[:, 1], words[:, 0]], axis=1)


def slot_keys(group: Group, slot_table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The occupied slots `int64[N]` of a slot table and the keys `int64[N]` of the rows in them, in NumPy."""
    slot_table = np.asarray(slot_table)
    occupied = np.flatnonzero(slot_table[:, 0] != CacheState.FREE)
    table, high, low = slot_table[occupied].astype(np.int64).T
    ids = (high << 32) | (low & 0xFFFFFFFF)
    return occupied, (ids.view(np.uint64) + group.bases[table]).view(np.int64)
