"""Features: what a model looks up in the tables, id by id or pooled into bags. NumPy, no JAX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxcache.tables import Group, Table, id_error, out_of_range, widen_ids


class Bags(NamedTuple):
    """The ids of a feature with what belongs to them: a pytree that `ids(batch)` returns for it.

    Attributes:
        ids: integers `[B, ...]`, whose last axis is the bag; or with `offsets` integers `[N]`, bag after bag.
        offsets: integers `[B + 1]`, for ragged bags: bag b is `ids[offsets[b]:offsets[b + 1]]`; None otherwise.
        weights: a number for each id, of the shape of `ids`, with which its row counts; None for 1.

    >>> Bags(ids=np.array([7, 7, 9]), offsets=np.array([0, 2, 2, 3])).offsets[1:3]  # the second of 3 bags is empty
    array([2, 2])
    """

    ids: Any
    offsets: Any = None
    weights: Any = None


@dataclass(frozen=True)
class Feature:
    """A named input of the model: ids that look up a table. Several features may share a table.

    Args:
        table: name of the table.
        combiner: what becomes of the rows of a bag, the last axis of the ids: "sum" or "mean" of them, weighted if the
            batch has weights; None hands out each row. The mean divides by the sum of the weights.
        padding: an id that stands for nothing: it is no part of its bag, and a row of zeros without a combiner.

    Raises:
        TypeError, ValueError: for anything else.

    >>> Feature("item", combiner="mean", padding=-1).table
    'item'
    """

    table: str
    combiner: Literal["sum", "mean"] | None = None
    padding: int | None = None

    def __post_init__(self):
        if not isinstance(self.table, str):
            raise TypeError(f"Feature(table={self.table!r}): table must be the name of a table")
        if self.combiner not in (None, "sum", "mean"):
            raise ValueError(f'Feature(combiner={self.combiner!r}): combiner must be "sum", "mean" or None')
        if self.padding is not None:
            if isinstance(self.padding, bool) or not isinstance(self.padding, int | np.integer):
                raise TypeError(f"Feature(padding={self.padding!r}): padding must be an integer id or None")
            if not -(2**63) <= self.padding < 2**63:
                raise ValueError(f"Feature(padding={self.padding!r}): padding must fit 64 bits")


class FeatureLayout(NamedTuple):
    """What a compiled step relies on: static data of a `Plan`.

    Attributes:
        name: the feature's name.
        group: position of its table's group.
        combiner: "sum", "mean" or None.
        shape: of its ids: `(B, ...)`, or `(N,)` for ragged bags.
        bags: number of ragged bags; None for ids `(B, ...)`.
        weighted: whether its ids have weights.
    """

    name: str
    group: int
    combiner: str | None
    shape: tuple[int, ...]
    bags: int | None = None
    weighted: bool = False

    @property
    def samples(self) -> int:
        """B."""
        return self.shape[0] if self.bags is None else self.bags

    @property
    def lookups(self) -> int:
        """Number of its ids, those that stand for nothing included."""
        size = 1
        for length in self.shape:
            size *= length
        return size

    def result(self, dim: int) -> tuple[int, ...]:
        """The shape of what `lookup` returns."""
        if self.bags is not None:
            return (self.bags, dim)
        return (*(self.shape if self.combiner is None else self.shape[:1] + self.shape[1:-1]), dim)


class FeatureIds(NamedTuple):
    """The ids of one feature in one batch, checked. L is their number, V that of those which look up a row.

    Attributes:
        layout: their shape and what is done with them.
        table: position of the table in its group.
        ids: `int64[V]`, those that look up a row, valid.
        present: `bool[L]`, which ones do; None if all.
        weights: `float32[L]`, or None.
        bags: `int32[L]`, the bag of each id if they are ragged, or None.
        ignored: number of ids left out because they are out of range.
    """

    layout: FeatureLayout
    table: int
    ids: np.ndarray
    present: np.ndarray | None
    weights: np.ndarray | None
    bags: np.ndarray | None
    ignored: int


class Features:
    """The features of a model over the tables of a store: which table each one looks up, and what it does.

    A name that is not among `features` and is the name of a table is a feature of that table, without a combiner.

    Raises:
        TypeError: for values that are no `Feature`.
        KeyError: for a feature of an unknown table.
    """

    def __init__(self, groups: Sequence[Group], features: Mapping[str, Feature] | None = None):
        self.groups = tuple(groups)
        self._places = {
            name: (number, position) for number, group in enumerate(groups) for position, name in enumerate(group.names)
        }
        if features is not None and not isinstance(features, Mapping):
            raise TypeError(
                'features must map names to features, such as {"history": jc.Feature("item", "mean")}; '
                f"got {type(features).__name__}"
            )
        self._features = dict(features or {})
        for name, feature in self._features.items():
            if not isinstance(name, str) or not isinstance(feature, Feature):
                raise TypeError(f"features must map names to Feature(table, ...); got {name!r}: {feature!r}")
            if feature.table not in self._places:
                raise KeyError(
                    f"feature {name!r} looks up table {feature.table!r}: the store has {', '.join(self._places)}"
                )

    def __contains__(self, name: object) -> bool:
        """Whether there is a feature of that name, or a table."""
        return name in self._features or name in self._places

    def locate(self, name: str) -> tuple[Feature, int, int]:
        """The feature of that name, the position of its table's group, and of the table in it.

        Raises:
            KeyError: if there is none.
        """
        if name not in self:
            known = [*self._features, *(table for table in self._places if table not in self._features)]
            raise KeyError(f"no feature or table named {name!r}: there are {', '.join(known)}")
        feature = self._features.get(name) or Feature(name)
        return feature, *self._places[feature.table]

    def read(self, name: str, value: Any) -> FeatureIds:
        """Checks what a batch holds for a feature: an integer array `[B, ...]`, or `Bags`.

        Raises:
            KeyError: for an unknown feature.
            TypeError, ValueError: for ids that are no integers or out of range, offsets that do not add up, weights
                of another shape than the ids, and bags without a combiner.
        """
        feature, group, position = self.locate(name)
        table = self.groups[group].tables[position]
        bags = value if isinstance(value, Bags) else Bags(value)
        array = _as_array(name, bags.ids)
        ids, present, ignored = _present(array, name, feature, table)
        if array.ndim == 0:
            raise ValueError(
                f"every feature needs ids for each sample, [B, ...]; those of {name!r} are a single number"
            )
        number, bag_of = None, None
        if bags.offsets is not None:
            number, bag_of = _read_offsets(name, array, bags.offsets)
        weights = None if bags.weights is None else _read_weights(name, array, bags.weights)
        check_combiner(name, feature, bag_of is not None, weights is not None)
        layout = FeatureLayout(name, group, feature.combiner, array.shape, number, weights is not None)
        return FeatureIds(layout, position, ids, present, weights, bag_of, ignored)


def check_combiner(name: str, feature: Feature, ragged: bool, weighted: bool) -> None:
    """Raises ValueError for ragged bags or weights of a feature without a combiner."""
    if feature.combiner is None and (ragged or weighted):
        raise ValueError(
            f"feature {name!r} has {'ragged bags' if ragged else 'weights'} and no combiner: name one, "
            f'Feature({feature.table!r}, combiner="sum")'
            + (", or pad the ids to [B, L] and set padding" if ragged else "")
        )


def _as_array(name: str, ids: Any) -> np.ndarray:
    try:
        return np.asarray(ids)
    except ValueError as error:
        raise ValueError(f"the ids of feature {name!r} are no array: {error}") from error


def _present(array: np.ndarray, name: str, feature: Feature, table: Table) -> tuple[np.ndarray, np.ndarray | None, int]:
    """The ids that look up a row, which ones they are (None if all), and how many were out of range."""
    rows = int(table.rows)
    ids = widen_ids(array, name).reshape(-1)
    left_out = wrong = out_of_range(ids, rows)
    # An unsigned id of 2**63 or more looks negative here, and is no padding.
    if feature.padding is not None and (feature.padding >= 0 or array.dtype != np.uint64):
        padding = ids == feature.padding
        left_out, wrong = left_out | padding, left_out & ~padding
    if not left_out.any():
        return ids, None, 0
    ignored = int(np.count_nonzero(wrong))
    if ignored and table.out_of_range == "error":
        raise id_error(array, int(np.argmax(wrong)), name, rows)
    present = ~left_out
    return ids[present], present, ignored


def _read_offsets(name: str, ids: np.ndarray, offsets: Any) -> tuple[int, np.ndarray]:
    """The number of bags, and the bag of each id."""
    offsets = np.asarray(offsets)
    if ids.ndim != 1:
        raise ValueError(f"feature {name!r} has offsets and ids of shape {ids.shape}: ragged ids are one axis [N]")
    if offsets.ndim != 1 or len(offsets) == 0 or not np.issubdtype(offsets.dtype, np.integer):
        raise ValueError(
            f"the offsets of feature {name!r} are {offsets.dtype}{list(offsets.shape)}; they must be integers [B + 1], "
            "where each bag starts, and the end"
        )
    lengths = np.diff(offsets.astype(np.int64))
    if offsets[0] != 0 or offsets[-1] != len(ids) or (lengths < 0).any():
        problem = (
            f"start at {offsets[0]}, not at 0"
            if offsets[0] != 0
            else f"decrease behind bag {int(np.argmax(lengths < 0))}"
            if (lengths < 0).any()
            else f"end at {offsets[-1]}, and there are {len(ids)} ids"
        )
        raise ValueError(
            f"the offsets of feature {name!r} {problem}: bag b is ids[offsets[b]:offsets[b + 1]], so they must rise "
            "from 0 to the number of ids"
        )
    return len(lengths), np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)


def _read_weights(name: str, ids: np.ndarray, weights: Any) -> np.ndarray:
    weights = np.asarray(weights)
    if weights.shape != ids.shape:
        raise ValueError(
            f"the weights of feature {name!r} have shape {weights.shape} and its ids {ids.shape}: give one weight an id"
        )
    if weights.size and (weights.dtype == bool or not np.can_cast(weights.dtype, np.float64, "same_kind")):
        raise TypeError(f"the weights of feature {name!r} are {weights.dtype}; they must be real numbers")
    with np.errstate(over="ignore"):
        narrow = weights.astype(np.float32).reshape(-1)
    if np.isinf(narrow).any() and not np.isinf(weights).any():
        raise ValueError(f"the weights of feature {name!r} do not fit float32: {np.abs(weights).max()} is the largest")
    return narrow
