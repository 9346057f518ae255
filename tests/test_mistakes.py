"""Mistakes that users make, each with an error that says what was done and how the right line reads."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcache as jc
from jaxcache.state import empty_cache
from training import ROWS, TABLES, dense_start, make_batches, make_store, most_unique_rows, train, train_step

BATCHES = make_batches(21, ["uniform"] * 12)


def look_ahead(store=None, batches=BATCHES, ids=lambda b: b["ids"], **arguments):
    return jc.LookAhead(store or make_store("adagrad"), batches, ids=ids, **{"slots": 20, "window": 3, **arguments})


@jax.jit
def kept_step(cache, plan, dense, labels):
    """A train step that donates nothing, so that old states stay alive."""
    return train_step.__wrapped__(cache, plan, dense, labels)


def run_until_error(ahead, cache, loop_body):
    """Runs the loop with a faulty body, then flushes; the error must come by the flush."""
    dense = dense_start()
    for batch, plan in ahead:
        cache, dense = loop_body(ahead, cache, plan, dense, batch)
    return ahead.flush(cache)


# In the loop


def test_no_exchange_is_an_error_at_the_next_iteration_and_loses_nothing():
    store = make_store("adagrad")
    losses = []
    with look_ahead(store) as ahead:
        cache, dense = ahead.start(), dense_start()
        for batch, plan in itertools.islice(ahead, 3):
            cache = ahead.exchange(cache, plan)
            cache, dense, loss = train_step(cache, plan, dense, batch["labels"])
        batch, plan = next(ahead)
        cache, dense, loss = train_step(cache, plan, dense, batch["labels"])  # no exchange before it
        losses.append(float(loss))
        with pytest.raises(RuntimeError, match=r"was not exchanged.*`cache = ahead.exchange\(cache, plan\)`"):
            next(ahead)
        assert np.isnan(losses).all()
        with pytest.raises(RuntimeError, match="update was called with a cache and a plan that do not belong together"):
            ahead.flush(cache)
    # The three good steps are in the store.
    expected = train(make_store("adagrad"), BATCHES[:3], "100%")
    np.testing.assert_array_equal(store.rows("user", np.arange(ROWS)), expected.weights["user"])


def test_exchange_twice():
    with look_ahead() as ahead:
        cache = ahead.start()
        _, plan = next(ahead)
        cache = ahead.exchange(cache, plan)
        with pytest.raises(RuntimeError, match="exchange was called twice"):
            ahead.exchange(cache, plan)


def test_exchange_with_the_plan_of_another_batch():
    with look_ahead() as ahead:
        cache, dense = ahead.start(), dense_start()
        batch, old_plan = next(ahead)
        cache = ahead.exchange(cache, old_plan)
        cache, dense, _ = train_step(cache, old_plan, dense, batch["labels"])
        next(ahead)
        with pytest.raises(RuntimeError, match="plan of another batch"):
            ahead.exchange(cache, old_plan)


def test_a_step_with_the_plan_of_another_batch_gives_nan_and_is_reported():
    def body(ahead, cache, plan, dense, batch, plans=[]):  # noqa: B006
        plans.append(plan)
        cache = ahead.exchange(cache, plan)
        cache, dense, loss = kept_step(cache, plans[0], dense, batch["labels"])
        assert np.isnan(float(loss)) == (len(plans) > 1)
        return cache, dense

    with look_ahead() as ahead:
        cache = ahead.start()
        with pytest.raises(RuntimeError, match="update was called with a cache and a plan that do not belong together"):
            run_until_error(ahead, cache, body)


def test_no_update_is_reported_with_the_line_that_is_missing():
    def body(ahead, cache, plan, dense, batch):
        return ahead.exchange(cache, plan), dense

    with look_ahead() as ahead:
        cache = ahead.start()
        with pytest.raises(RuntimeError, match=r"step 0 has no update.*`cache = update\(cache, plan, row_gradients\)`"):
            run_until_error(ahead, cache, body)


def test_a_stale_cache_is_reported_and_never_written_home():
    store = make_store("adagrad")
    with look_ahead(store, slots=16) as ahead:
        cache, dense, old = ahead.start(), dense_start(), None
        with pytest.raises(RuntimeError, match=r"stale cache, of step"):
            for number, (batch, plan) in enumerate(ahead):
                copy = jax.tree.map(jnp.array, cache)
                cache = ahead.exchange(copy if number != 5 else old, plan)
                if number == 2:
                    old = jax.tree.map(jnp.array, cache)
                cache, dense, _ = kept_step(cache, plan, dense, batch["labels"])
            ahead.flush(cache)


def test_flushing_a_stale_cache():
    with look_ahead() as ahead:
        cache, dense = ahead.start(), dense_start()
        batch, plan = next(ahead)
        old = jax.tree.map(jnp.array, cache)
        cache = ahead.exchange(cache, plan)
        cache, dense, _ = train_step(cache, plan, dense, batch["labels"])
        with pytest.raises(RuntimeError, match="flush got a stale cache, of step 0; the newest is of step 1"):
            ahead.flush(old)
        ahead.flush(cache)


def test_a_donated_cache():
    with look_ahead() as ahead:
        cache = ahead.start()
        _, plan = next(ahead)
        old = cache
        cache = ahead.exchange(cache, plan)
        with pytest.raises(RuntimeError, match="was donated to an earlier call"):
            ahead.flush(old)
        with pytest.raises(RuntimeError, match="was donated to an earlier call"):
            ahead.exchange(old, plan)


@pytest.mark.parametrize("place", ["before the exchange", "before the update", "after the update"])
def test_leaving_the_loop_early_and_flushing_is_fine_anywhere(place):
    store = make_store("adagrad")
    with look_ahead(store) as ahead:
        cache, dense = ahead.start(), dense_start()
        for number, (batch, plan) in enumerate(ahead):
            if number == 4 and place == "before the exchange":
                break
            cache = ahead.exchange(cache, plan)
            if number == 4 and place == "before the update":
                break
            cache, dense, _ = train_step(cache, plan, dense, batch["labels"])
            if number == 3 and place == "after the update":
                break
        cache = ahead.flush(cache)
    jc.check(cache, store)
    expected = train(make_store("adagrad"), BATCHES[:4], "100%")
    np.testing.assert_array_equal(store.rows("item", np.arange(ROWS)), expected.weights["item"])


def test_reading_the_store_without_flush():
    store = make_store("sgd")
    with look_ahead(store) as ahead:
        cache = ahead.start()
        _, plan = next(ahead)
        cache = ahead.exchange(cache, plan)
        with pytest.raises(RuntimeError, match=r"call `cache = ahead.flush\(cache\)`"):
            store.rows("user", [1])
    with (
        pytest.raises(RuntimeError, match=r"go on with it, ahead.start\(cache\), or flush it first"),
        look_ahead(store) as again,
    ):
        again.start()


def test_a_flush_between_exchange_and_update_does_not_hide_the_update():
    store = make_store("sgd")
    with look_ahead(store, BATCHES[:1]) as ahead:
        cache, dense = ahead.start(), dense_start()
        for batch, plan in ahead:
            cache = ahead.flush(ahead.exchange(cache, plan))
            cache, dense, _ = train_step(cache, plan, dense, batch["labels"])
    with pytest.raises(RuntimeError, match=r"call `cache = ahead\.flush"):
        store.rows("user", [1])
    ahead.flush(cache)
    assert store.step == 1


def test_a_second_open_pipeline():
    store = make_store("sgd")
    with look_ahead(store) as ahead:
        ahead.start()
        with pytest.raises(RuntimeError, match="already serves an open LookAhead"):
            look_ahead(store).__enter__()
    with look_ahead(store) as again:
        again.start()


def test_calls_out_of_place():
    ahead = look_ahead()
    with pytest.raises(RuntimeError, match="with LookAhead"):
        ahead.start()
    with pytest.raises(RuntimeError, match="after start"):
        next(ahead)
    with ahead:
        with pytest.raises(RuntimeError, match="after start"):
            next(ahead)
        with pytest.raises(RuntimeError, match="started pipeline"):
            ahead.flush(empty_cache(ahead.store, 20))
        cache = ahead.start()
        with pytest.raises(RuntimeError, match="start\\(\\) was called already"):
            ahead.start()
        with pytest.raises(TypeError, match="needs the CacheState"):
            ahead.exchange({"cache": cache}, next(ahead)[1])
    with pytest.raises(RuntimeError, match="inside the block"):
        next(ahead)
    with pytest.raises(RuntimeError, match="make a new one"):
        ahead.__enter__()


def test_a_cache_of_another_configuration():
    other = empty_cache(make_store("adagrad"), 21)
    with look_ahead() as ahead:
        ahead.start()
        _, plan = next(ahead)
        with pytest.raises(ValueError, match="another configuration: 21 slots"):
            ahead.exchange(other, plan)
    with look_ahead() as ahead, pytest.raises(ValueError, match="start got a cache of another configuration"):
        ahead.start(other)


def test_start_with_a_cache_older_than_the_store():
    store, caches = make_store("sgd"), []
    train(store, BATCHES, 20, between=lambda ahead, cache, step: caches.append(jax.tree.map(jnp.array, cache)) or cache)
    with look_ahead(store) as ahead, pytest.raises(ValueError, match="of step 3 and the newest one of step 12"):
        ahead.start(caches[2])


def test_start_with_a_stale_cache_that_was_never_flushed():
    store, caches = make_store("sgd"), []
    with look_ahead(store) as ahead:
        cache, dense = ahead.start(), dense_start()
        for batch, plan in ahead:
            cache = ahead.exchange(cache, plan)
            cache, dense, _ = train_step(cache, plan, dense, batch["labels"])
            caches.append(jax.tree.map(jnp.array, cache))
    with look_ahead(store) as ahead, pytest.raises(ValueError, match="of step 5 and the newest one of step 12"):
        ahead.start(caches[4])
    with look_ahead(store) as ahead:
        ahead.start(caches[-1])


def test_flushing_the_cache_of_an_earlier_pipeline_again():
    store, caches = make_store("sgd"), []
    with look_ahead(store, BATCHES[:5]) as first:
        cache, dense = first.start(), dense_start()
        for batch, plan in first:
            cache = first.exchange(cache, plan)
            cache, dense, _ = train_step(cache, plan, dense, batch["labels"])
        first.flush(cache)
        caches.append(cache)
    expected = train(store, BATCHES, 20).weights["user"]
    with pytest.raises(RuntimeError, match="flush got a stale cache, of step 5; the newest is of step 17"):
        first.flush(caches[0])
    np.testing.assert_array_equal(store.rows("user", np.arange(ROWS)), expected)


def test_updating_the_cache_of_an_evaluation():
    with look_ahead() as ahead:
        cache = ahead.start()
        with pytest.raises(ValueError, match="cache of an evaluation"):
            ahead.evaluate(BATCHES[:1], cache, lambda view, plan, batch: jc.update(view, plan, jc.lookup(view, plan)))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"store": {}}, TypeError, "needs a HostStore, got dict"),
        ({"loader": 7}, TypeError, "needs an iterable of batches, got int"),
        ({"ids": "ids"}, TypeError, "needs a function of a batch"),
    ],
)
def test_arguments_of_another_type(change, error, text):
    arguments = {"store": make_store("sgd"), "loader": BATCHES, "ids": lambda b: b["ids"], "slots": 20}
    with pytest.raises(error, match=text):
        jc.LookAhead(**{**arguments, **change})


def test_an_initializer_that_returns_another_shape():
    table = jc.Table(10, 4, lambda stream, rows, table: np.ones(4, np.float32))
    with pytest.raises(ValueError, match=r"initializer of table 'user' returned shape \(4,\) for 2 rows"):
        jc.HostStore({"user": table}, optimizer=optax.sgd(0.1)).rows("user", [1, 2])


def test_a_seed_that_is_no_integer():
    assert jc.HostStore(TABLES, optax.sgd(0.1), seed=np.int64(3)).rows("user", [1]).shape == (1, 4)
    with pytest.raises(TypeError):
        jc.HostStore(TABLES, optax.sgd(0.1), seed=1.5)


@pytest.mark.parametrize(
    "optimizer", [optax.MultiSteps(optax.sgd(0.1), 2), optax.chain(optax.apply_every(2), optax.sgd(0.1))]
)
def test_an_optimizer_that_saves_gradients_up(optimizer):
    with pytest.raises(ValueError, match="saves gradients up for a later step"):
        make_store(optimizer)


def test_gradients_that_do_not_fit():
    with look_ahead() as ahead:
        cache = ahead.start()
        _, plan = next(ahead)
        cache = ahead.exchange(cache, plan)
        rows = jc.lookup(cache, plan)
        with pytest.raises(ValueError, match="update needs the gradients of what lookup returned"):
            jc.update(cache, plan, {"user": rows["user"]})
        with pytest.raises(ValueError, match="update needs the gradients of what lookup returned"):
            jc.update(cache, plan, {name: leaf[:, :2] for name, leaf in rows.items()})


# In what is given to it


def test_too_few_slots_says_how_many_and_which_batch():
    batches = [*make_batches(1, ["equal"] * 3), *make_batches(2, ["distinct"])]
    with pytest.raises(jc.TooFewSlots, match=r"batch 3 needs 16 slots.*has 15.*LookAhead\(slots=16\)"):
        train(make_store("sgd"), batches, 15)
    train(make_store("sgd"), batches, most_unique_rows(batches))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"user": np.array([3, -1])}, ValueError, r"feature 'user' has id -1 at lookup 1; ids must lie in 0 to 39"),
        ({"user": np.array([3, 40])}, ValueError, r"feature 'user' has id 40 at lookup 1.*Table\(rows=40\)"),
        ({"user": np.array([3.0, 4.0])}, TypeError, r"ids of feature 'user' are float64; ids must be integers"),
        ({"users": np.array([3, 4])}, KeyError, r"no feature or table named 'users': there are user, item"),
        ({"user": np.array([3, 4]), "item": np.array([3])}, ValueError, r"same samples, got lengths"),
        ({"user": np.array(3)}, ValueError, "ids for each sample.*are a single number"),
        ({"user": [[3], [4, 5]]}, ValueError, r"ids of feature 'user' are no array"),
        ({"user": np.array([[3], [4]])}, ValueError, r"same number of ids a sample"),
        (np.array([3, 4]), TypeError, r"must return a mapping of feature names to ids, got ndarray"),
        ({}, TypeError, r"must return a mapping"),
    ],
)
def test_ids_that_are_wrong(change, error, text):
    good = {"user": np.array([3, 4])}
    store = make_store("sgd")
    with pytest.raises(error, match=text), look_ahead(store, [good, good, change], ids=lambda batch: batch) as ahead:
        cache = ahead.start()
        try:
            for _, plan in ahead:
                cache = ahead.exchange(cache, plan)
                cache = jc.update(cache, plan, jc.lookup(cache, plan))
        finally:
            cache = ahead.flush(cache)  # what was trained before the bad batch is not lost
    assert store.step <= 2


def test_features_that_change_between_batches():
    batches = [{"user": np.array([1])}, {"item": np.array([1])}]
    with look_ahead(batches=batches, ids=lambda b: b, window=1) as ahead:
        cache = ahead.start()
        with pytest.raises(ValueError, match="same features in the same order"):
            for _, plan in ahead:
                cache = ahead.exchange(cache, plan)
                cache = jc.update(cache, plan, jc.lookup(cache, plan))


@pytest.mark.parametrize("slots", [0, -3, "0%", "101%", "many", "5", 0.5, True])
def test_slots_that_are_wrong(slots):
    with pytest.raises(ValueError, match="slots must be a positive number of rows or a share"):
        look_ahead(slots=slots)


@pytest.mark.parametrize("window", [0, -1, 2.5, "4", True])
def test_windows_that_are_wrong(window):
    with pytest.raises(ValueError, match="window must be a number of batches"):
        look_ahead(window=window)


def test_an_optimizer_that_mixes_rows():
    with pytest.raises(ValueError, match=r"mixes rows.*optax.clip instead of clip_by_global_norm"):
        make_store(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)))


def test_slots_are_parsed():
    for slots, expected in ((7, 7), (np.int64(7), 7), ("10%", 8), ("0.1%", 1), ("100%", 80), (10**6, 80)):
        with look_ahead(slots=slots, batches=[]) as ahead:
            assert ahead.start().slots == (expected,)
    assert sum(table.rows for table in TABLES.values()) == 80
