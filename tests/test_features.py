"""Features, bags and groups: what lookup gives, what is refused and with which words, and what compiles anew."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcache as jc
import oracle

ROWS = {"item": 12, "user": 12, "word": 9}
FEATURES = {
    "user": jc.Feature("user"),
    "history": jc.Feature("item", "mean"),
    "tags": jc.Feature("word", "sum", padding=0),
    "seen": jc.Feature("item"),
}


def counting(stream, rows, table):
    """Row 5 of a table of dim 2 is [5, 5.5]."""
    return rows[:, None].astype(np.float32) + np.arange(table.dim, dtype=np.float32) / table.dim


def make_tables(**arguments) -> dict[str, jc.Table]:
    """Items and users share a group; words have a dim of their own."""
    dims = {"item": 4, "user": 4, "word": 3}
    return {name: jc.Table(ROWS[name], dim, counting, **arguments) for name, dim in dims.items()}


def make_store(**arguments) -> jc.HostStore:
    return jc.HostStore(make_tables(**arguments), optimizer=optax.adam(0.1))


def make_batch(seed: int = 0, **changes) -> dict:
    """Two samples; `changes` replace single features."""
    random = np.random.default_rng(seed)
    batch = {
        "user": random.integers(0, 12, 2),
        "history": jc.Bags(random.integers(0, 12, 5), offsets=np.array([0, 2, 5])),
        "tags": jc.Bags(random.integers(0, 9, (2, 3)), weights=np.ones((2, 3), np.float32)),
        "seen": random.integers(0, 12, (2, 2)),
    }
    return {**batch, **changes}


def look_ahead(store, batches, features=FEATURES, **arguments) -> jc.LookAhead:
    arguments = arguments if {"slots", "device_bytes"} & arguments.keys() else {"slots": 30, **arguments}
    return jc.LookAhead(store, batches, ids=lambda batch: batch, features=features, **arguments)


@jax.jit
def step(cache, plan):
    """The gradients of half the sum of squares."""
    return jc.update(cache, plan, jc.lookup(cache, plan))


def train(store, batches, cache=None, step=step, **arguments) -> jc.CacheState:
    """Trains until the batches or an error end it, and flushes."""
    with look_ahead(store, batches, **arguments) as ahead:
        cache = ahead.start(cache)
        try:
            for _, plan in ahead:
                cache = step(ahead.exchange(cache, plan), plan)
        finally:
            cache = ahead.flush(cache)
    jc.check(cache, store)
    return cache


def everything(store) -> list[np.ndarray]:
    """All rows, states and scalars."""
    leaves = [np.asarray(scalar) for part in store.groups for scalar in part.scalars]
    for name, table in store.tables.items():
        every = np.arange(table.rows)
        leaves += [store.rows(name, every), *store.row_state(name, every)]
    return leaves


def assert_same(store, other) -> None:
    for mine, theirs in zip(everything(store), everything(other), strict=True):
        np.testing.assert_array_equal(mine, theirs)


# What lookup gives


def linear(stream, rows, table):
    """Row 5 is [5, -10]: what is pooled of such rows is such a row too."""
    return rows[:, None].astype(np.float32) * np.array([1.0, -2.0], np.float32)


def bags(ids, offsets=None, weights=None) -> jc.Bags:
    return jc.Bags(*(None if part is None else np.array(part) for part in (ids, offsets, weights)))


def lookup_once(table: jc.Table, feature: jc.Feature | None, ids) -> tuple[np.ndarray, np.ndarray, jc.Report]:
    """The result of a lookup, and all rows after sgd(1) with gradients of 1."""
    store = jc.HostStore({"item": table}, optimizer=None if table.frozen else optax.sgd(1.0))
    name, features = ("item", None) if feature is None else ("bag", {"bag": feature})
    with look_ahead(store, [{name: ids}], features=features, slots=4) as ahead:
        cache = ahead.start()
        for _, plan in ahead:
            cache = ahead.exchange(cache, plan)
            result = jc.lookup(cache, plan)[name]
            cache = jc.update(cache, plan, {name: jnp.ones_like(result)})
        cache = ahead.flush(cache)
    jc.check(cache, store)
    assert result.dtype == jnp.float32
    return np.asarray(result), store.rows("item", np.arange(table.rows)).astype(np.float32), ahead.report()


SUM, MEAN, ROW = (jc.Feature("item", combiner) for combiner in ("sum", "mean", None))
PADDED_SUM, PADDED_MEAN, PADDED_ROW = (jc.Feature("item", combiner, 1) for combiner in ("sum", "mean", None))
WORKED_OUT = [
    # Feature, ids, the first element of each result, and by row the gradient that it gets.
    (None, [3, 1], [3, 1], {3: 1, 1: 1}),
    (ROW, [[3, 1], [3, 3]], [[3, 1], [3, 3]], {3: 3, 1: 1}),
    (ROW, bags([[3, 1], [3, 3]]), [[3, 1], [3, 3]], {3: 3, 1: 1}),
    (SUM, [3, 1], [3, 1], {3: 1, 1: 1}),
    (MEAN, [3, 1], [3, 1], {3: 1, 1: 1}),
    (SUM, [[3, 1], [3, 3]], [4, 6], {3: 3, 1: 1}),
    (MEAN, [[3, 1], [3, 3]], [2, 3], {3: 1.5, 1: 0.5}),
    (MEAN, [[[3, 1], [2, 2]], [[3, 3], [1, 2]]], [[2, 2], [3, 1.5]], {3: 1.5, 1: 1, 2: 1.5}),
    (SUM, np.zeros((2, 0), int), [0, 0], {}),
    (MEAN, np.zeros((2, 0), int), [0, 0], {}),
    (ROW, np.zeros((2, 0), int), np.zeros((2, 0)), {}),
    # Ragged
    (SUM, bags([3, 1, 1], [0, 0, 3]), [0, 5], {3: 1, 1: 2}),
    (MEAN, bags([3, 1, 1, 3], [0, 4, 4]), [2, 0], {3: 0.5, 1: 0.5}),
    (MEAN, bags(np.zeros(0, int), [0, 0, 0]), [0, 0], {}),
    # Weighted
    (SUM, bags([3, 1], None, [2.0, -0.5]), [6, -0.5], {3: 2, 1: -0.5}),
    (MEAN, bags([3, 1], None, [2.0, 0.0]), [3, 0], {3: 1, 1: 0}),
    (SUM, bags([[3, 1], [2, 2]], None, [[2.0, 0.5], [1.0, -1.0]]), [6.5, 0], {3: 2, 1: 0.5, 2: 0}),
    (MEAN, bags([[3, 1], [2, 1]], None, [[1.0, 3.0], [0.0, 0.0]]), [1.5, 0], {3: 0.25, 1: 0.75, 2: 0}),
    (MEAN, bags([3, 1, 2], [0, 2, 3], [1.0, 3.0, 0.5]), [1.5, 2], {3: 0.25, 1: 0.75, 2: 1}),
    (MEAN, bags([3, 1, 2], [0, 2, 3], [-1.5, -0.5, -1.0]), [2.5, 2], {3: 0.75, 1: 0.25, 2: 1}),
    # Padding, here 1, which is a row of the table: it is not looked up, and what it weighs does not count.
    (PADDED_ROW, [[3, 1], [1, 2]], [[3, 0], [0, 2]], {3: 1, 2: 1}),
    (PADDED_SUM, [[3, 1], [1, 1]], [3, 0], {3: 1}),
    (PADDED_MEAN, [[3, 1], [1, 1]], [3, 0], {3: 1}),
    (PADDED_MEAN, bags([3, 1, 2], [0, 2, 3], [0.5, 3.0, 0.5]), [3, 2], {3: 1, 2: 1}),
    (PADDED_MEAN, bags([[3, 1], [3, 2]], None, [[0.5, 3.0], [1.0, 3.0]]), [3, 2.25], {3: 1.25, 2: 0.75}),
]


@pytest.mark.parametrize(("feature", "ids", "expected", "gradients"), WORKED_OUT)
def test_bags_worked_out_by_hand(feature, ids, expected, gradients):
    ids = ids if isinstance(ids, jc.Bags) else np.array(ids)
    result, rows, report = lookup_once(jc.Table(8, 2, linear), feature, ids)
    np.testing.assert_array_equal(result, np.array(expected, np.float32)[..., None] * np.array([1, -2], np.float32))
    trained = linear(None, np.arange(8), None)
    for row, gradient in gradients.items():
        trained[row] -= gradient
    np.testing.assert_array_equal(rows, trained)
    assert report.unique_rows == len(gradients) and not report.ignored


def test_weights_are_those_of_their_feature_whatever_stands_beside():
    """Of one table: rows as they are, rows with weights, and rows with none."""
    features = {"seen": ROW, "tags": SUM, "history": SUM}
    batch = {"seen": np.array([[3, 1]]), "tags": bags([[2, 1]], None, [[2.0, 0.5]]), "history": np.array([[4, 1]])}
    store = jc.HostStore({"item": jc.Table(8, 2, linear)}, optimizer=optax.sgd(1.0))
    with look_ahead(store, [batch], features=features, slots=4) as ahead:
        cache = ahead.start()
        for _, plan in ahead:
            cache = ahead.exchange(cache, plan)
            # Without its exchange nothing is accepted: neither what is handed out nor what is pooled.
            unready = jc.lookup(dataclasses.replace(cache, exchanged=cache.step), plan)
            rows = jc.lookup(cache, plan)
            cache = jc.update(cache, plan, jax.tree.map(jnp.ones_like, rows))
        cache = ahead.flush(cache)
    assert all(np.isnan(leaf).all() for leaf in unready.values())
    assert {name: leaf[..., 0].tolist() for name, leaf in rows.items()} == {
        "seen": [[3.0, 1.0]], "tags": [4.5], "history": [5.0]
    }  # fmt: skip
    moved = linear(None, np.arange(8), None) - store.rows("item", np.arange(8))
    np.testing.assert_array_equal(moved[:, 0], [0, 2.5, 2, 1, 1, 0, 0, 0])


def test_an_update_that_is_not_accepted_changes_nothing_but_the_fault():
    store = make_store()
    with look_ahead(store, [make_batch()]) as ahead:
        cache = ahead.start()
        for _, plan in ahead:
            cache = ahead.exchange(cache, plan)
            unready = dataclasses.replace(cache, exchanged=cache.step)
            gradients = jax.tree.map(jnp.ones_like, jc.lookup(cache, plan))
            found = jc.update(unready, plan, gradients)
            updated = jc.update(cache, plan, gradients)
    assert int(found.fault) == jc.CacheState.UPDATE_MISMATCH
    for before, after in zip(
        map(np.asarray, jax.tree.leaves(unready.groups)), jax.tree.leaves(found.groups), strict=True
    ):
        np.testing.assert_array_equal(before, after)
    assert (int(found.step), int(found.exchanged)) == (int(unready.step), int(unready.exchanged))
    assert [int(group.scalars[0]) for group in updated.groups] == [1, 1]  # which an accepted one does change


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("frozen", [False, True])
def test_lookups_are_float32_whatever_the_table(dtype, frozen):
    table = jc.Table(8, 2, linear, dtype=jnp.dtype(dtype), frozen=frozen)
    result, rows, _ = lookup_once(table, MEAN, np.array([[3, 1], [2, 2]]))
    np.testing.assert_array_equal(result[:, 0], [2, 2])
    assert (rows[:, 0] != np.arange(8)).any() != frozen


def test_ids_out_of_range_are_padding_where_they_are_ignored_and_counted():
    table = jc.Table(8, 2, linear, out_of_range="ignore")
    ids = np.array([[3, -1, 1], [8, 2**62, -(2**63)]])
    result, _, report = lookup_once(table, MEAN, ids)
    np.testing.assert_array_equal(result[:, 0], [2, 0])
    assert report.ignored == {"bag": 4}
    result, _, report = lookup_once(table, jc.Feature("item", None, padding=-1), ids)
    np.testing.assert_array_equal(result[..., 0], [[3, 0, 1], [0, 0, 0]])
    assert report.ignored == {"bag": 3}
    assert "bag 3" in str(report)
    result, _, report = lookup_once(table, SUM, np.array([7, 2**64 - 1, 2**63], np.uint64))
    np.testing.assert_array_equal(result[..., 0], [7, 0, 0])
    assert report.ignored == {"bag": 2}
    # Unsigned, the last but one has the bits of -1.
    result, _, report = lookup_once(table, jc.Feature("item", None, -1), np.array([7, 2**64 - 1, 2**63], np.uint64))
    assert report.ignored == {"bag": 2}


def test_ignored_ids_are_counted_over_the_batches_that_were_exchanged():
    store = make_store(out_of_range="ignore")
    batches = [make_batch(seed, user=np.array([50, seed]), seen=np.array([[0], [-seed]])) for seed in range(5)]
    with look_ahead(store, batches) as ahead:
        cache = ahead.start()
        for number, (_, plan) in enumerate(itertools.islice(ahead, 3)):
            cache = step(ahead.exchange(cache, plan), plan)
            assert ahead.report().ignored == {"user": number + 1} | ({"seen": number} if number else {})
        ahead.flush(cache)


def test_two_features_of_one_array_and_one_table():
    """A history that the model sees both pooled and row by row. The gradients of both reach the rows."""
    store = jc.HostStore({"item": jc.Table(8, 2, linear)}, optimizer=optax.sgd(1.0))
    ids = np.array([[3, 1], [1, 1]])
    with jc.LookAhead(
        store, [ids], ids=lambda ids: {"pooled": ids, "rows": ids}, slots=2, features={"pooled": SUM, "rows": ROW}
    ) as ahead:
        cache = ahead.start()
        for _, plan in ahead:
            cache = ahead.exchange(cache, plan)
            rows = jc.lookup(cache, plan)
            np.testing.assert_array_equal(rows["pooled"], jnp.sum(rows["rows"], axis=1))
            cache = jc.update(cache, plan, {"pooled": jnp.ones((2, 2)), "rows": jnp.full((2, 2, 2), 10.0)})
        ahead.flush(cache)
    np.testing.assert_array_equal(store.rows("item", [0, 1, 3])[:, 0], [0, 1 - 33, 3 - 11])


# What the batches may not hold

BAD_BATCHES = [
    ({"history": bags(range(5), [1, 2, 5])}, ValueError, "feature 'history' start at 1, not at 0"),
    ({"history": bags(range(5), [0, 6, 5])}, ValueError, "feature 'history' decrease behind bag 1"),
    ({"history": bags(range(5), [0, 2, 4])}, ValueError, "feature 'history' end at 4, and there are 5 ids"),
    ({"history": bags(range(5), [0, 2, 6])}, ValueError, "feature 'history' end at 6, and there are 5 ids"),
    ({"history": bags(range(5), [0, 2, 3, 5])}, ValueError, r"same samples, got lengths .*'history': 3"),
    ({"history": bags(range(5), [])}, ValueError, r"offsets of feature 'history' are .*\[B \+ 1\]"),
    ({"history": bags(range(5), [0.0, 2.0, 5.0])}, ValueError, "offsets of feature 'history' are float64"),
    ({"history": bags(range(5), [[0, 2, 5]])}, ValueError, r"offsets of feature 'history' are .*\[1, 3\]"),
    ({"history": bags([[0, 1], [2, 3]], [0, 2, 4])}, ValueError, r"'history' has offsets and ids of shape \(2, 2\)"),
    ({"history": bags(range(5), [0, 2, 5], np.ones(4))}, ValueError, r"weights of feature 'history' have shape \(4,\)"),
    (
        {"tags": bags(np.ones((2, 3), int), None, np.ones(2))},
        ValueError,
        r"'tags' .*\(2,\) .*\(2, 3\).*one weight an id",
    ),
    ({"tags": bags(np.ones((2, 3), int), None, np.ones((3, 2)))}, ValueError, r"'tags' .*\(3, 2\) .*\(2, 3\)"),
    ({"tags": bags(np.ones((2, 3), int), None, [["a"] * 3] * 2)}, TypeError, "weights of feature 'tags' are <U1"),
    ({"tags": bags(np.ones((2, 3), int), None, np.full((2, 3), -1e300))}, ValueError, "'tags' do not fit float32: 1e"),
    ({"tags": bags(np.ones((2, 3), int), None, np.ones((2, 3), complex))}, TypeError, "'tags' are complex128"),
    (
        {"seen": bags([[1, 2], [3, 4]], None, np.ones((2, 2)))},
        ValueError,
        r"'seen' has weights and no combiner.*combiner=",
    ),
    ({"seen": bags([1, 2, 3], [0, 1, 3])}, ValueError, r"'seen' has ragged bags and no combiner.*combiner="),
    ({"seen": np.array([[1, 2], [3, 12]])}, ValueError, r"'seen' has id 12 at lookup 3.*0 to 11 \(Table\(rows=12\)\)"),
    ({"history": bags([1, 2, 3, 4, -1], [0, 2, 5])}, ValueError, "feature 'history' has id -1 at lookup 4"),
    ({"tags": bags(np.array([[1, 0, 9]] * 2), None, np.ones((2, 3)))}, ValueError, "'tags' has id 9 at lookup 2"),
    ({"history": bags([1.0, 2.0], [0, 1, 2])}, TypeError, "ids of feature 'history' are float64"),
    (
        {"clicks": np.array([1, 2])},
        KeyError,
        r"no feature or table named 'clicks'.*user, history, tags, seen, item, word",
    ),
    ({"user": np.array([1, 2, 3])}, ValueError, "same samples, got lengths .*'user': 3"),
    # What is right by itself, and not what the batches before had
    ({"tags": np.ones((2, 3), int)}, ValueError, r"(?s)same features.*tags \[2, 3\] weighted.*tags \[2, 3\],"),
    ({"history": np.ones(2, int)}, ValueError, r"(?s)same features.*history .*ragged.*history \[2\],"),
    ({"history": np.ones((2, 3), int)}, ValueError, r"(?s)same features.*history .*ragged.*history \[2, 3\],"),
    ({"seen": np.ones((2, 5), int)}, ValueError, r"(?s)same number of ids a sample.*seen \[2, 2\].*seen \[2, 5\]"),
    ({"seen": np.ones(2, int)}, ValueError, r"(?s)same number of ids a sample.*seen \[2, 2\].*seen \[2\]"),
    ({"word": np.ones(2, int)}, ValueError, "every batch needs the same features"),
]


@pytest.mark.parametrize(("change", "error", "text"), BAD_BATCHES)
def test_a_bad_batch_changes_nothing_and_training_goes_on_without_it(change, error, text):
    store, good = make_store(), [make_batch(seed) for seed in range(2)]
    with pytest.raises(error, match=text):
        train(store, [*good, make_batch(2, **change)], slots=30)
    done = store.step  # the error may come as soon as the batch was drawn, ahead of the good ones
    assert done <= 2
    expected = make_store()
    train(expected, good[:done], slots="100%")
    assert_same(store, expected)
    train(store, [make_batch(5)])
    train(expected, [make_batch(5)], slots="100%")
    assert_same(store, expected)


def test_a_batch_that_lacks_a_feature():
    batches = [make_batch(0), {name: ids for name, ids in make_batch(1).items() if name != "seen"}]
    with pytest.raises(ValueError, match="every batch needs the same features in the same order"):
        train(make_store(), batches)


def test_batches_of_no_samples_at_the_start():
    ragged = jc.Bags(np.zeros(0, int), offsets=np.zeros(1, int), weights=np.zeros(0))
    padded = jc.Bags(np.zeros((0, 3), int), weights=np.zeros((0, 3)))
    empty = {"user": np.zeros(0, int), "history": ragged, "tags": padded, "seen": np.zeros((0, 2), int)}
    batches = [make_batch(seed) for seed in range(2)]
    for batch in batches:
        batch["history"] = batch["history"]._replace(weights=np.ones(5, np.float32))
    stores = [jc.HostStore(make_tables(), optimizer=optax.sgd(0.1)) for _ in range(4)]
    train(stores[0], [empty, empty])
    assert stores[0].step == 2
    assert_same(stores[0], stores[1])
    train(stores[2], [empty, *batches])
    train(stores[3], batches)
    assert_same(stores[2], stores[3])


def test_a_bad_first_batch_leaves_the_store_untouched():
    store = make_store()
    with pytest.raises(ValueError, match="feature 'history'"):
        train(store, [make_batch(history=bags(range(5), [0, 2, 4]))], slots="50%")
    assert store.step == store.rows_written == 0
    train(store, [make_batch()])
    assert store.step == 1


# What features may not be


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: jc.Feature("item", "max"), ValueError, 'combiner must be "sum", "mean" or None'),
        (lambda: jc.Feature("item", combiner=["sum"]), ValueError, "combiner must be"),
        (lambda: jc.Feature(jc.Table(3, 2)), TypeError, "table must be the name of a table"),
        (lambda: jc.Feature("item", padding="0"), TypeError, "padding must be an integer"),
        (lambda: jc.Feature("item", padding=True), TypeError, "padding must be an integer"),
        (lambda: jc.Feature("item", padding=2**63), ValueError, "padding must fit 64 bits"),
    ],
)
def test_features_that_are_wrong(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    ("features", "error", "text"),
    [
        (
            {"history": jc.Feature("items")},
            KeyError,
            "'history' looks up table 'items': the store has item, user, word",
        ),
        ({"history": "item"}, TypeError, "'history': 'item'"),
        ({"history": jc.Table(3, 2)}, TypeError, "features must map names to Feature"),
        ({3: jc.Feature("item")}, TypeError, "features must map names to Feature"),
        ([jc.Feature("item")], TypeError, "features must map names to features"),
    ],
)
def test_features_of_a_pipeline_that_are_wrong(features, error, text):
    with pytest.raises(error, match=text):
        look_ahead(make_store(), [], features=features)


# Tables loaded with another shape


@pytest.mark.parametrize("shape", [(12, 3), (11, 4), (13, 4), (48,), (12, 4, 1), (4, 12)])
@pytest.mark.parametrize("as_file", [False, True])
def test_a_table_loaded_with_another_shape(shape, as_file, tmp_path):
    store, expected = make_store(), make_store()
    train(store, [make_batch()])
    train(expected, [make_batch()])
    source = np.ones(shape, np.float32)
    if as_file:
        np.save(tmp_path / "item.npy", source)
        source = tmp_path / "item.npy"
    with pytest.raises(ValueError, match=r"(?s)'item'.*\(12, 4\)"):
        store.load("item", source)
    assert_same(store, expected)
    store.load("item", np.ones((12, 4), np.float32))
    np.testing.assert_array_equal(store.rows("item", np.arange(12)), np.ones((12, 4)))
    np.testing.assert_array_equal(store.rows("user", np.arange(12)), expected.rows("user", np.arange(12)))


# Slots of groups


@pytest.mark.parametrize("capacity", [{"slots": "12%"}, {"slots": 4}, {"device_bytes": 300}])
def test_a_budget_too_small_for_a_group(capacity):
    store = make_store()
    # 5 items and users and one word in one batch, and 4 words in another
    sparse = {"user": np.array([0, 1]), "seen": np.array([[0, 1], [2, 2]]), "tags": np.array([[1], [1]])}
    words = {"user": np.array([0, 1]), "seen": np.array([[0, 1], [0, 2]]), "tags": np.array([[1], [2]])}
    with pytest.raises(jc.TooFewSlots, match=r"(?s)too small for the groups.*5 for 'item'.*2 for 'word'.*ask for more"):
        train(store, [sparse, words], **capacity)
    assert store.step == store.rows_written == 0
    train(store, [sparse, words], slots=7)
    assert store.step == 2


@pytest.mark.parametrize(
    ("slots", "error", "text"),
    [
        ({"item": 5}, ValueError, "no slots for the group of table 'word'"),
        ({"word": 5}, ValueError, "no slots for the group of table 'item'"),
        ({}, ValueError, "no slots for the group of table 'item'"),
        ({"item": 5, "user": 5, "word": 5}, ValueError, "names 'item' and 'user', which share one buffer"),
        ({"item": 5, "words": 5}, KeyError, "unknown table 'words': the store has item, user, word"),
        ({"item": 5, "word": 0}, ValueError, "positive number of rows or a share"),
        ({"item": 5, "word": "150%"}, ValueError, "positive number of rows or a share"),
        ({"item": 5, "word": None}, ValueError, "positive number of rows or a share"),
        ({"item": 2.5, "word": 3}, ValueError, "positive number of rows or a share"),
    ],
)
def test_mappings_of_slots_that_are_wrong(slots, error, text):
    with pytest.raises(error, match=text):
        look_ahead(make_store(), [], slots=slots)


def test_a_mapping_too_small_for_a_batch_says_which_group_and_what_would_do():
    store = make_store()
    batch = make_batch(tags=bags([[1, 2, 3], [3, 4, 5]], None, np.ones((2, 3))))
    with pytest.raises(jc.TooFewSlots, match=r"(?s)batch 1 needs 5 slots.* of word .*has 4.*'word': 5"):
        train(
            store,
            [make_batch(tags=bags(np.ones((2, 3), int), None, np.ones((2, 3)))), batch],
            slots={"user": 9, "word": 4},
        )
    train(store, [batch], slots={"user": 9, "word": 5})


@pytest.mark.parametrize(
    "device_bytes", ["4 potatoes", "GiB", "", "4 4GiB", "-4GiB", "4eGiB", "0", "0.1B", 0, -1, 2.5, True, [4]]
)
def test_device_bytes_that_are_wrong(device_bytes):
    with pytest.raises(ValueError, match=r"device_bytes must be a positive number of bytes,? or a size such as"):
        look_ahead(make_store(), [], device_bytes=device_bytes)


def test_slots_and_device_bytes_are_one_or_the_other():
    with pytest.raises(ValueError, match=r"one of slots.*device_bytes"):
        look_ahead(make_store(), [], slots=30, device_bytes="1KiB")
    with pytest.raises(ValueError, match=r"one of slots.*device_bytes"):
        jc.LookAhead(make_store(), [], ids=lambda batch: batch)


@pytest.mark.parametrize("device_bytes", ["1.5KiB", "1536", 1536, " 1536 b ", "1.536 kB"])
def test_device_bytes_are_a_bound_on_what_the_groups_take(device_bytes):
    store = make_store()
    with look_ahead(store, [make_batch(seed) for seed in range(4)], device_bytes=device_bytes) as ahead:
        cache = ahead.start()
        for _, plan in ahead:
            cache = step(ahead.exchange(cache, plan), plan)
        cache = ahead.flush(cache)
    jc.check(cache, store)
    report = ahead.report()
    # Weights and two moments of float32; beside its row a slot takes three words, a count and a flag.
    sizes = {name: group.row_bytes + 17 for name, group in report.groups.items()}
    assert sizes == {"item": 3 * 4 * 4 + 17, "word": 3 * 3 * 4 + 17}
    assert 1536 - sum(sizes.values()) < report.device_bytes <= cache.nbytes <= 1536


def test_slots_are_split_in_proportion_to_unique_rows_and_reported():
    """24 items and users to 6 words in each batch; words need no more slots than there are words."""
    store = jc.HostStore({"item": jc.Table(500, 4), "word": jc.Table(500, 3), "city": jc.Table(9, 2)}, optax.sgd(0.1))
    batches = [
        {"item": np.arange(24) + 20 * seed, "word": np.arange(24) % 6 + seed, "city": np.arange(24) % 2}
        for seed in range(5)
    ]
    expected = {100: (75, 18, 6), 200: (152, 38, 9), 33: (25, 6, 2), 32: (24, 6, 2), "50%": (396, 99, 9)}
    for slots, numbers in expected.items():
        with look_ahead(store, batches, features=None, slots=slots) as ahead:
            cache = ahead.start()
            found = {name: group.slots for name, group in ahead.report().groups.items()}
        assert found == pytest.approx(dict(zip(("item", "word", "city"), numbers, strict=True)), abs=2), slots
        assert sum(found.values()) <= (slots if isinstance(slots, int) else 505) and cache.slots == tuple(
            found.values()
        )


# Gradients, rounding and scalars


def test_gradients_of_frozen_features_may_be_left_out_and_those_of_others_may_not():
    tables = make_tables()
    tables["word"] = jc.Table(9, 3, counting, frozen=True)
    results = []
    for left_out in ((), ("tags",)):
        store = jc.HostStore(tables, optimizer=optax.adam(0.1))

        @jax.jit
        def some(cache, plan, left_out=left_out):
            rows = jc.lookup(cache, plan)
            return jc.update(cache, plan, {name: leaf for name, leaf in rows.items() if name not in left_out})

        train(store, [make_batch(seed) for seed in range(3)], step=some)
        np.testing.assert_array_equal(store.rows("word", np.arange(9)), counting(None, np.arange(9), tables["word"]))
        assert store.row_state("word", [1]) == () and store.locate("word")[0].rows_written == 0
        results.append(store)
    assert_same(*results)

    with look_ahead(store, [make_batch()]) as ahead:
        cache = ahead.start()
        _, plan = next(ahead)
        cache = ahead.exchange(cache, plan)
        rows = jc.lookup(cache, plan)
        for wrong in ({"tags": rows["tags"]}, {**rows, "tags": rows["tags"][:1]}):
            with pytest.raises(ValueError, match="update needs the gradients of what lookup returned"):
                jc.update(cache, plan, wrong)
        ahead.flush(jc.update(cache, plan, rows))


def ones(stream, rows, table):
    return np.ones((len(rows), table.dim), np.float32)


def rounded(batches, seed=0, slots=32) -> tuple[np.ndarray, np.ndarray]:
    """Rows 0 to 15 of two tables whose ones became 1 - 2**-10, which lies a quarter of the way to 1 - 2**-8."""
    tables = {name: jc.Table(64, 4, ones, dtype=jnp.bfloat16, rounding="stochastic") for name in ("one", "other")}
    store = jc.HostStore(tables, optimizer=optax.sgd(2.0**-10), seed=seed)
    assert len(store.groups) == 1
    with look_ahead(store, batches, features=None, slots=slots) as ahead:
        cache = ahead.start()
        for _, plan in ahead:
            cache = ahead.exchange(cache, plan)
            cache = jc.update(cache, plan, jax.tree.map(jnp.ones_like, jc.lookup(cache, plan)))
        ahead.flush(cache)
    one, other = (store.rows(name, np.arange(16)).astype(np.float32) for name in tables)
    assert set(np.unique([one, other])) == {1, 1 - 2.0**-8}
    return one, other


def test_stochastic_rounding_draws_by_seed_table_step_id_and_column_and_never_by_slot():
    first, later = ({"one": ids, "other": ids} for ids in (np.arange(16), np.arange(16, 32)))
    one, other = rounded([first])
    assert 0.1 < np.mean(one < 1) < 0.4
    different = {
        "ids": (one[1:], one[:-1]),
        "columns": (one[:, 1:], one[:, :-1]),
        "tables": (one, other),
        "seeds": (one, rounded([first], seed=1)[0]),
        "steps": (one, rounded([later, first])[0]),
    }
    for what, (these, those) in different.items():
        assert 0.15 < np.mean(these != those) < 0.6, what  # 0.375 where they are independent
    # Other slots: another order, a resident cache, and rows of the other table first.
    backwards = {name: ids[::-1].copy() for name, ids in first.items()}
    swapped = {"other": first["other"], "one": first["one"]}
    for batches, slots in (([backwards], 32), ([first], "100%"), ([swapped], 40)):
        for found, expected in zip(rounded(batches, slots=slots), (one, other), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_scalars_advance_in_groups_that_are_not_looked_up():
    """As on a dense table: a row that is met for the first time in step 4 has the bias correction of step 4."""
    users = [{"user": np.array([seed, 1])} for seed in range(3)]
    both = [{"user": np.array([seed, 1]), "word": np.array([2, seed])} for seed in range(3)]
    store = make_store()
    train(store, users, features=None)
    counts = [[int(scalar) for scalar in part.scalars] for part in store.groups]
    assert len(counts) == 2 and counts[0] == counts[1] and set(counts[1]) == {3}
    train(store, both, features=None)

    tables = {
        name: oracle.DictTable(counting(None, np.arange(table.rows), table), oracle.LazyAdam(0.1))
        for name, table in make_tables().items()
    }
    features = {name: oracle.DictFeature(table, None, None) for name, table in tables.items()}
    batches = [{name: (ids.tolist(), None) for name, ids in batch.items()} for batch in [*users, *both]]
    ones = {name: np.ones(table.dim) for name, table in tables.items()}
    oracle.train_in_double(tables, features, batches, ones, scale=1.0)
    for name, table in tables.items():
        found = store.rows(name, np.arange(len(table.rows)))
        np.testing.assert_allclose(found, list(table.rows.values()), rtol=1e-5, atol=1e-5, err_msg=name)


# Compilations

_compilations: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: _compilations.append(event) if "backend_compile" in event else None
)


def run(step, features, tables, batches) -> list[int]:
    """Compilations of each step, the first one's including all that came before it, of a pipeline built anew."""
    store = jc.HostStore({name: jc.Table(ROWS[name], dim, counting) for name, dim in tables.items()}, optax.adam(0.1))
    compiled = [len(_compilations)]
    with look_ahead(store, batches, features=features) as ahead:
        cache = ahead.start()
        for _, plan in ahead:
            cache = step(ahead.exchange(cache, plan), plan)
            compiled.append(len(_compilations))
        ahead.flush(cache)
    assert ahead.report().bound_growths == 0
    return np.diff(compiled).tolist()


