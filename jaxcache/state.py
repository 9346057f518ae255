"""The cache on the device: `CacheState`, `Plan`, and the pure functions on them. Everything here runs inside `jit`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache import kernels
from jaxcache.features import FeatureLayout
from jaxcache.optimizers import RowOptimizer, Rows
from jaxcache.rounding import random_words
from jaxcache.tables import Group

if TYPE_CHECKING:
    from jaxcache.store import HostStore, RowStore


# `jax.Array` on the device, NumPy on the way there.
Array = Any


class Contents(NamedTuple):
    """The arrays of a `GroupCache`; fields as there."""

    buffer: Rows
    slot_table: Array
    counts: Array
    dirty: Array
    scalars: tuple[Array, ...]
    hyperparameters: tuple[Array, ...]
    streams: Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["buffer", "slot_table", "counts", "dirty", "scalars", "hyperparameters", "streams"],
    meta_fields=["group", "optimizer"],
)
@dataclass(frozen=True)
class GroupCache:
    """The cached rows of one group.

    Attributes:
        buffer: `Rows` with a leading axis of slots.
        slot_table: `int32[slots, 3]`, the row that each slot holds: position of its table in `group` (FREE where the
            slot is free), high and low 32 bits of its id.
        counts: `int32[slots]`, lookups of the row since it came in, at most 2**31 - 1; 0 where free.
        dirty: `bool[slots]`, whether the row was updated since it came in or was last flushed.
        scalars: the optimizer's scalars, such as step counts; they advance once an update.
        hyperparameters: constants of the optimizer, such as its rate.
        streams: `uint32[tables, 2]`, what stochastic rounding draws from for each table; `[0, 2]` without.
        group: the tables, static.
        optimizer: the row optimizer, static.
    """

    FREE: ClassVar[int] = -1

    buffer: Rows
    slot_table: Array
    counts: Array
    dirty: Array
    scalars: tuple[Array, ...]
    hyperparameters: tuple[Array, ...]
    streams: Array
    group: Group
    optimizer: RowOptimizer

    @property
    def contents(self) -> Contents:
        """Its arrays."""
        return Contents(*(getattr(self, name) for name in Contents._fields))

    def holding(self, contents: Contents) -> GroupCache:
        """The same group with other arrays."""
        return dataclasses.replace(self, **contents._asdict())

    @property
    def slots(self) -> int:
        """Number of rows that it can hold."""
        return self.counts.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


@partial(jax.tree_util.register_dataclass, data_fields=["groups", "step", "exchanged", "fault"], meta_fields=[])
@dataclass(frozen=True)
class CacheState:
    """The cache: a pytree of fixed shapes that describes itself. It is threaded through the steps and donated to them.

    Attributes:
        groups: the cached rows of each group of the store, in its order.
        step: `int32[]`, updates done.
        exchanged: `int32[]`, exchanges done; one ahead of `step` between a step's exchange and its update.
        fault: `int32[]`, 0, or the reason why cache and plan did not fit; from then on nothing changes the rows.
    """

    NO_FAULT: ClassVar[int] = 0
    EXCHANGE_MISMATCH: ClassVar[int] = 1
    UPDATE_MISMATCH: ClassVar[int] = 2

    groups: tuple[GroupCache, ...]
    step: Array
    exchanged: Array
    fault: Array

    @property
    def slots(self) -> tuple[int, ...]:
        """Number of rows that the cache can hold of each group."""
        return tuple(group.slots for group in self.groups)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


@partial(jax.tree_util.register_dataclass, data_fields=["unique_slots", "inverse", "occurrences"], meta_fields=[])
@dataclass(frozen=True)
class GroupPlan:
    """Where a batch finds its rows of one group. L is its number of lookups in all features of the group's tables; U a
    bound on its unique rows.

    For lookups of rows a, b, a (L = 3) with a in slot 7, b in slot 4 and U = 4 in a cache of 9 slots:
    `unique_slots = [7, 4, 9, 9]`, `inverse = [0, 1, 0]`, `occurrences = [2, 1, 0, 0]`.

    Attributes:
        unique_slots: `int32[U]`, the slot of each unique row in order of first occurrence; then padding, equal to the
            number of slots.
        inverse: `int32[L]`, for each lookup the position of its row in `unique_slots`; U for one that stands for
            nothing, such as the padding of a short batch. Features follow each other in the order of the plan's, each
            in C order.
        occurrences: `int32[U]`, lookups of each unique row.
    """

    unique_slots: Array
    inverse: Array
    occurrences: Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["groups", "weights", "bags", "step", "samples"],
    meta_fields=["features"],
)
@dataclass(frozen=True)
class Plan:
    """Where a batch finds its rows, and how they are pooled.

    Attributes:
        groups: of each group of the cache.
        weights: for features whose ids have weights, `float32[L]` by name, L being the feature's ids.
        bags: for features with ragged bags, the bag of each id, `int32[L]` by name; padding is the number of bags.
        step: `int32[]`, the number of the batch: the updates that come before it.
        samples: `int32[]`, samples in the batch, without padding.
        features: the layout of each feature's ids, static; the first axis is of samples.
    """

    groups: tuple[GroupPlan, ...]
    weights: Mapping[str, Array]
    bags: Mapping[str, Array]
    step: Array
    samples: Array
    features: tuple[FeatureLayout, ...]

    @property
    def mask(self) -> jax.Array:
        """`bool[samples in the padded batch]`, false for the padding of a short batch. For the loss."""
        return jnp.arange(self.features[0].samples, dtype=jnp.int32) < self.samples


def init(store: HostStore, slots: int | Sequence[int]) -> CacheState:
    """An empty cache for the tables of `store`.

    Args:
        store: gives tables, optimizers, their scalars and the step to go on from.
        slots: rows that the cache can hold, below 2**31: one number for each group of the store, or a single number
            for a store of one group.

    Returns:
        A state whose slots are all free.

    Raises:
        ValueError: if the numbers are not as many as the groups.
    """
    numbers = (slots,) if isinstance(slots, int | np.integer) else tuple(slots)
    if len(numbers) != len(store.groups):
        raise ValueError(
            f"init(slots={slots!r}): the store has {len(store.groups)} groups of tables, "
            f"{[part.group.names for part in store.groups]}: give each a number of slots"
        )
    return CacheState(
        groups=tuple(_init_group(part, number) for part, number in zip(store.groups, numbers, strict=True)),
        step=jnp.array(store.step, jnp.int32),
        exchanged=jnp.array(store.step, jnp.int32),
        fault=jnp.array(CacheState.NO_FAULT, jnp.int32),
    )


def _init_group(rows: RowStore, slots: int) -> GroupCache:
    optimizer, group = rows.optimizer, rows.group
    streams = group.streams(rows.seed).astype("<u8").view("<u4").reshape(-1, 2)
    return GroupCache(
        buffer=Rows(
            jnp.zeros((slots, group.dim), group.dtype),
            tuple(jnp.zeros((slots, *leaf.shape), leaf.dtype) for leaf in optimizer.row_shapes),
        ),
        slot_table=jnp.full((slots, 3), GroupCache.FREE, jnp.int32),
        counts=jnp.zeros(slots, jnp.int32),
        dirty=jnp.zeros(slots, bool),
        scalars=tuple(jnp.array(scalar) for scalar in rows.scalars),
        hyperparameters=tuple(jnp.array(value) for value in optimizer.hyperparameters),
        streams=jnp.array(streams if optimizer.draws else streams[:0]),
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
        For each feature a `float32` array. Without a combiner it has the shape of the ids with a last axis of `dim`;
        with "sum" or "mean" the last axis of the ids, or the ragged bag, is pooled: `[B, dim]` for ids `[B, L]`. Empty
        bags give zeros, and so do ids that stand for nothing. If cache and plan do not belong together (another
        batch's plan, no exchange, a stale cache) everything is NaN.

    For one feature "user" with ids `[5, 6, 5]` and dim 2, `lookup(cache, plan)["user"]` is `[[a, b], [c, d], [a, b]]`.
    For a feature with ids `[[5, 6]]` and combiner "mean" it is `[[(a + c) / 2, (b + d) / 2]]`.
    """
    ready = _ready(cache, plan)
    flat = []
    for state, part in zip(cache.groups, plan.groups, strict=True):
        rows = kernels.gather(state.buffer.weights, part.unique_slots, part.inverse).astype(jnp.float32)
        # What is made of the rows must not depend on how XLA would fuse it with a cache of this or that size.
        flat.append(jax.lax.optimization_barrier(jnp.where(ready, rows, jnp.nan)))
    results = {}
    for feature, place in _places(plan):
        rows = flat[feature.group][place]
        if feature.combiner is not None:
            rows = _pool(rows, feature, plan, place)
        if feature.bags is not None:
            rows = jnp.where(ready, rows, jnp.nan)  # an empty bag has no rows that say so
        results[feature.name] = rows.reshape(feature.result(rows.shape[-1]))
    return results


