"""Blocks of steps in one program train the bits of the plain loop, lose nothing, and are cut where they must be."""

from __future__ import annotations

import itertools
import signal
import threading
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcache as jc
from extent import examples, long
from jaxcache import blocks, pipeline
from jaxcache.features import FeatureLayout
from jaxcache.optimizers import Rows
from jaxcache.state import GroupExchange
from mixed import configurations, make_step
from mixed import train as train_mixed
from training import (
    ROWS,
    TABLES,
    Result,
    dense_start,
    loss_function,
    make_batches,
    make_store,
    most_unique_rows,
    train,
    train_step,
)

KINDS = ("skewed", "uniform", "equal", "distinct")
BATCHES = make_batches(11, KINDS * 5, last=3)
LEAST = most_unique_rows(BATCHES)

_compilations: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: _compilations.append(event) if "backend_compile" in event else None
)


def block_step(cache, plan, dense, batch):
    """The step of the plain loop as `scan` calls it; its output shows which plan and batch it was given."""
    cache, dense, loss = train_step.__wrapped__(cache, plan, dense, batch["labels"])
    return cache, dense, {"loss": loss, "step": plan.step, "labels": batch["labels"], "one": 1.0}


def unlabelled_step(cache, plan, train, batch):
    return jc.update(cache, plan, jc.lookup(cache, plan)), train, None


def look_ahead(batches=BATCHES, slots=60, store=None, **arguments):
    arguments = {"window": 3, **arguments}
    return jc.LookAhead(store or make_store("momentum"), batches, ids=lambda b: b["ids"], slots=slots, **arguments)


def train_blocks(
    store, batches, slots, steps, window: int | None = 4, step=block_step, between=None, cache=None, **arguments
):
    """As `training.train`, by blocks of `steps`. Returns the result, the length of each block and the cache."""
    dense, losses, lengths, first = dense_start(), [], [], store.step
    with look_ahead(batches, slots, store, window=window, **arguments) as ahead:
        cache = ahead.start(cache)
        for stacked, plans in ahead.blocks(steps):
            cache, dense, outputs = ahead.scan(step, cache, plans, dense, {"labels": stacked["labels"]})
            np.testing.assert_array_equal(outputs["labels"], stacked["labels"])
            np.testing.assert_array_equal(outputs["step"], first + sum(lengths) + np.arange(len(plans.step)))
            lengths.append(len(plans.step))
            losses.extend(outputs["loss"])
            if between is not None:
                cache = between(ahead, cache)
        cache = ahead.flush(cache)
    jc.check(cache, store)
    assert store.step == first + sum(lengths) and sum(lengths) == len(losses) == ahead.report().steps
    return Result.of(store, losses, ahead.report()), lengths, cache


def weights(store) -> np.ndarray:
    return np.concatenate([store.rows(name, np.arange(ROWS)) for name in TABLES])


def assert_trained(store, steps, optimizer="momentum", batches=BATCHES):
    """The store holds the rows after the first `steps` steps."""
    assert store.step == steps
    expected = make_store(optimizer)
    train(expected, batches[:steps], "100%")
    np.testing.assert_array_equal(weights(store), weights(expected))


# The bits


@settings(max_examples=examples(5, 20))
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=12),
    seed=st.integers(0, 2**16),
    last=st.sampled_from([8, 1, 3]),
    slots=st.sampled_from([16, 33]),  # few, as each compiles the programs anew
    steps=st.sampled_from([1, 4]),
    window=st.integers(1, 16),
)
def test_blocks_train_the_bits_of_the_plain_loop(kinds, seed, last, slots, steps, window):
    batches = make_batches(seed, kinds, last)
    by_blocks, lengths, _ = train_blocks(make_store("momentum"), batches, slots, steps, window)
    one_by_one = train(make_store("momentum"), batches, slots, window)
    by_blocks.assert_same_bits(one_by_one)
    assert set(lengths) <= {steps, 1, 2}
    for name in ("steps", "lookups", "unique_rows", "lookup_hits", "rows_fetched", "rows_written_back", "rows_flushed"):
        assert getattr(by_blocks.report, name) == getattr(one_by_one.report, name)


def test_blocks_with_every_row_on_the_device():
    whole, lengths, _ = train_blocks(make_store("momentum"), BATCHES, "100%", 4)
    assert lengths == [4] * 5 and whole.report.rows_fetched == 0
    whole.assert_same_bits(train(make_store("momentum"), BATCHES, 16))


