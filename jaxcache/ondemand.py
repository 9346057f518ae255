"""On-demand mode: `admit` makes a plan inside `jit` and brings the missing rows in through host callbacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from jaxcache import kernels, slot_index
from jaxcache.admission import bring_missing_rows, search_rows, settle, slot_entries_of, start_reading, unique_rows
from jaxcache.capacity import parse_mapping, parse_slots
from jaxcache.chunks import bring_in, cleaned, write_dirty_rows
from jaxcache.features import Feature
from jaxcache.policies import Policy, lru
from jaxcache.report import GroupReport, Report
from jaxcache.slot_index import take
from jaxcache.state import CacheState, GroupCache, OnDemand, Plan, Residents, empty_cache, slot_keys
from jaxcache.store import HostStore
from jaxcache.tables import Group
from jaxcache.traced_batches import TracedBatch, group_plan, outside_vmap

_MOST_ROWS = 2**31 - 1

# On the host


def init(
    store: HostStore,
    slots: int | str | Sequence[int] | Mapping[str, int | str],
    policy: Policy | None = None,
    *,
    backends: str | Mapping[str, str] | kernels.Choice | None = None,
) -> CacheState:
    """A cache for `admit`: empty, but for the rows with which `static` starts.

    Args:
        store: gives tables, optimizers, their scalars and the step to go on from.
        slots: rows that the cache can hold, below 2**31: one number for each group of the store, in a sequence, or in a
            mapping by the name of one of its tables; a single number for a store of one group; or a share such as
            "1.5%" of the rows of each group. One step must find room for all rows that it looks up.
        policy: which rows make room: `lru()`, the default; `lfu()`, whose counts age here, halved whenever six times as
            many rows as there are slots were evicted; or `static(counts)`, whose rows stay as long as there are others.
        backends: what gathers, updates and exchanges rows, see `jaxcache.kernels.choose`; None leaves it to the
            environment, and to what is fastest on the default device.

    Returns:
        A state on the default device.

    Raises:
        ValueError: for slots that are none of these, for a backend that does not exist, for another policy,
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
    return _with_residents(empty_cache(store, parse_group_slots(store, slots), backends=backends), store, policy)


def parse_group_slots(store: HostStore, slots: Any) -> tuple[int, ...]:
    """The slots of each group."""
    groups = [rows.group for rows in store.groups]
    if isinstance(slots, Mapping):
        return parse_mapping(slots, groups, f"init(slots={dict(slots)!r})")
    if isinstance(slots, str):
        return tuple(parse_slots(slots, group.rows, f"init(slots={slots!r})") for group in groups)
    numbers = tuple(slots) if isinstance(slots, Sequence) else (slots,)
    return tuple(parse_slots(number, _MOST_ROWS - 1, f"init(slots={slots!r})") for number in numbers)


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
            occupied, keys = slot_keys(rows.group, np.asarray(state.slot_table))
            if not len(keys):
                keys = policy.warm_keys(rows.group, state.slots)
                occupied, state = np.arange(len(keys)), bring_in(state, rows, keys, cache.backends)
            ranks[occupied] = policy.group_counts(rows.group)[keys]
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
        store.mark_behind_on_demand()  # by the update that is still to come
    transfers.raise_failure()
    if fault == CacheState.UPDATE_MISMATCH:
        raise RuntimeError(
            f"update was called with a cache and a plan that do not belong together, at step {int(cache.step)}: give "
            "lookup and update the plan that admit returned in this step, and the cache that went through it; several "
            "plans of one step are one, jc.merge(cache, plans)"
        )
    if fault != CacheState.NO_FAULT:
        raise RuntimeError("this cache has met a fault, which was raised before: train on with a new one, jc.init")
    return cleaned(cache)


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
        ids: by feature integers `[B, ...]`, or `Bags` of them, with 32 bits at most, or 64-bit NumPy arrays. B may
            differ from feature to feature: nothing is padded here. The order of the mapping is that of the plan; `jit`
            sorts the dicts that go through it. Of ragged bags the ids behind the last offset are padding.
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
        search_rows(state, residents, batch.lookups(number), bound, mode)
        for number, (state, residents, bound) in enumerate(
            zip(cache.groups, mode.residents, unique_bounds, strict=True)
        )
    )
    contents, accept, accepted = bring_missing_rows(cache, store, batch, searches, unique_bounds, fetch_bounds)
    settled = [
        settle(state.holding(new), residents, search, jnp.minimum(accepted * bound, search.missing), mode, accepted > 0)
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
    plan = batch.plan([group_plan(search.unique_slots, search.inverse) for search in searches], mode.pinned_after)
    # What XLA makes of the model must not depend on what stands before it.
    return jax.lax.optimization_barrier((cache, plan))


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
        rows = unique_rows(state, residents, batch.lookups(number), bound)
        wanted.append((jnp.sum(rows.missed, dtype=jnp.int32), slot_entries_of(*rows.compact(rows.tables, rows.ids))))
    counters = jnp.stack([mode.admitted, cache.fault, cache.exchanged])
    start = partial(start_reading, store, fetch_bounds)
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
        groups.append(group_plan(take(slots, unique.firsts, state.slots), unique.inverse))
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


def _bounds(
    cache: CacheState, batch: TracedBatch, unique: int | None, fetch: int | None, where: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of each group: the most unique rows of the batch, and of rows that a callback moves."""
    for name, value in (("unique_bound", unique), ("fetch_bound", fetch)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1):
            raise ValueError(f"{where}({name}={value!r}): {name} must be a number of rows, at least 1")
    uniques, fetches = [], []
    for number, state in enumerate(cache.groups):
        lookups = sum(part.layout.lookups for part in batch.features if part.layout.group == number)
        # One more than there are slots, so that too many are seen.
        bound = max(1, min(lookups, state.slots + 1, state.group.rows, unique or lookups))
        uniques.append(bound)
        fetches.append(min(bound, max(1024, bound // 8) if fetch is None else int(fetch)))
    return tuple(uniques), tuple(fetches)


def _read(
    cache: CacheState, store: HostStore, ids: Mapping[str, Any], features: Mapping[str, Feature] | None, where: str
) -> TracedBatch:
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
    groups = [rows.group for rows in store.groups]
    _check_rows(groups, where)
    outside_vmap(cache.on_demand.admitted)
    return TracedBatch.read(groups, ids, features, where)
