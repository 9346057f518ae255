"""One walk over every invariant of a cache and its store."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache import slot_index
from jaxcache.state import CacheState, GroupCache, OnDemand, Residents, slot_keys
from jaxcache.store import HostStore, RowStore


def check(state: CacheState, store: HostStore) -> None:
    """Verifies that a cache is sound and agrees with its store. For tests and for debugging: it reads the whole cache.

    Checked: the slot table is a bijection onto valid rows; clean rows equal the store's bit for bit, optimizer state
    included; dirty rows were looked up; free slots are untouched and their counts zero, so that no
    padding was ever written; the step counters fit together; after a flush nothing is dirty and the scalars are the
    store's; in on-demand mode the index leads to every row, and the slots in use are the first ones.

    Args:
        state: not donated yet.
        store: the store that it caches. No write-back may be under way: check between steps after `flush`, or after the
            `with` block of the pipeline.

    Raises:
        AssertionError: naming the invariant and the first slot that violates it.
    """
    found: CacheState = jax.tree.map(np.asarray, state)
    _holds(found.fault == CacheState.NO_FAULT, f"no fault was met, but fault is {found.fault}")
    _holds((found.exchanged - found.step >= 0) & (found.exchanged - found.step <= 1), "an update follows an exchange")
    _holds(store.behind or found.step == store.step, "the store knows the step of the last flush")
    _holds(len(state.groups) == len(store.groups), "state and store have one configuration")
    for group, rows in zip(found.groups, store.groups, strict=True):
        _check_group(group, rows, store.behind)
    if found.on_demand is not None:
        mode = found.on_demand
        _holds(mode.pinned_after <= mode.admitted, "steps end after what they admit")
        _holds(mode.admitted == store.transfers.admitted, "the store has served what the cache has admitted")
        _holds(len(mode.residents) == len(found.groups), "state and store have one configuration")
        for group, residents in zip(found.groups, mode.residents, strict=True):
            _check_residents(group, residents, mode)


def _holds(condition, what: str, slots: np.ndarray | None = None) -> None:
    bad = np.flatnonzero(~np.atleast_1d(condition))
    if len(bad):
        place = bad if slots is None else slots[bad]
        raise AssertionError(f"violated: {what}" + (f" (slot {place[0]}, {len(bad)} in all)" if len(place) else ""))


def _check_group(found: GroupCache, store: RowStore, behind: bool) -> None:
    group = store.group
    _holds(found.group == group and found.optimizer == store.optimizer, "state and store have one configuration")
    table = found.slot_table[:, 0]
    free = table == GroupCache.FREE
    _holds(free | ((table >= 0) & (table < len(group.tables))), "the slot table names known tables")
    _holds(free <= (found.slot_table == GroupCache.FREE).all(axis=1), "a free slot names no row")
    occupied, keys = slot_keys(group, found.slot_table)
    position, ids = group.locate(keys)
    rows = np.array([int(table.rows) for table in group.tables], np.uint64)
    _holds(position == table[occupied], "ids lie inside their table", occupied)
    _holds(ids.view(np.uint64) < rows[position], "ids lie inside their table", occupied)
    order = np.argsort(keys, kind="stable")
    twice = np.zeros(len(keys), bool)
    twice[order[1:]] = keys[order[1:]] == keys[order[:-1]]
    _holds(~twice, "no row sits in two slots", occupied)

    _holds(found.counts >= 0, "counts are not negative")
    _holds(~free | (found.counts == 0), "a free slot has no lookups")
    _holds(~free | ~found.dirty, "a free slot is not dirty")
    _holds(~found.dirty | (found.counts > 0), "a dirty row was looked up")
    _holds(~found.dirty | (not group.frozen), "a frozen row is not dirty")
    for leaf in jax.tree.leaves(found.buffer):
        _holds(~free | (_bytes(leaf) == 0).all(axis=1), "a free slot was never written")

    clean = ~found.dirty[occupied]
    home = store.read(keys[clean])
    for here, there in zip(jax.tree.leaves(found.buffer), jax.tree.leaves(home), strict=True):
        same = (_bytes(here[occupied[clean]]) == _bytes(there)).all(axis=1)
        _holds(same, "a clean row equals the store's bit for bit", occupied[clean])
    if not behind:
        _holds(~found.dirty, "nothing is dirty after a flush")
        for one, other in zip(found.scalars, store.scalars, strict=True):
            _holds(one == other, "the store has the scalars of the last flush")


def _check_residents(found: GroupCache, residents: Residents, mode: OnDemand) -> None:
    in_use = np.arange(found.slots) < residents.used
    _holds((found.slot_table[:, 0] != GroupCache.FREE) == in_use, "the slots in use are the first ones")
    _holds(residents.stamps >= 0, "stamps are not negative")
    _holds(residents.stamps <= mode.admitted, "no row was wanted by an admit that is to come")
    _holds(in_use | (residents.stamps == 0), "a free slot was never wanted")
    _holds(residents.ranks.shape == ((found.slots,) if mode.order == "rank" else (0,)), "static ranks its rows")
    _holds(residents.ranks >= 0, "ranks are not negative")
    cells, claimed = residents.row_index
    _holds(np.count_nonzero(cells != slot_index.NONE) <= claimed, "claimed cells are counted")
    _holds((cells >= slot_index.NONE) & (cells < found.slots), "cells lead to slots")
    row_index, table, wanted = jax.tree.map(jnp.asarray, (residents.row_index, found.slot_table, in_use))
    slots = np.asarray(slot_index.find(row_index, table, table[:, 0], table[:, 2], wanted))
    _holds(slots[in_use] == np.flatnonzero(in_use), "the index leads to every row")


def _bytes(leaf: np.ndarray) -> np.ndarray:
    """The bytes of each row of a leaf, `uint8[N, bytes]`."""
    return np.ascontiguousarray(leaf).reshape(len(leaf), math.prod(leaf.shape[1:])).view(np.uint8)
