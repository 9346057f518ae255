"""The second step and all that follow compile nothing, and no step copies a buffer."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcache as jc
from jaxcache.features import FeatureLayout
from jaxcache.optimizers import Rows
from jaxcache.state import Counters, GroupExchange, empty_cache, exchange_group
from training import (
    OPTIMIZERS,
    SAMPLES,
    dense_start,
    loss_function,
    make_batches,
    make_store,
    train,
    train_step,
)

_compilations: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: _compilations.append(event) if "backend_compile" in event else None
)


@contextmanager
def compiling(expected: int):
    """Asserts how many programs its block compiles."""
    before = len(_compilations)
    yield
    assert len(_compilations) - before == expected


def test_the_count_of_compilations_counts():
    with compiling(1):
        jax.jit(lambda x: x * 3 + 7)(np.ones(11, np.float32))


@pytest.mark.parametrize("slots", [16, "100%"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_after_the_first_compile_nothing(optimizer, slots):
    batches = make_batches(7, ["distinct", "skewed", "equal", "uniform"] * 5, last=2)
    with jc.LookAhead(make_store(optimizer), batches, ids=lambda b: b["ids"], slots=slots) as ahead:
        cache, dense = ahead.start(), dense_start()
        for number, (batch, plan) in enumerate(ahead):
            with compiling(0) if number > 0 else _anything():
                cache = ahead.exchange(cache, plan)
                cache, dense, _ = train_step(cache, plan, dense, batch["labels"])
        ahead.flush(cache)
    assert ahead.report().bound_growths == 0


@contextmanager
def _anything():
    yield


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        (jc.rowwise_adagrad(0.3), jc.rowwise_adagrad(0.3), True),
        (jc.rowwise_adagrad(0.3), jc.rowwise_adagrad(0.1), False),
        (optax.adam(0.3), optax.adam(0.1), False),
        (optax.sgd(optax.exponential_decay(0.5, 3, 0.7)), optax.sgd(optax.exponential_decay(0.1, 5, 0.9)), False),
    ],
    ids=["equal", "another rate", "another rate of adam", "another schedule"],
)
def test_a_rebuilt_store_or_another_rate_compiles_nothing(first, second, equal):
    batches = make_batches(7, ["skewed"] * 6)
    results = [train(make_store(first), batches, 16, window=2)]
    store = make_store(second)
    with compiling(0):
        results.append(train(store, batches, 16, window=2))
    # Were the rate of the first store compiled in, the second would train with it.
    assert (results[0].losses == results[1].losses) == equal


@pytest.mark.slow
def test_the_bound_on_unique_rows_grows_by_doubling_and_is_reported():
    random = np.random.default_rng(0)

    def batch(unique):
        ids = np.arange(600) % unique
        return {"ids": {"user": random.permutation(ids)}, "labels": np.zeros(600, np.float32)}

    sizes = [100, 120, 250, 130, 500, 600, 600]
    store = jc.HostStore({"user": jc.Table(5_000, 4)}, optimizer=optax.sgd(0.1))
    bounds = []
    with jc.LookAhead(store, [batch(n) for n in sizes], ids=lambda b: b["ids"], slots=700, window=3) as ahead:
        cache = ahead.start()
        for _, plan in ahead:
            cache = ahead.exchange(cache, plan)
            cache = jc.update(cache, plan, jc.lookup(cache, plan))
            bounds.append(len(plan.groups[0].unique_slots))
        ahead.flush(cache)
    assert bounds == [128, 128, 256, 256, 512, 600, 600]
    assert ahead.report().bound_growths == 3 and ahead.report().unique_bound == 600


def test_a_short_batch_is_padded_and_a_longer_one_grows_the_shape():
    batches = [*make_batches(1, ["uniform"] * 2, last=5), *make_batches(2, ["uniform"] * 3, last=3)]
    seen = []
    with jc.LookAhead(make_store("sgd"), batches, ids=lambda b: b["ids"], slots=32, window=2) as ahead:
        cache, dense = ahead.start(), dense_start()
        for batch, plan in ahead:
            cache = ahead.exchange(cache, plan)
            rows = jc.lookup(cache, plan)
            mask = np.asarray(plan.mask)
            seen.append((batch["labels"].shape[0], int(plan.samples), mask.sum()))
            assert all(leaf.shape == (SAMPLES, 4) for leaf in rows.values())
            assert (np.asarray(rows["user"])[~mask] == 0).all() and (batch["labels"][~mask] == 0).all()
            cache, dense, _ = train_step(cache, plan, dense, batch["labels"])
        ahead.flush(cache)
    assert seen == [(8, 8, 8), (8, 5, 5), (8, 8, 8), (8, 8, 8), (8, 3, 3)]

    longer = [*make_batches(1, ["uniform"]), _batch_of(12), *make_batches(2, ["uniform"])]
    report = train(make_store("sgd"), longer, 32).report
    assert report.bound_growths == 1
    train(make_store("sgd"), longer, 24, window=1).assert_same_bits(train(make_store("sgd"), longer, "100%"))


def _batch_of(samples):
    random = np.random.default_rng(5)
    ids = {name: random.integers(0, 40, samples) for name in ("user", "item")}
    return {"ids": ids, "labels": np.ones(samples, np.float32)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_of_buffer_size_is_copied(optimizer):
    """From the compiled programs' own accounts: the buffers are aliased, and temporaries are small beside them."""
    slots, unique, samples, dim = 200_000, 64, 32, 16
    tables = {"user": jc.Table(10**6, dim), "item": jc.Table(10**6, dim)}
    store = jc.HostStore(tables, optimizer=OPTIMIZERS[optimizer]())
    state = jax.eval_shape(lambda: empty_cache(store, slots))
    shape = jax.ShapeDtypeStruct

    def compiled(function, *arguments):
        return jax.jit(function, donate_argnums=0).lower(*arguments).compile().memory_analysis()

    integer = shape((), jnp.int32)
    lookups, starts = shape((2 * samples,), jnp.int32), shape((unique + 1,), jnp.int32)
    part = jc.GroupPlan(shape((unique,), jnp.int32), lookups, lookups, starts)
    features = tuple(FeatureLayout(name, 0, None, (samples,)) for name in tables)
    plan = jc.Plan((part,), {}, {}, {}, integer, integer, features)

    def step(cache, plan, dense, labels):
        rows = jc.lookup(cache, plan)
        loss, gradients = jax.value_and_grad(loss_function, argnums=1)(dense, rows, labels, plan.mask)
        return jc.update(cache, plan, gradients), loss

    rows = Rows(
        shape((unique, dim), jnp.float32),
        tuple(shape((unique, *leaf.shape), leaf.dtype) for leaf in store.groups[0].optimizer.row_shapes),
    )
    exchange = GroupExchange(shape((unique,), jnp.int32), shape((unique, 3), jnp.int32), rows)
    (group,) = state.groups
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    buffers = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(group.buffer))
    for analysis in (
        compiled(step, state, plan, shape((2 * dim,), jnp.float32), shape((samples,), jnp.float32)),
        compiled(exchange_group, group.contents, Counters(integer, integer, integer), exchange, integer),
    ):
        assert analysis.temp_size_in_bytes < buffers / 50
        assert analysis.alias_size_in_bytes >= 0.99 * whole


