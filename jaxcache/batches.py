"""Batches as the pipeline holds them: their ids, their padded shapes, and whether somebody wrote into them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numba
import numpy as np

from jaxcache.features import FeatureIds, FeatureLayout, Features
from jaxcache.index import mix
from jaxcache.lookups import by_row
from jaxcache.state import GroupPlan, Plan
from jaxcache.tables import Group

_NO_IDS = np.zeros(0, np.int64)


@numba.njit(cache=True, nogil=True)
def _hash_words(words, value):
    # Four chains of multiplications that do not wait for each other.
    a, b, c, d = value, mix(value), ~value, mix(~value)
    whole = len(words) // 4 * 4
    for i in range(0, whole, 4):
        a, b, c, d = mix(a ^ words[i]), mix(b ^ words[i + 1]), mix(c ^ words[i + 2]), mix(d ^ words[i + 3])
    for i in range(whole, len(words)):
        a = mix(a ^ words[i])
    return mix(mix(mix(a ^ b) ^ c) ^ d)


def fingerprint(leaves: list[np.ndarray]) -> int:
    """A hash of the contents of arrays: equal unless, beyond all likelihood, something was written into them."""
    value = np.uint64(len(leaves))
    for leaf in leaves:
        data = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
        whole = len(data) // 8 * 8
        value = _hash_words(data[:whole].view(np.uint64), np.uint64(value))
        value = np.uint64(int(value) ^ zlib.crc32(data[whole:].tobytes()))
    return int(value)


@dataclass(frozen=True)
class Lookups:
    """The lookups of a batch in the tables of one group; V of its L ids look up a row.

    Attributes:
        ids: those that do, valid, one feature after the other, `int64[V]`; none once they were observed.
        starts: where each of the F features starts in `ids`, and the end, `int64[F + 1]`.
        tables: position of each feature's table, `int64[F]`.
        places: where each of `ids` is among the L, `int64[V]`; None if all look up a row.
        size: L.
    """

    ids: np.ndarray
    starts: np.ndarray
    tables: np.ndarray
    places: np.ndarray | None
    size: int

    @classmethod
    def join(cls, parts: Sequence[FeatureIds]) -> Lookups:
        """The lookups of the features of one group."""
        starts = np.cumsum([0, *(len(part.ids) for part in parts)])
        size = sum(part.layout.lookups for part in parts)
        places = None
        if any(part.present is not None for part in parts):
            present = [np.ones(len(part.ids), bool) if part.present is None else part.present for part in parts]
            places = np.flatnonzero(np.concatenate(present))
        ids = np.concatenate([_NO_IDS, *(part.ids for part in parts)]) if len(parts) != 1 else parts[0].ids
        return cls(ids, starts, np.array([part.table for part in parts], np.int64), places, size)

    def by_feature(self) -> Iterator[tuple[int, np.ndarray]]:
        """For each feature the position of its table, and those of `ids` that are its own."""
        for table, start, stop in zip(self.tables, self.starts, self.starts[1:], strict=False):
            yield int(table), self.ids[start:stop]

    def keys(self, group: Group) -> np.ndarray:
        """The key of each of `ids` in `group`, `int64[V]`."""
        return (self.ids.view(np.uint64) + np.repeat(group.bases[self.tables], np.diff(self.starts))).view(np.int64)


@dataclass(frozen=True)
class Batch:
    """A batch with its ids.

    Attributes:
        content: what the loader yielded.
        features: their layouts, in order.
        lookups: of each group.
        weights: of the ids of the features that have them, by name, `float32[L]`.
        bags: the bag of each id of the features whose bags are ragged, by name, `int32[L]`.
        ignored: ids that were out of range and left out, by feature, where there are any.
        samples: length of the first axis.
        held: NumPy arrays of the batch and its ids, held by reference.
        fingerprint: of `held`, as drawn.
        nbytes: bytes that the batch holds while it is ahead: all its arrays, and 4 for each lookup's position, 12
            where some look up nothing.
    """

    content: Any
    features: tuple[FeatureLayout, ...]
    lookups: tuple[Lookups, ...]
    weights: Mapping[str, np.ndarray]
    bags: Mapping[str, np.ndarray]
    ignored: Mapping[str, int]
    samples: int
    held: list[np.ndarray]
    fingerprint: int
    nbytes: int

    @classmethod
    def read(
        cls,
        content: Any,
        ids: Callable[[Any], Mapping[str, Any]],
        features: Features,
        copy: bool = False,
        hold: bool = True,
    ) -> Batch:
        """Takes the ids out of a batch and checks them. With `hold`, notes what the arrays of the batch hold.

        Raises:
            TypeError, ValueError, KeyError: for ids that are no mapping of features to what `Features.read` takes, or
                features of different lengths.
        """
        if copy:
            content = _copied(content)
        mapping = ids(content)
        if not isinstance(mapping, Mapping) or not mapping:
            raise TypeError(f"ids(batch) must return a mapping of feature names to ids, got {type(mapping).__name__}")
        parts = [features.read(name, value) for name, value in mapping.items()]
        lengths = {part.layout.name: part.layout.samples for part in parts}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"every feature needs ids for the same samples, got lengths {lengths}")
        drawn = [*jax.tree.leaves(content), *jax.tree.leaves(list(mapping.values()))] if hold else []
        leaves = {id(leaf): leaf for leaf in drawn}.values()
        held = [leaf for leaf in leaves if isinstance(leaf, np.ndarray) and not leaf.dtype.hasobject]
        by_group: list[list[FeatureIds]] = [[] for _ in features.groups]
        for part in parts:
            by_group[part.layout.group].append(part)
        lookups = tuple(map(Lookups.join, by_group))
        return cls(
            content=content,
            features=tuple(part.layout for part in parts),
            lookups=lookups,
            weights={part.layout.name: part.weights for part in parts if part.weights is not None},
            bags={part.layout.name: part.bags for part in parts if part.bags is not None},
            ignored={part.layout.name: part.ignored for part in parts if part.ignored},
            samples=parts[0].layout.samples,
            held=held,
            fingerprint=fingerprint(held),
            nbytes=sum(getattr(leaf, "nbytes", 0) for leaf in leaves)
            + sum(4 * part.size + (0 if part.places is None else part.places.nbytes) for part in lookups),
        )

    def observed(self) -> Batch:
        """The batch without its ids."""
        return replace(self, lookups=tuple(replace(part, ids=_NO_IDS) for part in self.lookups))

    def check_unchanged(self, number: int) -> None:
        """Raises RuntimeError if something wrote into the batch since it was drawn."""
        if fingerprint(self.held) != self.fingerprint:
            raise RuntimeError(
                f"batch {number} changed while it was held ahead: the loader writes into arrays that it has yielded. "
                "Yield fresh arrays, or let LookAhead(copy=True) copy each batch as it is drawn"
            )


def _copied(content: Any) -> Any:
    """The batch with copies of its NumPy arrays."""

    def copied(leaf: Any) -> Any:
        if type(leaf) is dict:  # in its own order, which jax.tree.map does not keep
            return {key: _copied(value) for key, value in leaf.items()}
        return leaf.copy() if isinstance(leaf, np.ndarray) else leaf

    return jax.tree.map(copied, content, is_leaf=lambda node: type(node) is dict)


class Shapes:
    """What a compiled step may rely on: the full shape of a batch and a bound on its unique rows of each group.

    They only grow, so that the step is compiled anew a few times at most; a bound starts an eighth above the first
    batch's number, rounded up coarsely so that another run over like batches finds its step compiled, and doubles. Ids
    in ragged bags have such a bound as well.

    Args:
        slots: of each group; what pads the slots of unique rows.

    Attributes:
        unique_bounds: the bound U of each group.
        growths: how often a shape or a bound grew after the first batch.
    """

    def __init__(self, slots: Sequence[int]):
        self._slots = slots
        self._full: tuple[FeatureLayout, ...] = ()
        self._per_sample: list[bool] = []
        self.unique_bounds: tuple[int, ...] = ()
        self.growths = 0

    def fit(self, batch: Batch, unique: Sequence[int]) -> None:
        """Grows to hold a batch with so many unique rows of each group.

        Raises:
            ValueError: if it has other features, or other shapes a sample, than the batches before.
        """
        first, before = not self._full, (self._full, self.unique_bounds)
        if not first and [_per_sample(part) for part in batch.features] != [_per_sample(part) for part in self._full]:
            raise ValueError(
                "every batch needs the same features in the same order, with the same number of ids a sample, and the "
                "same ones weighted or ragged: expected features like "
                f"{_described(self._full)}, got {_described(batch.features)}"
            )
        samples = max(batch.samples, 0 if first else self._samples)
        full = []
        for place, part in enumerate(batch.features):
            if part.bags is None:
                full.append(part._replace(shape=(samples, *part.shape[1:])))
            else:
                ids = part.shape[0]
                bound = roomy(ids) if first else doubled(self._full[place].shape[0], ids)
                full.append(part._replace(shape=(max(1, bound),), bags=samples))
        self._full = tuple(full)
        lookups = [0] * len(unique)
        for part in full:
            lookups[part.group] += part.lookups
        bounds = list(map(roomy, unique)) if first else list(map(doubled, self.unique_bounds, unique))
        # No more rows than lookups.
        self.unique_bounds = tuple(
            max(1, number, min(bound, most)) for bound, number, most in zip(bounds, unique, lookups, strict=True)
        )
        if not first:
            self.unique_bounds = tuple(map(max, self.unique_bounds, before[1]))
            self.growths += before != (self._full, self.unique_bounds)
        if batch.samples == self._samples:
            self._per_sample = [_length(leaf) == batch.samples for leaf in jax.tree.leaves(batch.content)]

    @property
    def _samples(self) -> int:
        return self._full[0].samples

    def plan(self, batch: Batch, rows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], step: int) -> Plan:
        """The `Plan` of a batch, padded, as NumPy arrays.

        Args:
            batch: that was fitted.
            rows: of each group the `inverse` and `occurrences` of `planner.Observed`, and the `unique_slots` of
                `planner.PlannedBatch`.
            step: the batch's number.
        """
        groups = []
        for group, ((inverse, occurrences, unique_slots), lookups) in enumerate(zip(rows, batch.lookups, strict=True)):
            bound = self.unique_bounds[group]
            if lookups.places is not None:
                some, inverse = inverse, np.full(lookups.size, bound, np.int32)
                inverse[lookups.places] = some
            inverse = self._pad_lookups(batch, group, inverse, bound)
            order, starts = by_row(inverse, occurrences, bound)
            groups.append(GroupPlan(padded(unique_slots, bound, self._slots[group]), inverse, order, starts))
        shapes = {part.name: (part.shape, full.shape) for part, full in zip(batch.features, self._full, strict=True)}
        bags = {name: _pad(array, *shapes[name], self._samples) for name, array in batch.bags.items()}
        return Plan(
            groups=tuple(groups),
            weights={name: _pad(array, *shapes[name], 0.0) for name, array in batch.weights.items()},
            bags=bags,
            offsets={name: _offsets(array, self._samples) for name, array in bags.items()},
            step=np.array(step, np.int32),
            samples=np.array(batch.samples, np.int32),
            features=self._full,
        )

    def _pad_lookups(self, batch: Batch, group: int, inverse: np.ndarray, filler: int) -> np.ndarray:
        if batch.features == self._full:
            return inverse
        parts, start = [np.zeros(0, np.int32)], 0
        for part, full in zip(batch.features, self._full, strict=True):
            if part.group == group:
                parts.append(_pad(inverse[start : start + part.lookups], part.shape, full.shape, filler))
                start += part.lookups
        return np.concatenate(parts)

    def pad(self, batch: Batch) -> Any:
        """The content of a batch; a short one gets zeros up to the full number of samples.

        That is, the arrays with an axis of samples do: those that had as many entries as samples in a full batch too.
        """
        if batch.samples == self._samples:
            return batch.content
        leaves, treedef = jax.tree.flatten(batch.content)
        per_sample = self._per_sample if len(self._per_sample) == len(leaves) else [True] * len(leaves)
        return treedef.unflatten(
            self._pad_leaf(leaf) if wanted and _length(leaf) == batch.samples else leaf
            for leaf, wanted in zip(leaves, per_sample, strict=True)
        )

    def _pad_leaf(self, leaf):
        wide = np.zeros((self._samples, *leaf.shape[1:]), leaf.dtype)
        wide[: len(leaf)] = leaf
        if isinstance(leaf, jax.Array):  # as it was placed, or the step would be compiled anew
            return jax.device_put(wide, leaf.sharding) if leaf.committed else jax.device_put(wide)
        return wide


def _per_sample(part: FeatureLayout) -> FeatureLayout:
    """The layout without what may differ between batches: the number of samples, and of ids in ragged bags."""
    return part._replace(shape=part.shape[1:], bags=None if part.bags is None else 0)


def _described(features: Sequence[FeatureLayout]) -> str:
    def kind(part: FeatureLayout) -> str:
        return f"{list(part.shape)}" + " ragged" * (part.bags is not None) + " weighted" * part.weighted

    return ", ".join(f"{part.name} {kind(part)}" for part in features)


def roomy(number: int) -> int:
    """A bound an eighth above `number`, rounded up coarsely."""
    grain = max(128, 1 << max(number.bit_length() - 4, 0))
    return -(-(number + number // 8) // grain) * grain


def doubled(bound: int, number: int) -> int:
    """`bound`, doubled until it holds `number`."""
    while bound < number:
        bound *= 2
    return bound


def _pad(flat: np.ndarray, shape: tuple[int, ...], full: tuple[int, ...], filler: float) -> np.ndarray:
    """The array of `shape`, padded to the shape `full`; both flat."""
    if shape == full:
        return flat
    out = np.full(full, filler, flat.dtype)
    out[tuple(map(slice, shape))] = flat.reshape(shape)
    return out.reshape(-1)


def _offsets(bags: np.ndarray, count: int) -> np.ndarray:
    """Where each of `count` bags begins, and where the last ends, `int32[count + 1]`, from the bag of each id."""
    return np.searchsorted(bags, np.arange(count + 1, dtype=bags.dtype)).astype(np.int32)


def _length(leaf: Any) -> int | None:
    """Length of an array's first axis; None for a scalar or another object."""
    return leaf.shape[0] if getattr(leaf, "ndim", 0) else None


def padded(array: np.ndarray, size: int, filler: int) -> np.ndarray:
    """A new `[size, ...]` array that starts with `array` and goes on with `filler`."""
    out = np.full((size, *array.shape[1:]), filler, array.dtype)
    out[: len(array)] = array
    return out
