"""A synthetic click log in the shape of Criteo's Kaggle log, with labels from a planted model.

Every batch is a pure function of (seed, batch number): nothing is stored, a run repeats exactly,
and a test split is simply other batch numbers. The logit that the labels were drawn from comes with
each batch; its own AUC is the best that any model could reach.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

DENSE_FEATURES = 13

# Distinct values in the 26 categorical fields of the Criteo Kaggle log: 33,762,577 in all.
KAGGLE_CARDINALITIES = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194,
    27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)  # fmt: skip

# A lookup follows the steep law over the popular ranks, or else the flat one over all rows.
POPULAR_SHARE = 0.65
POPULAR_RANKS = (1e3, 1e5)
POPULAR_EXPONENTS = (1.2, 1.45)
FLAT_EXPONENTS = (0.92, 0.999)  # short of 1, where the inverse CDF takes another form

# The planted model. Its logit is scaled to the same spread and its labels to the same positive
# share for every seed, so that AUCs of different seeds compare.
POSITIVE_SHARE = 0.26
LOGIT_DEVIATION = 1.5
DENSE_WEIGHT = 2.0
PAIR_WEIGHT = 0.7
PAIRS = 10
# An id's part falls with its rank from about here on: a model can learn nothing about an id that it
# meets once.
DAMPING_RANK = 1000.0

# Fields of up to so many rows keep them when a log is scaled.
SMALL_FIELD = 100


def scaled_cardinalities(total_rows: int, cardinalities: Sequence[int] = KAGGLE_CARDINALITIES) -> tuple[int, ...]:
    """Scale the large fields of `cardinalities` so that all fields sum to `total_rows`.

    Fields of up to 100 rows stay as they are and no other shrinks below 100: a field of 3 values
    and one of millions put different loads on a cache, at any scale.
    """
    least = [min(rows, SMALL_FIELD) for rows in cardinalities]
    if total_rows < sum(least):
        raise ValueError(f"{total_rows} rows are too few for {len(least)} fields, which need {sum(least)}")

    def scaled(factor: float) -> list[int]:
        return [rows if rows <= SMALL_FIELD else max(SMALL_FIELD, int(rows * factor)) for rows in cardinalities]

    low, high = 0.0, total_rows / max(cardinalities) + 1.0
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(scaled(middle)) <= total_rows else (low, middle)
    result = scaled(low)
    result[result.index(max(result))] += total_rows - sum(result)  # what rounding left over
    return tuple(result)


@dataclass(frozen=True)
class ClickLog:
    """A log with one field per cardinality, whose batch i is a pure function of (seed, i)."""

    cardinalities: tuple[int, ...] = KAGGLE_CARDINALITIES
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.cardinalities) < 2 or min(self.cardinalities) < 1:
            raise ValueError(f"two or more fields, of a row or more each: {self.cardinalities}")
        if max(self.cardinalities) > 2**31:  # `ids` multiplies two numbers of this size
            raise ValueError(f"fields of at most 2**31 rows, got one of {max(self.cardinalities):,}")

    @property
    def features(self) -> tuple[str, ...]:
        """The names of the fields: C1, C2, ..."""
        return tuple(f"C{field + 1}" for field in range(len(self.cardinalities)))

    def batches(self, batch_size: int, steps: int, start: int = 0) -> Iterator[dict[str, Any]]:
        """Yield `steps` batches, as `batch` returns them, from number `start` on."""
        for number in range(start, start + steps):
            yield self.batch(batch_size, number)

    def batch(self, batch_size: int, number: int) -> dict[str, Any]:
        """Return batch `number`, in arrays of its own.

        It is {"dense": float32 [B, 13], "ids": {"C1": int64 [B], ...}, "label": float32 [B],
        "planted": float32 [B]}, where `planted` is the logit that the label was drawn from.
        """
        random = np.random.default_rng((self.seed, number))
        ranks = self.ranks(random.random((len(self.cardinalities), batch_size)))
        normal = random.standard_normal((batch_size, DENSE_FEATURES), dtype=np.float32)
        planted = self.planted_logit(normal, ranks)
        label = random.random(batch_size) * (1.0 + np.exp(-planted)) < 1.0
        return {
            # What criteo.py makes of a heavy-tailed count.
            "dense": np.log1p(np.exp(1.5 * normal)),
            "ids": dict(zip(self.features, self.ids(ranks), strict=True)),
            "label": label.astype(np.float32),
            "planted": planted.astype(np.float32),
        }

    def ranks(self, uniform: np.ndarray) -> np.ndarray:
        """Map uniform numbers [fields, B] in [0, 1) to ranks of popularity, int64 [fields, B].

        The rank is the inverse CDF of a continuous power law, rounded down, so that no memory
        grows with the rows. One number both chooses the law and is drawn through it.
        """
        popular, flat = self._laws
        is_popular = uniform < POPULAR_SHARE
        number = np.where(is_popular, uniform / POPULAR_SHARE, (uniform - POPULAR_SHARE) / (1 - POPULAR_SHARE))
        span = np.where(is_popular, popular.span, flat.span)
        power = np.where(is_popular, popular.power, flat.power)
        ranks = ((1.0 + number * span) ** power).astype(np.int64) - 1
        return np.minimum(ranks, self._rows - 1)  # rounding can step over the edge

    def ids(self, ranks: np.ndarray) -> np.ndarray:
        """Map ranks [fields, B] to ids, int64 [fields, B]: a bijection of every field's rows.

        The map is affine modulo the rows, with a multiplier coprime to them, and scatters the
        popular rows over the table.
        """
        multipliers, offsets = self._permutations
        return (ranks * multipliers + offsets) % self._rows

    def planted_logit(self, normal: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """Return the planted logit, float64 [B], of dense normals [B, 13] and ranks [fields, B].

        Every id has a weight and a factor, both a hash of (seed, field, rank). The logit adds the
        weights, products of factors for a few pairs of fields, and a function of the dense part.
        """
        scale, bias = self._calibration
        return scale * self._raw_logit(normal, ranks) + bias

    def _raw_logit(self, normal: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        keys, left, right, dense_weights = self._planted
        words = mix_bits(ranks.astype(np.uint64) + keys)
        damping = 1.0 / np.sqrt(1.0 + ranks / DAMPING_RANK)
        weights = damping * _centred(words >> np.uint64(32))
        factors = damping * _centred(words & np.uint64(0xFFFFFFFF))
        pairs = (factors[left] * factors[right]).sum(axis=0)
        dense = normal @ dense_weights + normal[:, 0] * normal[:, 1]
        return weights.sum(axis=0) + PAIR_WEIGHT * pairs + DENSE_WEIGHT * dense

    @cached_property
    def _calibration(self) -> tuple[float, float]:
        """Scale and bias that give the logits their spread and the labels their share."""
        random = np.random.default_rng((self.seed, 0, 4))
        ranks = self.ranks(random.random((len(self.cardinalities), 8192)))
        raw = self._raw_logit(random.standard_normal((8192, DENSE_FEATURES)), ranks)
        scale = LOGIT_DEVIATION / float(raw.std())
        low, high = -100.0, 100.0
        for _ in range(50):
            bias = (low + high) / 2
            share = (1.0 / (1.0 + np.exp(-(scale * raw + bias)))).mean()
            low, high = (bias, high) if share < POSITIVE_SHARE else (low, bias)
        return scale, low

    @cached_property
    def _rows(self) -> np.ndarray:
        """The cardinalities, int64 [fields, 1]."""
        return np.array(self.cardinalities, np.int64)[:, None]

    @cached_property
    def _laws(self) -> tuple[_PowerLaw, _PowerLaw]:
        """The law over the popular ranks and the one over all rows."""
        random = np.random.default_rng((self.seed, 0, 1))
        shape = (len(self.cardinalities), 1)
        fewest, most = POPULAR_RANKS
        popular_ranks = fewest * (most / fewest) ** random.random(shape)
        return (
            _PowerLaw(np.minimum(popular_ranks, self._rows), random.uniform(*POPULAR_EXPONENTS, shape)),
            _PowerLaw(self._rows, random.uniform(*FLAT_EXPONENTS, shape)),
        )

    @cached_property
    def _permutations(self) -> tuple[np.ndarray, np.ndarray]:
        """Multipliers and offsets of the affine maps, int64 [fields, 1] each."""
        random = np.random.default_rng((self.seed, 0, 2))
        multipliers = []
        for rows in self.cardinalities:
            multiplier = int(random.integers(rows)) or 1
            while math.gcd(multiplier, rows) != 1:
                multiplier += 1
            multipliers.append(multiplier)
        return np.array(multipliers, np.int64)[:, None], random.integers(self._rows)

    @cached_property
    def _planted(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Hash keys uint64 [fields, 1], the pairs' fields, and unit dense weights float32 [13]."""
        random = np.random.default_rng((self.seed, 0, 3))
        fields = len(self.cardinalities)
        keys = random.integers(2**64, size=(fields, 1), dtype=np.uint64)
        left = random.integers(fields, size=PAIRS)
        right = (left + random.integers(1, fields, size=PAIRS)) % fields  # never the field itself
        dense_weights = random.standard_normal(DENSE_FEATURES, dtype=np.float32)
        return keys, left, right, dense_weights / np.linalg.norm(dense_weights)


class _PowerLaw:
    """A continuous power law x**-exponent on [1, ranks + 1), as the constants of its inverse CDF.

    A uniform number u maps to x = (1 + u * span) ** power.
    """

    def __init__(self, ranks: np.ndarray, exponents: np.ndarray) -> None:
        self.span = (ranks + 1.0) ** (1.0 - exponents) - 1.0
        self.power = 1.0 / (1.0 - exponents)


def mix_bits(words: np.ndarray) -> np.ndarray:
    """Hash uint64 words of any shape to as many uint64 words: the finaliser of splitmix64."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _centred(halves: np.ndarray) -> np.ndarray:
    """Map 32-bit numbers of any shape to float64 numbers of mean 0 and variance 1."""
    return (halves.astype(np.float64) * 2.0**-32 - 0.5) * math.sqrt(12.0)
