"""Named cases of the operations: shapes, dtypes, skews. One table for tests, benchmarks and lowering. NumPy alone."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np

from .xla import FUSED, Bags, Gradients, Slots

Skew = Literal["uniform", "power", "equal", "distinct", "hot"]


@dataclass(frozen=True)
class Case:
    """A case of the operations.

    Attributes:
        name: of the case.
        dim, dtype, slots: of the table.
        rows: the lookups are of so many rows.
        bags: lookups of each bag of each feature: a tuple of lengths for ragged bags; a pair (bags, lookups) for equal
            ones is written as `Equal`. Empty for a gather without pooling.
        lookups: without bags, their number.
        weighted: whether lookups have weights.
        skew: of the rows that are looked up: "uniform"; "power", with probabilities in proportion to rank**-1.05;
            "equal", one row alone; "distinct", each once; "hot", one row has 82 % of the lookups.
        padding: share of the lookups that stand for no row.
        optimizer: a name of `FUSED`.
        rounding: of weights of 16 bits: "nearest", "stochastic" or "master".
        measured: whether it is large, for benchmarks rather than tests.
    """

    name: str
    dim: int = 16
    dtype: str = "float32"
    slots: int = 400
    rows: int = 200
    bags: tuple[Equal | tuple[int, ...], ...] = ()
    lookups: int = 300
    weighted: bool = False
    skew: Skew = "uniform"
    padding: float = 0.05
    optimizer: str = "sgd"
    rounding: str = "nearest"
    measured: bool = False

    @property
    def total(self) -> int:
        """Number of lookups, padding included."""
        if not self.bags:
            return self.lookups
        return sum(b.bags * b.lookups if isinstance(b, Equal) else _padded(sum(b)) for b in self.bags)

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """What the optimizer keeps for a row, the master copy first; all float32."""
        kept = {"sgd": (), "rowwise_adagrad": ((1,),), "adam": ((self.dim,),) * 2}
        master = ((self.dim,),) if self.rounding == "master" else ()
        return (*master, *kept.get(self.optimizer, ((self.dim,),)))

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Of its optimizer, in the order of FUSED."""
        b1, b2 = 0.9, 0.999
        values = {
            "rate": -0.05, "decay": 0.9, "eps": 1e-7, "eps_root": 0.0,
            "b1": b1, "one_minus_b1": 1 - b1, "correction1": 1 - b1**3,
            "b2": b2, "one_minus_b2": 1 - b2, "correction2": 1 - b2**3,
        }  # fmt: skip
        return tuple(values[name] for name in FUSED[self.optimizer])


@dataclass(frozen=True)
class Equal:
    """So many bags with so many lookups each."""

    bags: int
    lookups: int


