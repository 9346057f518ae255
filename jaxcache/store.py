"""The tables in host memory. NumPy and Numba, no JAX."""

from __future__ import annotations

import operator
import threading
from collections.abc import Mapping
from dataclasses import replace

import numba
import numpy as np
import optax

from jaxcache import index
from jaxcache.index import ABSENT
from jaxcache.optimizers import RowOptimizer, Rows
from jaxcache.tables import Group, Table, check_ids, check_tables, stackable


@numba.njit(cache=True, nogil=True)
def _put(table, positions, rows):
    for i in range(positions.shape[0]):
        for j in range(table.shape[1]):
            table[positions[i], j] = rows[i, j]


class RowStore:
    """The rows of one group in host memory, with the state that the row optimizer keeps for each row.

    A row that was never written needs no memory: its initial value is computed from (seed, table, id) when it is read.
    Written rows lie one behind the other, found through an index of O(written rows). Reads and writes are atomic: a
    read that runs beside a write sees each row as it was before or after.

    Args:
        group: the tables.
        optimizer: what it keeps for a row is stored with the row.
        seed: seeds the initial weights.

    Attributes:
        group: the tables.
        optimizer: the `RowOptimizer`.
        seed: as given.
        scalars: the optimizer's scalars as of the last flush.

    >>> group = Group.stack({"user": Table(10**9, 2)})
    >>> store = RowStore(group, RowOptimizer(optax.sgd(0.1, momentum=0.9), 2), seed=0)
    >>> rows = store.read(group.keys(0, np.array([7, 999_999_999])))
    >>> rows.weights.shape, [leaf.shape for leaf in rows.state], store.rows_written
    ((2, 2), [(2, 2)], 0)
    """

    def __init__(self, group: Group, optimizer: RowOptimizer, seed: int = 0):
        self.group = group
        self.optimizer = optimizer
        self.seed = operator.index(seed)
        self.scalars = optimizer.scalars
        self._lock = threading.RLock()
        self._cells = index.empty(1024)
        self._written = 0
        self._rows = self._allocate(0)

    def __repr__(self):
        return f"RowStore({self.describe()}; {self._written:,} rows written)"

    def describe(self) -> str:
        """The tables and the format of their rows in a line: `user: 1,000 x 2, item: 40 x 2 bfloat16 frozen`."""
        table = self.group.tables[0]
        sizes = (
            f"{name}: {one.rows:,} x {one.dim}" for name, one in zip(self.group.names, self.group.tables, strict=True)
        )
        rounding = "stochastic" if table.rounding == "stochastic" else ""
        words = (str(table.dtype), rounding, "master_copy" * table.master_copy, "frozen" * table.frozen)
        return f"{', '.join(sizes)} {' '.join(filter(None, words))}"

    @property
    def streams(self) -> np.ndarray:
        """A number for each table that stands for seed and name, `uint64[tables]`: what random numbers start from."""
        return self.group.streams(self.seed)

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

    def read(self, keys: np.ndarray, size: int | None = None) -> Rows:
        """The rows at `keys` (`int64[N]`) as they are in host memory.

        Args:
            keys: see `Group.keys`.
            size: length of the new arrays, N by default; what is behind the first N rows is not defined.

        Returns:
            `Rows` of weights in the dtype of the group, `[size, dim]`, and of the optimizer's row leaves `[size, ...]`.
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
            fresh = self._untrained(self.group.initial_weights(self.seed, keys[untouched]))
            for out, leaf in zip(self._leaves(rows), self._leaves(fresh), strict=True):
                out[untouched] = leaf
        return rows

    def write(self, keys: np.ndarray, rows: Rows) -> None:
        """Sets the rows at `keys` (`int64[N]`, each once) to the first N of `rows`.

        Raises:
            TypeError: for arrays of another dtype than those that `read` returns: nothing is converted here.
        """
        if len(keys) == 0:
            return
        for leaf, new in zip(self._leaves(self._rows), self._leaves(rows), strict=True):
            if leaf.dtype != new.dtype:
                raise TypeError(f"rows of {', '.join(self.group.names)} are kept as {leaf.dtype}, got {new.dtype}")
        positions = np.empty(len(keys), np.int64)
        with self._lock:
            index.find_all(self._cells, keys, positions)
            absent = int(np.count_nonzero(positions == ABSENT))
            if absent:
                self._reserve(self._written + absent)
                self._written = index.find_or_insert_all(self._cells, keys, self._written, positions)
            for leaf, new in zip(self._leaves(self._rows), self._leaves(rows), strict=True):
                words = f"u{leaf.itemsize}"  # a copy needs no arithmetic, and Numba knows no bfloat16
                flat = np.ascontiguousarray(new).reshape(len(new), -1).view(words)
                _put(leaf.reshape(len(leaf), -1).view(words), positions, flat)

    def _untrained(self, weights: np.ndarray) -> Rows:
        """Rows of the given `float32[N, dim]` weights, rounded to the nearest of the group's dtype, never updated."""
        return Rows(weights.astype(self.group.dtype, copy=False), self.optimizer.initial_state(weights))

    def _leaves(self, rows: Rows) -> tuple[np.ndarray, ...]:
        return (rows.weights, *rows.state)

    def _allocate(self, count: int) -> Rows:
        return Rows(
            np.empty((count, self.group.dim), self.group.dtype),
            tuple(np.empty((count, *leaf.shape), leaf.dtype) for leaf in self.optimizer.row_shapes),
        )

    def _reserve(self, count: int) -> None:
        """Grows the arrays of written rows to hold `count`, by doubling: memory is not touched before it is written."""
        if count > len(self._rows.weights):
            larger = self._allocate(min(max(count, 2 * self._written, 1024), self.group.rows))
            for new, old in zip(self._leaves(larger), self._leaves(self._rows), strict=True):
                new[: self._written] = old[: self._written]
            self._rows = larger
        self._cells = index.reserve(self._cells, count)