@pytest.mark.parametrize("batches", [[0, 8, 8], [8, 0, 8], [0, 0], []])
def test_batches_without_samples(batches):
    random = np.random.default_rng(0)

    def batch(samples):
        ids = {"user": random.integers(0, 40, samples), "item": random.integers(0, 40, (samples, 0))}
        return {"ids": ids, "labels": np.zeros(samples, np.float32)}

    store, seen = make_store("sgd"), []
    with jc.LookAhead(store, map(batch, batches), ids=lambda b: b["ids"], slots=20) as ahead:
        cache = ahead.start()
        for _, plan in ahead:
            cache = ahead.exchange(cache, plan)
            rows = jc.lookup(cache, plan)
            seen.append(rows["item"].shape)
            cache = jc.update(cache, plan, rows)
        cache, outputs = ahead.evaluate(map(batch, batches), cache, lambda view, plan, _: jc.lookup(view, plan))
    jc.check(cache, store)
    assert len(seen) == len(outputs) == len(batches) and all(shape[1:] == (0, 4) for shape in seen)


def test_only_arrays_with_an_axis_of_samples_are_padded():
    def batch(samples):
        return {
            "user": np.arange(samples),
            "placed": jax.device_put(np.ones(samples, np.float32), jax.devices()[0]),
            "weights of three classes": np.ones(3, np.float32),
            "scale": 2.0,
        }

    @jax.jit
    def step(cache, plan, batch):
        return jc.update(cache, plan, jc.lookup(cache, plan)), jnp.sum(batch["placed"])

    store = jc.HostStore({"user": jc.Table(50, 4)}, optimizer=optax.sgd(0.1))
    sums = []
    with jc.LookAhead(store, [batch(8), batch(8), batch(3)], ids=lambda b: {"user": b["user"]}, slots=20) as ahead:
        cache = ahead.start()
        for number, (content, plan) in enumerate(ahead):
            assert {name: np.shape(leaf) for name, leaf in content.items()} == {
                "user": (8,), "placed": (8,), "weights of three classes": (3,), "scale": (),
            }  # fmt: skip
            with compiling(0) if number > 0 else _anything():
                cache, total = step(ahead.exchange(cache, plan), plan, content)
            sums.append(float(total))
        ahead.flush(cache)
    assert sums == [8, 8, 3]