def _padded(lookups: int) -> int:
    return lookups + max(3, lookups // 10)


_LENGTHS = (0, 3, 1, 0, 7, 64, 65, 2, 0)
_Large = partial(Case, slots=2_000_000, rows=500_000, skew="power", padding=0.0, measured=True)

CASES: tuple[Case, ...] = (
    # Widths, a power of two or not, in each dtype and with each optimizer.
    Case("dim 4", dim=4),
    Case("dim 5, momentum", dim=5, optimizer="momentum"),
    Case("dim 12, adagrad", dim=12, optimizer="adagrad"),
    Case("dim 32, bfloat16, adam", dim=32, dtype="bfloat16", optimizer="adam"),
    Case("dim 48, rowwise adagrad", dim=48, optimizer="rowwise_adagrad"),
    Case("dim 64, float16, stochastic", dim=64, dtype="float16", rounding="stochastic", optimizer="adagrad"),
    Case("dim 100, bfloat16, stochastic, adam", dim=100, dtype="bfloat16", rounding="stochastic", optimizer="adam"),
    Case("dim 128, adam", dim=128, optimizer="adam"),
    Case("dim 128, bfloat16, master, momentum", dim=128, dtype="bfloat16", rounding="master", optimizer="momentum"),
    Case("dim 384, float16, rowwise adagrad", dim=384, dtype="float16", optimizer="rowwise_adagrad"),
    Case("dim 1000", dim=1000, slots=60, rows=40, lookups=80),
    Case("dim 1024, adagrad", dim=1024, slots=60, rows=40, lookups=80, optimizer="adagrad"),
    # Skews.
    Case("all lookups of one row", skew="equal", lookups=700),
    Case("all lookups of one row, 5,000", skew="equal", lookups=5000, optimizer="adagrad"),
    Case("all rows distinct", skew="distinct", rows=300),
    Case("one row has 82 %", skew="hot", lookups=2000, optimizer="rowwise_adagrad"),
    Case("3 rows, 16,384 lookups", rows=3, slots=5, lookups=16_384, optimizer="adagrad"),
    Case("one lookup", lookups=1, padding=0.0),
    Case("nothing but padding", padding=1.0),
    # Bags.
    Case("equal bags", bags=(Equal(40, 5),), skew="power"),
    Case("equal bags, weighted", dim=20, bags=(Equal(30, 4),), weighted=True, optimizer="adam"),
    Case("equal bags of 100", dim=64, bags=(Equal(7, 100),), skew="hot"),
    Case("ragged bags, some empty", bags=(_LENGTHS,), optimizer="rowwise_adagrad"),
    Case("ragged bags, weighted, bfloat16", dim=128, dtype="bfloat16", bags=(_LENGTHS,), weighted=True),
    Case("all bags empty", bags=((0,) * 9,)),
    Case("a bag of 10,000", bags=((2, 10_000, 0, 1),), skew="power", optimizer="adagrad"),
    Case("features of all kinds", dim=24, bags=(Equal(9, 3), _LENGTHS, Equal(9, 1)), weighted=True, skew="hot"),
    # To be measured: a DLRM with 26 features, its popular rows popular; histories; ScratchPipe's tables.
    _Large("DLRM, dim 16", dim=16, lookups=26 * 16_384, optimizer="rowwise_adagrad"),
    _Large("DLRM, dim 128", dim=128, lookups=26 * 16_384, optimizer="rowwise_adagrad"),
    _Large("DLRM, dim 128, bfloat16", dim=128, dtype="bfloat16", lookups=26 * 16_384, optimizer="adagrad",
           rounding="stochastic"),
    _Large("DLRM, dim 100, adam", dim=100, lookups=26 * 16_384, optimizer="adam"),
    _Large("8 tables, 20 lookups a bag, dim 128", dim=128, bags=(Equal(2048, 20),) * 8),
    _Large("8 tables, 20 lookups a bag, dim 128, uniform", dim=128, bags=(Equal(2048, 20),) * 8, skew="uniform"),
    _Large("one row has 82 %, 327,680 lookups", dim=128, lookups=327_680, skew="hot"),
)  # fmt: skip


def named(name: str) -> Case:
    """The case of that name."""
    return next(case for case in CASES if case.name == name)


class Problem:
    """A case with its arrays, NumPy, drawn from a seed. Rows differ in size by powers of ten: the order of a sum shows.

    Attributes:
        case: as given.
        slots: `int32[U]`, the place of each unique row, then padding.
        inverse, order, starts: as in `Gradients`.
        bags: of the features.
        weights: `float32[L]` or None.
    """

    def __init__(self, case: Case, seed: int = 0):
        self.case = case
        self._random = random = np.random.default_rng((zlib.crc32(case.name.encode()), seed))
        total = case.total
        self.bags, real = _bags(case)
        rows = _draw_rows(random, case, total)
        stands = np.concatenate([*real, np.ones(total - sum(map(len, real)), bool)])
        stands &= random.random(total) >= case.padding
        found, first, inverse = np.unique(rows[stands], return_index=True, return_inverse=True)
        rank = np.empty(len(found), np.int32)
        rank[np.argsort(first)] = np.arange(len(found))  # in order of first occurrence, as a plan has them
        unique = len(found) + max(2, len(found) // 8)
        self.inverse = np.full(total, unique, np.int32)
        self.inverse[stands] = rank[inverse]
        self.slots = np.full(unique, case.slots, np.int32)
        self.slots[: len(found)] = random.choice(case.slots, len(found), replace=False)
        self.order = np.argsort(self.inverse, kind="stable").astype(np.int32)
        counts = np.bincount(self.inverse, minlength=unique + 1)[:unique]
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        self.weights = random.uniform(0.5, 2, total).astype(np.float32) if case.weighted else None

    @cached_property
    def kept(self) -> Slots:
        """All that is kept in the slots."""
        random, case = self._random, self.case
        exact = self._rows(case.slots)
        weights = exact.astype(_dtype(case.dtype))
        state = [np.abs(random.normal(size=(case.slots, *s))).astype(np.float32) for s in case.state_shapes]
        if case.rounding == "master":
            state[0] = exact
        counts = random.integers(0, 9, case.slots).astype(np.int32)
        counts[::7] = 2**31 - 2
        return Slots(weights, tuple(state), counts, random.random(case.slots) < 0.5)

    @cached_property
    def gradients(self) -> Gradients:
        """Of what `gather`, or `pool`, returned."""
        case = self.case
        sources, base = [np.zeros(0, np.int32)], 0
        for feature in self.bags:
            owners = feature.owners
            if owners is None:
                owners = np.arange(feature.lookups, dtype=np.int32) // max(feature.lookups // max(feature.count, 1), 1)
            sources.append((owners + base).astype(np.int32))
            base += feature.count
        rows = self._rows(base if case.bags else case.total)
        return Gradients(
            rows, np.concatenate(sources) if case.bags else None, self.weights, self.inverse, self.order, self.starts
        )

    @cached_property
    def words(self) -> np.ndarray | None:
        """Random bits for stochastic rounding, `uint32[U, dim]`; None if the case does not round so."""
        if self.case.rounding != "stochastic":
            return None
        return self._random.integers(0, 2**32, (len(self.slots), self.case.dim), dtype=np.uint32)

    @cached_property
    def incoming(self) -> tuple[Any, ...]:
        """Rows for `exchange` at `slots`: a pytree as `kept` is."""
        random, kept = self._random, self.kept
        size = len(self.slots)

        def drawn(leaf):
            return random.normal(size=(size, *leaf.shape[1:])).astype(leaf.dtype)

        return Slots(drawn(kept.weights), tuple(map(drawn, kept.state)), np.zeros(size, np.int32), np.zeros(size, bool))

    def _rows(self, count: int) -> np.ndarray:
        sizes = 10.0 ** self._random.integers(-3, 4, (count, 1)) if not self.case.measured else 1.0
        return (self._random.standard_normal((count, self.case.dim), np.float32) * sizes).astype(np.float32)


def _bags(case: Case) -> tuple[tuple[Bags, ...], list[np.ndarray]]:
    """The features, and which of their lookups are in bags."""
    features, real = [], []
    for bag in case.bags:
        if isinstance(bag, Equal):
            features.append(Bags(bag.bags, bag.bags * bag.lookups))
            real.append(np.ones(bag.bags * bag.lookups, bool))
            continue
        lengths, lookups = np.array(bag), _padded(sum(bag))
        owners = np.full(lookups, len(lengths), np.int32)
        owners[: lengths.sum()] = np.repeat(np.arange(len(lengths)), lengths)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        features.append(Bags(len(lengths), lookups, owners, offsets))
        real.append(owners < len(lengths))
    return tuple(features), real


def _draw_rows(random: np.random.Generator, case: Case, lookups: int) -> np.ndarray:
    if case.skew == "distinct":
        return random.permutation(max(case.rows, lookups))[:lookups]
    if case.skew == "equal":
        return np.zeros(lookups, np.int64)
    if case.skew == "power":
        # The inverse of the distribution function of a continuous power law, rounded down.
        power = 1.0 - 1.05
        uniform = random.random(lookups)
        ranks = (1.0 + uniform * ((case.rows + 1.0) ** power - 1.0)) ** (1.0 / power)
        return np.minimum(ranks.astype(np.int64) - 1, case.rows - 1)
    rows = random.integers(0, case.rows, lookups)
    return np.where(random.random(lookups) < 0.82, 0, rows) if case.skew == "hot" else rows


def _dtype(name: str) -> np.dtype:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def problems(measured: bool = False) -> Iterator[Problem]:
    """All cases that are, or are not, to be measured, with their arrays."""
    return (Problem(case) for case in CASES if case.measured == measured)
