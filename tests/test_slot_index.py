"""The searches of on-demand mode against dicts, loops and NumPy's sorts, with collisions forced."""

from __future__ import annotations

from collections import Counter
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcache import slot_index

NONE = slot_index.NONE
LAST = 2**31 - 2  # the largest id that there can be

find, insert, build = (jax.jit(function) for function in (slot_index.find, slot_index.insert, slot_index.build))
deduplicate = partial(jax.jit, static_argnums=3)(slot_index.deduplicate)
deduplicate_slots = partial(jax.jit, static_argnums=(1, 2))(slot_index.deduplicate_slots)
by_row = partial(jax.jit, static_argnums=1)(slot_index.by_row)
lowest = partial(jax.jit, static_argnums=3)(slot_index.lowest)


def words(values) -> np.ndarray:
    return np.asarray(values, np.int32).reshape(-1)


@cache
def colliding(size: int) -> list[tuple[int, int]]:
    """40 rows of tables 0 and 1 that take the same way through `size` cells."""
    tables, ids = np.repeat(words([0, 1]), 6_000), np.tile(np.arange(6_000, dtype=np.int32), 2)
    ways = list(zip(*(np.asarray(part).tolist() for part in slot_index._probes(tables, ids, size)), strict=True))
    ((way, _),) = Counter(ways).most_common(1)
    return [(t, i) for t, i, found in zip(tables.tolist(), ids.tolist(), ways, strict=True) if found == way][:40]


def rows_of(size: int) -> st.SearchStrategy:
    """Rows of which many collide, many are alike, and some have extreme ids."""
    anything = st.tuples(st.integers(0, 2), st.sampled_from([0, 1, 2, 3, 7, LAST, LAST - 1]))
    return st.one_of(st.sampled_from(colliding(size)), anything)


def columns(rows) -> tuple[np.ndarray, np.ndarray]:
    """Tables and ids of rows."""
    return words([table for table, _ in rows]), words([id_ for _, id_ in rows])


@cache
def namesakes(size: int) -> list[tuple[int, int]]:
    """Pairs of rows of one id in two tables that take the same way."""
    ids = np.arange(20_000, dtype=np.int32)
    ways = [np.stack(slot_index._probes(np.full_like(ids, table), ids, size)) for table in (0, 1)]
    return [(table, i) for i in np.flatnonzero((ways[0] == ways[1]).all(axis=0)).tolist()[:6] for table in (0, 1)]


# The index


class Slots:
    """A slot table, its index, and a dict that says the same; numbers of rows a call are fixed."""

    WIDTH = 4

    def __init__(self, slots: int):
        self.table = np.full((slots, 3), NONE, np.int32)
        self.index = slot_index.empty(slots)
        self.slot_of: dict[tuple[int, int], int] = {}

    def put(self, rows: dict[tuple[int, int], int]) -> None:
        """Gives rows new slots; those that were there are gone."""
        assert len(rows) <= self.WIDTH
        for row, slot in rows.items():
            self.slot_of = {other: place for other, place in self.slot_of.items() if place != slot}
            self.slot_of[row] = slot
            self.table[slot] = row[0], 0, row[1]
        padding = self.WIDTH - len(rows)
        tables, ids = columns([*rows, *[(0, 0)] * padding])
        slots = words([*rows.values(), *[len(self.table)] * padding])
        valid = np.arange(self.WIDTH) < len(rows)
        self.index = insert(self.index, self.table, tables, ids, slots, valid)

    def check(self, others: list[tuple[int, int]]) -> None:
        """Every row is found where it is, others are not, and some cells stay free: searches end."""
        rows = (list(self.slot_of) + others)[:16]
        rows += [(0, 0)] * (16 - len(rows))
        wanted = np.arange(16) % 5 != 4
        found = find(self.index, self.table, *columns(rows), wanted)
        expected = [self.slot_of.get(row, NONE) if want else NONE for row, want in zip(rows, wanted, strict=True)]
        assert found.tolist() == expected
        cells = np.asarray(self.index.cells)
        assert np.count_nonzero(cells != NONE) <= int(self.index.claimed) <= len(cells) * 5 // 8
        assert cells.max(initial=NONE) < len(self.table)


def test_an_empty_index_has_a_power_of_two_of_cells_at_least_three_a_slot():
    for slots in [0, 1, 5, 6, 16, 100, 341, 342, 1024, 5461, 5462]:
        index = slot_index.empty(slots)
        size = len(index.cells)
        assert size & (size - 1) == 0 and size >= max(16, 3 * slots) and (size == 16 or size < 6 * slots)
        assert (np.asarray(index.cells) == NONE).all() and int(index.claimed) == 0


