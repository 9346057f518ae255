"""The store is a dict of rows whose untouched entries are computed, in memory bound by what was written."""

import itertools
import os
import re
import shutil
import threading
import tracemalloc

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcache as jc
import jaxcache.store
from jaxcache.store import RowStore

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(autouse=True, scope="module")
def small_chunks():
    """Tables of 40 rows are loaded and saved in several chunks, the last of which is shorter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxcache.store, "_CHUNK", 64)
        yield


def some_optimizer():
    """Row leaves of several shapes and dtypes: a number, a vector, and integers."""

    def init(weights):
        return (
            np.full(weights.shape[:-1], 7.0, np.float32),
            np.full(weights.shape, -1.0, np.float32),
            np.full((*weights.shape[:-1], 2), 5, np.int32),
        )

    return optax.GradientTransformation(init, lambda gradients, state, params=None: (gradients, state))


TABLES = {
    "user": jc.Table(10**12, 3, jc.normal()),
    "city": jc.Table(40, 5, jc.normal(), dtype="bfloat16", master_copy=True),
    "item": jc.Table(40, 3),
    "word": jc.Table(40, 3, dtype="float16", frozen=True),
    "all": jc.Table(2**63 - 1, 3),
    "town": jc.Table(10**12, 5, dtype="bfloat16", master_copy=True),
    "page": jc.Table(40, 2, dtype="bfloat16", rounding="stochastic"),
    "tag": jc.Table(40, 3, optimizer=optax.sgd(0.1)),
}
GROUPS = [("user", "item", "all"), ("city", "town"), ("word",), ("page",), ("tag",)]


def state_of(table, number, weights):
    """Optimizer state of one row that gives its number away in each leaf; 7, -1 and 5 in a row never updated."""
    if table in ("word", "tag"):
        return ()
    dim = TABLES[table].dim
    scale = number + 1 if number else 0
    leaves = (
        np.float32(7 + scale),
        np.full(dim, -1 - scale, np.float32),
        np.array([5 + scale, 5 - scale], np.int32),
    )
    return (weights.astype(np.float32), *leaves) if table in ("city", "town") else leaves


def row_of(table, number):
    """A trained row of which every leaf differs from that of other numbers; weights are whole numbers below 256."""
    weights = (number % 200 + np.arange(TABLES[table].dim)).astype(TABLES[table].dtype)
    return jc.Rows(weights, state_of(table, number, weights.astype(np.float32) + np.float32(1 / 3)))


def loaded_row(table, weights):
    """What `load` makes of one row of weights, in float32."""
    return jc.Rows(weights.astype(TABLES[table].dtype), state_of(table, 0, weights))


def initial(store, table, row):
    """The row as it is before training, from the table's initial weights and the optimizer's initial state."""
    group, position = store.locate(table)
    weights = group.group.initial_weights(store.seed, group.group.keys(position, np.array([row])))[0]
    assert weights.dtype == np.float32
    return loaded_row(table, weights)


def stacked(rows):
    states = zip(*(row.state for row in rows), strict=True)
    return jc.Rows(np.stack([row.weights for row in rows]), tuple(map(np.stack, states)))


def assert_same(found, wanted):
    for one, other in zip((found.weights, *found.state), (wanted.weights, *wanted.state), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def keys_of(store, places):
    """Keys of rows of one group, given by table and id."""
    located = [(*store.locate(table), row) for table, row in places]
    return np.array([group.group.keys(position, np.array([row]))[0] for group, position, row in located])


def places_in(group):
    tables = [name for name in group if TABLES[name].rows == 40 or name == "user"]
    ends = [(name, end) for name in group for end in (TABLES[name].rows - 1, TABLES[name].rows // 2)]
    place = st.one_of(st.tuples(st.sampled_from(tables), st.integers(0, 39)), st.sampled_from(ends))
    return st.tuples(st.just(group), st.lists(place, unique=True, min_size=1, max_size=30))


SMALL = [name for name, table in TABLES.items() if table.rows == 40]
REQUESTS = st.one_of(
    st.tuples(st.just("read"), st.sampled_from(GROUPS).flatmap(places_in)),
    st.tuples(st.just("write"), st.sampled_from(GROUPS).flatmap(places_in)),
    st.tuples(st.just("load"), st.sampled_from(SMALL)),
)


@pytest.fixture(scope="module")
def optimizers():
    """The optimizers of `TABLES`, which take longer to build than the rest of a store."""
    return [group.optimizer for group in jc.HostStore(TABLES, optimizer=some_optimizer()).groups]


def fresh_store(optimizers, seed=0):
    with pytest.MonkeyPatch.context() as patch:
        built = iter(optimizers)
        patch.setattr(jaxcache.store, "RowOptimizer", lambda *arguments: next(built))
        return jc.HostStore(TABLES, optimizer=some_optimizer(), seed=seed)


@settings(max_examples=40)
@given(requests=st.lists(REQUESTS, max_size=14))
def test_read_write_and_load_are_those_of_a_dict(optimizers, tmp_path_factory, requests):
    store, expected, numbers = fresh_store(optimizers, seed=4), {}, itertools.count(1)

    def value(table, row):
        return expected[table, row] if (table, row) in expected else initial(store, table, row)

    for request, what in requests:
        if request == "load":
            weights = np.float32(next(numbers) / 3) + np.arange(40 * TABLES[what].dim, dtype=np.float32).reshape(40, -1)
            store.load(what, weights)
            expected.update({(what, row): loaded_row(what, weights[row]) for row in range(40)})
        else:
            names, places = what
            group, keys = store.locate(names[0])[0], keys_of(store, places)
            if request == "write":
                rows = [row_of(table, next(numbers)) for table, _ in places]
                expected.update(zip(places, rows, strict=True))
                group.write(keys, stacked(rows))
            else:
                places, keys = places + places[:2], np.concatenate([keys, keys[:2]])  # a read may repeat rows
                assert_same(group.read(keys), stacked([value(*place) for place in places]))
        assert store.rows_written == len(expected)
        for group, names in zip(store.groups, GROUPS, strict=True):
            assert group.rows_written == sum(table in names for table, _ in expected)
    for table, row in expected:
        found = jc.Rows(store.rows(table, [row])[0], tuple(leaf[0] for leaf in store.row_state(table, [row])))
        assert_same(found, expected[table, row])
    path = tmp_path_factory.getbasetemp() / "saved.npy"
    for table in SMALL:
        store.save(table, path)
        kept, wanted = np.load(path), np.stack([value(table, row).weights for row in range(40)])
        assert kept.dtype == (np.float16 if table == "word" else np.float32)
        np.testing.assert_array_equal(kept, wanted.astype(kept.dtype))


# Groups


def test_tables_that_are_alike_share_a_group_and_an_optimizer(optimizers):
    store = fresh_store(optimizers)
    assert [group.group.names for group in store.groups] == GROUPS
    assert [group.group.dtype for group in store.groups] == [np.float32, BFLOAT16, np.float16, BFLOAT16, np.float32]
    for group, names in zip(store.groups, GROUPS, strict=True):
        for position, name in enumerate(names):
            assert store.locate(name) == (group, position)
            dtype = TABLES[name].dtype
            assert store.rows(name, [39, 3]).dtype == dtype and store.rows(name, []).shape == (0, TABLES[name].dim)
    assert store.tables == TABLES and list(store.tables) == list(TABLES)
    float32s, city, word, page, tag = (group.row_bytes for group in store.groups)
    assert (float32s, tag) == (3 * 4 + 4 + 3 * 4 + 8, 3 * 4)
    assert (city, word, page) == (5 * 2 + 5 * 4 + 4 + 5 * 4 + 8, 3 * 2, 2 * 2 + 4 + 2 * 4 + 8)
    assert store.table_bytes == sum(group.row_bytes * group.group.rows for group in store.groups)
    assert store.nbytes == sum(group.nbytes for group in store.groups)


def test_the_optimizer_of_the_store_is_that_of_tables_without_one():
    adam, momentum = optax.adam(0.1), optax.sgd(0.1, momentum=0.9)
    tables = {
        "a": jc.Table(10, 3),
        "b": jc.Table(10, 3, optimizer=momentum),
        "c": jc.Table(10, 3, optimizer=adam),
        "d": jc.Table(10, 3, frozen=True),
    }
    store = jc.HostStore(tables, adam)
    assert [group.group.names for group in store.groups] == [("a", "c"), ("b",), ("d",)]
    assert [len(store.row_state(name, [0])) for name in tables] == [2, 1, 2, 0]
    assert store.groups[0].optimizer == jc.RowOptimizer(adam, 3)
    assert [len(group.scalars) for group in store.groups] == [1, 0, 0]
    assert store.tables == tables  # as given: no optimizer was put into them
    # Without one for the store, every table needs its own.
    alone = jc.HostStore({"b": tables["b"], "d": tables["d"]})
    assert [group.group.names for group in alone.groups] == [("b",), ("d",)]
    with pytest.raises(ValueError, match=r"table 'a' has no optimizer: give one .*HostStore\(.*Table\(.*frozen=True\)"):
        jc.HostStore({"d": tables["d"], "b": tables["b"], "a": tables["a"]})


def test_what_is_no_table_is_refused_before_anything_else():
    with pytest.raises(ValueError, match="at least one table"):
        jc.HostStore({}, optax.sgd(0.1))
    with pytest.raises(TypeError, match="got 'a': int"):
        jc.HostStore({"a": 10})


@pytest.mark.parametrize(
    ("wrong", "error"), [(0.1, TypeError), (optax.clip_by_global_norm(1.0), ValueError)], ids=["number", "mixing"]
)
def test_the_tables_of_an_optimizer_that_is_refused_are_named(wrong, error):
    tables = {"a": jc.Table(9, 3, frozen=True), "b": jc.Table(9, 2, optimizer=wrong), "c": jc.Table(9, 2)}
    with pytest.raises(error) as raised:
        jc.HostStore(tables | {"d": tables["b"]}, optax.sgd(0.1))
    assert raised.value.__notes__ == ["This is the optimizer of 'b', 'd'."]


def test_the_optimizer_of_a_group_knows_its_format(monkeypatch):
    """What RowOptimizer is built with, which test_optimizers.py tests."""
    calls = []

    def recorded(transformation, dim, dtype, rounding, master_copy):
        calls.append((transformation, dim, dtype, rounding, master_copy))
        return jc.RowOptimizer(optax.sgd(0.1), dim)

    monkeypatch.setattr(jaxcache.store, "RowOptimizer", recorded)
    default = optax.adam(0.1)
    jc.HostStore(TABLES, default)
    own = TABLES["tag"].optimizer
    assert calls == [
        (default, 3, np.float32, "nearest", False),
        (default, 5, BFLOAT16, "nearest", True),
        (None, 3, np.float16, "nearest", False),
        (default, 2, BFLOAT16, "stochastic", False),
        (own, 3, np.float32, "nearest", False),
    ]


def test_rows_of_another_shape_are_not_written(optimizers):
    """They would be read past their end."""
    store = fresh_store(optimizers)
    city = store.locate("city")[0]
    keys, row = keys_of(store, [("city", 3), ("city", 4)]), stacked([row_of("city", 1)] * 2)
    for wrong in (row.weights[:1], row.weights[:, :-1]):
        with pytest.raises(ValueError, match=r"write of 2 rows of city, town got an array of shape .* must be \(2, "):
            city.write(keys, jc.Rows(wrong, row.state))
    assert store.rows_written == 0


@pytest.mark.parametrize("shape", [(1, 2), (3, 2), (2, 1)])
def test_a_source_with_slices_of_another_shape_than_it_says_is_refused(shape):
    class Source:
        shape, dtype = (2, 2), np.dtype(np.float32)

        def __getitem__(self, rows):
            return np.ones(found, np.float32)

    found = shape
    store = jc.HostStore({"user": jc.Table(2, 2)}, optimizer=optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"cannot be loaded.*its rows 0 to 1 have shape"):
        store.load("user", Source())
    assert store.rows_written == 0


def test_rows_of_another_dtype_are_not_written(optimizers):
    """Their bits would be taken for those of the table's dtype."""
    store = fresh_store(optimizers)
    city = store.locate("city")[0]
    keys, row = keys_of(store, [("city", 3)]), stacked([row_of("city", 1)])
    with pytest.raises(TypeError, match="rows of city, town are kept as bfloat16, got float16"):
        city.write(keys, jc.Rows(row.weights.astype(np.float16), row.state))
    with pytest.raises(TypeError, match="are kept as int32, got float32"):
        city.write(keys, jc.Rows(row.weights, (*row.state[:-1], row.state[-1].astype(np.float32))))
    assert store.rows_written == 0


