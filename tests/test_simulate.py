"""The simulator against caches written as dicts and loops, and the traces that it reads."""

import gzip
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import optax
import pyarrow
import pyarrow.parquet
import pytest

import jaxcache as jc
from jaxcache import policies
from jaxcache.planner import LookAheadPlanner
from jaxcache.simulate import OPTIMUM, POLICIES, UNBOUNDED, format_table, plot, simulate, size
from jaxcache.traces import MISSING, load_trace

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


# ---- naive caches. A batch is a list of hashable rows, in order of lookup ------------------------


def naive(batches, slots, policy, counts):
    """Rows fetched with those warmed, rows warmed, rows written back, unique hits, and hits of lookups."""
    warm = []
    if policy in ("frequency", "static"):
        hottest = sorted((row for row in counts), key=lambda row: (-counts[row], row))
        warm = hottest[: math.floor(slots * 0.7) if policy == "frequency" else slots]
    resident = {row: [0, (-1, -place)] for place, row in enumerate(warm)}  # lookups since it came in; last use
    pinned, passes = set(warm), policy in ("static", "no_cache")
    fetched, written, row_hits, lookup_hits = len(warm), 0, 0, 0

    def rank(row):
        lookups, last = resident[row]
        if policy == "lfu":
            return lookups, last
        if policy == "frequency":
            return counts[row], last
        if policy == "static":
            return row in pinned, row in pinned and counts[row], last
        return last  # lru

    for number, batch in enumerate(batches):
        lookups = Counter(batch)
        hit = {row for row in lookups if row in resident and (row in pinned or not passes)}
        row_hits += len(hit)
        lookup_hits += sum(lookups[row] for row in hit)
        for row in lookups:
            if row in hit:
                continue
            fetched += 1
            if row in resident:  # it passes through once more
                written += 1
                continue
            if len(resident) == slots:
                victim = min((other for other in resident if other not in lookups), key=rank)
                del resident[victim]
                pinned.discard(victim)
                written += 1
            resident[row] = [0, None]
        for place, row in enumerate(lookups):
            resident[row][0] += lookups[row]
            resident[row][1] = (number, place)
    return fetched, len(warm), written, row_hits, lookup_hits


def belady(batches, slots):
    """The fewest rows fetched: the resident row whose next use is farthest goes first."""
    resident, fetched = set(), 0
    for number, batch in enumerate(batches):
        following = {}
        for later in range(len(batches) - 1, number, -1):
            following |= dict.fromkeys(batches[later], later)
        for row in set(batch) - resident:
            fetched += 1
            if len(resident) == slots:
                others = [other for other in resident if other not in batch]
                resident.remove(max(others, key=lambda other: following.get(other, math.inf)))
            resident.add(row)
    return fetched


def random_samples(random, samples=60, rows=40):
    """A trace of two features, "user" with one lookup and "item" with two, some of them hot, and some ids huge."""
    spread = np.array([0, 1, 2, 7, 2**31, 2**40 + 1, 2**62, 2**63 - 1], np.int64)
    huge = np.sort(np.concatenate([spread, random.integers(0, 2**63 - 1, rows - len(spread))]))
    return {
        "user": huge[random.integers(0, rows, samples)],
        "item": huge[(rows * random.random((samples, 2)) ** 3).astype(int)],
    }


def as_batches(samples, batch_size):
    """Lists of (feature, id), feature after feature, as tables of their own are looked up."""
    length = len(samples["user"])
    return [
        [
            (feature, row)
            for feature in ("user", "item")
            for row in samples[feature][first : first + batch_size].reshape(-1).tolist()
        ]
        for first in range(0, length, batch_size)
    ]


def in_parts(samples, length):
    """A loader of batches of another length than is simulated."""
    for first in range(0, len(samples["user"]), length):
        yield {name: ids[first : first + length] for name, ids in samples.items()}


