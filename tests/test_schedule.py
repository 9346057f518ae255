"""`hot_batches` yields each sample once, hot ones apart; a hot batch needs nothing from the host."""

import itertools
import math
import tracemalloc
from collections import namedtuple
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import criteo
import jaxcache as jc
import training
from jaxcache.counts import count_ids, hottest_rows
from jaxcache.schedule import HotReport, hot_batches

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
ROWS = 6
Pair = namedtuple("Pair", ["left", "right"])


# A loader of samples that can be told apart: every leaf holds the sample's number, in dtypes and shapes of its own.


def make_batches(user, item, sizes):
    """Batches of consecutive samples with ids `user`, `[S]`, and `item`, `[S, n]`; each leaf is of its own kind."""
    batches, first = [], 0
    for size in sizes:
        part = slice(first, first + size)
        number = np.arange(len(user))[part]
        batches.append(
            {
                "ids": (user[part].astype(np.int32), jnp.asarray(item[part], jnp.int32)),
                "rest": [
                    Pair(number, (np.ones((2, 3, 1)) * number).T.astype(np.float32)),
                    None,
                    {
                        "half": jnp.asarray(number, jnp.bfloat16),
                        "none": np.zeros((size, 0)),
                        "text": number.astype("U"),
                    },
                ],
            }
        )
        first += size
    return batches


def ids_of(batch):
    return dict(zip(("user", "item"), batch["ids"], strict=True))


def numbers_of(batch, user, item):
    """The numbers of a batch's samples, read from one leaf; checks that the other leaves are of the same samples."""
    number, cube = batch["rest"][0]
    np.testing.assert_array_equal(cube, np.broadcast_to(number[:, None, None], (len(number), 3, 2)).astype(np.float32))
    np.testing.assert_array_equal(batch["rest"][2]["half"], number.astype(np.float32).astype(jnp.bfloat16))
    np.testing.assert_array_equal(batch["rest"][2]["text"], number.astype("U"))
    np.testing.assert_array_equal(batch["ids"][0], user[number])
    np.testing.assert_array_equal(batch["ids"][1], item[number])
    assert batch["rest"][1] is None and batch["rest"][2]["none"].shape == (len(number), 0)
    return number.tolist()


def packed_by_hand(is_hot, sizes):
    """The numbers of the samples of each batch, and whether it is hot, by loops."""
    size = next((size for size in sizes if size), 0)
    pending, out, first = {True: [], False: []}, [], 0
    for count in sizes:
        for kind in (True, False):
            for number in range(first, first + count):
                if is_hot[number] == kind:
                    pending[kind].append(number)
                    if len(pending[kind]) == size:
                        out.append(pending[kind])
                        pending[kind] = []
        first += count
    rest = pending[False] + pending[True]
    out += [rest[start : start + size] for start in range(0, len(rest), size or 1)]
    return out, [all(is_hot[number] for number in batch) for batch in out]


@st.composite
def samples(draw):
    """Ids of samples, the sizes of their batches, and the hot rows of each feature."""
    sizes = draw(st.lists(st.integers(0, 6), max_size=8))
    number, width = sum(sizes), draw(st.integers(0, 3))
    ids = st.integers(0, ROWS - 1)
    user = np.array(draw(st.lists(ids, min_size=number, max_size=number)), np.int64)
    item = np.array(draw(st.lists(ids, min_size=number * width, max_size=number * width)), np.int64)
    hot = {name: draw(st.lists(ids, max_size=2 * ROWS)) for name in ("user", "item")}
    return user, item.reshape(number, width), sizes, hot


def hot_by_hand(user, item, hot):
    return [u in hot["user"] and all(i in hot["item"] for i in row) for u, row in zip(user, item, strict=True)]


def as_mask(ids):
    mask = np.zeros(ROWS, bool)
    mask[ids] = True
    return mask