@settings(max_examples=15)
@given(data=st.data())
def test_long_runs_of_insertions_and_evictions_against_a_dict(data):
    """5 slots and 16 cells: the index is made anew every few insertions."""
    slots = Slots(5)
    rows = rows_of(16)
    rebuilt = 0
    for _ in range(12):
        coming = data.draw(st.lists(rows, max_size=Slots.WIDTH, unique=True))
        coming = [row for row in coming if row not in slots.slot_of]
        places = data.draw(st.permutations(range(5)))[: len(coming)]
        before = int(slots.index.claimed)
        slots.put(dict(zip(coming, places, strict=True)))
        assert int(slots.index.claimed) in (before + len(coming), len(slots.slot_of))
        rebuilt += int(slots.index.claimed) != before + len(coming)
        slots.check(data.draw(st.lists(rows, max_size=6)))


@pytest.mark.parametrize("kind", ["colliding", "ascending", "multiples"])
def test_one_slot_after_another_gets_new_rows_a_thousand_times(kind):
    slots, random = Slots(5), np.random.default_rng(0)
    every = {
        "colliding": colliding(16),
        "ascending": [(0, i) for i in range(300)],
        "multiples": [(1, 2**20 * i) for i in range(300)],
    }[kind]
    rebuilt = 0
    for step in range(300):
        absent = [row for row in every if row not in slots.slot_of]
        coming = [absent[i] for i in random.permutation(len(absent))[: random.integers(0, 5)]]
        before = int(slots.index.claimed)
        slots.put(dict(zip(coming, random.permutation(5)[: len(coming)].tolist(), strict=True)))
        rebuilt += int(slots.index.claimed) < before + len(coming)
        if step % 10 == 0:
            slots.check(absent[:6])
    assert 60 < rebuilt < 300  # 16 cells have room for 10


@settings(max_examples=15)
@given(rows=st.lists(rows_of(16), max_size=5, unique=True), places=st.permutations(range(5)))
def test_an_index_built_from_a_slot_table_finds_all_of_it(rows, places):
    slots = Slots(5)
    for row, slot in zip(rows, places, strict=False):
        slots.table[slot] = row[0], 0, row[1]
        slots.slot_of[row] = slot
    slots.index = build(slots.table)
    assert int(slots.index.claimed) == len(rows) == np.count_nonzero(np.asarray(slots.index.cells) != NONE)
    slots.check(colliding(16)[:8])


def test_nothing_is_found_in_an_empty_index_and_by_no_lookups():
    table = np.full((5, 3), NONE, np.int32)
    rows = columns(colliding(16)[:16])
    assert find(slot_index.empty(5), table, *rows, np.ones(16, bool)).tolist() == [NONE] * 16
    assert find(slot_index.empty(5), table, words([]), words([]), np.zeros(0, bool)).shape == (0,)


def test_a_free_slot_is_not_taken_for_a_row_of_id_minus_one():
    """Slot tables have -1 in all columns of a free slot; what lies behind the missing rows may be anything."""
    table = np.full((5, 3), NONE, np.int32)
    index = insert(slot_index.empty(5), table, words([0]), words([7]), words([2]), np.array([False]))
    assert (np.asarray(index.cells) == NONE).all() and int(index.claimed) == 0


def test_rows_of_other_tables_and_equal_ids_are_told_apart():
    slots = Slots(5)
    slots.put({(0, 7): 0, (1, 7): 1, (2, 7): 2, (7, 0): 3})
    slots.check([(3, 7), (7, 1), (0, 0)])


# Duplicates


def unique_rows(rows, present, bound):
    """`Unique` as lists, by a dict and a loop."""
    positions: dict = {}
    firsts, inverse = [], []
    for lookup, (row, is_present) in enumerate(zip(rows, present, strict=True)):
        if not is_present:
            inverse.append(bound)
            continue
        if row not in positions:
            positions[row] = len(firsts)
            firsts.append(lookup)
        inverse.append(min(positions[row], bound))
    firsts = (firsts + [len(rows)] * bound)[:bound]
    return len(positions), firsts, inverse


def as_lists(unique) -> tuple:
    return int(unique.number), unique.firsts.tolist(), unique.inverse.tolist()


@settings(max_examples=40)
@given(data=st.data(), bound=st.sampled_from([1, 3, 12]))
def test_duplicates_against_a_dict(data, bound):
    kinds = rows_of(32)
    few = data.draw(st.lists(kinds, min_size=1, max_size=12))
    rows = data.draw(st.lists(st.sampled_from(few), min_size=12, max_size=12))
    present = data.draw(st.lists(st.booleans(), min_size=12, max_size=12))
    found = deduplicate(*columns(rows), np.array(present), bound)
    assert as_lists(found) == unique_rows(rows, present, bound)


@pytest.mark.parametrize("case", ["all equal", "none present", "all colliding", "namesakes", "the last alone"])
def test_duplicates_in_extreme_batches(case):
    rows, present = [(1, 9)] * 12, [True] * 12
    if case == "all colliding":
        rows = colliding(32)[:12]
    elif case == "namesakes":
        rows = namesakes(32)
    elif case != "all equal":
        present = [False] * 11 + [case == "the last alone"]
    for bound in (1, 3, 12):
        found = deduplicate(*columns(rows), np.array(present), bound)
        assert as_lists(found) == unique_rows(rows, present, bound)


