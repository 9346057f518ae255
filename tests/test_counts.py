"""Counting ids gives what a dictionary and a loop give; the hottest rows are those that `static` pins."""

import tracemalloc
from collections import Counter
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import criteo
import jaxcache as jc
from jaxcache.counts import count_ids, hottest_rows
from jaxcache.policies import static
from jaxcache.tables import MAX_ROWS
from jaxcache.traces import MISSING

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
ROWS = {"user": 11, "item": 3, "unused": 5}
TABLES = {name: jc.Table(rows, 4) for name, rows in ROWS.items()}


def counted_by_hand(batches, rows):
    """Counts by a dictionary and a loop."""
    seen = Counter((name, int(i)) for batch in batches for name, ids in batch.items() for i in np.ravel(ids))
    return {name: [seen[name, i] for i in range(count)] for name, count in rows.items()}


def assert_counts(found, expected):
    assert list(found) == list(expected)
    for name, counts in found.items():
        assert counts.dtype == np.int64
        np.testing.assert_array_equal(counts, expected[name], name)


# count_ids


def id_arrays(samples, rows):
    """Ids `[samples]` or `[samples, n]`, n = 0 among them, in some integer dtype, as NumPy or JAX array or as lists."""
    shapes = st.sampled_from([(samples,), (samples, 0), (samples, 1), (samples, 3), (samples, 2, 2)])
    makers = st.sampled_from(
        [np.int64, np.uint64, np.int8, np.uint16, lambda ids: ids.tolist(), lambda ids: jnp.asarray(ids, jnp.int32)]
    )

    def filled(shape, make, data):
        # Cycled from a short list: many repetitions within a batch.
        ids = np.resize(np.array(data, np.int64), shape)
        return make(ids)

    return st.builds(filled, shapes, makers, st.lists(st.integers(0, rows - 1), min_size=1, max_size=9))


@st.composite
def id_batches(draw):
    batches = []
    for _ in range(draw(st.integers(0, 5))):
        samples = draw(st.integers(0, 4))
        names = draw(st.sampled_from([("user",), ("item", "user"), ("user", "item")]))
        batches.append({name: draw(id_arrays(samples, ROWS[name])) for name in names})
    return batches


@given(id_batches())
def test_counts_are_those_of_a_dictionary_and_a_loop(batches):
    assert_counts(count_ids(batches, TABLES), counted_by_hand(batches, ROWS))
    wrapped = ((batch, "label") for batch in batches)  # a generator, and ids that are a part of the batch
    assert_counts(count_ids(wrapped, TABLES, ids=lambda batch: batch[0]), counted_by_hand(batches, ROWS))


def test_a_store_stands_for_its_tables():
    batches = [{"user": np.array([1, 1, 10])}]
    store = jc.HostStore(TABLES, optax.sgd(0.1))
    assert_counts(count_ids(batches, store), counted_by_hand(batches, ROWS))


def test_batches_are_counted_one_at_a_time():
    size = 100_000

    def loader(number):
        for _ in range(number):
            yield {"user": np.full(size, 3)}

    def peak(number):
        tracemalloc.start()
        try:
            counts = count_ids(loader(number), TABLES)
            return counts, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(2)  # warm up
    _, of_three = peak(3)
    counts, of_sixty = peak(60)
    assert counts["user"][3] == 60 * size
    assert of_sixty < 1.2 * of_three


def test_counts_are_saved_and_read_again(tmp_path):
    counts = count_ids([{"user": np.array([1, 1, 10]), "item": np.array([2, 2, 0])}], TABLES)
    np.savez(tmp_path / "counts.npz", **counts)
    with np.load(tmp_path / "counts.npz") as saved:
        group = jc.Group.stack(TABLES)
        keys = [static(source).warm_keys(group, 3).tolist() for source in (counts, saved)]
    assert keys[0] == keys[1] == [1, 13, 10]


def test_a_file_is_counted_as_its_batches(tmp_path):
    ids = np.random.default_rng(0).integers(0, 11, (200_000, 2))  # several parts
    np.savez(tmp_path / "ids.npz", ids=ids)
    found = count_ids(tmp_path / "ids.npz", TABLES, ids=lambda part: {"user": part["0"], "item": part["1"] % 3})
    assert_counts(
        found,
        {
            "user": np.bincount(ids[:, 0], minlength=11),
            "item": np.bincount(ids[:, 1] % 3, minlength=3),
            "unused": np.zeros(5),
        },
    )
    assert_counts(
        count_ids(str(tmp_path / "ids.npz"), {"0": jc.Table(11, 4), "1": jc.Table(11, 4)}),
        {
            "0": found["user"],
            "1": np.bincount(ids[:, 1], minlength=11),
        },
    )


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        count_ids(tmp_path / "none.npz", TABLES)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"user": np.array([0, 11])}, ValueError, r"'user' has id 11 at lookup 1; ids must lie in 0 to 10"),
        ({"user": np.array([-1])}, ValueError, r"'user' has id -1"),
        ({"user": np.array([1.0])}, TypeError, "must be integers"),
        ({"user": np.array([True])}, TypeError, "must be integers"),
        ({"user": [[1, 2], [3]]}, ValueError, "'user' are no array"),
        ({"usr": np.array([1])}, KeyError, "no feature or table named 'usr'"),
        ({"user": np.array([1, 2]), "item": np.array([1])}, ValueError, "same samples"),
        ({"user": np.array(1)}, ValueError, "are a single number"),
        ({}, TypeError, "mapping"),
        (np.array([1]), TypeError, "mapping"),
    ],
)
def test_ids_are_checked_as_the_pipeline_does(batch, error, message):
    with pytest.raises(error, match=message):
        count_ids([{"user": np.array([1])}, batch], TABLES)


