"""The planner does what a dict and loops do, for every policy, in memory that does not know the size of the tables."""

import copy
import threading
from collections import deque
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

import jaxcache as jc
import oracle
from criteo import read_criteo
from jaxcache import planner as planner_module
from jaxcache import policies
from jaxcache.lookups import CHUNK_LOOKUPS, SMALL_ROWS, by_row, deduplicate
from jaxcache.planner import ABSENT, LookAheadPlanner, ResidentPlanner, Workers

LARGEST = 2**63 - 1
GROUPS = {
    "one table": {"a": 12},
    "several tables": {"a": 3, "b": 1, "c": 8},
    "huge tables": {"a": LARGEST, "b": LARGEST},
    "one huge table": {"a": LARGEST},
}
COUNTED = ("frequency", "static")  # policies that need a count for each row
POLICIES = ("lookahead", "scratchpipe", "lru", "lfu", "no_cache", *COUNTED)


def stack(sizes):
    return jc.Group.stack({name: jc.Table(rows, 1) for name, rows in sizes.items()})


# A batch is a list of features, each a position of a table and its ids. A feature may name the table of another.


@st.composite
def streams(draw, most_batches=16, groups=tuple(GROUPS)):
    """A group and batches of repeated, few and skewed ids, empty ones among them."""
    group = stack(GROUPS[draw(st.sampled_from(groups))])
    tables = []
    for table in group.tables:
        last = table.rows - 1
        # Few distinct ids, at both ends of the table.
        tables.append(sorted({*range(min(6, last + 1)), *(max(last - back, 0) for back in range(6))}))
    features = draw(st.lists(st.integers(0, len(tables) - 1), min_size=1, max_size=3))
    if draw(st.booleans()):
        ids = st.tuples(*(st.lists(st.sampled_from(tables[table]), max_size=6) for table in features))
        batches = draw(st.lists(ids, min_size=1, max_size=most_batches))
    else:
        # Full batches, with more rows than slots, of which hypothesis alone draws few.
        random = np.random.default_rng(draw(st.integers(0, 2**32)))
        lookups = draw(st.integers(1, 3))
        batches = [[random.choice(tables[table], lookups).tolist() for table in features] for _ in range(most_batches)]
    return group, [list(zip(features, batch, strict=True)) for batch in batches]


def rows_of(batch):
    """The rows of a batch, lookup by lookup, as pairs of table and id."""
    return [(table, row) for table, ids in batch for row in ids]


def most_unique(batches):
    return max(1, *(len(set(rows_of(batch))) for batch in batches))


def flat(batch):
    """What `observe` takes."""
    starts = np.cumsum([0, *(len(ids) for _, ids in batch)])
    ids = np.array([row for _, ids in batch for row in ids], np.int64)
    return ids, starts, np.array([table for table, _ in batch], np.int64)


def as_dict(planned, group):
    """A planned batch in the terms of the oracle."""
    plain = {name: getattr(planned, name).tolist() for name in ("unique_slots", "missed", "slots")}
    for name in ("fetched", "victims"):
        tables, ids = group.locate(getattr(planned, name))
        plain[name] = list(zip(tables.tolist(), ids.tolist(), strict=True))
    return {**plain, "wait_for": planned.wait_for}


def plan_all(planner, batches):
    """Plans all batches, given as `observe` takes them, as every caller does. Yields `(observed, planned)` of each."""
    source, observed = iter(batches), deque()
    while True:
        while planner.wants_batch() and (batch := next(source, None)) is not None:
            observed.append(planner.observe(*batch))
        if not planner.ahead:
            return
        yield observed.popleft(), planner.plan()


def fetches(planner, batches):
    return sum(len(planned.fetched) for _, planned in plan_all(planner, batches))


def make_policy(name, group, seed=0):
    """A policy, with counts from 0 to 4 where it needs some, so that many are equal."""
    if name not in COUNTED:
        return getattr(policies, name)()
    random = np.random.default_rng(seed)
    rows = {table: group.tables[group.index(table)].rows for table in group.names}
    return getattr(policies, name)({table: random.integers(0, 5, rows[table]) for table in rows})


