"""Descriptions: an embedding table, the initial value of its rows, and tables stacked into a group."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import ml_dtypes
import numba
import numpy as np

from jaxcache import index
from jaxcache.index import mix

MAX_ROWS = 2**63 - 1
DTYPES = tuple(map(np.dtype, (np.float32, ml_dtypes.bfloat16, np.float16)))


class Initializer(Protocol):
    """Initial weights as a pure function of a row's place: equal arguments always give equal bits.

    Called with `stream`, an integer below 2**64 that stands for the store's seed and the table's name, `rows`, an
    `int64[N]` array of ids, and `table`; returns `float32[N, table.dim]`. It must compare by value: a frozen dataclass.
    """

    def __call__(self, stream: int, rows: np.ndarray, table: Table) -> np.ndarray: ...


@numba.njit(cache=True)
def _compiled_version():
    return index.VERSION


index.discard_stale(_compiled_version, __name__)


@numba.njit(cache=True, nogil=True)
def _fill_uniform(stream, rows, out):
    scale = np.float32(2.0**-24)
    for i in range(out.shape[0]):
        row = mix(np.uint64(stream) ^ mix(np.uint64(rows[i])))
        for j in range(out.shape[1]):
            bits = mix(row + np.uint64(j))
            out[i, j] = np.float32(bits >> np.uint64(40)) * scale


def _uniform_bits(stream: int, rows: np.ndarray, dim: int) -> np.ndarray:
    """Uniform numbers in [0, 1) with 24 random bits each, `float32[N, dim]`."""
    out = np.empty((len(rows), dim), np.float32)
    _fill_uniform(np.uint64(stream), np.asarray(rows, np.int64), out)
    return out


@dataclass(frozen=True)
class uniform:
    """Weights uniform in [-scale, scale); `scale=None` means 1 / sqrt(rows), as in the DLRM reference model.

    >>> bool(abs(uniform(0.5)(7, np.arange(3), Table(3, 4))).max() <= 0.5)
    True
    """

    scale: float | None = None

    def __call__(self, stream: int, rows: np.ndarray, table: Table) -> np.ndarray:
        scale = np.float32(1 / math.sqrt(table.rows) if self.scale is None else self.scale)
        weights = _uniform_bits(stream, rows, table.dim)
        weights *= 2 * scale
        weights -= scale
        return weights


@dataclass(frozen=True)
class normal:
    """Weights from a normal distribution with the given mean and standard deviation (Box & Muller 1958).

    >>> normal(0.1)(7, np.arange(3), Table(3, 4)).shape
    (3, 4)
    """

    standard_deviation: float = 1.0
    mean: float = 0.0

    def __call__(self, stream: int, rows: np.ndarray, table: Table) -> np.ndarray:
        bits = _uniform_bits(stream, rows, 2 * table.dim)
        radius = np.sqrt(-2 * np.log1p(-bits[:, : table.dim]))
        weights = radius * np.cos(np.float32(2 * np.pi) * bits[:, table.dim :])
        return weights * np.float32(self.standard_deviation) + np.float32(self.mean)


@dataclass(frozen=True)
class Table:
    """An embedding table: `rows` rows of `dim` weights, each with an initial value that needs no memory.

    Args:
        rows: number of rows, 1 to 2**63 - 1; ids run from 0 to rows - 1. A row costs memory once it was trained.
        dim: weights a row, at least 1.
        initializer: initial weights, see `Initializer`; `uniform()` by default.
        dtype: of the weights where they are kept: float32, bfloat16 or float16. The optimizer computes in float32 and
            keeps its state in float32, and `lookup` returns float32.
        rounding: how updated weights become 16 bits wide: "nearest", where steps much smaller than a weight are lost;
            or "stochastic", up or down with probabilities that keep the expectation (Gupta et al., ICML 2015).
        master_copy: whether a row keeps its weights in float32 beside those of `dtype`, as part of its state. Nothing
            is lost by rounding then, and a row takes more memory than one in float32 alone.
        optimizer: an optax transformation that treats rows apart; None for the one of the store.
        frozen: whether the table is read and never trained: no optimizer, no state, and nothing is written back.
        out_of_range: what becomes of an id outside 0 to rows - 1: "error", or "ignore", which treats it as padding
            (a row of zeros that is no part of its bag) and counts it in the report.

    Raises:
        ValueError: if an argument is none of the above, or if two of them contradict each other.

    >>> Table(10_000_000, 64).rows
    10000000
    """

    rows: int
    dim: int
    initializer: Initializer = uniform()
    dtype: Any = np.float32
    rounding: Literal["nearest", "stochastic"] = "nearest"
    master_copy: bool = False
    optimizer: Any = None
    frozen: bool = False
    out_of_range: Literal["error", "ignore"] = "error"

    def __post_init__(self):
        for name, value, most in (("rows", self.rows, MAX_ROWS), ("dim", self.dim, 2**31 - 1)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 1 <= value <= most:
                raise ValueError(f"Table({name}={value!r}): {name} must be an integer from 1 to {most:,}")
        object.__setattr__(self, "dtype", _checked_dtype(self.dtype))
        choices: dict[str, tuple[Any, Any]] = {
            "rounding": ("nearest", "stochastic"),
            "out_of_range": ("error", "ignore"),
            "master_copy": (False, True),
            "frozen": (False, True),
        }
        for name, (one, other) in choices.items():
            found = getattr(self, name)
            if type(found) is not type(one) or found not in (one, other):
                raise ValueError(f"Table({name}={found!r}): {name} must be {one!r} or {other!r}")
        if self.rounding == "stochastic" and (self.dtype == np.float32 or self.master_copy):
            why = "beside a master copy, from which nothing is lost" if self.master_copy else "of float32 weights"
            raise ValueError(f'Table(rounding="stochastic"): there is no rounding {why}')
        if self.master_copy and self.dtype == np.float32:
            raise ValueError("Table(master_copy=True): the weights are float32 themselves, set dtype to a narrower one")
        if self.frozen and (self.optimizer is not None or self.rounding == "stochastic" or self.master_copy):
            raise ValueError(
                "Table(frozen=True): a table that is never trained has no optimizer, no stochastic rounding and no "
                "master copy: leave them out"
            )


def _checked_dtype(dtype: Any) -> np.dtype:
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found not in DTYPES:
        raise ValueError(f"Table(dtype={dtype!r}): dtype must be float32, bfloat16 or float16")
    return found


@dataclass(frozen=True)
class Group:
    """Tables stacked into one: they share a buffer and an index, so capacity flows to the table that needs it.

    A row of the group has one 64-bit *key*, the number of rows in the tables before its own plus its id, kept as the
    bits of an `int64`. Compared by value, and hashable: it is static data of the pytrees.

    Attributes:
        names: names of the tables.
        tables: the tables, without their optimizers, which compare by identity.

    >>> group = Group.stack({"user": Table(10, 4), "item": Table(5, 4)})
    >>> group.keys(1, np.array([0, 4]))
    array([10, 14])
    >>> [part.tolist() for part in group.locate(np.array([9, 14]))]
    [[0, 1], [9, 4]]
    """

    names: tuple[str, ...]
    tables: tuple[Table, ...]

    @classmethod
    def stack(cls, tables: Mapping[str, Table]) -> Group:
        """Checks that `tables` can share a buffer and stacks them in their order.

        Raises:
            ValueError: without tables, for tables that cannot share a buffer, or for more than 2**64 - 1 rows in all.
            TypeError: for a name that is no string or a value that is no `Table`.
        """
        check_tables(tables)
        first, *others = tables
        for name in others:
            pairs = zip(_FORMAT, _format(tables[first]), _format(tables[name]), strict=True)
            different = [what for what, one, other in pairs if one != other]
            if different:
                raise ValueError(
                    f"tables {first!r} and {name!r} cannot be stacked, they differ in {', '.join(different)}: "
                    "stackable(tables) parts them into those that can"
                )
        if sum(int(table.rows) for table in tables.values()) >= 2**64:
            raise ValueError(
                "tables of one dim, dtype and optimizer hold 2**64 rows or more in all: give some an optimizer object "
                "of their own"
            )
        return cls(tuple(tables), tuple(replace(table, optimizer=None) for table in tables.values()))

    @property
    def name(self) -> str:
        """The name of its first table, by which the group is known."""
        return self.names[0]

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the weights, the same for all tables."""
        return self.tables[0].dtype

    @property
    def frozen(self) -> bool:
        """Whether its tables are never trained."""
        return self.tables[0].frozen

    @property
    def dim(self) -> int:
        """Weights a row, the same for all tables."""
        return self.tables[0].dim

    @property
    def rows(self) -> int:
        """Rows of all tables together."""
        return sum(int(table.rows) for table in self.tables)

    @cached_property
    def bases(self) -> np.ndarray:
        """The key of each table's first row, as `uint64[tables]`."""
        rows = [0]
        for table in self.tables[:-1]:
            rows.append(rows[-1] + int(table.rows))
        return np.array(rows, np.uint64)

    def index(self, name: str) -> int:
        """The position of a table. Raises KeyError with the known names."""
        if name not in self.names:
            raise KeyError(f"no table named {name!r}: the store has {', '.join(self.names)}")
        return self.names.index(name)

    def keys(self, table: int, ids: np.ndarray) -> np.ndarray:
        """Keys `int64[N]` of `ids`, which must be valid, in the table at position `table`."""
        return (np.asarray(ids).astype(np.uint64) + self.bases[table]).view(np.int64)

    def locate(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The table positions `int64[N]` and ids `int64[N]` behind `keys`."""
        unsigned = np.asarray(keys, np.int64).view(np.uint64)
        table = np.searchsorted(self.bases, unsigned, side="right") - 1
        return table, (unsigned - self.bases[table]).view(np.int64)

    def streams(self, seed: int) -> np.ndarray:
        """A number for each table that stands for the store's seed and the table's name, `uint64[tables]`."""
        return _streams(self.names, seed)

    def initial_weights(self, seed: int, keys: np.ndarray) -> np.ndarray:
        """The weights `float32[N, dim]` that the rows at `keys` have before any training."""
        table_of, ids = self.locate(keys)
        streams = self.streams(seed)
        weights = np.empty((len(ids), self.dim), np.float32)
        by_table = np.argsort(table_of.astype(np.int32), kind="stable")
        stops = np.cumsum(np.bincount(table_of, minlength=len(self.tables)))
        for position in np.flatnonzero(np.diff(stops, prepend=0)):
            here = by_table[stops[position - 1] if position else 0 : stops[position]]
            table = self.tables[position]
            initial = table.initializer(int(streams[position]), ids[here], table)
            if np.shape(initial) != (len(here), self.dim):
                raise ValueError(
                    f"the initializer of table {self.names[position]!r} returned shape {np.shape(initial)} for "
                    f"{len(here)} rows; it must return {(len(here), self.dim)}"
                )
            weights[here] = initial
        return weights


_FORMAT = ("dim", "dtype", "rounding", "master_copy", "frozen", "optimizer")


@functools.lru_cache
def _streams(names: tuple[str, ...], seed: int) -> np.ndarray:
    # The name, not the position: adding a table leaves the others as they were.
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    numbers = np.array([int.from_bytes(digest, "little") for digest in digests], np.uint64)
    streams = np.array([mix(mix(np.uint64(seed % 2**64)) ^ number) for number in numbers], np.uint64)
    streams.flags.writeable = False
    return streams


def _format(table: Table) -> tuple:
    """What tables that share a buffer have in common: `_FORMAT`."""
    # An optimizer is known by the object: two of optax.adam(1e-3) compare unequal.
    return (*(getattr(table, name) for name in _FORMAT[:-1]), id(table.optimizer))


def check_tables(tables: Mapping[str, Table]) -> None:
    """Raises ValueError without tables, and TypeError for a name that is no string or a value that is no `Table`."""
    if not tables:
        raise ValueError("a store needs at least one table: HostStore({'user': Table(rows, dim)}, ...)")
    for name, table in tables.items():
        if not isinstance(name, str) or not isinstance(table, Table):
            raise TypeError(f"tables must map names to Table(rows, dim); got {name!r}: {type(table).__name__}")


def stackable(tables: Mapping[str, Table]) -> list[dict[str, Table]]:
    """Parts `tables` into those that can share a buffer: equal in dim, dtype, rounding, and of the same optimizer.

    Groups and the tables in them keep the order of `tables`. Raises as `check_tables`.

    >>> tables = {"user": Table(9, 4), "city": Table(5, 2), "item": Table(7, 4)}
    >>> [list(part) for part in stackable(tables)]
    [['user', 'item'], ['city']]
    """
    check_tables(tables)
    parts: dict[tuple, dict[str, Table]] = {}
    for name, table in tables.items():
        parts.setdefault(_format(table), {})[name] = table
    return list(parts.values())


def widen_ids(ids: Any, feature: str) -> np.ndarray:
    """A new C-ordered `int64` array of `ids`, of the same shape: what is checked stays so, whoever writes into `ids`.

    Unsigned ids of 2**63 or more become negative. Raises TypeError for anything but integers.
    """
    array = np.asarray(ids)
    if array.size == 0:
        return np.zeros(array.shape, np.int64)  # an empty list has no dtype of its own
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"ids of feature {feature!r} are {array.dtype}; ids must be integers (ids.astype(np.int64))")
    return array.astype(np.int64, order="C")


def out_of_range(ids: np.ndarray, rows: int) -> np.ndarray:
    """Whether each of `ids` (`int64`) lies outside 0 to `rows` - 1."""
    # One unsigned comparison finds both: a negative id is a huge unsigned one.
    return ids.view(np.uint64) >= np.uint64(rows)


def id_error(ids: Any, place: int, feature: str, rows: int) -> ValueError:
    """The error that says which id is out of range: that of lookup `place` of `ids`."""
    return ValueError(
        f"feature {feature!r} has id {int(np.asarray(ids).reshape(-1)[place])} at lookup {place}; "
        f"ids must lie in 0 to {rows - 1} (Table(rows={rows}))"
    )


def check_ids(ids: Any, feature: str, rows: int) -> np.ndarray:
    """The `ids` as `widen_ids` returns them, all of them in range.

    Raises:
        TypeError: for anything but integers.
        ValueError: for a negative id, or one that is not below `rows`, naming the first and its place.
    """
    wide = widen_ids(ids, feature)
    wrong = out_of_range(wide.reshape(-1), rows)
    if wrong.any():
        raise id_error(ids, int(np.argmax(wrong)), feature, rows)
    return wide