def test_another_pass_over_like_batches_compiles_nothing():
    """Each epoch is a pipeline of its own, whose first batch has a few unique rows more or less."""
    random = np.random.default_rng(0)
    store = jc.HostStore({"user": jc.Table(50_000, 4)}, optimizer=optax.sgd(0.1))
    step = jax.jit(lambda cache, plan: jc.update(cache, plan, jc.lookup(cache, plan)))
    cache, compiled = None, []
    for _ in range(6):
        batches = [{"user": random.integers(0, 50_000, 12_000)} for _ in range(2)]
        with jc.LookAhead(store, batches, ids=lambda b: b, slots=20_000) as ahead:
            cache = ahead.start(cache)
            before = len(_compilations)
            for _, plan in ahead:
                cache = step(ahead.exchange(cache, plan), plan)
            cache, _ = ahead.evaluate(batches, cache, lambda view, plan, _: None)
            compiled.append(len(_compilations) - before)
    assert sum(compiled[1:]) == 0


def test_a_default_device_of_the_callers_is_kept():
    """In a process of its own, which has two devices. Threads have a default device of their own."""
    program = """
import jax
jax.config.update("jax_num_cpu_devices", 2)
import numpy as np, optax, jaxcache as jc
batches = [{"user": np.arange(8) + i} for i in range(4)]
for device in jax.devices():
    store = jc.HostStore({"user": jc.Table(50, 4)}, optimizer=optax.adam(0.1))
    with jax.default_device(device), jc.LookAhead(store, batches, ids=lambda b: b, slots=8) as ahead:
        cache = ahead.start()
        for _, plan in ahead:
            cache = ahead.exchange(cache, plan)
            assert {d for leaf in jax.tree.leaves((cache, plan)) for d in leaf.devices()} == {device}
            cache = jc.update(cache, plan, jc.lookup(cache, plan))
        cache = ahead.flush(cache)
    jc.check(cache, store)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_exchanges_of_every_size_are_compiled_before_the_first_step():
    random = np.random.default_rng(0)
    batches = [{"user": random.integers(0, 4_000, 1_500)} for _ in range(25)]
    store = jc.HostStore({"user": jc.Table(10**6, 4)}, optimizer=optax.sgd(0.1))
    step = jax.jit(lambda cache, plan: jc.update(cache, plan, jc.lookup(cache, plan)))
    fetched = []
    with jc.LookAhead(store, batches, ids=lambda b: b, slots=5_000) as ahead:
        cache = ahead.start()
        for number, (_, plan) in enumerate(ahead):
            with compiling(0) if number > 0 else _anything():
                cache = step(ahead.exchange(cache, plan), plan)
            fetched.append(ahead.report().rows_fetched)
        ahead.flush(cache)
    missed = np.diff(fetched)
    assert missed.max() > 500 and missed.min() < 32  # from the largest size class to the smallest


def test_state_that_starts_from_the_weights_compiles_for_a_few_sizes_only():
    batches = make_batches(7, ["skewed", "uniform"] * 12)
    transformation = optax.contrib.schedule_free_sgd(0.1)
    train(make_store(transformation), batches, 16)
    before = len(_compilations)
    train(store := make_store(transformation), batches, 16)
    assert len(_compilations) - before < 12 and store.groups[0].optimizer.row_shapes
