"""From the ids of batches to slots, victims and missed rows: the look-ahead planner. NumPy and Numba, no JAX.

A planner is used in two calls. `observe` draws a batch into the window: its lookups become unique rows, and each row
learns of its next use. `plan` decides the oldest observed batch: its rows get slots, and victims make room. What is
planned depends on the order of these calls alone, never on time or on the number of threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

import numba
import numpy as np

from jaxcache import index
from jaxcache.index import ABSENT, prefetch
from jaxcache.lookups import SMALL_ROWS, chunks, deduplicate, new_scratch, renumber
from jaxcache.policies import Policy, lookahead
from jaxcache.tables import Group

Window = int | Literal["auto", "all"]


@dataclass(frozen=True)
class Observed:
    """A batch in the window, with L lookups of U unique rows.

    Attributes:
        inverse: `int32[L]`, for each lookup the position of its row among the batch's unique rows, which are in order
            of first occurrence.
        occurrences: `int32[U]`, lookups of each unique row.
    """

    inverse: np.ndarray
    occurrences: np.ndarray


@dataclass(frozen=True)
class PlannedBatch:
    """The decision on one batch, with U unique rows, M missed rows and V <= M victims.

    Attributes:
        unique_slots: `int32[U]`, the slot of each unique row.
        missed: `int32[M]`, positions of the missed rows among the unique ones.
        fetched: `int64[M]`, keys of the rows to bring in.
        slots: `int32[M]`, where they go.
        victims: `int64[V]`, keys of the rows to take home; they lie in the last V of `slots`.
        wait_for: the latest batch whose victims are among `fetched`: its write-back must have landed. ABSENT if none;
            this very batch if a row that passes through is used by two batches in a row.
    """

    unique_slots: np.ndarray
    missed: np.ndarray
    fetched: np.ndarray
    slots: np.ndarray
    victims: np.ndarray
    wait_for: int


class Workers:
    """Threads that deduplicate lookups, each with a scratch of its own; planners that take turns share them."""

    def __init__(self, threads: int):
        self._scratches = [new_scratch() for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads - 1, "jaxcache-planner") if threads > 1 else None

    def share(self, parts: np.ndarray, work: Callable[[slice, np.ndarray], None]) -> None:
        """Calls `work(part, scratch)` on ranges of the chunks `parts`, about equal, in as many threads as pay."""
        lookups = int(parts[-1, 1]) if len(parts) else 0
        threads = min(len(self._scratches), len(parts), lookups // _THREAD_LOOKUPS)
        if threads <= 1 or self._pool is None:
            work(slice(0, len(parts)), self._scratches[0])
            return
        cuts = np.searchsorted(parts[:, 1], np.arange(1, threads) * lookups // threads)
        ranges = list(map(slice, [0, *cuts], [*cuts, len(parts)]))
        futures = [self._pool.submit(work, *one) for one in zip(ranges[1:], self._scratches[1:], strict=False)]
        work(ranges[0], self._scratches[0])
        for future in futures:
            future.result()

    def close(self) -> None:
        """Ends the threads."""
        if self._pool is not None:
            self._pool.shutdown()


class TooFewSlots(ValueError):
    """A batch has more unique rows than the cache has slots."""


class Planner(Protocol):
    """What its callers ask of a planner. Each goes on like this until its batches have ended and none is ahead:

    while planner.wants_batch() and (batch := next(batches, None)) is not None:
        planner.observe(*batch)
    planned = planner.plan()
    """

    memory: int

    @property
    def ahead(self) -> int:
        """Batches that are observed and not planned."""

    @property
    def limited(self) -> bool:
        """Whether a bound kept the last `wants_batch` from asking for more."""

    def wants_batch(self) -> bool:
        """Whether the plan of the oldest observed batch needs, or may be better for, another batch."""

    def observe(self, ids: np.ndarray, starts: np.ndarray, tables: np.ndarray) -> Observed:
        """Draws a batch into the window.

        Args:
            ids: `int64[L]`, valid ids, one feature after the other.
            starts: `int64[F + 1]`, where each of the F features starts in `ids`, and the end.
            tables: `int64[F]`, position of each feature's table in the group.
        """

    def plan(self) -> PlannedBatch:
        """Plans the oldest observed batch. Raises `TooFewSlots`, and then changes nothing."""


# An entry stands for a row that is resident, wanted by a batch of the window, or lately evicted.
_ENTRY = np.dtype(
    [
        ("key", np.int64),
        ("use", np.int64),  # place of the row's latest use in the uses: those of the window are still to come
        ("place", np.int32),  # its slot if resident; else ABSENT, or _EVICTED minus the batch that evicted it
        ("heat", np.int32),  # what the policy ranks it by; _PASSING if it passes through
        ("filed", np.int32),  # number of its item in a list, or position in the heap, if nothing wants it
        ("next", np.int32),  # the next free entry
    ],
    align=True,
)
_EVICTED = -2
_PASSING = -1
_NOT_FILED = 0

# Resident rows that no batch of the window wants are filed in the order of their eviction. Most policies file them in
# lists, least recently used first. All of `_FIRST` goes first. Frequencies that nearly agree share a level, of which
# there are two a doubling: `_LEVELS` lists are used in turn for the levels from that of a new row upwards, and as time
# goes on, lists of levels that fall below are appended to `_FIRST`. Exact ranks lie in a binary heap instead.
#
# A list is made of blocks of items, so that the next victims' entries can be asked for early. A row that is wanted
# again leaves behind an item whose number is no longer its entry's; such items are skipped, and swept out when many.
_FIRST = 0
_LEVELS = 64
_LISTS = 1 + _LEVELS
_LEVEL_BITS = 22  # of a positive float32, read as an integer: exponent and the first bit of the mantissa
_RESCALED_DOUBLINGS = 64  # a multiple of _LEVELS / 2, so that levels keep their lists
_BLOCK_ITEMS = 128
_TURNOVERS = 6  # of the cache, until a use counts half
_DISTINCT = 4  # times as many distinct rows as slots are as good as the whole future
_FORESIGHT = 64  # batches that are looked at before some batch ahead fills the cache,
_OPENING = 16  # and a plan more, once one does

_ORDERS = {"recency": 0, "aged": 1, "count": 2, "rank": 3}
_RECENCY, _AGED, _COUNT, _RANK = range(4)
# Fields of `counters`.
_FREE_ENTRY, _ENTRIES, _OCCUPIED, _USES, _WANTED, _UNWANTED, _HEAPED, _FREE_BLOCK, _BLOCKS, _ITEMS, _FILED = range(11)
_COUNTERS = 11
_NEXT, _START, _STOP = range(3)  # of a block: the next one of its list, where its items start and stop
_HEAD, _TAIL = range(2)  # of a list: its first and last block
# A batch of the window has its first use, and how many resident rows it is the next to use, of which some were taken as
# victims. A use has its row's entry and the batch of the row's next use; besides, the uses of a batch have room for the
# entries of the rows that it is the next to use.
_FIRST_USE, _RESIDENT, _TAKEN = range(3)
_ROW, _FOLLOWING, _RESIDENT_ROW = range(3)
_THREAD_LOOKUPS = 16_384  # fewer are not worth a thread
REMEMBERED_BATCHES = (
    16  # evictions of the pipeline, more than the batches between a plan and the landing of its victims
)
_AHEAD = 32  # rows between asking for their memory and needing it


@numba.njit(cache=True)
def _compiled_version():
    return index.VERSION


index.discard_stale(_compiled_version, __name__)


# Numba counts references to arrays at every call that it inlines, which costs more than these loops: so they are
# functions of many rows each.


@numba.njit(cache=True, nogil=True)
def _append(rows, which, lists, blocks, items, entries, counters):
    """Files each of `rows` last in its list of `which`."""
    for i in range(rows.shape[0]):
        tail = np.int64(lists[which[i], _TAIL])
        if tail == ABSENT or blocks[tail, _STOP] == _BLOCK_ITEMS:
            block = counters[_FREE_BLOCK]
            if block != ABSENT:
                counters[_FREE_BLOCK] = blocks[block, _NEXT]
            else:
                block = counters[_BLOCKS]
                counters[_BLOCKS] += 1
            blocks[block, _NEXT] = ABSENT
            blocks[block, _START] = blocks[block, _STOP] = 0
            if tail == ABSENT:
                lists[which[i], _HEAD] = block
            else:
                blocks[tail, _NEXT] = block
            lists[which[i], _TAIL] = block
            tail = block
        counters[_FILED] += 1
        if np.int32(counters[_FILED]) == _NOT_FILED:  # after 2**32 items
            counters[_FILED] += 1
        number = np.int32(counters[_FILED])
        place = tail * _BLOCK_ITEMS + blocks[tail, _STOP]
        items[place, 0] = rows[i]
        items[place, 1] = number
        entries[rows[i]].filed = number
        blocks[tail, _STOP] += 1
    counters[_ITEMS] += rows.shape[0]


@numba.njit(cache=True, nogil=True)
def _take(rows, which, lists, blocks, items, entries, counters):
    """Takes rows from the start of a list, until it is empty or `rows` is full. Returns how many it took."""
    taken = 0
    while taken < rows.shape[0] and lists[which, _HEAD] != ABSENT:
        head = np.int64(lists[which, _HEAD])
        start, stop = np.int64(blocks[head, _START]), np.int64(blocks[head, _STOP])
        while taken < rows.shape[0] and start < stop:
            place = head * _BLOCK_ITEMS + start
            # Past a block's end this is some other row, or none, and does no harm.
            prefetch(entries, np.int64(items[min(place + _AHEAD, items.shape[0] - 1), 0]))
            start += 1
            counters[_ITEMS] -= 1
            if entries[items[place, 0]].filed == items[place, 1]:
                rows[taken] = items[place, 0]
                taken += 1
        blocks[head, _START] = start
        if start == stop:
            lists[which, _HEAD] = blocks[head, _NEXT]
            if lists[which, _HEAD] == ABSENT:
                lists[which, _TAIL] = ABSENT
            blocks[head, _NEXT] = counters[_FREE_BLOCK]
            counters[_FREE_BLOCK] = head
    return taken


@numba.njit(cache=True, nogil=True)
def _sink(lists, blocks, floor, new_floor):
    """Appends the lists of the levels from `floor` up to below `new_floor` to the first list."""
    for level in range(floor, min(new_floor, floor + _LEVELS)):
        which = 1 + (level & (_LEVELS - 1))
        if lists[which, _HEAD] != ABSENT:
            if lists[_FIRST, _TAIL] == ABSENT:
                lists[_FIRST, _HEAD] = lists[which, _HEAD]
            else:
                blocks[lists[_FIRST, _TAIL], _NEXT] = lists[which, _HEAD]
            lists[_FIRST, _TAIL] = lists[which, _TAIL]
            lists[which, _HEAD] = lists[which, _TAIL] = ABSENT


@numba.njit(cache=True, nogil=True)
def _sweep(lists, blocks, items, swept_lists, swept_blocks, swept_items, entries, counters):
    """Moves the lists to the empty swept ones, without the items of rows that have gone on."""
    counters[_FREE_BLOCK], counters[_BLOCKS], counters[_ITEMS] = ABSENT, 0, 0
    rows, places = np.empty(_BLOCK_ITEMS, np.int32), np.empty(_BLOCK_ITEMS, np.int64)
    for which in range(_LISTS):
        places[:] = which
        block = np.int64(lists[which, _HEAD])
        while block != ABSENT:
            number = 0
            for i in range(blocks[block, _START], blocks[block, _STOP]):
                place = block * _BLOCK_ITEMS + i
                prefetch(entries, np.int64(items[min(place + _AHEAD, items.shape[0] - 1), 0]))
                if entries[items[place, 0]].filed == items[place, 1]:
                    rows[number] = items[place, 0]
                    number += 1
            _append(rows[:number], places, swept_lists, swept_blocks, swept_items, entries, counters)
            block = np.int64(blocks[block, _NEXT])


@numba.njit(cache=True, nogil=True)
def _sift(heap, entries, i, e):
    """Puts `e` where it belongs in the binary heap whose hole is at `i`: the coldest first, then the oldest use."""
    heat, use = entries[e].heat, entries[e].use
    number = heap.shape[0]
    while i > 0:
        above = (i - 1) >> 1
        other = heap[above]
        if (entries[other].heat, entries[other].use) < (heat, use):
            break
        heap[i] = other
        entries[other].filed = i
        i = above
    while 2 * i + 1 < number:
        below = 2 * i + 1
        other = heap[below]
        if below + 1 < number:
            right = heap[below + 1]
            if (entries[right].heat, entries[right].use) < (entries[other].heat, entries[other].use):
                below, other = below + 1, right
        if (heat, use) < (entries[other].heat, entries[other].use):
            break
        heap[i] = other
        entries[other].filed = i
        i = below
    heap[i] = e
    entries[e].filed = i


@numba.njit(cache=True, nogil=True)
def _heap_remove(heap, entries, counters, e):
    counters[_HEAPED] -= 1
    last = counters[_HEAPED]
    if heap[last] != e:
        _sift(heap[:last], entries, np.int64(entries[e].filed), np.int64(heap[last]))


@numba.njit(cache=True, nogil=True)
def _file(rows, order, floor, lists, blocks, items, heap, entries, counters):
    """Files resident rows that nothing wants any more. `floor` is the level of a row that is used once, now."""
    counters[_UNWANTED] += rows.shape[0]
    which = np.full(rows.shape[0], _FIRST, np.int64)
    if order == _AGED:
        for i in range(rows.shape[0]):
            level = np.int64(entries[rows[i]].heat) >> _LEVEL_BITS
            if level >= floor:
                which[i] = 1 + (level & (_LEVELS - 1))
    elif order != _RECENCY:
        passing = 0
        for i in range(rows.shape[0]):
            e = np.int64(rows[i])
            if entries[e].heat == _PASSING:
                rows[passing] = e
                passing += 1
            else:
                counters[_HEAPED] += 1
                _sift(heap[: counters[_HEAPED]], entries, counters[_HEAPED] - 1, e)
        rows = rows[:passing]
    _append(rows, which, lists, blocks, items, entries, counters)


@numba.njit(cache=True, nogil=True)
def _coldest(rows, floor, lists, blocks, items, heap, entries, counters):
    """Takes the rows that go first of those that nothing wants, at most `len(rows)`. Returns how many it took."""
    taken = _take(rows, _FIRST, lists, blocks, items, entries, counters)
    while taken < rows.shape[0] and counters[_HEAPED] > 0:
        rows[taken] = heap[0]
        taken += 1
        _heap_remove(heap, entries, counters, np.int64(heap[0]))
    for level in range(floor, floor + _LEVELS):
        if taken == rows.shape[0]:
            break
        which = 1 + (level & (_LEVELS - 1))
        taken += _take(rows[taken:], which, lists, blocks, items, entries, counters)
    for i in range(taken):
        entries[rows[i]].filed = _NOT_FILED
    counters[_UNWANTED] -= taken
    return taken


@numba.njit(cache=True, nogil=True)
def _farthest(rows, observed, batches, entries, uses):
    """Takes the wanted rows whose next use is farthest; `observed` is the number of batches observed."""
    use_mask, batch_mask = uses.shape[0] - 1, batches.shape[0] - 1
    taken, batch = 0, observed - 1
    while taken < rows.shape[0]:
        b = batch & batch_mask
        while taken < rows.shape[0] and batches[b, _TAKEN] < batches[b, _RESIDENT]:
            place = batches[b, _FIRST_USE] + batches[b, _TAKEN]
            rows[taken] = uses[place & use_mask, _RESIDENT_ROW]
            prefetch(entries, np.int64(rows[taken]))
            batches[b, _TAKEN] += 1
            taken += 1
        batch -= 1


@numba.njit(cache=True, nogil=True)
def _rescale(entries, number):
    """Divides every heat by 2**_RESCALED_DOUBLINGS."""
    for e in range(number):
        heat = np.int32(entries[e].heat).view(np.float32) * np.float32(2.0**-_RESCALED_DOUBLINGS)
        entries[e].heat = np.float32(heat).view(np.int32)


@numba.njit(cache=True, nogil=True)
def _new_entry(entries, counters, key):
    e = counters[_FREE_ENTRY]
    if e != ABSENT:
        counters[_FREE_ENTRY] = entries[e].next
    else:
        e = counters[_ENTRIES]
        counters[_ENTRIES] += 1
    entries[e].key = key
    entries[e].use = ABSENT
    entries[e].place = ABSENT
    entries[e].heat = 0
    entries[e].filed = _NOT_FILED
    return e


@numba.njit(cache=True, nogil=True)
def _observe(
    batch, chunks, keys, chunk_occurrences, uniques, found, order, counts, window, batches, cells, entries, uses, heap,
    counters, occurrences,
):  # fmt: skip
    """Adds the chunks' unique rows to `batch`, and sets `found` to their positions in it. Returns how many they are.

    `window` is the place of the first use that is not planned yet.
    """
    use_mask = uses.shape[0] - 1
    first = counters[_USES]
    unique = resident = 0
    for c in range(chunks.shape[0]):
        start = chunks[c, 0]
        stop = start + uniques[c]
        for i in range(start, min(start + _AHEAD, stop)):
            prefetch(entries, np.int64(max(found[i], 0)))
        for i in range(start, stop):
            if i + _AHEAD < stop:
                prefetch(entries, np.int64(max(found[i + _AHEAD], 0)))
            if i + _AHEAD // 2 < stop and found[i + _AHEAD // 2] != ABSENT:
                prefetch(uses, entries[found[i + _AHEAD // 2]].use & use_mask)
            e = np.int64(found[i])
            if e == ABSENT:
                cell = index.probe(cells, keys[i])
                e = cells[cell, 1] - 1  # another chunk may have brought the row in
                if e == ABSENT:
                    e = _new_entry(entries, counters, keys[i])
                    cells[cell, 0], cells[cell, 1] = keys[i], e + 1
                    if order == _RANK:
                        entries[e].heat = counts[keys[i]]
            latest = entries[e].use
            if latest < first:  # its first lookup in this batch
                use = first + unique
                uses[use & use_mask, _ROW] = e
                uses[use & use_mask, _FOLLOWING] = ABSENT
                if latest >= window:
                    uses[latest & use_mask, _FOLLOWING] = batch
                else:
                    counters[_WANTED] += 1
                    if entries[e].place >= 0:
                        counters[_UNWANTED] -= 1
                        if order >= _COUNT and entries[e].heat != _PASSING:
                            _heap_remove(heap, entries, counters, e)
                        entries[e].filed = _NOT_FILED
                        uses[(first + resident) & use_mask, _RESIDENT_ROW] = e
                        resident += 1
                entries[e].use = use
                occurrences[unique] = chunk_occurrences[i]
                found[i] = unique
                unique += 1
            else:
                found[i] = latest - first
                occurrences[latest - first] += chunk_occurrences[i]
    b = batch & (batches.shape[0] - 1)
    batches[b, _FIRST_USE], batches[b, _RESIDENT], batches[b, _TAKEN] = first, resident, 0
    return unique


@numba.njit(cache=True, nogil=True)
def _misses(first_use, unique, passes, entries, uses, missed):
    """Lists the positions of missed rows: first those that are not resident, then those that pass through."""
    use_mask = uses.shape[0] - 1
    absent, passing = 0, 0
    passed = np.empty(unique if passes else 0, np.int32)
    for u in range(unique):
        if u + _AHEAD < unique:
            prefetch(entries, np.int64(uses[(first_use + u + _AHEAD) & use_mask, _ROW]))
        e = uses[(first_use + u) & use_mask, _ROW]
        if entries[e].place < 0:
            missed[absent] = u
            absent += 1
        elif passes and entries[e].heat == _PASSING:
            passed[passing] = u
            passing += 1
    missed[absent : absent + passing] = passed[:passing]
    return absent, passing


@numba.njit(cache=True, nogil=True)
def _plan(
    batch, observed, first_use, occurrences, absent, capacity, order, passes, weight, floor, batches, entries, uses,
    lists, blocks, items, heap, counters, missed, unique_slots, fetched, slots, victims, victim_entries,
):  # fmt: skip
    """Plans `batch`; `observed` is the number of batches observed, of `missed` the first `absent` are not resident.

    Returns the number of victims and `wait_for`.
    """
    use_mask, batch_mask = uses.shape[0] - 1, batches.shape[0] - 1
    free = min(absent, capacity - counters[_OCCUPIED])
    evicted, wait_for = absent - free, np.int64(ABSENT)
    taken = _coldest(victim_entries[:evicted], floor, lists, blocks, items, heap, entries, counters)
    # If every resident row is wanted in the window, the one whose next use is farthest goes.
    _farthest(victim_entries[taken:evicted], observed, batches, entries, uses)
    for m in range(missed.shape[0]):
        if m + _AHEAD < missed.shape[0]:
            prefetch(entries, np.int64(uses[(first_use + missed[m + _AHEAD]) & use_mask, _ROW]))
        e = np.int64(uses[(first_use + missed[m]) & use_mask, _ROW])
        fetched[m] = entries[e].key
        if m >= absent:  # its own victim
            slots[m] = entries[e].place
            victims[evicted] = entries[e].key
            victim_entries[evicted] = e
            evicted += 1
            wait_for = batch
            continue
        wait_for = max(wait_for, _EVICTED - entries[e].place)
        if m < free:
            slot = counters[_OCCUPIED]
            counters[_OCCUPIED] += 1
        else:
            v = victim_entries[m - free]
            slot = np.int64(entries[v].place)
            entries[v].place = _EVICTED - batch
            if order == _COUNT:
                entries[v].heat = 0
            victims[m - free] = entries[v].key
        entries[e].place = slot
        if passes:
            entries[e].heat = _PASSING
        slots[m] = slot

    unwanted = 0
    rows = np.empty(occurrences.shape[0], np.int32)
    for u in range(occurrences.shape[0]):
        if u + _AHEAD < occurrences.shape[0]:
            prefetch(entries, np.int64(uses[(first_use + u + _AHEAD) & use_mask, _ROW]))
        use = (first_use + u) & use_mask
        e = np.int64(uses[use, _ROW])
        unique_slots[u] = entries[e].place
        if order == _AGED:
            heat = np.int32(entries[e].heat).view(np.float32) + weight
            entries[e].heat = np.float32(heat).view(np.int32)
        elif order == _COUNT:
            entries[e].heat = min(np.int64(entries[e].heat) + occurrences[u], 2**31 - 1)
        following = np.int64(uses[use, _FOLLOWING])
        if following == ABSENT:
            rows[unwanted] = e
            unwanted += 1
        else:
            b = following & batch_mask
            uses[(batches[b, _FIRST_USE] + batches[b, _RESIDENT]) & use_mask, _RESIDENT_ROW] = e
            batches[b, _RESIDENT] += 1
    counters[_WANTED] -= unwanted
    _file(rows[:unwanted], order, floor, lists, blocks, items, heap, entries, counters)
    return evicted, wait_for


@numba.njit(cache=True, nogil=True)
def _forget(batch, victims, window, cells, entries, counters):
    """Drops the entries of rows that `batch` evicted and that nothing has brought back or wants.

    `window` is the place of the first use that is not planned yet.
    """
    for v in range(victims.shape[0]):
        if v + _AHEAD < victims.shape[0]:
            prefetch(entries, np.int64(victims[v + _AHEAD]))
        if v + _AHEAD // 2 < victims.shape[0]:
            prefetch(cells, index.home(cells, entries[victims[v + _AHEAD // 2]].key))
        e = np.int64(victims[v])
        if entries[e].place != _EVICTED - batch:
            continue
        entries[e].place = ABSENT
        if entries[e].use < window:
            index.remove(cells, entries[e].key)
            entries[e].next = counters[_FREE_ENTRY]
            counters[_FREE_ENTRY] = e


@numba.njit(cache=True, nogil=True)
def _admit(keys, slots, heats, order, floor, cells, lists, blocks, items, heap, entries, counters):
    """Makes rows resident, least recently used first."""
    rows = np.empty(keys.shape[0], np.int32)
    for i in range(keys.shape[0]):
        e = _new_entry(entries, counters, keys[i])
        index.insert(cells, keys[i], e)
        entries[e].place = slots[i]
        entries[e].heat = heats[i]
        entries[e].use = ABSENT - keys.shape[0] + i
        rows[i] = e
    _file(rows, order, floor, lists, blocks, items, heap, entries, counters)


@numba.njit(cache=True, nogil=True)
def _move_uses(old, new, first, last):
    for use in range(first, last):
        new[use & (new.shape[0] - 1)] = old[use & (old.shape[0] - 1)]


def _aligned_entries(number: int) -> np.ndarray:
    """Entries that do not straddle cache lines."""
    memory = np.zeros(number * _ENTRY.itemsize + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + number * _ENTRY.itemsize].view(_ENTRY)


class LookAheadPlanner:
    """Plans batches so that every row they need is resident, with as few rows moved as policy and window allow.

    A row that an observed batch wants is evicted only if there is no other, and then the one whose next use is
    farthest (Belady's rule, IBM Systems Journal 1966); the policy ranks the others. Rows of the batch itself are
    never evicted. Looking forward so that every step hits is ScratchPipe's idea (Kwon & Rhu, ISCA 2022, section IV).

    Memory is O(slots + rows in the window + victims remembered): a map from keys to entries, and the entries, both
    grown by doubling.

    Args:
        group: the tables.
        slots: capacity in rows.
        policy: see `jaxcache.policies`.
        window: batches that a plan looks at, its own included, if the policy leaves that open. "auto" looks until the
            choice of victims is exact, because all others are wanted, or until the batches ahead hold four times as
            many distinct rows as there are slots; "all" until the batches end.
        max_window: most batches that "auto" looks at.
        memory: for how many batches evicted rows are remembered, so that `wait_for` is exact within it.
        resident: keys `int64[N]`, least recently used first, slots `int64[N]` and lookups `int64[N]` of a cache
            that is warm; the slots must be the first N.
        workers: what deduplicates and probes; by default the caller's thread alone.

    Attributes:
        limited: whether the window was cut short by `max_window` when `wants_batch` was called last.
        memory: as given; it may be raised before so many batches were planned.

    >>> from jaxcache.tables import Table
    >>> planner = LookAheadPlanner(Group.stack({"user": Table(100, 4)}), slots=2, window=1)
    >>> for ids in ([7, 8, 7], [9, 7]):
    ...     observed = planner.observe(np.array(ids), np.array([0, len(ids)]), np.array([0]))
    ...     planned = planner.plan()
    ...     print(observed.inverse, planned.unique_slots, planned.fetched, planned.victims)
    [0 1 0] [0 1] [7 8] []
    [0 1] [1 0] [9] [8]
    """

    def __init__(
        self,
        group: Group,
        slots: int,
        policy: Policy | None = None,
        window: Window = "auto",
        max_window: int = 1024,
        memory: int = 0,
        resident: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
        workers: Workers | None = None,
    ):
        policy = policy or lookahead()
        self._slots, self.memory, self._max_window = slots, memory, max_window
        self._order, self._passes = _ORDERS[policy.order], policy.passes
        self._window: Window = window if policy.window is None else policy.window
        self._bases, self._names = group.bases, group.names
        self._small = np.array([table.rows <= SMALL_ROWS for table in group.tables])
        self._counts = policy.group_counts(group) if policy.order == "rank" else np.zeros(0, np.int32)
        self._entries = _aligned_entries(1024)
        self._cells = index.empty(1024)
        self._uses = np.zeros((1024, 3), np.int32)  # a ring, as are the batches
        self._batches = np.zeros((16, 3), np.int64)
        self._heap = np.zeros(slots if self._order >= _COUNT else 0, np.int32)
        self._lists = np.full((_LISTS, 2), ABSENT, np.int32)
        self._blocks = np.zeros((0, 3), np.int32)
        self._items = np.zeros((0, 2), np.int32)
        self._counters = np.zeros(_COUNTERS, np.int64)
        self._counters[_FREE_ENTRY] = self._counters[_FREE_BLOCK] = ABSENT
        self._ahead: deque[np.ndarray] = deque()  # occurrences of the unique rows of each batch
        self._oldest: tuple[np.ndarray, int] | None = None  # missed rows of the oldest batch, and how many are absent
        self._victims: deque[np.ndarray] = deque()
        self._observed = self._planned = self._evictions = self._rescaled = 0
        self._crowded: int | None = None  # the first plan that looked at more rows than there are slots for
        self._floor = _level(1.0)
        self._workers = workers or Workers(1)
        self.limited = False
        if resident is not None:
            self._admit(*resident, pinned=policy.warm_keys(group, slots) if self._passes else None)

    def _admit(self, keys: np.ndarray, slots: np.ndarray, lookups: np.ndarray, pinned: np.ndarray | None) -> None:
        if self._order == _AGED:
            heats = lookups.astype(np.float32).view(np.int32)
        elif self._order == _RANK:
            heats = self._counts[keys]
        else:
            heats = np.minimum(lookups, 2**31 - 1).astype(np.int32)
        if pinned is not None:
            heats = np.where(np.isin(keys, pinned), heats, np.int32(_PASSING))
        self._reserve(len(keys), 0)
        self._reserve_items(len(keys))
        _admit(
            keys, slots, heats, self._order, self._floor, self._cells, self._lists, self._blocks, self._items,
            self._heap, self._entries, self._counters,
        )  # fmt: skip
        self._counters[_OCCUPIED] = len(keys)

    @property
    def ahead(self) -> int:
        """Batches that are observed and not planned."""
        return len(self._ahead)

    @property
    def nbytes(self) -> int:
        """Bytes of everything that grows."""
        arrays = (
            self._entries, self._cells, self._uses, self._batches, self._blocks, self._items, self._heap,
            *self._ahead, *self._victims,
        )  # fmt: skip
        return sum(array.nbytes for array in arrays)

    def wants_batch(self) -> bool:
        """See `Planner.wants_batch`."""
        self.limited = False
        if not self._ahead or self._window == "all":
            return True
        if len(self._ahead[0]) > self._slots:
            return False  # so that plan() says so
        occupied, wanted, unwanted = (int(self._counters[field]) for field in (_OCCUPIED, _WANTED, _UNWANTED))
        victims = occupied + self._misses()[1] - self._slots
        if victims <= 0:
            # There is nothing to choose yet. The window opens by a batch a plan, and quickly once it shows that the
            # slots will not do: or else the first plan that needs victims would have to wait for all of it.
            absent = wanted - (occupied - unwanted)
            if self._crowded is None and absent > self._slots - occupied:
                self._crowded = self._planned
            opened = min(self._planned + 1, _FORESIGHT)
            if self._crowded is not None:
                opened = _FORESIGHT + _OPENING * (self._planned - self._crowded)
            if len(self._ahead) >= opened:
                return False
        if self._window != "auto":
            return len(self._ahead) < self._window
        if wanted >= _DISTINCT * self._slots or (victims > 0 and unwanted <= victims):
            return False
        self.limited = len(self._ahead) >= self._max_window
        return not self.limited

    def _misses(self) -> tuple[np.ndarray, int]:
        """Missed rows of the oldest batch, those that are not resident first, and how many these are."""
        if self._oldest is None:
            unique = len(self._ahead[0])
            missed = np.empty(unique, np.int32)
            absent, passing = _misses(self._first_use(), unique, self._passes, self._entries, self._uses, missed)
            self._oldest = missed[: absent + passing], absent
        return self._oldest

    def _first_use(self) -> int:
        """Place of the first use that is not planned yet."""
        if not self._ahead:
            return int(self._counters[_USES])
        return int(self._batches[self._planned & (len(self._batches) - 1), _FIRST_USE])

    def _reserve(self, entries: int, uses: int) -> None:
        """Makes room for so many more entries and uses, and for another batch."""
        needed = int(self._counters[_ENTRIES]) + entries
        if needed > len(self._entries):
            larger = _aligned_entries(max(needed, 2 * len(self._entries)))
            larger[: len(self._entries)] = self._entries
            self._entries = larger
        self._cells = index.reserve(self._cells, needed)
        first, last = self._first_use(), int(self._counters[_USES])
        if last + uses - first > len(self._uses):
            size = len(self._uses)
            while size < last + uses - first:
                size *= 2
            larger = np.zeros((size, 3), np.int32)
            _move_uses(self._uses, larger, first, last)
            self._uses = larger
        if len(self._ahead) == len(self._batches):
            larger = np.zeros((2 * len(self._batches), 3), np.int64)
            _move_uses(self._batches, larger, self._planned, self._observed)
            self._batches = larger

    def _reserve_items(self, number: int) -> None:
        """Makes room to file so many more rows; sweeps if items of rows that have gone on are as many as the others."""
        filed = int(self._counters[_UNWANTED])
        lists, blocks, items = self._lists, self._blocks, self._items
        needed = _LISTS + -(-number // _BLOCK_ITEMS)
        if self._counters[_ITEMS] > 2 * filed + number + _LISTS * _BLOCK_ITEMS:
            capacity = needed + _LISTS + -(-2 * filed // _BLOCK_ITEMS)
            self._lists = np.full((_LISTS, 2), ABSENT, np.int32)
        elif self._counters[_BLOCKS] + needed > len(blocks):
            capacity = 2 * len(blocks) + needed
        else:
            return
        self._blocks = np.zeros((capacity, 3), np.int32)
        self._items = np.zeros((capacity * _BLOCK_ITEMS, 2), np.int32)
        if self._lists is lists:
            self._blocks[: len(blocks)], self._items[: len(items)] = blocks, items
        else:
            _sweep(lists, blocks, items, self._lists, self._blocks, self._items, self._entries, self._counters)

    def observe(self, ids: np.ndarray, starts: np.ndarray, tables: np.ndarray) -> Observed:
        """See `Planner.observe`."""
        lookups = len(ids)
        parts = chunks(starts, tables)
        inverse, found, occurrences = (np.empty(lookups, np.int32) for _ in range(3))
        keys, uniques = np.empty(lookups, np.int64), np.empty(len(parts), np.int64)

        def deduplicate_part(part: slice, scratch: np.ndarray) -> None:
            deduplicate(
                ids, parts[part], self._bases, self._small, self._cells, scratch, inverse, keys,
                occurrences, uniques[part], found,
            )  # fmt: skip

        def renumber_part(part: slice, scratch: np.ndarray) -> None:
            renumber(parts[part], found, inverse)

        self._workers.share(parts, deduplicate_part)
        unique = int(uniques.sum())
        self._reserve(unique, unique)
        batch_occurrences = np.empty(unique, np.int32)
        unique = _observe(
            self._observed, parts, keys, occurrences, uniques, found, self._order, self._counts, self._first_use(),
            self._batches, self._cells, self._entries, self._uses, self._heap, self._counters, batch_occurrences,
        )  # fmt: skip
        self._workers.share(parts, renumber_part)
        observed = Observed(inverse, batch_occurrences[:unique].copy())  # a view would hold all of it
        self._ahead.append(observed.occurrences)
        self._counters[_USES] += unique
        self._observed += 1
        return observed

    def plan(self) -> PlannedBatch:
        """See `Planner.plan`."""
        unique = len(self._ahead[0])
        if unique > self._slots:
            raise TooFewSlots(
                f"batch {self._planned} needs {unique:,} slots for its unique rows of {', '.join(self._names)} and the "
                f"cache has {self._slots:,}: use LookAhead(slots={unique}) or more, or where tables are of several "
                f"groups slots={{{self._names[0]!r}: {unique}, ...}}, or smaller batches"
            )
        first_use = self._first_use()
        if len(self._victims) > self.memory:
            batch, forgotten = self._planned - len(self._victims), self._victims.popleft()
            _forget(batch, forgotten, first_use, self._cells, self._entries, self._counters)
        missed, absent = self._misses()
        self._reserve_items(unique)
        weight = self._age() if self._order == _AGED else 0.0
        unique_slots = np.empty(unique, np.int32)
        slots, victim_entries = (np.empty(len(missed), np.int32) for _ in range(2))
        fetched, victims = np.empty(len(missed), np.int64), np.empty(len(missed), np.int64)
        evicted, wait_for = _plan(
            self._planned, self._observed, first_use, self._ahead[0], absent, self._slots, self._order, self._passes,
            np.float32(weight), self._floor, self._batches, self._entries, self._uses, self._lists, self._blocks,
            self._items, self._heap, self._counters, missed, unique_slots, fetched, slots, victims, victim_entries,
        )  # fmt: skip
        self._ahead.popleft()
        self._oldest = None
        self._victims.append(victim_entries[:evicted].copy())
        self._evictions += evicted
        self._planned += 1
        return PlannedBatch(unique_slots, missed, fetched, slots, victims[:evicted], int(wait_for))

    def _age(self) -> float:
        """What a use counts now, doubling every _TURNOVERS turnovers of the cache: older ones then count less."""
        doublings = self._evictions / (_TURNOVERS * self._slots) - self._rescaled
        while doublings >= _RESCALED_DOUBLINGS:
            _rescale(self._entries, self._counters[_ENTRIES])
            doublings -= _RESCALED_DOUBLINGS
            self._rescaled += _RESCALED_DOUBLINGS
            self._floor -= _level(2.0**_RESCALED_DOUBLINGS) - _level(1.0)
        weight = 2.0**doublings
        if _level(weight) > self._floor:
            _sink(self._lists, self._blocks, self._floor, _level(weight))
            self._floor = _level(weight)
        return weight


def _level(heat: float) -> int:
    return int(np.float32(heat).view(np.int32)) >> _LEVEL_BITS


@numba.njit(cache=True, nogil=True)
def _observe_resident(ids, starts, bases, batch, batch_of, position_of, inverse, occurrences, rows):
    unique = 0
    for feature in range(bases.shape[0]):
        for i in range(starts[feature], starts[feature + 1]):
            row = ids[i] + np.int64(bases[feature])
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

    limited = False
    memory = 0  # nothing is evicted

    def __init__(self, group: Group):
        self._group = group
        self._batch_of = np.full(group.rows, ABSENT, np.int32)
        self._position_of = np.zeros(group.rows, np.int32)
        self._ahead: deque[np.ndarray] = deque()
        self._observed = 0

    @property
    def ahead(self) -> int:
        """Batches that are observed and not planned."""
        return len(self._ahead)

    def wants_batch(self) -> bool:
        """Only if none is ahead: there are no victims."""
        return not self._ahead

    def observe(self, ids: np.ndarray, starts: np.ndarray, tables: np.ndarray) -> Observed:
        """See `Planner.observe`."""
        inverse, occurrences, rows = (np.empty(len(ids), np.int32) for _ in range(3))
        unique = _observe_resident(
            ids, starts, self._group.bases[tables], self._observed, self._batch_of, self._position_of, inverse,
            occurrences, rows,
        )  # fmt: skip
        self._ahead.append(rows[:unique].copy())
        self._observed += 1
        return Observed(inverse, occurrences[:unique].copy())

    def plan(self) -> PlannedBatch:
        """See `Planner.plan`."""
        none, no_keys = np.empty(0, np.int32), np.empty(0, np.int64)
        return PlannedBatch(self._ahead.popleft(), none, no_keys, none, no_keys, ABSENT)