@pytest.mark.parametrize("seed", range(8))
def test_every_policy_moves_what_a_naive_cache_moves(seed):
    random = np.random.default_rng(seed)
    samples, batch_size = random_samples(random), int(random.integers(1, 9))
    batches = as_batches(samples, batch_size)
    # Tables are in order of the features, so equal counts go by feature and id.
    counts = Counter(row for batch in batches for row in batch)
    order = {row: place for place, row in enumerate(sorted(counts, key=lambda row: (row[0] == "item", row[1])))}
    batches = [[order[row] for row in batch] for batch in batches]
    counts = {order[row]: lookups for row, lookups in counts.items()}
    unique = sum(len(set(batch)) for batch in batches)
    least = max(len(set(batch)) for batch in batches)
    capacities = sorted({least, least + 3, min(2 * least, len(counts)), len(counts)})

    found = simulate(in_parts(samples, 7), batch_size, capacities, windows=[2, 5])
    assert [(record.policy, record.window) for record in found[: 3 + len(POLICIES) + 1]] == [
        (OPTIMUM, "all"),
        ("lookahead", "auto"),
        ("lookahead", 2),
        ("lookahead", 5),
        ("scratchpipe", 3),
        *((name, 1) for name in ("frequency", "lfu", "lru", "static", "no_cache")),
        (UNBOUNDED, 1),
    ]
    for record in found:
        assert record.error is None
        assert (record.batches, record.lookups, record.unique_rows) == (len(batches), 180, unique)
        expected = belady(batches, record.capacity)
        if record.policy in (OPTIMUM, UNBOUNDED):
            assert record.rows_fetched == (expected if record.policy == OPTIMUM else len(counts))
            # What was fetched and not taken home is still there.
            assert record.rows_written_back == record.rows_fetched - min(record.slots, len(counts))
            assert record.hit_rate_rows == (unique - record.rows_fetched) / unique
        elif record.policy in ("lookahead", "scratchpipe"):
            assert expected <= record.rows_fetched <= unique
        else:
            fetched, warmed, written, row_hits, lookup_hits = naive(batches, record.slots, record.policy, counts)
            assert record.rows_fetched == fetched, record
            assert record.rows_warmed == warmed
            assert record.rows_written_back == written, record
            assert record.hit_rate_rows == row_hits / unique
            assert record.hit_rate_lookups == lookup_hits / 180
            assert record.rows_fetched >= expected
        assert record.over_optimum == record.rows_fetched / expected
        assert record.rows_per_batch == record.rows_fetched / len(batches)
        if record.policy == "no_cache":
            assert record.rows_fetched == unique and record.hit_rate_lookups == 0


def test_a_loop_that_one_can_follow_by_hand():
    """Rows 0, 1, 2 in turn through two slots: lru always evicts the next one, the optimum fetches 6 of 9."""
    trace = load_trace([np.array([[0], [1], [2]] * 3)])
    found = {record.policy: record for record in simulate(trace, 1, [2], ["lru", "no_cache"], row_bytes=100)}
    assert {name: record.rows_fetched for name, record in found.items()} == {
        OPTIMUM: 6,
        "lru": 9,
        "no_cache": 9,
        UNBOUNDED: 3,
    }
    assert found[OPTIMUM].hit_rate_rows == found[OPTIMUM].hit_rate_lookups == 3 / 9
    assert found["lru"].rows_written_back == 7  # all but the two that are left
    assert found["lru"].bytes_per_step == 100 * (9 + 7) / 9
    assert found["lru"].over_optimum == 1.5


def test_hit_rates_differ_by_repetitions():
    """Row 5 is looked up three times in a batch: as a row it counts once, as lookups three times."""
    [_, lru, _] = simulate([np.array([[5], [5], [5], [1]]), np.array([[5], [5], [5], [2]])], 4, [2], ["lru"])
    assert lru.hit_rate_rows == 1 / 4 and lru.hit_rate_lookups == 3 / 8


