"""Batches as the pipeline holds them: their ids, their padded shapes, and whether somebody wrote into them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numba
import numpy as np

from jaxcache.index import mix
from jaxcache.state import Plan
from jaxcache.tables import Group, check_ids


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
class Batch:
    """A batch with its ids.

    Attributes:
        content: what the loader yielded.
        features: names in order.
        shapes: shape of each feature's ids, `(samples, ...)`.
        ids: valid ids, one feature after the other, `int64[L]`; none once they were observed.
        starts: where each feature starts in `ids`, and the end, `int64[F + 1]`.
        tables: position of each feature's table, `int64[F]`.
        samples: length of the first axis.
        held: NumPy arrays of the batch and its ids, held by reference.
        fingerprint: of `held`, as drawn.
        nbytes: bytes that the batch holds while it is ahead: all its arrays, and 4 for each lookup's position.
    """

    content: Any
    features: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    ids: np.ndarray
    starts: np.ndarray
    tables: np.ndarray
    samples: int
    held: list[np.ndarray]
    fingerprint: int
    nbytes: int

    @classmethod
    def read(
        cls, content: Any, ids: Callable[[Any], Mapping[str, Any]], group: Group, copy: bool = False, hold: bool = True
    ) -> Batch:
        """Takes the ids out of a batch and checks them. With `hold`, notes what the arrays of the batch hold.

        Raises:
            TypeError, ValueError, KeyError: for ids that are no mapping of features to integer arrays, for unknown
                features, ids out of range, scalars, or features of different lengths.
        """
        if copy:
            content = _copied(content)
        mapping = ids(content)
        if not isinstance(mapping, Mapping) or not mapping:
            raise TypeError(f"ids(batch) must return a mapping of feature names to ids, got {type(mapping).__name__}")
        tables = [group.index(name) for name in mapping]
        arrays = {name: _as_array(name, value) for name, value in mapping.items()}
        checked = [
            check_ids(array, name, int(group.tables[table].rows))
            for (name, array), table in zip(arrays.items(), tables, strict=True)
        ]
        lengths = {name: array.shape[0] if array.ndim else None for name, array in arrays.items()}
        if None in lengths.values() or len(set(lengths.values())) > 1:
            raise ValueError(f"every feature needs ids for the same samples, got lengths {lengths}")
        leaves = {id(leaf): leaf for leaf in [*jax.tree.leaves(content), *mapping.values()]}.values() if hold else []
        held = [leaf for leaf in leaves if isinstance(leaf, np.ndarray) and not leaf.dtype.hasobject]
        starts = np.cumsum([0, *(array.size for array in checked)])
        return cls(
            content=content,
            features=tuple(arrays),
            shapes=tuple(array.shape for array in arrays.values()),
            ids=np.concatenate([array.reshape(-1) for array in checked]),
            starts=starts,
            tables=np.array(tables),
            samples=next(iter(arrays.values())).shape[0],
            held=held,
            fingerprint=fingerprint(held),
            nbytes=sum(getattr(leaf, "nbytes", 0) for leaf in leaves) + 4 * int(starts[-1]),
        )

    @property
    def lookups(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What a planner observes: `ids`, `starts` and `tables`."""
        return self.ids, self.starts, self.tables

    def keys(self, group: Group) -> np.ndarray:
        """The key of each lookup in `group`, `int64[L]`."""
        return (self.ids.view(np.uint64) + np.repeat(group.bases[self.tables], np.diff(self.starts))).view(np.int64)

    def observed(self) -> Batch:
        """The batch without its ids."""
        return replace(self, ids=self.ids[:0].copy())

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


def _as_array(feature: str, ids: Any) -> np.ndarray:
    try:
        return np.asarray(ids)
    except ValueError as error:
        raise ValueError(f"the ids of feature {feature!r} are no array: {error}") from error


class Shapes:
    """What a compiled step may rely on: the full shape of a batch and a bound on its unique rows.

    Both only grow, so that the step is compiled anew a few times at most; the bound starts an eighth above the first
    batch's unique rows, rounded up coarsely so that another run over like batches finds its step compiled, and doubles.

    Attributes:
        unique_bound: the bound U.
        growths: how often shape or bound grew after the first batch.
    """

    def __init__(self, slots: int):
        self._slots = slots
        self._features: tuple[str, ...] | None = None
        self._full: tuple[tuple[int, ...], ...] = ()
        self._per_sample: list[bool] = []
        self.unique_bound = 0
        self.growths = 0

    def fit(self, batch: Batch, unique: int) -> None:
        """Grows to hold a batch. Raises ValueError if it has other features or other shapes a sample."""
        if self._features is None:
            self._features, self._full = batch.features, batch.shapes
            grain = max(128, 1 << max(unique.bit_length() - 4, 0))
            roomy = -(-(unique + unique // 8) // grain) * grain
            self.unique_bound = max(1, unique, min(roomy, self._lookups))
        elif batch.features != self._features or any(
            shape[1:] != full[1:] for shape, full in zip(batch.shapes, self._full, strict=True)
        ):
            raise ValueError(
                "every batch needs the same features in the same order, with the same number of ids a sample: "
                f"expected {self._features} with shapes like {self._full}, got {batch.features} with {batch.shapes}"
            )
        samples, bound = self._samples, self.unique_bound
        if batch.samples > samples:
            self._full = batch.shapes
        while bound < unique:
            bound *= 2
        bound = max(1, unique, min(bound, self._lookups))
        self.growths += batch.samples > samples or bound > self.unique_bound
        self.unique_bound = max(bound, self.unique_bound)
        if batch.samples == self._samples:
            self._per_sample = [_length(leaf) == batch.samples for leaf in jax.tree.leaves(batch.content)]

    @property
    def _samples(self) -> int:
        return self._full[0][0]

    @property
    def _lookups(self) -> int:
        return sum(int(np.prod(shape)) for shape in self._full)

    def plan(
        self, batch: Batch, inverse: np.ndarray, occurrences: np.ndarray, unique_slots: np.ndarray, step: int
    ) -> Plan:
        """The `Plan` of a batch, padded, as NumPy arrays. Arguments as in `planner.PlannedBatch`."""
        bound = self.unique_bound
        return Plan(
            unique_slots=padded(unique_slots, bound, self._slots),
            inverse=self._pad_lookups(batch, inverse, bound),
            occurrences=padded(occurrences, bound, 0),
            step=np.array(step, np.int32),
            samples=np.array(batch.samples, np.int32),
            shapes=tuple(zip(batch.features, self._full, strict=True)),
        )

    def _pad_lookups(self, batch: Batch, inverse: np.ndarray, filler: int) -> np.ndarray:
        if batch.shapes == self._full:
            return inverse
        out = np.full(self._lookups, filler, np.int32)
        start_in = start_out = 0
        for shape, full in zip(batch.shapes, self._full, strict=True):
            count, full_count = int(np.prod(shape)), int(np.prod(full))
            region = out[start_out : start_out + full_count].reshape(full)
            region[tuple(map(slice, shape))] = inverse[start_in : start_in + count].reshape(shape)
            start_in, start_out = start_in + count, start_out + full_count
        return out

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


def _length(leaf: Any) -> int | None:
    """Length of an array's first axis; None for a scalar or another object."""
    return leaf.shape[0] if getattr(leaf, "ndim", 0) else None


def padded(array: np.ndarray, size: int, filler: int) -> np.ndarray:
    """A new `[size, ...]` array that starts with `array` and goes on with `filler`."""
    out = np.full((size, *array.shape[1:]), filler, array.dtype)
    out[: len(array)] = array
    return out
