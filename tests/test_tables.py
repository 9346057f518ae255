"""Tables and groups: initial weights are pure functions of a row's place, keys round-trip, errors are clear."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcache as jc
from jaxcache.tables import MAX_ROWS, check_ids, stackable

INITIALIZERS = {"uniform": jc.uniform(), "uniform(0.5)": jc.uniform(0.5), "normal": jc.normal(0.1, mean=2.0)}
initializers = pytest.mark.parametrize("initializer", INITIALIZERS.values(), ids=INITIALIZERS)


def weights_of(tables, name, ids, seed=0):
    group = jc.Group.stack(tables)
    return group.initial_weights(seed, group.keys(group.index(name), np.asarray(ids, np.int64)))


# Initial weights


@initializers
@given(ids=st.lists(st.integers(0, MAX_ROWS - 1), min_size=1, max_size=40), dim=st.sampled_from([1, 3, 8]))
def test_initial_weights_do_not_depend_on_the_rows_asked_for_together(initializer, ids, dim):
    table = jc.Table(MAX_ROWS, dim, initializer)
    together = weights_of({"user": table}, "user", ids)
    assert together.dtype == np.float32 and together.shape == (len(ids), dim)
    for row, weights in zip(ids, together, strict=True):
        np.testing.assert_array_equal(weights, weights_of({"user": table}, "user", [row])[0])


@initializers
def test_initial_weights_do_not_depend_on_the_other_tables(initializer):
    user, item = jc.Table(50, 4, initializer), jc.Table(70, 4, initializer)
    ids = np.arange(50)
    alone = weights_of({"user": user}, "user", ids, seed=5)
    for tables in ({"user": user, "item": item}, {"item": item, "user": user}):
        np.testing.assert_array_equal(weights_of(tables, "user", ids, seed=5), alone)
        # Rows of several tables read together, in turns.
        group = jc.Group.stack(tables)
        keys = np.stack([group.keys(group.index(name), ids) for name in ("item", "user")], axis=1).reshape(-1)
        np.testing.assert_array_equal(group.initial_weights(5, keys)[1::2], alone)


@initializers
def test_initial_weights_differ_by_seed_table_and_row(initializer):
    table = jc.Table(1000, 8, initializer)
    # crc32("plumless") == crc32("buckeroo"): a weak hash of the name would give two tables the same rows.
    names = ["user", "item", "plumless", "buckeroo"]
    found = [
        weights_of(dict.fromkeys(names, table), name, np.arange(1000), seed)
        for name in names
        for seed in (0, 1, -1, 2**32, 2**64 - 2)
    ]
    rows = np.concatenate(found)
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_a_seed_counts_modulo_two_to_the_64():
    table = {"user": jc.Table(10, 2)}
    np.testing.assert_array_equal(
        weights_of(table, "user", np.arange(10), seed=-1), weights_of(table, "user", np.arange(10), seed=2**64 - 1)
    )


@pytest.mark.parametrize("first", [0, 2**62])
def test_initial_weights_have_the_distribution_that_was_asked_for(first):
    count, dim = 20_000, 4
    ids = first + np.arange(count)

    def check(initializer, mean, deviation, low, high):
        weights = weights_of({"t": jc.Table(MAX_ROWS, dim, initializer)}, "t", ids).astype(np.float64)
        # Standard errors of mean and deviation are below deviation / sqrt(80,000).
        assert abs(weights.mean() - mean) < 5 * deviation / np.sqrt(weights.size)
        assert abs(weights.std() / deviation - 1) < 0.02
        assert low <= weights.min() and weights.max() <= high
        correlations = np.corrcoef(np.concatenate([weights[1:].T, weights[:-1].T]))
        assert np.abs(correlations - np.eye(2 * dim)).max() < 0.04
        return (weights - mean) / deviation

    check(jc.uniform(0.5), 0.0, 0.5 / np.sqrt(3), -0.5, 0.5)
    for initializer in (jc.normal(2.0), jc.normal(0.3, mean=-1.0)):
        mean, deviation = initializer.mean, initializer.standard_deviation
        normal = check(initializer, mean, deviation, mean - 10 * deviation, mean + 10 * deviation)
        # Shares of a normal distribution within one and two deviations, and on either side.
        assert abs(np.mean(np.abs(normal) < 1) - 0.6827) < 0.01
        assert abs(np.mean(np.abs(normal) < 2) - 0.9545) < 0.005
        assert abs(np.mean(normal < 0) - 0.5) < 0.01


def test_uniform_without_a_scale_takes_one_over_the_square_root_of_the_rows():
    weights = weights_of({"t": jc.Table(10_000, 8)}, "t", np.arange(10_000))
    assert 0.0099 < np.abs(weights).max() <= 0.01


def test_initializers_and_tables_compare_by_value():
    assert jc.uniform(0.5) == jc.uniform(0.5) != jc.uniform(0.6) and jc.normal(1.0) != jc.normal(1.0, 1.0)
    tables = {"user": jc.Table(10, 4), "item": jc.Table(5, 4, jc.normal())}
    group, again = jc.Group.stack(tables), jc.Group.stack(dict(tables))
    assert group.bases is not None  # computed and kept: it must not take part in the comparison
    assert group == again and hash(group) == hash(again)
    assert group != jc.Group.stack(dict(reversed(tables.items())))
    assert group != jc.Group.stack({**tables, "user": jc.Table(11, 4)})


# Errors of tables and groups


@pytest.mark.parametrize("rows", [0, -1, 2**63, 1.5, 10.0, True, "10", None])
def test_a_table_refuses_rows_out_of_range(rows):
    with pytest.raises(ValueError, match=r"Table\(rows=.*rows must be an integer from 1 to 9,223,372,036,854,775,807"):
        jc.Table(rows, 4)


@pytest.mark.parametrize("dim", [0, -4, 2**31, 4.0, False])
def test_a_table_refuses_a_dim_out_of_range(dim):
    with pytest.raises(ValueError, match=r"Table\(dim=.*dim must be an integer from 1 to 2,147,483,647"):
        jc.Table(10, dim)


def test_a_table_takes_integers_of_numpy_and_the_largest_sizes():
    assert jc.Table(np.int64(10), np.int32(4)) == jc.Table(10, 4)
    assert jc.Table(MAX_ROWS, 2**31 - 1).rows == 2**63 - 1


def test_a_group_refuses_what_cannot_be_stacked():
    with pytest.raises(ValueError, match="at least one table"):
        jc.Group.stack({})
    user = jc.Table(10, 4)
    for item, differs in (
        (jc.Table(10, 8), "dim"),
        (jc.Table(10, 4, dtype="bfloat16"), "dtype"),
        (jc.Table(10, 4, dtype="float16", rounding="stochastic"), "dtype, rounding"),
        (jc.Table(10, 8, dtype="float16", master_copy=True), "dim, dtype, master_copy"),
        (jc.Table(10, 4, frozen=True), "frozen"),
        (jc.Table(10, 4, optimizer=optax.sgd(0.1)), "optimizer"),
    ):
        message = f"tables 'user' and 'item' cannot be stacked, they differ in {differs}: stackable"
        with pytest.raises(ValueError, match=message):
            jc.Group.stack({"user": user, "friend": user, "item": item})
    with pytest.raises(TypeError, match="got 'user': int"):
        jc.Group.stack({"user": 10})
    with pytest.raises(TypeError, match="got 3: Table"):
        jc.Group.stack({3: jc.Table(10, 4)})
    two = {"a": jc.Table(MAX_ROWS, 4), "b": jc.Table(MAX_ROWS, 4)}
    assert jc.Group.stack({**two, "c": jc.Table(1, 4)}).rows == 2**64 - 1
    with pytest.raises(ValueError, match=r"2\*\*64 rows or more"):
        jc.Group.stack({**two, "c": jc.Table(2, 4)})


SHARED = optax.sgd(0.1)
FORMATS = [
    {},
    {"dim": 8},
    {"dtype": np.float16},
    {"dtype": "bfloat16"},
    {"dtype": "bfloat16", "rounding": "stochastic"},
    {"dtype": "bfloat16", "master_copy": True},
    {"frozen": True},
    {"frozen": True, "dtype": "bfloat16"},
    {"optimizer": SHARED},
    {"optimizer": optax.sgd(0.1)},  # equal, but another object
]


@given(st.lists(st.sampled_from(range(len(FORMATS))), min_size=1, max_size=20), st.data())
def test_stackable_parts_tables_by_format_and_keeps_their_order(formats, data):
    tables, expected = {}, {}
    for place, number in enumerate(formats):
        # What does not keep tables apart: rows, initialiser, what becomes of ids that are out of range.
        rows, initializer = data.draw(st.integers(1, 100)), data.draw(st.sampled_from(list(INITIALIZERS.values())))
        out_of_range = data.draw(st.sampled_from(["error", "ignore"]))
        format = {"dim": 4, **FORMATS[number]}
        table = jc.Table(rows, initializer=initializer, out_of_range=out_of_range, **format)
        tables[f"t{place}"] = table
        expected.setdefault(number, {})[f"t{place}"] = table
    parts = stackable(tables)
    assert [list(part.items()) for part in parts] == [list(part.items()) for part in expected.values()]
    for part, number in zip(parts, expected, strict=True):
        group = jc.Group.stack(part)
        assert group.name == next(iter(part)) and group.names == tuple(part)
        assert group.dtype == np.dtype(FORMATS[number].get("dtype", "float32"))
        assert group.frozen == FORMATS[number].get("frozen", False)


def test_groups_of_equal_tables_are_equal_whatever_their_optimizers():
    """Optimizers are compared by value, as RowOptimizer; a group with the object in it would never equal another."""
    one, other = (jc.Group.stack({"t": jc.Table(10, 4, optimizer=optax.adam(0.1))}) for _ in range(2))
    assert one == other and hash(one) == hash(other)
    assert one != jc.Group.stack({"t": jc.Table(10, 4, dtype="float16")})


def test_streams_stand_for_seed_and_name():
    tables = {"user": jc.Table(10, 4), "item": jc.Table(10, 4)}
    group = jc.Group.stack(tables)
    streams = group.streams(3)
    assert streams.dtype == np.uint64 and streams.shape == (2,)
    found = {
        *streams.tolist(),
        *group.streams(4).tolist(),
        *jc.Group.stack({"word": jc.Table(9, 2)}).streams(3).tolist(),
    }
    assert len(found) == 5
    np.testing.assert_array_equal(jc.Group.stack(dict(reversed(tables.items()))).streams(3), streams[::-1])
    np.testing.assert_array_equal(group.streams(3 - 2**64), streams)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float64"}, r"Table\(dtype='float64'\): dtype must be float32, bfloat16 or float16"),
        ({"dtype": np.int8}, "dtype must be float32, bfloat16 or float16"),
        ({"dtype": "no such"}, r"Table\(dtype='no such'\): dtype must be"),
        ({"dtype": None}, r"Table\(dtype=None\): dtype must be"),
        ({"rounding": "up"}, r"Table\(rounding='up'\): rounding must be 'nearest' or 'stochastic'"),
        ({"rounding": None}, "rounding must be 'nearest' or 'stochastic'"),
        ({"master_copy": 1}, r"Table\(master_copy=1\): master_copy must be False or True"),
        ({"frozen": "yes"}, "frozen must be False or True"),
        ({"out_of_range": "wrap"}, "out_of_range must be 'error' or 'ignore'"),
        ({"rounding": "stochastic"}, "no rounding of float32 weights"),
        ({"dtype": "float16", "rounding": "stochastic", "master_copy": True}, "no rounding beside a master copy"),
        ({"master_copy": True}, "float32 themselves, set dtype to a narrower one"),
        ({"frozen": True, "optimizer": SHARED}, r"Table\(frozen=True\).*never trained has no optimizer"),
        ({"frozen": True, "dtype": "float16", "rounding": "stochastic"}, "never trained.*no stochastic rounding"),
        ({"frozen": True, "dtype": "float16", "master_copy": True}, "never trained.*no master copy"),
    ],
    ids=str,
)
def test_a_table_refuses_what_it_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        jc.Table(10, 4, **arguments)


@pytest.mark.parametrize("given_as", ["bfloat16", ml_dtypes.bfloat16, np.dtype("bfloat16"), jnp.bfloat16])
def test_a_dtype_may_be_given_in_every_way_that_numpy_takes(given_as):
    table = jc.Table(10, 4, dtype=given_as)
    assert table == jc.Table(10, 4, dtype="bfloat16") and isinstance(table.dtype, np.dtype)
    assert jc.Table(10, 4).dtype == np.float32 and isinstance(jc.Table(10, 4).dtype, np.dtype)


def test_an_unknown_table_is_an_error_that_names_the_known_ones():
    with pytest.raises(KeyError, match="no table named 'usr': the store has user, item"):
        jc.Group.stack({"user": jc.Table(10, 4), "item": jc.Table(10, 4)}).index("usr")


# Keys


@st.composite
def groups_and_rows(draw):
    """Sizes of tables, up to 2**64 - 1 in all, and rows as pairs of table and id, mostly at the ends of tables."""
    sizes = draw(st.lists(st.sampled_from([1, 2, 1000, 2**31, 2**32, 2**62, MAX_ROWS]), min_size=1, max_size=6))
    while sum(sizes) >= 2**64:
        sizes.pop()
    if draw(st.booleans()) and len(sizes) > 1 and 1 <= 2**64 - 1 - sum(sizes) <= MAX_ROWS:
        sizes.append(2**64 - 1 - sum(sizes))
    rows = []
    for table in draw(st.lists(st.integers(0, len(sizes) - 1), max_size=30)):
        last = sizes[table] - 1
        ends = st.sampled_from([0, min(1, last), max(last - 1, 0), last])
        rows.append((table, draw(st.one_of(ends, st.integers(0, last)))))
    return sizes, rows


@given(groups_and_rows())
def test_keys_are_places_in_the_stack_and_locate_is_their_inverse(drawn):
    sizes, rows = drawn
    group = jc.Group.stack({f"t{place}": jc.Table(size, 1) for place, size in enumerate(sizes)})
    assert group.rows == sum(sizes)
    keys = [int(group.keys(table, np.array([row], np.int64))[0]) for table, row in rows]
    assert [key % 2**64 for key in keys] == [sum(sizes[:table]) + row for table, row in rows]
    tables, ids = group.locate(np.array(keys, np.int64))
    assert ids.dtype == np.int64
    assert list(zip(tables.tolist(), ids.tolist(), strict=True)) == rows


# Ids

INTEGERS = [np.dtype(code) for code in "bBhHiIqQlL"] + [np.dtype(code) for code in (">i4", ">i8", ">u8")]


@pytest.mark.parametrize("dtype", INTEGERS, ids=lambda dtype: dtype.str)
def test_ids_of_every_integer_dtype_are_taken(dtype):
    ids = np.array([[0, 3], [127, 5]], dtype)
    for array in (ids, ids.T, ids[::-1, ::2], ids[:0]):
        checked = check_ids(array, "user", 128)
        assert checked.dtype == np.int64 and checked.dtype.isnative and checked.flags.c_contiguous
        np.testing.assert_array_equal(checked, array.astype(np.int64))
    with pytest.raises(
        ValueError, match=r"feature 'user' has id 127 at lookup 2; ids must lie in 0 to 126 \(.*rows=127"
    ):
        check_ids(ids, "user", 127)


@pytest.mark.parametrize("dtype", [d for d in INTEGERS if d.kind == "i"], ids=lambda dtype: dtype.str)
def test_negative_ids_are_refused(dtype):
    lowest = int(np.iinfo(dtype).min)
    with pytest.raises(ValueError, match="feature 'item' has id -1 at lookup 1; ids must lie in 0 to 9 "):
        check_ids(np.array([3, -1, lowest], dtype), "item", 10)
    with pytest.raises(ValueError, match=f"has id {lowest} at lookup 0"):
        check_ids(np.array([lowest], dtype), "item", MAX_ROWS)


@pytest.mark.parametrize("wrong", [2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1])
@pytest.mark.parametrize("rows", [1, 2**31, MAX_ROWS])
def test_unsigned_ids_do_not_wrap(wrong, rows):
    with pytest.raises(ValueError, match=f"has id {wrong} at lookup 3; ids must lie in 0 to {rows - 1} "):
        check_ids(np.array([[0, 0], [0, wrong]], np.uint64), "user", rows)


def test_the_largest_id_of_the_largest_table_is_taken():
    for dtype in (np.int64, np.uint64):
        assert check_ids(np.array([2**63 - 2], dtype), "user", MAX_ROWS).tolist() == [2**63 - 2]


@pytest.mark.parametrize("ids", [[1.0], [True], ["1"], np.array([1], np.float16), np.array([1], object), None, [1j]])
def test_ids_that_are_no_integers_are_refused(ids):
    with pytest.raises(TypeError, match=f"feature 'user' are {np.asarray(ids).dtype}; ids must be integers"):
        check_ids(ids, "user", 10)
