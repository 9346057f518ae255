"""One walk over every invariant of a cache and its store."""

from __future__ import annotations

import jax
import numpy as np

from jaxcache.state import CacheState, slot_keys
from jaxcache.store import HostStore


def check(state: CacheState, store: HostStore) -> None:
    """Verifies that a cache is sound and agrees with its store. For tests and for debugging: it reads the whole cache.

    Checked: the slot table is a bijection onto valid rows; clean rows equal the store's bit for bit, optimizer state
    included; dirty rows were looked up; free slots are untouched and their counts zero, so that no
    padding was ever written; the step counters fit together; after a flush nothing is dirty and the scalars are the
    store's.

    Args:
        state: not donated yet.
        store: the store that it caches. No write-back may be under way: check between steps after `flush`, or after the
            `with` block of the pipeline.

    Raises:
        AssertionError: naming the invariant and the first slot that violates it.
    """
    found: CacheState = jax.tree.map(np.asarray, state)

    def holds(condition, what: str, slots: np.ndarray | None = None) -> None:
        bad = np.flatnonzero(~np.atleast_1d(condition))
        if len(bad):
            place = bad if slots is None else slots[bad]
            raise AssertionError(f"violated: {what}" + (f" (slot {place[0]}, {len(bad)} in all)" if len(place) else ""))

    holds(state.group == store.group and state.optimizer == store.optimizer, "state and store have one configuration")
    holds(found.fault == CacheState.NO_FAULT, f"no fault was met, but fault is {found.fault}")
    holds((found.exchanged - found.step >= 0) & (found.exchanged - found.step <= 1), "an update follows an exchange")

    table = found.slot_table[:, 0]
    free = table == CacheState.FREE
    holds(free | ((table >= 0) & (table < len(store.group.tables))), "the slot table names known tables")
    holds(free <= (found.slot_table == CacheState.FREE).all(axis=1), "a free slot names no row")
    occupied, keys = slot_keys(store.group, found.slot_table)
    position, ids = store.group.locate(keys)
    rows = np.array([int(table.rows) for table in store.group.tables], np.uint64)
    holds(position == table[occupied], "ids lie inside their table", occupied)
    holds(ids.view(np.uint64) < rows[position], "ids lie inside their table", occupied)
    order = np.argsort(keys, kind="stable")
    twice = np.zeros(len(keys), bool)
    twice[order[1:]] = keys[order[1:]] == keys[order[:-1]]
    holds(~twice, "no row sits in two slots", occupied)

    holds(found.counts >= 0, "counts are not negative")
    holds(~free | (found.counts == 0), "a free slot has no lookups")
    holds(~free | ~found.dirty, "a free slot is not dirty")
    holds(~found.dirty | (found.counts > 0), "a dirty row was looked up")
    for leaf in jax.tree.leaves(found.buffer):
        holds(~free | ~leaf.reshape(len(leaf), -1).any(axis=1), "a free slot was never written")

    clean = ~found.dirty[occupied]
    home = store.read(keys[clean])
    for here, there in zip(jax.tree.leaves(found.buffer), jax.tree.leaves(home), strict=True):
        # A last axis of one element, which becomes its bytes: a row of a leaf may be a single number.
        one, other = (np.ascontiguousarray(leaf[..., np.newaxis]) for leaf in (here[occupied[clean]], there))
        same = one.view(np.uint8) == other.view(np.uint8)
        holds(same.all(axis=tuple(range(1, same.ndim))), "a clean row equals the store's bit for bit", occupied[clean])
    if not store.behind:
        holds(~found.dirty, "nothing is dirty after a flush")
        holds(found.step == store.step, "the store knows the step of the last flush")
        for here, there in zip(found.scalars, store.scalars, strict=True):
            holds(here == there, "the store has the scalars of the last flush")
