"""What goes wrong in a program, Ctrl-C included, costs no completed step and hangs nothing."""

from __future__ import annotations

import os
import random as standard_random
import signal
import threading
import time
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcache as jc
from on_demand import check_on_demand, renewed

ROWS, SLOTS, STEPS = 40, 8, 12
EVERY = np.arange(ROWS)
IDS = np.random.default_rng(0).integers(0, ROWS, (STEPS, 5)).astype(np.int32)
STORE = jc.HostStore({"item": jc.Table(ROWS, 2, jc.uniform(0.5))}, optax.sgd(0.1, momentum=0.9))
pytestmark = pytest.mark.timeout(60)


def step(cache, ids_and_next):
    ids, following = ids_and_next
    cache, plan = jc.admit(cache, STORE, {"item": ids}, fetch_bound=2)
    cache = jc.prefetch(cache, STORE, {"item": following}, fetch_bound=2)
    rows = jc.lookup(cache, plan)
    value, gradients = jax.value_and_grad(lambda rows: jnp.sum(rows["item"] ** 2))(rows)
    return jc.update(cache, plan, gradients), value


one_step = jax.jit(step, donate_argnums=0)
not_donating = jax.jit(step)
every_step = partial(jax.jit, donate_argnums=0)(partial(jax.lax.scan, step))


def inputs(ids) -> tuple[np.ndarray, np.ndarray]:
    return ids, np.roll(ids, -1, axis=0)


def train(cache, ids, how: str):
    """All steps in a scan, or one by one."""
    if how == "scan":
        return every_step(cache, inputs(ids))
    losses = []
    for pair in zip(*inputs(ids), strict=True):
        cache, loss = one_step(cache, pair)
        losses.append(loss)
    return cache, losses


class DiskFull(Exception):
    pass


class Hooks:
    """The shared store as if it were new, whose reads and writes are counted, and call what a test wants."""

    def __init__(self) -> None:
        self.store = renewed(STORE, optax.sgd(0.1, momentum=0.9))
        (self.group,) = self.store.groups
        self.reads = self.writes = 0
        self.on_read = self.on_write = lambda number: None
        self._read, self._write = self.group.read, self.group.write
        self.group.read, self.group.write = self.read, self.write

    def read(self, keys, size=None):
        if len(keys):
            self.reads += 1
            self.on_read(self.reads)
        return self._read(keys, size)

    def write(self, keys, rows):
        self.writes += 1
        self.on_write(self.writes)
        self._write(keys, rows)

    def rows(self) -> list[np.ndarray]:
        """As they are at home."""
        rows = self._read(EVERY)
        return [rows.weights, *rows.state]


@pytest.fixture
def hooks():
    hooks = Hooks()
    _OTHERS.extend(transfer_threads())
    yield hooks
    hooks.store.transfers.close()
    assert transfer_threads() == []


def transfer_threads() -> list[threading.Thread]:
    names = ("jaxcache-write-back", "jaxcache-prefetch")
    return [thread for thread in threading.enumerate() if thread.name.startswith(names) and thread not in _OTHERS]


_OTHERS: list[threading.Thread] = []  # of stores that earlier tests left open


@cache
def expected() -> list[list[np.ndarray]]:
    """All rows after each number of steps, with every row on the device."""
    store = jc.HostStore(STORE.tables, optax.sgd(0.1, momentum=0.9), STORE.seed)
    update = jax.jit(
        lambda cache, plan: jc.update(
            cache, plan, jax.grad(lambda rows: jnp.sum(rows["item"] ** 2))(jc.lookup(cache, plan))
        )
    )
    after = [[store.rows("item", EVERY), *store.row_state("item", EVERY)]]
    with jc.LookAhead(store, [{"item": ids} for ids in IDS], ids=lambda batch: batch, slots="100%") as ahead:
        cache = ahead.start()
        for _, plan in ahead:
            cache = ahead.flush(update(ahead.exchange(cache, plan), plan))
            after.append([store.rows("item", EVERY), *store.row_state("item", EVERY)])
    return after


def check_saved(hooks: Hooks, step: int) -> None:
    """The store holds what full residency has after as many steps."""
    assert hooks.store.step == step and not hooks.store.behind
    for mine, other in zip(hooks.rows(), expected()[step], strict=True):
        np.testing.assert_array_equal(mine.view(np.int32), other.view(np.int32))


def check_goes_on(hooks: Hooks) -> None:
    """With a new cache, from the step that was saved to the end."""
    hooks.on_read = hooks.on_write = lambda number: None
    cache = jc.init(hooks.store, SLOTS)
    for pair in list(zip(*inputs(IDS), strict=True))[hooks.store.step :]:
        cache, _ = one_step(cache, pair)
    cache = jc.flush(cache, hooks.store)
    check_on_demand(cache, hooks.store)
    check_saved(hooks, STEPS)