def train_mixed_blocks(configuration, store, steps, **arguments):
    """As `mixed.train`. What it returns is rows, states, scalars and losses."""
    frozen = [name for name, kind in configuration.features.items() if _is_frozen(configuration, kind)]
    step = make_step(without=() if configuration.all_gradients else tuple(frozen))
    losses = []

    def block_step(cache, plan, train, batch):
        cache, loss = step(cache, plan, batch)
        return cache, train, loss

    with jc.LookAhead(
        store,
        configuration.batches(),
        ids=lambda batch: batch["ids"],
        features=configuration.named_features,
        **arguments,
    ) as ahead:
        cache = ahead.start()
        for batches, plans in ahead.blocks(steps):
            cache, _, outputs = ahead.scan(block_step, cache, plans, (), batches["labels"])
            losses.extend(map(float, outputs))
        cache = ahead.flush(cache)
    jc.check(cache, store)
    return losses, ahead.report()


def _is_frozen(configuration, kind):
    return configuration.tables[kind.table].keeps == "frozen"


def check_mixed(configuration, steps):
    store, other = configuration.make_store(), configuration.make_store()
    losses, report = train_mixed_blocks(configuration, store, steps, **configuration.cached_arguments(store))
    expected = train_mixed(configuration, other, **configuration.cached_arguments(other))
    np.testing.assert_array_equal(losses, expected.losses)
    for name, kind in configuration.tables.items():
        every = np.arange(kind.rows)
        for mine, theirs in zip(
            [store.rows(name, every), *store.row_state(name, every)], expected.rows[name], strict=True
        ):
            np.testing.assert_array_equal(mine, theirs)
    assert report.ignored == expected.report.ignored and report.rows_fetched == expected.report.rows_fetched
    for mine, theirs in zip((part.scalars for part in store.groups), (p.scalars for p in other.groups), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.slow
@settings(max_examples=1)
@given(configuration=configurations(), steps=st.sampled_from([2, 3, 8]))
def test_groups_dtypes_bags_and_policies_by_blocks(configuration, steps):
    check_mixed(configuration, steps)


def ragged_batches(samples=8, number=8):
    random = np.random.default_rng(5)
    batches = []
    for i in range(number):
        count = 3 if i == number - 1 else samples
        lengths = random.integers(0, 3, count) + 20 * (i >= 4)  # so that the bound on ragged ids grows
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        weight = random.random(offsets[-1]).astype(np.float32)
        words = jc.Bags(random.integers(0, 50, offsets[-1]), offsets, weight)
        ids = {"user": random.zipf(1.5, count) % 40, "words": words, "city": random.integers(0, 9, count)}
        batches.append({"ids": ids, "labels": random.normal(size=count).astype(np.float32)})
    return batches


RAGGED = ragged_batches()
POLICIES = {
    "lookahead": jc.lookahead,
    "lru": jc.lru,
    "no_cache": jc.no_cache,
    "static": lambda: jc.static({"user": np.arange(40)[::-1], "word": np.arange(60), "city": np.arange(9)}),
}


RAGGED_TABLES = {
    "user": jc.Table(40, 4),
    "word": jc.Table(60, 3, dtype=jnp.bfloat16, rounding="stochastic", optimizer=optax.sgd(0.05)),
    "city": jc.Table(9, 2, frozen=True),
}
RAGGED_FEATURES = {"words": jc.Feature("word", combiner="sum")}


def ragged_step(cache, plan, train, labels):
    def loss_of(rows):
        found = sum(jnp.sum(array, axis=1) for array in rows.values())
        return jnp.sum(jnp.where(plan.mask, (found - labels) ** 2, 0.0))

    loss, gradients = jax.value_and_grad(loss_of)(jc.lookup(cache, plan))
    return jc.update(cache, plan, gradients), train, loss


ragged_single = jax.jit(ragged_step)
LEFT_OUT = long("other policies")


@pytest.mark.parametrize(
    "policy", [name if name in ("lookahead", "no_cache") else pytest.param(name, marks=LEFT_OUT) for name in POLICIES]
)
def test_groups_ragged_bags_weights_and_growing_bounds_under_every_policy(policy):
    results = []
    for steps in (None, 2):
        store, losses, lengths = jc.HostStore(RAGGED_TABLES, optimizer=jc.rowwise_adagrad(0.1)), [], []
        arguments = {"slots": {"user": 12, "word": 50, "city": 9}}
        with jc.LookAhead(
            store, RAGGED, lambda b: b["ids"], features=RAGGED_FEATURES, policy=POLICIES[policy](), **arguments
        ) as ahead:
            cache = ahead.start()
            if steps is None:
                for batch, plan in ahead:
                    cache, _, loss = ragged_single(ahead.exchange(cache, plan), plan, (), batch["labels"])
                    losses.append(loss)
            else:
                for batches, plans in ahead.blocks(steps):
                    cache, _, outputs = ahead.scan(ragged_step, cache, plans, (), batches["labels"])
                    losses.extend(outputs)
                    lengths.append(len(outputs))
            cache = ahead.flush(cache)
        jc.check(cache, store)
        report = ahead.report()
        leaves = [[store.rows(name, np.arange(t.rows)), *store.row_state(name, np.arange(t.rows))]
                  for name, t in RAGGED_TABLES.items()]  # fmt: skip
        moved = (report.rows_fetched, report.rows_written_back, report.bound_growths, report.lookups, report.steps)
        results.append((np.array(losses), leaves, moved))
    assert max(lengths) == 2 or policy in ("no_cache", "static")
    assert report.bound_growths > 0
    for mine, theirs in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1]), strict=True):
        np.testing.assert_array_equal(np.asarray(mine).astype(np.float32), np.asarray(theirs).astype(np.float32))


