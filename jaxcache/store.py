"""The tables in host memory. NumPy and Numba, no JAX."""

from __future__ import annotations

import errno
import math
import operator
import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import ml_dtypes
import numba
import numpy as np
import optax

from jaxcache import index
from jaxcache.index import ABSENT
from jaxcache.npy import write_weights
from jaxcache.optimizers import RowOptimizer, Rows
from jaxcache.snapshots import Snapshot, set_bits
from jaxcache.tables import Group, Table, check_ids, check_tables, stackable
from jaxcache.transfers import Transfers

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_REMEMBERED_SNAPSHOTS = 8  # since which it is known what was written
_CHUNK = 2**20  # weights that are loaded or saved at a time: 4 MiB in float32


@numba.njit(cache=True, nogil=True)
def _put(table, positions, rows):
    for i in range(positions.shape[0]):
        for j in range(table.shape[1]):
            table[positions[i], j] = rows[i, j]


def _zeros_in_file(folder: str | os.PathLike[str], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array in a file without a name. Raises OSError if there is no room for it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if not size:
        return np.zeros(shape, dtype)
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)  # or a write to a full disk would end the process
        else:
            file.truncate(size)
        return np.asarray(np.memmap(file, dtype, "r+", shape=shape))


def _with_room(bits: np.ndarray, count: int) -> np.ndarray:
    """`bits`, or a copy with room for `count` of them and more."""
    if 8 * len(bits) >= count:
        return bits
    larger = np.zeros(max(-(-count // 8), 2 * len(bits)), np.uint8)
    larger[: len(bits)] = bits
    return larger


class RowStore:
    """The rows of one group in host memory, with the state that the row optimizer keeps for each row.

    A row that was never written needs no memory: its initial value is computed from (seed, table, id) when it is read.
    Written rows lie one behind the other, found through an index of O(written rows). Reads and writes are atomic: a
    read that runs beside a write sees each row as it was before or after.

    Args:
        group: the tables.
        optimizer: what it keeps for a row is stored with the row.
        seed: seeds the initial weights.
        folder: rows and index lie in files of it that have no name, and vanish with the store; None for memory.

    Attributes:
        group: the tables.
        optimizer: the `RowOptimizer`.
        seed: as given.
        scalars: the optimizer's scalars as of the last flush.
        lock: what reads and writes hold.
        cells: the index, see `jaxcache.index`: where each written row lies.

    >>> group = Group.stack({"user": Table(10**9, 2)})
    >>> store = RowStore(group, RowOptimizer(optax.sgd(0.1, momentum=0.9), 2), seed=0)
    >>> rows = store.read(group.keys(0, np.array([7, 999_999_999])))
    >>> rows.weights.shape, [leaf.shape for leaf in rows.state], store.rows_written
    ((2, 2), [(2, 2)], 0)
    """

    def __init__(
        self, group: Group, optimizer: RowOptimizer, seed: int = 0, *, folder: str | os.PathLike | None = None
    ):
        self.group = group
        self.optimizer = optimizer
        self.seed = operator.index(seed)
        self.scalars = optimizer.scalars
        self.lock = threading.RLock()
        self._zeros: Callable[..., np.ndarray] = np.zeros
        self._empty: Callable[..., np.ndarray] = np.empty
        if folder is not None:
            self._zeros = self._empty = partial(_zeros_in_file, folder)
        self.cells = index.empty(1024, self._zeros)
        self._written = 0
        self._rows = self.allocate(0)
        self._snapshots: list[weakref.ref[Snapshot]] = []
        # Of each snapshot that was taken, a bit for each row written since, until the next one.
        self._changed: dict[str, np.ndarray] = {}

    def __repr__(self):
        return f"RowStore({self.describe()}; {self._written:,} rows written)"

    def describe(self) -> str:
        """The tables and the format of their rows in a line: `user: 1,000 x 2, item: 40 x 2 bfloat16 frozen`."""
        names, tables = self.group.names, self.group.tables
        sizes = (f"{name}: {table.rows:,} x {table.dim}" for name, table in zip(names, tables, strict=True))
        first = tables[0]
        rounding = "" if first.rounding == "nearest" else f" rounding {first.rounding}"
        extras = rounding + " with a master copy" * first.master_copy + " frozen" * first.frozen
        return f"{', '.join(sizes)} {first.dtype}{extras}"

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
        return sum(leaf[:1].nbytes for leaf in self._leaves(self.allocate(1)))

    @property
    def table_bytes(self) -> int:
        """Bytes that all rows would take, written or not."""
        return self.row_bytes * self.group.rows

    @property
    def nbytes(self) -> int:
        """Bytes of host memory reserved for written rows and their index."""
        return self.cells.nbytes + sum(leaf.nbytes for leaf in self._leaves(self._rows))

    def read(self, keys: np.ndarray, size: int | None = None) -> Rows:
        """The rows at `keys` (`int64[N]`) as they are in host memory.

        Args:
            keys: see `Group.keys`.
            size: length of the new arrays, N by default; what is behind the first N rows is not defined.

        Returns:
            `Rows` of weights in the dtype of the group, `[size, dim]`, and of the optimizer's row leaves `[size, ...]`.
        """
        rows = self.allocate(len(keys) if size is None else size)
        positions = np.empty(len(keys), np.int64)
        with self.lock:
            index.find_all(self.cells, keys, positions)
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
            ValueError: for fewer than N rows, or rows of another shape.
        """
        if len(keys) == 0:
            return
        for leaf, new in zip(self._leaves(self._rows), self._leaves(rows), strict=True):
            if leaf.dtype != new.dtype:
                raise TypeError(f"rows of {', '.join(self.group.names)} are kept as {leaf.dtype}, got {new.dtype}")
            if len(new) < len(keys) or new.shape[1:] != leaf.shape[1:]:
                raise ValueError(
                    f"write of {len(keys)} rows of {', '.join(self.group.names)} got an array of shape {new.shape}: "
                    f"it must be {(len(keys), *leaf.shape[1:])}"
                )
        positions = np.empty(len(keys), np.int64)
        with self.lock:
            index.find_all(self.cells, keys, positions)
            if self._snapshots:
                self._copy_for_snapshots(keys, positions)
            absent = int(np.count_nonzero(positions == ABSENT))
            if absent:
                self._reserve(self._written + absent)
                self._written = index.find_or_insert_all(self.cells, keys, self._written, positions)
            for leaf, new in zip(self._leaves(self._rows), self._leaves(rows), strict=True):
                words = f"u{leaf.itemsize}"  # a copy needs no arithmetic, and Numba knows no bfloat16
                flat = np.ascontiguousarray(new).reshape(len(new), -1).view(words)
                _put(leaf.reshape(len(leaf), -1).view(words), positions, flat)
            for mark in list(self._changed)[-1:]:
                self._changed[mark] = changed = _with_room(self._changed[mark], self._written)
                set_bits(changed, positions)

    def fill(self, table: int, weights: Any) -> None:
        """Sets every row of a table to given weights, never updated; memory beyond the rows themselves stays flat.

        Args:
            table: position of the table in the group.
            weights: `float[rows, dim]`, anything that can be sliced into arrays.
        """
        with self.lock:  # room for all of them at once: growing step by step would copy the rows again and again
            absent = 0
            for start, stop in _spans(self.group.tables[table]):
                positions = np.empty(stop - start, np.int64)
                index.find_all(self.cells, self._keys(table, start, stop), positions)
                absent += int(np.count_nonzero(positions == ABSENT))
            self._reserve(self._written + absent)
        for start, stop in _spans(self.group.tables[table]):
            chunk = np.asarray(weights[start:stop]).astype(np.float32, copy=False)
            self.write(self._keys(table, start, stop), self._untrained(chunk))

    def chunks(self, table: int) -> Iterator[np.ndarray]:
        """The weights of all rows of the table at position `table`, in order of ids, some rows `[N, dim]` at a time."""
        for start, stop in _spans(self.group.tables[table]):
            yield self.read(self._keys(table, start, stop)).weights

    def snapshot(self, mark: str, since: str | None, folder: str | os.PathLike) -> Snapshot:
        """The written rows as they are now, to be read while others are written.

        Args:
            mark: stands for this moment.
            since: the mark of an earlier snapshot, one of `marks`: only rows written since then; None for all.
            folder: where copies lie of rows that are overwritten before they were read.
        """
        with self.lock:
            bits = np.zeros(0, np.uint8)
            if since is not None:
                later = list(self._changed)[list(self._changed).index(since) :]
                bits = np.zeros(max(len(self._changed[name]) for name in later) or 1, np.uint8)
                for name in later:
                    bits[: len(self._changed[name])] |= self._changed[name]
            snapshot = Snapshot(self, folder, self.cells, self._written, bits)
            self._snapshots.append(weakref.ref(snapshot))
            self._changed[mark] = np.zeros(0, np.uint8)
            for old in list(self._changed)[:-_REMEMBERED_SNAPSHOTS]:
                del self._changed[old]
        return snapshot

    @property
    def marks(self) -> list[str]:
        """Those of the latest snapshots, oldest first, since which the rows written are known."""
        return list(self._changed)

    def replace(self, other: RowStore, mark: str) -> None:
        """Takes the rows and scalars of another store of the same group, as of a snapshot of that mark."""
        with self.lock:
            self.cells, self._written, self._rows = other.cells, other._written, other._rows
            self.scalars = other.scalars
            self._changed = {mark: np.zeros(0, np.uint8)}

    @property
    def has_snapshots(self) -> bool:
        """Whether a snapshot is being read."""
        return any(snapshot is not None and not snapshot.closed for snapshot in (ref() for ref in self._snapshots))

    def emptied(self, folder: str | os.PathLike | None = None) -> RowStore:
        """A store of the same group without rows."""
        return RowStore(self.group, self.optimizer, self.seed, folder=folder)

    def reserve(self, count: int) -> None:
        """Makes room for `count` rows in all; memory is not touched before rows are written."""
        with self.lock:
            self._reserve(count)

    def _copy_for_snapshots(self, keys: np.ndarray, positions: np.ndarray) -> None:
        """Has snapshots copy what they need of rows that are about to be overwritten."""
        snapshots = [(ref, ref()) for ref in self._snapshots]
        self._snapshots = [ref for ref, snapshot in snapshots if snapshot is not None and not snapshot.closed]
        for _, snapshot in snapshots:
            if snapshot is not None:
                snapshot.copy(keys, positions)

    def _keys(self, table: int, start: int, stop: int) -> np.ndarray:
        return self.group.keys(table, np.arange(start, stop))

    def _untrained(self, weights: np.ndarray) -> Rows:
        """Rows of the given `float32[N, dim]` weights, rounded to the nearest of the group's dtype, never updated."""
        return Rows(weights.astype(self.group.dtype, copy=False), self.optimizer.initial_state(weights))

    def _leaves(self, rows: Rows) -> tuple[np.ndarray, ...]:
        return (rows.weights, *rows.state)

    def allocate(self, count: int, empty: Callable[[tuple[int, ...], Any], np.ndarray] = np.empty) -> Rows:
        """New rows of any content, in arrays made by `empty`."""
        return Rows(
            empty((count, self.group.dim), self.group.dtype),
            tuple(empty((count, *leaf.shape), leaf.dtype) for leaf in self.optimizer.row_shapes),
        )

    def _reserve(self, count: int) -> None:
        """Grows the arrays of written rows to hold `count`, by doubling: memory is not touched before it is written."""
        if count > len(self._rows.weights):
            larger = self.allocate(min(max(count, 2 * self._written, 1024), self.group.rows), self._empty)
            for new, old in zip(self._leaves(larger), self._leaves(self._rows), strict=True):
                new[: self._written] = old[: self._written]
            self._rows = larger
        self.cells = index.reserve(self.cells, count, self._zeros)


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
        loaded: whether rows were loaded or restored since the last exchange: caches that were filled before are stale.
        transfers: what serves the programs that call `admit`.

    In `with store:`, on the main thread, Ctrl-C costs no cache that a program with `admit` was given: it takes effect
    at the next `admit`, after which the program changes nothing, and is raised by the next call on the host
    (`jc.flush`, `store.raise_failure()`, the end of the block); a second one takes effect at once. The end of the block
    waits for rows on their way home. `LookAhead` has a block of its own and needs none of this.

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
        self.loaded = False
        self.transfers = Transfers(self.groups)
        self._pipeline: object | None = None
        self._behind = False

    def __repr__(self):
        groups = "; ".join(group.describe() for group in self.groups)
        return f"HostStore({groups}; {self.rows_written:,} rows written, step {self.step})"

    def __enter__(self) -> HostStore:
        self.transfers.open()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.transfers.close()
        if error is None:
            self.raise_failure()
        else:
            self.transfers.forget_interrupt()

    def raise_failure(self) -> None:
        """Raises what went wrong in a program that calls `admit`, or a Ctrl-C that came in `with store:`, once.

        For loops that call such programs again and again: it looks at the host alone and waits for nothing.
        """
        self.transfers.raise_failure()

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
        self.refuse_behind("read")
        return group.read(group.group.keys(position, ids))

    def load(self, table: str, source: Any) -> None:
        """Sets every row of a table to given weights, with the optimizer state of rows that were never updated.

        The weights are read a few thousand rows at a time, so that no second copy of them is made in memory, and are
        rounded to float32, and from there to the nearest of the table's dtype; a master copy keeps the float32 values.

        Args:
            table: its name. Frozen tables can be loaded too.
            source: weights `[rows, dim]` as float32, float64, float16 or bfloat16: an array (NumPy, JAX, or anything
                else with `shape`, `dtype` and slices), a list, or the path of a `.npy` file, such as `save` writes.

        Raises:
            KeyError: for an unknown table.
            TypeError: for weights of any other dtype.
            ValueError: for another shape, a file that is no whole `.npy` file, or a finite weight that would be
                infinite in the table's dtype.
            FileNotFoundError: if there is no such file.
            RuntimeError: while a pipeline has the store open, or a cache holds newer rows.

        Nothing has changed when one of these is raised.

        >>> store = HostStore({"item": Table(2, 3)}, optimizer=optax.sgd(0.1))
        >>> store.load("item", [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
        >>> store.rows("item", [1]).tolist(), store.loaded
        ([[4.0, 5.0, 6.0]], True)
        """
        group, position = self.locate(table)
        weights = _Weights(table, self.tables[table], source)
        with self._lock:  # no pipeline opens the store meanwhile
            if self._pipeline is not None:
                raise RuntimeError(
                    f"load({table!r}): the store serves an open LookAhead, whose cache would go on with the old rows: "
                    "load before its `with` block or after it"
                )
            self.refuse_behind("loaded")
            weights.check_range()
            self.loaded = True
            self.transfers.expire()
            group.fill(position, weights)

    def save(self, table: str, path: str | os.PathLike) -> None:
        """Writes the weights of all rows of a table to a `.npy` file `[rows, dim]`, which `load` and `numpy.load` read.

        Rows that were never written are in it with their initial weights; optimizer state and master copies are not.
        A file of that name is replaced once the new one is complete. `load` of the file gives the same weights.

        Args:
            table: its name.
            path: taken as it is, no `.npy` is appended. Bfloat16, which `.npy` files do not know, is written as float32
                (exactly), other weights in the table's dtype.

        Raises:
            KeyError: for an unknown table.
            RuntimeError: if newer values lie in a cache that was not flushed.
            OSError: if the disk has no room for the file, or it cannot be written.

        >>> import tempfile
        >>> store = HostStore({"item": Table(2, 3)}, optimizer=optax.sgd(0.1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store.save("item", folder + "/item.npy")
        ...     np.load(folder + "/item.npy").shape
        (2, 3)
        """
        group, position = self.locate(table)
        self.refuse_behind("saved")
        shape = (int(self.tables[table].rows), int(self.tables[table].dim))

        def parts() -> Iterator[np.ndarray]:
            yield from group.chunks(position)
            self.refuse_behind("saved")  # training that began meanwhile, in another thread

        write_weights(path, f"table {table!r}", shape, group.group.dtype, parts())

    def refuse_behind(self, done: str) -> None:
        """Raises RuntimeError if a cache holds newer rows: the store must not be `done`."""
        if self._behind:
            raise RuntimeError(
                "the newest rows are still in the cache: call `cache = ahead.flush(cache)`, or without a LookAhead "
                f"`cache = jc.flush(cache, store)`, before the store is {done}"
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

    @property
    def serves_pipeline(self) -> bool:
        """Whether a pipeline has claimed the store."""
        return self._pipeline is not None

    def mark_behind(self) -> None:
        """Notes that a cache now holds newer rows."""
        self._behind, self.loaded = True, False

    def mark_behind_on_demand(self) -> None:
        """Notes that a cache of on-demand mode may hold newer rows: no pipeline's cache is the newest."""
        self._behind, self.exchanged = True, -1

    def refuse_restore(self) -> None:
        """Raises RuntimeError while a pipeline has the store open or a snapshot of it is being read."""
        if self._pipeline is not None:
            raise RuntimeError(
                "the store serves an open LookAhead, whose cache would go on with the old rows: restore before its "
                "`with` block or after it"
            )
        if any(group.has_snapshots for group in self.groups):
            raise RuntimeError("the store is still being saved: wait for that before it is restored")

    def restore(self, groups: Sequence[RowStore], step: int, mark: str) -> None:
        """Takes over the rows and scalars of stores of the same groups, as of the snapshot `mark` at `step`.

        Whatever the store held is gone, and caches of it are stale. Raises as `refuse_restore`, with nothing changed.
        """
        with self._lock:
            self.refuse_restore()
            self.transfers.expire()
            for group, read in zip(self.groups, groups, strict=True):
                group.replace(read, mark)
            self.step = self.exchanged = step
            self.unwritten, self.loaded, self._behind = None, True, False

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
    try:
        optimizer = RowOptimizer(table.optimizer, table.dim, table.dtype, table.rounding, table.master_copy)
    except (TypeError, ValueError) as error:
        error.add_note(f"This is the optimizer of {', '.join(map(repr, tables))}.")
        raise
    return RowStore(Group.stack(tables), optimizer, seed)


def _spans(table: Table) -> Iterator[tuple[int, int]]:
    """Ids from start to stop, all those of a table, a chunk at a time."""
    rows, step = int(table.rows), max(1, _CHUNK // int(table.dim))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


class _Weights:
    """What a table is to be loaded from, checked: slices of it are arrays `float[N, dim]`."""

    def __init__(self, name: str, table: Table, source: Any):
        self._name, self._table = name, table
        self._array = self._opened(source)
        self._dtype = self._checked_dtype(self._array.dtype)
        found, expected = tuple(self._array.shape), (table.rows, table.dim)
        if found != expected:
            raise ValueError(f"{self._refused} of shape {found}: its rows and dim are {expected}")

    @property
    def _refused(self) -> str:
        return f"table {self._name!r} cannot be loaded from {self._from}"

    def _opened(self, source: Any) -> Any:
        if isinstance(source, str | os.PathLike):
            self._from = f"the file {os.path.abspath(source)}"
            try:
                return np.lib.format.open_memmap(source, mode="r")
            except FileNotFoundError:
                raise FileNotFoundError(errno.ENOENT, f"{self._refused}: no such file") from None
            except (ValueError, OverflowError) as error:
                raise ValueError(
                    f"{self._refused}: it is no whole .npy file as numpy.save and HostStore.save write them ({error})"
                ) from error
        self._from = "an array"
        if hasattr(source, "shape") and isinstance(getattr(source, "dtype", None), np.dtype):
            return source  # JAX arrays, among others, would be copied as a whole
        self._from = f"a {type(source).__name__}"
        try:
            return np.asarray(source)
        except ValueError as error:
            raise ValueError(f"{self._refused} that is no array: {error}") from error

    def _checked_dtype(self, found: np.dtype) -> np.dtype:
        """The dtype that the values have."""
        if found == np.dtype("V2"):  # what numpy.save makes of bfloat16
            if self._table.dtype == _BFLOAT16:
                return _BFLOAT16
            raise TypeError(
                f"{self._refused} of 2 bytes a weight that say no dtype, as numpy.save leaves of bfloat16: give the "
                "array, array.view(ml_dtypes.bfloat16)"
            )
        if found == _BFLOAT16 or (np.issubdtype(found, np.floating) and found.itemsize <= 8):
            return found
        raise TypeError(
            f"{self._refused} of {found}: weights must be float32, float64, float16 or bfloat16 "
            "(array.astype(np.float32))"
        )

    def __getitem__(self, rows: slice) -> np.ndarray:
        array = np.asarray(self._array[rows])
        if array.shape != (rows.stop - rows.start, self._table.dim):
            raise ValueError(f"{self._refused}: its rows {rows.start} to {rows.stop - 1} have shape {array.shape}")
        return array.view(self._dtype) if array.dtype.kind == "V" else array

    def check_range(self) -> None:
        """Raises ValueError if a finite weight is infinite in the table's dtype."""
        dtype = self._table.dtype
        largest = float(ml_dtypes.finfo(dtype).max)
        if float(ml_dtypes.finfo(self._dtype).max) <= largest:
            return
        for start, stop in _spans(self._table):
            weights = self[start:stop]
            with np.errstate(over="ignore"):
                lost = np.isinf(weights.astype(np.float32).astype(dtype)) & np.isfinite(weights)
            if lost.any():
                row, column = np.argwhere(lost)[0]
                raise ValueError(
                    f"{self._refused}: row {start + row} has {weights[row, column]} in column {column}, but the "
                    f"largest {dtype} is {largest:.5g}: give the table a wider dtype, or scale the weights"
                )