class HostStore:
    """Embedding tables in host memory, with the state that their optimizers keep for each row.

    Tables that are alike (dim, dtype, rounding, optimizer) are stacked into a group, a `RowStore`. A row that was never
    written needs no memory: its initial value is computed from (seed, table, id) when it is read.

    Args:
        tables: names and tables.
        optimizer: how the rows of tables without an optimizer of their own are updated: `jc.rowwise_adagrad(rate)`, or
            any optax transformation that treats rows apart. Not needed where all other tables are frozen.
        seed: seeds the initial weights.

    Raises:
        ValueError: for a table that is neither frozen nor has an optimizer, or an optimizer that mixes rows (see
            `RowOptimizer`).
        TypeError: for a name that is no string or a value that is no `Table`.

    Attributes:
        tables: names and tables as given.
        groups: a `RowStore` for each group, in the order of their first tables.
        seed: as given.
        step: updates done as of the last flush.
        exchanged: exchanges whose victims are home: the newest cache has made as many.
        unwritten: what kept victims from being written, until a later `flush` has written them.

    >>> tables = {"user": Table(10**9, 2), "item": Table(40, 2), "word": Table(9, 3, frozen=True)}
    >>> store = HostStore(tables, optimizer=optax.sgd(0.1), seed=0)
    >>> store.rows("user", [7, 999_999_999]).shape, store.rows_written
    ((2, 2), 0)
    >>> [group.group.names for group in store.groups]
    [('user', 'item'), ('word',)]
    """

    def __init__(
        self, tables: Mapping[str, Table], optimizer: optax.GradientTransformation | None = None, seed: int = 0
    ):
        check_tables(tables)
        self.tables = dict(tables)
        self.seed = operator.index(seed)
        self.step = 0
        self.groups = tuple(_row_store(part, self.seed) for part in stackable(_with_optimizers(self.tables, optimizer)))
        self._places = {
            name: (group, position) for group in self.groups for position, name in enumerate(group.group.names)
        }
        self._lock = threading.RLock()
        self.exchanged = 0
        self.unwritten: BaseException | None = None
        self._pipeline: object | None = None
        self._behind = False

    def __repr__(self):
        groups = "; ".join(group.describe() for group in self.groups)
        return f"HostStore({groups}; {self.rows_written:,} rows written, step {self.step})"

    @property
    def rows_written(self) -> int:
        """Rows that have a value of their own and take memory."""
        return sum(group.rows_written for group in self.groups)

    @property
    def table_bytes(self) -> int:
        """Bytes that all rows would take, written or not."""
        return sum(group.table_bytes for group in self.groups)

    @property
    def nbytes(self) -> int:
        """Bytes of host memory reserved for written rows and their indices."""
        return sum(group.nbytes for group in self.groups)

    def locate(self, table: str) -> tuple[RowStore, int]:
        """The group of a table, and the table's position in it. Raises KeyError with the known names."""
        if table not in self._places:
            raise KeyError(f"no table named {table!r}: the store has {', '.join(self.tables)}")
        return self._places[table]

    def rows(self, table: str, ids) -> np.ndarray:
        """The weights of rows.

        Args:
            table: its name.
            ids: integers `[N]` from 0 to rows - 1.

        Returns:
            A new array `[N, dim]` of the table's dtype.

        Raises:
            KeyError, TypeError, ValueError: for an unknown table or ids that are not valid.
            RuntimeError: if newer values lie in a cache that was not flushed.
        """
        return self._current(table, ids).weights

    def row_state(self, table: str, ids) -> tuple[np.ndarray, ...]:
        """The optimizer state of rows: one array `[N, ...]` for each row leaf. Arguments and errors as for `rows`.

        With `Table(master_copy=True)` the first is the master copy, `float32[N, dim]`. Frozen tables have none: `()`.
        """
        return self._current(table, ids).state

    def _current(self, table: str, ids) -> Rows:
        group, position = self.locate(table)
        ids = check_ids(ids, table, self.tables[table].rows).reshape(-1)
        self._refuse_behind("read")
        return group.read(group.group.keys(position, ids))

    def _refuse_behind(self, done: str) -> None:
        if self._behind:
            raise RuntimeError(
                f"the newest rows are still in the cache: call `cache = ahead.flush(cache)` before the store is {done}"
            )

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

    def catch_up(self, scalars: tuple[tuple[np.ndarray, ...], ...], step: int) -> None:
        """Notes that every row is here as of `step`, with the scalars of each group's optimizer."""
        for group, values in zip(self.groups, scalars, strict=True):
            group.scalars = values
        self.step, self._behind = step, False


def _with_optimizers(tables: Mapping[str, Table], optimizer: optax.GradientTransformation | None) -> dict[str, Table]:
    """The tables, each with the optimizer that updates it; frozen ones keep none."""
    given = {}
    for name, table in tables.items():
        if table.optimizer is None and not table.frozen:
            if optimizer is None:
                raise ValueError(
                    f"table {name!r} has no optimizer: give one to all tables without, HostStore(tables, "
                    "optimizer=jc.rowwise_adagrad(0.05)), or to this one, Table(..., optimizer=...), or freeze it, "
                    "Table(..., frozen=True)"
                )
            table = replace(table, optimizer=optimizer)
        given[name] = table
    return given


def _row_store(tables: Mapping[str, Table], seed: int) -> RowStore:
    """The rows of tables of one format."""
    table = next(iter(tables.values()))
    optimizer = RowOptimizer(table.optimizer, table.dim, table.dtype, table.rounding, table.master_copy)
    return RowStore(Group.stack(tables), optimizer, seed)