@given(samples())
def test_batches_are_those_of_loops(drawn):
    user, item, sizes, hot = drawn
    is_hot = hot_by_hand(user, item, hot)
    expected, batch_is_hot = packed_by_hand(is_hot, sizes)
    report = HotReport(len(user), sum(is_hot), len(expected), sum(batch_is_hot))
    loader = make_batches(user, item, sizes)
    masks = {name: as_mask(ids) for name, ids in hot.items()}
    arrays = {"unused": [1], **{name: jnp.asarray(ids, jnp.int32) for name, ids in hot.items()}}
    for hot_rows in (hot, masks, arrays):
        batches = hot_batches(loader, hot_rows, ids=ids_of)
        for _ in range(2):  # as often as the loader can
            assert [numbers_of(batch, user, item) for batch in batches] == expected
            assert batches.report() == report


@given(samples())
def test_no_sample_is_lost_or_repeated_and_kinds_stay_apart_and_in_order(drawn):
    user, item, sizes, hot = drawn
    is_hot = hot_by_hand(user, item, hot)
    found = [numbers_of(batch, user, item) for batch in hot_batches(make_batches(user, item, sizes), hot, ids=ids_of)]
    order = list(itertools.chain(*found))
    assert sorted(order) == list(range(len(user)))
    for kind in (True, False):
        ordered = [number for number in order if is_hot[number] == kind]
        assert ordered == sorted(ordered)
    size = next((size for size in sizes if size), 1)
    assert all(len(batch) == size for batch in found[:-1]) and all(0 < len(batch) <= size for batch in found[-1:])
    assert len(found) == math.ceil(len(user) / size)
    # Both kinds in one batch: once at the most, at the end.
    assert all(len({is_hot[number] for number in batch}) == 1 for batch in found[:-2])
    assert sum(len({is_hot[number] for number in batch}) == 2 for batch in found) <= 1


@given(samples())
def test_batches_come_as_soon_as_they_are_full(drawn):
    user, item, sizes, hot = drawn
    drawn_samples = 0

    def loader():
        nonlocal drawn_samples
        for batch in make_batches(user, item, sizes):
            drawn_samples += len(batch["ids"][0])
            yield batch

    size, yielded = next((size for size in sizes if size), 1), 0
    batches = hot_batches(loader(), hot, ids=ids_of)
    for batch in batches:
        # Pending: less than a batch of each kind, and the batch being read.
        assert drawn_samples - yielded < 2 * size + max(sizes)
        assert batches.report().samples == drawn_samples
        yielded += len(batch["ids"][0])
    assert yielded == len(user)


def test_memory_does_not_grow_with_the_number_of_batches():
    size = 1000

    def loader(number):
        random = np.random.default_rng(0)
        for _ in range(number):
            yield {"user": random.integers(0, 100, size), "wide": np.zeros((size, 100))}  # 0.8 MB

    def peak(number):
        tracemalloc.start()
        try:
            for batch in hot_batches(loader(number), {"user": [1, 2]}, ids=lambda batch: {"user": batch["user"]}):
                del batch
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(2)  # warm up
    # One of each kind pending, one drawn, one handed out, and the copies of samples under way.
    assert peak(150) < 7 * 0.8e6


def test_a_loader_may_write_into_its_arrays_again():
    array, random = np.zeros(4, np.int64), np.random.default_rng(0)
    ids = random.integers(0, ROWS, (20, 4))

    def loader():
        for part in ids:
            array[:] = part
            yield {"user": array}

    def pack(batches):
        return [batch["user"].tolist() for batch in list(hot_batches(batches, {"user": [0, 1, 2]}))]

    assert pack(loader()) == pack([{"user": part} for part in ids])


def test_batches_do_not_share_memory():
    loader = [{"user": np.array([0, 1, 1])}, {"user": np.array([1, 0, 0])}, {"user": np.array([1, 1, 1])}]
    held = []
    for batch in hot_batches(loader, {"user": [1]}):
        held.append(batch["user"])
        batch["user"] += 100
    assert [ids.tolist() for ids in held] == [[101, 101, 101], [100, 100, 100], [101, 101, 101]]


def test_hot_rows_are_copied():
    hot = np.array([1, 1])
    batches = hot_batches([{"user": np.array([1, 0])}], {"user": hot})
    hot[:] = 0
    [batch] = batches
    assert batch["user"].tolist() == [0, 1]


