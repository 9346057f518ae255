"""Several groups of tables under every policy, in warm restarts, evaluations and with the future given."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcache as jc
from jaxcache import pipeline
from jaxcache.pipeline import _compile_exchange
from jaxcache.state import empty_cache

ADAM = optax.adam(0.05)
TABLES = {
    "user": jc.Table(60, 4),
    "item": jc.Table(90, 3, dtype="bfloat16", rounding="stochastic", optimizer=ADAM),
    "shop": jc.Table(30, 3, dtype="bfloat16", rounding="stochastic", optimizer=ADAM),
    "word": jc.Table(40, 2, frozen=True),
}
FEATURES = {
    "seen": jc.Feature("item", "mean", padding=-1),
    "bought": jc.Feature("item", "sum"),
    "words": jc.Feature("word", "sum"),
}
SAMPLES, BATCHES = 6, 24
SLOTS = {"user": 14, "shop": 42, "word": 13}


def make_batches(seed: int = 0, number: int = BATCHES) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)

    def one(samples: int) -> dict[str, Any]:
        lengths = random.integers(0, 4, samples)
        bought = random.zipf(1.3, lengths.sum()) % 90
        return {
            "ids": {
                "user": random.zipf(1.3, samples) % 60,
                "seen": np.where(random.random((samples, 3)) < 0.4, -1, random.zipf(1.3, (samples, 3)) % 90),
                "bought": jc.Bags(bought, np.cumsum([0, *lengths]), random.random(len(bought)).astype(np.float32)),
                "shop": random.integers(0, 30, (samples, 1)),
                "words": random.integers(0, 40, (samples, 2)).astype(np.int8),
            },
            "label": random.normal(size=samples).astype(np.float32),
        }

    return [one(SAMPLES if i < number - 1 else 4) for i in range(number)]


def loss_of(rows: dict[str, jax.Array], label: jax.Array, mask: jax.Array) -> jax.Array:
    scores = sum(jnp.tanh(leaf).reshape(SAMPLES, -1).sum(axis=-1) for leaf in rows.values())
    return jnp.sum(jnp.where(mask, (scores - label) ** 2, 0.0)) / SAMPLES


@partial(jax.jit, donate_argnums=0)
def step(cache, plan, label):
    loss, gradients = jax.value_and_grad(loss_of)(jc.lookup(cache, plan), label, plan.mask)
    return jc.update(cache, plan, gradients), loss


@jax.jit
def evaluate(view, plan, label):
    return loss_of(jc.lookup(view, plan), label, plan.mask)


def make_store() -> jc.HostStore:
    return jc.HostStore(TABLES, jc.rowwise_adagrad(0.1), seed=5)


def train(store, batches, cache=None, between=None, flush=True, **arguments):
    losses = []
    with jc.LookAhead(store, batches, ids=lambda b: b["ids"], features=FEATURES, **arguments) as ahead:
        cache = ahead.start(cache)
        for batch, plan in ahead:
            cache, loss = step(ahead.exchange(cache, plan), plan, batch["label"])
            losses.append(float(loss))
            if between is not None:
                cache = between(ahead, cache)
        if flush:
            cache = ahead.flush(cache)
    jc.check(cache, store)
    return cache, losses, ahead.report()


def contents(store):
    every = {name: np.arange(table.rows) for name, table in TABLES.items()}
    return {name: (store.rows(name, ids), *store.row_state(name, ids)) for name, ids in every.items()}


def assert_same_bits(one, other):
    for name in TABLES:
        for mine, theirs in zip(one[name], other[name], strict=True):
            np.testing.assert_array_equal(mine.view(np.uint8), theirs.view(np.uint8), name)


@pytest.fixture(scope="module")
def uncached():
    store = make_store()
    _, losses, _ = train(store, make_batches(), slots="100%")
    return contents(store), losses


COUNTS = {name: np.arange(table.rows)[::-1] ** 2 for name, table in TABLES.items()}


@pytest.mark.parametrize(
    "arguments",
    [
        {"policy": jc.lookahead(), "window": 5},
        {"policy": jc.frequency(COUNTS)},
        {"policy": jc.static(COUNTS)},
        {"policy": jc.no_cache()},
        {"policy": jc.lru()},
        {"future": [batch["ids"] for batch in make_batches()]},
    ],
    ids=["lookahead", "frequency", "static", "no_cache", "lru", "future"],
)
def test_every_policy_trains_the_same_bits(arguments, uncached):
    store = make_store()
    _, losses, report = train(store, make_batches(), slots=SLOTS, **arguments)
    assert losses == uncached[1]
    assert_same_bits(contents(store), uncached[0])
    for name, group in report.groups.items():
        assert group.rows_fetched > 0
        # Frozen rows never go home; nothing but evictions brings the others there before the flush.
        assert (group.rows_written_back == 0) == (name == "word") and (group.rows_flushed == 0) == (name == "word")
    assert report.rows_fetched == sum(group.rows_fetched for group in report.groups.values())
    assert report.bytes_fetched == sum(group.rows_fetched * group.row_bytes for group in report.groups.values())


def test_victims_of_every_trained_group_come_home_through_page_locked_memory(monkeypatch, uncached):
    host = jax.sharding.SingleDeviceSharding(jax.local_devices()[0], memory_kind="pinned_host")
    device_put, copied = jax.device_put, []

    def recorded(arrays, device=None, **arguments):
        if device is host:
            copied.append(arrays.weights.shape[1])
        return device_put(arrays, device, **arguments)

    monkeypatch.setattr(pipeline, "_host_memory", lambda device: host)
    monkeypatch.setattr(jax, "device_put", recorded)
    store = make_store()
    _, losses, _ = train(store, make_batches(), slots=SLOTS, window=5)
    assert losses == uncached[1]
    assert_same_bits(contents(store), uncached[0])
    assert set(copied) == {4, 3}  # users, and items with shops; words are frozen, their rows need not be brought home


def test_the_future_without_weights_is_the_same_and_other_ids_are_found_out():
    batches = make_batches()
    future = [dict(batch["ids"]) for batch in batches]
    for ids in future:
        ids["bought"] = ids["bought"]._replace(weights=None)
    _, losses, _ = train(make_store(), batches, slots=SLOTS, future=future)
    _, expected, _ = train(make_store(), batches, slots=SLOTS, window=2)
    assert losses == expected
    future[3]["seen"] = np.roll(future[3]["seen"], 1, axis=0)  # the same rows elsewhere
    with pytest.raises(ValueError, match="batch 3 of the loader has other ids"):
        train(make_store(), batches, slots=SLOTS, future=future)


def test_a_warm_cache_goes_on_whatever_its_slots_were_asked_for_with(uncached):
    batches, store, losses, cache = make_batches(), make_store(), [], None
    fetched = []
    for part in (batches[:7], batches[7:15], batches[15:]):
        cache, some, report = train(store, part, cache, slots=None, device_bytes="2.7kB", window=3, flush=False)
        losses += some
        fetched.append(report.rows_fetched)
    with jc.LookAhead(store, [], ids=lambda b: b, device_bytes="2.7kB") as ahead:
        cache = ahead.flush(ahead.start(cache))
    assert losses == uncached[1]
    assert_same_bits(contents(store), uncached[0])
    other = make_store()
    train(other, batches[:7], slots=SLOTS)
    with pytest.raises(ValueError, match=r"another configuration.*expected 14 \+ 42 \+ 13 slots"):
        train(other, batches[7:], cache, slots=SLOTS)


def test_a_cache_from_before_a_load_is_refused():
    store = make_store()
    cache, _, _ = train(store, make_batches(), slots=SLOTS)
    store.load("word", np.ones((40, 2), np.float32))
    with pytest.raises(ValueError, match="rows were loaded into the store since"):
        train(store, make_batches(), cache, slots=SLOTS)
    cache, _, _ = train(store, make_batches(), slots=SLOTS)
    train(store, make_batches(), cache, slots=SLOTS)
    assert (store.rows("word", np.arange(40)) == 1).all()


def test_a_start_without_a_step_does_not_hide_that_rows_were_loaded():
    store = make_store()
    cache, _, _ = train(store, make_batches(), slots=SLOTS)
    store.load("word", np.ones((40, 2), np.float32))
    train(store, [], slots=SLOTS, flush=False)
    with pytest.raises(ValueError, match="rows were loaded into the store since"):
        train(store, make_batches(), cache, slots=SLOTS)


def test_a_cache_that_was_flushed_without_assignment_is_not_written_over_loaded_rows():
    store = make_store()
    with jc.LookAhead(store, make_batches(), lambda b: b["ids"], features=FEATURES, slots=SLOTS) as ahead:
        cache = ahead.start()
        for batch, plan in ahead:
            cache, _ = step(ahead.exchange(cache, plan), plan, batch["label"])
        ahead.flush(cache)
    store.load("user", np.ones((60, 4), np.float32))
    with pytest.raises(RuntimeError, match=r"rows were loaded.*assign what flush returns"):
        ahead.flush(cache)
    assert (store.rows("user", np.arange(60)) == 1).all()


def test_a_warm_cache_larger_than_what_is_asked_for_is_refused():
    store = make_store()
    cache, _, _ = train(store, make_batches(), slots=SLOTS)
    for arguments in ({"slots": 68}, {"device_bytes": cache.nbytes - 100}):
        with pytest.raises(ValueError, match=r"has 14 \+ 42 \+ 13 slots, which is more than LookAhead\("):
            train(store, make_batches(), cache, **arguments)
    cache, _, _ = train(store, make_batches(), cache, device_bytes=cache.nbytes)
    train(store, make_batches(), cache, slots=69)


def test_a_start_that_found_too_few_slots_can_be_tried_again():
    with jc.LookAhead(make_store(), make_batches(number=3), lambda b: b["ids"], features=FEATURES, slots=20) as ahead:
        for _ in range(2):
            with pytest.raises(jc.TooFewSlots, match="too small for the groups of tables"):
                ahead.start()


def test_groups_of_equal_shapes_share_their_compiled_exchanges():
    def compiled(number):
        tables = {f"{number} {i}": jc.Table(50 + i, 5, optimizer=optax.sgd(0.1)) for i in range(number)}
        store = jc.HostStore(tables)
        batches = [{name: np.arange(30) for name in tables}]
        before = _compile_exchange.cache_info().misses
        with jc.LookAhead(store, batches, lambda b: b, slots=dict.fromkeys(tables, 40)) as ahead:
            cache = ahead.start()
            for _, plan in ahead:
                cache = ahead.exchange(cache, plan)
                cache = jc.update(cache, plan, jc.lookup(cache, plan))
            ahead.flush(cache)
        return _compile_exchange.cache_info().misses - before

    assert compiled(1) > 0 and compiled(3) == 0


def test_evaluations_read_the_newest_rows_and_change_nothing(uncached):
    held_out, results, expected = make_batches(9, 3), [], []

    def between(ahead, cache):
        cache, outputs = ahead.evaluate(held_out, cache, lambda view, plan, b: evaluate(view, plan, b["label"]))
        (results if len(cache.groups[0].counts) < 60 else expected).append([float(output) for output in outputs])
        return cache

    store = make_store()
    _, losses, _ = train(store, make_batches(), slots=SLOTS, between=between)
    train(make_store(), make_batches(), slots="100%", between=between)
    assert losses == uncached[1] and results == expected and results[0] != results[-1]
    assert_same_bits(contents(store), uncached[0])


def test_init_needs_a_number_of_slots_for_each_group():
    store = make_store()
    assert empty_cache(store, [3, 4, 5]).slots == (3, 4, 5)
    for slots in (3, [3, 4]):
        with pytest.raises(ValueError, match=r"the store has 3 groups of tables.*give each a number of slots"):
            empty_cache(store, slots)


def test_counting_and_hot_batches_know_features():
    batches = make_batches()
    counts = jc.count_ids(batches, make_store(), lambda b: b["ids"], FEATURES)
    expected = {name: np.zeros(table.rows, int) for name, table in TABLES.items()}
    for batch in batches:
        for feature, ids in batch["ids"].items():
            table = {"seen": "item", "bought": "item", "words": "word"}.get(feature, feature)
            for row in np.asarray(ids.ids if isinstance(ids, jc.Bags) else ids).reshape(-1).tolist():
                if row >= 0:
                    expected[table][row] += 1
    for name, rows in expected.items():
        np.testing.assert_array_equal(counts[name], rows)

    only_users = jc.count_ids([{"user": [3, 3]}], TABLES)
    assert only_users["user"][3] == 2 and not any(only_users[name].any() for name in ("item", "shop", "word"))

    histories = [{"seen": batch["ids"]["seen"]} for batch in batches[:-1]]
    hot = {"item": [0, 1, 2, 5]}
    packed = jc.hot_batches(histories, hot, features={"seen": jc.Feature("item", "mean", padding=-1)})
    found = [batch["seen"] for batch in packed]
    whole = np.concatenate([batch["seen"] for batch in histories])
    is_hot = np.isin(whole, [-1, *hot["item"]]).all(axis=1)
    assert packed.report().hot_samples == is_hot.sum() > 0
    assert sorted(map(tuple, np.concatenate(found))) == sorted(map(tuple, whole))
    ragged = [{"ids": np.array([1, 9, 2]), "lengths": np.array([2, 1, 0])}]  # as many ids as samples
    as_bags = lambda batch: {"bags": jc.Bags(batch["ids"], np.cumsum([0, *batch["lengths"]]))}  # noqa: E731
    with pytest.raises(ValueError, match="cannot take the ragged bags of feature 'bags' apart"):
        list(jc.hot_batches(ragged, {"item": [1, 2]}, as_bags, {"bags": jc.Feature("item", "sum")}))
    with pytest.raises(KeyError, match="feature 'seen' looks up table 'item'"):
        jc.hot_batches(histories, {"user": [1]}, features={"seen": jc.Feature("item")})