def test_features_that_share_a_table_share_its_rows():
    batch = {"clicked": [1, 2], "bought": [2, 3], "shop": [1, 1]}
    trace = load_trace([batch], tables={"clicked": "item", "bought": "item"})
    assert trace.rows == 4 and trace.group.names == ("item", "shop")
    assert trace.values["item"].tolist() == [1, 2, 3] and trace.counts["item"].tolist() == [1, 2, 1]
    assert simulate(trace, 2, [4], ["lru"])[0].rows_fetched == 4
    assert load_trace([batch]).rows == 5


def test_a_capacity_too_small_for_a_batch_is_a_record_that_says_so():
    trace = load_trace([np.arange(10)[:, None]])
    found = simulate(trace, 4, [3, 4], ["lru", "lfu"])
    small = [record for record in found if record.capacity == 3]
    assert [record.policy for record in small] == [OPTIMUM, "lru", "lfu", UNBOUNDED]
    for record in small[:-1]:
        assert record.error == "a batch has 4 unique rows and needs as many slots"
        assert record.rows_fetched is record.hit_rate_rows is record.rows_written_back is None and record.slots == 3
    assert small[-1].rows_fetched == 10 and all(record.error is None for record in found if record.capacity == 4)
    table = format_table(found).splitlines()
    assert sum("needs as many slots" in line for line in table) == 1 and len(table) == 1 + 2 + 4


def test_shares_are_of_declared_rows_or_else_of_distinct_ones():
    batches = [{"user": [0, 1, 2, 3, 4]}]
    assert simulate(batches, 1, ["50%"], ["lru"])[0].slots == 3  # 2.5 rounded up, as LookAhead does
    declared = load_trace(batches, rows={"user": 1001})
    assert declared.declared_rows == 1001
    [optimum, _, unbounded] = simulate(declared, 1, ["0.5%"], ["lru"])
    assert (optimum.slots, optimum.capacity, unbounded.slots) == (6, "0.5%", 5)


