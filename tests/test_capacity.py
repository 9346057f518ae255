"""What the caller asks for becomes a number of slots for each group, or an error that says why not."""

from __future__ import annotations

import numpy as np
import optax
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import jaxcache as jc
from jaxcache.capacity import SLOT_BYTES, Capacity

GROUPS = [
    jc.Group.stack({"user": jc.Table(900, 4), "item": jc.Table(100, 4)}),
    jc.Group.stack({"city": jc.Table(50, 2)}),
]
ROW_BYTES = [16, 8]


def parse(slots=None, device_bytes=None, groups=GROUPS, fixed_bytes=0):
    return Capacity.parse(groups, ROW_BYTES[: len(groups)], fixed_bytes, slots, device_bytes)


@pytest.mark.parametrize(
    ("slots", "expected"),
    [
        ({"user": 7, "city": 3}, (7, 3)),
        ({"city": "10%", "item": np.int64(20)}, (20, 5)),  # by any table of the group, in any order
        ({"user": "1.25%", "city": 10**9}, (13, 50)),
        ("100%", (1000, 50)),
        (1050, (1000, 50)),
        (10**12, (1000, 50)),
    ],
)
def test_slots_that_need_no_batch(slots, expected):
    assert parse(slots).slots == expected


@pytest.mark.parametrize("slots", [1049, "99%", 1])
def test_slots_of_several_groups_are_to_be_split(slots):
    assert parse(slots).slots is None
    assert parse(slots, groups=GROUPS[:1]).slots is not None


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (2**20, 2**20),
        ("4GiB", 2**32),
        ("4 GB", 4 * 10**9),
        ("1.5kib", 1536),
        (" 2 MB ", 2_000_000),
        ("77", 77),
        (".5kB", 500),
        ("3 B", 3),
        ("1TiB", 2**40),
        (np.int32(5), 5),
    ],
)
def test_sizes_are_parsed(size, expected):
    assert parse(device_bytes=size).budget == expected


@pytest.mark.parametrize("size", ["4 potatoes", "", "GiB", "-1kB", "1e9", 0, -5, 2.5, True, "0", "0.1B", "1.5.5kB"])
def test_sizes_that_are_wrong(size):
    with pytest.raises(ValueError, match=r"device_bytes must be a positive number of bytes, or a size such as"):
        parse(device_bytes=size)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({}, ValueError, "needs one of slots= .* and device_bytes="),
        ({"slots": 5, "device_bytes": 5}, ValueError, "needs one of slots= .* and device_bytes="),
        ({"slots": {"user": 5}}, ValueError, "no slots for the group of table 'city'"),
        ({"slots": {}}, ValueError, "no slots for the group of table 'user'"),
        ({"slots": {"user": 5, "item": 5, "city": 5}}, ValueError, "names 'user' and 'item', which share one buffer"),
        ({"slots": {"user": 5, "town": 5}}, KeyError, "unknown table 'town': the store has user, item, city"),
        ({"slots": {"user": 0, "city": 5}}, ValueError, "slots must be a positive number of rows or a share"),
        ({"slots": {"user": "5", "city": 5}}, ValueError, "slots must be a positive number of rows or a share"),
        ({"device_bytes": 32, "groups": GROUPS[:1]}, ValueError, "does not hold a single row, which takes 33 bytes"),
    ],
)
def test_capacities_that_are_wrong(arguments, kind, message):
    with pytest.raises(kind, match=message):
        parse(**arguments)


def test_more_slots_than_an_integer_counts_are_refused():
    group = jc.Group.stack({"user": jc.Table(2**40, 1)})
    for arguments in ({"slots": 2**31 - 1}, {"slots": "1%"}, {"device_bytes": "1TiB"}, {"slots": {"user": 2**31}}):
        with pytest.raises(ValueError, match=r"a cache holds fewer than 2\*\*31 - 1"):
            parse(groups=[group], **arguments)
    assert parse(2**31 - 2, groups=[group]).slots == (2**31 - 2,)


