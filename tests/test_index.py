"""The open-addressing index does what a dict does, whatever collides."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxcache import index

LOW, HIGH = -(2**63), 2**63 - 1
SMALLEST = len(index.empty(1))


def keys_at_home(home, count, cells=SMALLEST):
    """Distinct keys whose search starts at cell `home`."""
    found = []
    key = 0
    while len(found) < count:
        # Both signs, and bit patterns that are negative as int64.
        candidate = key if len(found) % 2 else key + LOW
        if index.home(np.zeros((cells, 2), np.int64), np.int64(candidate)) == home:
            found.append(candidate)
        key += 1
    return found


# Keys that meet in a few cells, some at the end of the array so that their runs wrap around its end.
CROWDED = [key for home in (0, 1, SMALLEST - 2, SMALLEST - 1) for key in keys_at_home(home, 4)]
KEYS = st.one_of(
    st.sampled_from(CROWDED),
    st.sampled_from([LOW, LOW + 1, -2, -1, 0, 1, HIGH - 1, HIGH]),
    st.integers(-20, 20),
)


def values_of(cells):
    """The contents of the cells, read without the functions under test."""
    return {int(key): int(value) - 1 for key, value in cells if value != 0}


def check_reachable(cells):
    """Every key lies in the unbroken run that starts at its home, once."""
    occupied = [int(key) for key, value in cells if value != 0]
    assert len(occupied) == len(set(occupied))
    for place, (key, value) in enumerate(cells):
        cell = index.home(cells, key)
        while value != 0 and cell != place:
            assert cells[cell, 1] != 0, f"a gap at {cell} hides {key}"
            cell = (cell + 1) % len(cells)


@given(st.lists(st.tuples(KEYS, st.integers(0, 2**31 - 1)), max_size=200))
@example([(key, value) for value, key in enumerate(CROWDED[:8])] + [(key, 0) for key in CROWDED[:8]])
def test_insert_find_and_remove_are_those_of_a_dict(toggles):
    """A key that is in is removed, one that is not is inserted while half of the cells are free."""
    cells, expected = index.empty(1), {}
    for key, value in toggles:
        if key in expected:
            index.remove(cells, np.int64(key))
            del expected[key]
        elif 2 * len(expected) < len(cells):
            index.insert(cells, np.int64(key), value)
            expected[key] = value
        assert values_of(cells) == expected
        check_reachable(cells)
        for wanted in {key, *CROWDED, LOW, HIGH, -1, 0}:
            assert index.find(cells, np.int64(wanted)) == expected.get(wanted, index.ABSENT)


@given(st.permutations(keys_at_home(SMALLEST - 1, 4) + keys_at_home(0, 2) + keys_at_home(1, 2)), st.data())
def test_removal_closes_gaps_across_the_end_of_the_array(keys, data):
    cells = index.empty(1)
    for value, key in enumerate(keys):
        index.insert(cells, np.int64(key), value)
    assert cells[0, 1] != 0  # the runs did wrap around
    expected = dict(zip(keys, range(len(keys)), strict=True))
    for key in data.draw(st.permutations(keys)):
        index.remove(cells, np.int64(key))
        del expected[key]
        check_reachable(cells)
        assert {k: index.find(cells, np.int64(k)) for k in keys} == {k: expected.get(k, index.ABSENT) for k in keys}
    assert not cells[:, 1].any()


@given(st.lists(st.integers(LOW, HIGH), unique=True, max_size=100), st.integers(0, 300))
def test_reserve_keeps_every_key_and_leaves_half_of_the_cells_free(keys, more):
    cells = index.empty(max(len(keys), 1))
    for value, key in enumerate(keys):
        index.insert(cells, np.int64(key), value)
    larger = index.reserve(cells, len(keys) + more)
    assert len(larger) >= 2 * (len(keys) + more)
    assert values_of(larger) == dict(zip(keys, range(len(keys)), strict=True))
    check_reachable(larger)
    assert (larger is cells) == (len(cells) >= 2 * (len(keys) + more))


def test_cells_are_a_power_of_two_at_most_half_full():
    for capacity in [*range(1, 70), 1000, 1024, 1025]:
        cells = index.empty(capacity)
        assert len(cells) >= 2 * capacity and len(cells) & (len(cells) - 1) == 0
        assert len(cells) <= max(4 * capacity, SMALLEST) and not cells.any()


def test_mix_is_splitmix64():
    """The first outputs of the published generator from seed 0, which mixes 0, gamma, 2 gamma, ..."""
    gamma = 0x9E3779B97F4A7C15
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert [int(index.mix(np.uint64(i * gamma % 2**64))) for i in range(4)] == published


@pytest.mark.slow
def test_functions_compiled_with_another_version_of_the_index_are_not_used(tmp_path):
    """Numba's cache looks at the file of a function alone, and the planner's functions call those of the index."""
    root = Path(__file__).resolve().parents[1]
    ignore = shutil.ignore_patterns("__pycache__", "kernels")
    shutil.copytree(root / "jaxcache", tmp_path / "jaxcache", ignore=ignore)
    shutil.copytree(root / "kernels", tmp_path / "jaxcache" / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    program = (
        "import numpy as np; from jaxcache.planner import LookAheadPlanner; from jaxcache.tables import Group, Table\n"
        "planner = LookAheadPlanner(Group.stack({'a': Table(10**6, 4)}), 5000, window=1)\n"
        "random, fetched = np.random.default_rng(0), 0\n"
        "starts, tables = np.array([0, 1000]), np.array([0])\n"
        "for _ in range(20):\n"
        "    planner.observe(random.integers(0, 4000, 1000), starts, tables); fetched += len(planner.plan().fetched)\n"
        "print(fetched)"
    )

    def run():
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    first = run()
    index = tmp_path / "jaxcache" / "index.py"
    index.write_text(index.read_text().replace("0x9E3779B97F4A7C15", "0x1234567812345679"))
    assert run() == first
