"""Policies change what moves, never what is trained."""

from __future__ import annotations

from contextlib import nullcontext

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcache as jc
import oracle
from extent import examples, long
from jaxcache.batches import Batch
from jaxcache.features import Features
from test_shapes import compiling
from training import ROWS, SAMPLES, TABLES, dense_start, make_batches, make_store, most_unique_rows, train, train_step

KINDS = ("skewed", "uniform", "equal", "distinct")
POLICIES = ("lookahead", "scratchpipe", "lru", "lfu", "frequency", "static", "no_cache")


def count(batches):
    """Lookups of each row in `batches`, by table."""
    columns = {name: np.concatenate([batch["ids"][name] for batch in batches]) for name in TABLES}
    return {name: np.bincount(ids, minlength=ROWS) for name, ids in columns.items()}


def make_policy(name, counts):
    factory = getattr(jc, name)
    return factory(counts) if name in ("frequency", "static") else factory()


def keys_of(batch):
    """The unique rows of a batch, as pairs of table and id."""
    return {(name, row) for name, ids in batch["ids"].items() for row in ids.tolist()}


def train_with(policy, batches, slots, optimizer="sgd", **arguments):
    return train(make_store(optimizer), batches, slots, **{"window": None, "policy": policy, **arguments})


# The bits of training


@st.composite
def streams(draw):
    """Batches, and a capacity from the minimum upward; few sizes of it, as each is compiled for."""
    kinds = draw(st.lists(st.sampled_from(KINDS), max_size=11))
    kinds.insert(draw(st.integers(0, max(0, len(kinds) - 1))), "distinct")
    batches = make_batches(draw(st.integers(0, 2**16)), kinds, last=draw(st.sampled_from([SAMPLES, 1, 3])))
    least = 2 * SAMPLES
    assert len(kinds) == 1 or most_unique_rows(batches) == least
    return batches, draw(st.sampled_from([least, least, 20, 33]))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=examples(3, 12))
@given(stream=streams(), flushed=st.sets(st.integers(1, 12)))
def test_every_policy_gives_the_bits_of_uncached_training(name, optimizer, stream, flushed):
    """Flushed between any steps."""
    batches, slots = stream

    def flush(ahead, cache, step):
        return ahead.flush(cache) if step in flushed else cache

    cached = train_with(make_policy(name, count(batches)), batches, slots, optimizer, between=flush)
    cached.assert_same_bits(train(make_store(optimizer), batches, "100%"))


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_gives_those_bits_with_as_many_slots_as_rows(name):
    batches = make_batches(3, ["skewed", "uniform"] * 6)
    cached = train_with(make_policy(name, count(batches)), batches, "100%", "adam")
    cached.assert_same_bits(train(make_store("adam"), batches, "100%"))


@pytest.mark.parametrize("second", POLICIES)
@pytest.mark.parametrize("first", ["lookahead", "static"])
def test_a_warm_cache_goes_on_under_any_policy(first, second):
    batches, slots = make_batches(2, ["skewed", "uniform"] * 8), 20
    counts = count(batches)
    halves, caches = (batches[:8], batches[8:]), []

    def keep(ahead, cache, step):
        caches.append(cache)
        return cache

    warm_store, cold_store = make_store("adam"), make_store("adam")
    train(warm_store, halves[0], slots, window=None, policy=make_policy(first, counts), between=keep)
    train(cold_store, halves[0], "100%")
    warm = train(warm_store, halves[1], slots, window=None, policy=make_policy(second, counts), cache=caches[-1])
    warm.assert_same_bits(train(cold_store, halves[1], "100%"))
    assert second != "no_cache" or warm.report.hit_rate == 0  # what another policy has left there passes through too


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", pytest.param("adam", marks=long("row-wise adagrad"))])
@pytest.mark.parametrize("name", POLICIES)
def test_steps_after_the_first_compile_nothing_under_any_policy(name, optimizer):
    batches = make_batches(7, ["distinct", "skewed", "equal", "uniform"] * 5, last=2)
    policy, slots = make_policy(name, count(batches)), 25 + POLICIES.index(name)  # as in no other test
    with jc.LookAhead(make_store(optimizer), batches, lambda b: b["ids"], slots=slots, policy=policy) as ahead:
        cache, dense = ahead.start(), dense_start()
        for number, (batch, plan) in enumerate(ahead):
            with compiling(0) if number > 0 else nullcontext():
                cache = ahead.exchange(cache, plan)
                cache, dense, _ = train_step(cache, plan, dense, batch["labels"])
        ahead.flush(cache)