def _places(plan: Plan) -> Iterator[tuple[FeatureLayout, slice]]:
    """Each feature, and where its ids lie among those of its group."""
    stops = [0] * len(plan.groups)
    for feature in plan.features:
        start = stops[feature.group]
        stops[feature.group] += feature.lookups
        yield feature, slice(start, stops[feature.group])


def _weights(feature: FeatureLayout, plan: Plan, place: slice) -> jax.Array:
    """What each id of a feature counts, `float32[L]`: 0 for those that stand for nothing."""
    part = plan.groups[feature.group]
    present = part.inverse[place] < part.unique_slots.shape[0]
    return jnp.where(present, plan.weights.get(feature.name, jnp.float32(1)), jnp.float32(0))


def _sum_bags(rows: jax.Array, feature: FeatureLayout, plan: Plan) -> jax.Array:
    """The sum of each bag, `[..., N]`, of what its ids have, `[L, N]`."""
    if feature.bags is not None:
        return kernels.sum_occurrences(rows, plan.bags[feature.name], feature.bags)
    if len(feature.shape) == 1:
        return rows
    return jnp.sum(rows.reshape(*feature.shape, rows.shape[-1]), axis=-2)


def _totals(feature: FeatureLayout, plan: Plan, place: slice) -> jax.Array:
    """What the sum of each bag is divided by for its mean, `[..., 1]`: its weights; infinity where they add up to 0."""
    total = _sum_bags(_weights(feature, plan, place)[:, None], feature, plan)
    return jnp.where(total == 0, jnp.inf, total)