@pytest.mark.parametrize("steps", [1, 2, pytest.param(8, marks=pytest.mark.slow)])
def test_what_a_step_returns_is_not_computed_otherwise_because_it_is_stacked(steps):
    """On XLA for CPUs stacking an output in the step that makes it changes how the step is fused, and its last bits."""
    random = np.random.default_rng(0)
    batches = [
        {"user": random.integers(0, 50, 32), "x": random.normal(size=(32, 7)).astype(np.float32)} for _ in range(16)
    ]

    def step(cache, plan, dense, batch):
        rows = jc.lookup(cache, plan)["user"]
        sums = jnp.cumsum(batch["x"] * 0.1 + dense * 0.2 * batch["x"], axis=0)
        sums = jnp.tanh(sums) * sums - 0.3 * sums

        def loss_of(rows, dense):
            return jnp.sum(jnp.log1p(jnp.exp(rows @ dense[:4, :4])) * 0.1) + jnp.var(sums * dense)

        gradients, gradient = jax.grad(loss_of, argnums=(0, 1))(rows, dense)
        cache = jc.update(cache, plan, {"user": gradients})
        return cache, dense - 0.1 * gradient + 0.01 * sums, (sums, jnp.sum(sums), jnp.linalg.norm(gradient))

    results = []
    for blocks_of in (None, steps):
        store, dense, outputs = jc.HostStore({"user": jc.Table(50, 4)}, optax.adagrad(0.1)), jnp.ones((32, 7)) / 2, []
        with jc.LookAhead(store, batches, lambda b: {"user": b["user"]}, slots=50) as ahead:
            cache, single = ahead.start(), jax.jit(step)
            for batch, plan in ahead if blocks_of is None else ahead.blocks(blocks_of):
                if blocks_of is None:
                    cache, dense, output = single(ahead.exchange(cache, plan), plan, dense, batch)
                    output = jax.tree.map(lambda leaf: leaf[None], output)
                else:
                    cache, dense, output = ahead.scan(step, cache, plan, dense, batch)
                outputs.append(output)
            ahead.flush(cache)
        stacked = jax.tree.map(lambda *leaves: np.concatenate(leaves), *outputs)
        results.append([store.rows("user", np.arange(50)), dense, *stacked])
    for mine, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_jitted_step_that_donates_and_a_generator_of_random_numbers():
    @jax.jit
    def dropped(cache, plan, train, batch):
        key, dense = train
        key, part = jax.random.split(key)
        labels = jnp.where(jax.random.bernoulli(part, 0.8, batch["labels"].shape), batch["labels"], 0.0)
        cache, dense, loss = train_step(cache, plan, dense, labels)
        return cache, (key, dense), loss

    results = []
    for steps in (None, 4):
        store, train, losses = make_store("momentum"), (jax.random.key(1), dense_start()), []
        with look_ahead(store=store) as ahead:
            cache = ahead.start()
            for batch, plan in ahead if steps is None else ahead.blocks(steps):
                if steps is None:
                    cache, train, loss = dropped(ahead.exchange(cache, plan), plan, train, {"labels": batch["labels"]})
                    losses.append(loss[None])
                else:
                    part = {"labels": batch["labels"]}
                    cache, train, loss = ahead.scan(dropped, cache, plan, train, part)
                    losses.append(loss)
            ahead.flush(cache)
        results.append([np.concatenate(losses), jax.random.key_data(train[0]), train[1], weights(store)])
    for mine, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(mine, theirs)