def make_pair(group, slots, policy, memory=0, resident=()):
    """A planner and its oracle. `resident` are triples of row, slot and lookups."""
    counts = {
        (table, row): count
        for table, name in enumerate(group.names if policy.counts else ())
        for row, count in enumerate(policy.counts[name].tolist())
    }
    warm = zip(*(part.tolist() for part in group.locate(policy.warm_keys(group, slots))), strict=True)
    rows, places, lookups = zip(*resident, strict=True) if resident else ((), (), ())
    keys = np.array([group.keys(table, np.array([row]))[0] for table, row in rows], np.int64)
    arrays = (keys, np.array(places, np.int64), np.array(lookups, np.int64))
    planner = LookAheadPlanner(group, slots, policy, window="all", memory=memory, resident=arrays if resident else None)
    pinned = set(warm) if policy.passes else None
    return planner, oracle.PlannerOracle(slots, policy.order, counts, pinned, memory, resident)


def assert_same_plan(planner, watcher, group):
    """Both plan; where several victims are equally good the oracle takes the planner's."""
    planned = planner.plan()
    found = as_dict(planned, group)
    assert found == watcher.plan(found["victims"])
    return planned


# Against the oracle


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=150)
@given(st.data())
def test_every_decision_is_that_of_a_dict_and_loops(name, data):
    """From cold and warm caches, under any schedule of observations."""
    groups = ("one table", "several tables") if name in COUNTED else tuple(GROUPS)
    group, batches = data.draw(streams(groups=groups))
    slots = most_unique(batches) + data.draw(st.integers(0, 4))
    policy = make_policy(name, group, data.draw(st.integers(0, 100)))
    known = sorted({row for batch in batches for row in rows_of(batch)})
    rows = data.draw(st.lists(st.sampled_from(known), unique=True, max_size=slots)) if known else []
    lookups = data.draw(st.lists(st.integers(0, 6), min_size=len(rows), max_size=len(rows)))
    resident = list(zip(rows, data.draw(st.permutations(range(len(rows)))), lookups, strict=True))
    planner, watcher = make_pair(group, slots, policy, data.draw(st.integers(0, 6)), resident)
    lead = data.draw(st.lists(st.integers(0, 5), min_size=len(batches), max_size=len(batches)))
    observed, victims, waits = 0, 0, False
    for number in range(len(batches)):
        for batch in batches[observed : number + 1 + lead[number]]:
            planner.observe(*flat(batch))
            watcher.observe(rows_of(batch))
            observed += 1
        planned = assert_same_plan(planner, watcher, group)
        victims, waits = victims + len(planned.victims), waits or planned.wait_for != ABSENT
    event(f"victims: {victims > 0}")
    event(f"waits: {waits}")


@pytest.mark.parametrize("name", ["lookahead", "lru", "lfu"])
def test_decisions_stay_right_while_the_planner_grows(name):
    """A stream of which one window alone holds more than the planner starts with."""
    group, random, window = stack({"a": 700, "b": 2**60}), np.random.default_rng(0), 20
    batches = [
        [(0, random.integers(0, 700, count).tolist()), (1, (2**59 + random.integers(0, 700, count)).tolist())]
        for count in random.integers(40, 250, 2 * window)
    ]
    planner, watcher = make_pair(group, most_unique(batches) + 10, make_policy(name, group), memory=5)
    before = nbytes(planner)
    for number in range(len(batches)):
        for batch in batches[: window + 1] if number == 0 else batches[number + window : number + window + 1]:
            planner.observe(*flat(batch))
            watcher.observe(rows_of(batch))
        assert_same_plan(planner, watcher, group)
    assert nbytes(planner) > 2 * before