def test_a_read_into_a_larger_size_starts_with_the_rows_and_writing_takes_the_first_rows(optimizers):
    store = fresh_store(optimizers)
    group, keys = store.groups[0], keys_of(store, [("item", 3), ("item", 5)])
    group.write(keys, stacked([row_of("item", number) for number in (1, 2, 3)]))
    assert store.rows_written == 2
    found = group.read(keys[::-1], 7)
    assert found.weights.shape == (7, 3) and [leaf.shape for leaf in found.state] == [(7,), (7, 3), (7, 2)]
    np.testing.assert_array_equal(found.weights[:2], stacked([row_of("item", 2), row_of("item", 1)]).weights)
    assert found.state[0][:2].tolist() == [10.0, 9.0]


def test_untouched_rows_are_not_materialised():
    store = jc.HostStore({"huge": jc.Table(10**12, 64)}, optimizer=optax.adam(0.1))
    group, start = store.groups[0], store.nbytes
    assert group.row_bytes == 3 * 64 * 4 and store.table_bytes == 10**12 * group.row_bytes and start < 100_000
    random, written = np.random.default_rng(0), 0
    for _ in range(20):
        keys = np.unique(random.integers(0, 10**12, 1000))
        rows = group.read(keys)
        assert store.rows_written == written and store.nbytes <= max(start, 2.1 * written * group.row_bytes + 2**20)
        group.write(keys, rows)
        written += len(keys)
        assert store.rows_written == written  # rows drawn twice are beyond all likelihood
    # The rows, room to double them, and an index of at most 64 bytes a row.
    assert written * group.row_bytes <= store.nbytes <= written * (2 * group.row_bytes + 64)


