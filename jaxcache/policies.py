"""Policies: which row makes room when the cache is full. Small records made by factories.

A policy changes what is moved, never what is trained: every one gives the bits of training without a cache. A row that
the batches ahead want is kept as long as there are others; policies differ in how far ahead they look and in how they
rank the rows that nothing ahead wants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxcache.tables import Group


@dataclass(frozen=True, eq=False)
class Policy:
    """A policy as the planner reads it; made by the factories of this module.

    Attributes:
        name: the factory's name.
        order: which of the rows that no observed batch wants goes first: "recency", the least recently used one;
            "count", the one with the fewest lookups since it was fetched; "rank", the one with the fewest lookups in
            the data set; "aged", the one that the fewest batches used, old uses counting less. Ties go by recency.
        window: batches that a plan looks at, its own included; None leaves it to `LookAhead(window=...)`.
        counts: for "rank", lookups in the data set by name of table, each an integer array `[rows]`.
        warmup_ratio: share of the slots that the hottest rows fill at the start.
        passes: whether only the rows of the start stay, and every other is fetched anew each time it is used.
    """

    name: str
    order: Literal["recency", "count", "rank", "aged"]
    window: int | None = 1
    counts: Mapping[str, np.ndarray] | None = None
    warmup_ratio: float = 0.0
    passes: bool = False

    def group_counts(self, group: Group) -> np.ndarray:
        """`counts` of all rows of `group` by key, `int32[rows]`, at most 2**31 - 1 each; empty if there are none.

        Raises:
            ValueError: if a table has no counts, or not one for each row.
        """
        if self.counts is None:
            return np.zeros(0, np.int32)
        parts = []
        for name, table in zip(group.names, group.tables, strict=True):
            if name not in self.counts:
                raise ValueError(
                    f"{self.name}(counts) has no counts of table {name!r}, only of {', '.join(self.counts)}: "
                    f"give an integer array of shape ({table.rows},) for each table"
                )
            counts = self.counts[name]
            if counts.shape != (table.rows,):
                raise ValueError(
                    f"{self.name}(counts) has counts of shape {counts.shape} for table {name!r}, which has "
                    f"{table.rows:,} rows: give one count a row"
                )
            wide = counts.astype(np.promote_types(counts.dtype, np.uint32), copy=False)
            parts.append(np.minimum(wide, np.iinfo(np.int32).max).astype(np.int32))
        return np.concatenate(parts)

    def warm_keys(self, group: Group, slots: int) -> np.ndarray:
        """Keys `int64[N]` of the rows that the start brings in, hottest first; rows that were never looked up stay out.

        Equal counts go by key. O(rows), once.
        """
        counts = self.group_counts(group)
        number = min(int(slots * self.warmup_ratio), int(np.count_nonzero(counts)))
        if number == 0:
            return np.zeros(0, np.int64)
        hottest = counts >= np.partition(counts, len(counts) - number)[len(counts) - number]
        keys = np.flatnonzero(hottest)
        return keys[np.argsort(-counts[keys].astype(np.int64), kind="stable")][:number].astype(np.int64)


def lookahead() -> Policy:
    """Belady's rule in the window: the row whose next use is farthest goes first (IBM Systems Journal 5(2), 1966).

    Rows that the window does not want go before those it wants: the one that the fewest batches used first, where a use
    counts half once six times as many rows as there are slots were evicted since (frequencies that decay: Lee et al.,
    "LRFU", IEEE Transactions on Computers 50(12), 2001). With the whole future as window no policy fetches fewer
    rows. The default.

    >>> lookahead().name
    'lookahead'
    """
    return Policy("lookahead", "aged", window=None)


def scratchpipe() -> Policy:
    """ScratchPipe's rule: rows of three past and two future batches are held (Kwon & Rhu, ISCA 2022, arXiv 2205.04702).

    Among the others the least recently used one goes first. As rows of past batches were used last, they go last among
    those that the future batches do not want; where capacity is short, held rows go too.

    >>> scratchpipe().window
    3
    """
    return Policy("scratchpipe", "recency", window=3)


def lru() -> Policy:
    """The least recently used row goes first (Mattson et al., IBM Systems Journal 9(2), 1970).

    Nothing is known of the future.

    >>> lru().order
    'recency'
    """
    return Policy("lru", "recency")


def lfu() -> Policy:
    """The row with the fewest lookups since it was fetched goes first, the least recently used one of several.

    Least frequently used, as in Mattson et al., IBM Systems Journal 9(2), 1970.

    >>> lfu().order
    'count'
    """
    return Policy("lfu", "count")


def frequency(counts: Mapping[str, np.ndarray], warmup_ratio: float = 0.7) -> Policy:
    """Rows ranked by their lookups in the whole data set, the lowest goes first (Fang et al. 2022, arXiv 2208.05321).

    Args:
        counts: lookups of each row by name of table, integer arrays `[rows]`, such as `count_ids` returns.
        warmup_ratio: share of the slots that is filled with the hottest rows before the first step.

    Raises:
        TypeError, ValueError: for counts that are no non-negative integers, a ratio outside [0, 1].

    >>> from jaxcache.tables import Table
    >>> frequency({"user": np.array([3, 0, 9])}).warm_keys(Group.stack({"user": Table(3, 4)}), slots=2)
    array([2])
    """
    return Policy("frequency", "rank", counts=_checked(counts, "frequency"), warmup_ratio=_ratio(warmup_ratio))


def static(counts: Mapping[str, np.ndarray]) -> Policy:
    """The hottest rows are pinned; every other is fetched for each batch that uses it and taken home after.

    That is the static cache which FAE (Adnan et al., VLDB 2022, arXiv 2103.00686) builds on and ScratchPipe measures
    against. All slots are pinned at the start; as many of the coldest rows as one batch then needs slots for
    rows that pass through give theirs up for good.

    Args:
        counts: lookups of each row by name of table, integer arrays `[rows]`, such as `count_ids` returns.

    Raises:
        TypeError, ValueError: for counts that are no non-negative integers.

    >>> from jaxcache.tables import Table
    >>> static({"user": np.array([3, 0, 9])}).warm_keys(Group.stack({"user": Table(3, 4)}), slots=2)
    array([2, 0])
    """
    return Policy("static", "rank", counts=_checked(counts, "static"), warmup_ratio=1.0, passes=True)


def no_cache() -> Policy:
    """Every unique row of every batch is fetched and taken home: training that keeps its embeddings on the host.

    The hybrid of CPU and GPU that both papers measure against (ScratchPipe, section III). A row that two batches in
    a row use is home before it is fetched again, so nothing overlaps.

    >>> no_cache().passes
    True
    """
    return Policy("no_cache", "recency", passes=True)


def _checked(counts: Mapping[str, np.ndarray], factory: str) -> Mapping[str, np.ndarray]:
    if not isinstance(counts, Mapping) or not counts:
        raise TypeError(
            f"{factory}(counts) needs a mapping of table names to integer arrays [rows], such as count_ids returns; "
            f"got {type(counts).__name__}"
        )
    arrays = {}
    for name, values in counts.items():
        array = np.asarray(values)
        if array.ndim != 1:
            raise ValueError(
                f"{factory}(counts) has counts of shape {array.shape} for table {name!r}: give one count a row"
            )
        if not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"{factory}(counts): the counts of table {name!r} are {array.dtype}; they must be integers")
        if array.size and array.min() < 0:
            raise ValueError(f"{factory}(counts): table {name!r} has a negative count, {array.min()}")
        arrays[name] = array
    return arrays


def _ratio(warmup_ratio: float) -> float:
    if not isinstance(warmup_ratio, int | float) or not 0 <= warmup_ratio <= 1:
        raise ValueError(f"frequency(warmup_ratio={warmup_ratio!r}): it is a share of the slots, from 0 to 1")
    return float(warmup_ratio)
