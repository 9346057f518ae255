"""Slow, failing and interrupted parts of the pipeline change no bit, lose nothing and hang nothing."""

from __future__ import annotations

import itertools
import os
import random as standard_random
import signal
import threading
import time

import numpy as np
import pytest

import jaxcache as jc
from training import dense_start, make_batch, make_batches, make_store, most_unique_rows, train, train_step

BATCHES = make_batches(11, ["skewed", "uniform", "distinct", "equal"] * 5)


def pipeline_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("jaxcache-")]


@pytest.fixture(autouse=True)
def no_thread_outlives_its_test():
    yield
    deadline = time.monotonic() + 5
    while pipeline_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert pipeline_threads() == []


def slowed(store: jc.HostStore, name: str, seconds: float) -> jc.HostStore:
    (group,) = store.groups
    original = getattr(group, name)

    def slow(*arguments, **keywords):
        time.sleep(seconds)
        return original(*arguments, **keywords)

    setattr(group, name, slow)
    return store


def slow_loader(batches, seconds: float):
    for batch in batches:
        time.sleep(seconds)
        yield batch


def train_two_steps(ahead: jc.LookAhead) -> None:
    cache, dense = ahead.start(), dense_start()
    for batch, plan in itertools.islice(ahead, 2):
        cache = ahead.exchange(cache, plan)
        cache, dense, _ = train_step(cache, plan, dense, batch["labels"])


@pytest.mark.parametrize("slow", ["write", "read", "loader"])
@pytest.mark.parametrize("window", [1, 6])
def test_a_slow_part_changes_no_bit(slow, window):
    expected = train(make_store("adam"), BATCHES, "100%")
    store, loader = make_store("adam"), BATCHES
    if slow == "loader":
        loader = slow_loader(BATCHES, 0.02)
    else:
        store = slowed(store, slow, 0.02)
    result = train(store, loader, most_unique_rows(BATCHES), window)
    result.assert_same_bits(expected)


@pytest.mark.parametrize(("slow", "stage"), [("write", "write-back"), ("read", "collect"), ("loader", "loader")])
def test_the_report_names_the_stage_that_bounds_the_run(slow, stage):
    fast = train(make_store("sgd"), BATCHES, 16)  # compiles, which would count as the step's time
    store, loader = make_store("sgd"), BATCHES
    if slow == "loader":
        loader = slow_loader(BATCHES, 0.06)
    else:
        store = slowed(store, slow, 0.06)
    report = train(store, loader, 16).report
    assert report.bound_by == stage
    assert f"{stage:<12}" in str(report) and "<- bounds the run" in str(report)
    assert report.stages[stage].busy > 0.06 * 10 > fast.report.stages[stage].busy


@pytest.mark.slow
@pytest.mark.parametrize("slow", ["read", "write", "loader"])
def test_collecting_writing_and_loading_overlap_with_the_steps(slow):
    """A part that takes 100 ms a batch, beside steps of 100 ms: one after the other would take twice as long."""
    train(make_store("sgd"), BATCHES, 30)  # compiles
    store, loader = make_store("sgd"), BATCHES
    if slow == "loader":
        loader = slow_loader(BATCHES, 0.1)
    else:
        store = slowed(store, slow, 0.1)
    moments = []

    def between(ahead, cache, step):
        time.sleep(0.1)
        moments.append(time.monotonic())
        return cache

    train(store, loader, 30, window=4, between=between)
    assert moments[-1] - moments[0] < 0.16 * (len(BATCHES) - 1)


def test_a_slow_step_is_named_as_well():
    report = train(make_store("sgd"), BATCHES, 16, between=lambda ahead, cache, step: time.sleep(0.06) or cache).report
    assert report.bound_by == "step"


def test_a_row_that_is_evicted_and_fetched_again_every_step():
    """Two batches that share no row and each fill the cache: every row moves both ways in every step."""
    random = np.random.default_rng(0)
    batches = [
        {"ids": {"user": np.arange(8) + 8 * (i % 2), "item": np.arange(8) + 8 * (i % 2)}, "labels": labels}
        for i, labels in enumerate(random.normal(size=(20, 8)).astype(np.float32))
    ]
    expected = train(make_store("adam"), batches, "100%")
    for window in (1, 2, 8):
        result = train(slowed(make_store("adam"), "write", 0.005), batches, 16, window)
        result.assert_same_bits(expected)
        assert result.report.hit_rate == 0 and result.report.rows_fetched == 16 * 20


class LoaderBroke(Exception):
    pass


