"""Traces: the ids that a run looks up, read from a file or a loader and held compactly. NumPy and Numba, no JAX."""

from __future__ import annotations

import gzip
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from jaxcache import index
from jaxcache.tables import Group, Table

MISSING = -(2**63)
"""What stands for an empty field of a Criteo file and a null of a Parquet file among `Trace.values`."""

FORMATS = {
    "npz": (".npz",),
    "criteo": (".tsv", ".txt", ".tsv.gz", ".txt.gz", ".gz"),
    "parquet": (".parquet", ".pq"),
}
"""The formats of `load_trace` and the ends of file names that they are known by."""

CRITEO_CATEGORIES = tuple(f"C{field + 1}" for field in range(26))
_CRITEO_COLUMNS = ("label", *(f"I{field + 1}" for field in range(13)), *CRITEO_CATEGORIES)
_SAMPLES_AT_ONCE = 65_536
_LOOKUPS_AT_ONCE = 65_536
_BYTES_AT_ONCE = 2**23
_TAB, _NEWLINE, _MINUS = b"\t\n-"


@dataclass(frozen=True, eq=False)
class Trace:
    """All lookups of a run, in order; made by `load_trace`.

    Each table's distinct ids are numbered 0, 1, 2, ... in ascending order, so that whatever a table was declared to
    hold, what is kept for each row fits into dense arrays. Memory: 4 bytes a lookup and 16 bytes a distinct row;
    reading takes up to 100 bytes a distinct row more.

    Attributes:
        source: where it was read from, for messages.
        ids: by feature, `int32[samples, lookups of a sample]`, numbers of rows.
        tables: by feature, the name of its table.
        values: by table, `int64[rows]`, the ids behind the numbers, ascending; MISSING, where it occurs, is the first.
        counts: by table, `int64[rows]`, lookups of each row.
        declared_rows: rows that the tables were declared to hold, all together; None if they were not.
    """

    source: str
    ids: Mapping[str, np.ndarray]
    tables: Mapping[str, str]
    values: Mapping[str, np.ndarray]
    counts: Mapping[str, np.ndarray]
    declared_rows: int | None = None

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(next(iter(self.ids.values())))

    @property
    def lookups(self) -> int:
        """Number of lookups, repetitions counted."""
        return sum(ids.size for ids in self.ids.values())

    @property
    def rows(self) -> int:
        """Number of distinct rows that are looked up, of all tables."""
        return sum(map(len, self.values.values()))

    @cached_property
    def group(self) -> Group:
        """The tables as the planner knows them, holding the distinct rows alone."""
        return Group.stack({name: Table(len(values), 1) for name, values in self.values.items()})

    def batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields what `LookAheadPlanner.observe` takes, for `batch_size` samples at a time; the last ones may be fewer.

        Each item is ids `int64[lookups]`, feature after feature, the feature's starts in it and its end,
        `int64[features + 1]`, and the position of each feature's table in `group`, `int64[features]`.

        >>> trace = load_trace([{"user": [7, 9], "item": [5, 5]}, {"user": [7], "item": [3]}])
        >>> [(ids.tolist(), starts.tolist()) for ids, starts, _ in trace.batches(2)]
        [([0, 1, 1, 1], [0, 2, 4]), ([0, 0], [0, 1, 2])]
        """
        tables = np.array([self.group.index(table) for table in self.tables.values()], np.int64)
        for first in range(0, self.samples, batch_size):
            parts = [ids[first : first + batch_size].reshape(-1) for ids in self.ids.values()]
            starts = np.cumsum([0, *map(len, parts)], dtype=np.int64)
            yield np.concatenate(parts).astype(np.int64), starts, tables


def load_trace(
    source: str | os.PathLike[str] | Iterable[Any],
    *,
    format: str | None = None,
    columns: Sequence[str] | None = None,
    samples: int | None = None,
    tables: Mapping[str, str] | None = None,
    rows: Mapping[str, int] | None = None,
) -> Trace:
    """Reads a trace once, from start to end, a part at a time.

    Args:
        source: the path of a file, or an iterable of batches of any size. A batch maps features to integer ids, `[B]`
            or `[B, lookups]`, or is an integer array `[B, fields]`, whose features are named "0", "1", ...; an array
            by itself is one such batch. A file is

            - `.npz` with `ids`, integers `[samples, fields]`, whose features are named "0", "1", ..., and optionally
              `cardinality`, `[fields]`, the declared rows of each field;
            - text in the Criteo display-advertising format, plain or gzipped: `.tsv`, `.txt`, `.gz`. An empty field is
              a value of its own. Features are C1 to C26, unless `columns` names others, I1 to I13 among them;
            - Parquet, `.parquet` or `.pq`: all its columns of integers unless `columns` names some. A null is a value
              of its own. Needs pyarrow.
        format: "npz", "criteo" or "parquet", where the name of the file does not tell.
        columns: the features to read, all by default.
        samples: at most so many are read.
        tables: by feature, the table that it looks up, if several share one; a feature that is left out has a table of
            its own name.
        rows: by table, the rows that it is declared to hold; shares such as "5%" are then shares of these.

    Raises:
        OSError: if the file cannot be read.
        ImportError: for Parquet without pyarrow.
        TypeError: for ids that are no integers.
        ValueError: for anything else in the file or the batches that is not as above, naming the place.

    >>> trace = load_trace([{"user": [7, 7], "item": [5, 2]}, {"user": [9], "item": [2]}])
    >>> trace.samples, trace.ids["item"].ravel().tolist(), trace.values["item"].tolist(), trace.counts["item"].tolist()
    (3, [1, 0, 0], [2, 5], [2, 1])
    """
    if samples is not None and samples < 1:
        raise ValueError(f"load_trace(samples={samples}): at least one sample is needed")
    declared: dict[str, int] = dict(rows or {})
    if isinstance(source, str | os.PathLike):
        name = Path(source).name
        parts, cardinality = _file(Path(source), format, columns)
        for feature, number in cardinality.items():
            table = (tables or {}).get(feature, feature)
            declared[table] = max(number, declared.get(table, 0))
    else:
        name, parts = "the trace", _loader([source] if isinstance(source, np.ndarray) else source, columns)
    return _collect(name, parts, samples, tables or {}, declared)


def read_ids(
    path: str | os.PathLike[str], *, format: str | None = None, columns: Sequence[str] | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Reads the ids of a file, some samples at a time: a loader over it. Arguments and errors as for `load_trace`.

    Returns:
        An iterator over parts that map features to ids as the file has them, `int64[samples, lookups of a sample]`,
        with MISSING for an empty field or a null.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/ids.npz", ids=[[7, 5], [9, 5]])
    ...     [{name: ids.ravel().tolist() for name, ids in part.items()} for part in read_ids(f"{folder}/ids.npz")]
    [{'0': [7, 9], '1': [5, 5]}]
    """
    return _file(Path(path), format, columns)[0]