def test_growth_keeps_every_value():
    store = jc.HostStore({"t": jc.Table(10**6, 2)}, optimizer=optax.sgd(0.1, momentum=0.9))
    ids = np.random.default_rng(0).permutation(10**6)[:5000]
    sizes = []
    for part in np.array_split(ids, 50):
        values = np.stack([part, -part], axis=1).astype(np.float32)
        store.groups[0].write(part, jc.Rows(values, (values / 2,)))
        sizes.append(store.nbytes)
    assert 3 < len(set(sizes)) <= 8  # it did grow, and each time by as much as there was
    np.testing.assert_array_equal(store.rows("t", ids), np.stack([ids, -ids], axis=1).astype(np.float32))
    np.testing.assert_array_equal(store.row_state("t", ids)[0][:, 0], ids.astype(np.float32) / 2)


def test_rows_are_new_arrays():
    store = jc.HostStore({"t": jc.Table(10, 2)}, optimizer=optax.sgd(0.1))
    values = np.ones((1, 2), np.float32)
    store.groups[0].write(np.array([4]), jc.Rows(values, ()))
    values[:] = 2
    store.rows("t", [4])[:] = 3
    np.testing.assert_array_equal(store.rows("t", [4]), np.ones((1, 2)))


def test_equal_stores_hold_equal_rows_and_the_seed_matters(optimizers):
    first, second, other = (fresh_store(optimizers, seed) for seed in (1, 1, 2))
    ids = np.arange(40)
    for name in TABLES:
        np.testing.assert_array_equal(first.rows(name, ids), second.rows(name, ids))
        assert (first.rows(name, ids) != other.rows(name, ids)).any(axis=1).all()
    for one, another in zip(first.groups, other.groups, strict=True):
        assert one.streams.shape == (len(one.group.names),) and (one.streams != another.streams).all()