def test_a_policy_with_counts_by_id():
    """Counts of another day: id 70 was hot then, 7 is today."""
    counts = np.zeros(100, np.int64)
    counts[[70, 9]] = 5, 3
    trace = load_trace([np.array([[7], [70], [7], [9], [7]])])
    yesterday, today = simulate(trace, 1, [2], [policies.static({"0": counts}), "static"])[1:3]
    # Yesterday's start holds 70 and 9, and its coldest makes room for what passes through.
    assert yesterday.rows_warmed == 2 and yesterday.hit_rate_rows == 1 / 5
    assert today.hit_rate_rows == 3 / 5
    with pytest.raises(ValueError, match=r"static\(counts\) has counts of 50 rows for table '0'.*ids from 7 to 70"):
        simulate(trace, 1, [2], [policies.static({"0": counts[:50]})])
    with pytest.raises(ValueError, match="no counts of table '0'"):
        simulate(trace, 1, [2], [policies.static({"item": counts})])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: expected an integer of 1 or more"),
        ({"capacities": [0]}, "capacity 0: expected a number of rows, or a share"),
        ({"capacities": ["5"]}, "capacity '5'"),
        ({"capacities": ["200%"]}, "capacity '200%'"),
        ({"capacities": [2.5]}, "capacity 2.5"),
        ({"windows": [0]}, "windows=0"),
        ({"row_bytes": -1}, "row_bytes=-1"),
        ({"policies": ["lur"]}, "no policy named 'lur': the policies are lookahead, scratchpipe"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        simulate([[[1]]], **({"batch_size": 1, "capacities": [1]} | arguments))


@pytest.mark.parametrize(("name", "window"), [(name, None) for name in sorted(POLICIES)] + [("lookahead", 2)])
def test_training_moves_what_was_simulated(name, window):
    """The report of a run, whose tables have rows that the trace never looks up, and the record of its trace."""
    random = np.random.default_rng(5)
    loader = [{"user": (300 * random.random(8) ** 3).astype(int)} for _ in range(40)]
    trace = load_trace(loader, rows={"user": 300})
    counts = {"user": np.bincount(np.concatenate([batch["user"] for batch in loader]), minlength=300)}
    record = simulate(trace, 8, ["10%"], [name], [window] if window else [])[-2]

    store = jc.HostStore({"user": jc.Table(300, 4)}, optax.sgd(0.1))
    policy = POLICIES[name](counts)
    with jc.LookAhead(store, loader, ids=lambda batch: batch, slots="10%", policy=policy, window=window) as ahead:
        cache = ahead.start()
        for _, plan in ahead:
            cache = ahead.exchange(cache, plan)
            cache = jc.update(cache, plan, jc.lookup(cache, plan))
    report = ahead.report()
    assert record.slots == report.slots == 30 and record.rows_warmed == report.rows_warmed
    assert record.rows_fetched == report.rows_fetched + report.rows_warmed
    assert record.rows_written_back == report.rows_written_back > 0
    assert (record.batches, record.lookups, record.unique_rows) == (report.steps, report.lookups, report.unique_rows)
    assert (record.hit_rate_rows, record.hit_rate_lookups) == pytest.approx((report.hit_rate, report.lookup_hit_rate))
    assert (record.window, record.longest_window) == (report.window, report.longest_window)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clicks.npz", "criteo_80k.tsv.gz"])
def test_real_traces(name):
    if not (REAL_DATA / name).exists():
        pytest.skip(f"needs shared/data/{name} beside the checkout")
    windows = [2, 4, 8, 16, 32, 64, 128]
    for capacity in ("5%", "10%"):
        found = simulate(REAL_DATA / name, 512, [capacity], windows=windows)
        fetched = {(record.policy, record.window): record.rows_fetched for record in found}
        unbounded, optimum = fetched.pop((UNBOUNDED, 1)), fetched.pop((OPTIMUM, "all"))
        assert unbounded < optimum == min(optimum, *fetched.values())
        assert fetched["lookahead", "auto"] <= 1.005 * optimum
        longer = [fetched["lookahead", window] for window in windows]
        assert longer == sorted(longer, reverse=True) and longer[0] < fetched["lru", 1]
        assert longer[-1] <= 1.005 * optimum


# ---- from a budget to slots and window -----------------------------------------------------------


def moved(trace, batch_size, slots, window):
    """Rows fetched and written back by each batch."""
    planner = LookAheadPlanner(trace.group, slots, policies.lookahead(), window)
    source, rows = trace.batches(batch_size), []
    while True:
        while planner.wants_batch() and (batch := next(source, None)) is not None:
            planner.observe(*batch)
        if not planner.ahead:
            return np.array(rows)
        planned = planner.plan()
        rows.append(len(planned.fetched) + len(planned.victims))


@pytest.fixture(scope="module")
def skewed():
    """1,600 samples of 4 fields with 5,000 rows each, a few of them hot."""
    random = np.random.default_rng(1)
    return load_trace([(5000 * random.random((1600, 4)) ** 4).astype(int)])


@pytest.mark.parametrize("link", [45, 70, 100])
def test_size_is_the_smallest_that_feeds_the_step(skewed, link):
    answer = size(skewed, 16, row_bytes=10, bandwidth=link * 10 * 1000, step_time=1e-3, percentile=95, max_window=64)
    assert answer.rows_a_step == pytest.approx(link) and answer.batches == 80

    def fed(slots, window):
        judged = moved(skewed, 16, slots, window)[20:]
        return judged.mean() <= link and np.percentile(judged, 95) <= link

    assert fed(answer.slots, answer.window)
    assert not fed(answer.slots, answer.window - 1) or answer.window == 1
    smallest = max(len(set(zip(*_rows(batch), strict=True))) for batch in skewed.batches(16))
    assert answer.slots == smallest or not fed(int(answer.slots / 1.0101), 64)
    assert answer.device_bytes == answer.slots * 27
    at_answer = [point for point in answer.curve if (point.slots, point.window) == (answer.slots, answer.window)]
    judged = moved(skewed, 16, answer.slots, answer.window)[20:]
    assert at_answer[0].rows_moved == judged.mean() and at_answer[0].rows_moved_high == np.percentile(judged, 95)
    for point in answer.curve:
        assert point.fits == fed(point.slots, point.window)
    assert f"slots={answer.slots}, window={answer.window}:" in str(answer)


def _rows(batch):
    ids, starts, tables = batch
    return np.repeat(tables, np.diff(starts)).tolist(), ids.tolist()


def test_a_larger_link_needs_no_more_slots(skewed):
    slots = [size(skewed, 16, 10, bandwidth=10 * link, step_time=1.0, max_window=64).slots for link in (50, 70, 90)]
    assert slots == sorted(slots, reverse=True) and slots[0] > slots[-1]


def test_size_for_a_budget_of_memory(skewed):
    answer = size(skewed, 16, row_bytes=83, device_memory=60_000)
    assert answer.slots == 600 and answer.device_bytes == 60_000 and answer.rows_a_step is None
    enough = 1.01 * moved(skewed, 16, 600, 100)[20:].mean()
    assert moved(skewed, 16, 600, answer.window)[20:].mean() <= enough
    assert moved(skewed, 16, 600, answer.window - 1)[20:].mean() > enough
    whole = size(skewed, 16, row_bytes=83, device_memory=1e9)
    assert whole.slots == skewed.rows and whole.window == 1 and "nothing is evicted" in whole.answer


def test_size_when_nothing_suffices(skewed):
    memory = size(skewed, 16, row_bytes=83, device_memory=1000)
    assert memory.slots is memory.window is None
    assert memory.answer.startswith("None: the budget holds 10 slots, and a batch has ")
    link = size(skewed, 16, row_bytes=10, bandwidth=10, step_time=1.0)
    assert link.slots is None and "all rows of the trace" in link.answer and "times the bandwidth" in link.answer
    both = size(skewed, 16, row_bytes=10, bandwidth=500, step_time=1.0, device_memory=100 * 27)
    assert both.slots is None and both.answer.endswith("or more memory") and "with 100 slots" in both.answer
    assert size(skewed, 16, row_bytes=10, bandwidth=500, step_time=1.0, device_memory=5000 * 27).slots <= 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "size needs a budget"),
        ({"bandwidth": 1.0}, "each needs the other"),
        ({"step_time": 1.0, "device_memory": 1.0}, "each needs the other"),
        ({"device_memory": -1.0}, "device_memory=-1.0"),
        ({"device_memory": 1e9, "percentile": 0}, "percentile=0"),
        ({"device_memory": 1e9, "warmup_batches": 100}, "the trace has 100 batches"),
    ],
)
def test_bad_budgets(skewed, arguments, message):
    with pytest.raises(ValueError, match=message):
        size(skewed, 16, 10, **arguments)


