"""Packs samples whose rows are all hot into batches of their own, which need nothing from the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxcache import index
from jaxcache.batches import Batch
from jaxcache.features import Feature, Features
from jaxcache.index import ABSENT
from jaxcache.tables import MAX_ROWS, Group, Table


@dataclass
class HotReport:
    """Figures of one pass over `hot_batches`: of the samples drawn and the batches yielded so far.

    Attributes:
        samples: samples drawn from the loader.
        hot_samples: those whose ids are all hot.
        batches: batches yielded.
        hot_batches: those that hold hot samples only.

    >>> print(HotReport(samples=8, hot_samples=6, batches=2, hot_batches=1))
    6 of 8 samples hot (75.00%), 1 of 2 batches (50.00%)
    """

    samples: int = 0
    hot_samples: int = 0
    batches: int = 0
    hot_batches: int = 0

    @property
    def hot_sample_share(self) -> float:
        """Share of the samples that are hot; 0.0 before the first."""
        return self.hot_samples / self.samples if self.samples else 0.0

    @property
    def hot_batch_share(self) -> float:
        """Share of the batches that are hot; 0.0 before the first."""
        return self.hot_batches / self.batches if self.batches else 0.0

    def __str__(self) -> str:
        return (
            f"{self.hot_samples:,} of {self.samples:,} samples hot ({self.hot_sample_share:.2%}), "
            f"{self.hot_batches:,} of {self.batches:,} batches ({self.hot_batch_share:.2%})"
        )


class hot_batches:
    """A loader that yields the samples of another one in hot and in mixed batches, each sample once.

    A sample is hot if all its ids are. A batch is hot if all its samples are: with the hot rows in the cache it fetches
    nothing. The idea is FAE's (Adnan et al., "Accelerating recommendation system training by leveraging popular
    choices", VLDB 2022, arXiv 2103.00686), its input processor. FAE's shuffle scheduler trains blocks of hot batches
    and blocks of cold ones in turns and adapts their length to the test loss, because each turn copies the hot rows
    from one device to another. With one cache for both kinds a turn is free: here a batch is yielded as soon as it is
    full, so that hot and mixed ones alternate as the samples come, and nothing needs to be tuned.

    Batches have the size of the loader's first one. Samples of a kind stay in order; those of the rarer kind wait
    longer for a batch of theirs. What is left at the end, of each kind less than a batch, is joined, mixed samples
    first: so only the last batch can be short, and none is where the loader's are all full. Memory holds one such batch
    of each kind beside the one that was drawn. Mixed batches have more unique rows than the loader's, as cold samples
    come together in them: `slots` must hold theirs.

    It can be iterated as often as the loader can. Its batches hold new NumPy arrays, so the loader may write into its
    own again.

    Args:
        loader: an iterable of batches, pytrees of arrays `[B, ...]` whose first axis is the samples. B may differ from
            batch to batch.
        hot_rows: for each table its hot rows, as integer ids `[N]` in any order or as a mask `bool[rows]`; see
            `hottest_rows`. Takes about 32 to 64 bytes a hot row.
        ids: maps a batch to its ids, as for `LookAhead`: a mapping of feature names to integer arrays `[B, ...]`.
            By default the batch itself.
        features: by name, what the model looks up, as for `LookAhead`. An id that is padding is neither hot nor cold.

    Raises:
        TypeError, ValueError: for hot rows that are neither ids nor a mask. While iterating, for anything that
            `LookAhead` refuses as ids, for leaves without an axis of samples, and for batches that differ in structure,
            in the shape of a sample or in dtype.
        KeyError: for a feature whose table has no hot rows.

    >>> first = {"user": np.array([7, 1, 7]), "label": np.array([0, 1, 1])}
    >>> second = {"user": np.array([7]), "label": np.array([0])}
    >>> batches = hot_batches([first, second], {"user": [7]}, ids=lambda batch: {"user": batch["user"]})
    >>> for batch in batches:
    ...     print(batch)
    {'label': array([0, 1, 0]), 'user': array([7, 7, 7])}
    {'label': array([1]), 'user': array([1])}
    >>> print(batches.report())
    3 of 4 samples hot (75.00%), 1 of 2 batches (50.00%)
    """

    def __init__(
        self,
        loader: Iterable[Any],
        hot_rows: Mapping[str, Any],
        ids: Callable[[Any], Mapping[str, Any]] = lambda batch: batch,
        features: Mapping[str, Feature] | None = None,
    ):
        if not isinstance(loader, Iterable):
            raise TypeError(f"hot_batches(loader=...) needs an iterable of batches, got {type(loader).__name__}")
        if not isinstance(hot_rows, Mapping):
            raise TypeError(
                "hot_batches(hot_rows=...) needs a mapping of feature names to ids or masks, such as hottest_rows "
                f"returns; got {type(hot_rows).__name__}"
            )
        self._loader, self._ids = loader, ids
        self._report = HotReport()
        self._cells, tables = [], []
        for name, rows in hot_rows.items():
            hot, limit = _hot_ids(name, rows)
            cells = index.empty(len(hot))
            index.find_or_insert_all(cells, hot, 0, np.empty(len(hot), np.int64))
            self._cells.append(cells)
            tables.append(Table(limit, 1))
        # Names and limits of ids alone: nothing is stacked.
        self._features = Features([Group(tuple(hot_rows), tuple(tables))], features)

    def report(self) -> HotReport:
        """The figures of the latest pass so far, as a copy."""
        return dataclasses.replace(self._report)

    def __iter__(self) -> Iterator[Any]:
        self._report = report = HotReport()
        layout: _Layout | None = None
        for number, content in enumerate(self._loader):
            batch = Batch.read(content, self._known_ids, self._features, hold=False)
            if batch.samples == 0:
                continue
            found, leaves = _Layout.read(content, batch.samples, number)
            if layout is None:
                layout, size = found, batch.samples
                hot, mixed = _Pending(layout, size), _Pending(layout, size)
            elif found != layout:
                raise ValueError(
                    f"hot_batches packs samples of several batches together, and those of batch {number} are not like "
                    f"those of the first: expected {layout}, got {found}"
                )
            is_hot = self._are_hot(batch)
            report.samples += batch.samples
            report.hot_samples += int(np.count_nonzero(is_hot))
            for pending, chosen in ((hot, is_hot), (mixed, ~is_hot)):
                for full in pending.add(leaves, np.flatnonzero(chosen)):
                    yield layout.batch(full, report, pending is hot)
        if layout is not None:
            rest = [np.concatenate(pair) for pair in zip(mixed.filled(), hot.filled(), strict=True)]
            for start in range(0, mixed.samples + hot.samples, size):
                part = [leaf[start : start + size] for leaf in rest]
                yield layout.batch(part, report, start >= mixed.samples)

    def _known_ids(self, content: Any) -> Mapping[str, Any]:
        mapping = self._ids(content)
        if isinstance(mapping, Mapping) and (unknown := [name for name in mapping if name not in self._features]):
            raise KeyError(
                f"hot_batches(hot_rows=...) has no rows of feature {unknown[0]!r}: give it an empty list if none of "
                "them is hot"
            )
        return mapping

    def _are_hot(self, batch: Batch) -> np.ndarray:
        """Whether all ids of each sample are hot, `bool[samples]`."""
        (lookups,) = batch.lookups
        missed = [np.zeros(0, bool)]
        for table, ids in lookups.by_feature():
            found = np.empty(len(ids), np.int64)
            index.find_all(self._cells[table], ids, found)
            missed.append(found == ABSENT)
        cold = np.zeros(lookups.size, bool)
        cold[slice(None) if lookups.places is None else lookups.places] = np.concatenate(missed)
        hot, start = np.ones(batch.samples, bool), 0
        for feature in batch.features:
            if feature.bags is not None:
                raise ValueError(
                    f"hot_batches cannot take the ragged bags of feature {feature.name!r} apart into samples: pad them "
                    "to [B, L], with Feature(..., padding=...)"
                )
            here = cold[start : start + feature.lookups].reshape(feature.shape)
            hot &= ~here.any(axis=tuple(range(1, len(feature.shape))))
            start += feature.lookups
        return hot


def _hot_ids(feature: str, rows: Any) -> tuple[np.ndarray, int]:
    """The hot ids `int64[N]`, and what bounds the ids of the feature: the length of a mask."""
    array = np.asarray(rows)
    if array.ndim != 1:
        raise ValueError(f"hot_rows[{feature!r}] has shape {array.shape}; it must be ids [N] or a mask bool[rows]")
    if array.size == 0:
        return np.zeros(0, np.int64), MAX_ROWS  # an empty list has no dtype of its own
    if array.dtype == bool:
        return np.flatnonzero(array), len(array)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"hot_rows[{feature!r}] is {array.dtype}; it must be integer ids [N] or a mask bool[rows]")
    if array.min() < 0:
        raise ValueError(f"hot_rows[{feature!r}] has id {array.min()}; ids must be 0 or more")
    return array.astype(np.int64), MAX_ROWS


@dataclass(frozen=True)
class _Layout:
    """What the batches of a loader have in common: the pytree, and a sample's shape and dtype in each leaf."""

    structure: Any
    samples: tuple[tuple[tuple[int, ...], np.dtype], ...]

    @classmethod
    def read(cls, content: Any, samples: int, number: int) -> tuple[_Layout, list[np.ndarray]]:
        """The layout of a batch and its leaves as NumPy arrays."""
        paths, structure = jax.tree.flatten_with_path(content)
        leaves = [np.asarray(leaf) for _, leaf in paths]
        for (path, _), leaf in zip(paths, leaves, strict=True):
            if leaf.ndim == 0 or len(leaf) != samples:
                raise ValueError(
                    f"hot_batches cannot take batch {number} apart: leaf {jax.tree_util.keystr(path)} has shape "
                    f"{leaf.shape}, where the first axis must be that of the {samples} samples which the ids have"
                )
        return cls(structure, tuple((leaf.shape[1:], leaf.dtype) for leaf in leaves)), leaves

    def batch(self, leaves: list[np.ndarray], report: HotReport, hot: bool) -> Any:
        """A batch to yield, counted in `report`."""
        report.batches += 1
        report.hot_batches += hot
        return self.structure.unflatten(leaves)

    def __str__(self) -> str:
        samples = ", ".join(f"{dtype}{list(shape)}" for shape, dtype in self.samples)
        return f"{self.structure} of {samples}"


class _Pending:
    """Samples of one kind that do not fill a batch yet.

    Attributes:
        samples: how many.
    """

    def __init__(self, layout: _Layout, size: int):
        self._layout, self._size = layout, size
        self._start()

    def _start(self) -> None:
        self.samples = 0
        self._leaves = [np.empty((self._size, *shape), dtype) for shape, dtype in self._layout.samples]

    def filled(self) -> list[np.ndarray]:
        """The leaves of the samples, `[samples, ...]` each."""
        return [leaf[: self.samples] for leaf in self._leaves]

    def add(self, leaves: list[np.ndarray], chosen: np.ndarray) -> Iterator[list[np.ndarray]]:
        """Adds the samples at positions `chosen`, and yields each batch that they fill."""
        while len(chosen):
            room = self._size - self.samples
            now, chosen = chosen[:room], chosen[room:]
            for out, leaf in zip(self._leaves, leaves, strict=True):
                out[self.samples : self.samples + len(now)] = leaf[now]
            self.samples += len(now)
            if self.samples == self._size:
                full = self.filled()
                self._start()  # in new arrays: who got these keeps them
                yield full
