"""On-demand mode: `admit` makes a plan inside `jit` and brings the missing rows in through host callbacks."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from jaxcache import kernels, slot_index
from jaxcache.chunks import bring_in, write_dirty_rows
from jaxcache.features import Bags, Feature, FeatureLayout, Features, check_combiner
from jaxcache.optimizers import Rows
from jaxcache.planner import TooFewSlots
from jaxcache.policies import Policy, lru
from jaxcache.report import GroupReport, Report
from jaxcache.slot_index import NONE
from jaxcache.state import (
    CacheState,
    GroupCache,
    GroupPlan,
    OnDemand,
    Plan,
    Residents,
    empty_cache,
)
from jaxcache.store import HostStore
from jaxcache.tables import Group
from jaxcache.transfers import Interrupted

Array = Any

_MOST_ROWS = 2**31 - 1
_HALF_LIFE = 6  # turnovers of the cache after which a lookup counts half, as in `LookAheadPlanner`


# On the host


def init(
    store: HostStore,
    slots: int | Sequence[int],
    policy: Policy | None = None,
    *,
    backends: str | Mapping[str, str] | kernels.Choice | None = None,
) -> CacheState:
    """A cache for `admit`: empty, but for the rows with which `static` starts.

    Args:
        store: gives tables, optimizers, their scalars and the step to go on from.
        slots: rows that the cache can hold, below 2**31: one number for each group of the store, or a single number
            for a store of one group. One step must find room for all rows that it looks up.
        policy: which rows make room: `lru()`, the default; `lfu()`, whose counts age here, halved whenever six times as
            many rows as there are slots were evicted; or `static(counts)`, whose rows stay as long as there are others.
        backends: what gathers, updates and exchanges rows, see `jaxcache.kernels.choose`; None leaves it to the
            environment, and to what is fastest on the default device.

    Returns:
        A state on the default device.

    Raises:
        ValueError: if the numbers are not as many as the groups, for a backend that does not exist, for another policy,
            and for tables of 2**31 rows or more, whose ids do not fit the 32 bits that they have inside `jit`.
        RuntimeError: if a cache that was not flushed holds newer rows than the store.
        NotImplementedError: for a backend that does not run here.

    >>> import optax
    >>> from jaxcache import Table
    >>> init(HostStore({"item": Table(10**9, 4)}, optax.sgd(0.1)), slots=100).slots
    (100,)
    """
    _check_rows([rows.group for rows in store.groups], "init")
    if store.behind:
        raise RuntimeError(
            "init: a cache that was never flushed holds newer rows than the store: go on with it, or flush it first, "
            "jc.flush(cache, store)"
        )
    return _with_residents(empty_cache(store, slots, backends=backends), store, policy)


def on_demand(cache: CacheState, store: HostStore, policy: Policy | None = None) -> CacheState:
    """Makes a cache that a `LookAhead` has filled ready for `admit`. The way back is `LookAhead.start(cache)`.

    Args:
        cache: the newest cache, after the `with` block of its pipeline; or one for `admit`, to change its policy. It is
            donated.
        store: its store.
        policy: as for `init`.

    Returns:
        The same rows with an index of O(slots), built from the slot table.

    Raises:
        ValueError: for a cache of another configuration, or one that is not the newest.
        ValueError, RuntimeError: as `init`.
    """
    _check_rows([rows.group for rows in store.groups], "on_demand")
    _check_cache(cache, store, "on_demand")
    if int(cache.fault) != CacheState.NO_FAULT:
        raise ValueError("on_demand got a cache that has met a fault: its steps are not sound, init a new one")
    newest = store.exchanged if cache.on_demand is None else store.transfers.admitted
    found = int(cache.exchanged if cache.on_demand is None else cache.on_demand.admitted)
    if found != newest or (store.loaded and cache.on_demand is None):
        raise ValueError(
            f"on_demand got a stale cache, of step {int(cache.step)}: give the newest one, or, if it was flushed or "
            "rows were loaded since, init a new one"
        )
    for state in cache.groups:
        free = np.flatnonzero(np.asarray(state.slot_table)[:, 0] == GroupCache.FREE)
        if len(free) and free[0] != state.slots - len(free):
            raise ValueError("the slots in use must be the first ones: the cache given to on_demand() is damaged")
    # A loop that was left between exchange and update has an exchange too many.
    return _with_residents(dataclasses.replace(cache, exchanged=jnp.array(cache.step)), store, policy)


def _with_residents(cache: CacheState, store: HostStore, policy: Policy | None) -> CacheState:
    policy = lru() if policy is None else policy
    if not isinstance(policy, Policy) or policy.name not in ("lru", "lfu", "static"):
        name = policy.name if isinstance(policy, Policy) else type(policy).__name__
        raise ValueError(
            f"on-demand mode got policy {name}: it has lru(), lfu() and static(counts); those that look ahead are for "
            "LookAhead"
        )
    groups, residents = [], []
    for state, rows in zip(cache.groups, store.groups, strict=True):
        ranks = np.zeros(state.slots if policy.order == "rank" else 0, np.int32)
        if policy.order == "rank":
            counts = policy.group_counts(rows.group)
            keys = policy.warm_keys(rows.group, state.slots)
            state = bring_in(state, rows, keys, cache.backends)
            ranks[: len(keys)] = counts[keys]
        groups.append(state)
        residents.append(
            Residents(
                row_index=slot_index.build(state.slot_table),
                used=jnp.sum(state.slot_table[:, 0] != GroupCache.FREE, dtype=jnp.int32),
                stamps=jnp.zeros(state.slots, jnp.int32),
                ranks=jnp.asarray(ranks),
                evicted=jnp.zeros((), jnp.int32),
            )
        )
    admitted = jnp.array(store.transfers.admitted, jnp.int32)
    return dataclasses.replace(
        cache,
        groups=tuple(groups),
        on_demand=OnDemand(tuple(residents), admitted, jnp.array(admitted), policy.order),
    )


def flush(cache: CacheState, store: HostStore) -> CacheState:
    """Writes every row that is newer in the cache home to the store; residency stays.

    It waits until all victims are home, and writes those again whose writing failed. Between the `admit` of a step and
    its update the rows are saved as they were before that step. What went wrong in a program, or a Ctrl-C that came, is
    raised after everything was saved as of the last completed step: then train on with a new cache.

    Args:
        cache: the newest cache for `admit`. It is not donated.
        store: its store.

    Returns:
        The same cache with nothing dirty.

    Raises:
        TypeError, ValueError: for another object, or a cache of another store.
        RuntimeError: if the cache is not the newest, or was donated.
        Exception: what went wrong in a program.
    """
    _check_cache(cache, store, "flush")
    if cache.on_demand is None:
        raise ValueError("jc.flush is for caches of on-demand mode: flush with the pipeline, ahead.flush(cache)")
    transfers = store.transfers
    found = int(cache.on_demand.admitted)  # waits for the program
    transfers.wait_until_home()
    if found != transfers.admitted or int(cache.step) < store.step:
        transfers.raise_failure()
        raise RuntimeError(
            f"flush got a stale cache, of step {int(cache.step)}: assign what admit and update return, `cache = ...`, "
            "and flush the newest; after rows were loaded or a LookAhead trained, init a new one"
        )
    transfers.counted[:, 5] += write_dirty_rows(cache, store)
    store.exchanged = int(cache.exchanged)
    fault = int(cache.fault)
    if fault == CacheState.NO_FAULT and int(cache.exchanged) > int(cache.step):
        store.mark_behind()  # by the update that is still to come
    transfers.raise_failure()
    if fault == CacheState.UPDATE_MISMATCH:
        raise RuntimeError(
            f"update was called with a cache and a plan that do not belong together, at step {int(cache.step)}: give "
            "lookup and update the plan that admit returned in this step, and the cache that went through it; several "
            "plans of one step are one, jc.merge(cache, plans)"
        )
    if fault != CacheState.NO_FAULT:
        raise RuntimeError("this cache has met a fault, which was raised before: train on with a new one, jc.init")
    groups = tuple(dataclasses.replace(state, dirty=jnp.zeros(state.slots, bool)) for state in cache.groups)
    return dataclasses.replace(cache, groups=groups)


def report(cache: CacheState, store: HostStore) -> Report:
    """What `admit` has moved since the store was made, and what the cache takes.

    Args:
        cache: for `admit`.
        store: its store.

    Returns:
        A `Report` without stages and window; in `str` it is to be read.

    >>> import optax
    >>> from jaxcache import Table
    >>> store = HostStore({"item": Table(10**9, 4)}, optax.sgd(0.1))
    >>> cache, plan = admit(init(store, slots=100), store, {"item": np.array([7, 7, 8], np.int32)})
    >>> figures = report(cache, store)
    >>> figures.lookups, figures.unique_rows, figures.rows_fetched
    (3, 2, 2)
    """
    _check_cache(cache, store, "report")
    order = cache.on_demand.order if cache.on_demand is not None else ""
    names = {"recency": "lru", "count": "lfu", "rank": "static"}
    figures = Report({}, steps=store.transfers.calls, policy=names.get(order, order), stages={})
    for state, rows, counted in zip(cache.groups, store.groups, store.transfers.counted.tolist(), strict=True):
        group = GroupReport(rows.group.names, rows.group.rows, rows.row_bytes, state.slots, state.nbytes)
        fields = ("lookups", "unique_rows", "lookup_hits", "rows_fetched", "rows_written_back", "rows_flushed")
        for name, value in zip(fields, counted, strict=True):
            setattr(group, name, value)
        figures.groups[rows.group.name] = group
    return figures


def _check_rows(groups: Sequence[Group], where: str) -> None:
    for group in groups:
        for name, table in zip(group.names, group.tables, strict=True):
            if table.rows > _MOST_ROWS:
                raise ValueError(
                    f"{where}: table {name!r} has {table.rows:,} rows, and inside jit ids have 32 bits, for at most "
                    f"{_MOST_ROWS:,}: train it with LookAhead, which maps ids to slots on the host"
                )


def _check_cache(cache: CacheState, store: HostStore, where: str) -> None:
    if not isinstance(cache, CacheState):
        raise TypeError(f"{where} needs a CacheState such as init returns, got {type(cache).__name__}")
    if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(cache)):
        raise RuntimeError(
            f"{where} got a cache that was donated to an earlier call: assign the newest one, "
            "`cache, ... = step(cache, ...)`"
        )
    if [(state.group, state.optimizer) for state in cache.groups] != _configuration(store):
        raise ValueError(f"{where} got a cache of other tables or optimizers than those of the store")


def _configuration(store: HostStore) -> list[tuple[Group, Any]]:
    return [(rows.group, rows.optimizer) for rows in store.groups]


# Inside jit


def admit(
    cache: CacheState,
    store: HostStore,
    ids: Mapping[str, Any],
    features: Mapping[str, Feature] | None = None,
    *,
    unique_bound: int | None = None,
    fetch_bound: int | None = None,
) -> tuple[CacheState, Plan]:
    """Brings the rows of a batch into the cache, inside `jit`, and says where they are.

    Everything is decided on the device: which lookups are of one row, which rows are there, which ones make room. One
    callback to the host then takes the victims and brings the missing rows. `lookup` and `update` follow, as after a
    `LookAhead`. Several calls may come before one update: their rows all stay, and `merge` makes one plan of theirs.

    Works under `jit`, `scan`, `while_loop`, `cond` and `grad`, where it must not be under `vmap` or `remat`: call it
    outside, with the ids of all. A call must use the cache that the one before returned.

    Args:
        cache: from `init`, threaded through the steps.
        store: its store, held by the program: a constant.
        ids: by feature integers `[B, ...]`, or `Bags` of them, of which B is the same for all; with 32 bits at most, or
            64-bit NumPy arrays. The order of the mapping is that of the plan; `jit` sorts the dicts that go through it.
            Of ragged bags the ids behind the last offset are padding.
        features: by name, what the model looks up, as for `LookAhead`.
        unique_bound: most unique rows of a group, all lookups by default. A lower one saves time in `update`.
        fetch_bound: rows that a callback moves at most, an eighth of `unique_bound` by default and at least 1,024; if
            more are missing there is another callback.

    Returns:
        The cache with the rows, and the plan. What goes wrong while the program runs (ids out of range, more unique
        rows than slots, an error of the store, a cache that was used before, Ctrl-C) cannot be raised from inside it:
        the cache is marked, from then on nothing changes, rows are NaN, and the next call on the host raises it:
        `jc.flush(cache, store)`, after it has saved the last completed step, or `store.raise_failure()`.

    Raises:
        TypeError, ValueError, KeyError: while tracing, for ids, features or bounds that can not be right, for a cache
            without what `admit` needs or of another store, and under `vmap` or `remat`.

    The algorithm is the cache of "CNN with large memory layers" made functional: see `docs/design.md`.

    >>> import optax
    >>> from jaxcache import Table, lookup, update
    >>> store = HostStore({"item": Table(10**9, 2)}, optimizer=optax.sgd(0.5))
    >>> @partial(jax.jit, donate_argnums=0)
    ... def train(cache, ids):
    ...     def step(cache, ids):
    ...         cache, plan = admit(cache, store, {"item": ids})
    ...         rows = lookup(cache, plan)
    ...         return update(cache, plan, rows), jnp.sum(rows["item"] ** 2)
    ...     return jax.lax.scan(step, cache, ids)
    >>> cache, losses = train(init(store, slots=3), np.array([[7, 7], [8, 9], [10, 7]]))
    >>> cache = flush(cache, store)
    >>> store.step, store.rows_written
    (3, 4)
    """
    batch = _read(cache, store, ids, features, "admit")
    unique_bounds, fetch_bounds = _bounds(cache, batch, unique_bound, fetch_bound, "admit")
    mode: Any = cache.on_demand
    searches = tuple(
        _search(state, residents, _lookups(batch, number), bound, mode)
        for number, (state, residents, bound) in enumerate(
            zip(cache.groups, mode.residents, unique_bounds, strict=True)
        )
    )
    contents, accept, accepted = _bring_missing_rows(cache, store, batch, searches, unique_bounds, fetch_bounds)
    settled = [
        _settle(
            state.holding(new), residents, search, jnp.minimum(accepted * bound, search.missing), mode, accepted > 0
        )
        for state, new, residents, search, bound in zip(
            cache.groups, contents, mode.residents, searches, fetch_bounds, strict=True
        )
    ]
    sound = accept | (cache.fault != CacheState.NO_FAULT)
    cache = dataclasses.replace(
        cache,
        groups=tuple(state for state, _ in settled),
        exchanged=jnp.where(accept, cache.step + 1, cache.exchanged),
        fault=jnp.where(sound, cache.fault, CacheState.ADMIT_FAILED),
        on_demand=dataclasses.replace(
            mode,
            residents=tuple(residents for _, residents in settled),
            admitted=mode.admitted + (accepted > 0).astype(jnp.int32),
        ),
    )
    return cache, _plan(batch, searches, cache.step)


def prefetch(
    cache: CacheState,
    store: HostStore,
    ids: Mapping[str, Any],
    features: Mapping[str, Feature] | None = None,
    *,
    unique_bound: int | None = None,
    fetch_bound: int | None = None,
) -> CacheState:
    """Starts to read the rows that a later `admit` will miss, in a thread on the host, while the program goes on.

    Call it after the `admit` of this step and before its `lookup`, with the ids of the next step: then the host reads
    while the device computes. It is a hint: whatever the ids, what is trained stays the same.

    Args:
        cache: the newest cache, for `admit`.
        store, features, unique_bound, fetch_bound: as for the `admit` that is to come.
        ids: those of that `admit`.

    Returns:
        The cache; use it for the `lookup` of this step, so that the step cannot start before the reading.

    Raises:
        TypeError, ValueError, KeyError: as `admit`.
    """
    batch = _read(cache, store, ids, features, "prefetch")
    unique_bounds, fetch_bounds = _bounds(cache, batch, unique_bound, fetch_bound, "prefetch")
    mode: Any = cache.on_demand
    wanted = []
    for number, (state, residents, bound) in enumerate(zip(cache.groups, mode.residents, unique_bounds, strict=True)):
        rows = _unique_rows(state, residents, _lookups(batch, number), bound)
        wanted.append((jnp.sum(rows.missed, dtype=jnp.int32), _entries(*rows.compact(rows.tables, rows.ids))))
    counters = jnp.stack([mode.admitted, cache.fault])
    start = partial(_start_reading, store, fetch_bounds)
    token = io_callback(start, jax.ShapeDtypeStruct((), np.int32), counters, tuple(wanted))
    return dataclasses.replace(cache, exchanged=cache.exchanged + token)


def merge(cache: CacheState, plans: Sequence[Plan]) -> Plan:
    """One plan of several that were made in one step, for one update: a row that two of them look up is updated once.

    Args:
        cache: that they were admitted to.
        plans: with features of different names.

    Returns:
        A plan of all their features. `update` takes the gradients of all of them.

    Raises:
        ValueError: without plans, or for two features of one name.
    """
    names = [feature.name for plan in plans for feature in plan.features]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"merge got plans of the features {names}: each needs a name of its own, "
            "admit(cache, store, {name: ids}, features={name: jc.Feature(table)})"
        )
    groups = []
    for number, state in enumerate(cache.groups):
        parts = [plan.groups[number] for plan in plans]
        slots = jnp.concatenate(
            [part.unique_slots.at[part.inverse].get(mode="fill", fill_value=state.slots) for part in parts]
        )
        bound = max(1, min(sum(len(part.unique_slots) for part in parts), state.slots))
        unique = slot_index.deduplicate_slots(slots, state.slots, bound)
        groups.append(_group_plan(_take(slots, unique.firsts, state.slots), unique.inverse))
    step = plans[0].step
    for plan in plans[1:]:
        step = jnp.where(plan.step == step, step, -1)  # plans of different steps fit no cache
    return Plan(
        groups=tuple(groups),
        weights={name: array for plan in plans for name, array in plan.weights.items()},
        bags={name: array for plan in plans for name, array in plan.bags.items()},
        offsets={name: array for plan in plans for name, array in plan.offsets.items()},
        step=step,
        samples=plans[0].samples,
        features=tuple(feature for plan in plans for feature in plan.features),
    )


@jax.custom_vjp
def tap(rows: Any, zeros: Any) -> Any:
    """The rows as they are, whose gradient is that of `zeros`: for rows that are looked up inside the loss.

    Where `admit` and `lookup` are part of the function that is differentiated, because the model computes the ids, the
    gradient of the rows is had with respect to zeros that go in from outside.

    Args:
        rows: what `lookup` returned: `float32` arrays.
        zeros: of the same structure and shapes; their values are not looked at.

    Returns:
        `rows`.

    >>> def loss(zeros):
    ...     rows = jnp.array([3.0, 4.0])  # of lookup(cache, plan)
    ...     return jnp.sum(tap(rows, zeros) ** 2)
    >>> jax.grad(loss)(jnp.zeros(2)).tolist()
    [6.0, 8.0]
    """
    if jax.tree.map(jnp.shape, rows) != jax.tree.map(jnp.shape, zeros):
        raise ValueError(
            f"tap needs zeros of the shapes of the rows, {jax.tree.map(jnp.shape, rows)}, got "
            f"{jax.tree.map(jnp.shape, zeros)}"
        )
    return rows


tap.defvjp(lambda rows, zeros: (tap(rows, zeros), None), lambda _, gradient: (None, gradient))


# The ids of a batch


class _FeatureIds(NamedTuple):
    """The ids of one feature inside `jit`; L is their number.

    Attributes:
        layout: as in a plan.
        table: position of the table in its group.
        ids: `int32[L]`.
        present: `bool[L]`, which ones look up a row.
        problems: `int32[3]`: how many are out of range and must not be, one of them, whether offsets are wrong.
        weights, bags, offsets: as in a plan, or None.
    """

    layout: FeatureLayout
    table: int
    ids: Array
    present: Array
    problems: Array
    weights: Array | None
    bags: Array | None
    offsets: Array | None


def _read(
    cache: CacheState, store: HostStore, ids: Mapping[str, Any], features: Mapping[str, Feature] | None, where: str
) -> list[_FeatureIds]:
    """Checks what can be checked while tracing."""
    if not isinstance(cache, CacheState) or cache.on_demand is None:
        raise ValueError(
            f"{where} needs a cache for on-demand mode: make one with jc.init(store, slots=...), or of one that a "
            "LookAhead has filled, jc.on_demand(cache, store)"
        )
    if not isinstance(store, HostStore):
        raise TypeError(f"{where} needs the HostStore of the cache, got {type(store).__name__}")
    if [(state.group, state.optimizer) for state in cache.groups] != _configuration(store):
        raise ValueError(f"{where} got a cache of other tables or optimizers than those of the store")
    if not isinstance(ids, Mapping) or not ids:
        raise TypeError(f"{where} needs a mapping of feature names to ids, got {type(ids).__name__}")
    groups = [rows.group for rows in store.groups]
    _check_rows(groups, where)
    _refuse_remat(where)
    known = Features(groups, features)
    parts = [_read_feature(name, value, known) for name, value in ids.items()]
    lengths = {part.layout.name: part.layout.samples for part in parts}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"every feature needs ids for the same samples, got lengths {lengths}")
    arrays, _ = _outside_vmap([part[2:] for part in parts], cache.on_demand.admitted)
    return [_FeatureIds(*part[:2], *new) for part, new in zip(parts, arrays, strict=True)]


def _read_feature(name: str, value: Any, known: Features) -> _FeatureIds:
    feature, group, position = known.locate(name)
    table = known.groups[group].tables[position]
    bags = value if isinstance(value, Bags) else Bags(value)
    # 64-bit ids of NumPy would be cut to 32 on their way into JAX.
    array = bags.ids if isinstance(bags.ids, jax.Array) else np.asarray(bags.ids)
    if array.size == 0:
        array = jnp.zeros(array.shape, jnp.int32)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"ids of feature {name!r} are {array.dtype}; ids must be integers (ids.astype(np.int32))")
    if array.ndim == 0:
        raise ValueError(f"every feature needs ids for each sample, [B, ...]; those of {name!r} are a single number")
    check_combiner(name, feature, bags.offsets is not None, bags.weights is not None)
    flat = array.reshape(-1)
    if flat.dtype.itemsize < 4:
        flat = flat.astype(np.int32)
    in_range = (flat >= 0) & (flat <= np.asarray(min(int(table.rows) - 1, jnp.iinfo(flat.dtype).max), flat.dtype))
    present, wrong = in_range, ~in_range
    limits = jnp.iinfo(array.dtype)
    if feature.padding is not None and limits.min <= feature.padding <= limits.max:
        padding = flat == np.asarray(feature.padding, flat.dtype)
        present, wrong = present & ~padding, wrong & ~padding
    flat, present, wrong = jnp.asarray(flat.astype(np.int32)), jnp.asarray(present), jnp.asarray(wrong)
    number, owners, offsets, broken = None, None, None, jnp.zeros((), jnp.int32)
    if bags.offsets is not None:
        offsets = jnp.asarray(bags.offsets)
        if flat.shape != array.shape or offsets.ndim != 1 or not jnp.issubdtype(offsets.dtype, jnp.integer):
            raise ValueError(
                f"feature {name!r} has ids of shape {array.shape} and offsets {offsets.dtype}{list(offsets.shape)}: "
                "ragged ids are one axis [N], and offsets integers [B + 1], where each bag starts, and the end"
            )
        offsets, number = offsets.astype(jnp.int32), len(offsets) - 1
        owners = jnp.searchsorted(offsets[1:], jnp.arange(len(flat), dtype=jnp.int32), side="right").astype(jnp.int32)
        sound = (offsets[0] == 0) & (offsets[-1] <= len(flat)) & (offsets[1:] >= offsets[:-1]).all()
        broken = (~sound).astype(jnp.int32)
        present, wrong = present & (owners < number), wrong & (owners < number)
    weights = None
    if bags.weights is not None:
        weights = jnp.asarray(bags.weights, jnp.float32)
        if weights.shape != array.shape:
            raise ValueError(
                f"the weights of feature {name!r} have shape {weights.shape} and its ids {array.shape}: give one "
                "weight an id"
            )
        weights = weights.reshape(-1)
    if table.out_of_range == "ignore":
        wrong = jnp.zeros_like(wrong)
    if len(flat):
        problems = jnp.stack([jnp.sum(wrong, dtype=jnp.int32), flat[jnp.argmax(wrong)], broken])
    else:
        problems = jnp.stack([jnp.zeros((), jnp.int32)] * 2 + [broken])
    layout = FeatureLayout(name, group, feature.combiner, array.shape, number, weights is not None)
    return _FeatureIds(layout, position, flat, present, problems, weights, owners, offsets)


@jax.custom_batching.custom_vmap
def _outside_vmap(*arrays: Any) -> Any:
    return arrays


@_outside_vmap.def_vmap
def _refuse_vmap(axis_size: int, in_batched: Any, *arrays: Any) -> Any:
    raise ValueError(
        "admit and prefetch were called under vmap, where there would be a cache for each of its entries: call them "
        "outside, with the ids of all entries, and map what becomes of the rows"
    )


def _refuse_remat(where: str) -> None:
    """Raises where a function that is to be run twice, by remat, is being traced; JAX has no other way to know."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == jax.checkpoint.__module__:
            raise ValueError(
                f"{where} was called under jax.checkpoint (remat), which would run it twice: call it outside, and give "
                "the rows to the function that is checkpointed"
            )
        frame = frame.f_back