def _pool(rows: jax.Array, feature: FeatureLayout, plan: Plan, place: slice) -> jax.Array:
    """The bags of a feature, `float32[..., dim]`, of the rows of its ids, `float32[L, dim]`."""
    if feature.weighted:
        rows = rows * _weights(feature, plan, place)[:, None]
    pooled = _sum_bags(rows, feature, plan)
    return pooled / _totals(feature, plan, place) if feature.combiner == "mean" else pooled


def _spread(gradient: jax.Array, feature: FeatureLayout, plan: Plan, place: slice) -> jax.Array:
    """The gradient of the row of each id, `float32[L, dim]`, from that of what `lookup` returned."""
    dim = gradient.shape[-1]
    if feature.combiner is None:
        return gradient.reshape(-1, dim)
    if feature.combiner == "mean":
        gradient = gradient / _totals(feature, plan, place)
    if feature.bags is not None:
        gradient = gradient.at[plan.bags[feature.name]].get(mode="fill", fill_value=0)
    elif len(feature.shape) > 1:
        gradient = jnp.broadcast_to(gradient[..., None, :], (*feature.shape, dim)).reshape(-1, dim)
    return gradient * _weights(feature, plan, place)[:, None] if feature.weighted else gradient


def update(cache: CacheState, plan: Plan, row_gradients: Mapping[str, jax.Array]) -> CacheState:
    """Sums the gradients of each row's lookups and applies the row optimizer to the rows of the batch, and no other.

    Args:
        cache: the state given to `lookup`.
        plan: the batch's plan.
        row_gradients: gradients of the loss with respect to the result of `lookup`, same features and shapes. Those of
            features of frozen tables are not used and may be left out.

    Returns:
        The state after this step. Duplicate ids are summed in order of lookup, so that the result does not depend on
        the cache. The optimizers' scalars, such as step counts, advance in every group, looked up or not. If cache and
        plan do not belong together nothing changes but `fault`, which the pipeline reports.

    Raises:
        ValueError: while tracing, for features or shapes other than those of the plan, or for the cache of an
            evaluation, which cannot be updated.

    With sgd(0.5), weights 1.0 of a row with two lookups whose gradients are 0.25 and 0.5 become 1 - 0.5 * 0.75 = 0.625.
    """
    expected = {feature.name: feature.result(cache.groups[feature.group].group.dim) for feature in plan.features}
    frozen = {feature.name for feature in plan.features if cache.groups[feature.group].group.frozen}
    found = {name: gradient.shape for name, gradient in row_gradients.items()}
    if found != {name: shape for name, shape in expected.items() if name in found or name not in frozen}:
        raise ValueError(
            "update needs the gradients of what lookup returned, jax.grad(loss, argnums=...)(..., rows, ...): "
            f"expected shapes {expected}, got {found}"
        )
    if any(len(state.hyperparameters) != len(state.optimizer.hyperparameters) for state in cache.groups):
        raise ValueError("update got the cache of an evaluation, which holds weights alone: train with the other one")
    accept = _ready(cache, plan)
    spread: list[list[jax.Array]] = [[] for _ in cache.groups]
    for feature, place in _places(plan):
        if feature.name not in frozen:
            gradient = row_gradients[feature.name].astype(jnp.float32)
            spread[feature.group].append(_spread(gradient, feature, plan, place))
    return dataclasses.replace(
        cache,
        groups=tuple(
            _update_group(state, part, gradients, cache.step, accept)
            for state, part, gradients in zip(cache.groups, plan.groups, spread, strict=True)
        ),
        step=cache.step + accept.astype(jnp.int32),
        fault=_fault(cache, accept, CacheState.UPDATE_MISMATCH),
    )


