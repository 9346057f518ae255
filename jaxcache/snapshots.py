"""The rows of a group as they were at one moment, read while others are being written. NumPy and Numba, no JAX."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numba
import numpy as np

from jaxcache import index
from jaxcache.index import ABSENT
from jaxcache.optimizers import Rows
from jaxcache.tables import Group

if TYPE_CHECKING:
    from jaxcache.store import RowStore

_BUCKETS = 2**16  # of keys, to find out where they are dense
_SORTED_KEYS = 2**23  # sorted at a time, 64 MiB


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
def _count(cells, bits, written, shift, bases, of_buckets, of_tables):
    for cell in range(cells.shape[0]):
        if _is_in(bits, cells[cell, 1] - 1, written):
            key = np.uint64(cells[cell, 0])
            of_buckets[key >> shift] += 1
            of_tables[np.searchsorted(bases, key, side="right") - 1] += 1


@numba.njit(cache=True, nogil=True)
def _collect(cells, bits, written, shift, first, last, out):
    count = 0
    for cell in range(cells.shape[0]):
        if _is_in(bits, cells[cell, 1] - 1, written):
            key = np.uint64(cells[cell, 0])
            if first <= key >> shift and key >> shift <= last:
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


class Snapshot:
    """The rows of a group that were written when it was taken, as they were, in order of tables and ids.

    They are read once, from the first to the last. A row that is overwritten before it was read is copied first.
    What it holds is O(copied rows), and a bit for each written row if it is of changed rows alone; it takes no time
    that grows with the rows but to count them.

    Args:
        store: the rows. It holds the snapshot by a weak reference.
        copies: an empty store of the same group, for rows that are overwritten.
        cells: the index of `store`, whose cells never change but for new rows.
        written: rows that `store` holds.
        bits: `uint8[M]`, a bit for each position in `store`: the rows it is of; of length 0 for all.
        copied_bytes: most bytes of rows that are copied.

    Attributes:
        waited: seconds that writers waited until rows were read, because there was no room for another copy.
        copied_bytes: bytes of the rows that were copied.
        begun: whether somebody is about to read it.
    """

    def __init__(
        self, store: RowStore, copies: RowStore, cells: np.ndarray, written: int, bits: np.ndarray, copied_bytes: int
    ):
        self._store, self._copies, self._cells, self._bits = store, copies, cells, bits
        self._written, self._most_copied_bytes = written, copied_bytes
        self._frontier: np.uint64 | None = np.uint64(0)  # the first key that was not read; None when it is closed
        self.waited, self.copied_bytes, self.begun = 0.0, 0, False

    @property
    def group(self) -> Group:
        """The tables."""
        return self._store.group

    @property
    def closed(self) -> bool:
        """Whether it lets go of the rows."""
        return self._frontier is None

    def begin(self) -> None:
        """Notes that it is about to be read: from now on writers wait for it as long as that takes.

        Raises:
            RuntimeError: if it was given up, because nobody did so for too long.
        """
        with self._store.lock:
            if self.closed:
                raise RuntimeError(
                    f"the save of {', '.join(self.group.names)} was given up: training waited {self.waited:.0f} s for "
                    "its first row to be written, and went on; save again"
                )
            self.begun = True

    def count(self) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
        """Counts the rows.

        Returns:
            Those of each table, `int64[tables]`, and parts of the keys in order, `(first, last, rows)` each, whose rows
            fit into memory: key ranges by their upper bits.
        """
        of_buckets, of_tables = np.zeros(_BUCKETS, np.int64), np.zeros(len(self.group.tables), np.int64)
        _count(self._cells, self._bits, self._written, self._shift, self.group.bases, of_buckets, of_tables)
        most, parts = max(_SORTED_KEYS, self._written // 64), list[tuple[int, int, int]]()
        for bucket in np.flatnonzero(of_buckets).tolist():
            rows = int(of_buckets[bucket])
            if parts and parts[-1][2] + rows <= most:
                parts[-1] = (parts[-1][0], bucket, parts[-1][2] + rows)
            else:
                parts.append((bucket, bucket, rows))
        return of_tables, parts

    def count_written(self) -> np.ndarray:
        """The rows of each table that had been written, `int64[tables]`, whether or not it is of changed rows alone."""
        of_buckets, of_tables = np.zeros(_BUCKETS, np.int64), np.zeros(len(self.group.tables), np.int64)
        every = np.zeros(0, np.uint8)
        _count(self._cells, every, self._written, self._shift, self.group.bases, of_buckets, of_tables)
        return of_tables

    @property
    def _shift(self) -> np.uint64:
        return np.uint64(max((self.group.rows - 1).bit_length() - (_BUCKETS.bit_length() - 1), 0))

    def keys(self, parts: list[tuple[int, int, int]], chunk_rows: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
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
            shift = self._shift
            _collect(self._cells, self._bits, self._written, shift, np.uint64(first), np.uint64(last), found)
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
        """The rows at `keys` (`int64[N]`), the next ones, as they were."""
        with self._store.lock:
            rows = self._store.read(keys)
            positions = np.empty(len(keys), np.int64)
            index.find_all(self._copies.cells, keys, positions)
            if len(copied := np.flatnonzero(positions != ABSENT)):
                old = self._copies.read(keys[copied])
                for leaf, old_leaf in zip((rows.weights, *rows.state), (old.weights, *old.state), strict=True):
                    leaf[copied] = old_leaf
            self._frontier = keys[-1:].view(np.uint64)[0] + np.uint64(1)
            self._store.lock.notify_all()
        return rows

    def copy(self, keys: np.ndarray, positions: np.ndarray) -> bool:
        """Copies those rows at `keys` (`int64[N]`) and `positions`, about to be overwritten, that are yet to be read.

        Called under the store's lock. Returns False, with nothing done, where there is no room.
        """
        if self._frontier is None:
            return True
        unread = np.empty(len(keys), np.int64)
        count = _find_unread(keys, positions, self._bits, self._written, self._frontier, self._copies.cells, unread)
        if not count:
            return True
        copied_bytes = self.copied_bytes + count * self._copies.row_bytes
        if self.copied_bytes and copied_bytes > self._most_copied_bytes:
            return False
        old = keys[unread[:count]]
        self._copies.write(old, self._store.read(old))
        self.copied_bytes = copied_bytes
        return True

    def close(self) -> None:
        """Lets go of the rows: nothing is copied any more."""
        with self._store.lock:
            self._frontier = None
            self._copies = self._copies.emptied()
            self._store.lock.notify_all()
