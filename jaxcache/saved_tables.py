"""Tables in a checkpoint: its files, and reading them without a store.

A checkpoint of tables is a folder. `manifest.json`, written last, describes everything in it. Rows lie in *segments*:
one in a full checkpoint, and one more for each incremental one after it, whose rows take the place of those before. Of
each table a segment has the ids of its rows, ascending, their weights, and each leaf of their optimizer state. They are
Zarr 3 arrays, written and read by TensorStore some megabytes at a time, with a checksum of each such chunk.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import os
import shutil
import zlib
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from jaxcache.npy import write_weights
from jaxcache.optimizers import Rows
from jaxcache.snapshots import Snapshot
from jaxcache.store import HostStore, RowStore
from jaxcache.tables import Group, Initializer, Table, normal, uniform

FORMAT = 1
MANIFEST = "manifest.json"
SEGMENTS = "segments"
HELD = "cache"
UNFINISHED = ".orbax-checkpoint-tmp"  # in the names of folders that Orbax has not committed
_CHUNK_BYTES = 2**22  # of the widest array, in a file of its own
_IN_FLIGHT = 2  # chunks that are on their way to or from the disk
_SAVED_WEIGHTS = 2**22  # put into a file at a time, more than a chunk holds: each is read once or twice
_SAID_AS = {"rows": "number of rows", "state": "optimizer's state", "scalars": "optimizer's counts"}
_INITIALIZERS = {"uniform": uniform, "normal": normal}


class Leaf(NamedTuple):
    """An array of a table: `ids`, `weights`, or a row leaf of the optimizer's state.

    Attributes:
        name: the name, for a row leaf that in optax's state.
        shape: of one row.
        dtype: of its elements.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype


def leaves(dim: int, dtype: np.dtype, state: Sequence[Leaf]) -> list[Leaf]:
    """The arrays of a table whose optimizer keeps `state`."""
    return [Leaf("ids", (), np.dtype(np.int64)), Leaf("weights", (dim,), dtype), *state]


_HELD = [Leaf("ids", (), np.dtype(np.int64)), *(Leaf(name, (), np.dtype(np.int32)) for name in ("slots", "counts"))]


