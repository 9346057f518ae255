"""The tables in host memory. NumPy and Numba, no JAX."""

from __future__ import annotations

import operator
import threading
from collections.abc import Mapping

import numba
import numpy as np
import optax

from jaxcache import index
from jaxcache.index import ABSENT
from jaxcache.optimizers import RowOptimizer, Rows
from jaxcache.tables import Group, Table, check_ids


@numba.njit(cache=True, nogil=True)
def _put(table, positions, rows):
    for i in range(positions.shape[0]):
        for j in range(table.shape[1]):
            table[positions[i], j] = rows[i, j]


class HostStore:
    """Embedding tables in host memory, with the state that the row optimizer keeps for each row.

    A row that was never written needs no memory: its initial value is computed from (seed, table, id) when it is read.
    Written rows lie one behind the other, found through an index of O(written rows).

    Args:
        tables: names and tables; all of one dim.
        optimizer: how rows are updated: `jc.rowwise_adagrad(rate)`, or any optax transformation that treats rows apart.
        seed: seeds the initial weights.

    Raises:
        ValueError: for tables that cannot be stacked, or an optimizer that mixes rows (see `RowOptimizer`).

    Attributes:
        group: the tables.
        optimizer: the `RowOptimizer`.
        scalars: the optimizer's scalars as of the last flush.
        step: updates done as of the last flush.
        exchanged: exchanges whose victims are home: the newest cache has made as many.
        unwritten: what kept victims from being written, until a later `flush` has written them.

    >>> store = HostStore({"user": Table(10**9, 2)}, optimizer=optax.sgd(0.1), seed=0)
    >>> store.rows("user", [7, 999_999_999]).shape, store.rows_written
    ((2, 2), 0)
    """

    def __init__(self, tables: Mapping[str, Table], optimizer: optax.GradientTransformation, seed: int = 0):
        self.group = Group.stack(tables)
        self.optimizer = RowOptimizer(optimizer, self.group.dim)
        self.seed = operator.index(seed)
        self.scalars = self.optimizer.scalars
        self.step = 0
        self._lock = threading.RLock()
        self._cells = index.empty(1024)
        self._written = 0
        self._rows = self._allocate(0)
        self.exchanged = 0
        self.unwritten: BaseException | None = None
        self._pipeline: object | None = None
        self._behind = False

    def __repr__(self):
        tables = ", ".join(
            f"{name}: {table.rows:,} x {table.dim}"
            for name, table in zip(self.group.names, self.group.tables, strict=True)
        )
        return f"HostStore({tables}; {self._written:,} rows written, step {self.step})"

    @property
    def rows_written(self) -> int:
        """Rows that have a value of their own and take memory."""
        return self._written

    @property
    def row_bytes(self) -> int:
        """Bytes of a row: weights and optimizer state."""
        return sum(leaf[:1].nbytes for leaf in self._leaves(self._allocate(1)))

    @property
    def table_bytes(self) -> int:
        """Bytes that all rows would take, written or not."""
        return self.row_bytes * self.group.rows

    @property
    def nbytes(self) -> int:
        """Bytes of host memory reserved for written rows and their index."""
        return self._cells.nbytes + sum(leaf.nbytes for leaf in self._leaves(self._rows))

    def rows(self, table: str, ids) -> np.ndarray:
        """The weights of rows.

        Args:
            table: its name.
            ids: integers `[N]` from 0 to rows - 1.

        Returns:
            A new array `float32[N, dim]`.

        Raises:
            KeyError, TypeError, ValueError: for an unknown table or ids that are not valid.
            RuntimeError: if newer values lie in a cache that was not flushed.
        """
        return self._current(table, ids).weights

    def row_state(self, table: str, ids) -> tuple[np.ndarray, ...]:
        """The optimizer state of rows: one array `[N, ...]` for each row leaf. Arguments and errors as for `rows`."""
        return self._current(table, ids).state

    def _current(self, table: str, ids) -> Rows:
        position = self.group.index(table)
        ids = check_ids(ids, table, self.group.tables[position].rows).reshape(-1)
        if self._behind:
            raise RuntimeError(
                "the newest rows are still in the cache: call `cache = ahead.flush(cache)` before the store is read"
            )
        return self.read(self.group.keys(position, ids))

    def read(self, keys: np.ndarray, size: int | None = None) -> Rows:
        """The rows at `keys` (`int64[N]`) as they are in host memory.

        Args:
            keys: see `Group.keys`.
            size: length of the new arrays, N by default; what is behind the first N rows is not defined.
        """
        rows = self._allocate(len(keys) if size is None else size)
        positions = np.empty(len(keys), np.int64)
        with self._lock:
            index.find_all(self._cells, keys, positions)
            if self._written:
                for out, leaf in zip(self._leaves(rows), self._leaves(self._rows), strict=True):
                    # Positions of untouched rows, ABSENT, are clipped to 0 and overwritten below.
                    np.take(leaf, positions, axis=0, out=out[: len(keys)], mode="clip")
        untouched = np.flatnonzero(positions == ABSENT)
        if len(untouched):
            weights = self.group.initial_weights(self.seed, keys[untouched])
            rows.weights[untouched] = weights
            for out, leaf in zip(rows.state, self.optimizer.initial_state(weights), strict=True):
                out[untouched] = leaf
        return rows

    def write(self, keys: np.ndarray, rows: Rows) -> None:
        """Sets the rows at `keys` (`int64[N]`, each once) to the first N of `rows`."""
        if len(keys) == 0:
            return
        positions = np.empty(len(keys), np.int64)
        with self._lock:
            self._reserve(self._written + len(keys))
            self._written = index.find_or_insert_all(self._cells, keys, self._written, positions)
            for leaf, new in zip(self._leaves(self._rows), self._leaves(rows), strict=True):
                words = f"u{leaf.itemsize}"  # a copy needs no arithmetic, and Numba knows no bfloat16
                flat = np.ascontiguousarray(new).reshape(len(new), -1).view(words)
                _put(leaf.reshape(len(leaf), -1).view(words), positions, flat)

    def _leaves(self, rows: Rows) -> tuple[np.ndarray, ...]:
        return (rows.weights, *rows.state)

    def _allocate(self, count: int) -> Rows:
        return Rows(
            np.empty((count, self.group.dim), np.float32),
            tuple(np.empty((count, *leaf.shape), leaf.dtype) for leaf in self.optimizer.row_shapes),
        )

    def _reserve(self, count: int) -> None:
        """Grows the arrays of written rows to hold `count`, by doubling: memory is not touched before it is written."""
        if count > len(self._rows.weights):
            larger = self._allocate(max(count, 2 * self._written, 1024))
            for new, old in zip(self._leaves(larger), self._leaves(self._rows), strict=True):
                new[: self._written] = old[: self._written]
            self._rows = larger
        self._cells = index.reserve(self._cells, count)

    # What the pipeline tells the store, so that a second pipeline, a read of old rows and a stale cache are errors.

    def open(self, pipeline: object) -> None:
        """Claims the store for one pipeline. Raises RuntimeError if another has it."""
        with self._lock:
            if self._pipeline is not None:
                raise RuntimeError(
                    "this store already serves an open LookAhead: leave its `with` block before a second is opened"
                )
            self._pipeline = pipeline

    def close(self, pipeline: object) -> None:
        """Gives the store back."""
        with self._lock:
            if self._pipeline is pipeline:
                self._pipeline = None

    @property
    def behind(self) -> bool:
        """Whether a cache holds rows that are newer than the store's."""
        return self._behind

    def mark_behind(self) -> None:
        """Notes that a cache now holds newer rows."""
        self._behind = True

    def catch_up(self, scalars: tuple[np.ndarray, ...], step: int) -> None:
        """Notes that every row is here as of `step`, with the optimizer's scalars."""
        self.scalars, self.step, self._behind = scalars, step, False
