"""A snapshot of rows is a copy of a dict, made while the rows are written, of which only a part is ever copied."""

from __future__ import annotations

import gc
import itertools
import random
import threading
import time
from collections import Counter

import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcache as jc
from jaxcache import index, snapshots
from jaxcache.optimizers import RowOptimizer
from jaxcache.store import RowStore
from jaxcache.tables import Group

DIM = 2
AMPLE = 2**30  # bytes to copy: no writer ever waits


def leaves_of_every_kind(weights):
    """A number and a vector of integers for each row."""
    return np.zeros(weights.shape[:-1], np.float32), np.zeros((*weights.shape[:-1], 3), np.int32)


OPTIMIZER = RowOptimizer(
    optax.GradientTransformation(leaves_of_every_kind, lambda gradients, state, params=None: (gradients, state)),
    DIM,
)


def make_store(*rows: int) -> RowStore:
    """A group of tables of so many rows, whose index has to grow with every few rows."""
    store = RowStore(Group.stack({f"table {n}": jc.Table(count, DIM) for n, count in enumerate(rows)}), OPTIMIZER)
    store.cells = index.empty(1)
    return store


def rows_of(numbers) -> jc.Rows:
    """Rows of which every leaf gives their number away."""
    numbers = np.asarray(numbers)
    weights = np.stack([numbers, -numbers], axis=1).astype(np.float32)
    return jc.Rows(weights, (numbers.astype(np.float32) / 2, np.stack([numbers] * 3, axis=1).astype(np.int32)))


def numbers_of(rows: jc.Rows) -> list[int]:
    """The numbers of rows that are whole."""
    numbers = rows.state[1][:, 0]
    wanted = rows_of(numbers)
    for leaf, other in zip((rows.weights, *rows.state), (wanted.weights, *wanted.state), strict=True):
        assert leaf.dtype == other.dtype
        np.testing.assert_array_equal(leaf, other)
    return numbers.tolist()


class Model:
    """The same rows in a dict, by table and id; and what was written since each mark."""

    def __init__(self, store: RowStore):
        self.store, self.rows, self.written = store, {}, {}
        self._numbers = itertools.count(1)

    def write(self, places) -> None:
        places = list(dict.fromkeys(places))
        numbers = [next(self._numbers) for _ in places]
        keys = [self.store.group.keys(table, np.array([i])) for table, i in places]
        self.store.write(np.concatenate(keys) if keys else np.zeros(0, np.int64), rows_of(np.array(numbers, int)))
        self.rows.update(zip(places, numbers, strict=True))
        for places_since in self.written.values():
            places_since.update(places)

    def snapshot(self, mark, since=None, copied_bytes=AMPLE, chunk_rows=(2, 1, 3, 5)) -> Reading:
        wanted = self.rows if since is None else {place: self.rows[place] for place in self.written[since]}
        self.written[mark] = set()
        written = Counter(table for table, _ in self.rows)
        return Reading(self.store.snapshot(mark, since, copied_bytes), dict(wanted), written, chunk_rows)


