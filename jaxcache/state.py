"""The cache on the device: `CacheState`, `Plan`, and the pure functions on them. Everything here runs inside `jit`."""

from __future__ import annotations

import dataclasses
import math
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
from jaxcache.slot_index import SlotIndex
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


class Residents(NamedTuple):
    """What `admit` keeps of the rows of one group, beside them.

    Attributes:
        row_index: finds the slot of a row.
        used: `int32[]`, slots that hold a row: the first ones.
        stamps: `int32[slots]`, the last `admit` that wanted the row of each slot, counted from 1; 0 for none.
        ranks: `int32[slots]`, for policies that rank the rows of the start, the rank of each; the lowest goes first.
            `[0]` for others.
        evicted: `int32[]`, rows evicted since counts last aged.
    """

    row_index: SlotIndex
    used: Array
    stamps: Array
    ranks: Array
    evicted: Array


@partial(jax.tree_util.register_dataclass, data_fields=["residents", "admitted", "pinned_after"], meta_fields=["order"])
@dataclass(frozen=True)
class OnDemand:
    """What a cache keeps for `admit`.

    Attributes:
        residents: of each group.
        admitted: `int32[]`, calls of `admit` done.
        pinned_after: `int32[]`, those before the step that is under way; the rows of later ones stay where they are.
        order: which row goes first, as in `Policy`, static.
    """

    residents: tuple[Residents, ...]
    admitted: Array
    pinned_after: Array
    order: str


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["groups", "step", "exchanged", "fault", "on_demand"],
    meta_fields=["backends"],
)
@dataclass(frozen=True)
class CacheState:
    """The cache: a pytree of fixed shapes that describes itself. It is threaded through the steps and donated to them.

    Attributes:
        groups: the cached rows of each group of the store, in its order.
        step: `int32[]`, updates done.
        exchanged: `int32[]`, steps whose rows were brought in; one ahead of `step` before a step's update.
        fault: `int32[]`, 0, or the reason why the cache cannot go on; from then on nothing changes the rows.
        on_demand: what `admit` needs; None where a `LookAhead` brings rows in.
        backends: what gathers, updates and exchanges its rows, static.
    """

    NO_FAULT: ClassVar[int] = 0
    EXCHANGE_MISMATCH: ClassVar[int] = 1
    UPDATE_MISMATCH: ClassVar[int] = 2
    ADMIT_FAILED: ClassVar[int] = 3

    groups: tuple[GroupCache, ...]
    step: Array
    exchanged: Array
    fault: Array
    on_demand: OnDemand | None = None
    backends: kernels.Choice = kernels.XLA

    @property
    def slots(self) -> tuple[int, ...]:
        """Number of rows that the cache can hold of each group."""
        return tuple(group.slots for group in self.groups)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


@partial(jax.tree_util.register_dataclass, data_fields=["unique_slots", "inverse", "order", "starts"], meta_fields=[])
@dataclass(frozen=True)
class GroupPlan:
    """Where a batch finds its rows of one group. L is its number of lookups in all features of the group's tables; U a
    bound on its unique rows.

    For lookups of rows a, b, a (L = 3) with a in slot 7, b in slot 4 and U = 4 in a cache of 9 slots:
    `unique_slots = [7, 4, 9, 9]`, `inverse = [0, 1, 0]`, `order = [0, 2, 1]`, `starts = [0, 2, 3, 3, 3]`.

    Attributes:
        unique_slots: `int32[U]`, the slot of each unique row in order of first occurrence; then padding, equal to the
            number of slots.
        inverse: `int32[L]`, for each lookup the position of its row in `unique_slots`; U for one that stands for
            nothing, such as the padding of a short batch. Features follow each other in the order of the plan's, each
            in C order.
        order: `int32[L]`, the lookups of each unique row one behind the other, in order; those that stand for nothing
            come last.
        starts: `int32[U + 1]`, where the lookups of each unique row begin in `order`, and where the last ones end.
    """

    unique_slots: Array
    inverse: Array
    order: Array
    starts: Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["groups", "weights", "bags", "offsets", "step", "samples"],
    meta_fields=["features"],
)
@dataclass(frozen=True)
class Plan:
    """Where a batch finds its rows, and how they are pooled.

    Attributes:
        groups: of each group of the cache.
        weights: for features whose ids have weights, `float32[L]` by name, L being the feature's ids.
        bags: for features with ragged bags, the bag of each id, `int32[L]` by name; padding is the number of bags.
        offsets: for the same, where each bag begins among the feature's ids, `int32[B + 1]` by name.
        step: `int32[]`, the number of the batch: the updates that come before it; on demand, the calls of `admit` that
            come before its step.
        samples: `int32[]`, samples in the batch, without padding.
        features: the layout of each feature's ids, static; the first axis is of samples.
    """

    groups: tuple[GroupPlan, ...]
    weights: Mapping[str, Array]
    bags: Mapping[str, Array]
    offsets: Mapping[str, Array]
    step: Array
    samples: Array
    features: tuple[FeatureLayout, ...]

    @property
    def mask(self) -> jax.Array:
        """`bool[samples in the padded batch]`, false for the padding of a short batch. For the loss."""
        return jnp.arange(self.features[0].samples, dtype=jnp.int32) < self.samples


