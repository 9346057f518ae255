"""From the ids of batches to slots, victims and missed rows: the look-ahead planner. NumPy and Numba, no JAX.

A planner is used in two calls. `observe(batch)` draws a batch into the window: its lookups become unique rows, and each
row learns of its next use. `plan()` decides the oldest observed batch: its rows get slots, and victims make room. What
is planned depends on the order of these calls alone, never on time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numba
import numpy as np

from jaxcache import index
from jaxcache.index import ABSENT, prefetch
from jaxcache.tables import Group


@dataclass(frozen=True)
class Observed:
    """A batch in the window.

    Attributes:
        inverse: `int32[L]`, for each lookup the position of its row among the batch's unique rows.
        occurrences: `int32[U]`, lookups of each unique row.
    """

    inverse: np.ndarray
    occurrences: np.ndarray


@dataclass(frozen=True)
class PlannedBatch:
    """The decision on one batch, with U unique rows, M missed rows and V <= M victims.

    Attributes:
        inverse, occurrences: as in `Observed`.
        unique_slots: `int32[U]`, the slot of each unique row.
        missed: `int32[M]`, positions of the missed rows among the unique ones.
        fetched: `int64[M]`, keys of the rows to bring in.
        slots: `int32[M]`, where they go.
        victims: `int64[V]`, keys of the rows to take home; they lie in the last V of `slots`.
        wait_for: the latest batch whose victims are among `fetched`: its write-back must have landed. ABSENT if none.
    """

    inverse: np.ndarray
    occurrences: np.ndarray
    unique_slots: np.ndarray
    missed: np.ndarray
    fetched: np.ndarray
    slots: np.ndarray
    victims: np.ndarray
    wait_for: int


class TooFewSlots(ValueError):
    """A batch has more unique rows than the cache has slots."""


class Planner(Protocol):
    """What the pipeline asks of a planner."""

    def needs_window(self) -> bool:
        """Whether the plan of the oldest observed batch may depend on the batches behind it."""

    def observe(self, ids: list[np.ndarray], tables: list[int]) -> Observed:
        """Draws a batch: for each feature its valid ids, `int64[n]`, and the position of its table."""

    def plan(self) -> PlannedBatch:
        """Plans the oldest observed batch. Raises `TooFewSlots`."""


# An entry stands for a row that is resident, wanted by a batch of the window, or lately evicted. Entries of one list
# are linked in a ring through the list's own entry (`_RECENT`, then one for each batch of the window).
_ENTRY = np.dtype(
    [
        ("key", np.int64),
        ("use", np.int64),  # place of the row's latest use in the uses: those of the window are still to come
        ("evicted", np.int32),  # batch that evicted it, ABSENT once that is long ago
        ("slot", np.int32),  # ABSENT if not resident
        ("previous", np.int32),
        ("next", np.int32),
    ],
    align=True,
)
_RECENT = 0  # the list of resident rows that no batch of the window wants, least recently used first
_FREE_ENTRY, _ENTRIES, _OCCUPIED, _USES = range(4)  # fields of `counters`
_AHEAD = 32  # lookups or rows between asking for their memory and needing it


@numba.njit(cache=True)
def _compiled_version():
    return index.VERSION


index.discard_stale(_compiled_version, __name__)


@numba.njit(cache=True, nogil=True, inline="always")
def _unlink(entries, e):
    before, after = entries[e].previous, entries[e].next
    entries[before].next = after
    entries[after].previous = before


@numba.njit(cache=True, nogil=True, inline="always")
def _append(entries, head, e):
    last = entries[head].previous
    entries[last].next = e
    entries[e].previous = last
    entries[e].next = head
    entries[head].previous = e


@numba.njit(cache=True, nogil=True, inline="always")
def _new_entry(entries, cells, counters, key):
    e = counters[_FREE_ENTRY]
    if e != ABSENT:
        counters[_FREE_ENTRY] = entries[e].next
    else:
        e = counters[_ENTRIES]
        counters[_ENTRIES] += 1
    entries[e].key = key
    entries[e].use = ABSENT
    entries[e].evicted = ABSENT
    entries[e].slot = ABSENT
    index.insert(cells, key, e)
    return e


@numba.njit(cache=True, nogil=True)
def _observe(ids, base, batch, window, buckets, cells, entries, uses, counters, inverse, occurrences, unique):
    """Adds the lookups of one feature to `batch`, which has `unique` rows so far. Returns the number it then has.

    `window` is the place of the first use that is not planned yet.
    """
    use_mask = uses.shape[0] - 1
    bucket = 1 + batch % buckets
    first = counters[_USES]
    lookups = ids.shape[0]
    found = np.empty(_AHEAD, np.int64)
    for i in range(min(_AHEAD, lookups)):
        prefetch(cells, index.home(cells, np.int64(np.uint64(ids[i]) + base)))
    for start in range(0, lookups, _AHEAD):
        stop = min(start + _AHEAD, lookups)
        for i in range(stop, min(stop + _AHEAD, lookups)):
            prefetch(cells, index.home(cells, np.int64(np.uint64(ids[i]) + base)))
        for i in range(start, stop):
            e = index.find(cells, np.int64(np.uint64(ids[i]) + base))
            found[i - start] = e
            if e != ABSENT:
                prefetch(entries, e)
        for i in range(start, stop):
            e = found[i - start]
            if e == ABSENT:
                key = np.int64(np.uint64(ids[i]) + base)
                e = index.find(cells, key)  # the row may have come in with a lookup just before
                if e == ABSENT:
                    e = _new_entry(entries, cells, counters, key)
            if entries[e].use < first:  # its first lookup in this batch
                use = first + unique
                uses[use & use_mask, 0] = e
                uses[use & use_mask, 1] = ABSENT
                if entries[e].use >= window:
                    uses[entries[e].use & use_mask, 1] = batch
                elif entries[e].slot != ABSENT:
                    _unlink(entries, e)
                    _append(entries, bucket, e)
                entries[e].use = use
                occurrences[unique] = 0
                unique += 1
            position = entries[e].use - first
            inverse[i] = position
            occurrences[position] += 1
    return unique


@numba.njit(cache=True, nogil=True)
def _plan(
    batch, observed, buckets, first_use, unique, capacity, entries, uses, counters,
    unique_slots, missed, fetched, slots, victims, victim_entries,
):  # fmt: skip
    """Plans `batch`, whose uses start at `first_use`; `observed` is the number of batches observed.

    Returns the numbers of missed rows and victims, and `wait_for`. Nothing is left half done if slots do not suffice:
    the first number is then ABSENT.
    """
    use_mask = uses.shape[0] - 1
    if unique > capacity:
        return ABSENT, 0, ABSENT
    misses = 0
    for u in range(unique):
        if u + _AHEAD < unique:
            prefetch(entries, uses[(first_use + u + _AHEAD) & use_mask, 0])
        e = uses[(first_use + u) & use_mask, 0]
        if entries[e].slot != ABSENT:
            _unlink(entries, e)  # in no list while the batch is planned, so that no victim is taken from it
        else:
            missed[misses] = u
            misses += 1

    evicted, wait_for = 0, ABSENT
    farthest = observed - 1
    for m in range(misses):
        if m + _AHEAD < misses:
            prefetch(entries, uses[(first_use + missed[m + _AHEAD]) & use_mask, 0])
        e = uses[(first_use + missed[m]) & use_mask, 0]
        if counters[_OCCUPIED] < capacity:
            slot = counters[_OCCUPIED]
            counters[_OCCUPIED] += 1
        else:
            head = _RECENT
            if entries[head].next == head:
                # Every resident row is wanted in the window: shrink it from its far end.
                head = 1 + farthest % buckets
                while entries[head].next == head:
                    farthest -= 1
                    head = 1 + farthest % buckets
            v = entries[head].next
            _unlink(entries, v)
            slot = entries[v].slot
            entries[v].slot = ABSENT
            entries[v].evicted = batch
            victims[evicted] = entries[v].key
            victim_entries[evicted] = v
            evicted += 1
        entries[e].slot = slot
        slots[m] = slot
        fetched[m] = entries[e].key
        if entries[e].evicted > wait_for:
            wait_for = entries[e].evicted

    for u in range(unique):
        if u + _AHEAD < unique:
            prefetch(entries, uses[(first_use + u + _AHEAD) & use_mask, 0])
        use = (first_use + u) & use_mask
        e = uses[use, 0]
        unique_slots[u] = entries[e].slot
        following = uses[use, 1]
        _append(entries, _RECENT if following == ABSENT else 1 + following % buckets, e)
    return misses, evicted, wait_for


@numba.njit(cache=True, nogil=True)
def _forget(batch, victims, window, cells, entries, counters):
    """Drops the entries of rows that `batch` evicted and that nothing has brought back or wants.

    `window` is the place of the first use that is not planned yet.
    """
    for v in range(victims.shape[0]):
        if v + _AHEAD < victims.shape[0]:
            prefetch(entries, victims[v + _AHEAD])
        if v + _AHEAD // 2 < victims.shape[0]:
            prefetch(cells, index.home(cells, entries[victims[v + _AHEAD // 2]].key))
        e = victims[v]
        if entries[e].evicted != batch:
            continue
        entries[e].evicted = ABSENT
        if entries[e].slot == ABSENT and entries[e].use < window:
            index.remove(cells, entries[e].key)
            entries[e].next = counters[_FREE_ENTRY]
            counters[_FREE_ENTRY] = e


@numba.njit(cache=True, nogil=True)
def _admit(keys, slots, cells, entries, counters):
    """Makes rows resident, least recently used first."""
    for i in range(keys.shape[0]):
        e = _new_entry(entries, cells, counters, keys[i])
        entries[e].slot = slots[i]
        _append(entries, _RECENT, e)


@numba.njit(cache=True, nogil=True)
def _move_uses(old, new, first, last):
    for use in range(first, last):
        new[use & (new.shape[0] - 1)] = old[use & (old.shape[0] - 1)]


class LookAheadPlanner:
    """Plans batches so that every row they need is resident, with as few rows moved as the window allows.

    A victim is the least recently used row that no observed batch wants. If there is none, the window shrinks: the row
    whose next use is farthest goes first, which is Belady's rule (IBM Systems Journal 1966). Rows of the batch itself
    are never evicted. Looking forward so that every step hits is ScratchPipe's idea (Kwon & Rhu, ISCA
    2022, section IV).

    Memory is O(slots + rows in the window + victims remembered): a map from keys to entries, and the entries, both
    grown by doubling.

    Args:
        group: the tables.
        slots: capacity in rows.
        window: most batches that are observed and not yet planned.
        memory: for how many batches evicted rows are remembered, so that `wait_for` is exact within it.
        resident: keys `int64[N]`, least recently used first, and slots `int64[N]` of a cache that is warm; the slots
            must be the first N.

    >>> from jaxcache.tables import Table
    >>> planner = LookAheadPlanner(Group.stack({"user": Table(100, 4)}), slots=2, window=1)
    >>> for ids in ([7, 8, 7], [9, 7]):
    ...     observed = planner.observe([np.array(ids)], [0])
    ...     planned = planner.plan()
    ...     print(observed.inverse, planned.unique_slots, planned.fetched, planned.victims)
    [0 1 0] [0 1] [7 8] []
    [0 1] [1 0] [9] [8]
    """

    def __init__(
        self,
        group: Group,
        slots: int,
        window: int,
        memory: int = 0,
        resident: tuple[np.ndarray, np.ndarray] | None = None,
    ):
        self._group, self._slots, self._memory = group, slots, memory
        self._buckets = window + 1
        lists = 1 + self._buckets
        self._entries = np.zeros(lists + 1024, _ENTRY)
        self._entries["next"][:lists] = self._entries["previous"][:lists] = np.arange(lists)
        self._cells = index.empty(1024)
        self._uses = np.zeros((1024, 2), np.int64)
        self._counters = np.zeros(4, np.int64)
        self._counters[_FREE_ENTRY], self._counters[_ENTRIES] = ABSENT, lists
        self._window: deque[tuple[Observed, int]] = deque()
        self._victims: deque[np.ndarray] = deque()
        self._observed = self._planned = 0
        if resident is not None:
            keys, places = resident
            self._reserve(len(keys))
            _admit(keys, places, self._cells, self._entries, self._counters)
            self._counters[_OCCUPIED] = len(keys)

    def needs_window(self) -> bool:
        """Whether planning the oldest observed batch may need victims."""
        unique = len(self._window[0][0].occurrences)
        return self._counters[_OCCUPIED] + unique > self._slots

    def _reserve(self, rows: int) -> None:
        """Makes room for `rows` more entries, and uses."""
        lists = 1 + self._buckets
        needed = int(self._counters[_ENTRIES]) + rows
        if needed > len(self._entries):
            larger = np.zeros(max(needed, 2 * len(self._entries)), _ENTRY)
            larger[: len(self._entries)] = self._entries
            self._entries = larger
        self._cells = index.reserve(self._cells, needed - lists)
        first = self._window[0][1] if self._window else int(self._counters[_USES])
        last = int(self._counters[_USES])
        if last + rows - first > len(self._uses):
            size = len(self._uses)
            while size < last + rows - first:
                size *= 2
            uses = np.zeros((size, 2), np.int64)
            _move_uses(self._uses, uses, first, last)
            self._uses = uses

    def observe(self, ids: list[np.ndarray], tables: list[int]) -> Observed:
        """See `Planner.observe`."""
        if len(self._window) >= self._buckets - 1:
            raise RuntimeError(f"the window is full: {len(self._window)} batches are observed and not planned")
        lookups = sum(map(len, ids))
        self._reserve(lookups)
        inverse, occurrences = np.empty(lookups, np.int32), np.empty(lookups, np.int32)
        start = unique = 0
        window = self._window[0][1] if self._window else int(self._counters[_USES])
        for feature, table in zip(ids, tables, strict=True):
            unique = _observe(
                feature, self._group.bases[table], self._observed, window, self._buckets, self._cells, self._entries,
                self._uses, self._counters, inverse[start : start + len(feature)], occurrences, unique,
            )  # fmt: skip
            start += len(feature)
        observed = Observed(inverse, occurrences[:unique].copy())
        self._window.append((observed, int(self._counters[_USES])))
        self._counters[_USES] += unique
        self._observed += 1
        return observed

    def plan(self) -> PlannedBatch:
        """See `Planner.plan`."""
        observed, first_use = self._window[0]
        unique = len(observed.occurrences)
        if len(self._victims) > self._memory:
            batch, victims = self._planned - len(self._victims), self._victims.popleft()
            _forget(batch, victims, first_use, self._cells, self._entries, self._counters)
        unique_slots = np.empty(unique, np.int32)
        missed, slots, victim_entries = (np.empty(unique, np.int32) for _ in range(3))
        fetched, victims = np.empty(unique, np.int64), np.empty(unique, np.int64)
        misses, evicted, wait_for = _plan(
            self._planned, self._observed, self._buckets, first_use, unique, self._slots, self._entries,
            self._uses, self._counters,
            unique_slots, missed, fetched, slots, victims, victim_entries,
        )  # fmt: skip
        if misses == ABSENT:
            raise TooFewSlots(
                f"batch {self._planned} needs {unique:,} slots for its unique rows and the cache has {self._slots:,}: "
                f"use LookAhead(slots={unique}) or more, or smaller batches"
            )
        self._window.popleft()
        self._victims.append(victim_entries[:evicted].copy())
        self._planned += 1
        return PlannedBatch(
            inverse=observed.inverse,
            occurrences=observed.occurrences,
            unique_slots=unique_slots,
            missed=missed[:misses],
            fetched=fetched[:misses],
            slots=slots[:misses],
            victims=victims[:evicted],
            wait_for=int(wait_for),
        )


@numba.njit(cache=True, nogil=True)
def _observe_resident(ids, base, batch, batch_of, position_of, inverse, occurrences, rows, unique):
    for i in range(ids.shape[0]):
        row = ids[i] + base
        if batch_of[row] != batch:
            batch_of[row] = batch
            position_of[row] = unique
            rows[unique] = row
            occurrences[unique] = 0
            unique += 1
        position = position_of[row]
        inverse[i] = position
        occurrences[position] += 1
    return unique


class ResidentPlanner:
    """Plans for a cache that holds every row: slot and key are the same number, and nothing moves.

    Memory is 8 bytes a slot. The calls are those of `Planner`.
    """

    def __init__(self, group: Group):
        self._group = group
        self._batch_of = np.full(group.rows, ABSENT, np.int32)
        self._position_of = np.zeros(group.rows, np.int32)
        self._window: deque[tuple[Observed, np.ndarray]] = deque()
        self._observed = 0

    def needs_window(self) -> bool:
        """Never: there are no victims."""
        return False

    def observe(self, ids: list[np.ndarray], tables: list[int]) -> Observed:
        """See `Planner.observe`."""
        lookups = sum(map(len, ids))
        inverse, occurrences, rows = (np.empty(lookups, np.int32) for _ in range(3))
        start = unique = 0
        for feature, table in zip(ids, tables, strict=True):
            unique = _observe_resident(
                feature, np.int64(self._group.bases[table]), self._observed, self._batch_of, self._position_of,
                inverse[start : start + len(feature)], occurrences, rows, unique,
            )  # fmt: skip
            start += len(feature)
        observed = Observed(inverse, occurrences[:unique].copy())
        self._window.append((observed, rows[:unique].copy()))
        self._observed += 1
        return observed

    def plan(self) -> PlannedBatch:
        """See `Planner.plan`."""
        observed, rows = self._window.popleft()
        none, no_keys = np.empty(0, np.int32), np.empty(0, np.int64)
        return PlannedBatch(observed.inverse, observed.occurrences, rows, none, no_keys, none, no_keys, ABSENT)
