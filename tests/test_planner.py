"""The planner does what a dict and loops do, in memory that does not know the size of the tables."""

import copy

import numpy as np
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

import jaxcache as jc
import oracle
from jaxcache.planner import ABSENT, LookAheadPlanner, ResidentPlanner

LARGEST = 2**63 - 1
GROUPS = {
    "one table": {"a": 12},
    "several tables": {"a": 3, "b": 1, "c": 8},
    "huge tables": {"a": LARGEST, "b": LARGEST},
    "one huge table": {"a": LARGEST},
}


def stack(sizes):
    return jc.Group.stack({name: jc.Table(rows, 1) for name, rows in sizes.items()})


# A batch is a list of features, each a position of a table and its ids. A feature may name the table of another.


@st.composite
def streams(draw, most_batches=16):
    """A group and batches of repeated, few and skewed ids, empty ones among them."""
    group = stack(GROUPS[draw(st.sampled_from(list(GROUPS)))])
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
    return max(len(set(rows_of(batch))) for batch in batches)


def observe(planner, batch):
    return planner.observe([np.array(ids, np.int64) for _, ids in batch], [table for table, _ in batch])


def as_dict(planned, group):
    """A planned batch in the terms of the oracle."""
    names = ("inverse", "occurrences", "unique_slots", "missed", "slots")
    plain = {name: getattr(planned, name).tolist() for name in names}
    for name in ("fetched", "victims"):
        tables, ids = group.locate(getattr(planned, name))
        plain[name] = list(zip(tables.tolist(), ids.tolist(), strict=True))
    return {**plain, "wait_for": planned.wait_for}


def run(planner, batches, window, choose=None, watcher=None):
    """Plans all batches as the pipeline does: the window opens by a batch a plan, and wide before victims are taken.

    `choose(low, high)` replaces the number of batches that are observed before a plan that takes no victims. What
    is observed and planned is told to `watcher` too, in the same order. Returns pairs of both decisions.
    """
    observed, decisions = 0, []
    choose = choose or (lambda low, high: low)

    def observe_until(count):
        nonlocal observed
        while observed < min(count, len(batches)):
            observe(planner, batches[observed])
            if watcher:
                watcher.observe(rows_of(batches[observed]))
            observed += 1

    for number in range(len(batches)):
        observe_until(choose(min(2 * number + 1, number + window), number + window))
        if planner.needs_window():
            observe_until(number + window)
        decisions.append((planner.plan(), watcher.plan() if watcher else None))
    return decisions


# Against the oracle


@settings(max_examples=400)
@given(streams(), st.integers(0, 4), st.integers(1, 6), st.integers(0, 6), st.data())
def test_every_decision_is_that_of_a_dict_and_loops(stream, spare, window, memory, data):
    """Under any schedule of observations: slots, misses, victims, and the write-backs to wait for."""
    group, batches = stream
    slots = max(most_unique(batches) + spare, 1)
    planner, watcher = LookAheadPlanner(group, slots, window, memory), oracle.PlannerOracle(slots, memory)
    schedule = data.draw(st.lists(st.integers(0, window), min_size=len(batches), max_size=len(batches)))
    lead = iter(schedule)
    decisions = run(planner, batches, window, lambda low, high: max(low, high - next(lead)), watcher)
    for found, expected in decisions:
        assert as_dict(found, group) == expected
    event(f"victims: {any(len(found.victims) for found, _ in decisions)}")
    event(f"waits: {any(found.wait_for != ABSENT for found, _ in decisions)}")


@pytest.mark.parametrize("window", [8, 11])
def test_decisions_stay_right_while_the_planner_grows(window):
    """A stream of which one window alone holds more than the planner starts with."""
    group, random = stack({"a": 700, "b": 2**60}), np.random.default_rng(0)
    batches = [
        [(0, random.integers(0, 700, count).tolist()), (1, (2**59 + random.integers(0, 700, count)).tolist())]
        for count in random.integers(40, 250, 20)
    ]
    slots = most_unique(batches) + 10
    planner, watcher = LookAheadPlanner(group, slots, window, 5), oracle.PlannerOracle(slots, 5)
    before = nbytes(planner)
    for found, expected in run(planner, batches, window, watcher=watcher):
        assert as_dict(found, group) == expected
    assert nbytes(planner) > 2 * before