def test_the_report_is_of_the_latest_pass_and_a_copy():
    batches = hot_batches([{"user": np.array([1, 0])}, {"user": np.array([1])}], {"user": [1]})
    assert batches.report() == HotReport() and batches.report().hot_sample_share == 0.0
    assert batches.report().hot_batch_share == 0.0
    list(batches)
    early = batches.report()
    assert early == HotReport(samples=3, hot_samples=2, batches=2, hot_batches=1)
    assert (early.hot_sample_share, early.hot_batch_share) == (2 / 3, 0.5)
    again = iter(batches)
    next(again)
    midway = batches.report()
    next(again)
    assert midway == HotReport(samples=3, hot_samples=2, batches=1, hot_batches=1)
    assert batches.report() == early


def test_a_feature_that_is_hot_as_a_whole_keeps_no_sample_out():
    loader = [{"user": np.array([1, 0]), "item": np.array([[3, 4], [5, 3]])}]
    batches = hot_batches(loader, {"user": [1], "item": np.ones(ROWS, bool)})
    list(batches)
    assert batches.report().hot_samples == 1


# Through the pipeline


def rows_fetched(loader, counts, slots):
    """Rows that each step of a training with pinned rows fetches."""
    dense, steps = training.dense_start(), []
    store, policy = training.make_store("adagrad"), jc.static(counts)
    with jc.LookAhead(store, loader, ids=lambda batch: batch["ids"], slots=slots, policy=policy) as ahead:
        cache = ahead.start()
        total = ahead.report().rows_fetched
        for batch, plan in ahead:
            cache = ahead.exchange(cache, plan)
            cache, dense, _ = training.train_step(cache, plan, dense, batch["labels"])
            steps.append(ahead.report().rows_fetched - total)
            total += steps[-1]
        cache = ahead.flush(cache)
    jc.check(cache, store)
    return steps


def test_a_hot_batch_fetches_nothing_where_hot_rows_are_pinned():
    def ids(batch):
        return batch["ids"]

    loader = training.make_batches(0, ["skewed"] * 60, last=5)
    counts = count_ids(loader, training.TABLES, ids)
    number = 30
    hot = hottest_rows(counts, number)
    batches = hot_batches(loader, hot, ids)
    # Rows that pass through take the slots of the coldest pinned rows: as many slots are left to them.
    slots = number + training.most_unique_rows(batches)
    batch_is_hot = [all(np.isin(batch["ids"][name], hot[name]).all() for name in hot) for batch in batches]
    fetched = rows_fetched(batches, counts, slots)
    assert len(fetched) == len(batch_is_hot) == len(loader)
    assert [rows for rows, is_hot in zip(fetched, batch_is_hot, strict=True) if is_hot] == [0] * sum(batch_is_hot)
    assert sum(batch_is_hot) == batches.report().hot_batches > 15
    # In the loader's own order hardly a batch does without the host.
    assert fetched.count(0) > 2 * rows_fetched(loader, counts, slots).count(0)


# Mistakes


GOOD = {"user": np.array([1, 2]), "label": np.zeros((2, 3), np.float32)}