def test_rows_and_row_state_of_a_store_that_is_behind_are_errors_that_name_flush(optimizers):
    store = fresh_store(optimizers)
    assert not store.behind and store.step == 0
    store.mark_behind()
    for read in (store.rows, store.row_state):
        with pytest.raises(RuntimeError, match=r"newest rows are still in the cache.*cache = ahead\.flush\(cache\)"):
            read("item", [1])
    store.catch_up(tuple((number,) for number in range(5)), 5)
    assert not store.behind and store.step == 5 and store.rows("item", [1]).shape == (1, 3)
    assert [group.scalars for group in store.groups] == [(0,), (1,), (2,), (3,), (4,)]
    with pytest.raises(ValueError):
        store.catch_up(((0,),), 6)


def test_one_pipeline_at_a_time(optimizers):
    store, first, second = fresh_store(optimizers), object(), object()
    store.open(first)
    with pytest.raises(RuntimeError, match="already serves an open LookAhead"):
        store.open(second)
    store.close(second)  # of no effect: it never had the store
    with pytest.raises(RuntimeError, match="already serves an open LookAhead"):
        store.open(second)
    store.close(first)
    store.open(second)


def test_errors_of_rows_name_table_and_id(optimizers):
    store = fresh_store(optimizers)
    for call in (store.rows, store.row_state, store.load, store.save):
        with pytest.raises(KeyError, match="no table named 'itm': the store has user, city, item, word, all"):
            call("itm", [1])
    with pytest.raises(ValueError, match="feature 'item' has id 40 at lookup 1; ids must lie in 0 to 39"):
        store.rows("item", [39, 40])
    with pytest.raises(TypeError, match="feature 'item' are float64"):
        store.row_state("item", [1.5])


