"""Reader for the public Criteo display-advertising format.

A line holds a label, 13 integers and 26 hexadecimal categories, separated by tabs; an empty field
is a missing value. Files are plain or compressed with gzip.
"""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from synthetic import mix_bits

DENSE_FEATURES = 13
CATEGORIES = 26
FEATURES = tuple(f"C{field + 1}" for field in range(CATEGORIES))
COLUMNS = 1 + DENSE_FEATURES + CATEGORIES

_LABEL = re.compile(rb"[01]")
_INTEGER = re.compile(rb"(-?[0-9]{1,18})?")
_CATEGORY = re.compile(rb"([0-9a-fA-F]{1,16})?")
# One match a line checks all its columns; which of them is wrong is only asked of a bad line.
_LINE = re.compile(
    rb"\t".join([_LABEL.pattern, *[_INTEGER.pattern] * DENSE_FEATURES, *[_CATEGORY.pattern] * CATEGORIES]).replace(
        b"(", b"(?:"
    )
)
_LINES_AT_ONCE = 8192


@dataclass(frozen=True, eq=False)
class CriteoLog:
    """A whole log in memory, 160 bytes a line.

    Attributes:
        dense: log(1 + max(x, 0)) of the integers and 0 where missing, float32 [lines, 13].
        ids: rows of the categories, int32 [26, lines]; row 0 stands for a missing value.
        label: 0 or 1, float32 [lines].
        cardinalities: rows of each category's table.
    """

    dense: np.ndarray
    ids: np.ndarray
    label: np.ndarray
    cardinalities: tuple[int, ...]

    features = FEATURES

    def __len__(self) -> int:
        return len(self.label)

    @property
    def train_lines(self) -> range:
        """The first 80 % of the lines, to train on."""
        return range(len(self) * 4 // 5)

    @property
    def test_lines(self) -> range:
        """The last 20 % of the lines, to test on."""
        return range(len(self) * 4 // 5, len(self))

    def batches(self, batch_size: int, lines: range) -> Iterator[dict[str, Any]]:
        """Yield consecutive batches of `lines`; the last one holds what is left.

        A batch is {"dense": float32 [B, 13], "ids": {"C1": int64 [B], ...}, "label": float32 [B]},
        in arrays of its own.
        """
        for start in range(lines.start, lines.stop, batch_size):
            chosen = slice(start, min(start + batch_size, lines.stop))
            ids = self.ids[:, chosen].astype(np.int64)
            yield {
                "dense": self.dense[chosen].copy(),
                "ids": dict(zip(FEATURES, ids, strict=True)),
                "label": self.label[chosen].copy(),
            }


def read_criteo(path: str | os.PathLike[str], hashed_rows: Sequence[int] | None = None) -> CriteoLog:
    """Read a log of `lines` lines; see `CriteoLog` for the arrays.

    Args:
        path: the file, plain or compressed with gzip.
        hashed_rows: rows of each category's table, 26 numbers of 2 or more. A value's row is then
            a hash of it. Without them values are enumerated in the order of their appearance.

    Raises:
        ValueError: for a malformed line, naming the file, the line and what was expected there;
            for a file that breaks off inside its compressed data, or that holds no line.
    """
    path = Path(path)
    if hashed_rows is not None and (len(hashed_rows) != CATEGORIES or min(hashed_rows) < 2):
        raise ValueError(f"hashed_rows must be {CATEGORIES} numbers of 2 or more: {hashed_rows}")
    labels, dense, ids = [], [], []
    # One dictionary per field, from text to row; the missing value has row 0.
    rows_of_values: list[dict[bytes, int]] = [{b"": 0} for _ in FEATURES]
    for columns in _columns(path):
        labels.append(np.array(columns[0], np.float32))
        dense.append(np.stack([_dense(column) for column in columns[1 : 1 + DENSE_FEATURES]], 1))
        categories = columns[1 + DENSE_FEATURES :]
        if hashed_rows is None:
            ids.append(_enumerated(categories, rows_of_values))
        else:
            pairs = zip(categories, hashed_rows, strict=True)
            ids.append(np.stack([_hashed(column, rows) for column, rows in pairs]))
    if not labels:
        raise ValueError(f"{path}: line 1: expected {COLUMNS} columns, found the end of the file")
    return CriteoLog(
        dense=np.concatenate(dense),
        ids=np.concatenate(ids, axis=1),
        label=np.concatenate(labels),
        cardinalities=tuple(hashed_rows or (len(known) for known in rows_of_values)),
    )


def _dense(column: Sequence[bytes]) -> np.ndarray:
    """Map integers as text [B] to float32 [B]."""
    values = np.array([int(value) if value else 0 for value in column], np.float64)
    return np.log1p(np.maximum(values, 0.0)).astype(np.float32)


def _enumerated(categories: Sequence[Sequence[bytes]], rows_of_values: Sequence[dict[bytes, int]]) -> np.ndarray:
    """Map categories as text [26][B] to int32 [26, B], giving new values the next rows."""
    return np.array(
        [
            [known.setdefault(value, len(known)) for value in column]
            for known, column in zip(rows_of_values, categories, strict=True)
        ],
        np.int32,
    )


def _hashed(column: Sequence[bytes], rows: int) -> np.ndarray:
    """Map categories as text [B] to rows 1 to rows - 1, or 0 where missing, int32 [B]."""
    words = np.array([int(value, 16) if value else 0 for value in column], np.uint64)
    missing = np.array([not value for value in column])
    # The added constant is splitmix64's: without it the value 0 would be its own hash.
    hashed = mix_bits(words + np.uint64(0x9E3779B97F4A7C15)) % np.uint64(rows - 1)
    return np.where(missing, 0, hashed.astype(np.int64) + 1).astype(np.int32)


def _columns(path: Path) -> Iterator[list[tuple[bytes, ...]]]:
    """Yield the 40 columns of some lines at a time, each a tuple of texts [B]."""
    with _open(path) as file:
        lines = _checked_lines(path, file)
        while some := list(islice(lines, _LINES_AT_ONCE)):
            yield list(zip(*(line.split(b"\t") for line in some), strict=True))


def _checked_lines(path: Path, file: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines without their ends and in lower case."""
    number = 0
    try:
        for number, raw in enumerate(file, start=1):
            line = raw.rstrip(b"\r\n")
            if not _LINE.fullmatch(line):
                raise ValueError(f"{path}: line {number}: {_what_is_wrong(line)}")
            yield line.lower()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: line {number + 1}: expected more compressed data, found a truncated or damaged file ({error})"
        ) from error


def _what_is_wrong(line: bytes) -> str:
    """Say what was expected of a malformed line and what was found."""
    columns = line.split(b"\t")
    if len(columns) != COLUMNS:
        return f"expected {COLUMNS} columns separated by tabs, found {len(columns)}"
    expected = [
        ("label", _LABEL, "0 or 1"),
        *[(f"I{i + 1}", _INTEGER, "an integer or nothing") for i in range(DENSE_FEATURES)],
        *[(name, _CATEGORY, "1 to 16 hexadecimal digits or nothing") for name in FEATURES],
    ]
    for position, (text, (name, pattern, what)) in enumerate(zip(columns, expected, strict=True)):
        if not pattern.fullmatch(text):
            found = text.decode(errors="replace")
            return f"expected {what} in column {position + 1} ({name}), found {found!r}"
    raise AssertionError(f"a good line was taken for a bad one: {line!r}")


def _open(path: Path) -> IO[bytes]:
    """Open a plain or compressed file, told apart by gzip's first two bytes, not by the name."""
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(path, "rb")) if compressed else path.open("rb")