def _file(
    path: Path, format: str | None, columns: Sequence[str] | None
) -> tuple[Iterator[dict[str, np.ndarray]], dict[str, int]]:
    """Reads a file; also the declared rows of its features, if it has them."""
    with path.open("rb"):
        pass  # a missing file is reported as such, before anything is said about its name
    kind = _format_of(path) if format is None else format
    if kind == "npz":
        return _npz(path, columns)
    if kind == "criteo":
        return _criteo(path, columns), {}
    if kind == "parquet":
        return _parquet(path, columns), {}
    raise ValueError(f"format={format!r}: the formats are {', '.join(FORMATS)}")


def _format_of(path: Path) -> str:
    for kind, ends in FORMATS.items():
        if path.name.lower().endswith(ends):
            return kind
    known = "; ".join(f"{kind}: {' '.join(ends)}" for kind, ends in FORMATS.items())
    raise ValueError(f"{path}: the name does not tell the format ({known}); name it: format='criteo', --format criteo")


class _Numbering:
    """Numbers the distinct ids of a table, first in the order in which they come in."""

    def __init__(self) -> None:
        self._cells = index.empty(1024)
        self._used = 0

    def number(self, ids: np.ndarray) -> np.ndarray:
        """The numbers `int32[...]` of `ids`, `int64[...]`."""
        flat, out = ids.reshape(-1), np.empty(ids.size, np.int32)
        for first in range(0, len(flat), _LOOKUPS_AT_ONCE):
            part = flat[first : first + _LOOKUPS_AT_ONCE]
            numbers = np.empty(len(part), np.int64)
            self._cells = index.reserve(self._cells, self._used + len(part))
            self._used = index.find_or_insert_all(self._cells, part, self._used, numbers)
            if self._used >= 2**31:
                raise ValueError("a table has 2**31 distinct rows or more: read fewer samples")
            out[first : first + len(part)] = numbers
        return out.reshape(ids.shape)

    def ascending(self) -> tuple[np.ndarray, np.ndarray]:
        """The ids `int64[rows]` in ascending order, and for each number its place in that order, `int32[rows]`."""
        taken = self._cells[self._cells[:, 1] != 0]
        taken = taken[np.argsort(taken[:, 0])]
        place = np.empty(len(taken), np.int32)
        place[taken[:, 1] - 1] = np.arange(len(taken), dtype=np.int32)
        return taken[:, 0].copy(), place


