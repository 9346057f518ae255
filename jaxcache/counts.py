"""How often each row is looked up in a data set, for policies and schedules that know the hot rows beforehand."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from jaxcache.batches import Batch
from jaxcache.features import Feature, Features
from jaxcache.policies import static
from jaxcache.store import HostStore
from jaxcache.tables import Group, Table, stackable
from jaxcache.traces import read_ids


def count_ids(
    loader: Iterable[Any] | str | os.PathLike[str],
    tables: HostStore | Mapping[str, Table],
    ids: Callable[[Any], Mapping[str, Any]] = lambda batch: batch,
    features: Mapping[str, Feature] | None = None,
) -> dict[str, np.ndarray]:
    """Counts the lookups of each row over a loader or a file, one batch at a time in memory.

    The statistics behind the frequency-aware cache (Fang et al. 2022, arXiv 2208.05321) and FAE (Adnan et al., VLDB
    2022, arXiv 2103.00686). Where the data set is stationary, a part of it finds nearly the same hot rows:
    `itertools.islice(loader, n)`.

    The result takes 8 bytes a row of the tables. It is made once for a data set:
    `np.savez("counts.npz", **counts)`, and later `frequency(np.load("counts.npz"))`.

    Args:
        loader: an iterable of batches, such as `LookAhead` takes; a generator is used up, and training needs another
            one. Or the path of a file, which `traces.read_ids` then reads as batches: `.npz`, Parquet or Criteo.
        tables: a store, or its tables by name.
        ids: maps a batch to its ids, as for `LookAhead`: a mapping of names of features, or of tables, to integer
            arrays `[B, ...]` or `Bags`. By default the batch itself. Where training names or hashes what a file holds,
            it must do the same: `ids=lambda part: {"item": part["0"] % rows}`.
        features: by name, what the model looks up, as for `LookAhead`.

    Returns:
        For each table an array `int64[rows]`: how often each of its rows was looked up, repetitions within a batch
        counted. Tables that no batch names have zeros.

    Raises:
        TypeError, ValueError, KeyError: for anything that `LookAhead` refuses as ids: other types than integers, ids
            out of range, features of different lengths, unknown tables; for a file that cannot be read.
        MemoryError: if there is no room for the counts of a table.

    >>> batches = [{"user": np.array([3, 0, 3])}, {"user": np.array([[3], [1]])}]
    >>> count_ids(batches, {"user": Table(5, 16)})
    {'user': array([1, 1, 0, 3, 0])}
    """
    if isinstance(loader, str | os.PathLike):
        loader = read_ids(loader)
    if not isinstance(loader, Iterable):
        raise TypeError(f"count_ids(loader=...) needs an iterable of batches, got {type(loader).__name__}")
    by_name = tables.tables if isinstance(tables, HostStore) else tables
    groups = [Group.stack(part) for part in stackable(by_name)]
    counts = [[_zeros(name, int(table.rows)) for name, table in zip(g.names, g.tables, strict=True)] for g in groups]
    known = Features(groups, features)
    for content in loader:
        for lookups, counted in zip(Batch.read(content, ids, known, hold=False).lookups, counts, strict=True):
            for table, rows in lookups.by_feature():
                np.add.at(counted[table], rows, 1)
    found: dict[str, np.ndarray] = {}
    for group, counted in zip(groups, counts, strict=True):
        found.update(zip(group.names, counted, strict=True))
    return {name: found[name] for name in by_name}


def hottest_rows(counts: Mapping[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    """The rows that are looked up most, `number` of all tables together.

    Where all tables share one group, these are the rows that `static(counts)` pins at the start. It ranks the rows of
    each group by themselves: with several groups, take the counts of one group's tables and its slots at a time. Equal
    counts go by table and id; rows that are never looked up are left out.

    For `hot_batches` under `static(counts)`, `number` should stay below the slots by the unique rows of a mixed batch:
    rows that pass through take the slots of the coldest pinned rows.

    Args:
        counts: lookups of each row by name of table, integer arrays `[rows]`, such as `count_ids` returns.
        number: how many rows, at least 0.

    Returns:
        Ids of the chosen rows of each table, `int64[N]`, ascending.

    Raises:
        TypeError, ValueError: for counts that are no non-negative integers, or a negative number.

    >>> hottest_rows({"user": np.array([3, 0, 9]), "item": np.array([5, 1])}, 3)
    {'user': array([0, 2]), 'item': array([0])}
    """
    if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < 0:
        raise ValueError(f"hottest_rows(number={number!r}): number must be an integer, at least 0")
    policy = static(counts)  # which checks them
    group = Group.stack({name: Table(len(values), 1) for name, values in counts.items()})
    table, ids = group.locate(np.sort(policy.warm_keys(group, int(number))))
    return {name: ids[table == position] for position, name in enumerate(group.names)}


def _zeros(name: str, rows: int) -> np.ndarray:
    try:
        return np.zeros(rows, np.int64)
    except (MemoryError, ValueError) as error:  # ValueError: more bytes than addresses
        raise MemoryError(
            f"the counts of table {name!r} take 8 bytes a row, {8e-9 * rows:,.0f} GB: count a table of fewer rows"
        ) from error