def test_a_loader_must_be_iterable():
    with pytest.raises(TypeError, match="iterable of batches, got int"):
        count_ids(7, TABLES)


@pytest.mark.parametrize("rows", [2**58, MAX_ROWS])  # more bytes than there are; more than there are addresses
def test_counts_without_room_name_the_table(rows):
    with pytest.raises(MemoryError, match="table 'huge' take 8 bytes a row"):
        count_ids([], {"huge": jc.Table(rows, 4)})


# hottest_rows


@given(
    st.dictionaries(st.sampled_from("abc"), st.lists(st.integers(0, 4), min_size=1, max_size=6), min_size=1),
    st.integers(0, 20),
)
def test_hottest_rows_are_the_first_in_order_of_counts(counts, number):
    counts = {name: np.array(values) for name, values in counts.items()}
    rows = [(-count, place, i) for place, values in enumerate(counts.values()) for i, count in enumerate(values)]
    first = sorted(row for row in rows if row[0] < 0)[:number]
    found = hottest_rows(counts, number)
    assert list(found) == list(counts)
    for place, rows in enumerate(found.values()):
        assert rows.dtype == np.int64
        assert rows.tolist() == sorted(i for _, table, i in first if table == place)


@given(st.lists(st.integers(0, 3), min_size=12, max_size=12), st.integers(0, 12))
def test_hottest_rows_are_those_that_static_pins(values, slots):
    counts = {"user": np.array(values[:7]), "item": np.array(values[7:])}
    group = jc.Group.stack({name: jc.Table(len(count), 4) for name, count in counts.items()})
    found = hottest_rows(counts, slots)
    keys = [group.keys(group.index(name), rows) for name, rows in found.items()]
    assert sorted(np.concatenate(keys)) == sorted(static(counts).warm_keys(group, slots))


@pytest.mark.parametrize("number", [-1, 1.5, "5%", True])
def test_a_number_of_hottest_rows_must_be_one(number):
    with pytest.raises(ValueError, match="number must be an integer, at least 0"):
        hottest_rows({"user": np.array([1])}, number)


@pytest.mark.parametrize(
    ("counts", "error"),
    [({"user": np.array([0.5])}, TypeError), ({"user": np.array([-1])}, ValueError), (np.array([1]), TypeError)],
)
def test_counts_must_be_counts(counts, error):
    with pytest.raises(error):
        hottest_rows(counts, 1)


# Real data


def test_counts_of_the_criteo_log():
    path = DATA / "criteo_80k.tsv.gz"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    log = criteo.read_criteo(path)
    tables = {name: jc.Table(rows, 16) for name, rows in zip(log.features, log.cardinalities, strict=True)}
    found = count_ids(log.batches(512, range(len(log))), tables, ids=lambda batch: batch["ids"])
    rows = dict(zip(log.features, log.cardinalities, strict=True))
    expected = {name: np.bincount(log.ids[i], minlength=rows[name]) for i, name in enumerate(log.features)}
    assert_counts(found, expected)

    def rows_of(part):
        return {name: np.where(values == MISSING, 0, values + 1) for name, values in part.items()}

    # The text itself, its values of 20 bits taken for rows: other rows, the same counts.
    raw = count_ids(path, dict.fromkeys(log.features, jc.Table(2**20 + 1, 16)), ids=rows_of)
    for name, counts in raw.items():
        assert sorted(counts[counts > 0]) == sorted(expected[name][expected[name] > 0])


def test_counts_of_the_clicks():
    path = DATA / "clicks.npz"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    with np.load(path) as file:
        ids, rows = file["ids"], int(np.ravel(file["cardinality"])[0])
    found = count_ids(path, {"item": jc.Table(rows, 4)}, ids=lambda part: {"item": part["0"]})
    assert_counts(found, {"item": np.bincount(ids[:, 0], minlength=rows)})
    # The share of all lookups that the hottest 5 % of rows take, as published with the file.
    hot = hottest_rows(found, rows // 20)["item"]
    assert round(found["item"][hot].sum() / len(ids), 2) == 0.33
