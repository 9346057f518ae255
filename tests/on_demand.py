"""The training of `training.py` in on-demand mode, with programs that many tests share, and the invariants of a cache.

A program holds its store as a constant: a shared store is made new in place, so that nothing is compiled again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import numpy as np

import jaxcache as jc
from jaxcache import slot_index
from jaxcache.state import GroupCache
from training import OPTIMIZERS, ROWS, TABLES, dense_start, loss_function, make_store

COUNTS = {name: np.arange(ROWS)[::-1] // 3 for name in TABLES}  # for `static`
POLICIES: dict[str, Callable[[], jc.Policy]] = {"lru": jc.lru, "lfu": jc.lfu, "static": lambda: jc.static(COUNTS)}

_shared: dict[str, jc.HostStore] = {}


def renewed(store: jc.HostStore, optimizer: Any = None) -> jc.HostStore:
    """The same object as if it had just been made."""
    store.__dict__.update(jc.HostStore(store.tables, optimizer, store.seed).__dict__)
    return store


def shared_store(optimizer: str) -> jc.HostStore:
    """The one store of an optimizer of `training.py`, as if it had just been made."""
    if optimizer not in _shared:
        _shared[optimizer] = make_store(optimizer)
    return renewed(_shared[optimizer], OPTIMIZERS[optimizer]())


def model_step(cache, plan, dense, labels):
    """What `training.train_step` does, but kept apart from what is around it: XLA rounds as it fuses.

    And with a mask that is no constant, which XLA would take into account.
    """
    rows = jc.lookup(cache, plan)
    loss, (gradient, row_gradients) = jax.value_and_grad(loss_function, argnums=(0, 1))(dense, rows, labels, plan.mask)
    return jc.update(cache, plan, row_gradients), dense - 0.1 * gradient, loss


train_step = partial(jax.jit, donate_argnums=(0, 2))(model_step)


def train_ahead(optimizer: str, batches, slots: int | str) -> tuple[list[float], list[np.ndarray]]:
    """The same training with a `LookAhead`: losses, and all rows."""
    store, dense, losses = make_store(optimizer), dense_start(), []
    with jc.LookAhead(store, batches, ids=lambda batch: batch["ids"], slots=slots) as ahead:
        cache = ahead.start()
        for batch, plan in ahead:
            cache, dense, loss = train_step(ahead.exchange(cache, plan), plan, dense, batch["labels"])
            losses.append(loss)
        ahead.flush(cache)
    return [float(loss) for loss in losses], rows_and_state(store)


@cache
def programs(optimizer: str, fetch_bound: int | None = None, split: bool = False, prefetches: bool = False) -> Any:
    """A train step `(cache, dense), (ids, labels, ids of the next) -> (cache, dense), loss`, and a scan over it.

    Args:
        optimizer: of the store.
        fetch_bound: of `admit` and `prefetch`.
        split: whether each feature has an `admit` of its own.
        prefetches: whether the ids of the next step are prefetched.
    """
    store = shared_store(optimizer)

    def step(carry, inputs):
        (cache, dense), (ids, labels, following) = carry, inputs
        plans = []
        for part in [{name: value} for name, value in ids.items()] if split else [ids]:
            cache, plan = jc.admit(cache, store, part, fetch_bound=fetch_bound)
            plans.append(plan)
        if prefetches:
            cache = jc.prefetch(cache, store, following, fetch_bound=fetch_bound)
        plan = jc.merge(cache, plans) if split else plans[0]
        cache, dense, loss = model_step(cache, plan, dense, labels)
        return (cache, dense), loss

    return jax.jit(step, donate_argnums=0), partial(jax.jit, donate_argnums=0)(partial(jax.lax.scan, step))


def stacked(batches, following=None) -> tuple:
    """Batches as `step` takes them, one behind the other; `following` are the batches to prefetch, or anything."""
    ids = [int32(batch) for batch in batches]
    later = [int32(batch) for batch in (batches if following is None else following)]
    labels = [batch["labels"] for batch in batches]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *zip(ids, labels, later, strict=True))


def int32(batch) -> dict[str, np.ndarray]:
    return {name: ids.astype(np.int32) for name, ids in batch["ids"].items()}


def train_on_demand(
    optimizer: str, batches, slots: int, policy: str = "lru", steps: int | None = None, **kind: Any
) -> tuple[jc.HostStore, jc.CacheState, list[float]]:
    """Trains with a shared store, step by step, and flushes."""
    store = shared_store(optimizer)
    step, _ = programs(optimizer, **kind)
    store = shared_store(optimizer)
    carry, losses = (jc.init(store, slots, POLICIES[policy]()), dense_start()), []
    for number, batch in enumerate(batches[:steps]):
        following = batches[(number + 1) % len(batches)]
        carry, loss = step(carry, (int32(batch), batch["labels"], int32(following)))
        losses.append(loss)
    flushed = jc.flush(carry[0], store)
    check_on_demand(flushed, store)
    return store, flushed, [float(loss) for loss in losses]


def rows_and_state(store: jc.HostStore) -> list[np.ndarray]:
    """All that a store of `training.py` holds."""
    every = np.arange(ROWS)
    return [leaf for name in TABLES for leaf in (store.rows(name, every), *store.row_state(name, every))]


def assert_same_rows(store: jc.HostStore, other: jc.HostStore) -> None:
    for mine, theirs in zip(rows_and_state(store), rows_and_state(other), strict=True):
        np.testing.assert_array_equal(mine.view(np.int32), theirs.view(np.int32))


_find = jax.jit(slot_index.find)


def check_on_demand(cache: jc.CacheState, store: jc.HostStore) -> None:
    """`jc.check`, and what `admit` keeps: to be called after a flush."""
    jc.check(cache, store)
    check_residents(cache)
    assert int(cache.on_demand.admitted) == store.transfers.admitted
    assert store.transfers.failure is None and not store.transfers._returning


def check_residents(cache: jc.CacheState) -> None:
    """Slots in use are the first ones; the index finds each row that is there, and no other; stamps are of the past."""
    mode = cache.on_demand
    assert 0 <= int(mode.pinned_after) <= int(mode.admitted)
    for state, residents in zip(cache.groups, mode.residents, strict=True):
        table, slots, used = np.asarray(state.slot_table), state.slots, int(residents.used)
        assert (table[:used, 0] != GroupCache.FREE).all() and (table[used:, 0] == GroupCache.FREE).all()
        assert (table[:used, 1] == 0).all()
        found = _find(residents.row_index, state.slot_table, table[:, 0], table[:, 2], np.arange(slots) < used)
        assert found.tolist() == [*range(used), *[-1] * (slots - used)]
        resident = set(map(tuple, table[:used, [0, 2]].tolist()))
        assert len(resident) == used
        rows = [
            (position, row)
            for position, part in enumerate(state.group.tables)
            for row in [*range(min(200, part.rows)), part.rows - 1]
        ]
        absent = [row for row in rows if row not in resident][:200]
        absent += [(0, 2**31 - 1)] * (200 - len(absent))
        columns = [np.array(column, np.int32) for column in zip(*absent, strict=True)]
        assert (np.asarray(_find(residents.row_index, state.slot_table, *columns, np.ones(200, bool))) == -1).all()
        cells = np.asarray(residents.row_index.cells)
        assert np.count_nonzero(cells != -1) <= int(residents.row_index.claimed) <= len(cells) * 5 // 8
        stamps = np.asarray(residents.stamps)
        assert stamps.shape == (slots,) and stamps.min(initial=0) >= 0 and (stamps <= int(mode.admitted)).all()
        assert (stamps[used:] == 0).all() and len(set(stamps[:used].tolist())) <= int(mode.admitted) + 1
        assert residents.ranks.shape == ((slots,) if mode.order == "rank" else (0,))
        assert int(residents.evicted) >= 0
