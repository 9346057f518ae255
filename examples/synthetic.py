"""Synthetic logs with labels from a planted model: clicks in the shape of Criteo's Kaggle log, and click histories.

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

# Histories. A user has one interest for each of these shares of the clicks that interests make, a category each.
INTEREST_SHARES = (0.5, 0.3, 0.2)
INTERESTED = 0.8  # share of a history's clicks that interests make; the others fall on any category
TARGET_INTERESTED = 0.5  # and of the items on offer
USER_EXPONENT = 0.8  # of the power laws by which users come, and items of a category are clicked
ITEM_EXPONENT = 1.2
AFFINITY_WEIGHT = 2.0
QUALITY_WEIGHT = 0.2


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
        return _calibrated(raw)

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


@dataclass(frozen=True)
class SequenceLog:
    """A log of users with their click histories, whose batch i is a pure function of (seed, i).

    A user's interests are a few categories, a hash of the user. Most clicks of a history are on items of these, and the
    item on offer is clicked more often if its category is among them: a history says what its user will click.

    Args:
        users: number of users.
        items: number of items. Those of category c are c, c + categories, c + 2 * categories, ..., in the order of
            their popularity.
        categories: number of categories.
        longest: most clicks in a history; each number of clicks from none to it is as likely.
        seed: of everything.
    """

    users: int = 600_000
    items: int = 400_000
    categories: int = 200
    longest: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.users, self.categories, self.longest) < 1 or self.items < self.categories:
            raise ValueError(f"users, categories and clicks must be 1 or more, and items as many as categories: {self}")

    def batches(self, batch_size: int, steps: int, start: int = 0) -> Iterator[dict[str, Any]]:
        """Yield `steps` batches, as `batch` returns them, from number `start` on."""
        for number in range(start, start + steps):
            yield self.batch(batch_size, number)

    def batch(self, batch_size: int, number: int) -> dict[str, Any]:
        """Return batch `number`, in arrays of its own.

        It is {"user": int64 [B], "item": int64 [B], "category": int64 [B], "history": int64 [B, longest],
        "history_categories": int64 [N], "history_offsets": int64 [B + 1], "label": float32 [B],
        "planted": float32 [B]}. A history holds items, and -1 where they end. The categories of the N items lie one
        history behind the other: sample b has those from `history_offsets[b]` to `history_offsets[b + 1]`. `planted`
        is the logit that the label was drawn from.
        """
        random = np.random.default_rng((self.seed, number))
        users, items, history, present = self._draw(random, batch_size)
        planted = self.planted_logit(users, items)
        label = random.random(batch_size) * (1.0 + np.exp(-planted)) < 1.0
        return {
            "user": users,
            "item": items,
            "category": self.category(items),
            "history": np.where(present, history, -1),
            "history_categories": self.category(history[present]),
            "history_offsets": np.concatenate([[0], np.cumsum(present.sum(axis=1))]),
            "label": label.astype(np.float32),
            "planted": planted.astype(np.float32),
        }

    def category(self, items: np.ndarray) -> np.ndarray:
        """Map items of any shape to their categories, int64."""
        return items % self.categories

    def interests(self, users: np.ndarray) -> np.ndarray:
        """Map users [B] to their interests, int64 [B, 3]: categories, of which two may be the same."""
        numbers = users[:, None] * len(INTEREST_SHARES) + np.arange(len(INTEREST_SHARES))
        return (self._hash(numbers, 0) % np.uint64(self.categories)).astype(np.int64)

    def planted_logit(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Return the planted logit, float64 [B], of users [B] and the items on offer [B].

        It adds the share of the user's interests that is the item's category, and the item's quality, a hash.
        """
        scale, bias = self._calibration
        return scale * self._raw_logit(users, items) + bias

    def _raw_logit(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        affinity = (self.interests(users) == self.category(items)[:, None]) @ np.array(INTEREST_SHARES)
        damping = 1.0 / np.sqrt(1.0 + items / DAMPING_RANK)
        return AFFINITY_WEIGHT * affinity + QUALITY_WEIGHT * damping * _centred(self._hash(items, 1) >> np.uint64(32))

    def _draw(self, random: np.random.Generator, count: int) -> tuple[np.ndarray, ...]:
        """Users [B], items on offer [B], items [B, longest], and which of these are clicks of the history, bool."""
        users = _ranks(random.random(count), np.array(self.users), USER_EXPONENT)
        items = self._items(random, users, 1, TARGET_INTERESTED)[:, 0]
        history = self._items(random, users, self.longest, INTERESTED)
        clicks = random.integers(self.longest + 1, size=count)
        return users, items, history, np.arange(self.longest) < clicks[:, None]

    def _items(self, random: np.random.Generator, users: np.ndarray, count: int, interested: float) -> np.ndarray:
        """Items for users [B], each of an interest of its user with chance `interested`, int64 [B, count]."""
        shape = (len(users), count)
        interest = np.searchsorted(np.cumsum(INTEREST_SHARES[:-1]), random.random(shape), side="right")
        own = np.take_along_axis(self.interests(users), interest, axis=1)
        category = np.where(random.random(shape) < interested, own, random.integers(self.categories, size=shape))
        items_of_category = (self.items - 1 - category) // self.categories + 1
        return category + self.categories * _ranks(random.random(shape), items_of_category, ITEM_EXPONENT)

    def _hash(self, numbers: np.ndarray, purpose: int) -> np.ndarray:
        """Hash numbers of any shape to words, uint64."""
        return mix_bits(numbers.astype(np.uint64) + self._keys[purpose])

    @cached_property
    def _keys(self) -> np.ndarray:
        return np.random.default_rng((self.seed, 0, 1)).integers(2**64, size=2, dtype=np.uint64)

    @cached_property
    def _calibration(self) -> tuple[float, float]:
        """Scale and bias that give the logits their spread and the labels their share."""
        users, items, _, _ = self._draw(np.random.default_rng((self.seed, 0, 2)), 8192)
        return _calibrated(self._raw_logit(users, items))


def _calibrated(raw: np.ndarray) -> tuple[float, float]:
    """Scale and bias by which logits [N] get the spread `LOGIT_DEVIATION` and a mean chance of `POSITIVE_SHARE`."""
    scale = LOGIT_DEVIATION / float(raw.std())
    low, high = -100.0, 100.0
    for _ in range(50):
        bias = (low + high) / 2
        share = (1.0 / (1.0 + np.exp(-(scale * raw + bias)))).mean()
        low, high = (bias, high) if share < POSITIVE_SHARE else (low, bias)
    return scale, low


class _PowerLaw:
    """A continuous power law x**-exponent on [1, ranks + 1), as the constants of its inverse CDF.

    A uniform number u maps to x = (1 + u * span) ** power.
    """

    def __init__(self, ranks: np.ndarray, exponents: np.ndarray) -> None:
        self.span = (ranks + 1.0) ** (1.0 - exponents) - 1.0
        self.power = 1.0 / (1.0 - exponents)


def _ranks(uniform: np.ndarray, rows: np.ndarray, exponent: float) -> np.ndarray:
    """Map uniform numbers in [0, 1) to ranks below `rows`, which broadcasts with them, by one power law, int64."""
    law = _PowerLaw(rows, np.array(exponent))
    ranks = ((1.0 + uniform * law.span) ** law.power).astype(np.int64) - 1
    return np.minimum(ranks, rows - 1)  # rounding can step over the edge


def mix_bits(words: np.ndarray) -> np.ndarray:
    """Hash uint64 words of any shape to as many uint64 words: the finaliser of splitmix64."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _centred(halves: np.ndarray) -> np.ndarray:
    """Map 32-bit numbers of any shape to float64 numbers of mean 0 and variance 1."""
    return (halves.astype(np.float64) * 2.0**-32 - 0.5) * math.sqrt(12.0)
