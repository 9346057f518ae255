"""How far a pipeline looks ahead in ways that only a run shows: what it holds, what it waits for, how it ends."""

import itertools
import time

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcache as jc
from jaxcache.planner import LookAheadPlanner
from jaxcache.tables import Group
from training import make_batches, make_store, train

BATCHES = make_batches(0, ["uniform"] * 40)


def look_ahead(loader, **arguments):
    return jc.LookAhead(make_store("sgd"), loader, lambda batch: batch["ids"], slots=20, **arguments)


@pytest.mark.parametrize("asarray", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_the_bound_on_bytes_counts_arrays_on_the_device_too(asarray):
    batches = [{**batch, "dense": asarray(np.zeros((8, 25_000), np.float32))} for batch in BATCHES]
    report = train(make_store("sgd"), batches, 20, window=None, max_window_bytes=3_000_000).report
    assert report.longest_window == 4
    assert report.window_limited > 0


@pytest.mark.parametrize("share", [0.6, 0.9, 0.99])
def test_a_cache_that_needs_no_victims_holds_few_batches_ahead(share):
    """Whatever the window would grow to if some batch ahead filled the cache."""
    random = np.random.default_rng(1)
    planner = LookAheadPlanner(Group.stack({"a": jc.Table(10_000, 1)}), int(1000 / share))
    most = 0
    for _ in range(300):
        while planner.wants_batch():
            planner.observe(random.integers(0, 1000, 50), np.array([0, 50]), np.array([0]))
        most = max(most, planner.ahead)
        assert not len(planner.plan().victims)
    assert 1 < most <= 64


def test_the_window_is_open_when_the_first_victims_are_needed():
    """A plan draws a few batches at a time: none waits for all of a long window."""
    random = np.random.default_rng(2)
    planner = LookAheadPlanner(Group.stack({"a": jc.Table(10**6, 1)}), 4000)
    drawn, windows, longest = [], [], 0
    for _ in range(500):
        before = planner.ahead
        while planner.wants_batch():
            planner.observe(random.zipf(1.3, 100) % 10**6, np.array([0, 100]), np.array([0]))
        drawn.append(planner.ahead - before)
        windows.append(planner.ahead)
        if len(planner.plan().victims):
            longest = max(windows)
            break
    assert longest > 300  # else it says nothing
    assert max(drawn) < longest / 4


def test_leaving_ends_at_once_while_an_endless_future_is_drawn():
    future = ({"user": np.array([i % 40]), "item": np.array([0])} for i in itertools.count() if not time.sleep(0.001))
    with look_ahead(BATCHES, future=future) as ahead:
        ahead.start()
        left = time.perf_counter()
    assert time.perf_counter() - left < 5


def test_an_error_of_the_loader_comes_while_an_endless_future_is_drawn():
    def loader():
        yield BATCHES[0]
        raise OSError("gone")

    future = ({"user": np.array([i % 40]), "item": np.array([0])} for i in itertools.count() if not time.sleep(0.001))
    with pytest.raises(OSError, match="gone"), look_ahead(loader(), future=future) as ahead:
        ahead.start()
        # The loader's second batch is drawn while the first waits for its plan.
        next(ahead)


def test_a_future_goes_with_batches_that_are_copied():
    batches = [{"ids": {"user": batch["ids"]["user"], "item": batch["ids"]["item"]}, **batch} for batch in BATCHES]
    future = [batch["ids"] for batch in batches]
    report = train(make_store("sgd"), batches, 20, window=None, copy=True, future=future).report
    assert report.steps == len(batches)


def test_a_future_that_is_no_iterable():
    with pytest.raises(
        TypeError, match=r"LookAhead\(future=\.\.\.\) needs an iterable of the ids of each batch, got int"
    ):
        look_ahead(BATCHES, future=5)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint16, np.int32, np.uint64])
def test_counts_of_any_integers(dtype):
    group = Group.stack({"user": jc.Table(3, 1)})
    counts = np.array([3, 0, np.iinfo(dtype).max], dtype)
    assert jc.static({"user": counts}).warm_keys(group, 3).tolist() == [2, 0]


def test_without_a_cache_slow_writes_are_the_report_s_bound():
    store = make_store("sgd")
    write = store.groups[0].write
    store.groups[0].write = lambda *arguments: (time.sleep(0.03), write(*arguments))
    report = train(store, BATCHES, 20, window=None, policy=jc.no_cache()).report
    assert report.bound_by == "write-back"
    assert report.stages["write-back"].busy > 0.03 * 30