@pytest.mark.parametrize(
    ("second", "error", "message"),
    [
        ({**GOOD, "label": np.float32(0)}, ValueError, r"batch 1 apart: leaf \['label'\] has shape \(\), .* 2 samples"),
        ({**GOOD, "label": 7}, ValueError, r"leaf \['label'\] has shape \(\)"),
        ({**GOOD, "label": [1, 2]}, ValueError, r"leaf \['label'\]\[0\] has shape \(\)"),
        ({**GOOD, "label": np.zeros((3, 3), np.float32)}, ValueError, r"leaf \['label'\] has shape \(3, 3\)"),
        ({**GOOD, "label": np.zeros((2, 4), np.float32)}, ValueError, r"batch 1 are not like .*\[3\].*got.*\[4\]"),
        ({**GOOD, "label": np.zeros((2, 3), np.float64)}, ValueError, "batch 1 are not like .*float32.*got.*float64"),
        ({**GOOD, "more": np.zeros(2)}, ValueError, "batch 1 are not like .*got.*more"),
        ({**GOOD, "user": np.array([[1], [2]])}, ValueError, "batch 1 are not like"),
        ({**GOOD, "user": np.array([1.0, 2.0])}, TypeError, "'user' are float64; ids must be integers"),
        ({**GOOD, "user": np.array([1, -2])}, ValueError, "'user' has id -2 at lookup 1"),
        ({**GOOD, "user": np.array(1)}, ValueError, "are a single number"),
        ({"label": GOOD["label"]}, KeyError, "user"),
    ],
)
def test_batches_that_cannot_be_packed_are_refused(second, error, message):
    batches = iter(hot_batches([GOOD, second], {"user": [1]}, ids=lambda batch: {"user": batch["user"]}))
    with pytest.raises(error, match=message):
        list(batches)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (lambda batch: batch, KeyError, "has no rows of feature 'label': give it an empty list"),
        (lambda batch: batch["user"], TypeError, "mapping"),
        (lambda batch: {"user": batch["user"], "item": batch["user"][:1]}, ValueError, "same samples"),
    ],
)
def test_ids_that_do_not_fit_are_refused(ids, error, message):
    with pytest.raises(error, match=message):
        list(hot_batches([GOOD], {"user": [1], "item": []}, ids=ids))


@pytest.mark.parametrize(
    ("hot_rows", "error", "message"),
    [
        ({"user": [1.0]}, TypeError, r"hot_rows\['user'\] is float64"),
        ({"user": [-1]}, ValueError, r"hot_rows\['user'\] has id -1"),
        ({"user": [[1]]}, ValueError, r"hot_rows\['user'\] has shape \(1, 1\)"),
        ({"user": 5}, ValueError, r"hot_rows\['user'\] has shape \(\)"),
        ([1, 2], TypeError, "mapping of feature names"),
    ],
)
def test_hot_rows_must_be_ids_or_a_mask(hot_rows, error, message):
    with pytest.raises(error, match=message):
        hot_batches([GOOD], hot_rows)


def test_an_id_beyond_the_mask_is_refused():
    with pytest.raises(ValueError, match="id 2 at lookup 1; ids must lie in 0 to 1"):
        list(hot_batches([{"user": np.array([1, 2])}], {"user": np.array([True, False])}))


def test_a_loader_must_be_iterable():
    with pytest.raises(TypeError, match="iterable of batches, got int"):
        hot_batches(7, {"user": [1]})


# Real data


@pytest.mark.parametrize("percent", [5, 10])
def test_the_criteo_log(percent):
    path = DATA / "criteo_80k.tsv.gz"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    log = criteo.read_criteo(path)
    tables = {name: jc.Table(rows, 16) for name, rows in zip(log.features, log.cardinalities, strict=True)}
    loader = [{"number": np.arange(len(log))[start : start + 512]} for start in range(0, len(log), 512)]

    def ids(batch):
        return dict(zip(log.features, log.ids[:, batch["number"]], strict=True))

    hot = hottest_rows(count_ids(loader, tables, ids), sum(log.cardinalities) * percent // 100)
    is_hot = np.all([np.isin(log.ids[i], hot[name]) for i, name in enumerate(log.features)], axis=0)
    batches = hot_batches(loader, hot, ids)
    found = [batch["number"] for batch in batches]
    expected, batch_is_hot = packed_by_hand(is_hot.tolist(), [len(batch["number"]) for batch in loader])
    assert [batch.tolist() for batch in found] == expected
    assert batches.report() == HotReport(len(log), int(is_hot.sum()), 157, sum(batch_is_hot))
    # As drawn, hardly a batch would be hot; packed, as many as the samples allow, up to what is left at the end.
    assert not any(is_hot[batch["number"]].all() for batch in loader)
    assert batches.report().hot_batches in (is_hot.sum() // 512, is_hot.sum() // 512 + 1)
    assert batches.report().hot_batch_share > {5: 0.20, 10: 0.33}[percent]
