"""Rows between a cache and its store outside of any step, a chunk at a time."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache import kernels
from jaxcache.batches import padded
from jaxcache.state import CacheState, Counters, GroupCache, GroupExchange, exchange_group, slot_entries, slot_keys
from jaxcache.store import HostStore, RowStore

_CHUNK_ROWS = 65_536  # moved at a time


def write_dirty_rows(cache: CacheState, store: HostStore) -> list[int]:
    """Writes every row that is newer in the cache home, and the optimizers' scalars and the step.

    Returns:
        How many rows that were in each group.
    """
    written = []
    for state, rows in zip(cache.groups, store.groups, strict=True):
        dirty = np.flatnonzero(np.array(state.dirty))
        occupied, keys = slot_keys(rows.group, np.array(state.slot_table))
        key_of = np.zeros(state.slots, np.int64)
        key_of[occupied] = keys
        size = min(_CHUNK_ROWS, state.slots)
        for first in range(0, len(dirty), size):
            slots = dirty[first : first + size]
            newest = _read_rows(state.buffer, padded(slots.astype(np.int32), size, state.slots))
            rows.write(key_of[slots], jax.tree.map(np.asarray, newest))
        written.append(len(dirty))
    scalars = tuple(tuple(np.array(scalar) for scalar in state.scalars) for state in cache.groups)
    store.catch_up(scalars, int(cache.step))
    return written


def cleaned(cache: CacheState) -> CacheState:
    """The cache with nothing dirty."""
    groups = []
    for state in cache.groups:
        dirty: Any = np.zeros(state.slots, bool)
        # Where it was, or the next step would be compiled anew.
        dirty = jax.device_put(dirty, state.dirty.sharding) if state.dirty.committed else jnp.asarray(dirty)
        groups.append(dataclasses.replace(state, dirty=dirty))
    return dataclasses.replace(cache, groups=tuple(groups))


def bring_in(state: GroupCache, store: RowStore, keys: np.ndarray, choice: kernels.Choice) -> GroupCache:
    """Fills the first slots of an empty group, which is donated, with the rows at `keys` (`int64[N]`)."""
    size = min(_CHUNK_ROWS, state.slots)
    zero = jnp.zeros((), jnp.int32)
    for first in range(0, len(keys), size):
        part = keys[first : first + size]
        exchange = GroupExchange(
            slots=padded(np.arange(first, first + len(part), dtype=np.int32), size, state.slots),
            slot_table=padded(slot_entries(store.group, part), size, GroupCache.FREE),
            rows=store.read(part, size),
        )
        contents, _ = _exchange_group(
            state.contents, Counters(zero, zero, zero), jax.tree.map(jnp.asarray, exchange), zero, choice
        )
        state = state.holding(contents)
    return state


_exchange_group = partial(jax.jit, static_argnums=4, donate_argnums=0)(exchange_group)
_read_rows = jax.jit(kernels.read)
