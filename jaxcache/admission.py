"""What `admit` does: finds a batch's rows on the device, makes room, and exchanges rows with the host by callbacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from jaxcache import kernels, slot_index
from jaxcache.optimizers import Rows
from jaxcache.planner import TooFewSlots
from jaxcache.slot_index import NONE, take
from jaxcache.state import CacheState, GroupCache, OnDemand, Residents
from jaxcache.store import HostStore
from jaxcache.tables import Group
from jaxcache.traced_batches import TracedBatch
from jaxcache.transfers import Interrupted

Array = Any

_HALF_LIFE = 6  # turnovers of the cache after which a lookup counts half, as in `LookAheadPlanner`
_MOST = 2**31 - 1


class UniqueRows(NamedTuple):
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


def unique_rows(state: GroupCache, residents: Residents, lookups: tuple[Array, Array, Array], bound: int) -> UniqueRows:
    """The unique rows among the lookups of a group (table, id, presence), and where they are."""
    unique = slot_index.deduplicate(*lookups, bound)
    tables, ids = (take(array, unique.firsts, 0) for array in lookups[:2])
    wanted = jnp.arange(bound, dtype=jnp.int32) < unique.number
    slots = slot_index.find(residents.row_index, state.slot_table, tables, ids, wanted)
    return UniqueRows(unique.number, tables, ids, slots, wanted & (slots == NONE), unique.inverse)


class Search(NamedTuple):
    """Where the rows of a batch are in one group, and where the missing ones go.

    Attributes:
        lookups: `int32[2]`, how many lookups there are, and how many of rows that are missing.
        number, inverse: as in `UniqueRows`.
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


def search_rows(
    state: GroupCache, residents: Residents, lookups: tuple[Array, Array, Array], bound: int, mode: OnDemand
) -> Search:
    """Finds the rows of a batch, and slots for those that are missing: free ones first, then those of victims."""
    slots = state.slots
    rows = unique_rows(state, residents, lookups, bound)
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
    places = jnp.where(nth < free, residents.used + nth, take(victims, nth - jnp.minimum(free, nth), slots))
    places = jnp.where(nth < missing, places, slots)
    rank = jnp.cumsum(rows.missed.astype(jnp.int32)) - 1
    unique_slots = jnp.where(rows.missed, places[rank], jnp.where(rows.slots == NONE, slots, rows.slots))
    tables, ids = rows.compact(rows.tables, rows.ids)
    room = free + jnp.sum(evictable, dtype=jnp.int32)
    missed = take(jnp.append(rows.missed, False), rows.inverse, 0)
    counted = jnp.stack([jnp.sum(array, dtype=jnp.int32) for array in (lookups[2], missed)])
    return Search(counted, rows.number, rows.inverse, unique_slots, missing, room, tables, ids, places)


def slot_entries_of(tables: Array, ids: Array) -> Array:
    """Entries of the slot table, `int32[N, 3]`: no id has more than 31 bits here."""
    return jnp.stack([tables, jnp.zeros_like(ids), ids], axis=1)


def bring_missing_rows(
    cache: CacheState,
    store: HostStore,
    batch: TracedBatch,
    searches: Sequence[Search],
    unique_bounds: Sequence[int],
    fetch_bounds: Sequence[int],
) -> tuple[tuple[Any, ...], Array, Array]:
    """Brings the missing rows into the slots that were found for them, and takes what was there home.

    Returns:
        The contents of each group; whether all went well; and how many callbacks did.
    """
    mode: Any = cache.on_demand
    described = tuple(
        (part.layout.name, int(store.groups[part.layout.group].group.tables[part.table].rows))
        for part in batch.features
    )
    limits = tuple(zip(unique_bounds, cache.slots, strict=True))
    serve = partial(_serve, store, described, limits)
    problems = jnp.stack([part.problems for part in batch.features])
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
            slots.append(take(search.slots, nth, state.slots))
            entries.append(slot_entries_of(take(search.tables, nth, 0), take(search.ids, nth, 0)))
            taken = (kept.slot_table, kept.dirty, () if state.group.frozen else kept.buffer)
            leaving.append(kernels.read(taken, slots[-1]))
        # `exchanged` is what a `prefetch` before it depends on: so its callback runs first.
        counters = jnp.stack([mode.admitted, cache.step, cache.fault, number, cache.exchanged])
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


def settle(
    state: GroupCache, residents: Residents, search: Search, moved: Array, mode: OnDemand, accept: Array
) -> tuple[GroupCache, Residents]:
    """Notes that the first `moved` of the missing rows are there now, and that all rows of the batch were wanted."""
    slots = state.slots
    came = jnp.arange(len(search.slots), dtype=jnp.int32) < moved
    evicted = residents.evicted + moved - jnp.minimum(moved, slots - residents.used)
    if mode.order == "count":
        old = evicted >= min(_HALF_LIFE * slots, _MOST)
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


# The callbacks: NumPy alone, and nothing is raised


def _serve(
    store: HostStore,
    features: tuple[tuple[str, int], ...],
    limits: tuple[tuple[int, int], ...],
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
        admitted, step, fault, number, _ = np.asarray(counters).tolist()
        if not transfers.failed and fault == CacheState.NO_FAULT:
            figures = np.asarray(figures)
            if number == 0:
                _check_admit(store, features, limits, admitted, step, np.asarray(problems), figures)
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
            store.mark_behind_on_demand()
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
    refused = tuple(part.allocate(size) for part, size in zip(store.groups, sizes, strict=True))
    return np.int32(CacheState.ADMIT_FAILED), refused


def start_reading(
    store: HostStore, room: tuple[int, ...], counters: Array, wanted: tuple[tuple[Array, Array], ...]
) -> np.int32:
    """Starts to read what a later `admit` will miss; always 0."""
    transfers = store.transfers
    try:
        admitted, fault, _ = np.asarray(counters).tolist()
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
    limits: tuple[tuple[int, int], ...],
    admitted: int,
    step: int,
    problems: np.ndarray,
    figures: np.ndarray,
) -> None:
    """Raises for ids that cannot be admitted, and for a cache that is not the newest."""
    if store.serves_pipeline:
        raise RuntimeError(
            f"admit, step {step}: the store serves an open LookAhead: leave its `with` block before a program that "
            "calls admit is run, and flush either cache before the other goes on"
        )
    newest = store.transfers.admitted
    if admitted != newest or step < store.step:
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
                + (" or beyond" if first in (_MOST, -_MOST - 1) else "")
                + (f", and {wrong - 1} more that are out of range" if wrong > 1 else "")
                + f"; ids must lie in 0 to {rows - 1} (Table(rows={rows}))"
            )
    for part, (bound, slots), (number, missing, room, *_) in zip(store.groups, limits, figures.tolist(), strict=True):
        names = ", ".join(part.group.names)
        if number > slots:
            raise TooFewSlots(
                f"admit, step {step}: {number} unique rows of {names} are looked up at once, and the cache has {slots} "
                "slots for them: give more, jc.init(store, slots=...), or look up fewer rows at once"
            )
        if number > bound:
            raise TooFewSlots(
                f"admit, step {step}: {number} unique rows of {names} are looked up, and there is room for {bound}: "
                "give a larger admit(unique_bound=...)"
            )
        if missing > room:
            raise TooFewSlots(
                f"admit, step {step}: {number} unique rows of {names} are looked up, {missing} of them have to come "
                f"in, and there is room for {room}: all other slots hold rows of this step. Give more slots, "
                "jc.init(store, slots=...), or look up fewer rows in a step; a step ends with jc.update or jc.release"
            )