# What moves


BATCHES = make_batches(1, ["skewed", "uniform"] * 20)
COUNTS = count(BATCHES)


@pytest.mark.parametrize("name", POLICIES)
def test_the_report_names_the_policy_and_its_window(name):
    report = train_with(make_policy(name, COUNTS), BATCHES[:3], 16).report
    assert report.policy == name and f"policy {name}," in str(report)
    assert report.window == {"lookahead": "auto", "scratchpipe": 3}.get(name, 1)


def test_without_a_cache_every_unique_row_is_fetched_and_every_one_but_the_last_is_taken_home():
    report = train_with(jc.no_cache(), BATCHES, 16).report
    assert report.rows_fetched == report.unique_rows == sum(len(keys_of(batch)) for batch in BATCHES)
    assert report.hit_rate == report.lookup_hit_rate == 0
    assert report.rows_fetched - 16 <= report.rows_written_back < report.rows_fetched
    assert report.rows_warmed == 0


def test_a_static_cache_hits_its_pinned_rows_alone():
    random, slots = np.random.default_rng(0), 40
    ranks = 1 + random.permutation(2 * ROWS)  # all counts differ
    counts = {name: ranks[i * ROWS : (i + 1) * ROWS] for i, name in enumerate(TABLES)}
    count_of = {(name, row): counts[name][row] for name in TABLES for row in range(ROWS)}
    pinned, passing, hits = set(sorted(count_of, key=count_of.get)[-slots:]), 0, 0
    for batch in BATCHES:
        keys = keys_of(batch)
        hits += len(keys & pinned)
        for row in sorted(pinned - keys, key=count_of.get)[: max(0, len(keys - pinned) - passing)]:
            pinned.remove(row)
            passing += 1
    report = train_with(jc.static(counts), BATCHES, slots).report
    assert report.unique_rows - report.rows_fetched == hits > 0
    assert report.rows_warmed == slots


def test_a_start_with_the_hottest_rows_spares_the_first_batches_their_misses():
    cold, warm = (train_with(jc.frequency(COUNTS, ratio), BATCHES, 40).report for ratio in (0, 0.75))
    hottest = sorted(np.concatenate(list(COUNTS.values())))[-30:]
    assert (cold.rows_warmed, warm.rows_warmed) == (0, 30)
    assert min(hottest) > 0 and cold.rows_fetched - 30 <= warm.rows_fetched < cold.rows_fetched


def test_rows_that_no_batch_looks_up_are_not_brought_in():
    counts = {name: np.zeros(ROWS, np.int64) for name in TABLES}
    counts["item"][3] = 1
    assert train_with(jc.frequency(counts, 1.0), BATCHES[:2], 20).report.rows_warmed == 1


@pytest.mark.parametrize(("name", "naive"), [("lru", oracle.lru_fetches), ("lfu", oracle.lfu_fetches)])
def test_known_policies_fetch_as_many_rows_as_a_few_lines_of_python_say(name, naive):
    lookups = [[(name, row) for name, ids in batch["ids"].items() for row in ids.tolist()] for batch in BATCHES]
    assert train_with(make_policy(name, COUNTS), BATCHES, 24).report.rows_fetched == naive(lookups, 24)


# The whole future