def _update_group(
    state: GroupCache, plan: GroupPlan, gradients: list[jax.Array], step: jax.Array, accept: jax.Array
) -> GroupCache:
    """Updates the rows of one group. `gradients` are those of the lookups, `float32[..., dim]` of each feature."""

    def counted(counts):
        most = jnp.iinfo(counts.dtype).max  # a hot row of a long run stays there
        return jnp.where(counts > most - plan.occurrences, most, counts + plan.occurrences)

    if state.group.frozen:
        return dataclasses.replace(state, counts=kernels.update(state.counts, plan.unique_slots, counted, accept))
    flat = jnp.concatenate([jnp.zeros((0, state.group.dim), jnp.float32), *gradients])
    unique = plan.unique_slots.shape[0]
    summed = jax.lax.optimization_barrier(kernels.sum_occurrences(flat, plan.inverse, unique))
    scalars, words = state.scalars, None
    if state.optimizer.draws:
        entries = kernels.read(state.slot_table, plan.unique_slots)
        ids = jax.lax.bitcast_convert_type(entries[:, 1:], jnp.uint32)
        words = random_words(state.streams[entries[:, 0]], ids, step, state.group.dim)

    def updated(old):
        nonlocal scalars
        rows, counts, dirty = old
        weights, row_state, scalars = state.optimizer.update(
            summed, rows.weights, rows.state, state.scalars, state.hyperparameters, words
        )
        return Rows(weights, row_state), counted(counts), jnp.ones_like(dirty)

    buffer, counts, dirty = kernels.update(
        (state.buffer, state.counts, state.dirty), plan.unique_slots, updated, accept
    )
    return dataclasses.replace(
        state,
        buffer=buffer,
        counts=counts,
        dirty=dirty,
        scalars=jax.tree.map(lambda new, old: jnp.where(accept, new, old), scalars, state.scalars),
    )


