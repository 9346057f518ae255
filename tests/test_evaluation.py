"""Evaluating and flushing between any two steps leaves training as it is, and the counts of rows are right."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcache as jc
from training import (
    OPTIMIZERS,
    ROWS,
    SAMPLES,
    TABLES,
    dense_start,
    loss_function,
    make_batches,
    make_store,
    replace_group,
    train,
)

BATCHES = make_batches(31, ["skewed", "uniform", "distinct"] * 12)
HELD_OUT = make_batches(32, ["uniform"] * 3, last=5)


@jax.jit
def eval_step(view, plan, batch):
    rows = jc.lookup(view, plan)
    return loss_function(dense_start(), rows, batch["labels"], plan.mask)


def evaluating(every: int, results: list):
    def between(ahead, cache, step):
        if step % every == 0:
            cache, outputs = ahead.evaluate(HELD_OUT, cache, eval_step)
            jc.check(cache, ahead.store)
            results.append([float(output) for output in outputs])
        return cache

    return between


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_evaluation_every_7_steps_with_a_window_of_16_changes_no_bit(optimizer):
    cached, uncached = [], []
    with_evaluation = train(make_store(optimizer), BATCHES, 17, window=16, between=evaluating(7, cached))
    without = train(make_store(optimizer), BATCHES, 17, window=16)
    with_evaluation.assert_same_bits(without)
    everything = train(make_store(optimizer), BATCHES, "100%", between=evaluating(7, uncached))
    with_evaluation.assert_same_bits(everything)
    assert cached == uncached and len(cached) == len(BATCHES) // 7
    assert cached[0] != cached[-1]  # the evaluation sees what was trained


def test_evaluation_reads_the_rows_of_that_step():
    """Against the store's own rows, gathered in NumPy."""

    def between(ahead, cache, step):
        cache, outputs = ahead.evaluate(HELD_OUT, cache, lambda view, plan, batch: jc.lookup(view, plan))
        for batch, rows in zip(HELD_OUT, outputs, strict=True):
            for name in TABLES:
                ids = batch["ids"][name]
                np.testing.assert_array_equal(np.asarray(rows[name])[: len(ids)], ahead.store.rows(name, ids))
        return cache

    train(make_store("adam"), BATCHES[:5], 16, between=between)


def test_flushing_after_every_step_changes_no_bit_and_leaves_residency():
    tables = []

    def between(ahead, cache, step):
        before = np.array(cache.groups[0].slot_table)
        cache = ahead.flush(cache)
        jc.check(cache, ahead.store)
        assert ahead.store.step == step
        np.testing.assert_array_equal(cache.groups[0].slot_table, before)
        tables.append(before)
        return cache

    flushed = train(make_store("adam"), BATCHES, 16, window=5, between=between)
    plain = train(make_store("adam"), BATCHES, 16, window=5)
    flushed.assert_same_bits(plain)
    assert flushed.report.rows_fetched == plain.report.rows_fetched


def test_an_evaluation_that_fails_leaves_training_as_it_was():
    def between(ahead, cache, step):
        with pytest.raises(ValueError, match="has id 40"):
            ahead.evaluate([{"ids": {"user": np.array([40])}}], cache, eval_step)
        return cache

    train(make_store("sgd"), BATCHES, 17, between=between).assert_same_bits(train(make_store("sgd"), BATCHES, 17))


@pytest.mark.parametrize(("slots", "window"), [(16, 1), (20, 4), (33, 16), ("100%", 1)])
def test_counts_are_the_lookups_since_a_row_came_in(slots, window):
    """Against a dict: a row's count starts anew whenever its slot was given to it."""
    expected: dict[int, tuple[tuple[int, ...], int]] = {}
    total = 0

    def between(ahead, cache, step):
        nonlocal total
        lookups: dict[tuple[int, int], int] = {}
        for table, ids in enumerate(BATCHES[step - 1]["ids"].values()):
            for row in ids:
                lookups[table, int(row)] = lookups.get((table, int(row)), 0) + 1
                total += 1
        counts = np.array(cache.groups[0].counts)
        for slot, (table, high, low) in enumerate(np.array(cache.groups[0].slot_table).tolist()):
            assert high in (0, jc.GroupCache.FREE)
            row, count = expected.get(slot, (None, 0))
            if row != (table, low):
                count = 0  # it came in for this batch
            expected[slot] = ((table, low), count + lookups.pop((table, low), 0))
            assert counts[slot] == expected[slot][1]
        assert not lookups  # every row of the batch was resident
        return cache

    train(make_store("sgd"), BATCHES, slots, window, between=between)
    assert total == sum(len(ids) for batch in BATCHES for ids in batch["ids"].values())
    assert len(expected) == (slots if isinstance(slots, int) else ROWS * len(TABLES))


def test_the_count_of_a_hot_row_stays_at_the_most_that_an_integer_holds():
    most = np.iinfo(np.int32).max
    counts = []

    def between(ahead, cache, step):
        counts.append(np.array(cache.groups[0].counts))
        if step == 1:
            near = jnp.where(cache.groups[0].counts > 0, jnp.int32(most - 3), cache.groups[0].counts)
            cache = replace_group(cache, counts=near)
        return cache

    train(make_store("sgd"), [*make_batches(3, ["equal"])] * 3, 20, between=between)
    assert counts[0].max() == SAMPLES and counts[1].max() == counts[2].max() == most and counts[2].min() == 0