@given(data=st.data())
def test_a_split_is_proportional_between_what_is_needed_and_what_there_is(data):
    number = data.draw(st.integers(2, 4))
    rows = data.draw(st.lists(st.integers(1, 10**7), min_size=number, max_size=number))
    row_bytes = data.draw(st.lists(st.integers(1, 500), min_size=number, max_size=number))
    unique = np.array(data.draw(st.lists(st.tuples(*(st.integers(0, n) for n in rows)), max_size=5)), np.int64)
    unique = unique.reshape(-1, number)
    groups = [jc.Group.stack({f"t{i}": jc.Table(n, 1)}) for i, n in enumerate(rows)]
    in_bytes = data.draw(st.booleans())
    costs = [size + SLOT_BYTES if in_bytes else 1 for size in row_bytes]
    needed = [max(1, most) for most in unique.max(axis=0, initial=0)]
    least, whole = np.dot(costs, needed), np.dot(costs, rows)
    budget = data.draw(st.integers(1, int(whole * 1.1) + 1))
    asked = {"device_bytes": budget + 30, "slots": None} if in_bytes else {"slots": budget, "device_bytes": None}
    capacity = Capacity.parse(groups, row_bytes, 30, **asked)
    if budget < least:
        with pytest.raises(jc.TooFewSlots, match=r"too small for the groups of tables.*for 't0'"):
            capacity.split(unique)
        return
    slots = capacity.split(unique)
    assert all(one <= two <= three for one, two, three in zip(needed, slots, rows, strict=True))
    assert np.dot(costs, slots) <= budget
    if slots == tuple(rows):
        return
    # Nothing is left that would hold another row of each group that could have one.
    growing = [cost for cost, taken, most in zip(costs, slots, rows, strict=True) if taken < most]
    assert np.dot(costs, slots) + sum(growing) + max(costs) > budget
    mean = unique.mean(axis=0) if len(unique) else np.ones(number)
    roomy = [min(n + n // 8, most) for n, most in zip(needed, rows, strict=True)]
    free = [i for i in range(number) if roomy[i] < slots[i] < rows[i] and mean[i] > 0]
    assume(len(free) > 1)
    shares = [(slots[i] / mean[i], (slots[i] + 1) / mean[i]) for i in free]
    assert max(low for low, _ in shares) <= min(high for _, high in shares) * (1 + 1e-9)


def train(store, batches, **arguments):
    """Trains, flushes and checks every invariant; returns the cache and the report of each group."""
    with jc.LookAhead(store, batches, ids=lambda b: b, **arguments) as ahead:
        cache = ahead.start()
        for _, plan in ahead:
            cache = ahead.exchange(cache, plan)
            cache = jc.update(cache, plan, jc.lookup(cache, plan))
        cache = ahead.flush(cache)
    jc.check(cache, store)
    return cache, ahead.report().groups


def test_a_share_that_is_too_small_for_a_group_is_refused_before_anything_changes():
    tables = {"user": jc.Table(1000, 4), "city": jc.Table(1000, 2)}
    store = jc.HostStore(tables, optimizer=optax.sgd(0.1))
    batches = [{"user": np.arange(4) + i, "city": np.arange(4) % 2} for i in range(20)]
    message = r"slots=5\) is too small.*4 for 'user', 2 for 'city'.*takes 6 and there are 5"
    with (
        jc.LookAhead(store, batches, ids=lambda b: b, slots=5) as ahead,
        pytest.raises(jc.TooFewSlots, match=message),
    ):
        ahead.start()
    with (
        jc.LookAhead(store, batches, ids=lambda b: b, device_bytes="180B") as ahead,
        pytest.raises(jc.TooFewSlots, match=r"device_bytes='180B'.*bytes"),
    ):
        ahead.start()
    assert store.rows_written == 0 and not store.behind
    cache, groups = train(store, batches, slots=6)
    assert cache.slots == (4, 2) and {name: group.slots for name, group in groups.items()} == {"user": 4, "city": 2}


def test_a_group_with_slots_for_all_its_rows_fetches_those_that_are_used():
    tables = {"user": jc.Table(1000, 4), "city": jc.Table(12, 2)}
    batches = [{"user": np.arange(8) + 2 * i, "city": np.arange(8) // 2} for i in range(9)]

    def city(**arguments):
        cache, groups = train(jc.HostStore(tables, optimizer=optax.sgd(0.1)), batches, **arguments)
        resident = int((cache.groups[1].slot_table[:, 0] >= 0).sum())
        return groups["city"].slots, groups["city"].rows_fetched, resident

    assert city(slots=90) == (12, 4, 4)
    assert city(slots={"user": 78, "city": 12}) == (12, 0, 12)  # asked for: all of them are there from the start


def test_a_loader_that_fails_in_the_first_batches_fails_the_start():
    def loader():
        yield {"user": np.array([1]), "city": np.array([1])}
        raise OSError("the disk is gone")

    store = jc.HostStore({"user": jc.Table(50, 4), "city": jc.Table(50, 2)}, optimizer=optax.sgd(0.1))
    ahead = jc.LookAhead(store, loader(), ids=lambda b: b, slots=20)
    with ahead, pytest.raises(OSError, match="the disk is gone"):
        ahead.start()
    with jc.LookAhead(store, [], ids=lambda b: b, slots=20) as ahead:  # nothing to measure
        assert ahead.start().slots == (10, 10)


@pytest.mark.parametrize("budget", ["900B", "2kB", "1MB"])
def test_the_cache_takes_no_more_than_the_bytes_asked_for(budget):
    tables = {"user": jc.Table(1000, 4), "city": jc.Table(50, 2, dtype="float16", optimizer=optax.adam(0.1))}
    store = jc.HostStore(tables, optimizer=optax.sgd(0.1, momentum=0.9))
    batches = [{"user": np.arange(4), "city": np.arange(4)}]
    with jc.LookAhead(store, batches, ids=lambda b: b, device_bytes=budget) as ahead:
        cache = ahead.start()
    asked = {"900B": 900, "2kB": 2000, "1MB": 10**6}[budget]
    assert cache.nbytes <= asked and (cache.nbytes > asked - 150 or cache.slots == (1000, 50))