@given(streams(), st.integers(0, 4), st.integers(1, 6))
def test_every_row_is_resident_when_its_batch_is_planned(stream, spare, window):
    """The promise itself, from what a cache would hold after each plan; nothing of the oracle's policy."""
    group, batches = stream
    slots = max(most_unique(batches) + spare, 1)
    planner, holds = LookAheadPlanner(group, slots, window), {}
    for (found, _), batch in zip(run(planner, batches, window), batches, strict=True):
        plan, rows = as_dict(found, group), rows_of(batch)
        assert len(set(plan["slots"])) == len(plan["slots"]) and len(plan["slots"]) == len(plan["fetched"])
        taken = plan["slots"][len(plan["slots"]) - len(plan["victims"]) :]
        assert [holds[slot] for slot in taken] == plan["victims"]
        assert not set(plan["victims"]) & set(rows)
        assert not set(plan["slots"][: len(plan["slots"]) - len(plan["victims"])]) & set(holds)  # these were free
        holds.update(zip(plan["slots"], plan["fetched"], strict=True))
        assert len(set(holds.values())) == len(holds)  # no row sits in two slots
        assert all(0 <= slot < slots for slot in holds)
        assert [holds[plan["unique_slots"][place]] for place in plan["inverse"]] == rows
        assert len(set(plan["unique_slots"])) == len(plan["unique_slots"])


@given(streams(), st.integers(1, 4))
def test_inverse_and_occurrences_are_those_of_numpy(stream, window):
    group, batches = stream
    planner = LookAheadPlanner(group, max(most_unique(batches), 1), window)
    for (found, _), batch in zip(run(planner, batches, window), batches, strict=True):
        keys = [group.keys(table, np.array(ids, np.int64)) for table, ids in batch]
        unique, first, inverse, counts = np.unique(np.concatenate(keys), True, True, True)
        order = np.argsort(first)  # np.unique sorts by key; a batch's rows come in order of first occurrence
        np.testing.assert_array_equal(found.occurrences, counts[order])
        np.testing.assert_array_equal(order[found.inverse], inverse)
        np.testing.assert_array_equal(found.fetched, unique[order][found.missed])


@settings(max_examples=60)
@given(streams(most_batches=7), st.integers(0, 3))
def test_with_the_whole_future_in_the_window_no_policy_moves_fewer_rows(stream, spare):
    group, batches = stream
    slots = max(most_unique(batches) + spare, 1)
    fetched = sum(len(found.fetched) for found, _ in run(LookAheadPlanner(group, slots, 7), batches, 7))
    assert fetched == oracle.fewest_fetches([rows_of(batch) for batch in batches], slots)


@given(streams(), st.integers(0, 4), st.integers(2, 6))
def test_a_plan_that_does_not_need_the_window_does_not_depend_on_it(stream, spare, window):
    """Wherever the pipeline may plan before the window is full, what a faster loader has brought changes nothing."""
    group, batches = stream
    planner, observed, compared = LookAheadPlanner(group, max(most_unique(batches) + spare, 1), window), 0, 0
    for number in range(len(batches)):
        while observed <= number:
            observe(planner, batches[observed])
            observed += 1
        if planner.needs_window():
            for batch in batches[observed : number + window]:
                observe(planner, batch)
            observed = max(observed, min(number + window, len(batches)))
            planner.plan()
        else:
            fast = copy.deepcopy(planner)
            for batch in batches[observed : number + window]:
                observe(fast, batch)
                compared += 1
            assert as_dict(fast.plan(), group) == as_dict(planner.plan(), group)
    event(f"compared: {compared > 0}")


# A start from a warm cache


@given(streams(), st.integers(0, 6), st.integers(1, 5), st.data())
def test_a_warm_start_goes_on_from_the_rows_and_their_order(stream, spare, window, data):
    group, batches = stream
    slots = max(most_unique(batches) + spare, 1)
    known = sorted({row for batch in batches for row in rows_of(batch)})
    rows = data.draw(st.lists(st.sampled_from(known), unique=True, max_size=slots)) if known else []
    places = data.draw(st.permutations(range(len(rows))))
    keys = np.array([group.keys(table, np.array([row]))[0] for table, row in rows], np.int64)
    planner = LookAheadPlanner(group, slots, window, 9, resident=(keys, np.array(places, np.int64)))
    watcher = oracle.PlannerOracle(slots, 9, zip(rows, places, strict=True))
    for found, expected in run(planner, batches, window, watcher=watcher):
        assert as_dict(found, group) == expected


# Limits


def test_a_batch_of_more_unique_rows_than_slots_is_an_error_that_does_no_harm():
    group = stack({"a": 2000, "b": 2000})
    planner, watcher = LookAheadPlanner(group, 1000, 2, memory=4), oracle.PlannerOracle(1000, 4)
    batches = [[(0, list(range(900)))], [(0, list(range(600))), (1, list(range(634)))]]
    for batch in batches:
        observe(planner, batch)
        watcher.observe(rows_of(batch))
    assert as_dict(planner.plan(), group) == watcher.plan()
    before = [array.copy() for array in arrays_of(planner)]
    for _ in range(2):
        with pytest.raises(jc.TooFewSlots, match=r"batch 1 needs 1,234 slots .* the cache has 1,000: .*slots=1234"):
            planner.plan()
        for one, other in zip(before, arrays_of(planner), strict=True):
            np.testing.assert_array_equal(one, other)
    assert issubclass(jc.TooFewSlots, ValueError)