@pytest.mark.parametrize("name", ["lookahead", "lru", "lfu", "frequency"])
def test_rows_that_are_wanted_again_and_again_leave_nothing_behind(name):
    """A long stream, most of whose rows stay in the cache and change places there with every batch."""
    group, random = stack({"a": 400}), np.random.default_rng(1)
    planner, watcher = make_pair(group, 300, make_policy(name, group))
    sizes = []
    for number in range(600):
        cold = 4 if number % 150 < 50 else 0  # long times without victims, over which rows lie unused
        rows = [*random.integers(0, 250, 200).tolist(), *random.integers(250, 400, cold).tolist()]
        planner.observe(*flat([(0, rows)]))
        watcher.observe(rows_of([(0, rows)]))
        assert_same_plan(planner, watcher, group)
        sizes.append(nbytes(planner))
    assert watcher.evictions > 100
    assert max(sizes[300:]) < max(sizes[:300]) + 1000


@pytest.mark.parametrize("slots", [3, 4])
def test_old_uses_go_on_counting_less_for_as_long_as_a_run_lasts(slots):
    """What a use counts doubles with every six turnovers of the cache: here 200 times, beyond what a float32 holds."""
    group, random = stack({"a": 12}), np.random.default_rng(slots)
    planner, watcher = make_pair(group, slots, policies.lookahead(), memory=3)
    while watcher.evictions < 200 * 6 * slots:
        batch = [(0, (np.minimum(random.zipf(1.3, random.integers(1, slots)), 12) - 1).tolist())]
        planner.observe(*flat(batch))
        watcher.observe(rows_of(batch))
        if planner.ahead == 2:
            assert_same_plan(planner, watcher, group)


@pytest.mark.parametrize("name", POLICIES)
@given(st.data())
def test_every_row_is_resident_when_its_batch_is_planned(name, data):
    """The promise itself, from what a cache would hold after each plan; nothing of the oracle's policy."""
    groups = ("one table", "several tables") if name in COUNTED else tuple(GROUPS)
    group, batches = data.draw(streams(groups=groups))
    slots = most_unique(batches) + data.draw(st.integers(0, 4))
    policy, window = make_policy(name, group), data.draw(st.sampled_from([1, 2, 5, "auto", "all"]))
    planner, holds = LookAheadPlanner(group, slots, policy, window), {}
    for batch, (observed, planned) in zip(batches, plan_all(planner, map(flat, batches)), strict=True):
        plan, rows = as_dict(planned, group), rows_of(batch)
        assert len(set(plan["slots"])) == len(plan["slots"]) == len(plan["fetched"])
        free = len(plan["slots"]) - len(plan["victims"])
        assert [holds[slot] for slot in plan["slots"][free:]] == plan["victims"]
        assert not set(plan["slots"][:free]) & set(holds)
        passing = set(plan["victims"]) & set(rows)
        assert policy.passes or not passing
        assert passing <= set(plan["fetched"])
        holds.update(zip(plan["slots"], plan["fetched"], strict=True))
        assert len(set(holds.values())) == len(holds)  # no row sits in two slots
        assert all(0 <= slot < slots for slot in holds)
        assert [holds[plan["unique_slots"][place]] for place in observed.inverse] == rows
        assert len(set(plan["unique_slots"])) == len(plan["unique_slots"])


# How far a plan looks


@given(streams(), st.integers(0, 4), st.integers(1, 6))
def test_a_window_of_batches_is_never_exceeded_and_full_whenever_a_victim_goes(stream, spare, window):
    group, batches = stream
    planner, source = LookAheadPlanner(group, most_unique(batches) + spare, window=window), iter(batches)
    for left in range(len(batches), 0, -1):
        while planner.wants_batch() and (batch := next(source, None)) is not None:
            planner.observe(*flat(batch))
        ahead = planner.ahead
        assert ahead <= window and not planner.limited
        assert ahead == min(window, left) or not len(planner.plan().victims)
        if planner.ahead == ahead:
            planner.plan()