@pytest.mark.parametrize("at", [0, 1, 7])
def test_an_error_of_the_loader_reaches_the_caller_with_its_type_and_place(at):
    def breaking():
        yield from BATCHES[:at]
        raise LoaderBroke("row 7 of the file")

    store, losses = make_store("adam"), []
    with (
        pytest.raises(LoaderBroke, match="row 7 of the file") as caught,
        jc.LookAhead(store, breaking(), ids=lambda b: b["ids"], slots=20, window=2) as ahead,
    ):
        cache, dense = ahead.start(), dense_start()
        try:
            for batch, plan in ahead:
                cache = ahead.exchange(cache, plan)
                cache, dense, loss = train_step(cache, plan, dense, batch["labels"])
                losses.append(loss)
        finally:
            cache = ahead.flush(cache)
    assert "breaking" in [entry.name for entry in caught.traceback]
    jc.check(cache, store)
    # Batches drawn before the error may be left out, and what was trained is in the store.
    assert len(losses) <= at and store.step == len(losses)
    if losses:
        expected = train(make_store("adam"), BATCHES[: len(losses)], "100%")
        np.testing.assert_array_equal(store.rows("user", np.arange(40)), expected.weights["user"])


def test_an_error_of_the_loader_comes_at_the_next_iteration_even_if_batches_remain():
    gate = threading.Event()

    def breaking():
        yield from BATCHES[:3]
        gate.wait(20)
        raise LoaderBroke

    with jc.LookAhead(make_store("sgd"), breaking(), ids=lambda b: b["ids"], slots=30, window=8) as ahead:
        cache = ahead.start()
        _, plan = next(ahead)
        cache = ahead.exchange(cache, plan)
        gate.set()
        time.sleep(0.2)  # for the error to pass from the loader's thread to the pipeline
        with pytest.raises(LoaderBroke):
            next(ahead)


def test_stop_iteration_inside_ids_is_not_the_end_of_the_data():
    def ids(batch):
        raise StopIteration

    with jc.LookAhead(make_store("sgd"), BATCHES, ids=ids, slots=30) as ahead:
        ahead.start()
        with pytest.raises(RuntimeError, match="StopIteration"):
            next(ahead)


class DiskFull(Exception):
    pass


def test_an_error_of_the_writer_reaches_the_caller():
    store = make_store("sgd")
    calls = itertools.count()
    write = store.groups[0].write

    def failing(keys, rows):
        if next(calls) == 2:
            raise DiskFull("no space")
        write(keys, rows)

    store.groups[0].write = failing
    seen = []
    with pytest.raises(DiskFull, match="no space"):  # noqa: SIM117
        with jc.LookAhead(store, BATCHES, ids=lambda b: b["ids"], slots=16, window=2) as ahead:
            cache, dense = ahead.start(), dense_start()
            for batch, plan in ahead:
                cache = ahead.exchange(cache, plan)
                cache, dense, _ = train_step(cache, plan, dense, batch["labels"])
                seen.append(plan)
            cache = ahead.flush(cache)
    assert len(seen) < len(BATCHES)


def test_an_error_of_the_writer_is_raised_at_exit_if_nobody_asked_before():
    store = make_store("sgd")

    def failing(keys, rows):
        raise DiskFull

    store.groups[0].write = failing
    with pytest.raises(DiskFull):  # noqa: SIM117
        with jc.LookAhead(store, BATCHES[:2], ids=lambda b: b["ids"], slots=16, window=1) as ahead:
            train_two_steps(ahead)


@pytest.mark.parametrize("place", ["inside", "after"])
def test_victims_whose_write_back_failed_once_are_written_by_flush(place):
    store, calls = make_store("adam"), itertools.count()
    write = store.groups[0].write

    def failing_once(keys, rows):
        if next(calls) == 1:
            raise DiskFull("for a moment")
        write(keys, rows)

    store.groups[0].write = failing_once
    steps = 0
    with pytest.raises(DiskFull):  # noqa: SIM117
        with jc.LookAhead(store, BATCHES, ids=lambda b: b["ids"], slots=16, window=2) as ahead:
            cache, dense = ahead.start(), dense_start()
            try:
                for batch, plan in ahead:
                    cache = ahead.exchange(cache, plan)
                    cache, dense, _ = train_step(cache, plan, dense, batch["labels"])
                    steps += 1
            finally:
                if place == "inside":
                    cache = ahead.flush(cache)
    if place == "after":
        with (
            pytest.raises(RuntimeError, match="call flush on that one, which tries again"),
            jc.LookAhead(store, BATCHES, ids=lambda b: b["ids"], slots=16) as again,
        ):
            again.start(cache)
        cache = ahead.flush(cache)
    jc.check(cache, store)
    assert 0 < steps < len(BATCHES) and store.step == steps
    expected = train(make_store("adam"), BATCHES[:steps], "100%")
    np.testing.assert_array_equal(store.rows("user", np.arange(40)), expected.weights["user"])
    with jc.LookAhead(store, BATCHES, ids=lambda b: b["ids"], slots=16) as again:
        again.start(cache)