def test_the_repr_tells_the_tables_and_what_was_written(optimizers):
    store = jc.HostStore({"user": jc.Table(1000, 2), "item": jc.Table(9, 2)}, optimizer=optax.sgd(0.1))
    assert repr(store) == "HostStore(user: 1,000 x 2, item: 9 x 2 float32; 0 rows written, step 0)"
    store = fresh_store(optimizers)
    store.load("word", np.zeros((40, 3)))
    descriptions = [
        "user: 1,000,000,000,000 x 3, item: 40 x 3, all: 9,223,372,036,854,775,807 x 3 float32",
        "city: 40 x 5, town: 1,000,000,000,000 x 5 bfloat16 with a master copy",
        "word: 40 x 3 float16 frozen",
        "page: 40 x 2 bfloat16 rounding stochastic",
        "tag: 40 x 3 float32",
    ]
    assert repr(store) == f"HostStore({'; '.join(descriptions)}; 40 rows written, step 0)"
    assert repr(store.groups[2]) == f"RowStore({descriptions[2]}; 40 rows written)"


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
            store.groups[0].write(keys, jc.Rows(values, (-values,)))

    def read():
        keys = np.arange(writers * share)
        before = np.zeros(len(keys))
        barrier.wait()
        while True:
            last = done.is_set()
            rows = store.groups[0].read(keys)
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
    group = store.groups[0]
    group.write(np.zeros(0, np.int64), group.read(np.zeros(0, np.int64)))
    assert store.rows_written == 0
    assert store.rows("a", []).shape == (0, 3)


def test_a_store_of_which_every_row_is_kept_never_grows_again():
    """Victims come home to rows that are there: to make room for them would copy the whole table."""
    store = jc.HostStore({"a": jc.Table(3000, 3)}, optimizer=optax.sgd(0.1))
    group, keys = store.groups[0], np.arange(3000)
    group.write(keys[:2000], group.read(keys[:2000]))
    group.write(keys, group.read(keys))
    assert group.rows_written == 3000 and group.nbytes == 3000 * group.row_bytes + 8192 * 16
    before = group._rows.weights
    group.write(keys[1000:], group.read(keys[1000:]))
    assert group._rows.weights is before


# Load and save


def some_weights(rows=40, dim=3, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, dim)).astype(dtype)


def as_given(weights, how, folder):
    """The same weights as another kind of source."""
    path = folder / "weights.npy"
    if how in ("array", "list", "jax"):
        return {"array": np.asarray, "list": lambda array: array.tolist(), "jax": jnp.asarray}[how](weights)
    if how == "fortran":
        np.save(path, np.asfortranarray(weights))
    elif how == "big-endian":
        np.save(path, weights.astype(weights.dtype.newbyteorder(">")))
    else:
        np.save(path, weights)
    return str(path) if how == "str" else path


SOURCES = [
    *itertools.product(["array", "path"], ["float64", "float32", "float16", "bfloat16"]),
    *itertools.product(["jax"], ["float32", "float16", "bfloat16"]),
    *itertools.product(["list", "str", "fortran", "big-endian"], ["float64", "float32"]),
]


@pytest.mark.parametrize(("how", "dtype"), SOURCES)
def test_load_takes_every_kind_of_source(optimizers, tmp_path, how, dtype):
    """To be precise: the weights become those of the source, rounded once to float32 and once to the table's dtype."""
    for name in SMALL:
        if (how, dtype) == ("path", "bfloat16") and TABLES[name].dtype != BFLOAT16:
            continue  # the file has lost its dtype: see the test of errors
        store = fresh_store(optimizers)
        group, position = store.locate(name)
        everyone = group.group.keys(position, np.arange(40))
        group.write(everyone[3:9], stacked([row_of(name, number) for number in range(1, 7)]))
        weights = some_weights(dim=TABLES[name].dim, dtype=dtype)
        store.load(name, as_given(weights, how, tmp_path))
        wanted = stacked([loaded_row(name, row) for row in weights.astype(np.float32)])
        assert_same(group.read(everyone), wanted)
        assert store.loaded and group.rows_written == store.rows_written == 40