# Where blocks are cut


def test_blocks_are_as_long_as_asked_and_what_is_left_comes_in_powers_of_two():
    assert train_blocks(make_store("momentum"), BATCHES[:15], 60, 4)[1] == [4, 4, 4, 2, 1]
    assert train_blocks(make_store("momentum"), BATCHES[:8], 60, 5)[1] == [5, 2, 1]
    assert train_blocks(make_store("momentum"), [], 60, 5)[1] == []


def test_a_row_that_the_block_itself_evicts_is_fetched_in_the_next_one():
    """Two batches in turn that share no row and fill the cache; the third is the first again."""
    labels = np.ones(8, np.float32)
    batches = [
        {"ids": {name: np.arange(8) + 8 * part for name in TABLES}, "labels": labels}
        for part in [0, 1, 2, 3, 2, 3, 0, 1, 0]
    ]
    store = make_store("momentum")
    write = store.groups[0].write
    store.groups[0].write = lambda *arguments: (time.sleep(0.01), write(*arguments))
    result, lengths, _ = train_blocks(store, batches, 16, 8, window=1)
    # Rows of parts 2, 3, 0 and 1 leave one step and are back in the step behind it, or some steps later.
    assert lengths == [4, 1, 2, 1, 1]
    result.assert_same_bits(train(make_store("momentum"), batches, "100%"))


def test_a_block_is_cut_before_shapes_grow():
    random = np.random.default_rng(0)

    def batch(unique):
        return {"ids": {"user": random.permutation(np.arange(600) % unique)}, "labels": np.zeros(600, np.float32)}

    store = jc.HostStore({"user": jc.Table(5_000, 4)}, optimizer=optax.sgd(0.1))
    batches, seen = [batch(n) for n in [100, 120, 250, 130, 600, 600]], []
    with look_ahead(batches, 700, store) as ahead:
        cache = ahead.start()
        for stacked, plans in ahead.blocks(4):
            cache, _, outputs = ahead.scan(unlabelled_step, cache, plans, (), stacked)
            seen.append((len(plans.step), plans.groups[0].unique_slots.shape[1]))
        cache = ahead.flush(cache)
    jc.check(cache, store)
    assert outputs is None and seen == [(2, 128), (2, 256), (2, 600)] and ahead.report().bound_growths == 2


def test_batches_of_another_make_are_not_stacked_together():
    batches = [dict(batch, labels=batch["labels"].astype(dtype)) for batch, dtype in
               zip(BATCHES, ["float32", "float32", "float16", "float32"], strict=False)]  # fmt: skip
    seen = []
    with look_ahead(batches) as ahead:
        cache = ahead.start()
        for stacked, plans in ahead.blocks(4):
            seen.append((len(plans.step), stacked["labels"].dtype))
            cache, _, _ = ahead.scan(unlabelled_step, cache, plans, (), stacked)
    assert seen == [(2, np.float32), (1, np.float16), (1, np.float32)]


def test_stacks():
    tags = [np.arange(2), np.arange(3)]
    trees = [{"tags": tags[i], "x": jnp.ones(2), "y": np.ones((2, 3), np.float16), "z": i} for i in range(2)]
    stacked = blocks.stack(trees)
    assert stacked["tags"].dtype == object and isinstance(stacked["x"], jax.Array) and stacked["x"].shape == (2, 2)
    assert isinstance(stacked["y"], np.ndarray) and stacked["y"].dtype == np.float16 and stacked["z"].tolist() == [0, 1]
    tags[1][:] = 7  # the loader goes on
    assert [array.tolist() for array in stacked["tags"]] == [[0, 1], [0, 1, 2]]