def fails_at(at: int, times: int = 1):
    def fail(number):
        if at <= number < at + times:
            raise DiskFull(f"call {number}")

    return fail


# The store fails


@pytest.mark.parametrize("how", ["scan", "steps"])
@pytest.mark.parametrize("at", [1, 2, 7])
def test_a_read_that_fails_stops_the_program_and_is_raised_by_flush(hooks, how, at):
    hooks.on_read = fails_at(at)
    cache, losses = train(jc.init(hooks.store, SLOTS), IDS, how)
    losses, steps = np.asarray(losses), int(cache.step)
    assert steps < STEPS and np.isfinite(losses[:steps]).all() and np.isnan(losses[steps:]).all()
    assert int(cache.fault) == jc.CacheState.ADMIT_FAILED
    writes = hooks.writes
    with pytest.raises(DiskFull, match=f"call {at}") as caught:
        jc.flush(cache, hooks.store)
    assert "fail" in [entry.name for entry in caught.traceback]
    assert hooks.writes - writes <= 4 + 1  # what was on its way, and the flush
    check_saved(hooks, steps)
    with pytest.raises(
        RuntimeError, match=r"has met a fault, which was raised before: train on with a new one, jc\.init"
    ):
        jc.flush(cache, hooks.store)
    with pytest.raises(ValueError, match="on_demand got a cache that has met a fault"):
        jc.on_demand(cache, hooks.store)
    check_goes_on(hooks)


@pytest.mark.parametrize("how", ["scan", "steps"])
@pytest.mark.parametrize(("at", "times"), [(1, 1), (4, 1), (1, 2)])
def test_a_write_that_fails_is_made_again_by_flush(hooks, how, at, times):
    hooks.on_write = fails_at(at, times)
    cache, _ = train(jc.init(hooks.store, SLOTS), IDS, how)
    steps = int(cache.step)
    if times == 2:
        with pytest.raises(DiskFull, match="call 2"):
            jc.flush(cache, hooks.store)
    with pytest.raises(DiskFull, match=f"call {at}"):
        jc.flush(cache, hooks.store)
    check_saved(hooks, steps)
    check_goes_on(hooks)


def test_nothing_is_read_or_written_after_a_failure(hooks):
    hooks.on_read = fails_at(5)
    cache, _ = train(jc.init(hooks.store, SLOTS), IDS[:6], "steps")
    assert int(cache.fault) != 0
    hooks.store.transfers.wait_until_home()
    before = hooks.reads, hooks.writes, hooks.store.transfers.admitted, int(cache.step)
    old = jax.tree.map(np.asarray, cache.groups)
    cache, losses = train(cache, IDS, "scan")
    assert (hooks.reads, hooks.writes, hooks.store.transfers.admitted, int(cache.step)) == before
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, cache.groups), old)
    assert np.isnan(losses).all()
    with pytest.raises(DiskFull):
        hooks.store.raise_failure()
    hooks.store.raise_failure()
    with pytest.raises(RuntimeError, match="was raised before"):
        jc.flush(cache, hooks.store)
    check_saved(hooks, before[-1])


def test_a_loop_hears_of_a_failure_by_raise_failure(hooks):
    hooks.on_read = fails_at(4)
    carry = jc.init(hooks.store, SLOTS)
    with pytest.raises(DiskFull):
        for pair in zip(*inputs(IDS), strict=True):
            carry, loss = one_step(carry, pair)
            loss.block_until_ready()
            hooks.store.raise_failure()
    assert int(carry.step) < STEPS - 1


def check_random_failures(seed: int, how: str) -> None:
    """Reads and writes fail at random, some of them again and again, and some are slow."""
    random, hooks = np.random.default_rng(seed), Hooks()
    failing, pauses = random.random() < 0.2, random.random() * 0.002

    def maybe(number):
        time.sleep(pauses * random.random())
        if random.random() < (0.05 if failing else 0.02):
            raise DiskFull(number)

    hooks.on_read, hooks.on_write = (maybe if random.random() < 0.7 else hooks.on_read for _ in range(2))
    try:
        for _ in range(30):
            first = hooks.store.step
            cache, _ = train(jc.init(hooks.store, SLOTS), IDS[first:], how if first == 0 else "steps")
            steps = int(cache.step)
            for _ in range(50):
                try:
                    jc.flush(cache, hooks.store)
                    break
                except DiskFull:
                    continue
                except RuntimeError as error:
                    assert "was raised before" in str(error)
                    break
            check_saved(hooks, steps)
            if steps == STEPS:
                return
    finally:
        hooks.store.transfers.close()