def _collect(
    source: str,
    parts: Iterator[dict[str, np.ndarray]],
    samples: int | None,
    tables: Mapping[str, str],
    declared: Mapping[str, int],
) -> Trace:
    """Makes a trace of parts that map features to `int64[n, lookups]`."""
    collected: dict[str, list[np.ndarray]] = {}
    numberings: dict[str, _Numbering] = {}
    left = np.inf if samples is None else samples
    for part in parts:
        if not collected:
            collected = {feature: [] for feature in part}
            if unknown := set(tables) - set(part):
                raise ValueError(f"{source} has no feature {min(unknown)!r} to give a table: it has {', '.join(part)}")
            tables = {feature: tables.get(feature, feature) for feature in part}
            numberings = {table: _Numbering() for table in tables.values()}
        for feature, ids in part.items():
            if left < len(ids):
                ids = ids[: int(left)]
            collected[feature].append(numberings[tables[feature]].number(ids))
        left -= len(ids)
        if left <= 0:
            break
    if not any(len(part) for chunks in collected.values() for part in chunks):
        raise ValueError(f"{source} holds no sample")
    if unknown := set(declared) - set(numberings):
        raise ValueError(f"{source} has no table {min(unknown)!r}: its tables are {', '.join(numberings)}")

    values, places = {}, {}
    for table, numbering in numberings.items():
        values[table], places[table] = numbering.ascending()
        if table in declared and len(values[table]) and values[table][-1] >= declared[table]:
            raise ValueError(
                f"{source}: table {table!r} has id {values[table][-1]} and is declared to hold {declared[table]:,} "
                "rows: ids must lie below the rows of their table"
            )
    counts = {table: np.zeros(len(values[table]), np.int64) for table in values}
    ids_of = {}
    for feature, table in tables.items():
        ids_of[feature] = places[table][np.concatenate(collected.pop(feature))]
        counts[table] += np.bincount(ids_of[feature].reshape(-1), minlength=len(counts[table]))
    total = sum(declared.values()) if set(declared) == set(values) else None
    return Trace(source, ids_of, tables, values, counts, total)


def _checked(ids: Any, feature: str, source: str, first: int) -> np.ndarray:
    """`ids` as `int64[n, lookups]`; `first` is the number of the first sample in the trace."""
    array = np.asarray(ids)
    if array.ndim not in (1, 2):
        raise ValueError(
            f"{source}: feature {feature!r} has ids of shape {array.shape}; expected [samples] or [samples, lookups]"
        )
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise TypeError(
            f"{source}: the ids of feature {feature!r} are {array.dtype}; ids must be integers (ids.astype(np.int64))"
        )
    wide = array.astype(np.int64).reshape(len(array), -1 if array.size else 1)
    if wide.size and wide.min() < 0:  # an unsigned id of 2**63 or more is a negative one as well
        sample, lookup = np.argwhere(wide < 0)[0]
        found = array.reshape(wide.shape)[sample, lookup]
        raise ValueError(
            f"{source}: feature {feature!r} has id {found} in sample {first + sample}; ids must lie in 0 to 2**63 - 1: "
            "give a missing value an id of its own"
        )
    return wide