@pytest.mark.parametrize("most", [1, 3, 1024])
def test_auto_looks_until_it_need_not_or_may_not(most):
    group, random, ends = stack({"a": 40}), np.random.default_rng(most), set()
    for _ in range(40):
        slots = int(random.integers(2, 5))
        planner = LookAheadPlanner(group, slots, window="auto", max_window=most)
        watcher = oracle.PlannerOracle(slots, "aged")
        source = iter([[(0, random.integers(0, 40, random.integers(1, slots + 1)).tolist())] for _ in range(60)])
        while True:
            while planner.wants_batch() and (batch := next(source, None)) is not None:
                assert planner.ahead == 0 or not watcher.looks_far_enough()
                assert planner.ahead < most
                planner.observe(*flat(batch))
                watcher.observe(rows_of(batch))
            if not planner.ahead:
                break
            if not planner.wants_batch():
                assert planner.limited != watcher.looks_far_enough()
                assert planner.limited <= (planner.ahead == most)
            ends.add((planner.limited, planner.ahead > 1, planner.wants_batch()))
            assert_same_plan(planner, watcher, group)
    assert (True, most > 1, False) in ends if most < 1024 else (False, True, False) in ends


@given(streams(), st.integers(0, 4))
def test_auto_stops_only_where_looking_farther_changes_nothing_or_four_caches_of_rows_are_ahead(stream, spare):
    """The rows that stay are those of the whole future, unless the batches ahead hold 4 * slots distinct rows."""
    group, batches = stream
    slots = most_unique(batches) + spare
    planner, observed, compared = LookAheadPlanner(group, slots), 0, 0
    for number in range(len(batches)):
        while planner.wants_batch() and observed < len(batches):
            planner.observe(*flat(batches[observed]))
            observed += 1
        farther = copy.deepcopy(planner)
        for batch in batches[observed:]:
            farther.observe(*flat(batch))
        planned = planner.plan()
        if len({row for batch in batches[number:observed] for row in rows_of(batch)}) < 4 * slots:
            assert sorted(farther.plan().victims) == sorted(planned.victims)
            compared += observed < len(batches) and len(planned.victims) > 0
    event(f"compared: {compared > 0}")


@given(streams(), st.integers(0, 3))
def test_all_looks_at_every_batch_before_the_first_plan(stream, spare):
    group, batches = stream
    planner = LookAheadPlanner(group, most_unique(batches) + spare, window="all")
    for batch in batches:
        assert planner.wants_batch()
        planner.observe(*flat(batch))
    assert planner.wants_batch()


@pytest.mark.parametrize("window", [2, 6, "auto"])
@given(streams(), st.integers(0, 4))
def test_a_plan_that_takes_no_victims_does_not_depend_on_what_is_behind_it(window, stream, spare):
    """Wherever a plan may be made before its window is full, what a faster loader has brought changes nothing."""
    group, batches = stream
    planner, observed = LookAheadPlanner(group, most_unique(batches) + spare, window=window), 0
    for _ in range(len(batches)):
        while planner.wants_batch() and observed < len(batches):
            planner.observe(*flat(batches[observed]))
            observed += 1
        fast = copy.deepcopy(planner)
        planned = planner.plan()
        if not len(planned.victims):
            for batch in batches[observed:]:
                fast.observe(*flat(batch))
            assert as_dict(fast.plan(), group) == as_dict(planned, group)


@pytest.mark.parametrize(("name", "window"), [("scratchpipe", 3), ("lru", 1), ("lfu", 1), ("no_cache", 1)])
def test_a_policy_with_a_window_of_its_own_looks_that_far(name, window):
    group = stack({"a": 100})
    planner = LookAheadPlanner(group, 4, make_policy(name, group), window="all")
    for number in range(12):
        while planner.wants_batch():
            planner.observe(*flat([(0, [4 * number, 4 * number + 1])]))
        assert planner.ahead == (window if number > 2 else planner.ahead) <= window
        planner.plan()


# How many rows move


def random_traces(number, seed):
    """Small traces of up to eight rows and as many batches, and slots for them, some of them as few as can be."""
    random = np.random.default_rng(seed)
    for _ in range(number):
        rows, most = random.integers(2, 9), random.integers(1, 4)
        traces = [random.integers(0, rows, random.integers(0, most + 1)).tolist() for _ in range(random.integers(1, 9))]
        yield traces, max(1, *(len(set(trace)) for trace in traces)) + int(random.integers(0, 3))


SMALL = stack({"a": 8})


