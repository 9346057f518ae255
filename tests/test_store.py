"""The store is a dict of rows whose untouched entries are computed, in memory bound by what was written."""

import itertools
import threading

import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcache as jc

DIM = 3
TABLES = {"user": jc.Table(10**12, DIM, jc.normal()), "item": jc.Table(40, DIM), "all": jc.Table(2**63 - 1, DIM)}


def some_optimizer():
    """Row leaves of several shapes and dtypes: a number, a vector, and integers."""

    def init(weights):
        return (
            np.full(weights.shape[:-1], 7.0, np.float32),
            np.full(weights.shape, -1.0, np.float32),
            np.full((*weights.shape[:-1], 2), 5, np.int32),
        )

    return optax.GradientTransformation(init, lambda gradients, state, params=None: (gradients, state))


def row_of(number):
    """Values of a row that give its number away in each leaf."""
    return jc.Rows(
        np.full(DIM, number, np.float32) + np.arange(DIM, dtype=np.float32),
        (np.float32(2 * number), np.full(DIM, 3 * number, np.float32), np.array([number, -number], np.int32)),
    )


def stacked(rows):
    states = zip(*(row.state for row in rows), strict=True)
    return jc.Rows(np.stack([row.weights for row in rows]), tuple(map(np.stack, states)))


def initial(store, table, row):
    """The row as it is before training, from the table's initial weights and the optimizer's initial state."""
    key = store.group.keys(store.group.index(table), np.array([row]))
    weights = store.group.initial_weights(store.seed, key)[0]
    state = (np.float32(7), np.full(DIM, -1, np.float32), np.array([5, 5], np.int32))
    return jc.Rows(weights, state)


PLACES = st.one_of(
    st.tuples(st.sampled_from(list(TABLES)), st.integers(0, 39)),
    st.sampled_from([("user", 10**12 - 1), ("all", 2**63 - 2), ("all", 2**62), ("all", 2**31)]),
)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.lists(PLACES, unique=True, min_size=1, max_size=30)), max_size=12))
def test_read_and_write_are_those_of_a_dict(requests):
    store, expected, numbers = jc.HostStore(TABLES, optimizer=some_optimizer(), seed=4), {}, itertools.count(1)
    group = store.group
    for write, places in requests:
        keys = np.array([group.keys(group.index(table), np.array([row]))[0] for table, row in places])
        if write:
            rows = [row_of(next(numbers)) for _ in places]
            expected.update(zip(places, rows, strict=True))
            store.write(keys, stacked(rows))
            assert store.rows_written == len(expected)
        else:
            places, keys = places + places[:2], np.concatenate([keys, keys[:2]])  # a read may repeat rows
            found = store.read(keys)
            wanted = stacked([expected[place] if place in expected else initial(store, *place) for place in places])
            for one, other in zip((found.weights, *found.state), (wanted.weights, *wanted.state), strict=True):
                assert one.dtype == other.dtype
                np.testing.assert_array_equal(one, other)
    for (table, row), value in expected.items():
        np.testing.assert_array_equal(store.rows(table, [row]), value.weights[None])
        for found, wanted in zip(store.row_state(table, [row]), value.state, strict=True):
            np.testing.assert_array_equal(found[0], wanted)


def test_a_read_into_a_larger_size_starts_with_the_rows_and_writing_takes_the_first_rows():
    store = jc.HostStore(TABLES, optimizer=some_optimizer())
    keys = store.group.keys(1, np.array([3, 5]))
    store.write(keys, stacked([row_of(number) for number in (1, 2, 3)]))
    assert store.rows_written == 2
    found = store.read(keys[::-1], 7)
    assert found.weights.shape == (7, DIM) and [leaf.shape for leaf in found.state] == [(7,), (7, DIM), (7, 2)]
    np.testing.assert_array_equal(found.weights[:2], stacked([row_of(2), row_of(1)]).weights)
    assert found.state[0][:2].tolist() == [4.0, 2.0]


def test_untouched_rows_are_not_materialised():
    store = jc.HostStore({"huge": jc.Table(10**12, 64)}, optimizer=optax.adam(0.1))
    start = store.nbytes
    assert store.row_bytes == 3 * 64 * 4 and store.table_bytes == 10**12 * store.row_bytes and start < 100_000
    random, written = np.random.default_rng(0), 0
    for _ in range(20):
        keys = np.unique(random.integers(0, 10**12, 1000))
        rows = store.read(keys)
        assert store.rows_written == written and store.nbytes <= max(start, 2.1 * written * store.row_bytes + 2**20)
        store.write(keys, rows)
        written += len(keys)
        assert store.rows_written == written  # rows drawn twice are beyond all likelihood
    # The rows, room to double them, and an index of at most 64 bytes a row.
    assert written * store.row_bytes <= store.nbytes <= written * (2 * store.row_bytes + 64)