def _chosen(columns: Sequence[str] | None, known: Sequence[str], source: str, default: Sequence[str]) -> list[str]:
    """The features to read."""
    chosen = list(default if columns is None else columns)
    for name in chosen:
        if name not in known:
            raise ValueError(f"{source} has no column {name!r}: it has {', '.join(known)}")
    if len(set(chosen)) < len(chosen) or not chosen:
        raise ValueError(f"{source}: each column once, and at least one, got {', '.join(chosen) or 'none'}")
    return chosen


def _loader(batches: Iterable[Any], columns: Sequence[str] | None) -> Iterator[dict[str, np.ndarray]]:
    """Reads an iterable of batches."""
    first, expected = 0, None
    for number, batch in enumerate(batches):
        place = f"batch {number}"
        if not isinstance(batch, Mapping):
            array = np.asarray(batch)
            if array.ndim != 2:
                raise ValueError(
                    f"{place} is an array of shape {array.shape}; a batch maps features to ids, or is an integer array "
                    "[samples, fields]"
                )
            batch = {str(field): array[:, field] for field in range(array.shape[1])}
        names = _chosen(columns, list(batch), place, list(batch))
        ids = {name: _checked(batch[name], name, place, first) for name in names}
        sizes = {name: len(part) for name, part in ids.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"{place}: the features have different numbers of samples: {sizes}")
        if not next(iter(sizes.values())):
            continue
        shapes = {name: part.shape[1] for name, part in ids.items()}
        expected = expected or shapes
        if shapes != expected:
            raise ValueError(
                f"{place} has features and lookups of a sample {shapes}, the batches before it {expected}: they must "
                "agree"
            )
        yield ids
        first += len(next(iter(ids.values())))


def _npz(path: Path, columns: Sequence[str] | None) -> tuple[Iterator[dict[str, np.ndarray]], dict[str, int]]:
    """Reads an .npz file; also the declared rows of its fields, if it has them."""
    save = "np.savez(file, ids=ids), integers [samples, fields]"
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no .npz file: make one with {save}")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("ids", "cardinality") if name in file}
            if "ids" not in arrays:
                raise ValueError(f"there is no array `ids` but {', '.join(file.files) or 'nothing'}: {save}")
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: {error}") from error
    ids, cardinality = arrays["ids"], arrays.get("cardinality")
    if ids.ndim != 2:
        raise ValueError(
            f"{path}: `ids` has shape {ids.shape}; expected [samples, fields], as ids[:, None] has for one"
        )
    known = [str(field) for field in range(ids.shape[1])]
    chosen = _chosen(columns, known, str(path), known)
    declared: dict[str, int] = {}
    if cardinality is not None:
        if cardinality.shape != (len(known),) or not np.issubdtype(cardinality.dtype, np.integer):
            raise ValueError(
                f"{path}: `cardinality` is {cardinality.dtype}{list(cardinality.shape)}; expected an integer for each "
                f"of the {len(known)} fields"
            )
        declared = {name: int(cardinality[int(name)]) for name in chosen}

    def parts() -> Iterator[dict[str, np.ndarray]]:
        for first in range(0, len(ids), _SAMPLES_AT_ONCE):
            part = ids[first : first + _SAMPLES_AT_ONCE]
            yield {name: _checked(part[:, int(name)], name, str(path), first) for name in chosen}

    return parts(), declared