# ---- traces --------------------------------------------------------------------------------------


def same_trace(found, expected):
    """Whether two traces look up the same ids in the same order, whatever their features are called."""
    return len(found.ids) == len(expected.ids) and all(
        np.array_equal(found.values[found.tables[mine]][found.ids[mine]], expected.values[expected.tables[its]][ids])
        for mine, (its, ids) in zip(found.ids, expected.ids.items(), strict=True)
    )


@pytest.fixture
def ids():
    return np.random.default_rng(3).choice([0, 3, 5, 2**32, 2**63 - 1], (300_000, 3))[:70_000]


def test_numbers_are_dense_ascending_and_counted(ids):
    trace = load_trace(iter([ids[:999], ids[999:]]))
    for field in range(3):
        values, numbers, counts = np.unique(ids[:, field], return_inverse=True, return_counts=True)
        np.testing.assert_array_equal(trace.values[str(field)], values)
        np.testing.assert_array_equal(trace.ids[str(field)][:, 0], numbers)
        np.testing.assert_array_equal(trace.counts[str(field)], counts)
    assert trace.ids["0"].dtype == np.int32 and trace.samples == 70_000 and trace.lookups == 210_000


def test_the_same_trace_in_every_format(ids, tmp_path):
    expected = load_trace([ids])
    np.savez(tmp_path / "trace.npz", ids=ids)
    names = ["a", "b", "c"]
    columns = {name: ids[:, field] for field, name in enumerate(names)}
    table = pyarrow.table({**columns, "label": np.zeros(len(ids)), "text": ["x"] * len(ids)})
    pyarrow.parquet.write_table(table, tmp_path / "trace.parquet", row_group_size=20_000)
    assert same_trace(load_trace(tmp_path / "trace.npz"), expected)
    assert same_trace(load_trace(str(tmp_path / "trace.parquet")), expected)
    assert same_trace(
        load_trace({name: column[i : i + 9] for name, column in columns.items()} for i in range(0, 70_000, 9)), expected
    )
    assert same_trace(load_trace(tmp_path / "trace.parquet", columns=["c", "a"]), load_trace([ids[:, [2, 0]]]))
    assert same_trace(load_trace(tmp_path / "trace.npz", columns=["1"]), load_trace([ids[:, 1:2]]))
    for samples in (1, 66_000):
        for source in (tmp_path / "trace.npz", tmp_path / "trace.parquet", [ids], ids):
            assert same_trace(load_trace(source, samples=samples), load_trace([ids[:samples]]))