# What runs


def test_blocks_after_the_first_compile_nothing():
    """Nor does another pass, or a batch that the loader has placed on the device, which commits what comes of it."""
    placed = [dict(batch, labels=jax.device_put(batch["labels"], jax.devices()[0])) for batch in BATCHES[:15]]
    store, other, seen = make_store("momentum"), make_store("momentum"), []
    _, lengths, cache = train_blocks(
        store, placed, 60, 4, between=lambda ahead, cache: seen.append(len(_compilations)) or cache
    )
    assert lengths == [4, 4, 4, 2, 1] and seen[0] == seen[2]
    before = len(_compilations)
    train_blocks(store, placed, 60, 4, cache=cache)
    train_blocks(other, placed, 60, 4)
    assert len(_compilations) == before


@pytest.mark.parametrize("length", [1, 8])
def test_nothing_of_buffer_size_is_copied(length):
    slots, unique, samples, dim, bound = 200_000, 64, 32, 16, 400
    tables = {"user": jc.Table(10**6, dim), "item": jc.Table(10**6, dim)}
    store = jc.HostStore(tables, optimizer=optax.sgd(0.1, momentum=0.9))
    state, shape = jax.eval_shape(lambda: jc.init(store, slots)), jax.ShapeDtypeStruct
    integers, lookups = shape((length,), jnp.int32), shape((length, 2 * samples), jnp.int32)
    part = jc.GroupPlan(shape((length, unique), jnp.int32), lookups, lookups, shape((length, unique + 1), jnp.int32))
    plans = jc.Plan((part,), {}, {}, {}, integers, integers,
                    tuple(FeatureLayout(name, 0, None, (samples,)) for name in tables))  # fmt: skip
    kept = [shape((bound, *leaf.shape[1:]), leaf.dtype) for leaf in jax.tree.leaves(state.groups[0].buffer)]
    rows = Rows(kept[0], tuple(kept[1:]))
    exchange = GroupExchange(shape((bound,), jnp.int32), shape((bound, 3), jnp.int32), rows)
    moves = blocks.Moves((exchange,), shape((length, 1), jnp.int32), shape((length, 1), jnp.int32))

    def step(cache, plan, dense, labels):
        rows = jc.lookup(cache, plan)
        loss, (gradient, gradients) = jax.value_and_grad(loss_function, argnums=(0, 1))(dense, rows, labels, plan.mask)
        return jc.update(cache, plan, gradients), dense - gradient, loss

    dense, labels = shape((2 * dim,), jnp.float32), shape((length, samples), jnp.float32)
    program = blocks.block_program(jax.devices()[0]).lower(step, (unique,), state, dense, moves, plans, labels)
    figures = program.compile().memory_analysis()
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert figures.temp_size_in_bytes < whole / 50 and figures.alias_size_in_bytes >= whole


def test_rows_of_a_block_travel_one_behind_the_other_in_room_that_doubles():
    random, batches, shapes = np.random.default_rng(3), [], []
    for number in range(16):
        new = 90 if number in (0, 2, 4) or number >= 8 else 0  # 270 in the first block, 720 in the second
        ids = np.concatenate([np.arange(new) + 100 * number, random.permutation(90)[: 90 - new]])
        batches.append({"ids": {"user": ids}, "labels": np.zeros(90, np.float32)})
    stores = [jc.HostStore({"user": jc.Table(5_000, 4)}, optimizer=optax.adagrad(0.1)) for _ in range(2)]
    with look_ahead(batches, 400, stores[0]) as ahead:
        cache = ahead.start()
        for stacked, plans in ahead.blocks(8):
            shapes.append(ahead._current.moves.groups[0].rows.weights.shape)
            cache, _, _ = ahead.scan(unlabelled_step, cache, plans, (), stacked)
        ahead.flush(cache)
    assert shapes == [(384 + 90, 4), (630 + 90, 4)]  # not eight times 90, before that much is needed
    with look_ahead(batches, 400, stores[1]) as ahead:
        cache, single = ahead.start(), jax.jit(unlabelled_step)
        for batch, plan in ahead:
            cache, _, _ = single(ahead.exchange(cache, plan), plan, (), batch)
        ahead.flush(cache)
    np.testing.assert_array_equal(*(store.rows("user", np.arange(5_000)) for store in stores))


