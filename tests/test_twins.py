"""Training through a cache of any size, window and stream gives the bits of training with every row on the device."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcache as jc
from extent import examples, long
from jaxcache import pipeline
from training import (
    OPTIMIZERS,
    ROWS,
    SAMPLES,
    TABLES,
    Result,
    make_batch,
    make_batches,
    make_store,
    most_unique_rows,
    plain_training,
    train,
)

KINDS = ("skewed", "uniform", "equal", "distinct")


@st.composite
def streams(draw):
    """Batches, a capacity from the minimum upward, and a window."""
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=12))
    batches = make_batches(draw(st.integers(0, 2**16)), kinds, last=draw(st.sampled_from([SAMPLES, SAMPLES, 1, 3])))
    least = most_unique_rows(batches)
    slots = draw(st.sampled_from([least, least, least + 1, 20, 33]).map(lambda n: max(n, least)))
    return batches, slots, draw(st.integers(1, 16))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@settings(max_examples=examples(8, 40))
@given(stream=streams())
def test_cached_training_gives_the_bits_of_uncached_training(optimizer, stream):
    batches, slots, window = stream
    cached = train(make_store(optimizer), batches, slots, window)
    uncached = train(make_store(optimizer), batches, "100%", window=1)
    assert uncached.report.rows_fetched == 0
    cached.assert_same_bits(uncached)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_matches_optax_on_the_touched_rows_of_a_plain_array(optimizer):
    batches = make_batches(5, ["skewed", "uniform", "equal"] * 4, last=3)
    losses, weights = plain_training(optimizer, batches, lazy=True)
    cached = train(make_store(optimizer), batches, most_unique_rows(batches), window=3)
    np.testing.assert_allclose(cached.losses, losses, rtol=1e-5)
    for name in TABLES:
        np.testing.assert_allclose(cached.weights[name], weights[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
def test_matches_optax_on_the_whole_dense_table_where_a_zero_gradient_changes_nothing(optimizer):
    batches = make_batches(6, ["skewed", "distinct", "uniform"] * 4)
    losses, weights = plain_training(optimizer, batches, lazy=False)
    cached = train(make_store(optimizer), batches, most_unique_rows(batches) + 2, window=3)
    np.testing.assert_allclose(cached.losses, losses, rtol=1e-5)
    for name in TABLES:
        np.testing.assert_allclose(cached.weights[name], weights[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_lazy_variants_differ_from_dense_ones(optimizer):
    """The documentation says that they do; were they equal, the two tests above would show nothing."""
    batches = make_batches(6, ["skewed", "uniform"] * 4)
    lazy, dense = (plain_training(optimizer, batches, lazy=flag)[1] for flag in (True, False))
    assert not np.allclose(lazy["user"], dense["user"], rtol=1e-3)


def test_an_endless_loader():
    def endless():
        for seed in itertools.count():
            yield from make_batches(seed, ["skewed"])

    results = [train(make_store("adam"), endless(), slots, window=6, steps=20) for slots in (16, "100%")]
    results[0].assert_same_bits(results[1])


def test_the_window_saves_transfers_and_the_report_counts_them():
    batches = make_batches(1, ["skewed"] * 40)
    reports = [train(make_store("sgd"), batches, 16, window).report for window in (1, 4, 16)]
    fetched = [report.rows_fetched for report in reports]
    assert fetched == sorted(fetched, reverse=True) and fetched[0] > fetched[-1]
    for report in reports:
        assert report.steps == 40
        assert report.lookups == 40 * SAMPLES * len(TABLES)
        assert report.unique_rows == sum(most_unique_rows([batch]) for batch in batches)
        # Every row that came in left as a victim or is among the rows that sit in the cache at the end.
        assert report.rows_fetched - 16 <= report.rows_written_back <= report.rows_fetched
        assert 0 < report.hit_rate < report.lookup_hit_rate < 1
        assert report.bytes_fetched == 16 * report.rows_fetched
        assert report.bytes_written_back == 16 * report.rows_written_back
        assert report.slots == 16 and report.groups["user"].row_bytes == 16
        assert report.table_bytes == 16 * ROWS * len(TABLES)


@pytest.mark.parametrize("slots", [17, 60, "100%"])
def test_a_warm_cache_goes_on_where_it_was_left(slots):
    batches = make_batches(2, ["skewed", "uniform"] * 8)
    store = make_store("adam")
    caches = []

    def keep(ahead, cache, step):
        caches.append(cache)
        return cache

    # Dense parameters start anew in the second half, so that half is compared with another split run.
    train(store, batches[:8], slots, between=keep)
    warm = train(store, batches[8:], slots, cache=caches[-1])
    cold_store = make_store("adam")
    train(cold_store, batches[:8], slots)
    cold = train(cold_store, batches[8:], slots)
    warm.assert_same_bits(cold)
    assert slots == "100%" or warm.report.rows_fetched < cold.report.rows_fetched
    assert store.step == len(batches)


def test_several_ids_a_sample():
    """Ids of any shape `[B, ...]` give rows of that shape: what a model with bags pools itself."""
    random = np.random.default_rng(0)
    batches = [{"user": random.integers(0, ROWS, (4, 3)), "item": random.integers(0, ROWS, (4,))} for _ in range(10)]

    @jax.jit
    def step(cache, plan):
        rows = jc.lookup(cache, plan)
        assert rows["user"].shape == (4, 3, 4) and rows["item"].shape == (4, 4)
        loss, gradients = jax.value_and_grad(
            lambda rows: jnp.sum((jnp.sum(rows["user"], axis=1) * rows["item"]) ** 2 + rows["item"])
        )(rows)
        return jc.update(cache, plan, gradients), loss

    results = []
    for slots in (16, "100%"):
        store = make_store("adagrad")
        with jc.LookAhead(store, batches, ids=lambda b: b, slots=slots) as ahead:
            cache, losses = ahead.start(), []
            for _, plan in ahead:
                cache, loss = step(ahead.exchange(cache, plan), plan)
                losses.append(loss)
            cache = ahead.flush(cache)
        jc.check(cache, store)
        results.append(Result.of(store, losses, ahead.report()))
    results[0].assert_same_bits(results[1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_optimizer_state_of_half_precision(dtype):
    optimizer = optax.adam(0.05, mu_dtype=jnp.dtype(dtype))
    batches = make_batches(4, ["skewed", "uniform"] * 6)
    cached = train(make_store(optimizer), batches, 16)
    cached.assert_same_bits(train(make_store(optimizer), batches, "100%"))
    assert any(leaf.dtype == jnp.dtype(dtype) for leaf in cached.states["user"])


@pytest.mark.parametrize("optimizer", [pytest.param("sgd", marks=long("adam")), "adam"])
def test_rows_with_hundreds_of_lookups_in_a_batch(optimizer):
    """Their gradients are summed in blocks, which must not depend on what else is in the cache or the batch."""
    random = np.random.default_rng(7)
    batches = [make_batch(random, kind, 400) for kind in ["equal", "skewed", "equal", "skewed", "skewed"]]
    losses, weights = plain_training(optimizer, batches, lazy=True)
    cached = train(make_store(optimizer), batches, most_unique_rows(batches), window=2)
    cached.assert_same_bits(train(make_store(optimizer), batches, "100%", window=1))
    assert cached.report.rows_written_back > 0
    np.testing.assert_allclose(cached.losses, losses, rtol=1e-5)
    for name in TABLES:
        np.testing.assert_allclose(cached.weights[name], weights[name], rtol=1e-4, atol=1e-5)


def test_victims_come_home_through_page_locked_memory(monkeypatch):
    """As they do where the device has memory of its own; JAX offers such memory on CPUs too."""
    device = jax.local_devices()[0]
    assert pipeline._host_memory(device) is None
    host = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    batches = make_batches(8, ["skewed", "uniform", "distinct"] * 4)
    expected = train(make_store("adam"), batches, most_unique_rows(batches))
    kinds, write_home = [], jc.LookAhead._write_home

    def recorded(store, keys, rows, part):
        kinds.extend(leaf.sharding.memory_kind for leaf in jax.tree.leaves(rows))
        write_home(store, keys, rows, part)

    monkeypatch.setattr(pipeline, "_host_memory", lambda device: host)
    monkeypatch.setattr(jc.LookAhead, "_write_home", staticmethod(recorded))
    found = train(make_store("adam"), batches, most_unique_rows(batches))
    found.assert_same_bits(expected)
    assert found.report.rows_written_back == expected.report.rows_written_back > 0
    assert kinds.count("pinned_host") >= 3 * 5  # weights and two moments of the victims of several batches


def test_without_page_locked_memory_left_victims_come_home_from_the_device(monkeypatch):
    """The cache was donated by then: an error would lose what was trained."""
    device_put, host = jax.device_put, object()
    batches = make_batches(8, ["skewed", "uniform", "distinct"] * 4)
    expected = train(make_store("adam"), batches, most_unique_rows(batches))
    refused = []

    def exhausted(arrays, device=None, **arguments):
        if device is host:
            refused.append(arrays)
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of page-locked memory")
        return device_put(arrays, device, **arguments)

    monkeypatch.setattr(pipeline, "_host_memory", lambda device: host)
    monkeypatch.setattr(jax, "device_put", exhausted)
    train(make_store("adam"), batches, most_unique_rows(batches)).assert_same_bits(expected)
    assert refused


def test_a_copy_to_page_locked_memory_that_fails_later_is_made_up_for(monkeypatch):
    block_until_ready, failed = jax.block_until_ready, []
    host = jax.sharding.SingleDeviceSharding(jax.local_devices()[0], memory_kind="pinned_host")
    batches = make_batches(8, ["skewed", "uniform", "distinct"] * 4)
    expected = train(make_store("adam"), batches, most_unique_rows(batches))

    def broken(arrays):
        if any(leaf.sharding.memory_kind == "pinned_host" for leaf in jax.tree.leaves(arrays)):
            failed.append(arrays)
            raise jax.errors.JaxRuntimeError("INTERNAL: the copy failed")
        return block_until_ready(arrays)

    monkeypatch.setattr(pipeline, "_host_memory", lambda device: host)
    monkeypatch.setattr(jax, "block_until_ready", broken)
    train(make_store("adam"), batches, most_unique_rows(batches)).assert_same_bits(expected)
    assert failed