def empty_cache(
    store: HostStore,
    slots: int | Sequence[int],
    *,
    backends: str | Mapping[str, str] | kernels.Choice | None = None,
) -> CacheState:
    """An empty cache for the tables of `store`, without what `admit` needs.

    Args:
        store: gives tables, optimizers, their scalars and the step to go on from.
        slots: rows that the cache can hold, below 2**31: one number for each group of the store, or a single number
            for a store of one group.
        backends: what gathers, updates and exchanges rows, see `jaxcache.kernels.choose`; None leaves it to the
            environment, and to what is fastest on the default device.

    Returns:
        A state whose slots are all free.

    Raises:
        ValueError: if the numbers are not as many as the groups, or for a backend that does not exist.
        NotImplementedError: for a backend that does not run here.
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
        backends=kernels.choose(backends),
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
    begun = cache.step if cache.on_demand is None else cache.on_demand.pinned_after
    return (plan.step == begun) & (cache.exchanged == cache.step + 1) & (cache.fault == CacheState.NO_FAULT)


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
    results = {}
    for number, (state, part) in enumerate(zip(cache.groups, plan.groups, strict=True)):
        features = [(feature, place) for feature, place in _places(plan) if feature.group == number]
        single = [(feature, place) for feature, place in features if not _is_pooled(feature)]
        pooled = [(feature, place) for feature, place in features if _is_pooled(feature)]
        table, slots, dim = state.buffer.weights, part.unique_slots, state.group.dim
        if single:
            inverse = _concatenate([part.inverse[place] for _, place in single])
            rows = kernels.gather(table, slots, inverse, ready, choice=cache.backends)
            for (feature, _), of_ids in zip(single, _split(rows, [f.lookups for f, _ in single]), strict=True):
                results[feature.name] = of_ids
        if pooled:
            inverse = _concatenate([part.inverse[place] for _, place in pooled])
            bags = [_bags(feature, plan) for feature, _ in pooled]
            weights = _lookup_weights(pooled, plan)
            sums = kernels.pool(table, slots, inverse, bags, weights, ready, choice=cache.backends)
            for (feature, _), of_bags in zip(pooled, _split(sums, [b.count for b in bags]), strict=True):
                results[feature.name] = of_bags
        for feature, place in features:
            rows = results[feature.name]
            if feature.combiner == "mean":
                rows = rows / _totals(feature, plan, place, cache.backends)
            results[feature.name] = rows.reshape(feature.result(dim))
    return {feature.name: results[feature.name] for feature in plan.features}


def _places(plan: Plan) -> Iterator[tuple[FeatureLayout, slice]]:
    """Each feature, and where its ids lie among those of its group."""
    stops = [0] * len(plan.groups)
    for feature in plan.features:
        start = stops[feature.group]
        stops[feature.group] += feature.lookups
        yield feature, slice(start, stops[feature.group])


def _is_pooled(feature: FeatureLayout) -> bool:
    """Whether rows of a feature are added up or multiplied, rather than handed out as they are."""
    return feature.combiner is not None and (feature.bags is not None or len(feature.shape) > 1 or feature.weighted)


def _bags(feature: FeatureLayout, plan: Plan) -> kernels.Bags:
    """The bags of a pooled feature; an id that has its bag to itself is one too."""
    if feature.bags is not None:
        owners, offsets = plan.bags[feature.name], plan.offsets[feature.name]
        return kernels.Bags(feature.bags, feature.lookups, owners, offsets)
    return kernels.Bags(math.prod(feature.result(1)), feature.lookups)


def _concatenate(parts: Sequence[Any]) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _split(rows: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    """Slices of `rows` of the given sizes, one behind the other."""
    return jnp.split(rows, np.cumsum(sizes)[:-1].tolist()) if len(sizes) > 1 else [rows]


def _weights(feature: FeatureLayout, plan: Plan, place: slice) -> jax.Array:
    """What each id of a feature counts, `float32[L]`: 0 for those that stand for nothing."""
    part = plan.groups[feature.group]
    present = part.inverse[place] < part.unique_slots.shape[0]
    return jnp.where(present, plan.weights.get(feature.name, jnp.float32(1)), jnp.float32(0))


def _lookup_weights(features: Sequence[tuple[FeatureLayout, slice]], plan: Plan) -> jax.Array | None:
    """The weights of the ids of several features, one behind the other; None if none of them has any."""
    if not any(feature.weighted for feature, _ in features):
        return None
    return _concatenate([_weights(feature, plan, place) for feature, place in features])


def _totals(feature: FeatureLayout, plan: Plan, place: slice, choice: kernels.Choice) -> jax.Array:
    """What the sum of each bag is divided by for its mean, `[bags, 1]`: its weights; infinity where they sum to 0."""
    bags, weights = _bags(feature, plan), _weights(feature, plan, place)
    if bags.owners is None:
        total = jnp.sum(weights.reshape(bags.count, bags.size), axis=1)
    elif feature.weighted:
        order = jnp.arange(bags.lookups, dtype=jnp.int32)
        column = kernels.Gradients(weights[:, None], None, None, bags.owners, order, bags.offsets)
        total = kernels.sum_occurrences(column, choice=choice)[:, 0]
    else:
        # Ones add up to the same in any order.
        total = jnp.zeros(bags.count, jnp.float32).at[bags.owners].add(weights, mode="drop")
    return jnp.where(total == 0, jnp.inf, total)[:, None]


def _gradients(
    plan: Plan, group: int, dim: int, row_gradients: Mapping[str, jax.Array], choice: kernels.Choice
) -> kernels.Gradients:
    """The gradients of the ids of a group, from those of what `lookup` returned."""
    features = [(feature, place) for feature, place in _places(plan) if feature.group == group]
    part, rows, sources, base = plan.groups[group], [jnp.zeros((0, dim), jnp.float32)], [], 0
    for feature, place in features:
        gradient = row_gradients[feature.name].astype(jnp.float32).reshape(-1, dim)
        if feature.combiner == "mean":
            gradient = gradient / _totals(feature, plan, place, choice)
        owners = jnp.arange(feature.lookups, dtype=jnp.int32)
        if _is_pooled(feature):
            bags = _bags(feature, plan)
            owners = owners // max(bags.size, 1) if bags.owners is None else bags.owners
        rows.append(gradient)
        sources.append(owners + base)
        base += gradient.shape[0]
    pooled = any(_is_pooled(feature) for feature, _ in features)
    return kernels.Gradients(
        rows=_concatenate(rows[1:] or rows),
        sources=_concatenate(sources) if pooled else None,
        weights=_lookup_weights(features, plan),
        inverse=part.inverse,
        order=part.order,
        starts=part.starts,
    )


def update(cache: CacheState, plan: Plan, row_gradients: Mapping[str, jax.Array]) -> CacheState:
    """Sums the gradients of each row's lookups and applies the row optimizer to the rows of the batch, and no other.

    Args:
        cache: the state given to `lookup`.
        plan: the batch's plan.
        row_gradients: gradients of the loss with respect to the result of `lookup`, same features and shapes. Those of
            features of frozen tables are not used and may be left out.

    Returns:
        The state after this step. Duplicate ids are summed by a tree that depends on their number alone (see
        `jaxcache.kernels.xla`), so that the result does not depend on the cache. The optimizers' scalars, such as step
        counts, advance in every group, looked up or not. If cache and plan do not belong together nothing changes but
        `fault`, which the pipeline reports.

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
    # Fused with the sums, gradients would be rounded in ways that depend on what else is in the program.
    row_gradients = jax.lax.optimization_barrier(dict(row_gradients))
    return dataclasses.replace(
        cache,
        groups=tuple(
            _update_group(cache, plan, number, row_gradients, accept) for number, _ in enumerate(cache.groups)
        ),
        step=cache.step + accept.astype(jnp.int32),
        fault=_fault(cache, accept, CacheState.UPDATE_MISMATCH),
        on_demand=_unpinned(cache.on_demand, accept),
    )