def test_a_null_in_parquet_is_a_value_of_its_own(tmp_path):
    table = pyarrow.table({"user": pyarrow.array([3, None, 0, None], pyarrow.int32())})
    pyarrow.parquet.write_table(table, tmp_path / "trace.pq")
    trace = load_trace(tmp_path / "trace.pq")
    assert trace.values["user"].tolist() == [MISSING, 0, 3] and trace.ids["user"].ravel().tolist() == [2, 0, 1, 0]


def criteo_line(number, categories):
    integers = [str(number), "", "-1", *["7"] * 10]
    return "\t".join(["1", *integers, *categories, *["00ff00ff"] * (26 - len(categories))])


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_criteo(tmp_path, compress, ending):
    lines = [
        criteo_line(n, ["" if n % 3 == 0 else f"{n % 5:08x}", "ABCDEF01" if n % 2 else "abcdef01"]) for n in range(99)
    ]
    content = (ending.join(lines) + ending * compress).encode()  # one of the two without a newline at its end
    path = tmp_path / ("log.txt.gz" if compress else "log.tsv")
    path.write_bytes(gzip.compress(content) if compress else content)
    trace = load_trace(path)
    assert list(trace.ids) == [f"C{field}" for field in range(1, 27)] and trace.samples == 99
    assert trace.values["C1"][trace.ids["C1"][:, 0]].tolist() == [MISSING if n % 3 == 0 else n % 5 for n in range(99)]
    assert trace.values["C2"].tolist() == [0xABCDEF01] and trace.values["C26"].tolist() == [0xFF00FF]
    some = load_trace(path, columns=["I1", "I2", "I3", "C2"], samples=50)
    assert some.values["I1"][some.ids["I1"][:, 0]].tolist() == list(range(50))
    assert some.values["I2"].tolist() == [MISSING] and some.values["I3"].tolist() == [-1]


def test_criteo_in_more_than_one_block(tmp_path, monkeypatch):
    (tmp_path / "log").write_text("\n".join(criteo_line(n, [f"{n:x}"]) for n in range(400)))
    monkeypatch.setattr("jaxcache.traces._BYTES_AT_ONCE", 1000)
    trace = load_trace(tmp_path / "log", format="criteo")
    assert trace.values["C1"][trace.ids["C1"][:, 0]].tolist() == list(range(400))