def state_leaves(rows: RowStore) -> list[Leaf]:
    """The row leaves of a group's optimizer."""
    pairs = zip(rows.optimizer.leaf_names[0], rows.optimizer.row_shapes, strict=True)
    return [Leaf(name, tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in pairs]


# Arrays on the disk


class _Arrays:
    """The arrays of one table in one segment.

    Args:
        folder: theirs.
        leaves: what they are, ids first.
        rows: their number.
        chunk_rows: rows of a chunk.
        asked: begins what errors say.
        create: whether they are made.
    """

    def __init__(
        self, folder: Path, leaves: Sequence[Leaf], rows: int, chunk_rows: int, asked: str, create: bool = False
    ):
        self.rows, self.chunk_rows, self._asked, self._folder = rows, chunk_rows, asked, folder
        self._create = create
        self._opened = [
            self._call(_open, str(folder / quote(leaf.name)), leaf, rows, chunk_rows, create) for leaf in leaves
        ]

    def write(self, start: int, parts: Sequence[np.ndarray]) -> list[Any]:
        """Starts to write rows from `start` on; returns what to `wait` for."""
        pairs = zip(self._opened, parts, strict=True)
        return [array[start : start + len(part)].write(part) for array, part in pairs]

    def read(self, start: int, stop: int, leaves: int | None = None) -> list[Any]:
        """Starts to read rows, of the first so many leaves if given; returns what to `wait` for."""
        return [array[start:stop].read() for array in self._opened[:leaves]]

    def wait(self, futures: Sequence[Any]) -> list[Any]:
        """The results of `write` or `read`."""
        return [self._call(future.result) for future in futures]

    def _call(self, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (ValueError, OSError, NotImplementedError) as error:
            raise OSError(f"{self._asked}: the arrays in {self._folder} {_explained(error, self._create)}") from error


def _explained(error: Exception, written: bool) -> str:
    """What went wrong in TensorStore, and what to do about it."""
    text = str(error).partition(" [tensorstore_spec=")[0]
    if "RESOURCE_EXHAUSTED" in text or "No space left" in text or "File too large" in text:
        return f"could not be written, there is no room: {text}"
    if "Permission" in text or "PERMISSION_DENIED" in text:
        return f"are out of reach: {text}"
    if written:
        return f"could not be written: {text}"
    return f"are damaged or missing: restore another checkpoint. {text}"


def _open(path: str, leaf: Leaf, rows: int, chunk_rows: int, create: bool) -> Any:
    store = _tensorstore()
    metadata = {
        "shape": [rows, *leaf.shape],
        "data_type": str(leaf.dtype),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [chunk_rows, *leaf.shape]}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "fill_value": 0,
    }
    spec = {
        "driver": "zarr3",
        "kvstore": f"{path}/" if "://" in path else {"driver": "file", "path": f"{path}/"},
        "metadata": metadata,
        # A chunk whose file is gone is an error, and no zeros.
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
    }
    return store.open(spec, create=create, delete_existing=create, open=not create).result()


@functools.cache
def _tensorstore() -> Any:
    try:
        import tensorstore
    except ImportError as error:
        raise ImportError(
            "checkpoints of tables are written and read by Orbax and TensorStore: pip install 'jaxcache[checkpoint]'"
        ) from error
    return tensorstore


# Writing


class Base(NamedTuple):
    """The checkpoint that an incremental one goes on from: its folder, and the mark of its snapshot."""

    folder: Path
    mark: str


def find_base(folder: Path, groups: Sequence[RowStore]) -> Base | None:
    """The newest checkpoint beside that in `folder` since which a store knows what was written."""
    root, name, found = folder.parent.parent, folder.name.partition(UNFINISHED)[0], {}
    for step in root.iterdir() if root.is_dir() else ():
        tables = step / name
        if UNFINISHED not in step.name and (tables / MANIFEST).exists():
            # A checkpoint that is being deleted, or was when the process was killed, has lost some of its files.
            with contextlib.suppress(FileNotFoundError):
                newest = max((segment.name for segment in (tables / SEGMENTS).iterdir()), default="")
                found[newest.partition("-")[2]] = tables
    return next((Base(found[mark], mark) for mark in reversed(groups[0].marks) if mark in found), None)


def write_tables(
    folder: Path,
    description: Mapping[str, Any],
    mark: str,
    base: Base | None,
    snapshots: Sequence[tuple[RowStore, Snapshot]],
    held: Mapping[str, Sequence[np.ndarray]],
) -> dict[str, int]:
    """Writes a checkpoint of tables.

    Args:
        folder: where it goes, an empty folder.
        description: what is known for the manifest.
        mark: that of the snapshots.
        base: what it goes on from; None to write all rows.
        snapshots: of all groups.
        held: of each table, `int64[N]` ids, `int32[N]` slots and `int32[N]` counts of the rows in the cache, if any.

    Returns:
        The rows written, and their bytes.
    """
    try:
        segments = []
        if base is not None:
            segments = read_manifest(base.folder)["segments"]
            _link(base.folder / SEGMENTS, folder / SEGMENTS)
        name = f"{len(segments):04d}-{mark}"
        tables: dict[str, Any] = {}
        rows_bytes = 0
        for store, snapshot in snapshots:
            written = _write_rows(folder / SEGMENTS / name, store, snapshot)
            rows_bytes += sum(about["rows"] for about in written.values()) * store.row_bytes
            tables |= written
        manifest = {
            **description,
            "rows_written": _rows_written(snapshots),
            "segments": [*segments, {"name": name, "tables": tables}],
            "held": {name: _write_held(folder, name, arrays) for name, arrays in held.items()},
        }
        _write_manifest(folder, manifest)
    except BaseException:
        # Orbax leaves what was not finished where it is: on a full disk no later checkpoint would find room.
        for part in (SEGMENTS, HELD):
            shutil.rmtree(folder / part, ignore_errors=True)
        raise
    return {"rows": sum(about["rows"] for about in tables.values()), "rows_bytes": rows_bytes}


def _rows_written(snapshots: Sequence[tuple[RowStore, Snapshot]]) -> dict[str, int]:
    """Rows of each table that had been written, changed since the base or not."""
    counts: dict[str, int] = {}
    for store, snapshot in snapshots:
        counts |= dict(zip(store.group.names, snapshot.count_written().tolist(), strict=True))
    return counts


def _write_rows(folder: Path, store: RowStore, snapshot: Snapshot) -> dict[str, Any]:
    """Writes the rows of a group into a segment. Returns what the manifest says of each table."""
    group, state = store.group, state_leaves(store)
    counts, parts = snapshot.count()
    kinds = leaves(group.dim, group.dtype, state)
    most = max(1, _CHUNK_BYTES // max(leaf.dtype.itemsize * int(np.prod(leaf.shape)) for leaf in kinds))
    # Chunks of equal size, since the last one would be filled up to the size of the others.
    chunk_rows = [max(1, -(-count // max(1, -(-count // most)))) for count in counts.tolist()]
    tables: dict[str, Any] = {
        name: {"rows": count, "chunk_rows": chunk, "first_ids": []}
        for name, count, chunk in zip(group.names, counts.tolist(), chunk_rows, strict=True)
    }
    arrays = [
        _Arrays(folder / _table_folder(name), kinds, about["rows"], about["chunk_rows"], f"table {name!r}", create=True)
        for name, about in tables.items()
    ]
    in_flight: deque[tuple[_Arrays, list[Any]]] = deque()
    starts = [0] * len(arrays)
    try:
        for table, keys in snapshot.keys(parts, chunk_rows):
            ids, rows = group.locate(keys)[1], snapshot.read(keys)
            in_flight.append((arrays[table], arrays[table].write(starts[table], (ids, rows.weights, *rows.state))))
            starts[table] += len(ids)
            tables[group.names[table]]["first_ids"].append(int(ids[0]))
            if len(in_flight) > _IN_FLIGHT:
                oldest, futures = in_flight.popleft()
                oldest.wait(futures)
        while in_flight:
            oldest, futures = in_flight.popleft()
            oldest.wait(futures)
    finally:  # after an error too, nothing is written any more
        for oldest, futures in in_flight:
            with contextlib.suppress(OSError):
                oldest.wait(futures)
    return tables


def _write_held(folder: Path, name: str, parts: Sequence[np.ndarray]) -> int:
    """Writes which rows of a table the cache holds. Returns their number."""
    count = len(parts[0])
    if count:
        arrays = _held_arrays(folder, name, count, create=True)
        arrays.wait(arrays.write(0, parts))
    return count


def _held_arrays(folder: Path, name: str, rows: int, create: bool = False) -> _Arrays:
    asked = f"checkpoint {folder}, the rows of table {name!r} in the cache"
    return _Arrays(
        folder / HELD / _table_folder(name), _HELD, rows, max(1, min(rows, _CHUNK_BYTES // 8)), asked, create
    )


def _link(old: Path, new: Path) -> None:
    """Gives the files of segments a second name, so that either folder outlives the other."""

    def link_or_copy(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:  # a file system without links
            shutil.copyfile(source, target)

    shutil.copytree(old, new, copy_function=link_or_copy)


def _table_folder(name: str) -> str:
    """The folder of a table in a segment: readable, and the name of a file for any name of a table."""
    return "table-" + quote(name, safe="")


# The manifest


def describe_tables(groups: Iterable[RowStore]) -> dict[str, dict[str, Any]]:
    """What a checkpoint says about each table; two stores of which it says the same have the same rows in mind."""
    described = {}
    for rows in groups:
        for name, table in zip(rows.group.names, rows.group.tables, strict=True):
            described[name] = {
                "rows": int(table.rows),
                "dim": int(table.dim),
                "dtype": str(table.dtype),
                "rounding": table.rounding,
                "master_copy": table.master_copy,
                "frozen": table.frozen,
                "initializer": _describe_initializer(table.initializer),
                "state": [[leaf.name, list(leaf.shape), str(leaf.dtype)] for leaf in state_leaves(rows)],
                "scalars": list(rows.optimizer.leaf_names[1]),
            }
    return described


def describe_scalars(groups: Iterable[RowStore]) -> dict[str, list[Any]]:
    """The optimizers' scalars of each table, as their dtypes and values."""
    return {
        name: [[str(value.dtype), value.item()] for value in rows.scalars]
        for rows in groups
        for name in rows.group.names
    }


def _describe_initializer(initializer: Any) -> str:
    # A function has its address in its representation, which is another in each process.
    name = getattr(initializer, "__qualname__", None)
    return repr(initializer) if name is None else f"{initializer.__module__}.{name}"


def _known_initializer(description: str) -> Initializer | None:
    """The initializer of ours that is so described."""
    name, _, arguments = description.partition("(")
    if name not in _INITIALIZERS or not arguments.endswith(")"):
        return None
    pairs = (word.split("=") for word in arguments[:-1].split(", "))
    return _INITIALIZERS[name](**{key: None if value == "None" else float(value) for key, value in pairs})


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes `manifest.json`, with a checksum, as the last file of a checkpoint."""
    text = json.dumps({"crc32": _checksum(manifest), "manifest": manifest}, indent=1)
    with (folder / MANIFEST).open("w") as file:
        file.write(text + "\n")
        file.flush()
        with contextlib.suppress(AttributeError, OSError):  # a file in a bucket has no descriptor
            os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads `manifest.json`. Raises FileNotFoundError, or ValueError for what is damaged or of another format."""
    path = folder / MANIFEST
    try:
        read = json.loads(path.read_text())
        manifest = read["manifest"]
        version = manifest["format"]
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} is no checkpoint of tables: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): restore another checkpoint") from error
    if version != FORMAT:
        raise ValueError(
            f"{path} is of format {version!r}, and this jaxcache reads format {FORMAT}: install the one that wrote it"
        )
    if read.get("crc32") != _checksum(manifest):
        raise ValueError(f"{path} is damaged, its checksum does not fit: restore another checkpoint")
    return manifest


def _checksum(manifest: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode())


def encode_loader_state(state: Any) -> Any:
    """A loader's state for the manifest, such that it comes back equal. Raises TypeError for what cannot be kept."""
    if state is None:
        return None
    if isinstance(state, bytes):
        return {"bytes": base64.b64encode(state).decode()}
    return {"json": _encode(state)}


def decode_loader_state(encoded: Any) -> Any:
    """The state again."""
    if encoded is None:
        return None
    return base64.b64decode(encoded["bytes"]) if "bytes" in encoded else _decode(encoded["json"])


_TAGS = {"bytes", "tuple", "dict"}  # the one key of a mapping that stands for what JSON has no word for


def _encode(value: Any) -> Any:
    """`value` in JSON. Grain's states have tuples in them too; others' dicts keys that are numbers."""
    if isinstance(value, np.integer | np.floating | np.bool_):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_encode(item) for item in value]}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value) and not (len(value) == 1 and _TAGS & set(value)):
            return {key: _encode(item) for key, item in value.items()}
        return {"dict": [[_encode(key), _encode(item)] for key, item in value.items()]}
    raise TypeError(
        f"the loader's state must be made of dicts, lists, tuples, numbers, strings and bytes to be saved, and has a "
        f"{type(value).__name__} in it: {value!r}"
    )


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1 and (tag := next(iter(value))) in _TAGS:
        if tag == "bytes":
            return base64.b64decode(value[tag])
        if tag == "tuple":
            return tuple(_decode(value[tag]))
        return {_decode(key): _decode(item) for key, item in value[tag]}
    return {key: _decode(item) for key, item in value.items()}


# Reading


class SavedTable:
    """A table in a checkpoint. Slices of it are weights `[N, dim]` in its dtype, as `HostStore.load` takes them.

    Attributes:
        name: the table's name.
        shape: `(rows, dim)`.
        dtype: of the weights.
        rows_written: rows that have a value of their own; the others have their initial one.
        state_names: names of the optimizer's row leaves, such as `0.sum_of_squares`.
    """

    def __init__(self, name: str, saved: SavedTables):
        about = saved.manifest["tables"][name]
        self.name, self._saved, self._about = name, saved, about
        self.shape = (int(about["rows"]), int(about["dim"]))
        self.dtype = np.dtype(about["dtype"])
        self.rows_written = int(saved.manifest["rows_written"][name])
        self._state = [Leaf(leaf, tuple(shape), np.dtype(dtype)) for leaf, shape, dtype in about["state"]]
        self.state_names = tuple(leaf.name for leaf in self._state)

    def __repr__(self):
        written = f"{self.rows_written:,} of {self.shape[0]:,} rows written"
        return f"SavedTable({self.name!r}, {self.shape[0]:,} x {self.shape[1]} {self.dtype}; {written})"

    @functools.cached_property
    def _arrays(self) -> list[tuple[_Arrays, list[int]]]:
        """Those of each segment that has any, and the first id of each chunk."""
        found = []
        for segment in self._saved.manifest["segments"]:
            about = segment["tables"][self.name]
            if about["rows"]:
                path = self._saved.path / SEGMENTS / segment["name"] / _table_folder(self.name)
                asked = f"table {self.name!r} of checkpoint {self._saved.path}"
                arrays = _Arrays(
                    path, leaves(self.shape[1], self.dtype, self._state), about["rows"], about["chunk_rows"], asked
                )
                found.append((arrays, about["first_ids"]))
        return found

    def chunks(self, start: int = 0, stop: int | None = None, state: bool = True) -> Iterator[tuple[np.ndarray, Rows]]:
        """The rows that were written, of ids from `start` to `stop`: `int64[N]` ids and `Rows`, some at a time.

        Those of an incremental checkpoint come after those that they take the place of. Without `state` the weights
        alone are read.
        """
        stop = self.shape[0] if stop is None else stop
        for arrays, first_ids in self._arrays:
            first, last = max(bisect_right(first_ids, start) - 1, 0), bisect_left(first_ids, stop)
            in_flight: deque[list[Any]] = deque()
            for chunk in range(first, last + _IN_FLIGHT):
                if chunk < last:
                    begin = chunk * arrays.chunk_rows
                    end = min(begin + arrays.chunk_rows, arrays.rows)
                    in_flight.append(arrays.read(begin, end, None if state else 2))
                if in_flight and (len(in_flight) > _IN_FLIGHT or chunk >= last):
                    ids, weights, *rest = arrays.wait(in_flight.popleft())
                    low, high = np.searchsorted(ids, [start, stop])
                    if low < high:
                        yield ids[low:high], Rows(weights[low:high], tuple(leaf[low:high] for leaf in rest))

    def __getitem__(self, rows: slice) -> np.ndarray:
        """The weights of a range of rows, those that were never written included: `[N, dim]`."""
        if not isinstance(rows, slice):
            raise TypeError(f"a saved table is read by ranges of rows, table[start:stop], got {rows!r}")
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise ValueError(f"a saved table is read by ranges of rows without a step, got {rows!r}")
        stop = max(start, stop)
        weights = np.empty((stop - start, self.shape[1]), self.dtype)
        written = np.zeros(stop - start, bool)
        for ids, found in self.chunks(start, stop, state=False):
            weights[ids - start], written[ids - start] = found.weights, True
        if len(untouched := np.flatnonzero(~written)):
            weights[untouched] = self._initial_weights(untouched + start).astype(self.dtype)
        return weights

    def save(self, path: str | os.PathLike, start: int = 0, stop: int | None = None) -> int:
        """Writes the weights of a range of rows to a `.npy` file, as `HostStore.save` does for a table in memory.

        Rows that were never written are in it with their initial weights. Some rows are in memory at a time.

        Args:
            path: of the file. One of that name is replaced once the new one is complete.
            start: the first id.
            stop: the id behind the last one; all by default.

        Returns:
            The bytes of the weights. Bfloat16, which such files do not know, is written as float32.

        Raises:
            ValueError: for a range that is empty or not within the table, or where initial weights are needed and the
                initializer is neither ours nor was given.
            OSError: if the disk has no room for the file, it cannot be written, or the checkpoint is damaged.
        """
        rows, dim = self.shape
        stop = rows if stop is None else stop
        if not 0 <= start < stop <= rows:
            found = "none" if start >= min(stop, rows) else "not all"
            raise ValueError(f"table {self.name!r} has rows 0 to {rows - 1}, and {found} of {start}:{stop}")
        if stop - start > self.rows_written:
            self._initializer()  # which may fail: before anything is written
        step = max(1, _SAVED_WEIGHTS // dim)
        parts = (self[begin : min(begin + step, stop)] for begin in range(start, stop, step))
        return write_weights(path, f"table {self.name!r}", (stop - start, dim), self.dtype, parts)

    def _initial_weights(self, ids: np.ndarray) -> np.ndarray:
        group = Group.stack({self.name: Table(*self.shape, initializer=self._initializer())})
        return group.initial_weights(self._saved.seed, ids)

    def _initializer(self) -> Initializer:
        description = self._about["initializer"]
        initializer = self._saved.initializers.get(self.name) or _known_initializer(description)
        if initializer is None:
            raise ValueError(
                f"table {self.name!r} of checkpoint {self._saved.path} has rows that were never written, whose weights "
                f"come from {description}: give it, SavedTables(path, initializers={{{self.name!r}: ...}})"
            )
        return initializer


class SavedTables(Mapping[str, SavedTable]):
    """A checkpoint of tables, to be read without a store, a cache, or the classes of its optimizers.

    Args:
        path: the checkpoint, or the folder of a step in which it lies.
        initializers: by table, those of rows that were never written, where they are not ours.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged, or there are several.

    Attributes:
        path: the folder of the tables.
        manifest: what is written in it.
        step: updates done.
        seed: of the initial weights.

    The weights of a row range are `SavedTables(path)["item"][1_000:2_000]`, and a store takes a table over with
    `store.load("item", SavedTables(path)["item"])`.
    """

    def __init__(self, path: str | os.PathLike, initializers: Mapping[str, Initializer] | None = None):
        self.path = find_tables(_as_path(path))
        self.manifest = read_manifest(self.path)
        self.initializers = dict(initializers or {})
        self.step, self.seed = int(self.manifest["step"]), int(self.manifest["seed"])

    def __repr__(self):
        return f"SavedTables({str(self.path)!r}, step {self.step:,}: {', '.join(self)})"

    def __getitem__(self, name: str) -> SavedTable:
        if name not in self.manifest["tables"]:
            raise KeyError(f"no table named {name!r}: checkpoint {self.path} has {', '.join(self)}")
        return SavedTable(name, self)

    def __iter__(self) -> Iterator[str]:
        return iter(self.manifest["tables"])

    def __len__(self) -> int:
        return len(self.manifest["tables"])

    @property
    def mark(self) -> str:
        """That of the snapshot which it shows."""
        return self.manifest["segments"][-1]["name"].partition("-")[2]

    @property
    def slots(self) -> list[int] | None:
        """Those of the cache that was saved with it, of each group; None without one."""
        return self.manifest["slots"]

    def check_fits(self, store: HostStore) -> None:
        """Raises ValueError unless it is a checkpoint of tables like those of `store`."""
        expected, found = describe_tables(store.groups), self.manifest["tables"]
        begins = f"checkpoint {self.path} is not one of this store"
        if set(expected) != set(found):
            raise ValueError(f"{begins}: it has tables {', '.join(found)}; the store has {', '.join(expected)}")
        for name, about in expected.items():
            for what, value in about.items():
                if found[name][what] != value:
                    raise ValueError(
                        f"{begins}: the {_SAID_AS.get(what, what)} of table {name!r} is {found[name][what]!r} there "
                        f"and {value!r} here: make the store as it was, or take over weights alone, "
                        f"store.load({name!r}, SavedTables(path)[{name!r}])"
                    )
        if self.seed != store.seed:
            raise ValueError(
                f"{begins}: its seed is {self.seed} and the store's {store.seed}, so that rows which were never "
                f"written would start from other weights: HostStore(..., seed={self.seed})"
            )
        for rows in store.groups:
            values = [self.manifest["scalars"][name] for name in rows.group.names]
            if any(value != values[0] for value in values):
                raise ValueError(
                    f"{begins}: tables {', '.join(rows.group.names)} share an optimizer here, and there they have "
                    "counts of their own: give each an optimizer object of its own"
                )

    def read_group(self, rows: RowStore) -> RowStore:
        """A new store of the same group as `rows` with what was saved. Raises OSError if a file is damaged."""
        read = rows.emptied()
        written = [self[name].rows_written for name in rows.group.names]
        read.reserve(sum(written))
        for position, name in enumerate(rows.group.names):
            for ids, part in self[name].chunks():
                read.write(rows.group.keys(position, ids), part)
        if read.rows_written != sum(written):
            raise OSError(
                f"checkpoint {self.path} is damaged: {', '.join(rows.group.names)} have {read.rows_written:,} rows "
                f"instead of {sum(written):,}"
            )
        scalars = self.manifest["scalars"][rows.group.name]
        read.scalars = tuple(np.array(value, dtype) for dtype, value in scalars)
        return read

    def held(self, group: Group, slots: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys `int64[N]` and counts `int32[N]` of the rows of a group that the saved cache held, by slot.

        Where they are more than `slots`, those with the highest counts.
        """
        keys, places, counts = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        for position, name in enumerate(group.names):
            if number := self.manifest["held"].get(name, 0):
                arrays = _held_arrays(self.path, name, number)
                ids, place, count = arrays.wait(arrays.read(0, number))
                keys.append(group.keys(position, ids))
                places.append(place)
                counts.append(count)
        found, looked_up = np.concatenate(keys), np.concatenate(counts)
        # By slot, so that a cache of as many slots holds each row where it was.
        by = np.concatenate(places) if len(found) <= slots else -looked_up.astype(np.int64)
        order = np.argsort(by, kind="stable")[:slots]
        return found[order], looked_up[order]

    @property
    def loader_state(self) -> Any:
        """That of the loader after the batch trained last, or None."""
        return decode_loader_state(self.manifest["loader_state"])


def _as_path(path: Any) -> Any:
    """`path` with the operations of `pathlib`, also where it is the address of a bucket."""
    if isinstance(path, str) and "://" in path:
        from etils import epath

        return epath.Path(path)
    return Path(path) if isinstance(path, str) else path


def find_tables(path: Any) -> Any:
    """The folder of the tables of a checkpoint: `path`, or one in it."""
    if (path / MANIFEST).exists():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and UNFINISHED not in folder.name)
    found = [folder for folder in folders if (folder / MANIFEST).exists()]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{path} has tables under several names: choose one of {', '.join(map(str, found))}")
    steps = [
        folder.name
        for folder in folders
        if any(UNFINISHED not in manifest.parent.name for manifest in folder.glob(f"*/{MANIFEST}"))
    ]
    if steps:
        raise ValueError(f"{path} has several checkpoints: choose {path}/STEP, with STEP of {', '.join(steps)}")
    raise FileNotFoundError(f"there is no checkpoint of tables in {path}")