def test_load_leaves_other_tables_as_they_are(optimizers):
    store = fresh_store(optimizers)
    group, keys = store.groups[0], keys_of(store, [("user", 39), ("all", 0), ("user", 10**12 - 1), ("item", 0)])
    group.write(keys, stacked([row_of("user", number) for number in (1, 2, 3, 4)]))
    before = [store.rows(name, np.arange(40)) for name in TABLES]
    store.load("item", some_weights())
    for name, rows in zip(TABLES, before, strict=True):
        assert (store.rows(name, np.arange(40)) == rows).all() == (name != "item")
    assert_same(group.read(keys[:3]), stacked([row_of("user", number) for number in (1, 2, 3)]))


def test_infinities_and_nan_can_be_loaded():
    weights = np.array([[np.inf, -np.inf, np.nan, 65504.0]])
    for dtype in ("float16", "bfloat16", "float32"):
        store = jc.HostStore({"t": jc.Table(1, 4, dtype=dtype)}, optax.sgd(0.1))
        store.load("t", weights)
        # As float64: NumPy takes NaN of bfloat16 for unequal.
        wanted = weights.astype(np.float32).astype(dtype).astype(np.float64)
        np.testing.assert_array_equal(store.rows("t", [0]).astype(np.float64), wanted)


def wrong_files(folder):
    """Files that are no `.npy` file of an array, and what is said of them."""
    np.save(folder / "whole.npy", some_weights())
    whole = (folder / "whole.npy").read_bytes()
    np.savez(folder / "several.npz", some_weights())
    for name, content in {
        "truncated": whole[:-1],
        "header": whole[:40],
        "empty": b"",
        "text": b"1.0 2.0 3.0",
        "several": (folder / "several.npz").read_bytes(),
        "huge": whole.replace(b"(40, 3), ", b"(%d, 3)" % 10**30, 1),
    }.items():
        (folder / name).write_bytes(content)
        yield ValueError, rf"the file /.*{name}: it is no whole \.npy file", folder / name
    np.save(folder / "objects.npy", np.array([[1.0, None]], object))
    yield ValueError, "objects.npy: it is no whole .*Python objects", folder / "objects.npy"
    missing = folder / "missing.npy"
    yield FileNotFoundError, rf"'item' cannot be loaded from the file {missing}: no such file", missing
    np.save(folder / "bfloat16.npy", some_weights(dtype=BFLOAT16))
    yield TypeError, r"2 bytes a weight that say no dtype.*array\.view\(ml_dtypes\.bfloat16\)", folder / "bfloat16.npy"
    np.save(folder / "short.npy", some_weights(39))
    yield ValueError, r"short\.npy of shape \(39, 3\): its rows and dim are \(40, 3\)", str(folder / "short.npy")


def wrong_arrays():
    for shape in [(40, 2), (39, 3), (3, 40), (120,), (40, 3, 1), ()]:
        message = f"table 'item' cannot be loaded from an array of shape {shape}: its rows and dim are (40, 3)"
        yield ValueError, re.escape(message), np.zeros(shape)
    for dtype in ("int64", "uint8", "bool", "complex64", "S3", "longdouble"):
        array = np.zeros((40, 3), dtype)
        yield TypeError, rf"an array of {re.escape(str(array.dtype))}: weights must be float32", array
    yield TypeError, "an array of float8_e4m3fn: weights must be", np.zeros((40, 3), ml_dtypes.float8_e4m3fn)
    yield TypeError, "a list of int64", [[1, 2, 3]] * 40
    yield ValueError, "a list that is no array: .*inhomogeneous", [[1.0], [1.0, 2.0]]
    yield TypeError, "a NoneType of object", None
    yield TypeError, "2 bytes a weight that say no dtype", some_weights(dtype=BFLOAT16).view("V2")
    yield TypeError, r"\[\('x', '<f4'\)\]", np.zeros((40, 3), [("x", np.float32)])
    wide = some_weights(dtype=np.float64)
    wide[31, 2], wide[35, 1] = -3.5e38, 1e300
    yield ValueError, r"an array: row 31 has -3.5e\+38 in column 2, but the largest float32 is 3.4028e\+38", wide