def test_two_blocks_are_under_way_at_most():
    """While one is trained the victims of the one before come home, here slowly."""
    store = jc.HostStore({"user": jc.Table(1_000, 4)}, optimizer=optax.sgd(0.1))
    write, under_way = store.groups[0].write, []
    store.groups[0].write = lambda *arguments: (time.sleep(0.2), write(*arguments))
    batches = [{"ids": {"user": np.arange(8) + 8 * i}, "labels": np.zeros(8, np.float32)} for i in range(32)]
    with look_ahead(batches, 32, store) as ahead:
        cache = ahead.start()
        for stacked, plans in ahead.blocks(4):
            cache, _, _ = ahead.scan(unlabelled_step, cache, plans, (), stacked)
            under_way.append(ahead._exchanged - ahead._landed)
        ahead.flush(cache)
    assert len(under_way) == 8 and max(under_way) == 8


def test_the_next_block_is_made_while_one_is_trained_and_few_are_held():
    drawn = []

    def endless():
        for number in itertools.count():
            batch = {"ids": BATCHES[number % 19]["ids"], "labels": BATCHES[number % 19]["labels"].copy()}
            drawn.append(weakref.ref(batch["labels"]))
            yield batch

    with look_ahead(endless(), 60, window=2) as ahead:
        cache, dense = ahead.start(), dense_start()
        for number, (stacked, plans) in enumerate(ahead.blocks(4)):
            waited = ahead.report().stages["step"].wait
            cache, dense, _ = ahead.scan(block_step, cache, plans, dense, {"labels": stacked["labels"]})
            time.sleep(0.3)
            # Planned and collected: two blocks that wait, one on its way to them, and the window.
            assert 4 * (number + 1) + 4 <= len(drawn) <= 4 * (number + 1) + 12 + 10
            assert sum(reference() is not None for reference in drawn) <= 10  # none of those in blocks
            if number == 3:
                break
        next(iter(ahead.blocks(4)))
        assert ahead.report().stages["step"].wait - waited < 0.05


def test_victims_of_blocks_come_home_through_page_locked_memory(monkeypatch):
    host = jax.sharding.SingleDeviceSharding(jax.local_devices()[0], memory_kind="pinned_host")
    kinds, write_home = [], jc.LookAhead._write_home

    def recorded(store, keys, rows, part):
        kinds.extend(leaf.sharding.memory_kind for leaf in jax.tree.leaves(rows))
        write_home(store, keys, rows, part)

    monkeypatch.setattr(pipeline, "_host_memory", lambda device: host)
    monkeypatch.setattr(jc.LookAhead, "_write_home", staticmethod(recorded))
    result, _, _ = train_blocks(make_store("momentum"), BATCHES, 33, 4)
    result.assert_same_bits(train(make_store("momentum"), BATCHES, "100%"))
    assert kinds.count("pinned_host") >= 3 * 3


def test_flush_and_evaluate_between_blocks_and_single_steps_behind_them():
    def between(ahead, cache):
        cache, outputs = ahead.evaluate(BATCHES[:2], cache, lambda view, plan, batch: jc.lookup(view, plan)["user"])
        assert len(outputs) == 2
        jc.check(cache, store)
        return cache

    store = make_store("momentum")
    _, _, cache = train_blocks(store, BATCHES, 60, 4, between=between)
    assert_trained(store, 20)
    train(store, BATCHES[:5], 60, cache=cache)
    assert store.step == 25
    whole = make_store("momentum")
    train(whole, BATCHES, "100%")
    train(whole, BATCHES[:5], "100%")
    np.testing.assert_array_equal(weights(store), weights(whole))


# Mistakes