def test_growth_keeps_every_value():
    store = jc.HostStore({"t": jc.Table(10**6, 2)}, optimizer=optax.sgd(0.1, momentum=0.9))
    ids = np.random.default_rng(0).permutation(10**6)[:5000]
    sizes = []
    for part in np.array_split(ids, 50):
        values = np.stack([part, -part], axis=1).astype(np.float32)
        store.write(part, jc.Rows(values, (values / 2,)))
        sizes.append(store.nbytes)
    assert len(set(sizes)) > 3  # it did grow
    np.testing.assert_array_equal(store.rows("t", ids), np.stack([ids, -ids], axis=1).astype(np.float32))
    np.testing.assert_array_equal(store.row_state("t", ids)[0][:, 0], ids.astype(np.float32) / 2)


def test_rows_are_new_arrays():
    store = jc.HostStore({"t": jc.Table(10, 2)}, optimizer=optax.sgd(0.1))
    values = np.ones((1, 2), np.float32)
    store.write(np.array([4]), jc.Rows(values, ()))
    values[:] = 2
    store.rows("t", [4])[:] = 3
    np.testing.assert_array_equal(store.rows("t", [4]), np.ones((1, 2)))


def test_equal_stores_hold_equal_rows_and_the_seed_matters():
    first, second, other = (jc.HostStore(TABLES, optimizer=optax.sgd(0.1), seed=seed) for seed in (1, 1, 2))
    ids = np.arange(40)
    np.testing.assert_array_equal(first.rows("item", ids), second.rows("item", ids))
    assert (first.rows("item", ids) != other.rows("item", ids)).all()


def test_rows_and_row_state_of_a_store_that_is_behind_are_errors_that_name_flush():
    store = jc.HostStore(TABLES, optimizer=optax.adagrad(0.1))
    assert not store.behind and store.step == 0
    store.mark_behind()
    for read in (store.rows, store.row_state):
        with pytest.raises(RuntimeError, match=r"newest rows are still in the cache.*cache = ahead\.flush\(cache\)"):
            read("item", [1])
    store.catch_up((), 5)
    assert not store.behind and store.step == 5 and store.rows("item", [1]).shape == (1, DIM)


def test_one_pipeline_at_a_time():
    store, first, second = jc.HostStore(TABLES, optimizer=optax.sgd(0.1)), object(), object()
    store.open(first)
    with pytest.raises(RuntimeError, match="already serves an open LookAhead"):
        store.open(second)
    store.close(second)  # of no effect: it never had the store
    with pytest.raises(RuntimeError, match="already serves an open LookAhead"):
        store.open(second)
    store.close(first)
    store.open(second)


def test_errors_of_rows_name_table_and_id():
    store = jc.HostStore(TABLES, optimizer=optax.sgd(0.1))
    with pytest.raises(KeyError, match="no table named 'itm': the store has user, item, all"):
        store.rows("itm", [1])
    with pytest.raises(ValueError, match="feature 'item' has id 40 at lookup 1; ids must lie in 0 to 39"):
        store.rows("item", [39, 40])
    with pytest.raises(TypeError, match="feature 'item' are float64"):
        store.row_state("item", [1.5])


def test_the_repr_tells_the_tables_and_what_was_written():
    store = jc.HostStore({"user": jc.Table(1000, 2)}, optimizer=optax.sgd(0.1))
    assert repr(store) == "HostStore(user: 1,000 x 2; 0 rows written, step 0)"


def test_concurrent_reads_and_writes_never_mix_versions():
    """Writers raise the version of random rows, the store grows; readers see whole rows that never go back."""
    store = jc.HostStore({"t": jc.Table(10**6, 8)}, optimizer=optax.sgd(0.1, momentum=0.9))
    writers, versions, share = 2, 60, 1500
    barrier = threading.Barrier(writers + 2)
    done, errors = threading.Event(), []

    def write(writer):
        random, mine = np.random.default_rng(writer), writer * share + np.arange(share)
        barrier.wait()
        for version in range(1, versions + 1):
            # From few rows to all: the arrays grow while others read.
            keys = random.permutation(mine[: share * version // versions])
            values = np.full((len(keys), 8), version, np.float32)
            store.write(keys, jc.Rows(values, (-values,)))

    def read():
        keys = np.arange(writers * share)
        before = np.zeros(len(keys))
        barrier.wait()
        while True:
            last = done.is_set()
            rows = store.read(keys)
            written = rows.state[0][:, 0] != 0  # the momentum of a row that was never written is 0
            version = np.where(written, rows.weights[:, 0], 0)
            assert (rows.weights[written] == version[written, None]).all(), "a row of two versions"
            assert (rows.state[0] == -version[:, None]).all(), "weights and state of two versions"
            assert (version >= before).all(), "an older version came back"
            before = version
            if last:
                assert (version == versions).all(), "a write was lost"
                return

    def guarded(work, *arguments):
        try:
            work(*arguments)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=guarded, args=(write, writer)) for writer in range(writers)]
    readers = [threading.Thread(target=guarded, args=(read,)) for _ in range(2)]
    for thread in threads + readers:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    for thread in readers:
        thread.join()
    if errors:
        raise errors[0]
    assert store.rows_written == writers * share


def test_no_rows_at_all():
    store = jc.HostStore({"a": jc.Table(10, 3)}, optimizer=optax.sgd(0.1))
    store.write(np.zeros(0, np.int64), store.read(np.zeros(0, np.int64)))
    assert store.rows_written == 0
    assert store.rows("a", []).shape == (0, 3)