@settings(max_examples=8)
@given(seed=st.integers(0, 2**16), how=st.sampled_from(["scan", "steps"]))
def test_failures_at_random_lose_no_completed_step(seed, how):
    check_random_failures(seed, how)


@pytest.mark.slow
@settings(max_examples=12)
@given(seed=st.integers(0, 2**16), how=st.sampled_from(["scan", "steps"]))
def test_failures_at_random_lose_no_completed_step_for_long(seed, how):
    check_random_failures(seed, how)


# The caller's mistakes that show while a program runs


@pytest.mark.parametrize("how", ["scan", "steps"])
@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ([3, ROWS, 5, -1, 6], ValueError, r"admit, step 7: feature 'item' has id 40, and 1 more that are out of range"),
        ([3, 5, -9, 3, 6], ValueError, r"feature 'item' has id -9; ids must lie in 0 to 39 \(Table\(rows=40\)\)"),
    ],
)
def test_ids_out_of_range_stop_the_program(hooks, how, wrong, error, text):
    ids = IDS.copy()
    ids[7] = wrong
    cache, losses = train(jc.init(hooks.store, SLOTS), ids, how)
    assert np.isnan(np.asarray(losses)).tolist() == [False] * 7 + [True] * 5
    with pytest.raises(error, match=text):
        jc.flush(cache, hooks.store)
    check_saved(hooks, 7)
    check_goes_on(hooks)


@pytest.mark.parametrize("how", ["scan", "steps"])
def test_more_unique_rows_than_slots_stop_the_program(hooks, how):
    """Four slots are too few for the first batch that has five."""
    first = next(number for number, ids in enumerate(IDS) if len(set(ids.tolist())) == 5)
    cache, losses = train(jc.init(hooks.store, 4), IDS, how)
    assert np.isnan(np.asarray(losses)).tolist() == [False] * first + [True] * (STEPS - first)
    text = rf"admit, step {first}: 5 unique rows of item are looked up at once, and the cache has 4 slots for them"
    with pytest.raises(jc.TooFewSlots, match=text):
        jc.flush(cache, hooks.store)
    check_saved(hooks, first)
    check_goes_on(hooks)


def test_rows_of_several_admits_of_a_step_need_room_together(hooks):
    admit = jax.jit(lambda cache, ids: jc.admit(cache, STORE, {"item": ids}))
    cache, _ = admit(jc.init(hooks.store, SLOTS), np.arange(5, dtype=np.int32))
    cache, plan = admit(cache, np.arange(4, 9, dtype=np.int32))
    assert int(cache.fault) != 0 and np.isnan(jc.lookup(cache, plan)["item"]).all()
    with pytest.raises(
        jc.TooFewSlots, match=r"5 unique rows of item are looked up, 4 of them have to come in.* room for 3"
    ):
        jc.flush(cache, hooks.store)
    check_saved(hooks, 0)


def test_a_lower_bound_than_there_are_unique_rows_stops_the_program(hooks):
    cache, _ = jc.admit(jc.init(hooks.store, SLOTS), STORE, {"item": IDS[0]}, unique_bound=3)
    with pytest.raises(jc.TooFewSlots, match=r"there is room for 3: give a larger admit\(unique_bound=\.\.\.\)"):
        jc.flush(cache, hooks.store)


def test_offsets_that_do_not_rise_stop_the_program(hooks):
    bags = jc.Bags(IDS[0], np.array([0, 3, 2, 5], np.int32))
    cache, plan = jc.admit(jc.init(hooks.store, SLOTS), STORE, {"f": bags}, {"f": jc.Feature("item", "sum")})
    assert np.isnan(jc.lookup(cache, plan)["f"]).all()
    with pytest.raises(ValueError, match="the offsets of feature 'f' must rise from 0 to at most the number of ids"):
        jc.flush(cache, hooks.store)


@pytest.mark.parametrize("steps", [0, 3])
def test_a_cache_that_is_used_twice_is_refused(hooks, steps):
    first = jc.init(hooks.store, SLOTS)
    for pair in list(zip(*inputs(IDS), strict=True))[:steps]:
        first, _ = not_donating(first, pair)
    newest, loss = not_donating(first, (IDS[steps], IDS[steps]))
    again, of_again = not_donating(first, (IDS[steps], IDS[steps]))
    assert np.isfinite(loss) and np.isnan(of_again) and int(again.fault) == jc.CacheState.ADMIT_FAILED
    text = rf"of step {steps}: it has counted {steps} calls of admit and the store {steps + 1}"
    with pytest.raises(RuntimeError, match=text):
        hooks.store.raise_failure()
    with pytest.raises(RuntimeError, match="flush got a stale cache"):
        jc.flush(again, hooks.store)
    check_on_demand(jc.flush(newest, hooks.store), hooks.store)
    check_saved(hooks, steps + 1)