def _bounds(
    cache: CacheState, batch: list[_FeatureIds], unique: int | None, fetch: int | None, where: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of each group: the most unique rows of the batch, and of rows that a callback moves."""
    for name, value in (("unique_bound", unique), ("fetch_bound", fetch)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1):
            raise ValueError(f"{where}({name}={value!r}): {name} must be a number of rows, at least 1")
    uniques, fetches = [], []
    for number, state in enumerate(cache.groups):
        lookups = sum(part.layout.lookups for part in batch if part.layout.group == number)
        # One more than there are slots, so that too many are seen.
        bound = max(1, min(lookups, state.slots + 1, state.group.rows, unique or lookups))
        uniques.append(bound)
        fetches.append(min(bound, max(1024, bound // 8) if fetch is None else int(fetch)))
    return tuple(uniques), tuple(fetches)


def _lookups(batch: list[_FeatureIds], group: int) -> tuple[Array, Array, Array]:
    """Table, id and presence of each lookup in a group."""
    none = jnp.zeros(0, jnp.int32)
    parts = [part for part in batch if part.layout.group == group]
    tables = [jnp.full(len(part.ids), part.table, jnp.int32) for part in parts]
    return (
        jnp.concatenate([none, *tables]),
        jnp.concatenate([none, *(part.ids for part in parts)]),
        jnp.concatenate([none.astype(bool), *(part.present for part in parts)]),
    )


# The rows of a batch


class _UniqueRows(NamedTuple):
    """The unique rows of a batch in one group, of which there are at most U."""

    number: Array  # int32[], of them; if there are more than U the others are left out
    tables: Array  # int32[U]
    ids: Array  # int32[U]
    slots: Array  # int32[U], where they are, or NONE
    missed: Array  # bool[U], which ones are nowhere
    inverse: Array  # int32[L]

    def compact(self, *arrays: Array) -> tuple[Array, ...]:
        """Of arrays `[U]` the entries of those that are missed, one behind the other; then something."""
        (places,) = jnp.nonzero(self.missed, size=len(self.missed), fill_value=0)
        return tuple(array[places] for array in arrays)


def _unique_rows(
    state: GroupCache, residents: Residents, lookups: tuple[Array, Array, Array], bound: int
) -> _UniqueRows:
    unique = slot_index.deduplicate(*lookups, bound)
    tables, ids = (_take(array, unique.firsts, 0) for array in lookups[:2])
    wanted = jnp.arange(bound, dtype=jnp.int32) < unique.number
    slots = slot_index.find(residents.row_index, state.slot_table, tables, ids, wanted)
    return _UniqueRows(unique.number, tables, ids, slots, wanted & (slots == NONE), unique.inverse)


def _take(array: Array, places: Array, filler: int) -> Array:
    """`array[places]`, and `filler` for places behind its end; of an empty one too, which JAX does not read from."""
    if not len(array):
        return jnp.full(places.shape, filler, array.dtype)
    return array.at[places].get(mode="fill", fill_value=filler)


class _Search(NamedTuple):
    """Where the rows of a batch are in one group, and where the missing ones go.

    Attributes:
        lookups: `int32[2]`, how many lookups there are, and how many of rows that are missing.
        number, inverse: as in `_UniqueRows`.
        unique_slots: `int32[U]`, as in a plan.
        missing: `int32[]`, how many rows have to come.
        room: `int32[]`, how many can: free slots, and those that can be freed.
        tables, ids, slots: `int32[U]`, the missing rows and where they go; then something.
    """

    lookups: Array
    number: Array
    inverse: Array
    unique_slots: Array
    missing: Array
    room: Array
    tables: Array
    ids: Array
    slots: Array


def _search(
    state: GroupCache, residents: Residents, lookups: tuple[Array, Array, Array], bound: int, mode: OnDemand
) -> _Search:
    """Finds the rows of a batch, and slots for those that are missing: free ones first, then those of victims."""
    slots = state.slots
    rows = _unique_rows(state, residents, lookups, bound)
    missing = jnp.sum(rows.missed, dtype=jnp.int32)
    free = slots - residents.used
    wanted = jnp.zeros(slots, bool).at[jnp.where(rows.slots == NONE, slots, rows.slots)].set(True, mode="drop")
    in_use = jnp.arange(slots, dtype=jnp.int32) < residents.used
    evictable = in_use & ~wanted & (residents.stamps <= mode.pinned_after)
    keys = {"recency": (), "count": (state.counts,), "rank": (residents.ranks,)}[mode.order]
    victims = jax.lax.cond(
        missing > free,
        lambda: slot_index.lowest((*keys, residents.stamps), evictable, missing - free, bound),
        lambda: jnp.full(bound, slots, jnp.int32),
    )
    nth = jnp.arange(bound, dtype=jnp.int32)
    places = jnp.where(nth < free, residents.used + nth, _take(victims, nth - jnp.minimum(free, nth), slots))
    places = jnp.where(nth < missing, places, slots)
    rank = jnp.cumsum(rows.missed.astype(jnp.int32)) - 1
    unique_slots = jnp.where(rows.missed, places[rank], jnp.where(rows.slots == NONE, slots, rows.slots))
    tables, ids = rows.compact(rows.tables, rows.ids)
    room = free + jnp.sum(evictable, dtype=jnp.int32)
    missed = _take(jnp.append(rows.missed, False), rows.inverse, 0)
    counted = jnp.stack([jnp.sum(array, dtype=jnp.int32) for array in (lookups[2], missed)])
    return _Search(counted, rows.number, rows.inverse, unique_slots, missing, room, tables, ids, places)


def _entries(tables: Array, ids: Array) -> Array:
    """Entries of the slot table, `int32[N, 3]`: no id has more than 31 bits here."""
    return jnp.stack([tables, jnp.zeros_like(ids), ids], axis=1)


def _bring_missing_rows(
    cache: CacheState,
    store: HostStore,
    batch: list[_FeatureIds],
    searches: Sequence[_Search],
    unique_bounds: Sequence[int],
    fetch_bounds: Sequence[int],
) -> tuple[tuple[Any, ...], Array, Array]:
    """Brings the missing rows into the slots that were found for them, and takes what was there home.

    Returns:
        The contents of each group; whether all went well; and how many callbacks did.
    """
    mode: Any = cache.on_demand
    described = tuple(
        (part.layout.name, int(store.groups[part.layout.group].group.tables[part.table].rows)) for part in batch
    )
    serve = partial(_serve, store, described, tuple(unique_bounds))
    problems = jnp.stack([part.problems for part in batch])
    figures = jnp.stack(
        [jnp.stack([search.number, search.missing, search.room, *search.lookups]) for search in searches]
    )
    results = (
        jax.ShapeDtypeStruct((), np.int32),
        tuple(
            jax.tree.map(
                lambda leaf, size=size: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype), state.buffer
            )
            for state, size in zip(cache.groups, fetch_bounds, strict=True)
        ),
    )

    def move(carry):
        number, _, accepted, contents = carry
        slots, entries, leaving = [], [], []
        for state, kept, search, size in zip(cache.groups, contents, searches, fetch_bounds, strict=True):
            nth = number * size + jnp.arange(size, dtype=jnp.int32)
            slots.append(_take(search.slots, nth, state.slots))
            entries.append(_entries(_take(search.tables, nth, 0), _take(search.ids, nth, 0)))
            taken = (kept.slot_table, kept.dirty, () if state.group.frozen else kept.buffer)
            leaving.append(kernels.read(taken, slots[-1]))
        counters = jnp.stack([mode.admitted, cache.step, cache.fault, number])
        status, rows = io_callback(serve, results, counters, problems, figures, tuple(entries), tuple(leaving))
        accept = status == CacheState.NO_FAULT
        replaced = []
        for kept, places, new, entry in zip(contents, slots, rows, entries, strict=True):
            (buffer, slot_table, counts, dirty), _ = kernels.exchange(
                (kept.buffer, kept.slot_table, kept.counts, kept.dirty),
                places,
                (new, entry, jnp.zeros(places.shape, jnp.int32), jnp.zeros(places.shape, bool)),
                accept,
                choice=cache.backends,
            )
            replaced.append(kept._replace(buffer=buffer, slot_table=slot_table, counts=counts, dirty=dirty))
        return number + 1, accept, accepted + accept.astype(jnp.int32), tuple(replaced)

    def goes_on(carry):
        number, accept, _, _ = carry
        left = [number * size < search.missing for search, size in zip(searches, fetch_bounds, strict=True)]
        return (number == 0) | (accept & jnp.stack(left).any())

    zero = jnp.zeros((), jnp.int32)
    start = (zero, jnp.array(False), zero, tuple(state.contents for state in cache.groups))
    _, accept, accepted, contents = jax.lax.while_loop(goes_on, move, start)
    return contents, accept, accepted


def _settle(
    state: GroupCache, residents: Residents, search: _Search, moved: Array, mode: OnDemand, accept: Array
) -> tuple[GroupCache, Residents]:
    """Notes that the first `moved` of the missing rows are there now, and that all rows of the batch were wanted."""
    slots = state.slots
    came = jnp.arange(len(search.slots), dtype=jnp.int32) < moved
    evicted = residents.evicted + moved - jnp.minimum(moved, slots - residents.used)
    if mode.order == "count":
        old = evicted >= min(_HALF_LIFE * slots, _MOST_ROWS)
        counts = jax.lax.cond(old, lambda counts: counts - counts // 2, lambda counts: counts, state.counts)
        state, evicted = dataclasses.replace(state, counts=counts), jnp.where(old, 0, evicted)
    ranks = residents.ranks
    if mode.order == "rank":
        ranks = ranks.at[jnp.where(came, search.slots, slots)].set(0, mode="drop")
    return state, Residents(
        row_index=slot_index.insert(
            residents.row_index, state.slot_table, search.tables, search.ids, search.slots, came
        ),
        used=jnp.minimum(residents.used + moved, slots),
        stamps=residents.stamps.at[jnp.where(accept, search.unique_slots, slots)].set(mode.admitted + 1, mode="drop"),
        ranks=ranks,
        evicted=evicted,
    )


def _group_plan(unique_slots: Array, inverse: Array) -> GroupPlan:
    return GroupPlan(unique_slots, inverse, *slot_index.by_row(inverse, len(unique_slots)))


def _plan(batch: list[_FeatureIds], searches: Sequence[_Search], step: Array) -> Plan:
    return Plan(
        groups=tuple(_group_plan(search.unique_slots, search.inverse) for search in searches),
        weights={part.layout.name: part.weights for part in batch if part.weights is not None},
        bags={part.layout.name: part.bags for part in batch if part.bags is not None},
        offsets={part.layout.name: part.offsets for part in batch if part.offsets is not None},
        step=step,
        samples=jnp.array(batch[0].layout.samples, jnp.int32),
        features=tuple(part.layout for part in batch),
    )


# The callbacks: NumPy alone, and nothing is raised


def _serve(
    store: HostStore,
    features: tuple[tuple[str, int], ...],
    unique_bounds: tuple[int, ...],
    counters: Array,
    problems: Array,
    figures: Array,
    entries: tuple[Array, ...],
    leaving: tuple[Any, ...],
) -> tuple[np.int32, tuple[Rows, ...]]:
    """Takes the victims of an `admit` and hands out the rows that it misses: a part of both in each group.

    Returns:
        0, or the fault that the cache gets, and rows `[M, ...]` of each group.
    """
    transfers, before = store.transfers, store.transfers.admitted
    sizes = [len(part) for part in entries]
    try:
        admitted, step, fault, number = np.asarray(counters).tolist()
        if not transfers.failed and fault == CacheState.NO_FAULT:
            figures = np.asarray(figures)
            if number == 0:
                _check_admit(store, features, unique_bounds, admitted, step, np.asarray(problems), figures)
                transfers.drop_used()
            rows, victims = [], []
            pieces = zip(store.groups, figures, entries, leaving, sizes, strict=True)
            for group, (part, (_, missing, *_), new, (old, dirty, buffer), size) in enumerate(pieces):
                moved = max(0, min(int(missing) - number * size, size))
                rows.append(transfers.read(group, _keys(part.group, np.asarray(new)[:moved]), size))
                changed = np.flatnonzero(np.asarray(dirty)[:moved])
                # Copies: the memory of what a callback is given belongs to the program.
                taken = jax.tree.map(lambda leaf, changed=changed: np.asarray(leaf)[changed], buffer)
                victims.append((_keys(part.group, np.asarray(old)[changed]), taken))
            transfers.take_home(victims)
            store.mark_behind()
            if number == 0:
                unique, missing, _, lookups, missed = figures.T
                transfers.calls += 1
                transfers.counted[:, :4] += np.stack([lookups, unique, lookups - missed, missing], axis=1)
                transfers.admitted += 1
            transfers.counted[:, 4] += [len(keys) for keys, _ in victims]
            return np.int32(CacheState.NO_FAULT), tuple(rows)
    except Interrupted:
        pass
    except BaseException as error:
        transfers.keep(error)
    transfers.admitted = before
    none = np.zeros(0, np.int64)
    refused = tuple(part.read(none, size) for part, size in zip(store.groups, sizes, strict=True))
    return np.int32(CacheState.ADMIT_FAILED), refused


def _start_reading(
    store: HostStore, room: tuple[int, ...], counters: Array, wanted: tuple[tuple[Array, Array], ...]
) -> np.int32:
    """Starts to read what a later `admit` will miss; always 0."""
    transfers = store.transfers
    try:
        admitted, fault = np.asarray(counters).tolist()
        if not transfers.failed and fault == CacheState.NO_FAULT and admitted == transfers.admitted:
            keys = [
                _keys(part.group, np.array(entries)[: int(number)])
                for part, (number, entries) in zip(store.groups, wanted, strict=True)
            ]
            transfers.prefetch(keys, room)
    except BaseException as error:
        transfers.keep(error)
    return np.int32(0)


def _keys(group: Group, entries: np.ndarray) -> np.ndarray:
    """The keys `int64[N]` of rows given by entries of the slot table."""
    return (entries[:, 2].astype(np.uint64) + group.bases[entries[:, 0]]).view(np.int64)


def _check_admit(
    store: HostStore,
    features: tuple[tuple[str, int], ...],
    unique_bounds: tuple[int, ...],
    admitted: int,
    step: int,
    problems: np.ndarray,
    figures: np.ndarray,
) -> None:
    """Raises for ids that cannot be admitted, and for a cache that is not the newest."""
    newest = store.transfers.admitted
    if admitted != newest:
        raise RuntimeError(
            f"admit got a cache that is not the newest, of step {step}: it has counted {admitted} calls of admit and "
            f"the store {newest}. Each call must get the cache that the one before returned, "
            "`cache, plan = jc.admit(cache, ...)` and `cache = jc.update(cache, ...)`; after rows were loaded or a "
            "LookAhead trained, init a new one"
        )
    for (name, rows), (wrong, first, broken) in zip(features, problems.tolist(), strict=True):
        if broken:
            raise ValueError(
                f"admit, step {step}: the offsets of feature {name!r} must rise from 0 to at most the number of ids: "
                "bag b is ids[offsets[b]:offsets[b + 1]]"
            )
        if wrong:
            raise ValueError(
                f"admit, step {step}: feature {name!r} has id {first}"
                + (f", and {wrong - 1} more that are out of range" if wrong > 1 else "")
                + f"; ids must lie in 0 to {rows - 1} (Table(rows={rows}))"
            )
    for part, bound, (number, missing, room, *_) in zip(store.groups, unique_bounds, figures.tolist(), strict=True):
        names = ", ".join(part.group.names)
        if missing > room:
            raise TooFewSlots(
                f"admit, step {step}: {number} unique rows of {names} are looked up, {missing} of them have to come "
                f"in, and there is room for {room}: all other slots hold rows of this step. Give more slots, "
                "jc.init(store, slots=...), or look up fewer rows in a step"
            )
        if number > bound:
            raise TooFewSlots(
                f"admit, step {step}: {number} unique rows of {names} are looked up, and there is room for {bound}: "
                "give more slots, jc.init(store, slots=...), or a larger admit(unique_bound=...)"
            )