@pytest.mark.parametrize("window", [1, 3])
def test_more_batches_than_the_window_are_refused(window):
    planner = LookAheadPlanner(stack({"a": 10}), 4, window)
    for _ in range(window):
        observe(planner, [(0, [1])])
    with pytest.raises(RuntimeError, match=f"the window is full: {window} batches"):
        observe(planner, [(0, [1])])
    planner.plan()
    observe(planner, [(0, [1])])


def test_batches_without_lookups_and_the_largest_ids():
    group = stack({"a": LARGEST, "b": LARGEST})
    planner, watcher = LookAheadPlanner(group, 2, 2, memory=3), oracle.PlannerOracle(2, 3)
    last = LARGEST - 1
    batches = [
        [(0, []), (1, [])],
        [(0, [last, last]), (1, [last])],
        [(0, []), (1, [])],
        [(0, [0, 0]), (1, [last])],
        [(0, [last]), (1, [0])],
    ]
    decisions = run(planner, batches, 2, watcher=watcher)
    for found, expected in decisions:
        assert as_dict(found, group) == expected
    fetched = [as_dict(found, group)["fetched"] for found, _ in decisions]
    assert fetched == [[], [(0, last), (1, last)], [], [(0, 0)], [(0, last), (1, 0)]]
    assert decisions[-1][0].wait_for == 3 and decisions[0][0].inverse.shape == (0,)


# Memory


def arrays_of(planner):
    return [value for value in vars(planner).values() if isinstance(value, np.ndarray)]


def nbytes(planner):
    return sum(array.nbytes for array in arrays_of(planner))


def run_long(rows, batches=150, slots=3000, lookups=1000, window=8):
    """Bytes of a planner after each of many batches of fresh ids, among them ids of the batch before."""
    group, random = stack({"a": rows}), np.random.default_rng(0)
    planner = LookAheadPlanner(group, slots, window, memory=16)
    ranks = random.permutation(batches * lookups).reshape(batches, lookups)
    ranks[1:, :50] = ranks[:-1, -50:]
    ids = ranks * (rows // ranks.size)
    sizes, observed = [], 0
    for number in range(batches):
        while observed < min(number + window, batches):
            planner.observe([ids[observed]], [0])
            observed += 1
        planner.plan()
        sizes.append(nbytes(planner))
    return sizes


def test_memory_is_of_slots_and_window_and_knows_nothing_of_rows_and_time():
    million, billion = run_long(10**6), run_long(10**9)
    assert million == billion
    # Rows that are resident, wanted in the window or lately evicted: 3,000, 8 * 1,000 and 16 * 1,000. An entry, two
    # uses and four cells take 48 + 32 + 64 bytes, doubling may leave half of them free.
    assert million[-1] == million[len(million) // 3] <= 2 * (3000 + 8000 + 16_000 + 1000) * 144
    assert nbytes(LookAheadPlanner(stack({"a": 10**15}), 3000, 8)) < 300_000


# Every row resident


@given(streams(), st.integers(1, 5))
def test_the_resident_planner_is_numpy_unique_and_moves_nothing(stream, window):
    group, batches = stream
    group = stack({name: 12 for name in group.names}) if group.rows > 100 else group
    batches = [[(table, [row % 12 for row in ids]) for table, ids in batch] for batch in batches]
    assume(all(row < group.tables[table].rows for batch in batches for table, row in rows_of(batch)))
    planner, observed = ResidentPlanner(group), 0
    for number, batch in enumerate(batches):
        while observed < min(number + window, len(batches)):
            observe(planner, batches[observed])
            observed += 1
        assert not planner.needs_window()
        found = planner.plan()
        keys = np.concatenate([group.keys(table, np.array(ids, np.int64)) for table, ids in batch])
        unique, first, counts = np.unique(keys, return_index=True, return_counts=True)
        order = np.argsort(first)
        np.testing.assert_array_equal(found.unique_slots, unique[order])
        np.testing.assert_array_equal(found.unique_slots[found.inverse], keys)
        np.testing.assert_array_equal(found.occurrences, counts[order])
        assert all(len(moved) == 0 for moved in (found.missed, found.fetched, found.slots, found.victims))
        assert found.wait_for == ABSENT