def test_the_whole_future_fetches_as_few_rows_as_can_be():
    future = [batch["ids"] for batch in BATCHES]
    report = train_with(jc.lookahead(), BATCHES, 20, future=future).report
    fewest = oracle.min_fetches([sorted(keys_of(batch)) for batch in BATCHES], 20)
    assert report.rows_fetched == fewest < train_with(jc.lookahead(), BATCHES, 20, window=2).report.rows_fetched
    assert report.longest_window == len(BATCHES) and report.window_limited == 0


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
@settings(max_examples=examples(3, 12))
@given(stream=streams())
def test_with_a_future_the_bits_are_those_of_uncached_training(optimizer, stream):
    batches, slots = stream
    cached = train_with(None, batches, slots, optimizer, future=(batch["ids"] for batch in batches))
    cached.assert_same_bits(train(make_store(optimizer), batches, "100%"))


@pytest.mark.parametrize("number", [0, 5, len(BATCHES) - 1])
def test_a_loader_with_other_ids_than_the_future(number):
    future = [batch["ids"] for batch in BATCHES]
    changed = future[number]["item"].copy()
    changed[-1] = (changed[-1] + 1) % ROWS
    future[number] = {**future[number], "item": changed}
    with pytest.raises(ValueError, match=f"batch {number} of the loader has other ids than LookAhead.future"):
        train_with(None, BATCHES, 20, future=future)


@pytest.mark.parametrize(
    "change",
    [lambda ids: dict(reversed(ids.items())), lambda ids: {name: column[:, None] for name, column in ids.items()}],
    ids=["features", "shapes"],
)
def test_a_loader_whose_ids_mean_something_else_than_those_of_the_future(change):
    batches = [{**batch, "ids": dict.fromkeys(TABLES, batch["ids"]["user"])} for batch in BATCHES[:5]]
    with pytest.raises(ValueError, match="batch 0 of the loader has other ids"):
        train_with(None, batches, 20, future=[change(batch["ids"]) for batch in batches])


def test_a_loader_that_goes_on_beyond_the_future():
    future = [batch["ids"] for batch in BATCHES[:7]]
    with pytest.raises(ValueError, match=r"future=.* ended after 7 batches and the loader goes on"):
        train_with(None, BATCHES, 20, future=future)


def test_a_loader_that_ends_before_the_future_is_trained_to_its_end():
    future = [batch["ids"] for batch in BATCHES]
    cut = train_with(None, BATCHES[:9], 20, future=future)
    assert cut.report.steps == 9
    cut.assert_same_bits(train(make_store("sgd"), BATCHES[:9], "100%"))


# Bounds on what is held


def drawn_ahead(**arguments):
    """The most batches that were drawn and not yet handed out, and the report."""
    drawn, most = 0, 0

    def loader():
        nonlocal drawn
        for batch in BATCHES:
            drawn += 1
            yield batch

    def between(ahead, cache, step):
        nonlocal most
        most = max(most, drawn - step)
        return cache

    return most, train(make_store("sgd"), loader(), 20, window=None, between=between, **arguments).report


def test_auto_looks_as_far_as_the_bound_on_batches_lets_it():
    unlimited, limited = (train_with(None, BATCHES, 20, max_window=most).report for most in (1024, 2))
    assert unlimited.longest_window > 2 and unlimited.window_limited == 0
    assert limited.longest_window == 2 and 0 < limited.window_limited < len(BATCHES)
    assert limited.rows_fetched > unlimited.rows_fetched
    assert f"cut short in {limited.window_limited} steps" in str(limited) and "cut short" not in str(unlimited)