class Reading:
    """A snapshot that is read chunk by chunk, and what must be in it."""

    def __init__(self, snapshot, wanted, written, chunk_rows):
        self.snapshot, self.wanted, self.written, self.found = snapshot, wanted, written, []
        self._chunk_rows, self._chunks, self._lengths = chunk_rows, None, [[] for _ in snapshot.group.tables]

    def read(self, chunks=None) -> None:
        """Reads some more chunks, or what is left."""
        if self._chunks is None:  # the rows are counted when the reading begins, whatever was written since
            counts, parts = self.snapshot.count()
            expected = Counter(table for table, _ in self.wanted)
            assert counts.tolist() == [expected[table] for table in range(len(counts))]
            assert self.snapshot.count_written().tolist() == [self.written[table] for table in range(len(counts))]
            assert sum(rows for _, _, rows in parts) == len(self.wanted)
            self.parts = parts
            self._chunks = self.snapshot.keys(parts, self._chunk_rows)
        for table, keys in itertools.islice(self._chunks, chunks):
            tables, ids = self.snapshot.group.locate(keys)
            assert (tables == table).all()
            self._lengths[table].append(len(keys))
            numbers = numbers_of(self.snapshot.read(keys))
            self.found.extend(zip(((table, i) for i in ids.tolist()), numbers, strict=True))

    def check(self) -> None:
        """Reads what is left: each row once, in order, as it was."""
        self.read()
        assert self.found == sorted(self.wanted.items())
        for table, count in Counter(table for table, _ in self.wanted).items():
            # All chunks of a table are whole but the last one, as files are cut.
            assert self._lengths[table][:-1] == [self._chunk_rows[table]] * (-(-count // self._chunk_rows[table]) - 1)


@st.composite
def stores(draw):
    """The rows of one to four tables, and places in them: few enough to be written again and again."""
    rows = draw(st.lists(st.sampled_from([1, 2, 40, 70_000, 2**31 + 5, 10**15]), min_size=1, max_size=4))
    ids = [st.one_of(st.integers(0, min(count, 20) - 1), st.integers(max(0, count - 20), count - 1)) for count in rows]
    spread = [st.one_of(few, st.integers(0, count - 1)) for few, count in zip(ids, rows, strict=True)]
    return rows, st.one_of(*(st.tuples(st.just(table), few) for table, few in enumerate(spread)))


@settings(max_examples=120)
@given(stores(), st.data())
def test_a_snapshot_is_a_copy_of_a_dict(tables, data):
    rows, places = tables
    model, readings, marks = Model(make_store(*rows)), [], []
    chunk_rows = data.draw(st.lists(st.integers(1, 7), min_size=len(rows), max_size=len(rows)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshots, "_SORTED_KEYS", data.draw(st.sampled_from([1, 3, 2**23])))
        for number in range(data.draw(st.integers(1, 12))):
            done = data.draw(st.sampled_from(["write", "write", "write", "snapshot", "read", "read", "close", "drop"]))
            if done == "write":
                model.write(data.draw(st.lists(places, max_size=30)))
            elif done == "snapshot":
                since = data.draw(st.sampled_from([None, *marks]))
                readings.append(model.snapshot(f"mark {number}", since, chunk_rows=chunk_rows))
                marks = [*marks, f"mark {number}"][-8:]
                assert model.store.marks == marks
            elif readings:
                reading = readings[data.draw(st.integers(0, len(readings) - 1))]  # hypothesis would hold the object
                if done == "read":
                    reading.read(data.draw(st.integers(0, 5)))
                else:
                    readings.remove(reading)
                    if done == "close":
                        reading.snapshot.close()
                        assert reading.snapshot.closed and reading.snapshot.copied_bytes == 0
                    del reading
            assert model.store.has_snapshots == bool(readings)
        for reading in readings:
            reading.check()
            reading.snapshot.close()
        assert not model.store.has_snapshots
        last = model.snapshot("last")
        last.check()
        assert len(last.found) == model.store.rows_written == len(model.rows)


def test_rows_are_sorted_some_at_a_time(monkeypatch):
    """Parts hold as many rows as may be sorted at a time, and the chunks of a table go on over their borders."""
    monkeypatch.setattr(snapshots, "_SORTED_KEYS", 50)
    model, chosen = Model(make_store(10**12, 3, 10**12)), random.Random(1)
    for table in (0, 1, 2):
        model.write((table, chosen.randrange(10**12 if table != 1 else 3)) for _ in range(600))
    reading = model.snapshot("mark", chunk_rows=[64, 64, 64])
    reading.read(4)
    assert len(reading.parts) >= 24 and all(rows <= 50 for _, _, rows in reading.parts)
    model.write(list(model.rows)[::3])
    reading.check()


def test_arrays_that_grow_while_they_are_read():
    model = Model(make_store(10**15))
    model.write((0, 7**i) for i in range(10))
    old = model.store._rows.weights
    readings = [model.snapshot("first")]
    readings[0].read(3)
    model.write((0, 3 * i) for i in range(3000))
    readings.append(model.snapshot("second", since="first", chunk_rows=[500]))
    readings[1].read(2)
    assert model.store._rows.weights is not old
    model.write((0, i) for i in range(7000))
    for reading in readings:
        reading.check()


def test_only_rows_that_were_not_read_are_copied_and_each_once():
    model = Model(make_store(100))
    model.write((0, i) for i in range(10))
    reading = model.snapshot("mark", chunk_rows=[4])
    reading.read(1)
    snapshot, size = reading.snapshot, model.store.row_bytes
    model.write([(0, 0), (0, 3)])  # read
    model.write([(0, 50)])  # new
    assert snapshot.copied_bytes == 0
    model.write([(0, 3), (0, 4), (0, 9), (0, 50), (0, 51)])
    assert snapshot.copied_bytes == 2 * size
    model.write([(0, 9), (0, 8)])
    assert snapshot.copied_bytes == 3 * size
    changed = model.snapshot("other", since="mark")
    model.write([(0, 5), (0, 8), (0, 51)])  # 5 was not written since
    assert changed.snapshot.copied_bytes == 2 * size and snapshot.copied_bytes == 4 * size
    reading.check()
    changed.check()
    assert [place for place, _ in changed.found] == [(0, i) for i in (0, 3, 4, 8, 9, 50, 51)]


def test_nothing_written_since_is_nothing_and_not_everything():
    model = Model(make_store(100))
    model.write((0, i) for i in range(10))
    model.snapshot("first")
    changed = model.snapshot("second", since="first")
    changed.check()
    assert changed.found == []
    with pytest.raises(ValueError, match="third"):
        model.store.snapshot("fourth", "third", AMPLE)


def test_what_was_written_is_known_since_the_latest_snapshots():
    model = Model(make_store(100))
    for number in range(12):
        model.snapshot(f"mark {number}")
        model.write([(0, number)])
    assert model.store.marks == [f"mark {number}" for number in range(4, 12)]
    reading = model.snapshot("last", since="mark 5")
    reading.check()
    assert [place for place, _ in reading.found] == [(0, number) for number in range(5, 12)]


def test_replaced_rows_are_the_other_ones_and_nothing_was_written_since():
    model, other = Model(make_store(100)), Model(make_store(100))
    model.write((0, i) for i in range(20))
    model.snapshot("old")
    other.write((0, i) for i in range(10, 40))
    model.store.replace(other.store, "new")
    assert model.store.marks == ["new"]
    model.rows, model.written = other.rows, {"new": set()}
    model.write([(0, 11), (0, 77)])
    for reading in (model.snapshot("changed", since="new"), model.snapshot("all")):
        reading.check()


# Writers that wait


class Writer(threading.Thread):
    """A thread that overwrites rows."""

    def __init__(self, model: Model, places):
        super().__init__(daemon=True)
        self._model, self._places = model, places
        self.start()

    def run(self):
        self._model.write(self._places)

    def waits(self) -> bool:
        self.join(0.05)
        return self.is_alive()

    def went_on(self) -> bool:
        self.join(10)
        return not self.is_alive()


def full_snapshot() -> tuple[Model, Reading]:
    """A snapshot of ids 0 to 9 that has copied 9 and has no room for more."""
    model = Model(make_store(100))
    model.write((0, i) for i in range(10))
    reading = model.snapshot("mark", copied_bytes=1, chunk_rows=[2])
    model.write([(0, 9)])  # one write always finds room, or none would ever go on
    return model, reading


def test_a_writer_waits_until_its_rows_are_read(monkeypatch):
    monkeypatch.setattr("jaxcache.store._POLL_SECONDS", 60)  # it is told, and does not look by itself
    model, reading = full_snapshot()
    writer = Writer(model, [(0, 3), (0, 50)])
    assert writer.waits()
    model.store.read(np.array([3]))  # who reads does not
    reading.read(1)
    assert writer.waits()
    assert model.store.rows_written == 10  # a write is done as a whole
    reading.read(1)
    assert writer.went_on()
    assert reading.snapshot.waited >= 0.1
    reading.check()
    assert reading.snapshot.copied_bytes == model.store.row_bytes


def test_a_writer_waits_until_the_snapshot_is_closed(monkeypatch):
    monkeypatch.setattr("jaxcache.store._POLL_SECONDS", 60)
    model, reading = full_snapshot()
    writer = Writer(model, [(0, 3)])
    assert writer.waits()
    reading.snapshot.close()
    assert writer.went_on()
    model.write((0, i) for i in range(10))


def test_a_writer_waits_until_the_snapshot_is_gone():
    model, reading = full_snapshot()
    writer = Writer(model, [(0, 3)])
    assert writer.waits()
    del reading
    gc.collect()
    assert writer.went_on()
    assert not model.store.has_snapshots


def test_a_writer_of_rows_that_the_snapshot_needs_no_more_does_not_wait():
    model, reading = full_snapshot()
    reading.read(1)
    model.write([(0, 0), (0, 1)])  # read
    model.write([(0, 9)])  # copied
    model.write([(0, 20), (0, 30)])  # new
    assert reading.snapshot.waited == 0
    reading.check()


def test_each_of_several_snapshots_is_waited_for():
    model, first = full_snapshot()
    second = model.snapshot("second", copied_bytes=AMPLE)
    third = model.snapshot("third", copied_bytes=1)
    model.write([(0, 9)])
    writer = Writer(model, [(0, 3)])
    assert writer.waits()
    first.check()
    assert writer.waits()
    third.check()
    assert writer.went_on()
    second.check()
    assert second.snapshot.copied_bytes == 2 * model.store.row_bytes


def test_rows_that_another_writer_adds_while_one_waits():
    """They are old rows to a snapshot that was taken in between, however new they were when the waiting began."""
    model, first = full_snapshot()
    writer = Writer(model, [(0, 3), (0, 50)])
    assert writer.waits()
    model.store.write(model.store.group.keys(0, np.array([50])), rows_of([1234]))
    second = model.store.snapshot("second", None, AMPLE)
    first.check()
    assert writer.went_on()
    assert numbers_of(model.store.read(np.array([50]))) == [model.rows[0, 50]]
    assert numbers_of(second.read(np.array([50]))) == [1234]


@pytest.mark.parametrize("room", [1, 30, AMPLE])
def test_many_writers_beside_several_snapshots(room):
    """Nothing hangs, and what is read is what was there, however many rows there is room for."""
    model = Model(make_store(300, 10**15))
    model.write([(0, i) for i in range(300)] + [(1, i**4) for i in range(300)])
    size, group = model.store.row_bytes, model.store.group
    first = model.snapshot("first", copied_bytes=room * size, chunk_rows=[40, 40])
    model.write([(0, i) for i in range(0, 300, 7)] if room == AMPLE else [])
    readings = [first, model.snapshot("second", copied_bytes=room * size, chunk_rows=[25, 33])]
    begun, stop = threading.Barrier(4), threading.Event()

    def write(seed):
        chosen, number = random.Random(seed), 10**5 * seed
        begun.wait(10)
        while not stop.is_set():
            ids = np.array(sorted({chosen.randrange(300) for _ in range(20)}))
            number += 1
            keys = np.concatenate([group.keys(0, ids), group.keys(1, ids**4 + seed % 2)])
            model.store.write(keys, rows_of(np.full(len(keys), number)))

    threads = [threading.Thread(target=write, args=(seed,), daemon=True) for seed in (1, 2, 3)]
    for thread in threads:
        thread.start()
    begun.wait(10)
    while room != AMPLE and not all(reading.snapshot.waited for reading in readings):
        time.sleep(0.001)
    for _ in range(20):
        for reading in readings:
            reading.read(1)
        time.sleep(0.001)
    for reading in readings:
        reading.check()
        assert reading.snapshot.copied_bytes <= max(room, 40) * size
        assert room != AMPLE or reading.snapshot.waited == 0
    stop.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert model.store.rows_written > len(model.rows)