def test_what_cannot_be_loaded_is_an_error_that_changes_nothing(optimizers, tmp_path):
    store = fresh_store(optimizers)
    group, keys = store.groups[0], keys_of(store, [("item", row) for row in range(40)])
    group.write(keys[::3], stacked([row_of("item", number) for number in range(1, 15)]))
    before, nbytes = group.read(keys), store.nbytes
    for error, message, source in [*wrong_arrays(), *wrong_files(tmp_path)]:
        with pytest.raises(error, match=message):
            store.load("item", source)
        assert_same(group.read(keys), before)
        assert (store.rows_written, store.nbytes, store.loaded) == (14, nbytes, False)


@pytest.mark.parametrize(
    ("dtype", "fits", "too_large"),
    [
        ("float16", 65519.0, 65520.0),
        ("bfloat16", 3.3961e38, 3.3962e38),
        # In float64: just below and above half way between the largest float32 and two to the 128.
        ("float32", 3.4028235677973362e38, 3.4028235677973366e38),
    ],
)
def test_weights_that_would_become_infinite_are_found_where_they_are(dtype, fits, too_large):
    table = jc.Table(40, 3, dtype=dtype)
    store = jc.HostStore({"t": table, "frozen": jc.Table(40, 3, dtype=dtype, frozen=True)}, optax.sgd(0.1))
    weights = np.zeros((40, 3), np.float64 if dtype == "float32" else np.float32)
    weights[39, 0] = fits
    for name in ("t", "frozen"):
        store.load(name, weights)
        assert np.isfinite(store.rows(name, [39]).astype(np.float64)).all() and store.rows(name, [39])[0, 0] > 0
        for row, sign in ((0, 1), (39, -1)):
            wrong = weights.copy()
            wrong[row, 1] = sign * too_large
            message = rf"table '{name}'.*row {row} has .* in column 1, but the largest {dtype}"
            with pytest.raises(ValueError, match=message):
                store.load(name, wrong)


def test_load_and_save_are_refused_while_a_cache_may_be_newer(optimizers, tmp_path):
    store, pipeline = fresh_store(optimizers), object()
    store.open(pipeline)
    store.save("item", tmp_path / "item.npy")  # nothing is newer yet
    with pytest.raises(RuntimeError, match=r"load\('item'\): the store serves an open LookAhead.*`with` block"):
        store.load("item", some_weights())
    store.mark_behind()
    store.close(pipeline)
    for call, argument, done in (
        (store.load, some_weights(), "loaded"),
        (store.save, tmp_path / "no such folder" / "new.npy", "saved"),  # refused before anything is done
    ):
        with pytest.raises(RuntimeError, match=rf"cache = ahead\.flush\(cache\)`.* before the store is {done}"):
            call("item", argument)
    assert not store.loaded and store.rows_written == 0 and os.listdir(tmp_path) == ["item.npy"]
    store.catch_up(tuple(group.scalars for group in store.groups), 1)
    store.load("item", some_weights())
    assert store.loaded


def test_no_pipeline_opens_a_store_that_is_being_loaded(optimizers):
    store, opened = fresh_store(optimizers), threading.Event()
    waiting = threading.Thread(target=lambda: (store.open(object()), opened.set()))

    class Source:
        shape, dtype, seen = (40, 3), np.dtype(np.float32), False

        def __getitem__(self, rows):
            if not waiting.is_alive():
                waiting.start()
            self.seen |= opened.wait(0.02)
            return np.ones((40, 3), np.float32)[rows]

    source = Source()
    store.load("item", source)
    waiting.join()
    assert not source.seen and opened.is_set()