def test_an_update_without_its_plan_is_named_by_flush(hooks):
    cache, plan = jc.admit(jc.init(hooks.store, SLOTS), STORE, {"item": IDS[0]})
    rows = jc.lookup(cache, plan)
    cache = jc.update(cache, plan, {"item": 2 * rows["item"]})
    cache = jc.update(cache, plan, rows)
    assert int(cache.fault) == jc.CacheState.UPDATE_MISMATCH
    with pytest.raises(RuntimeError, match=r"update was called with .* at step 1: .* jc\.merge\(cache, plans\)"):
        jc.flush(cache, hooks.store)
    check_saved(hooks, 1)
    check_goes_on(hooks)


# A store that is closed


def test_a_program_that_runs_after_its_store_was_closed_is_refused(hooks):
    with hooks.store:
        cache, _ = train(jc.init(hooks.store, SLOTS), IDS[:5], "steps")
        jax.block_until_ready(cache)
    cache, losses = train(cache, IDS, "scan")
    assert np.isnan(losses).all()
    with pytest.raises(RuntimeError, match=r"admit or prefetch after its store was closed: leave `with store:` only"):
        jc.flush(cache, hooks.store)
    check_saved(hooks, 5)
    with hooks.store:
        check_goes_on(hooks)


@pytest.mark.parametrize("how", ["scan", "steps"])
def test_a_store_that_is_closed_while_a_program_runs(hooks, how):
    hooks.on_read = lambda number: time.sleep(0.005)
    results = []
    worker = threading.Thread(target=lambda: results.append(train(jc.init(hooks.store, SLOTS), IDS, how)))
    try:
        with hooks.store:
            worker.start()
            while hooks.reads < 6:
                time.sleep(0.001)
    except RuntimeError as error:  # the program has noticed before the block had ended
        assert "after its store was closed" in str(error)
    worker.join()
    cache, _ = results[0]
    steps = int(cache.step)
    assert 0 < steps < STEPS
    with pytest.raises(RuntimeError, match="after its store was closed|was raised before"):  # noqa: RUF043
        jc.flush(cache, hooks.store)
    check_saved(hooks, steps)


def test_the_end_of_the_block_raises_what_nobody_asked_for_and_hides_nothing(hooks):
    hooks.on_read = fails_at(3)
    with pytest.raises(DiskFull), hooks.store:
        jax.block_until_ready(train(jc.init(hooks.store, SLOTS), IDS, "scan"))
    hooks = Hooks()
    hooks.on_read = fails_at(3)
    with pytest.raises(ZeroDivisionError), hooks.store:
        jax.block_until_ready(train(jc.init(hooks.store, SLOTS), IDS, "scan"))
        raise ZeroDivisionError
    with pytest.raises(DiskFull):
        hooks.store.raise_failure()


# Ctrl-C


