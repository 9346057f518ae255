"""`check` passes sound states and catches every single corruption, each under its own name."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcache as jc
from jaxcache.state import empty_cache
from training import replace_group

SLOTS = 10
TABLES = {"user": jc.Table(6, 3), "item": jc.Table(2**40, 3, jc.normal())}
BATCHES = [
    {"user": np.array([1, 5, 5]), "item": np.array([2**40 - 1, 7, 2**33])},
    {"user": np.array([1, 2, 0]), "item": np.array([7, 7, 7])},
]


def train(store, batches=BATCHES, flush=True, check=False):
    with jc.LookAhead(store, batches, ids=lambda batch: batch, slots=SLOTS) as ahead:
        cache = ahead.start()
        if check:
            jc.check(cache, store)
        for batch, plan in ahead:
            assert set(batch) == set(TABLES)
            cache = ahead.exchange(cache, plan)
            cache = jc.update(cache, plan, jc.lookup(cache, plan))
            if check:
                cache = ahead.flush(cache)
                jc.check(cache, store)
        if flush:
            cache = ahead.flush(cache)
    return cache


def adam_store():
    return jc.HostStore(TABLES, optimizer=optax.adam(0.1), seed=2)


@pytest.fixture(scope="module")
def flushed():
    """Seven rows in ten slots, all clean."""
    store = adam_store()
    return train(store), store


@pytest.fixture(scope="module")
def behind():
    """The same, but flushed after the first batch alone: the rows of the second are dirty."""
    store = adam_store()
    cache = train(store, BATCHES[:1])
    with jc.LookAhead(store, BATCHES[1:], ids=lambda batch: batch, slots=SLOTS) as ahead:
        cache = ahead.start(cache)
        for _, plan in ahead:
            cache = ahead.exchange(cache, plan)
            cache = jc.update(cache, plan, jc.lookup(cache, plan))
    return cache, store


def scalar_leaf():
    """An optimizer that keeps a bare number for each row."""

    def update(gradients, state, params=None):
        state = state + jnp.mean(gradients * gradients, axis=-1)
        return -0.1 * gradients / (1 + jnp.sqrt(state[..., None])), state

    return optax.GradientTransformation(lambda weights: jnp.zeros(weights.shape[:-1]), update)


# Sound states


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), optax.adam(0.1), jc.rowwise_adagrad(0.1), scalar_leaf()])
def test_a_sound_state_passes(optimizer):
    store = jc.HostStore(TABLES, optimizer=optimizer)
    jc.check(empty_cache(store, 4), store)
    jc.check(train(store, check=True), store)


def test_a_state_between_steps_passes_without_a_flush(behind):
    cache, store = behind
    (group,) = cache.groups
    assert store.behind
    assert 0 < int(group.dirty.sum()) < int((group.counts > 0).sum()) < SLOTS  # dirty, clean and free
    jc.check(cache, store)


def test_a_state_between_exchange_and_update_passes():
    store = adam_store()
    with jc.LookAhead(store, BATCHES[:1], ids=lambda batch: batch, slots=SLOTS) as ahead:
        cache = ahead.start()
        for _, plan in ahead:
            cache = ahead.exchange(cache, plan)
            assert int(cache.exchanged) == int(cache.step) + 1
            jc.check(cache, store)


# Corruptions, one at a time


def occupied_slots(cache, table):
    return np.flatnonzero(np.asarray(cache.groups[0].slot_table)[:, 0] == table)


def free_slot(cache):
    return int(occupied_slots(cache, jc.GroupCache.FREE)[0])


def replace(field, change):
    """A corruption of one array, of which `change` alters a copy."""

    def corrupt(cache):
        whole = field in ("step", "exchanged", "fault")
        array = np.array(getattr(cache if whole else cache.groups[0], field))
        array = change(cache, array) if array.ndim == 0 else (change(cache, array), array)[1]
        fields = {field: jnp.asarray(array)}
        return dataclasses.replace(cache, **fields) if whole else replace_group(cache, **fields)

    return corrupt


def set_slot(field, where, value):
    def change(cache, array):
        array[where(cache)] = value

    return replace(field, change)


def set_number(field, value):
    return replace(field, lambda cache, array: np.array(value, array.dtype))


def same_row_twice(cache, slot_table):
    first, second = occupied_slots(cache, 1)[:2]
    slot_table[second] = slot_table[first]


def set_id(table, row):
    """Another id in the first slot of a table, as high and low words; it may be no id of that table."""

    def change(cache, slot_table):
        low = row & 0xFFFFFFFF
        slot_table[occupied_slots(cache, table)[0], 1:] = row >> 32, low - 2**32 if low >= 2**31 else low

    return replace("slot_table", change)


def in_buffer(leaf_number, change):
    """A corruption of one leaf of the buffer: the weights, then the optimizer's."""

    def corrupt(cache):
        leaves, treedef = jax.tree.flatten(cache.groups[0].buffer)
        leaf = np.array(leaves[leaf_number])
        change(cache, leaf)
        leaves[leaf_number] = jnp.asarray(leaf)
        return replace_group(cache, buffer=treedef.unflatten(leaves))

    return corrupt


def flip_one_bit(cache, leaf):
    (group,) = cache.groups
    leaf[int(np.flatnonzero(~np.asarray(group.dirty) & (np.asarray(group.counts) > 0))[0]), 1:2].view(np.uint32)[:] ^= 1


def write_free_slot(cache, leaf):
    leaf[free_slot(cache), -1] = 1e-30


def spoil_free_slot(cache, leaf):
    leaf[free_slot(cache)] = np.nan


def first_user(cache):
    return int(occupied_slots(cache, 0)[0])