@pytest.mark.slow
def test_the_whole_criteo_log_against_the_reader_of_the_example():
    if not (REAL_DATA / "criteo_80k.tsv.gz").exists():
        pytest.skip("needs shared/data/criteo_80k.tsv.gz beside the checkout")
    from criteo import read_criteo

    log, trace = read_criteo(REAL_DATA / "criteo_80k.tsv.gz"), load_trace(REAL_DATA / "criteo_80k.tsv.gz")
    for field, ids in zip(log.ids, trace.ids.values(), strict=True):
        pairs = np.unique(np.stack([field, ids[:, 0]]), axis=1)  # one id each way
        assert len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1]


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "the trace holds no sample"),
        ([{"user": []}], ValueError, "the trace holds no sample"),
        ([[[1], [2]], [[3], [-4]]], ValueError, "batch 1: feature '0' has id -4 in sample 3; ids must lie in 0 to 2"),
        ([[[1.0]]], TypeError, r"feature '0' are float64; ids must be integers \(ids.astype"),
        ([np.array([[2**63]], np.uint64)], ValueError, "has id 9223372036854775808 in sample 0"),
        ([[1, 2]], ValueError, r"batch 0 is an array of shape \(2,\)"),
        ([{"a": [1, 2], "b": [1]}], ValueError, "different numbers of samples: {'a': 2, 'b': 1}"),
        ([{"a": [1]}, {"b": [1]}], ValueError, "batch 1 has features .* they must agree"),
        ([{"a": [[1, 2]]}, {"a": [[1]]}], ValueError, "batch 1 has features .* they must agree"),
        ([{"a": np.zeros((1, 1, 1), int)}], ValueError, r"ids of shape \(1, 1, 1\); expected \[samples\]"),
        ([{"a": [True]}], TypeError, "are bool"),
    ],
)
def test_bad_batches(batches, error, message):
    with pytest.raises(error, match=message):
        load_trace(batches)


def test_bad_options():
    with pytest.raises(ValueError, match="has no feature 'b' to give a table"):
        load_trace([{"a": [1]}], tables={"b": "t"})
    with pytest.raises(ValueError, match="no table 'b': its tables are a"):
        load_trace([{"a": [1]}], rows={"b": 2})
    with pytest.raises(ValueError, match="table 'a' has id 2 and is declared to hold 2 rows"):
        load_trace([{"a": [2]}], rows={"a": 2})
    with pytest.raises(ValueError, match="batch 0 has no column 'b': it has a"):
        load_trace([{"a": [1]}], columns=["b"])
    with pytest.raises(ValueError, match="samples=0"):
        load_trace([{"a": [1]}], samples=0)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"id": np.zeros((2, 2), int)}, "there is no array `ids` but id: np.savez"),
        ({"ids": np.zeros(2, int)}, r"`ids` has shape \(2,\); expected \[samples, fields\]"),
        ({"ids": np.zeros((2, 2))}, "are float64"),
        ({"ids": np.array([[1, 2], [-1, 0]])}, "trace.npz: feature '0' has id -1 in sample 1"),
        ({"ids": np.zeros((0, 2), int)}, "holds no sample"),
        ({"ids": np.array([[1]]), "cardinality": np.array([1])}, "table '0' has id 1 and is declared to hold 1 rows"),
        ({"ids": np.array([[1]]), "cardinality": np.array([1, 2])}, "`cardinality` is int64"),
        ({"ids": np.array([[None]])}, "trace.npz: Object arrays cannot be loaded"),
    ],
)
def test_bad_npz(tmp_path, arrays, message):
    np.savez(tmp_path / "trace.npz", **arrays)
    with pytest.raises((ValueError, TypeError), match=message):
        load_trace(tmp_path / "trace.npz")