def test_auto_looks_as_far_as_the_bound_on_bytes_lets_it():
    bytes_of_a_batch = Batch.read(BATCHES[0], lambda b: b["ids"], Features([make_store("sgd").groups[0].group])).nbytes
    assert bytes_of_a_batch >= sum(leaf.nbytes for leaf in jax.tree.leaves(BATCHES[0]))
    reports = {
        most: train_with(None, BATCHES, 20, max_window_bytes=most).report
        for most in (1, 2 * bytes_of_a_batch, 2 * bytes_of_a_batch + 1, 1 << 30)
    }
    assert [report.longest_window for report in reports.values()][:3] == [1, 2, 3]
    assert [report.window_limited > 0 for report in reports.values()] == [True, True, True, False]


@pytest.mark.parametrize("bound", [{"max_window": 3}, {"max_window_bytes": 1}, {"policy": jc.lru()}])
def test_no_more_batches_are_drawn_than_window_and_pipeline_hold(bound):
    most, report = drawn_ahead(**bound)
    assert most <= report.longest_window + 6


def test_the_bounds_are_those_of_auto_alone():
    report = train_with(None, BATCHES, 20, window=6, max_window=2, max_window_bytes=1).report
    assert report.longest_window == 6 and report.window_limited == 0


# Mistakes


def look_ahead(**arguments):
    return jc.LookAhead(make_store("sgd"), BATCHES, lambda b: b["ids"], **{"slots": 20, **arguments})


GOOD = np.ones(ROWS, np.int64)


@pytest.mark.parametrize("factory", [jc.frequency, jc.static])
@pytest.mark.parametrize(
    ("counts", "error", "match"),
    [
        ({"user": GOOD}, ValueError, r"\(counts\) has no counts of table 'item', only of user"),
        ({"user": GOOD, "item": GOOD[1:]}, ValueError, r"shape \(39,\) for table 'item', which has 40 rows"),
        ({"user": GOOD, "item": GOOD[:, None]}, ValueError, r"shape \(40, 1\) for table 'item': give one count a row"),
        ({"user": -GOOD, "item": GOOD}, ValueError, "table 'user' has a negative count, -1"),
        ({"user": GOOD * 0.5, "item": GOOD}, TypeError, "table 'user' are float64; they must be integers"),
        (GOOD, TypeError, "mapping of table names to integer arrays .* got ndarray"),
        ({}, TypeError, "mapping of table names to integer arrays"),
    ],
    ids=["missing table", "too short", "two axes", "negative", "float", "no mapping", "empty"],
)
def test_counts_that_do_not_fit(factory, counts, error, match):
    with pytest.raises(error, match=match):
        look_ahead(policy=factory(counts))


@pytest.mark.parametrize("ratio", [-0.01, 1.01, float("nan")])
def test_a_warmup_ratio_that_is_no_share(ratio):
    with pytest.raises(ValueError, match=r"warmup_ratio=.*share of the slots, from 0 to 1"):
        jc.frequency(COUNTS, ratio)


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "lookahead"])
@pytest.mark.parametrize("argument", [{"window": 8}, {"window": "auto"}, {"future": []}])
def test_a_window_beside_a_policy_that_has_its_own(name, argument):
    with pytest.raises(ValueError, match=rf"are for lookahead\(\); {name}\(\) looks at [13] batches: leave them out"):
        look_ahead(policy=make_policy(name, COUNTS), **argument)


def test_a_window_beside_the_whole_future():
    with pytest.raises(ValueError, match="the whole future is the window, leave window out"):
        look_ahead(window=8, future=[])


@pytest.mark.parametrize("name", ["window", "max_window", "max_window_bytes", "threads"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, "all"])
def test_bounds_that_are_no_positive_integers(name, value):
    with pytest.raises(ValueError, match=rf"LookAhead\({name}={value!r}\): {name} must be .*at least 1"):
        look_ahead(**{name: value})


@pytest.mark.parametrize("policy", ["lru", jc.lru, 3])
def test_a_policy_that_is_none(policy):
    with pytest.raises(TypeError, match=r"policy=\.\.\.\) needs a policy such as lookahead\(\)"):
        look_ahead(policy=policy)