@pytest.mark.parametrize("how", ["path", "jax", "array"])
def test_loading_takes_no_memory_beyond_the_rows_and_makes_room_once(monkeypatch, tmp_path, how):
    monkeypatch.setattr(jaxcache.store, "_CHUNK", 2**14)
    tables = {"t": jc.Table(100_000, 16, dtype="bfloat16", master_copy=True)}
    store = jc.HostStore(tables, jc.rowwise_adagrad(0.1))
    weights = some_weights(100_000, 16, np.float32 if how == "jax" else np.float64)
    source = as_given(weights, how, tmp_path)
    if how == "jax":
        np.asarray(source[:1024])  # the first slice is compiled, which takes memory of its own
    tracemalloc.start()
    try:
        store.load("t", source)
        _, first = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        held, _ = tracemalloc.get_traced_memory()
        store.load("t", source)
        _, second = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Rows of 32 + 64 + 4 bytes: 10 MB. The index, four times as many cells as rows at most: 4 MiB, and 2 ** 17 while
    # it is built. A chunk in several dtypes: well below 1 MB. The source: 6.4 or 12.8 MB.
    assert store.nbytes == 100_000 * 100 + 2**18 * 16
    assert first < store.nbytes + 1e6, (first, store.nbytes)
    assert second - held < 1e6
    np.testing.assert_array_equal(store.row_state("t", [0, 99_999])[0], weights[[0, -1]].astype(np.float32))


@pytest.mark.parametrize("name", SMALL)
def test_what_was_saved_loads_to_the_same_bits(optimizers, tmp_path, name):
    first, second = fresh_store(optimizers, seed=1), fresh_store(optimizers, seed=2)
    group, position = first.locate(name)
    keys = group.group.keys(position, np.arange(40))
    group.write(keys[10:30], stacked([row_of(name, number) for number in range(1, 21)]))  # the others are initial
    path = tmp_path / "no suffix"
    first.save(name, str(path))
    assert first.rows_written == 20 and os.listdir(tmp_path) == ["no suffix"]
    second.load(name, path)
    words = np.uint16 if TABLES[name].dtype.itemsize == 2 else np.uint32
    ids = np.arange(40)
    np.testing.assert_array_equal(second.rows(name, ids).view(words), first.rows(name, ids).view(words))
    saved = np.load(path, mmap_mode="r")
    assert saved.shape == (40, TABLES[name].dim) and saved.flags.c_contiguous
    assert path.stat().st_size == saved.offset + saved.nbytes


def test_saving_takes_integers_of_numpy_and_little_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(jaxcache.store, "_CHUNK", 2**14)
    store = jc.HostStore({"t": jc.Table(np.int64(100_000), np.int32(16))}, optax.adam(0.1))
    tracemalloc.start()
    try:
        store.save("t", tmp_path / "t.npy")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2e6  # the file has 6.4 MB
    ids = np.array([0, 1023, 1024, 99_999])
    np.testing.assert_array_equal(np.load(tmp_path / "t.npy")[ids], store.rows("t", ids))
    assert store.rows_written == 0


def test_a_save_that_fails_leaves_the_file_as_it_was(optimizers, monkeypatch, tmp_path):
    store, path = fresh_store(optimizers), tmp_path / "item.npy"
    store.save("item", path)
    before, read = path.read_bytes(), RowStore.read
    store.load("item", some_weights())

    def fails_later(self, keys):
        assert (tmp_path / "item.npy.part").exists()
        if keys[-1] % 40 == 39:
            raise KeyboardInterrupt
        return read(self, keys)

    def trains_meanwhile(self, keys):
        store.mark_behind()
        return read(self, keys)

    for error, meanwhile in ((KeyboardInterrupt, fails_later), (RuntimeError, trains_meanwhile)):
        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(RowStore, "read", meanwhile)
            store.save("item", path)
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["item.npy"]
    store.catch_up(tuple(group.scalars for group in store.groups), 1)
    full = r"'item' takes 480 bytes, 479 are free.*item\.npy"
    with monkeypatch.context() as patch, pytest.raises(OSError, match=full):
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 521, 479))
        store.save("item", path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["item.npy"]
    store.save("item", path)
    np.testing.assert_array_equal(np.load(path), some_weights())


# Locks


def test_a_read_or_write_waits_for_the_one_under_way_in_its_group_and_for_no_other(optimizers):
    store = fresh_store(optimizers)
    item, city = store.groups[0], store.groups[1]
    keys, rows = keys_of(store, [("item", 3)]), stacked([row_of("item", 1)])
    for access in (lambda: item.read(keys), lambda: item.write(keys, rows)):
        access()  # what there is to compile is compiled
        thread = threading.Thread(target=access)
        with item.lock:
            thread.start()
            other = threading.Thread(target=city.read, args=(keys_of(store, [("city", 3)]),))
            other.start()
            other.join(30)
            thread.join(0.1)
            assert thread.is_alive() and not other.is_alive()
        thread.join()
    assert_same(item.read(keys), rows)