@pytest.mark.parametrize("bound", [1, 5])
def test_no_lookups_have_no_duplicates(bound):
    found = deduplicate(words([]), words([]), np.zeros(0, bool), bound)
    assert as_lists(found) == (0, [0] * bound, [])
    assert as_lists(deduplicate_slots(words([]), 7, bound)) == (0, [0] * bound, [])
    order, starts = by_row(words([]), bound)
    assert order.tolist() == [] and starts.tolist() == [0] * (bound + 1)


def test_many_duplicates_against_numpy():
    random = np.random.default_rng(0)
    for spread in (3, 500, LAST):
        tables, ids = random.integers(0, 3, 3_000).astype(np.int32), random.integers(0, spread, 3_000).astype(np.int32)
        found = deduplicate(tables, ids, np.ones(3_000, bool), 3_000)
        rows = np.stack([tables, ids], axis=1)
        unique, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
        order = np.argsort(first)
        assert int(found.number) == len(unique)
        np.testing.assert_array_equal(found.firsts[: len(unique)], first[order])
        np.testing.assert_array_equal(found.inverse, np.argsort(order)[inverse.reshape(-1)])


@settings(max_examples=40)
@given(
    slots=st.lists(st.integers(0, 9), min_size=12, max_size=12),
    bound=st.sampled_from([1, 4, 12]),
)
def test_duplicate_slots_against_a_dict(slots, bound):
    """Of 7 slots: what is beyond stands for nothing."""
    found = deduplicate_slots(words(slots), 7, bound)
    assert as_lists(found) == unique_rows(slots, [slot < 7 for slot in slots], bound)


@settings(max_examples=40)
@given(inverse=st.lists(st.integers(0, 5), min_size=12, max_size=12))
def test_lookups_in_the_order_of_their_rows(inverse):
    order, starts = by_row(words(inverse), 5)
    assert order.tolist() == sorted(range(12), key=lambda lookup: inverse[lookup])
    assert starts.tolist() == [sum(row < limit for row in inverse) for limit in range(6)]


def test_lookups_and_rows_too_many_for_one_word_are_sorted_all_the_same():
    """70,000 lookups of as many rows: their pairs do not fit 32 bits, those of 60,000 do."""
    for lookups in (60_000, 70_000):
        inverse = np.random.default_rng(0).permutation(lookups).astype(np.int32)
        inverse[::7] = lookups
        order, starts = by_row(inverse, lookups)
        np.testing.assert_array_equal(order, np.argsort(inverse, kind="stable"))
        np.testing.assert_array_equal(starts, np.searchsorted(np.sort(inverse), np.arange(lookups + 1)))


# The lowest


def check_lowest(keys, among, number: int, bound: int) -> None:
    """Those that are to be found, in any order, and nothing else among as many as there are."""
    found = lowest(tuple(words(key) for key in keys), np.array(among), jnp.int32(number), bound)
    order = np.lexsort((np.arange(len(among)), *reversed(keys)))
    expected = order[np.asarray(among)[order]][:number]
    assert found.shape == (bound,) and sorted(found[: len(expected)].tolist()) == sorted(expected.tolist())


@settings(max_examples=60)
@given(data=st.data(), number=st.integers(1, 8), keyed=st.sampled_from([1, 2]))
def test_the_lowest_keys_against_a_sort(data, number, keyed):
    values = st.sampled_from([0, 1, 1, 2, 5, LAST, LAST + 1])
    keys = [data.draw(st.lists(values, min_size=8, max_size=8)) for _ in range(keyed)]
    among = data.draw(st.lists(st.booleans(), min_size=8, max_size=8))
    check_lowest(keys, among, number, 8)


@pytest.mark.parametrize(
    ("slots", "bound"), [(3_000, 4), (1_023, 3), (1_024, 4), (1_536, 6), (5_000, 1), (2_000, 1_000)]
)
def test_the_lowest_of_many_against_a_sort(slots, bound):
    """Few of many are looked for block by block."""
    random = np.random.default_rng(0)
    for spread in (2, 50, LAST):
        keys = [random.integers(0, spread, slots) for _ in range(2)]
        for share in (0.6, 0.01):
            among = random.random(slots) < share
            among[-1] = True
            for number in {1, bound // 2, bound} - {0}:
                check_lowest(keys, among, number, bound)


@pytest.mark.parametrize("only", [0, 511, 512, 2_559, 2_560, 2_999])
def test_the_lowest_is_found_wherever_it_is(only):
    among = np.zeros(3_000, bool)
    among[only] = True
    check_lowest([np.zeros(3_000)], among, 1, 4)
    check_lowest([-np.arange(3_000) + 3_000], np.ones(3_000, bool), 4, 4)
