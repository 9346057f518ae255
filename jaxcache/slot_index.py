"""Which slot holds a row, found on the device: the index of on-demand mode, and the other searches that it needs.

Pure JAX on `int32`, all shapes static, nothing sorted to find duplicates or victims. A row is known by the position of
its table and its id. Hash tables are open and probed with a second hash (Knuth, The Art of Computer Programming 3,
section 6.4, algorithm D), all probes of a batch side by side: a round looks at one cell for each row that is not done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = Any

NONE = -1  # a free cell, and the slot of a row that is not there
_MOST = 2**31 - 1
_BLOCK = 512  # slots that are looked through together


class SlotIndex(NamedTuple):
    """Where rows are, by hash.

    Attributes:
        cells: `int32[C]`, slots, or NONE. C is a power of two, at least three times the number of slots.
        claimed: `int32[]`, cells that are not NONE.

    A row is found at the first of its cells whose slot holds it. The slot table decides that: when a slot gets another
    row, the cells that lead there for the old one are found to be wrong by whoever probes them, and need no care. They
    are what other hash tables call tombstones; `insert` makes the index anew before they lengthen the probes.
    """

    cells: Array
    claimed: Array


def empty(slots: int) -> SlotIndex:
    """An index of nothing, for a cache of that many slots."""
    size = 1 << max(3 * slots - 1, 15).bit_length()
    return SlotIndex(jnp.full(size, NONE, jnp.int32), jnp.zeros((), jnp.int32))


def build(slot_table: Array) -> SlotIndex:
    """The index of a slot table (`int32[slots, 3]`: table, high and low words of the id)."""
    slots = slot_table.shape[0]
    return _claim(
        empty(slots), slot_table[:, 0], slot_table[:, 2], jnp.arange(slots, dtype=jnp.int32), slot_table[:, 0] != NONE
    )


def find(index: SlotIndex, slot_table: Array, tables: Array, ids: Array, wanted: Array) -> Array:
    """The slots `int32[N]` that hold the rows (tables, ids); NONE for those that are not there or not `wanted`."""
    place, stride = _probes(tables, ids, len(index.cells))
    mask = len(index.cells) - 1

    def look(state):
        place, found, pending = state
        slot = index.cells[place]
        here = pending & (slot != NONE) & (slot_table[slot, 0] == tables) & (slot_table[slot, 2] == ids)
        found = jnp.where(here, slot, found)
        return (place + stride) & mask, found, pending & ~here & (slot != NONE)

    return jax.lax.while_loop(lambda state: state[2].any(), look, (place, jnp.full_like(ids, NONE), wanted))[1]


def insert(index: SlotIndex, slot_table: Array, tables: Array, ids: Array, slots: Array, valid: Array) -> SlotIndex:
    """The index with rows that it does not have, at the slots which `slot_table` says already; those that are `valid`.

    It is made anew from the slot table where more than five eighths of its cells would be in use.
    """
    more = index.claimed + jnp.sum(valid, dtype=jnp.int32)
    return jax.lax.cond(
        more > len(index.cells) // 8 * 5,
        lambda: build(slot_table),
        lambda: _claim(index, tables, ids, slots, valid),
    )


def _claim(index: SlotIndex, tables: Array, ids: Array, slots: Array, valid: Array) -> SlotIndex:
    """Each valid row takes the first free one of its cells."""
    size = len(index.cells)
    place, stride = _probes(tables, ids, size)

    def claim(state):
        cells, place, pending = state
        free = pending & (cells[place] == NONE)
        cells = cells.at[jnp.where(free, place, size)].max(slots, mode="drop")  # of several the highest slot gets it
        pending &= cells[place] != slots
        return cells, (place + stride) & (size - 1), pending

    cells, _, _ = jax.lax.while_loop(lambda state: state[2].any(), claim, (index.cells, place, valid))
    return SlotIndex(cells, index.claimed + jnp.sum(valid, dtype=jnp.int32))


def _probes(tables: Array, ids: Array, size: int) -> tuple[Array, Array]:
    """The first cell of each row, and the odd distance to the next ones, `int32[N]`; `size` is a power of two."""
    words = _mixed(ids.astype(jnp.uint32) ^ _mixed(tables.astype(jnp.uint32) + jnp.uint32(0x9E3779B9)))
    place = words & jnp.uint32(size - 1)
    stride = (_mixed(words) | jnp.uint32(1)) & jnp.uint32(size - 1)
    return place.astype(jnp.int32), stride.astype(jnp.int32)


def _mixed(words: Array) -> Array:
    """MurmurHash3's finalizer, `uint32`."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)


class Unique(NamedTuple):
    """The unique rows among L lookups; there is room for U.

    Attributes:
        number: `int32[]`, of unique rows, which may be more than U.
        firsts: `int32[U]`, the first lookup of each, ascending; then L.
        inverse: `int32[L]`, the position of each lookup's row among them; U for one that stands for nothing.
    """

    number: Array
    firsts: Array
    inverse: Array