def test_another_feature_table_or_id_dtype_compiles_once_and_never_again():
    tables = {"item": 4, "user": 4}
    some = {name: FEATURES[name] for name in ("user", "history", "seen")}

    def batches(names=tuple(some), dtype=np.int64, put=np.asarray):
        cast = lambda ids: put(np.asarray(ids, dtype)) if np.asarray(ids).dtype.kind == "i" else ids  # noqa: E731
        whole = [make_batch(seed) for seed in range(4)]
        return [{name: jax.tree.map(cast, batch[name]) for name in names} for batch in whole]

    step = jax.jit(lambda cache, plan: jc.update(cache, plan, jc.lookup(cache, plan)), donate_argnums=0)
    changes = {
        "nothing": (0, some, tables, batches()),
        "int32": (0, some, tables, batches(dtype=np.int32)),
        "uint8": (0, some, tables, batches(dtype=np.uint8)),
        "on the device": (0, some, tables, batches(dtype=np.int32, put=jnp.asarray)),
        "a feature": (1, {**some, "more": jc.Feature("item", "sum")}, tables, None),
        "a combiner": (1, {**some, "seen": jc.Feature("item", "sum")}, tables, batches()),
        "padding": (0, {**some, "seen": jc.Feature("item", None, 3)}, tables, batches()),
        "a table": (1, FEATURES, {**tables, "word": 3}, batches(tuple(FEATURES))),
        "a table that is stacked": (1, some, {**tables, "word": 4}, batches()),
    }
    changes["a feature"] = (*changes["a feature"][:3], [{**batch, "more": batch["seen"]} for batch in batches()])
    run(step, some, tables, batches())
    for what, (expected, *arguments) in changes.items():
        before = step._cache_size()
        first = run(step, *arguments)
        assert step._cache_size() - before == expected, what
        assert first[1:] == [0, 0, 0], what
        assert expected or first[0] == 0, what
        assert run(step, *arguments) == [0, 0, 0, 0], what
        assert step._cache_size() - before == expected, what