def small_fetches(batches, slots, policy, window):
    return fetches(LookAheadPlanner(SMALL, slots, policy, window), [flat([(0, batch)]) for batch in batches])


def test_with_the_whole_future_in_the_window_no_choice_of_rows_moves_fewer():
    for batches, slots in random_traces(3000, seed=0):
        fewest = oracle.fewest_fetches(batches, slots)
        assert small_fetches(batches, slots, policies.lookahead(), "all") == fewest, (batches, slots)


@pytest.mark.parametrize(
    ("name", "naive"),
    [("lookahead", oracle.min_fetches), ("lru", oracle.lru_fetches), ("lfu", oracle.lfu_fetches)],
)
def test_known_policies_move_as_many_rows_as_a_few_lines_of_python_say(name, naive):
    for batches, slots in random_traces(1000, seed=1):
        policy = make_policy(name, SMALL)
        assert small_fetches(batches, slots, policy, "all") == naive(batches, slots), (batches, slots)


@given(streams(), st.integers(0, 4))
def test_without_a_cache_every_unique_row_of_every_batch_is_fetched(stream, spare):
    group, batches = stream
    planner = LookAheadPlanner(group, most_unique(batches) + spare, policies.no_cache())
    for batch, (_, planned) in zip(batches, plan_all(planner, map(flat, batches)), strict=True):
        tables, ids = group.locate(planned.fetched)
        assert sorted(zip(tables.tolist(), ids.tolist(), strict=True)) == sorted(set(rows_of(batch)))


def test_a_static_cache_gives_up_as_many_of_its_coldest_rows_as_pass_through_at_once():
    group = stack({"a": 10})
    policy = policies.static({"a": np.array([0, 1, 2, 3, 4, 5, 6, 0, 0, 0])})
    pinned = policy.warm_keys(group, 6)
    assert pinned.tolist() == [6, 5, 4, 3, 2, 1]
    planner = LookAheadPlanner(group, 6, policy, resident=(pinned, np.arange(6), np.zeros(6, np.int64)))
    stream = [[6, 0], [6, 7, 8], [1, 2, 3], [1, 2], [6, 5, 4, 3]]
    plans = [planned for _, planned in plan_all(planner, [flat([(0, batch)]) for batch in stream])]
    assert [planned.fetched.tolist() for planned in plans] == [[0], [7, 8], [1, 2], [1, 2], []]
    # Row 1 makes room for row 0, which goes home for row 7; row 2 makes room for row 8. They stay two.
    assert [planned.victims.tolist() for planned in plans] == [[1], [0, 2], [7, 8], [1, 2], []]
    assert [planned.wait_for for planned in plans] == [ABSENT, ABSENT, ABSENT, 3, ABSENT]


@dataclass(frozen=True, eq=False)
class Trace:
    """Batches of 512 samples of a real log, as `observe` takes them, and as lists of keys."""

    group: jc.Group
    batches: list
    keys: list


@cache
def real_trace(name):
    path = Path(__file__).parents[2] / "shared/data" / name
    if not path.exists():
        pytest.skip(f"there is no {path}")
    if name.endswith(".npz"):
        with np.load(path) as file:
            ids, rows = file["ids"].T.astype(np.int64), file["cardinality"].tolist()
    else:
        log = read_criteo(path)
        ids, rows = log.ids.astype(np.int64), log.cardinalities
    group = stack({str(number): count for number, count in enumerate(rows)})
    samples = 512
    parts = [ids[:, first : first + samples] for first in range(0, ids.shape[1] - samples + 1, samples)]
    starts, tables = np.arange(len(rows) + 1) * samples, np.arange(len(rows))
    bases = group.bases.astype(np.int64)[:, None]
    return Trace(
        group,
        [(np.ascontiguousarray(part).reshape(-1), starts, tables) for part in parts],
        [(part + bases).reshape(-1).tolist() for part in parts],
    )


REAL = pytest.mark.parametrize(
    ("name", "percent"), [(name, percent) for name in ("clicks.npz", "criteo_80k.tsv.gz") for percent in (5, 10)]
)