def deduplicate(tables: Array, ids: Array, present: Array, bound: int) -> Unique:
    """Finds the unique rows among lookups of rows (tables, ids), those that are `present`, with room for `bound`."""
    lookups = len(ids)
    size = 1 << max(2 * lookups - 1, 15).bit_length()
    lookup = jnp.arange(lookups, dtype=jnp.int32)
    place, stride = _probes(tables, ids, size)

    # All lookups of a row go from cell to cell together, and the first of them claims a cell for all.
    def meet(state):
        cells, place, first, pending = state
        free = pending & (cells[place] == _MOST)
        cells = cells.at[jnp.where(free, place, size)].min(lookup, mode="drop")
        holder = jnp.where(pending, cells[place], 0)
        same = pending & (tables[holder] == tables) & (ids[holder] == ids)
        return cells, (place + stride) & (size - 1), jnp.where(same, holder, first), pending & ~same

    start = (jnp.full(size, _MOST, jnp.int32), place, jnp.full(lookups, lookups, jnp.int32), present)
    _, _, first, _ = jax.lax.while_loop(lambda state: state[3].any(), meet, start)
    return _numbered(first, bound)


def deduplicate_slots(slots_of_lookups: Array, slots: int, bound: int) -> Unique:
    """The same for lookups known by their slots, `int32[L]`; those at `slots` or beyond stand for nothing."""
    lookups = len(slots_of_lookups)
    lookup = jnp.arange(lookups, dtype=jnp.int32)
    first = jnp.full(slots, lookups, jnp.int32).at[slots_of_lookups].min(lookup, mode="drop")
    return _numbered(first.at[slots_of_lookups].get(mode="fill", fill_value=lookups), bound)


def _numbered(first: Array, bound: int) -> Unique:
    """From the first lookup of each lookup's row, `int32[L]`; L for one that stands for nothing."""
    lookups = len(first)
    lookup = jnp.arange(lookups, dtype=jnp.int32)
    is_first = first == lookup
    position = jnp.cumsum(is_first.astype(jnp.int32)) - 1
    firsts = jnp.full(bound, lookups, jnp.int32).at[jnp.where(is_first, position, bound)].set(lookup, mode="drop")
    inverse = jnp.minimum(position.at[first].get(mode="fill", fill_value=bound), bound)
    return Unique(jnp.sum(is_first, dtype=jnp.int32), firsts, inverse)


def by_row(inverse: Array, bound: int) -> tuple[Array, Array]:
    """Lookups in the order of their rows: `order` and `starts` of a `GroupPlan` of `bound` unique rows."""
    lookups = len(inverse)
    occurrences = jnp.zeros(bound, jnp.int32).at[inverse].add(1, mode="drop")
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(occurrences)])
    if lookups * (bound + 1) <= 2**32:  # row and lookup fit one word, which sorts several times faster
        words = jnp.sort(inverse.astype(jnp.uint32) * jnp.uint32(lookups) + jnp.arange(lookups, dtype=jnp.uint32))
        return (words % jnp.uint32(max(lookups, 1))).astype(jnp.int32), starts
    return jnp.argsort(inverse, stable=True).astype(jnp.int32), starts


def lowest(keys: Sequence[Array], among: Array, number: Array, bound: int) -> Array:
    """The slots with the lowest keys, `number` of those that are `among` (`bool[slots]`), with room for `bound`.

    Args:
        keys: `int32[slots]` each, not negative: the first decides, ties go by the next, and in the end by slot.

    Returns:
        `int32[bound]`: those whose keys decide, then those that go by slot, each ascending; behind them anything.
    """
    below = jnp.zeros_like(among)
    for key in keys:
        limit = _order_statistic(key, among, number - jnp.sum(below, dtype=jnp.int32))
        below, among = below | (among & (key < limit)), among & (key == limit)
    nth, decided = jnp.arange(bound, dtype=jnp.int32), jnp.sum(below, dtype=jnp.int32)
    ties = _places(among, bound)[jnp.maximum(nth - decided, 0)]
    return jnp.where(nth < decided, _places(below, bound), ties)


def _places(mask: Array, bound: int) -> Array:
    """Where `mask` (`bool[N]`) is true, `int32[bound]`, ascending; then N."""
    blocks = -(-len(mask) // _BLOCK)
    if bound * _BLOCK > 2 * len(mask):
        return jnp.nonzero(mask, size=bound, fill_value=len(mask))[0].astype(jnp.int32)
    # Few of many: the block of each is found first, and only these blocks are looked through.
    parts = jnp.pad(mask, (0, blocks * _BLOCK - len(mask))).reshape(blocks, _BLOCK)
    ends = jnp.cumsum(jnp.sum(parts, axis=1, dtype=jnp.int32))
    nth = jnp.arange(bound, dtype=jnp.int32)
    block = jnp.minimum(jnp.searchsorted(ends, nth, side="right").astype(jnp.int32), blocks - 1)
    before = jnp.where(block > 0, ends[block - 1], 0)
    counts = jnp.cumsum(parts[block].astype(jnp.int32), axis=1)
    inside = jnp.argmax(counts > (nth - before)[:, None], axis=1).astype(jnp.int32)
    return jnp.where(nth < ends[-1], block * _BLOCK + inside, len(mask))


def _order_statistic(key: Array, among: Array, number: Array) -> Array:
    """The `number`-th lowest key, found by bisection: a pass over all for each bit of their spread."""

    def halve(limits):
        low, high = limits
        middle = low + (high - low) // 2
        enough = jnp.sum(among & (key <= middle), dtype=jnp.int32) >= number
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    limits = jnp.min(jnp.where(among, key, _MOST)), jnp.max(jnp.where(among, key, 0))
    return jax.lax.while_loop(lambda limits: limits[0] < limits[1], halve, limits)[0]


def take(array: Array, places: Array, filler: int) -> Array:
    """`array[places]`, and `filler` for places behind its end; of an empty one too, which JAX does not read from."""
    if not len(array):
        return jnp.full(places.shape, filler, array.dtype)
    return array.at[places].get(mode="fill", fill_value=filler)
