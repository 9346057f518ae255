"""An open-addressing map from 64-bit keys to small integers, for the planner and the host store.

NumPy arrays and Numba functions without the GIL. The map is one `int64` array `cells` of shape `[capacity, 2]`: the key
and the value plus one, where zero marks an empty cell. Capacity is a power of two at most half full, collisions go to
the next cell, and removal shifts the cells behind it back, so that no tombstones are left to lengthen later probes.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.core.types import intp, void
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

ABSENT = -1
VERSION = zlib.crc32(Path(__file__).read_bytes())
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_30, _27, _31 = np.uint64(30), np.uint64(27), np.uint64(31)


@numba.njit(cache=True, nogil=True, inline="always")
def mix(word: np.uint64) -> np.uint64:
    """SplitMix64's finaliser (Steele, Lea & Flood, OOPSLA 2014): a bijection whose every output bit looks random."""
    word = np.uint64(word) + GOLDEN
    word = (word ^ (word >> _30)) * _FIRST
    word = (word ^ (word >> _27)) * _SECOND
    return word ^ (word >> _31)


def _prefetch(typing_context, array, i):
    """Asks for the cache line of `array[i]`, on the first axis: reads at random wait for memory, unless asked early."""

    def generate(context, builder, signature, arguments):
        data = make_array(array)(context, builder, arguments[0])
        word, flag = ir.IntType(64), ir.IntType(32)
        offset = builder.mul(arguments[1], builder.extract_value(data.strides, 0))
        address = builder.inttoptr(builder.add(builder.ptrtoint(data.data, word), offset), ir.IntType(8).as_pointer())
        type_ = ir.FunctionType(ir.VoidType(), [address.type, flag, flag, flag])
        function = cgutils.get_or_insert_function(builder.module, type_, "llvm.prefetch.p0")
        # For reading, to be kept in all caches, data and not code.
        builder.call(function, [address, flag(0), flag(3), flag(1)])
        return context.get_dummy_value()

    return void(array, intp), generate


prefetch: Any = intrinsic(_prefetch)


def discard_stale(compiled_version: Any, module: str) -> None:
    """Deletes what Numba has cached of a module that was compiled with another version of this file.

    Numba's cache looks at the file of a function alone: functions of other modules that call those of this one would go
    on with the old ones after it changed, and an index written by both would lose keys.
    """
    if compiled_version() != VERSION:
        for path in Path(compiled_version.stats.cache_path).glob(f"{module.rpartition('.')[2]}.*.nb[ic]"):
            with contextlib.suppress(OSError):
                path.unlink()


def empty(capacity: int, zeros: Callable[[tuple[int, int], Any], np.ndarray] = np.zeros) -> np.ndarray:
    """Cells that hold at least `capacity` keys while half full, made by `zeros`."""
    size = 16
    while size < 2 * capacity:
        size *= 2
    return zeros((size, 2), np.int64)


@numba.njit(cache=True, nogil=True, inline="always")
def home(cells, key):
    """The cell at which the search for `key` starts."""
    return np.int64(mix(np.uint64(key)) & np.uint64(cells.shape[0] - 1))


@numba.njit(cache=True, nogil=True)
def probe(cells, key):
    """The cell of `key`, or the empty one where it would go."""
    mask = cells.shape[0] - 1
    cell = home(cells, key)
    while cells[cell, 1] != 0 and cells[cell, 0] != key:
        cell = (cell + 1) & mask
    return cell


@numba.njit(cache=True, nogil=True)
def find(cells, key):
    """The value of `key`, or ABSENT."""
    return cells[probe(cells, key), 1] - 1


@numba.njit(cache=True, nogil=True)
def insert(cells, key, value):
    """Adds `key`, which must be absent, to `cells`, which must have room."""
    mask = cells.shape[0] - 1
    cell = home(cells, key)
    while cells[cell, 1] != 0:
        cell = (cell + 1) & mask
    cells[cell, 0] = key
    cells[cell, 1] = value + 1


@numba.njit(cache=True, nogil=True)
def remove(cells, key):
    """Removes `key`, which must be present, and closes the gap that it leaves."""
    mask = cells.shape[0] - 1
    gap = home(cells, key)
    while cells[gap, 0] != key or cells[gap, 1] == 0:
        gap = (gap + 1) & mask
    cell = gap
    while True:
        cell = (cell + 1) & mask
        if cells[cell, 1] == 0:
            break
        # A cell may move back into the gap unless its own home lies between the gap and itself.
        if ((cell - home(cells, cells[cell, 0])) & mask) >= ((cell - gap) & mask):
            cells[gap, 0] = cells[cell, 0]
            cells[gap, 1] = cells[cell, 1]
            gap = cell
    cells[gap, 1] = 0


@numba.njit(cache=True, nogil=True)
def rehash(cells, larger):
    """Copies every key of `cells` into the empty `larger`."""
    for cell in range(cells.shape[0]):
        if cells[cell, 1] != 0:
            insert(larger, cells[cell, 0], cells[cell, 1] - 1)


@numba.njit(cache=True, nogil=True)
def find_all(cells, keys, out):
    """Sets `out` to the values of `keys`, ABSENT where there is none."""
    for i in range(keys.shape[0]):
        if i + 16 < keys.shape[0]:
            prefetch(cells, home(cells, keys[i + 16]))
        out[i] = find(cells, keys[i])


@numba.njit(cache=True, nogil=True)
def find_or_insert_all(cells, keys, used, out):
    """As `find_all`, but gives absent keys the values from `used` upward. Returns the first value still unused."""
    for i in range(keys.shape[0]):
        value = find(cells, keys[i])
        if value == ABSENT:
            value = used
            used += 1
            insert(cells, keys[i], value)
        out[i] = value
    return used


def reserve(
    cells: np.ndarray, capacity: int, zeros: Callable[[tuple[int, int], Any], np.ndarray] = np.zeros
) -> np.ndarray:
    """`cells`, or a larger copy, made by `zeros`, where these do not hold `capacity` keys while half full."""
    if 2 * capacity <= cells.shape[0]:
        return cells
    larger = empty(capacity, zeros)
    rehash(cells, larger)
    return larger