def _unpinned(on_demand: OnDemand | None, accept: jax.Array | bool = True) -> OnDemand | None:
    """The rows of a step that is over may be evicted."""
    if on_demand is None:
        return None
    return dataclasses.replace(on_demand, pinned_after=jnp.where(accept, on_demand.admitted, on_demand.pinned_after))


def release(cache: CacheState) -> CacheState:
    """Ends a step without an update: after an evaluation, or where the rows of a batch are not trained after all.

    Args:
        cache: a state for `admit`.

    Returns:
        The same, whose rows may all be evicted again; the plans of this step have no rows any more.
    """
    return dataclasses.replace(cache, exchanged=jnp.array(cache.step), on_demand=_unpinned(cache.on_demand))


def _update_group(
    cache: CacheState, plan: Plan, number: int, row_gradients: Mapping[str, jax.Array], accept: jax.Array
) -> GroupCache:
    """Updates the rows of one group."""
    state, part = cache.groups[number], plan.groups[number]
    if state.group.frozen:
        lookups = part.starts[1:] - part.starts[:-1]
        counts = kernels.rewrite(state.counts, part.unique_slots, lambda old: kernels.add_counts(old, lookups), accept)
        return dataclasses.replace(state, counts=counts)
    words = None
    if state.optimizer.draws:
        entries = kernels.read(state.slot_table, part.unique_slots)
        ids = jax.lax.bitcast_convert_type(entries[:, 1:], jnp.uint32)
        words = random_words(state.streams[entries[:, 0]], ids, cache.step, state.group.dim)
    kept = kernels.update(
        kernels.Slots(state.buffer.weights, state.buffer.state, state.counts, state.dirty),
        part.unique_slots,
        _gradients(plan, number, state.group.dim, row_gradients, cache.backends),
        state.optimizer.rule(state.scalars, state.hyperparameters, words),
        accept,
        choice=cache.backends,
    )
    scalars = state.optimizer.advance(state.scalars, state.hyperparameters)
    return dataclasses.replace(
        state,
        buffer=Rows(kept.weights, kept.state),
        counts=kept.counts,
        dirty=kept.dirty,
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
    contents: Contents, counters: Counters, exchange: GroupExchange, step: Array, choice: kernels.Choice = kernels.XLA
) -> tuple[Contents, Rows]:
    """Takes the victims of a batch out of their slots in one group and puts its missed rows in. Pure.

    Args:
        contents: of the group: all but its static data, so that groups of equal shapes share a compiled program. Those
            that do not change go through it too, or they would be committed to a device by the user's step where the
            others are not, and the step be compiled once more.
        counters: of the cache.
        exchange: the rows.
        step: `int32[]`, number of the batch.
        choice: the backend.

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
        choice=choice,
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