def test_a_write_back_that_fails_beside_another_error_is_noted():
    store = make_store("sgd")

    def failing(keys, rows):
        raise DiskFull("no space")

    store.groups[0].write = failing
    with pytest.raises(LoaderBroke) as caught:  # noqa: SIM117
        with jc.LookAhead(store, BATCHES, ids=lambda b: b["ids"], slots=16, window=1) as ahead:
            train_two_steps(ahead)
            raise LoaderBroke
    assert "DiskFull('no space')" in caught.value.__notes__[0]


def test_leaving_the_block_waits_for_the_victims():
    store = slowed(make_store("adam"), "write", 0.1)
    with jc.LookAhead(store, BATCHES[:6], ids=lambda b: b["ids"], slots=16, window=2) as ahead:
        cache, dense = ahead.start(), dense_start()
        for batch, plan in ahead:
            cache = ahead.exchange(cache, plan)
            cache, dense, _ = train_step(cache, plan, dense, batch["labels"])
    assert pipeline_threads() == []
    jc.check(cache, store)  # clean rows equal the store's: nothing was under way
    with pytest.raises(RuntimeError, match="flush"):
        store.rows("user", [0])
    cache = ahead.flush(cache)  # works after the block, too
    expected = train(make_store("adam"), BATCHES[:6], "100%")
    np.testing.assert_array_equal(store.rows("user", np.arange(40)), expected.weights["user"])


def test_the_first_step_starts_as_soon_as_its_own_batch_is_there():
    gate = threading.Event()

    def stalling():
        yield BATCHES[0]
        gate.wait(20)
        yield from BATCHES[1:]

    with jc.LookAhead(make_store("sgd"), stalling(), ids=lambda b: b["ids"], slots=16, window=16) as ahead:
        cache = ahead.start()
        batch, plan = next(ahead)  # with the loader stuck before the second batch
        assert batch is BATCHES[0]
        cache = ahead.exchange(cache, plan)
        gate.set()
        next(ahead)


def test_a_loader_stuck_in_next_does_not_keep_the_block_from_ending():
    gate = threading.Event()

    def stuck():
        yield BATCHES[0]
        gate.wait(60)

    start = time.monotonic()
    with jc.LookAhead(make_store("sgd"), stuck(), ids=lambda b: b["ids"], slots=16) as ahead:
        cache = ahead.start()
        next(ahead)
        cache = ahead.flush(cache)
    assert time.monotonic() - start < 10
    assert pipeline_threads() == ["jaxcache-loader"]
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "jaxcache-loader")
    gate.set()


def test_a_loader_that_reuses_its_arrays_is_an_error_unless_batches_are_copied():
    batches = make_batches(3, ["uniform"] * 8)

    def reusing():
        held = {
            "ids": {"user": np.empty(8, np.int64), "item": np.empty(8, np.int64)},
            "labels": np.empty(8, np.float32),
        }
        for batch in batches:
            held["labels"][:] = batch["labels"]
            for name, ids in batch["ids"].items():
                held["ids"][name][:] = ids
            yield held

    with jc.LookAhead(make_store("sgd"), reusing(), ids=lambda b: b["ids"], slots=16) as ahead:
        ahead.start()
        for _ in range(3):  # however often it is asked for
            with pytest.raises(RuntimeError, match=r"writes into arrays that it has yielded.*copy=True"):
                next(ahead)
    expected = train(make_store("sgd"), batches, 16)
    train(make_store("sgd"), reusing(), 16, copy=True).assert_same_bits(expected)


@pytest.mark.parametrize("slots", [200, "100%"])
def test_a_loader_that_writes_ids_out_of_range_into_its_array_crashes_nothing(slots):
    """The planner reads ids without looking at their range again, in native code."""

    def hashing():
        ids, random = np.zeros(2_000, np.int64), np.random.default_rng(0)
        for _ in range(50):
            ids[:] = random.integers(0, 2**48, len(ids))
            time.sleep(0.001)
            ids %= 100
            yield {"user": ids}

    store = jc.HostStore({"user": jc.Table(1_000, 4)}, jc.rowwise_adagrad(0.1))
    with jc.LookAhead(store, hashing(), ids=lambda b: b, slots=slots) as ahead:
        cache = ahead.start()
        with pytest.raises(RuntimeError, match="writes into arrays that it has yielded"):
            for _, plan in ahead:
                cache = ahead.exchange(cache, plan)
                cache = jc.update(cache, plan, jc.lookup(cache, plan))


def test_a_loader_that_yields_one_batch_again_and_again_is_fine():
    train(make_store("sgd"), [BATCHES[0]] * 10, 16, window=4)


# Ctrl-C


