"""The unique rows of a batch: from lookups to keys, positions and occurrences. NumPy and Numba, no JAX.

Lookups are taken in chunks, each of one feature, so that a chunk's map of what it has seen stays in the core's own
cache, and so that several threads can take one each. Where the chunks lie depends on the batch alone.
"""

from __future__ import annotations

import numba
import numpy as np

from jaxcache import index
from jaxcache.index import ABSENT, prefetch

CHUNK_LOOKUPS = 32_768
SMALL_ROWS = 2 * CHUNK_LOOKUPS  # as many as a chunk's hash map needs places, half full at most: no map for such tables
_AHEAD = 16  # keys between asking for their cell and looking into it


@numba.njit(cache=True)
def _compiled_version():
    return index.VERSION


index.discard_stale(_compiled_version, __name__)


def new_scratch() -> np.ndarray:
    """What `deduplicate` needs for itself, one a thread: `int32`, ABSENT everywhere whenever no call is under way."""
    return np.full(SMALL_ROWS, ABSENT, np.int32)


@numba.njit(cache=True, nogil=True)
def chunks(starts, tables):
    """Cuts the features, which start at `starts[:-1]`, into chunks: start, stop and table of each, `int64[C, 3]`."""
    number = 0
    for feature in range(tables.shape[0]):
        number += -(-(starts[feature + 1] - starts[feature]) // CHUNK_LOOKUPS)
    out = np.empty((number, 3), np.int64)
    c = 0
    for feature in range(tables.shape[0]):
        for start in range(starts[feature], starts[feature + 1], CHUNK_LOOKUPS):
            out[c, 0], out[c, 1], out[c, 2] = start, min(start + CHUNK_LOOKUPS, starts[feature + 1]), tables[feature]
            c += 1
    return out


@numba.njit(cache=True, nogil=True)
def by_row(inverse, occurrences, unique):
    """The lookups of each unique row one behind the other.

    Args:
        inverse: `int32[L]`, the position of each lookup's row among the unique ones; `unique` or more for no row.
        occurrences: `int32[U]`, lookups of each, U at most `unique`.
        unique: how many unique rows there can be.

    Returns:
        `order`, `int32[L]`, the lookups by row and in order within each, and those of no row last; and `starts`,
        `int32[unique + 1]`, where the lookups of each row begin in `order`, and where the last ones end.
    """
    starts = np.empty(unique + 1, np.int32)
    starts[0] = 0
    for u in range(unique):
        starts[u + 1] = starts[u] + (occurrences[u] if u < occurrences.shape[0] else 0)
    place = starts.copy()  # the last entry is of those of no row
    order = np.empty(inverse.shape[0], np.int32)
    for lookup in range(inverse.shape[0]):
        row = min(inverse[lookup], unique)
        order[place[row]] = lookup
        place[row] += 1
    return order, starts


@numba.njit(cache=True, nogil=True)
def deduplicate(ids, chunks, bases, small, cells, scratch, inverse, keys, occurrences, uniques, entries):
    """Deduplicates each chunk for itself and looks its unique keys up in the index `cells`.

    Args:
        ids: `int64[L]`.
        chunks: `int64[C, 3]`, those to do.
        bases: `uint64[tables]`, key of each table's first row.
        small: `bool[tables]`, tables of at most SMALL_ROWS rows: a row's id is its place in `scratch`.
        cells: the index, which is only read.
        scratch: from `new_scratch()`.
        inverse: `int32[L]`, set to the position of each lookup's row among its chunk's unique rows.
        keys, occurrences, entries: `int64[L]`, `int32[L]`, `int32[L]`. From a chunk's start on they are set to the key
            of each unique row, in order of first occurrence, the lookups of it, and its value in the index or ABSENT.
        uniques: `int64[C]`, set to the unique rows of each chunk.
    """
    for c in range(chunks.shape[0]):
        start, stop, table = chunks[c]
        base = bases[table]
        unique = start
        if small[table]:
            for i in range(start, stop):
                row = ids[i]
                place = scratch[row]
                if place == ABSENT:
                    place = unique
                    scratch[row] = place
                    keys[place] = row
                    occurrences[place] = 0
                    unique += 1
                occurrences[place] += 1
                inverse[i] = place - start
            for place in range(start, unique):
                scratch[keys[place]] = ABSENT
        else:
            size, shift = 16, np.uint64(60)
            while size < 2 * (stop - start):
                size *= 2
                shift -= np.uint64(1)
            mask = size - 1
            for i in range(start, stop):
                row = ids[i]
                cell = np.int64((np.uint64(row) * index.GOLDEN) >> shift)
                place = scratch[cell]
                while place != ABSENT and keys[place] != row:
                    cell = (cell + 1) & mask
                    place = scratch[cell]
                if place == ABSENT:
                    place = unique
                    scratch[cell] = place
                    keys[place] = row
                    occurrences[place] = 0
                    unique += 1
                occurrences[place] += 1
                inverse[i] = place - start
            scratch[:size] = ABSENT
        uniques[c] = unique - start
        for place in range(start, unique):
            keys[place] = np.int64(np.uint64(keys[place]) + base)
            if place - start < _AHEAD:
                prefetch(cells, index.home(cells, keys[place]))
        for place in range(start, unique):
            if place + _AHEAD < unique:
                prefetch(cells, index.home(cells, keys[place + _AHEAD]))
            entries[place] = index.find(cells, keys[place])


@numba.njit(cache=True, nogil=True)
def renumber(chunks, positions, inverse):
    """Replaces positions in a chunk by those in the batch, which `positions` has from each chunk's start on."""
    for c in range(chunks.shape[0]):
        start = chunks[c, 0]
        for i in range(start, chunks[c, 1]):
            inverse[i] = positions[start + inverse[i]]