@pytest.fixture
def interruptible():
    """Ctrl-C as in an interactive program: a shell starts background jobs with it ignored."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def check_ctrl_c(random: standard_random.Random, how: str) -> int:
    """Ctrl-C in `with store:` at a random moment: in a callback, in a thread of the store, or by the clock."""
    hooks, cache, seen = Hooks(), None, 0
    at, place = random.randrange(1, 25), random.choice(["read", "write", "clock"])

    def strike(number):
        time.sleep(0.0005)
        if number == at:
            interrupt()

    timer = threading.Timer(random.random() * 0.03, interrupt)
    if place == "clock":
        hooks.on_read = lambda number: time.sleep(0.0005)
    else:
        setattr(hooks, f"on_{place}", strike)
    try:
        with hooks.store:
            cache = jc.init(hooks.store, SLOTS)
            if place == "clock":
                timer.start()
            try:
                cache, _ = train(cache, IDS, how)
                steps = int(cache.step)
                if place == "clock":
                    timer.join()
                jc.flush(cache, hooks.store)
            except KeyboardInterrupt:
                seen += 1
            check_saved(hooks, steps)
    except KeyboardInterrupt:
        seen += 1
    struck = place == "clock" or (hooks.reads if place == "read" else hooks.writes) >= at
    assert seen == struck
    check_saved(hooks, steps)
    hooks.store.transfers.open()
    check_goes_on(hooks)
    hooks.store.transfers.close()
    return steps


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("how", ["scan", "steps"])
def test_ctrl_c_in_the_block_never_loses_a_completed_step(how):
    random, before = standard_random.Random(0), signal.getsignal(signal.SIGINT)
    jax.block_until_ready(train(jc.init(Hooks().store, SLOTS), IDS, how))  # compiles
    steps = [check_ctrl_c(random, how) for _ in range(8)]
    assert signal.getsignal(signal.SIGINT) is before and len(set(steps)) > (1 if how == "steps" else 0)


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("how", ["scan", "steps"])
def test_ctrl_c_in_the_block_again_and_again(how):
    random = standard_random.Random(1)
    for _ in range(10):
        check_ctrl_c(random, how)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # where nobody can raise it
@pytest.mark.parametrize("how", ["scan", "steps"])
def test_ctrl_c_without_a_block_may_cost_the_cache_and_hangs_nothing(how):
    _OTHERS.extend(transfer_threads())
    random = standard_random.Random(2)
    for _ in range(10):
        hooks = Hooks()
        hooks.on_read = lambda number: time.sleep(0.001)
        timer = threading.Timer(random.random() * 0.04, interrupt)
        try:
            timer.start()
            cache, _ = train(jc.init(hooks.store, SLOTS), IDS, how)
            jax.block_until_ready(cache)
            timer.join()
        except KeyboardInterrupt:
            pass
        timer.join()
        jax.effects_barrier()
        hooks.store.transfers.close()
        assert transfer_threads() == []


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_waits_for_an_admit_and_a_second_one_does_not(hooks):
    with pytest.raises(KeyboardInterrupt), hooks.store:
        cache = jc.init(hooks.store, SLOTS)
        signal.raise_signal(signal.SIGINT)  # nothing happens
        cache, losses = train(cache, IDS[:2], "steps")
        assert np.isnan(np.asarray(losses)).all() and hooks.reads == 0
        with pytest.raises(KeyboardInterrupt):
            jc.flush(cache, hooks.store)
        check_saved(hooks, 0)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("how", ["scan", "steps"])
def test_ctrl_c_takes_effect_at_the_next_admit(hooks, how):
    """In the midst of a scan, too, while the main thread waits in a compiled program."""

    def strike(number):
        if number == 8:
            interrupt()
            time.sleep(0.02)

    hooks.on_read = strike
    with hooks.store:
        cache, _ = train(jc.init(hooks.store, SLOTS), IDS, how)
        steps = int(cache.step)
        with pytest.raises(KeyboardInterrupt):
            jc.flush(cache, hooks.store)
        assert 0 < steps < 8
    check_saved(hooks, steps)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_while_flush_waits_for_a_slow_writer(hooks):
    with hooks.store:
        cache, _ = train(jc.init(hooks.store, SLOTS), IDS, "scan")
        hooks.on_write = lambda number: time.sleep(0.05)
        threading.Timer(0.02, interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            jc.flush(cache, hooks.store)
            time.sleep(0.1)
            hooks.store.raise_failure()
        check_saved(hooks, STEPS)
        check_on_demand(jc.flush(cache, hooks.store), hooks.store)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_while_a_stuck_writer_holds_a_program_up(hooks):
    """The program waits for room for its victims, and goes on to its end once Ctrl-C is noted."""
    gate = threading.Event()
    hooks.on_write = lambda number: gate.wait(30)
    with hooks.store:
        done = []
        cache = jc.init(hooks.store, SLOTS)
        worker = threading.Thread(target=lambda: done.append(train(cache, IDS, "scan")))
        worker.start()
        worker.join(0.3)
        assert worker.is_alive()
        signal.raise_signal(signal.SIGINT)
        worker.join(10)
        assert not worker.is_alive()
        gate.set()
        cache, _ = done[0]
        steps = int(cache.step)
        with pytest.raises(KeyboardInterrupt):
            jc.flush(cache, hooks.store)
        assert 0 < steps < STEPS
        check_saved(hooks, steps)


def test_a_programs_own_handler_of_ctrl_c_is_left_alone(hooks):
    calls = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: calls.append(number))
    try:
        with hooks.store:
            signal.raise_signal(signal.SIGINT)
            hooks.store.raise_failure()
    finally:
        signal.signal(signal.SIGINT, previous)
    assert calls == [signal.SIGINT]


@pytest.mark.usefixtures("interruptible")
def test_the_block_in_another_thread_leaves_ctrl_c_alone(hooks):
    seen = []

    def enter():
        with hooks.store:
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