def test_mistakes_with_blocks_are_explained():
    with look_ahead() as ahead:
        with pytest.raises(RuntimeError, match=r"blocks works inside the block, after start\(\)"):
            ahead.blocks(4)
        cache, dense = ahead.start(), dense_start()
        for steps in (0, -1, 2.0, True, None):
            with pytest.raises(ValueError, match=r"the steps of a block must be an integer, at least 1"):
                ahead.blocks(steps)
        source = ahead.blocks(4)
        with pytest.raises(RuntimeError, match=r"scan runs what .* yields: call it once for each block"):
            ahead.scan(block_step, cache, None, dense, None)
        stacked, plans = next(source)
        labels = {"labels": stacked["labels"]}
        with pytest.raises(RuntimeError, match=r"blocks\(8\) was called on a pipeline that yields blocks\(4\)"):
            ahead.blocks(8)
        with pytest.raises(RuntimeError, match=r"next\(\) was called on a pipeline that yields blocks\(4\)"):
            next(ahead)
        with pytest.raises(RuntimeError, match=r"exchange is for single steps, .*ahead.scan\(train_step"):
            ahead.exchange(cache, plans)
        with pytest.raises(RuntimeError, match=r"the block up to batch 3 was not scanned: .*ahead.scan\(train_step"):
            next(source)
        with pytest.raises(RuntimeError, match="scan got the plans of another block"):
            ahead.scan(block_step, cache, jax.tree.map(jnp.asarray, plans), dense, labels)
        with pytest.raises(ValueError, match=r"batches\['labels'\] has shape \(3, 8\)"):
            ahead.scan(block_step, cache, plans, dense, {"labels": stacked["labels"][:3]})
        with pytest.raises(ValueError, match=r"batches\[0\] has shape \(\)"):
            ahead.scan(block_step, cache, plans, dense, [1.0])
        with pytest.raises(ValueError, match="cannot take batches, whose shape differs from batch to batch"):
            ahead.scan(block_step, cache, plans, dense, np.array([[1], [2, 3], [4], []], object))
        with pytest.raises(TypeError, match="scan needs a train step that returns `cache, train, output`"):
            ahead.scan(lambda cache, plan, dense, batch: (cache, dense), cache, plans, dense, labels)
        with pytest.raises(TypeError, match=r"returns `train` in the form in which it was given: .*float32\[8\]"):
            ahead.scan(lambda *given: (given[0], (given[2], given[2]), 0), cache, plans, dense, labels)
        with pytest.raises(TypeError, match="scan needs the CacheState"):
            ahead.scan(block_step, None, plans, dense, labels)
        old = cache
        cache, dense, _ = ahead.scan(block_step, cache, plans, dense, labels)  # none of it did any harm
        with pytest.raises(RuntimeError, match=r"scan got a cache that was donated"):
            ahead.scan(block_step, old, plans, dense, labels)
        with pytest.raises(RuntimeError, match="call it once for each block"):
            ahead.scan(block_step, cache, plans, dense, labels)
        cache = ahead.flush(cache)
        assert int(cache.step) == 4
    with pytest.raises(RuntimeError, match="scan works inside the block"):
        ahead.scan(block_step, cache, plans, dense, labels)

    with look_ahead() as ahead:
        cache = ahead.start()
        _, plan = next(ahead)
        with pytest.raises(RuntimeError, match=r"blocks\(4\) was called on a pipeline that yields batches one by one"):
            ahead.blocks(4)
        with pytest.raises(RuntimeError, match=r"call it once for each block, and exchange for single batches"):
            ahead.scan(block_step, cache, plan, dense_start(), None)


def test_a_step_without_update_inside_a_block_is_found_and_what_was_trained_before_is_saved():
    def step(cache, plan, dense, batch):
        updated, dense, output = block_step(cache, plan, dense, batch)
        return jax.tree.map(lambda old, new: jnp.where(plan.step == 6, old, new), cache, updated), dense, output

    store = make_store("momentum")
    with look_ahead(slots=60, store=store) as ahead:
        cache, dense = ahead.start(), dense_start()
        with pytest.raises(RuntimeError, match="step 6 has no update"):
            for stacked, plans in ahead.blocks(4):
                cache, dense, _ = ahead.scan(step, cache, plans, dense, {"labels": stacked["labels"]})
        with pytest.raises(RuntimeError, match="step 6 has no update"):
            ahead.flush(cache)
    assert_trained(store, 6)


def test_a_stale_cache_given_to_scan_is_found():
    store = make_store("momentum")
    with look_ahead(store=store) as ahead:
        cache, dense = ahead.start(), dense_start()
        with pytest.raises(RuntimeError, match="exchange got a stale cache, of step 0 with 0 exchanges"):
            for stacked, plans in ahead.blocks(4):
                stale = jax.tree.map(jnp.copy, cache)
                _, dense, _ = ahead.scan(block_step, cache, plans, dense, {"labels": stacked["labels"]})
                cache = stale
        with pytest.raises(RuntimeError, match="stale cache"):
            ahead.flush(cache)