ANYWHERE = {
    "another optimizer": (
        lambda cache: replace_group(cache, optimizer=jc.RowOptimizer(optax.sgd(0.1), 3)),
        "state and store have one configuration",
    ),
    "other tables": (
        lambda cache: replace_group(cache, group=jc.Group.stack({"user": jc.Table(7, 3)})),
        "state and store have one configuration",
    ),
    "fault": (set_number("fault", jc.CacheState.UPDATE_MISMATCH), "no fault was met, but fault is 2"),
    "two exchanges ahead": (set_number("exchanged", 4), "an update follows an exchange"),
    "fewer exchanges than updates": (set_number("exchanged", 1), "an update follows an exchange"),
    "unknown table": (set_slot("slot_table", first_user, [2, 0, 0]), "the slot table names known tables"),
    "negative table": (set_slot("slot_table", first_user, [-2, 0, 0]), "the slot table names known tables"),
    "a free slot with an id": (set_slot("slot_table", free_slot, [-1, -1, 5]), "a free slot names no row"),
    "id beyond the table": (set_id(0, 6), "ids lie inside their table"),
    "id beyond the last table": (set_id(1, 2**40), "ids lie inside their table"),
    "negative id": (set_id(0, -1), "ids lie inside their table"),
    "negative id in the last table": (set_id(1, -1), "ids lie inside their table"),
    "row in two slots": (replace("slot_table", same_row_twice), "no row sits in two slots"),
    "negative count": (set_slot("counts", first_user, -1), "counts are not negative"),
    "count of a free slot": (set_slot("counts", free_slot, 1), "a free slot has no lookups"),
    "dirty free slot": (set_slot("dirty", free_slot, True), "a free slot is not dirty"),
    "weights in a free slot": (in_buffer(0, write_free_slot), "a free slot was never written"),
    "optimizer state in a free slot": (in_buffer(2, write_free_slot), "a free slot was never written"),
    "NaN in a free slot": (in_buffer(1, spoil_free_slot), "a free slot was never written"),
    "one bit of a clean row's weights": (in_buffer(0, flip_one_bit), "a clean row equals the store's bit for bit"),
    "one bit of a clean row's state": (in_buffer(2, flip_one_bit), "a clean row equals the store's bit for bit"),
    "another row in a clean slot": (set_id(1, 12345), "a clean row equals the store's bit for bit"),
}
AFTER_FLUSH = {
    "dirty": (set_slot("dirty", first_user, True), "nothing is dirty after a flush"),
    "an update too many": (
        lambda cache: dataclasses.replace(cache, step=cache.step + 1, exchanged=cache.exchanged + 1),
        "the store knows the step of the last flush",
    ),
    "scalars": (
        lambda cache: replace_group(cache, scalars=(cache.groups[0].scalars[0] + 1,)),
        "the store has the scalars of the last flush",
    ),
}
BEHIND = {
    "dirty without a lookup": (
        lambda cache: replace_group(cache, counts=jnp.where(cache.groups[0].dirty, 0, cache.groups[0].counts)),
        "a dirty row was looked up",
    ),
    "dirty row that claims to be clean": (
        lambda cache: replace_group(cache, dirty=jnp.zeros_like(cache.groups[0].dirty)),
        "a clean row equals the store's bit for bit",
    ),
}


def catches(cache, store, corrupt, message):
    jc.check(cache, store)
    with pytest.raises(AssertionError, match=re.escape(f"violated: {message}")):
        jc.check(corrupt(cache), store)
    jc.check(cache, store)


@pytest.mark.parametrize("corrupt, message", ANYWHERE.values(), ids=ANYWHERE)
@pytest.mark.parametrize("state", ["flushed", "behind"])
def test_a_corruption_is_caught(state, corrupt, message, request):
    catches(*request.getfixturevalue(state), corrupt, message)


@pytest.mark.parametrize("corrupt, message", AFTER_FLUSH.values(), ids=AFTER_FLUSH)
def test_a_corruption_after_a_flush_is_caught(flushed, corrupt, message):
    catches(*flushed, corrupt, message)


@pytest.mark.parametrize("corrupt, message", BEHIND.values(), ids=BEHIND)
def test_a_corruption_of_dirty_rows_is_caught(behind, corrupt, message):
    catches(*behind, corrupt, message)


def test_a_row_changed_in_the_store_is_caught(flushed):
    cache, store = flushed
    (rows,) = store.groups
    keys = rows.group.keys(0, np.array([5]))
    row = rows.read(keys)
    changed = rows.read(keys)
    changed.state[0][0, 0] += 1
    rows.write(keys, changed)
    with pytest.raises(AssertionError, match="a clean row equals the store's bit for bit"):
        jc.check(cache, store)
    rows.write(keys, row)
    jc.check(cache, store)


def test_a_number_kept_for_a_row_is_compared_too():
    store = jc.HostStore(TABLES, optimizer=scalar_leaf())
    cache = train(store)
    (group,) = cache.groups
    [leaf] = group.buffer.state
    assert leaf.ndim == 1
    wrong = replace_group(cache, buffer=group.buffer._replace(state=(leaf.at[3].add(1.0),)))
    catches(cache, store, lambda _: wrong, "a clean row equals the store's bit for bit (slot 3, 1 in all)")


def test_the_error_names_the_first_slot_and_how_many_there_are(flushed):
    cache, store = flushed
    counts = cache.groups[0].counts
    first = int((counts > 0).sum())
    wrong = replace_group(cache, counts=counts.at[first:].add(1))
    catches(cache, store, lambda _: wrong, f"a free slot has no lookups (slot {first}, {SLOTS - first} in all)")
