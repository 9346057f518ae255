"""The rows of a group as they were at one moment, read while others are being written. NumPy and Numba, no JAX."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numba
import numpy as np

from jaxcache import index
from jaxcache.index import ABSENT
from jaxcache.optimizers import Rows
from jaxcache.tables import Group

if TYPE_CHECKING:
    from jaxcache.store import RowStore

_BUCKET_BITS = 16  # of keys, which are counted in so many buckets to find out where they are dense
_SORTED_KEYS = 2**22  # sorted at a time, 32 MiB


@numba.njit(cache=True)
def _compiled_version():
    return index.VERSION


index.discard_stale(_compiled_version, __name__)


@numba.njit(cache=True, nogil=True)
def set_bits(bits, positions):
    """Sets the bits, of bytes `uint8[M]`, at `positions`."""
    for i in range(positions.shape[0]):
        bits[positions[i] >> 3] |= np.uint8(1 << (positions[i] & 7))


@numba.njit(cache=True, nogil=True, inline="always")
def _is_in(bits, position, written):
    """Whether the row at `position` was written, and if there are `bits`, has its bit set."""
    if position < 0 or position >= written:
        return False
    return bits.shape[0] == 0 or (position >> 3 < bits.shape[0] and bits[position >> 3] >> (position & 7) & 1 != 0)


@numba.njit(cache=True, nogil=True)
def _count(cells, bits, written, first, shift, bases, of_buckets, of_tables):
    for cell in range(cells.shape[0]):
        if _is_in(bits, cells[cell, 1] - 1, written):
            key = np.uint64(cells[cell, 0])
            if key >= first and (key - first) >> shift < np.uint64(of_buckets.shape[0]):
                of_buckets[(key - first) >> shift] += 1
                of_tables[np.searchsorted(bases, key, side="right") - 1] += 1


@numba.njit(cache=True, nogil=True)
def _collect(cells, bits, written, first, last, out):
    count = 0
    for cell in range(cells.shape[0]):
        if _is_in(bits, cells[cell, 1] - 1, written):
            key = np.uint64(cells[cell, 0])
            if first <= key and key <= last:
                out[count] = key
                count += 1
    return count


@numba.njit(cache=True, nogil=True)
def _find_unread(keys, positions, bits, written, frontier, copied, out):
    count = 0
    for i in range(keys.shape[0]):
        unread = np.uint64(keys[i]) >= frontier and _is_in(bits, positions[i], written)
        if unread and index.find(copied, keys[i]) == ABSENT:
            out[count] = i
            count += 1
    return count


class Part(NamedTuple):
    """A range of keys, from `first` to `last`, with so many `rows` in it."""

    first: int
    last: int
    rows: int


class Snapshot:
    """The rows of a group that were written when it was taken, as they were, in order of tables and ids.

    They are read once, from the first to the last. A row that is overwritten before it was read is copied first, into
    a file without a name, whose memory the operating system takes back where it needs it. Beside that a snapshot holds
    a bit for each written row if it is of changed rows alone, and it takes no time that grows with the rows but to
    count them.

    Args:
        store: the rows. It holds the snapshot by a weak reference.
        folder: where copies lie.
        cells: the index of `store`, whose cells never change but for new rows.
        written: rows that `store` holds.
        bits: `uint8[M]`, a bit for each position in `store`: the rows it is of; of length 0 for all.

    Attributes:
        copied_bytes: bytes of the rows that were copied.
    """

    def __init__(self, store: RowStore, folder: str | os.PathLike, cells: np.ndarray, written: int, bits: np.ndarray):
        self._store, self._folder, self._cells, self._bits = store, folder, cells, bits
        self._written, self._copies = written, store.emptied()
        self._frontier: np.uint64 | None = np.uint64(0)  # the first key that was not read; None when it is closed
        self._failure: OSError | None = None
        self.copied_bytes = 0

    @property
    def group(self) -> Group:
        """The tables."""
        return self._store.group

    @property
    def closed(self) -> bool:
        """Whether it lets go of the rows."""
        return self._frontier is None

    def count(self) -> tuple[np.ndarray, list[Part]]:
        """Counts the rows.

        Returns:
            Those of each table, `int64[tables]`; and parts of the keys, in order, each of which fits into memory.
        """
        width = max((self.group.rows - 1).bit_length() - _BUCKET_BITS, 0)
        return self._count(self._bits, 0, width)

    def count_written(self) -> np.ndarray:
        """The rows of each table that had been written, `int64[tables]`, whether or not it is of changed rows alone."""
        return self._count(np.zeros(0, np.uint8), 0, 64 - _BUCKET_BITS)[0]

    def _count(self, bits: np.ndarray, first: int, shift: int) -> tuple[np.ndarray, list[Part]]:
        """The same from key `first` on, by buckets of `2**shift` keys."""
        of_buckets, of_tables = np.zeros(1 << _BUCKET_BITS, np.int64), np.zeros(len(self.group.tables), np.int64)
        bases = self.group.bases
        _count(self._cells, bits, self._written, np.uint64(first), np.uint64(shift), bases, of_buckets, of_tables)
        most, parts = min(max(_SORTED_KEYS, self._written // 64), 2 * _SORTED_KEYS), list[Part]()
        for bucket in np.flatnonzero(of_buckets).tolist():
            rows, start = int(of_buckets[bucket]), first + (bucket << shift)
            if rows > most and shift >= _BUCKET_BITS:
                parts += self._count(bits, start, shift - _BUCKET_BITS)[1]
            elif parts and parts[-1].rows + rows <= most:
                parts[-1] = Part(parts[-1].first, start + (1 << shift) - 1, parts[-1].rows + rows)
            else:
                parts.append(Part(start, start + (1 << shift) - 1, rows))
        return of_tables, parts

    def keys(self, parts: Sequence[Part], chunk_rows: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """The keys in order, of one table at a time, in chunks of `chunk_rows` of it, the last one shorter.

        Args:
            parts: as `count` returns them.
            chunk_rows: of each table.

        Returns:
            The table's position in the group and `int64[N]` keys.
        """
        rest, current = np.zeros(0, np.uint64), 0
        for first, last, count in parts:
            found = np.empty(count, np.uint64)
            _collect(self._cells, self._bits, self._written, np.uint64(first), np.uint64(last), found)
            found.sort()
            bounds = np.searchsorted(found, self.group.bases[1:])
            for table, keys in enumerate(np.split(found, bounds)):
                if table == current and len(rest):
                    keys = np.concatenate([rest, keys])
                elif len(keys) and len(rest):
                    yield current, rest.view(np.int64)
                elif not len(keys):
                    continue
                whole = len(keys) - len(keys) % chunk_rows[table]
                for start in range(0, whole, chunk_rows[table]):
                    yield table, keys[start : start + chunk_rows[table]].view(np.int64)
                rest, current = keys[whole:], table
            rest = rest.copy()  # and not a view that keeps all of `found`
        if len(rest):
            yield current, rest.view(np.int64)

    def read(self, keys: np.ndarray) -> Rows:
        """The rows at `keys` (`int64[N]`), the next ones, as they were.

        Raises:
            OSError: if one was overwritten and there was no room to copy it.
        """
        with self._store.lock:
            if self._failure is not None:
                raise OSError(
                    f"rows of {', '.join(self.group.names)} were written while they were saved, and there was no room "
                    f"in {self._folder} to copy what they were: {self._failure}"
                ) from self._failure
            rows = self._store.read(keys)
            positions = np.empty(len(keys), np.int64)
            index.find_all(self._copies.cells, keys, positions)
            if len(copied := np.flatnonzero(positions != ABSENT)):
                old = self._copies.read(keys[copied])
                for leaf, old_leaf in zip((rows.weights, *rows.state), (old.weights, *old.state), strict=True):
                    leaf[copied] = old_leaf
            self._frontier = keys[-1:].view(np.uint64)[0] + np.uint64(1)
        return rows

    def copy(self, keys: np.ndarray, positions: np.ndarray) -> None:
        """Copies those rows at `keys` (`int64[N]`) and `positions`, about to be overwritten, that are yet to be read.

        Called under the store's lock. Where there is no room the snapshot is lost, which `read` tells: the writer goes
        on.
        """
        if self._frontier is None:
            return
        unread = np.empty(len(keys), np.int64)
        count = _find_unread(keys, positions, self._bits, self._written, self._frontier, self._copies.cells, unread)
        if not count:
            return
        old = keys[unread[:count]]
        try:
            if not self.copied_bytes:
                self._copies = self._store.emptied(self._folder)
            self._copies.write(old, self._store.read(old))
        except OSError as error:
            self.close()
            self._failure = error
        else:
            self.copied_bytes += count * self._store.row_bytes

    def close(self) -> None:
        """Lets go of the rows: nothing is copied any more."""
        with self._store.lock:
            self._frontier, self._copies = None, self._store.emptied()