def test_files_that_are_not_what_their_names_say(tmp_path):
    for name in ("trace.npz", "trace.parquet", "trace.tsv"):
        (tmp_path / name).write_text("hello\n")
        with pytest.raises(ValueError, match=rf"{name}"):
            load_trace(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_trace(tmp_path / "none.xyz")
    (tmp_path / "trace.xyz").touch()
    with pytest.raises(ValueError, match=r"trace.xyz: the name does not tell the format \(npz: .npz; criteo: .tsv"):
        load_trace(tmp_path / "trace.xyz")
    with pytest.raises(ValueError, match="the formats are npz, criteo, parquet"):
        load_trace(tmp_path / "trace.xyz", format="csv")


def test_bad_parquet(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"x": [0.5], "text": ["a"]}), tmp_path / "trace.parquet")
    with pytest.raises(ValueError, match="has no column of integers, only x, text"):
        load_trace(tmp_path / "trace.parquet")
    with pytest.raises(TypeError, match="column 'x' is double; ids must be integers"):
        load_trace(tmp_path / "trace.parquet", columns=["x"])
    pyarrow.parquet.write_table(pyarrow.table({"x": [3, -2]}), tmp_path / "trace.parquet")
    with pytest.raises(ValueError, match="feature 'x' has id -2 in sample 1"):
        load_trace(tmp_path / "trace.parquet")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1\t2", "line 3: expected 40 columns .* found 2"),
        (criteo_line(1, ["xyz"]), "line 3: expected hexadecimal digits.* or nothing in column C1, found 'xyz'"),
        (criteo_line(1, ["", "0123456789abcdef"]), "in column C2, found '0123456789abcdef'"),
        (criteo_line(1, []) + "\t", "found 41"),
    ],
)
def test_bad_criteo(tmp_path, line, message):
    (tmp_path / "log.tsv").write_text("\n".join([criteo_line(1, []), criteo_line(2, []), line, criteo_line(3, [])]))
    with pytest.raises(ValueError, match=f"log.tsv: {message}" if message.startswith("line") else message):
        load_trace(tmp_path / "log.tsv")


def test_bad_integers_of_criteo_matter_where_they_are_read(tmp_path):
    (tmp_path / "log.tsv").write_text(criteo_line("-", []))
    assert load_trace(tmp_path / "log.tsv").samples == 1
    with pytest.raises(ValueError, match="line 1: expected an integer, at most 15 digits, or nothing in column I1"):
        load_trace(tmp_path / "log.tsv", columns=["I1"])


def test_truncated_gzip(tmp_path):
    whole = gzip.compress("\n".join(criteo_line(n, [f"{n * 77:x}"]) for n in range(500)).encode())
    (tmp_path / "log.gz").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"log.gz: the compressed file is truncated or damaged"):
        load_trace(tmp_path / "log.gz")


# ---- the plot ------------------------------------------------------------------------------------


@pytest.mark.parametrize("row_bytes", [None, 68])
def test_plot(skewed, tmp_path, row_bytes):
    records = simulate(skewed, 16, [5, 100, 400], ["lookahead", "lru"], [2], row_bytes=row_bytes)
    plot(records, tmp_path / "curve.svg", title="a title")
    text = (tmp_path / "curve.svg").read_text()
    for expected in (
        OPTIMUM,
        "lookahead auto",
        "lookahead 2",
        "lru",
        UNBOUNDED,
        "rows fetched a batch",
        "a title",
        "400",
    ):
        assert f">{expected}<" in text, expected
    assert ("MB a step" in text) == (row_bytes is not None)
    plot(records, tmp_path / "again.svg", title="a title")
    assert (tmp_path / "again.svg").read_text() == text
    plot(records, tmp_path / "curve.png")
    image = (tmp_path / "curve.png").read_bytes()
    assert image.startswith(b"\x89PNG") and len(image) > 10_000


def test_plots_that_cannot_be(skewed, tmp_path, monkeypatch):
    records = simulate(skewed, 16, [5], ["lru"])
    with pytest.raises(ValueError, match="no capacity holds a batch"):
        plot(records, tmp_path / "curve.png")
    with pytest.raises(ValueError, match=r"ends in .png or .svg, got .*curve.pdf"):
        plot(records, tmp_path / "curve.pdf")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"a plot needs matplotlib: pip install 'jaxcache\[simulate\]'"):
        plot(records, tmp_path / "curve.png")


def test_without_tqdm_and_pyarrow(skewed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert simulate(skewed, 16, [100], ["lru"], progress=True)[1].rows_fetched
    (tmp_path / "trace.parquet").touch()
    with pytest.raises(ImportError, match=r"trace.parquet needs pyarrow: pip install 'jaxcache\[parquet\]'"):
        load_trace(tmp_path / "trace.parquet")