# Failures


class Broke(Exception):
    pass


@pytest.mark.parametrize("at", [0, 6, 13])
def test_an_error_of_the_loader_comes_at_the_next_block(at):
    def breaking():
        yield from BATCHES[:at]
        raise Broke("row 7")

    store, steps = make_store("momentum"), 0
    with look_ahead(breaking(), store=store) as ahead:
        cache, dense = ahead.start(), dense_start()
        with pytest.raises(Broke, match="row 7"):
            for stacked, plans in ahead.blocks(4):
                cache, dense, _ = ahead.scan(block_step, cache, plans, dense, {"labels": stacked["labels"]})
                steps += len(plans.step)
        with pytest.raises(Broke, match="row 7"):  # however often it is asked for
            next(ahead.blocks(4))
        cache = ahead.flush(cache)
    assert steps <= at
    assert_trained(store, steps)


def test_a_loader_that_writes_into_its_arrays_is_found_out():
    held = {"ids": {name: np.zeros(8, np.int64) for name in TABLES}, "labels": np.zeros(8, np.float32)}

    def reusing():
        for batch in BATCHES[:19]:
            held["labels"][:] = batch["labels"]
            yield held

    with look_ahead(reusing()) as ahead:
        ahead.start()
        source = ahead.blocks(4)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="writes into arrays that it has yielded"):
                next(source)


def test_victims_of_a_block_whose_write_back_failed_once_are_written_by_flush():
    store, calls = make_store("momentum"), itertools.count()
    write = store.groups[0].write

    def failing_once(keys, rows):
        if next(calls) == 1:
            raise Broke("for a moment")
        write(keys, rows)

    store.groups[0].write = failing_once
    steps = 0
    with look_ahead(slots=LEAST, store=store) as ahead:
        cache, dense = ahead.start(), dense_start()
        with pytest.raises(Broke):
            for stacked, plans in ahead.blocks(4):
                cache, dense, _ = ahead.scan(block_step, cache, plans, dense, {"labels": stacked["labels"]})
                steps += len(plans.step)
        cache = ahead.flush(cache)
    jc.check(cache, store)
    assert 0 < steps < len(BATCHES)
    assert_trained(store, steps)


@pytest.mark.parametrize("place", ["inside scan", "inside the step", "between"])
def test_ctrl_c_takes_effect_at_the_next_block_or_scan_and_loses_nothing(place, monkeypatch):
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    store, seen = make_store("momentum"), 0
    count = jc.LookAhead._count_exchange

    def struck(*arguments):
        count(*arguments)
        if place == "inside scan" and arguments[1].ahead.number == 9:
            signal.raise_signal(signal.SIGINT)

    struck_once = []

    def step(cache, plan, dense, batch):
        if place == "inside the step" and not struck_once:  # while it is traced
            struck_once.append(True)
            signal.raise_signal(signal.SIGINT)
        return block_step(cache, plan, dense, batch)

    monkeypatch.setattr(jc.LookAhead, "_count_exchange", struck)
    try:
        with look_ahead(slots=60, store=store) as ahead:
            cache, dense = ahead.start(), dense_start()
            with pytest.raises(KeyboardInterrupt):
                for stacked, plans in ahead.blocks(4):
                    if place == "between" and seen == 4:
                        signal.raise_signal(signal.SIGINT)
                    cache, dense, _ = ahead.scan(step, cache, plans, dense, {"labels": stacked["labels"]})
                    seen += len(plans.step)
            cache = ahead.flush(cache)
        assert seen == store.step == {"inside scan": 12, "inside the step": 4, "between": 4}[place]
    finally:
        signal.signal(signal.SIGINT, previous)
    monkeypatch.undo()
    assert_trained(store, seen)


def test_leaving_the_loop_early_ends_all_threads():
    with look_ahead(BATCHES * 5, slots=60) as ahead:
        cache, dense = ahead.start(), dense_start()
        for stacked, plans in ahead.blocks(4):
            cache, dense, _ = ahead.scan(block_step, cache, plans, dense, {"labels": stacked["labels"]})
            break
        next(ahead.blocks(4))  # a block that nobody scans
    cache = ahead.flush(cache)
    assert int(cache.step) == 4
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("jaxcache-")] == []
