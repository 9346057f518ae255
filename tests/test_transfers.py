"""`Transfers` alone: whoever reads gets the newest value of each row, however slow or broken the store is."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcache as jc
from jaxcache.optimizers import Rows
from jaxcache.transfers import Interrupted, Transfers

ROWS = 24
EVERY = np.arange(ROWS)
pytestmark = pytest.mark.timeout(60)


class DiskFull(Exception):
    pass


def transfer_threads() -> list[threading.Thread]:
    names = ("jaxcache-write-back", "jaxcache-prefetch")
    return [thread for thread in threading.enumerate() if thread.name.startswith(names) and thread not in _OTHERS]


_OTHERS: list[threading.Thread] = []  # of stores that earlier tests left open


class Host:
    """Two groups of rows, one with optimizer state and one frozen, with a gate in front of each way to them."""

    def __init__(self) -> None:
        tables = {"item": jc.Table(ROWS, 2), "word": jc.Table(ROWS, 3, frozen=True)}
        self.groups = jc.HostStore(tables, optax.sgd(0.1, momentum=0.9)).groups
        self.may_read, self.may_write = threading.Event(), threading.Event()
        self.may_read.set(), self.may_write.set()
        self.reads: list[list[int]] = []
        self.writes: list[list[int]] = []
        self.fail_writes = self.fail_reads = 0
        self.pauses: Iterator[float] = iter(())
        self._item = self.groups[0]
        self._read, self._write = self._item.read, self._item.write
        self._item.read, self._item.write = self.read, self.write
        self.transfers = Transfers(self.groups)

    def read(self, keys, size=None):
        assert self.may_read.wait(30)
        time.sleep(next(self.pauses, 0))
        if self.fail_reads:
            self.fail_reads -= 1
            raise DiskFull("read")
        if len(keys):
            self.reads.append(keys.tolist())
        return self._read(keys, size)

    def write(self, keys, rows):
        assert self.may_write.wait(30)
        time.sleep(next(self.pauses, 0))
        if self.fail_writes:
            self.fail_writes -= 1
            raise DiskFull("write")
        self.writes.append(keys.tolist())
        self._write(keys, rows)

    def at_home(self, keys) -> np.ndarray:
        return self._read(np.asarray(keys, np.int64)).weights[:, 0]

    # As the callbacks of one group call it

    def fetch(self, keys, size=None) -> np.ndarray:
        rows = self.transfers.read(0, np.asarray(keys, np.int64), len(keys) if size is None else size)
        assert len(rows.weights) == len(rows.state[0]) == (len(keys) if size is None else size)
        weights, momentum = rows.weights[: len(keys)], rows.state[0][: len(keys)]
        trained = momentum[:, 0] != 0
        np.testing.assert_array_equal(momentum[trained], 2 * weights[trained])  # the leaves of a row go together
        np.testing.assert_array_equal(weights[trained, 1], -weights[trained, 0])
        return weights[:, 0]

    def evict(self, keys, values) -> None:
        values = np.asarray(values, np.float32)
        weights = np.stack([values, -values], axis=1)
        none = np.zeros(0, np.int64)
        self.transfers.take_home([(np.asarray(keys, np.int64), Rows(weights, (2 * weights,))), (none, ())])

    def prefetch(self, keys, room=4) -> None:
        self.transfers.prefetch([np.asarray(keys, np.int64), np.zeros(0, np.int64)], [room, 1])


@pytest.fixture
def host():
    host = Host()
    _OTHERS.extend(transfer_threads())
    yield host
    host.may_read.set(), host.may_write.set()
    host.transfers.close()
    assert transfer_threads() == []


def test_rows_nobody_wrote_are_the_stores(host):
    np.testing.assert_array_equal(host.fetch([3, 1, 7]), host.at_home([3, 1, 7]))
    np.testing.assert_array_equal(host.fetch([5], size=4), host.at_home([5]))
    assert host.fetch([], size=4).shape == (0,) and host.fetch([]).shape == (0,)
    frozen = host.transfers.read(1, np.array([2, 3]), 2)
    np.testing.assert_array_equal(frozen.weights, host.groups[1].read(np.array([2, 3])).weights)
    assert frozen.state == () and transfer_threads() == []


def test_a_row_on_its_way_home_is_served_from_there(host):
    host.may_write.clear()
    host.evict([1, 2, 3], [10, 20, 30])
    host.evict([2, 5], [21, 50])
    assert host.fetch([5, 2, 1]).tolist() == [50, 21, 10]
    found = host.fetch([9, 2, 8, 3], size=6)
    assert found.tolist() == [host.at_home([9])[0], 21, host.at_home([8])[0], 30]
    assert host.reads == [[9, 8]] and host.writes == []
    host.may_write.set()
    host.transfers.wait_until_home()
    assert host.writes == [[1, 2, 3], [2, 5]]
    assert host.at_home([1, 2, 3, 5]).tolist() == [10, 21, 30, 50] == host.fetch([1, 2, 3, 5]).tolist()


def test_nothing_is_started_for_no_victims_and_no_rows(host):
    host.evict([], [])
    host.prefetch([])
    host.transfers.wait_until_home()
    assert transfer_threads() == [] and host.writes == host.reads == []


# Prefetches


def arrived(host, number: int) -> None:
    deadline = time.monotonic() + 20
    while len(host.reads) < number and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(host.reads) == number


@pytest.mark.parametrize("size", [2, 3, 4])
def test_what_was_prefetched_is_handed_out_once(host, size):
    """A part at a time, as the rounds of `admit` ask for it. Then the rows are in the cache, and may change there."""
    keys = [7, 3, 9, 1, 5]
    host.prefetch(keys, room=size)
    host.prefetch(keys[:2])
    arrived(host, 2)
    for first in range(0, 5, size):
        np.testing.assert_array_equal(host.fetch(keys[first : first + size], size), host.at_home(keys)[first:][:size])
    assert host.reads == [keys, keys[:2]]
    np.testing.assert_array_equal(host.fetch([5, 7]), host.at_home([5, 7]))
    assert host.reads == [keys, keys[:2], [5, 7]]


def test_what_was_prefetched_is_found_in_any_order_and_among_others(host):
    host.prefetch([7, 3, 9, 1, 5])
    arrived(host, 1)
    np.testing.assert_array_equal(host.fetch([5, 7], size=3), host.at_home([5, 7]))
    np.testing.assert_array_equal(host.fetch([1, 20, 3, 21]), host.at_home([1, 20, 3, 21]))
    assert host.reads == [[7, 3, 9, 1, 5], [20, 21]]


def test_a_prefetch_that_is_still_under_way_is_waited_for(host):
    host.may_read.clear()
    host.prefetch([4, 5])
    threading.Timer(0.1, host.may_read.set).start()
    np.testing.assert_array_equal(host.fetch([4, 5]), host.at_home([4, 5]))
    assert host.reads == [[4, 5]]


def test_a_row_that_was_a_victim_after_it_was_prefetched_is_read_anew(host):
    host.prefetch([4, 5, 6])
    arrived(host, 1)
    host.evict([5], [50])
    host.transfers.wait_until_home()
    assert host.fetch([4, 5, 6]).tolist() == [host.at_home([4])[0], 50, host.at_home([6])[0]]
    assert host.reads == [[4, 5, 6], [5]]


def test_a_prefetch_sees_what_is_on_its_way_home(host):
    host.may_write.clear()
    host.evict([5], [50])
    host.prefetch([4, 5])
    arrived(host, 1)
    assert host.fetch([4, 5]).tolist() == [host.at_home([4])[0], 50]
    assert host.reads == [[4]]


def test_a_used_prefetch_is_dropped_and_others_stay(host):
    host.prefetch([1, 2])
    host.prefetch([3, 4])
    arrived(host, 2)
    host.fetch([1])
    host.transfers.drop_used()
    host.fetch([1])
    host.fetch([3])
    assert host.reads == [[1, 2], [3, 4], [1]]


def test_only_the_last_four_prefetches_are_kept(host):
    for number, first in enumerate(range(0, 12, 2)):
        host.prefetch([first, first + 1])
        arrived(host, number + 1)
    for first in range(0, 12, 2):
        host.fetch([first])
    assert host.reads[6:] == [[0], [2]]


def test_expiring_drops_prefetches_and_counts(host):
    host.prefetch([1])
    arrived(host, 1)
    host.transfers.expire()
    host.fetch([1])
    assert host.reads == [[1], [1]] and host.transfers.admitted == 1


def test_a_prefetch_that_fails_is_an_error_of_whoever_wants_the_rows(host):
    host.fail_reads = 1
    host.prefetch([1])
    with pytest.raises(DiskFull):
        host.fetch([1])
    host.transfers.drop_used()
    np.testing.assert_array_equal(host.fetch([1]), host.at_home([1]))


# A model


def run_against_a_model(seed: int, steps: int, pause: float) -> None:
    """Evictions, reads and prefetches, right and wrong, of a cache: a dict knows the newest value of each row."""
    _OTHERS.extend(transfer_threads())
    random, host = np.random.default_rng(seed), Host()
    host.pauses = iter(lambda: pause * random.integers(0, 3), None)
    newest = dict(enumerate(host.at_home(EVERY).tolist()))
    resident: dict[int, float] = {}
    try:
        for step in range(steps):
            admitted = random.permutation(ROWS)[: random.integers(1, 7)].tolist()
            missing = [row for row in admitted if row not in resident]
            if random.random() < 0.5:
                wrong = random.permutation(ROWS)[: random.integers(1, 5)].tolist()
                ahead = missing if random.random() < 0.5 else (missing + [row for row in wrong if row not in missing])
                host.prefetch([row for row in ahead if row not in resident], room=2)
            host.transfers.drop_used()
            for first in range(0, len(missing), 2):
                others = [row for row in resident if row not in admitted]
                victims = random.permutation(others)[: random.integers(0, 4)].astype(int).tolist()
                found = host.fetch(missing[first : first + 2], size=2)
                assert found.tolist() == [newest[row] for row in missing[first : first + 2]]
                host.evict(victims, [newest[row] for row in victims])
                for row in victims:
                    del resident[row]
                resident.update({row: newest[row] for row in missing[first : first + 2]})
            for row in admitted:
                newest[row] = resident[row] = float(np.float32(step + 1 + row / ROWS))
            if random.random() < 0.1:  # a flush of some rows, which then leave without being written again
                host.transfers.wait_until_home()
                clean = [row for row in resident if random.random() < 0.5]
                values = np.array([newest[row] for row in clean], np.float32)
                weights = np.stack([values, -values], axis=1)
                host.write(np.array(clean, np.int64), Rows(weights, (2 * weights,)))
                for row in clean:
                    del resident[row]
                away = [row for row in range(ROWS) if row not in resident]
                assert host.at_home(away).tolist() == [newest[row] for row in away]
        host.evict(list(resident), list(resident.values()))
        host.transfers.wait_until_home()
        assert host.at_home(EVERY).tolist() == list(newest.values())
    finally:
        host.transfers.close()
    assert transfer_threads() == [] and host.transfers.failure is None


@settings(max_examples=10)
@given(seed=st.integers(0, 2**16), pause=st.sampled_from([0, 0.0005]))
def test_reads_see_the_newest_value_of_each_row(seed, pause):
    run_against_a_model(seed, 40, pause)


@pytest.mark.slow
@settings(max_examples=15)
@given(seed=st.integers(0, 2**16), pause=st.sampled_from([0, 0.0003, 0.001]))
def test_reads_see_the_newest_value_of_each_row_for_long(seed, pause):
    run_against_a_model(seed, 150, pause)


# Back-pressure, failures, the end


def evict_five(host) -> threading.Thread:
    """Four sets of victims that are not written, and one more in a thread."""
    for row in range(4):
        host.evict([row], [row])
    fifth = threading.Thread(target=lambda: host.evict([4], [4]))
    fifth.start()
    return fifth


def test_whoever_brings_a_fifth_set_of_victims_waits(host):
    host.may_write.clear()
    fifth = evict_five(host)
    fifth.join(0.2)
    assert fifth.is_alive()
    host.may_write.set()
    fifth.join()
    host.transfers.wait_until_home()
    assert host.writes == [[0], [1], [2], [3], [4]]


@pytest.mark.parametrize("why", ["write failure", "ctrl-c", "closed", "another failure"])
def test_whoever_waits_for_room_is_interrupted(host, why):
    host.may_write.clear()
    for row in range(4):
        host.evict([row], [row])
    if why == "write failure":
        host.fail_writes = 1
        threading.Timer(0.1, host.may_write.set).start()
    else:
        strike = {
            "ctrl-c": lambda: setattr(host.transfers.interrupts, "_noted", True),
            "closed": lambda: setattr(host.transfers, "_closed", True),
            "another failure": lambda: host.transfers.keep(DiskFull("write")),
        }[why]
        threading.Timer(0.1, strike).start()
    with pytest.raises(Interrupted):
        host.evict([4], [4])
    expected = {"ctrl-c": KeyboardInterrupt, "closed": RuntimeError}.get(why, DiskFull)
    with pytest.raises(expected):
        host.transfers.raise_failure()
    host.may_write.set()
    host.transfers.wait_until_home()
    assert host.at_home([0, 1, 2, 3]).tolist() == [0, 1, 2, 3] and [4] not in host.writes


def test_whoever_waits_for_a_prefetch_is_interrupted(host):
    host.may_read.clear()
    host.prefetch([1])
    threading.Timer(0.1, setattr, (host.transfers.interrupts, "_noted", True)).start()
    with pytest.raises(Interrupted):
        host.fetch([1])
    host.may_read.set()
    with pytest.raises(KeyboardInterrupt):
        host.transfers.raise_failure()


@pytest.mark.parametrize("failures", [1, 2])
def test_victims_whose_writing_failed_are_served_and_written_in_order_later(host, failures):
    """Older values of a row never land last."""
    host.may_write.clear()
    host.fail_writes = failures
    for value in (10, 11, 12):
        host.evict([1, value], [value, value])
    host.may_write.set()
    if failures == 2:
        with pytest.raises(DiskFull):
            host.transfers.wait_until_home()
        assert host.writes == [] and host.fetch([1]).tolist() == [12]
    host.transfers.wait_until_home()
    assert host.writes == [[1, 10], [1, 11], [1, 12]] and host.at_home([1]).tolist() == [12]
    with pytest.raises(DiskFull):
        host.transfers.raise_failure()
    assert not host.transfers.failed
    host.evict([1], [13])
    host.transfers.wait_until_home()
    assert host.at_home([1]).tolist() == [13] and not host.transfers.failed


def test_a_write_failure_is_a_failure_until_what_failed_is_home(host):
    host.fail_writes = 1
    host.evict([1], [10])
    deadline = time.monotonic() + 20
    while host.transfers.failure is None and time.monotonic() < deadline:
        time.sleep(0.001)
    with pytest.raises(DiskFull):
        host.transfers.raise_failure()
    assert host.transfers.failed  # and nothing is written behind it: nothing may be moved
    with pytest.raises(DiskFull):
        host.transfers.raise_failure()
    host.transfers.wait_until_home()
    assert not host.transfers.failed and host.at_home([1]).tolist() == [10]


def test_the_first_failure_is_kept_and_raised_once_with_its_traceback(host):
    def breaks():
        raise DiskFull("first")

    try:
        breaks()
    except DiskFull as error:
        host.transfers.keep(error)
    host.transfers.keep(ValueError("second"))
    host.transfers.interrupts._noted = True
    assert host.transfers.failed
    with pytest.raises(DiskFull, match="first") as caught:
        host.transfers.raise_failure()
    assert "breaks" in [entry.name for entry in caught.traceback]
    with pytest.raises(KeyboardInterrupt):
        host.transfers.raise_failure()
    host.transfers.raise_failure()
    assert not host.transfers.failed


def test_closing_waits_for_victims_and_refuses_what_follows_until_it_is_opened_again(host):
    host.pauses = iter([0.1, 0.1])
    host.evict([1], [10])
    host.evict([2], [20])
    host.transfers.close()
    assert transfer_threads() == [] and host.at_home([1, 2]).tolist() == [10, 20]
    assert host.transfers.failed
    with pytest.raises(RuntimeError, match="after its store was closed"):
        host.transfers.raise_failure()
    assert host.transfers.failed  # again
    with pytest.raises(RuntimeError, match=r"leave `with store:` only when every program .* has returned"):
        host.transfers.raise_failure()
    host.transfers.open()
    assert not host.transfers.failed
    host.evict([1], [11])
    host.transfers.wait_until_home()
    assert host.at_home([1]).tolist() == [11]


def test_closing_with_a_broken_writer_ends(host):
    host.fail_writes = 100
    for row in range(3):
        host.evict([row], [row])
    host.transfers.close()
    assert transfer_threads() == []
    host.fail_writes = 0
    host.transfers.wait_until_home()
    assert host.at_home([0, 1, 2]).tolist() == [0, 1, 2]


def test_prefetches_that_are_dropped_are_not_read():
    """Else a slow store would be busy with them when one is wanted."""
    store = jc.HostStore({"item": jc.Table(100, 2)}, optax.sgd(0.1))
    (rows,) = store.groups
    gate, read, started = threading.Event(), rows.read, []

    def slow(keys, size=None):
        started.append(int(keys[0]))
        gate.wait()
        return read(keys, size)

    rows.read = slow
    for row in range(20):
        store.transfers.prefetch([np.array([row])], [1])
    gate.set()
    assert store.transfers.read(0, np.array([19]), 1).weights.shape == (1, 2)
    store.transfers.close()
    assert started[1:] == [16, 17, 18, 19] and started[0] < 16  # the first one was being read