def _fault(cache: CacheState, accept: jax.Array, reason: int) -> jax.Array:
    """The first fault stays: it is the cause of those that follow."""
    return jnp.where(accept | (cache.fault != CacheState.NO_FAULT), cache.fault, reason)


class GroupExchange(NamedTuple):
    """What moves before a batch's step in one group. M is a size class: the first rows are real, the others padding.

    Attributes:
        slots: `int32[M]`, where the incoming rows go; padding is the number of slots.
        slot_table: `int32[M, 3]`, the entries of the slot table for the incoming rows.
        rows: the incoming `Rows`, `[M, ...]`.
    """

    slots: Array
    slot_table: Array
    rows: Rows


class Counters(NamedTuple):
    """The counters of a `CacheState`, as an exchange finds them: `int32[]` each."""

    step: Array
    exchanged: Array
    fault: Array

    @classmethod
    def of(cls, cache: CacheState) -> Counters:
        """Those of `cache`."""
        return cls(cache.step, cache.exchanged, cache.fault)


def exchange_group(
    contents: Contents, counters: Counters, exchange: GroupExchange, step: Array
) -> tuple[Contents, Rows]:
    """Takes the victims of a batch out of their slots in one group and puts its missed rows in. Pure.

    Args:
        contents: of the group: all but its static data, so that groups of equal shapes share a compiled program. Those
            that do not change go through it too, or they would be committed to a device by the user's step where the
            others are not, and the step be compiled once more.
        counters: of the cache.
        exchange: the rows.
        step: `int32[]`, number of the batch.

    Returns:
        The contents, and the outgoing `Rows`, `[M, ...]`: what was in the slots that were filled. Nothing changes
        unless the cache stands right after the update of the batch before `step`.
    """
    size = exchange.slots.shape
    (buffer, slot_table, counts, dirty), (outgoing, *_) = kernels.exchange(
        (contents.buffer, contents.slot_table, contents.counts, contents.dirty),
        exchange.slots,
        (exchange.rows, exchange.slot_table, jnp.zeros(size, jnp.int32), jnp.zeros(size, bool)),
        _may_exchange(counters, step),
    )
    return contents._replace(buffer=buffer, slot_table=slot_table, counts=counts, dirty=dirty), outgoing


def count_exchange(counters: Counters, step: Array) -> tuple[Counters, Array]:
    """Counts the exchange of batch `step`, made by `exchange_group` in every group, or sets `fault`. Pure.

    Returns:
        The counters after it, and a record `int32[4]`: `fault`, and `step` and `exchanged` as found, and 1 if the
        exchange was made.
    """
    accept = _may_exchange(counters, step)
    fault = jnp.where(accept | (counters.fault != CacheState.NO_FAULT), counters.fault, CacheState.EXCHANGE_MISMATCH)
    record = jnp.stack([fault, counters.step, counters.exchanged, accept.astype(jnp.int32)])
    return Counters(counters.step, counters.exchanged + accept.astype(jnp.int32), fault), record


def _may_exchange(counters: Counters, step: Array) -> jax.Array:
    """Whether the cache stands right after the update of the batch before `step`."""
    sound = counters.fault == CacheState.NO_FAULT
    return (counters.step == step) & (counters.exchanged == step) & sound


def slot_entries(group: Group, keys: np.ndarray) -> np.ndarray:
    """Entries `int32[N, 3]` of the slot table for rows given by `keys` (`int64[N]`), in NumPy."""
    table, ids = group.locate(keys)
    words = ids.astype("<i8").view("<i4").reshape(-1, 2)
    return np.stack([table.astype(np.int32), words[:, 1], words[:, 0]], axis=1)


def slot_keys(group: Group, slot_table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The occupied slots `int64[N]` of a slot table and the keys `int64[N]` of the rows in them, in NumPy."""
    slot_table = np.asarray(slot_table)
    occupied = np.flatnonzero(slot_table[:, 0] != GroupCache.FREE)
    table, high, low = slot_table[occupied].astype(np.int64).T
    ids = (high << 32) | (low & 0xFFFFFFFF)
    return occupied, (ids.view(np.uint64) + group.bases[table]).view(np.int64)