@cache
def real_fetches(name, percent, policy, window):
    trace = real_trace(name)
    planner = LookAheadPlanner(trace.group, slots_of(trace, percent), make_policy(policy, trace.group), window)
    return fetches(planner, trace.batches)


def slots_of(trace, percent):
    return -(-trace.group.rows * percent // 100)


@pytest.mark.slow
@REAL
@pytest.mark.parametrize(
    ("policy", "naive"),
    [("lookahead", oracle.min_fetches), ("lru", oracle.lru_fetches), ("lfu", oracle.lfu_fetches)],
)
def test_known_policies_move_as_many_rows_of_a_real_log_as_a_few_lines_of_python_say(policy, naive, name, percent):
    trace = real_trace(name)
    assert real_fetches(name, percent, policy, "all") == naive(trace.keys, slots_of(trace, percent))


@REAL
def test_the_farther_a_plan_looks_the_fewer_rows_of_a_real_log_move(name, percent):
    windows = [real_fetches(name, percent, "lookahead", window) for window in (2, 8, 32, 128, "all")]
    assert windows[0] < real_fetches(name, percent, "lru", "all")
    assert all(longer <= shorter for shorter, longer in pairwise(windows))


@REAL
def test_auto_moves_as_many_rows_of_a_real_log_as_the_whole_future_within_half_a_percent(name, percent):
    assert real_fetches(name, percent, "lookahead", "auto") <= 1.005 * real_fetches(name, percent, "lookahead", "all")


# Unique rows


def assert_numpys_unique_rows(group, batch, observed):
    ids, starts, tables = batch
    parts = [group.keys(table, ids[a:b]) for table, (a, b) in zip(tables, pairwise(starts), strict=True)]
    keys = np.concatenate(parts)
    _, first, inverse, occurrences = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    order = np.argsort(first)  # np.unique sorts by key; a batch's rows come in order of first occurrence
    np.testing.assert_array_equal(observed.occurrences, occurrences[order])
    np.testing.assert_array_equal(order[observed.inverse], inverse)


@given(streams(), st.integers(1, 4))
def test_inverse_and_occurrences_are_those_of_numpy(stream, window):
    group, batches = stream
    planner = LookAheadPlanner(group, most_unique(batches))
    for number, batch in enumerate(batches):
        assert_numpys_unique_rows(group, flat(batch), planner.observe(*flat(batch)))
        if number >= window:
            planner.plan()


SIZES = {"small": 100, "smallest": 1, "last small": SMALL_ROWS, "first large": SMALL_ROWS + 1, "huge": LARGEST}
FEATURES = ["small", "last small", "first large", "huge", "last small", "huge", "smallest", "first large"]


def long_batch(random, lookups):
    """A batch with `lookups` of each feature: half of them of few rows, half of any, the last row of each table too."""
    tables, features = [list(SIZES).index(name) for name in FEATURES], []
    for name in FEATURES:
        ids = random.integers(0, SIZES[name], lookups)
        few = random.integers(0, SIZES[name], 50)
        ids[::2] = random.choice(few, len(ids[::2]))
        ids[lookups // 2 :][:2] = [0, SIZES[name] - 1][: max(0, lookups - lookups // 2)]
        features.append(ids)
    return np.concatenate(features), np.arange(len(FEATURES) + 1) * lookups, np.array(tables)


@pytest.mark.parametrize("lookups", [0, 1, CHUNK_LOOKUPS - 1, CHUNK_LOOKUPS, CHUNK_LOOKUPS + 1, 3 * CHUNK_LOOKUPS + 7])
def test_unique_rows_of_small_and_large_tables_in_one_chunk_and_in_several(lookups):
    group, random = stack(SIZES), np.random.default_rng(lookups)
    planner = LookAheadPlanner(group, 2 * CHUNK_LOOKUPS * len(FEATURES))
    for _ in range(2):  # the second finds rows of the first, and what the first has left in the scratch memory
        batch = long_batch(random, lookups)
        assert_numpys_unique_rows(group, batch, planner.observe(*batch))


def test_a_chunk_of_distinct_rows_and_the_next_of_the_same_ones():
    group, random = stack(SIZES), np.random.default_rng(0)
    planner = LookAheadPlanner(group, 3 * SMALL_ROWS)
    for rows in SIZES.values():
        some = random.choice(min(rows, 2**40), min(rows, CHUNK_LOOKUPS), replace=False, shuffle=True)
        some[:1] = rows - 1
        ids = np.concatenate([some, some[::-1]])
        batch = (ids, np.array([0, len(ids)]), np.array([list(SIZES.values()).index(rows)]))
        assert_numpys_unique_rows(group, batch, planner.observe(*batch))


@pytest.mark.parametrize("lookups", [CHUNK_LOOKUPS // 2, CHUNK_LOOKUPS])
def test_plans_do_not_depend_on_the_number_of_threads(lookups, monkeypatch):
    group, random = stack(SIZES), np.random.default_rng(1)
    batches = [long_batch(random, lookups) for _ in range(5)]
    slots = max(len(LookAheadPlanner(group, 1).observe(*batch).occurrences) for batch in batches)
    calls, results = [], []
    monkeypatch.setattr(
        planner_module, "deduplicate", lambda *arguments: (calls.append(threading.get_ident()), deduplicate(*arguments))
    )
    for threads in (1, 2, 4):
        calls.clear()
        pairs = list(plan_all(LookAheadPlanner(group, slots, window=2, workers=Workers(threads)), batches))
        assert len(calls) == threads * len(batches)  # large enough for all of them
        assert threads == 1 or len(set(calls)) > 1
        assert any(len(planned.victims) for _, planned in pairs)
        results.append([value for pair in pairs for part in pair for value in vars(part).values()])
    for result in results[1:]:
        for one, other in zip(results[0], result, strict=True):
            np.testing.assert_array_equal(one, other)


# Limits


def test_a_batch_of_more_unique_rows_than_slots_is_an_error_that_does_no_harm():
    group = stack({"a": 2000, "b": 2000})
    planner, watcher = make_pair(group, 1000, policies.lookahead(), memory=4)
    planner.observe(*flat([(0, list(range(900)))]))
    watcher.observe(rows_of([(0, list(range(900)))]))
    assert_same_plan(planner, watcher, group)
    planner.observe(*flat([(0, list(range(600))), (1, list(range(634)))]))
    before = [array.copy() for array in arrays_of(planner)]
    for _ in range(2):
        with pytest.raises(jc.TooFewSlots, match=r"batch 1 needs 1,234 slots .* the cache has 1,000: .*slots=1234"):
            planner.plan()
        for one, other in zip(before, arrays_of(planner), strict=True):
            np.testing.assert_array_equal(one, other)
    assert issubclass(jc.TooFewSlots, ValueError)


@pytest.mark.parametrize("window", [3, "auto"])
def test_a_batch_that_cannot_be_planned_asks_for_no_others(window):
    planner = LookAheadPlanner(stack({"a": 10}), 2, window=window)
    planner.observe(*flat([(0, [1, 2, 3])]))
    assert not planner.wants_batch()


def test_batches_without_lookups_and_the_largest_ids():
    group = stack({"a": LARGEST, "b": LARGEST})
    planner, watcher = make_pair(group, 2, policies.lookahead(), memory=3)
    last = LARGEST - 1
    batches = [
        [(0, []), (1, [])],
        [(0, [last, last]), (1, [last])],
        [(0, []), (1, [])],
        [(0, [0, 0]), (1, [last])],
        [(0, [last]), (1, [0])],
    ]
    for batch in batches:
        planner.observe(*flat(batch))
        watcher.observe(rows_of(batch))
    plans = [assert_same_plan(planner, watcher, group) for _ in batches]
    fetched = [as_dict(planned, group)["fetched"] for planned in plans]
    assert fetched == [[], [(0, last), (1, last)], [], [(0, 0)], [(0, last), (1, 0)]]
    assert plans[-1].wait_for == 3


# Memory


def arrays_of(planner):
    """All arrays that it holds."""
    values = []
    for value in vars(planner).values():
        values += [value] if isinstance(value, np.ndarray) else list(value) if hasattr(value, "__len__") else []
    return [value for value in values if isinstance(value, np.ndarray)]


def nbytes(planner):
    """Bytes of those arrays, and of those that they are views of."""
    return sum((array if array.base is None else array.base).nbytes for array in arrays_of(planner))


def sizes_of_a_long_run(rows, window, batches=150, slots=3000, lookups=1000):
    """Bytes of a planner after each of many batches of fresh ids, among them ids of the batch before."""
    group, random = stack({"a": rows}), np.random.default_rng(0)
    planner = LookAheadPlanner(group, slots, window=window, memory=16)
    ranks = random.permutation(batches * lookups).reshape(batches, lookups)
    ranks[1:, :50] = ranks[:-1, -50:]
    ids = ranks * (rows // ranks.size)
    source = ((batch, np.array([0, lookups]), np.array([0])) for batch in ids)
    return [nbytes(planner) for _ in plan_all(planner, source)]


@pytest.mark.parametrize("window", [8, "auto"])
def test_memory_is_of_slots_and_window_and_knows_nothing_of_rows_and_time(window):
    million, huge = sizes_of_a_long_run(10**6, window), sizes_of_a_long_run(2**40, window)
    assert million == huge
    assert million[-30] == million[len(million) // 3]
    # Rows that are resident, wanted in the window or lately evicted: 3,000, up to 12 * 1,000 and 16 * 1,000. An entry,
    # two uses, four cells and occurrences take 32 + 24 + 64 + 4 bytes, doubling may leave half of them free, and 256
    # KiB serve to deduplicate.
    assert million[-30] <= 2 * (3000 + 12_000 + 16_000 + 1000) * 124 + 2**18


def test_a_new_planner_is_small():
    assert nbytes(LookAheadPlanner(stack({"a": 10**15}), 3000)) < 2**19


# Every row resident


@given(streams(), st.integers(1, 5))
def test_the_resident_planner_is_numpy_unique_and_moves_nothing(stream, window):
    group, batches = stream
    group = stack({name: 12 for name in group.names}) if group.rows > 100 else group
    batches = [[(table, [row % 12 for row in ids]) for table, ids in batch] for batch in batches]
    assume(all(row < group.tables[table].rows for batch in batches for table, row in rows_of(batch)))
    planner, observations = ResidentPlanner(group), []
    for number, batch in enumerate(batches):
        assert planner.wants_batch() == (planner.ahead == 0)
        while len(observations) < min(number + window, len(batches)):
            observations.append(planner.observe(*flat(batches[len(observations)])))
            assert_numpys_unique_rows(group, flat(batches[len(observations) - 1]), observations[-1])
        found = planner.plan()
        keys = np.concatenate([group.keys(table, np.array(ids, np.int64)) for table, ids in batch])
        np.testing.assert_array_equal(found.unique_slots[observations[number].inverse], keys)
        assert len(set(found.unique_slots.tolist())) == len(found.unique_slots)
        assert all(len(moved) == 0 for moved in (found.missed, found.fetched, found.slots, found.victims))
        assert found.wait_for == ABSENT


@pytest.mark.parametrize("lookups, unique, bound", [(0, 0, 1), (1, 1, 1), (50, 7, 9), (3000, 40, 40), (20, 0, 3)])
def test_lookups_by_row_are_a_stable_sort(lookups, unique, bound):
    random = np.random.default_rng(lookups)
    inverse = random.integers(0, unique + 1, lookups).astype(np.int32)
    inverse[inverse == unique] = bound + random.integers(0, 2)  # those of no row
    occurrences = np.bincount(inverse, minlength=bound)[:unique].astype(np.int32)
    order, starts = by_row(inverse, occurrences, bound)
    np.testing.assert_array_equal(order, np.argsort(inverse, kind="stable"))
    np.testing.assert_array_equal(starts, np.searchsorted(np.sort(inverse), np.arange(bound + 1)))
    assert order.dtype == starts.dtype == np.int32