@pytest.fixture
def interruptible():
    """Ctrl-C as in an interactive program: a shell starts background jobs with it ignored."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def interrupted_run(interrupt_at: float) -> tuple[jc.HostStore, jc.CacheState, int]:
    """Trains on an endless loader until Ctrl-C, sent after `interrupt_at` seconds, stops it. Returns what is left."""

    def endless():
        random = np.random.default_rng(0)
        while True:
            yield make_batch(random, "skewed")

    store = make_store("momentum")
    timer = threading.Timer(interrupt_at, os.kill, (os.getpid(), signal.SIGINT))
    with jc.LookAhead(store, endless(), ids=lambda b: b["ids"], slots=20, window=2) as ahead:
        cache, dense, steps = ahead.start(), dense_start(), 0
        timer.start()
        try:
            for batch, plan in ahead:
                cache = ahead.exchange(cache, plan)
                cache, dense, _ = train_step(cache, plan, dense, batch["labels"])
                steps += 1
        except KeyboardInterrupt:
            cache = ahead.flush(cache)
    timer.join()
    return store, cache, steps


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_never_loses_the_cache():
    random = standard_random.Random(0)
    before = signal.getsignal(signal.SIGINT)
    for _ in range(25):
        store, cache, steps = interrupted_run(0.02 + 0.08 * random.random())
        jc.check(cache, store)
        assert store.step in (steps, steps + 1)  # the count in Python may be one behind
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("place", ["inside exchange", "inside the step"])
def test_ctrl_c_between_donating_the_cache_and_getting_it_back(place, monkeypatch):
    """The two moments at which the caller holds no cache, each hit on purpose at the fourth batch."""
    store, steps = make_store("momentum"), 0

    def struck(function):
        def strike(*arguments):
            result = function(*arguments)
            if steps == 3:
                signal.raise_signal(signal.SIGINT)
            return result

        return strike

    step = train_step
    if place == "inside exchange":
        monkeypatch.setattr(jc.LookAhead, "_count_exchange", struck(jc.LookAhead._count_exchange))
    else:
        step = struck(train_step)
    with jc.LookAhead(store, BATCHES, ids=lambda b: b["ids"], slots=20, window=2) as ahead:
        cache, dense = ahead.start(), dense_start()
        with pytest.raises(KeyboardInterrupt):
            for batch, plan in ahead:
                cache = ahead.exchange(cache, plan)
                cache, dense, _ = step(cache, plan, dense, batch["labels"])
                steps += 1
        cache = ahead.flush(cache)
    jc.check(cache, store)
    assert store.step == steps == 4
    expected = train(make_store("momentum"), BATCHES[:4], "100%")
    np.testing.assert_array_equal(store.rows("user", np.arange(40)), expected.weights["user"])


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_waits_for_a_call_and_a_second_one_does_not():
    with jc.LookAhead(make_store("sgd"), BATCHES, ids=lambda b: b["ids"], slots=20) as ahead:
        cache = ahead.start()
        _, plan = next(ahead)
        signal.raise_signal(signal.SIGINT)  # nothing happens
        with pytest.raises(KeyboardInterrupt):
            ahead.exchange(cache, plan)
        cache = ahead.exchange(cache, plan)  # the interrupted call did nothing: it can be made again
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            next(ahead)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_while_waiting_for_a_stuck_loader():
    gate = threading.Event()

    def stuck():
        gate.wait(60)
        yield BATCHES[0]

    with jc.LookAhead(make_store("sgd"), stuck(), ids=lambda b: b["ids"], slots=20) as ahead:
        ahead.start()
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            next(ahead)
        assert time.monotonic() - start < 5
    gate.set()


@pytest.mark.usefixtures("interruptible")
def test_a_second_ctrl_c_while_the_block_ends_leaves_nothing_behind():
    store, before = slowed(make_store("sgd"), "write", 0.5), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):  # noqa: SIM117
        with jc.LookAhead(store, BATCHES, ids=lambda b: b["ids"], slots=16, window=1) as ahead:
            train_two_steps(ahead)
            signal.raise_signal(signal.SIGINT)
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    assert signal.getsignal(signal.SIGINT) is before
    store.open(store)  # nobody holds it any more
    time.sleep(1)  # for the write-back under way


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_during_the_last_lines_of_the_block_is_not_forgotten():
    with pytest.raises(KeyboardInterrupt):  # noqa: SIM117
        with jc.LookAhead(make_store("sgd"), BATCHES, ids=lambda b: b["ids"], slots=20) as ahead:
            ahead.start()
            signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("interruptible")
def test_a_programs_own_handler_of_ctrl_c_is_left_alone():
    calls = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: calls.append(number))
    try:
        with jc.LookAhead(make_store("sgd"), BATCHES, ids=lambda b: b["ids"], slots=20) as ahead:
            ahead.start()
            signal.raise_signal(signal.SIGINT)
            next(ahead)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert calls == [signal.SIGINT]