def _parquet(path: Path, columns: Sequence[str] | None) -> Iterator[dict[str, np.ndarray]]:
    """Reads a Parquet file."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError(f"reading {path} needs pyarrow: pip install 'jaxcache[parquet]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            integers = [field.name for field in schema if arrow.types.is_integer(field.type)]
            if columns is None and not integers:
                raise ValueError(f"{path} has no column of integers, only {', '.join(schema.names)}")
            chosen = _chosen(columns, schema.names, str(path), integers)
            for name in chosen:
                if name not in integers:
                    raise TypeError(f"{path}: column {name!r} is {schema.field(name).type}; ids must be integers")
            first = 0
            for part in file.iter_batches(_SAMPLES_AT_ONCE, columns=chosen):
                ids = {}
                for name in chosen:
                    column = part.column(name)
                    ids[name] = _checked(column.fill_null(0).to_numpy(zero_copy_only=False), name, str(path), first)
                    if column.null_count:
                        ids[name][column.is_null().to_numpy(zero_copy_only=False)] = MISSING
                yield ids
                first += part.num_rows
    except arrow.ArrowException as error:
        raise ValueError(f"{path}: {error}") from error


def _criteo(path: Path, columns: Sequence[str] | None) -> Iterator[dict[str, np.ndarray]]:
    """Reads a file in the Criteo format."""
    chosen = _chosen(columns, _CRITEO_COLUMNS[1:], str(path), CRITEO_CATEGORIES)
    positions = np.array([_CRITEO_COLUMNS.index(name) for name in chosen])
    line = 0
    for block in _lines(path):
        ids = _criteo_ids(block, positions)
        if isinstance(ids, str):
            raise ValueError(f"{path}: {_criteo_mistake(block, positions, line)}")
        yield {name: ids[:, i : i + 1] for i, name in enumerate(chosen)}
        line += len(ids)


def _lines(path: Path) -> Iterator[bytes]:
    """Whole lines, some at a time, each with a newline at its end; the file is plain or gzipped, as its bytes tell."""
    with path.open("rb") as raw:
        compressed = raw.read(2) == b"\x1f\x8b"
    with cast(IO[bytes], gzip.open(path, "rb") if compressed else path.open("rb")) as file:
        rest = b""
        try:
            while block := file.read(_BYTES_AT_ONCE):
                whole, newline, rest = (rest + block).rpartition(b"\n")
                if newline:
                    yield (whole + newline).replace(b"\r\n", b"\n")
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: the compressed file is truncated or damaged ({error})") from error
        if rest:
            yield rest.rstrip(b"\r") + b"\n"


_DIGITS = np.full(256, 16, np.int64)  # 16: not a digit
for _digit, _character in enumerate(b"0123456789abcdef"):
    _DIGITS[_character] = _DIGITS[ord(chr(_character).upper())] = _digit


def _criteo_ids(block: bytes, positions: np.ndarray) -> np.ndarray | str:
    """The columns at `positions` of whole lines, `int64[lines, columns]`, or what is wrong with some line."""
    text = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero((text == _TAB) | (text == _NEWLINE))
    width = len(_CRITEO_COLUMNS)
    newline = text[ends] == _NEWLINE
    if len(ends) % width or newline.sum() * width != len(ends) or not newline[width - 1 :: width].all():
        return f"expected {width} columns separated by tabs"
    starts = np.concatenate([[0], ends[:-1] + 1])
    starts, ends = (place.reshape(-1, width)[:, positions] for place in (starts, ends))
    integer = positions < _CRITEO_COLUMNS.index("C1")
    base = np.where(integer, 10, 16)
    minus = integer & (text[starts] == _MINUS)
    empty = starts == ends
    starts = starts + minus
    length = ends - starts
    if (length > 15).any() or (length[minus] == 0).any():
        return "expected numbers of at most 15 digits"
    ids = np.zeros(starts.shape, np.int64)
    for place in range(int(length.max(initial=0))):
        inside = place < length
        digit = _DIGITS[text[np.where(inside, starts + place, 0)]]
        if (inside & (digit >= base)).any():
            return "expected a number"
        ids = np.where(inside, ids * base + digit, ids)
    ids[minus] *= -1
    ids[empty] = MISSING
    return ids


def _criteo_mistake(block: bytes, positions: np.ndarray, first_line: int) -> str:
    """Says what is wrong with the first bad line of `block`, whose first line is number `first_line`, from 0 on."""
    for number, line in enumerate(block.split(b"\n"), start=first_line + 1):
        found = line.split(b"\t")
        if len(found) != len(_CRITEO_COLUMNS):
            return (
                f"line {number}: expected {len(_CRITEO_COLUMNS)} columns separated by tabs (label, 13 integers, "
                f"26 categories), found {len(found)}"
            )
        for position in positions.tolist():
            if isinstance(_criteo_ids(line + b"\n", np.array([position])), str):
                name = _CRITEO_COLUMNS[position]
                what = "an integer" if name.startswith("I") else "hexadecimal digits"
                text = found[position].decode(errors="replace")
                return f"line {number}: expected {what}, at most 15 digits, or nothing in column {name}, found {text!r}"
    raise AssertionError("good lines were taken for bad ones")
