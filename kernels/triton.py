"""The operations as Triton kernels, through jax-triton, for NVIDIA GPUs from Ampere (compute capability 8.0) on.

Every kernel works on tiles of ROWS rows of the result by COLUMNS columns; wide rows are cut into several tiles. One
device function, `_term`, reads the rows of a tile from wherever they are: a position in a list leads to a lookup, the
lookup to a position among the unique rows, that to a place in a table, each step by an array that may be missing. What
is looked up (`pool`), the gradients of lookups (`sum_occurrences`, `update`) and sums of blocks differ in the arrays
alone. So nothing of the size of lookups times columns exists between two kernels, forward or backward.

The tree of sums is that of `xla.py`, with the same bits: `_sum` adds the lists of a tile in order, a term of each at a
time, up to the tile's longest. Lists of more than BLOCK terms were cut before into blocks, by launches of their own
(`_sum_blocks`), which share no list and so keep a hot row from being one long chain: block p of a launch belongs to the
list that the term at BLOCK * p is in, so there is one place for each multiple of BLOCK, most of them with nothing to
do. A second such launch sums blocks of blocks. Neither is made where the shapes say that no list is that long. The last
launch, `_write_sums` or `_update_rows`, adds up what is left of each list.

`update` is that last launch: it has the sum of a row in registers, reads the row's weights and state, applies the rule
and writes them, so that summed gradients never go through memory. Rules that are not in FUSED get their sums from here
and the rest from `xla.py`; so does rowwise_adagrad where a row is more than one tile, as it needs the whole row.
`exchange` is one launch for each leaf: jax-triton wants each result of a launch to be a parameter of its kernel, and a
kernel has as many as it was written with.

What a kernel changes is passed to it as a reference, `jax.new_ref`, which XLA aliases, so that a donated buffer is
changed in place. Places are widened to 64 bits before they are multiplied by the number of columns. Sizes of buffers
and batches are arguments rather than constants of the kernels: a new size compiles none of them anew.

Products and sums are not contracted, and division and square root are rounded correctly: given the same sums, a rule
has the bits of its formula in FUSED, taken operation by operation. Two things are left open there: the mean of
rowwise_adagrad is summed in an order that suits the tile, and adam multiplies (1 - b2) by (g * g), as optax does.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax.interpreters import partial_eval

from . import xla
from .xla import BLOCK, FUSED, LEVELS, Bags, Gradients, Rule, Slots

MAX_COLUMNS = 1024  # of a tile

Array = Any

_BLOCK: tl.constexpr = tl.constexpr(BLOCK)
_FLOATS = ("float32", "bfloat16", "float16")
_MOVABLE = (*_FLOATS, "float64", "bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)))


# Device functions


@triton.jit
def _offsets(places, columns, DIM: tl.constexpr):
    """Of rows from the start of a table, in elements. A table may have more than 2**31 of them."""
    return (places.to(tl.int64) * DIM)[:, None] + columns[None, :]


@triton.jit
def _list(begins, ends, segment, real, EVERY: tl.constexpr):
    """Where the list of each segment begins, and its length; 0 if it is not a real one."""
    if EVERY is not None:
        begin = segment * EVERY
        length = tl.where(real, EVERY, 0)
    else:
        begin = tl.load(begins + segment, mask=real, other=0)
        if ends is not None:
            length = tl.load(ends + segment, mask=real, other=0) - begin
        else:
            length = tl.load(begins + segment + 1, mask=real, other=0) - begin
    return begin, length


@triton.jit
def _blocks(length):
    """How many blocks a list is cut into."""
    return tl.where(length > _BLOCK, length // _BLOCK, 0)


@triton.jit
def _first_block(begin):
    """The place of a list's first block."""
    return (begin + _BLOCK - 1) // _BLOCK


@triton.jit
def _term(
    table, count, order, inverse, unique, places, factors, position, real, columns, DIM: tl.constexpr
):  # fmt: skip
    """The rows of the terms at positions: float32, times their factor; zeros for a position that is not real, for a
    lookup that is of none of the unique rows, and for a place that is not in the table."""
    lookup = position
    if order is not None:
        lookup = tl.load(order + position, mask=real, other=0)
    place = lookup
    if inverse is not None:
        place = tl.load(inverse + lookup, mask=real, other=0)
        real = real & (place < unique)
    if factors is not None:
        factor = tl.load(factors + lookup, mask=real, other=0.0)
    if places is not None:
        place = tl.load(places + place, mask=real, other=0)
    if count is not None:
        real = real & (place < count)
    mask = real[:, None] & (columns < DIM)[None, :]
    row = tl.load(table + _offsets(place, columns, DIM), mask=mask, other=0.0).to(tl.float32)
    if factors is not None:
        row = row * factor[:, None]
    return row


@triton.jit
def _sum(
    table, count, order, inverse, unique, places, factors, begins, lengths, columns, DIM: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """The sums of lists, in order, one for each row of the tile. The loop is unrolled for loads to overlap."""
    total = tl.zeros([begins.shape[0], columns.shape[0]], tl.float32)
    for done in range(0, tl.max(lengths, axis=0), UNROLL):
        for step in tl.static_range(UNROLL):
            position = begins + (done + step)
            real = lengths > done + step
            total += _term(table, count, order, inverse, unique, places, factors, position, real, columns, DIM)
    return total


@triton.jit
def _sum_tree(
    table, count, order, inverse, unique, places, factors, block_sums, superblock_sums, begins, lengths, columns,
    DIM: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The sums of whole lists, of which those of more than BLOCK terms were cut into blocks."""
    if block_sums is not None:
        blocks = _blocks(lengths)
        first = _first_block(begins)
        begins += blocks * _BLOCK
        lengths -= blocks * _BLOCK
    total = _sum(table, count, order, inverse, unique, places, factors, begins, lengths, columns, DIM, UNROLL)
    if block_sums is not None:
        if superblock_sums is not None:
            cut = _blocks(blocks)
            rest = blocks - cut * _BLOCK
            top = _first_block(first)
            summed = _sum(superblock_sums, None, None, None, None, None, None, top, cut, columns, DIM, UNROLL)
            first += cut * _BLOCK
            summed += _sum(block_sums, None, None, None, None, None, None, first, rest, columns, DIM, UNROLL)
        else:
            summed = _sum(block_sums, None, None, None, None, None, None, first, blocks, columns, DIM, UNROLL)
        total += summed
    return total


@triton.jit
def _round_stochastically(values, words, DTYPE: tl.constexpr):
    """To bfloat16 or float16 by random bits, as `jaxcache.rounding` has it: see there for why."""
    bits = values.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        rounded = (magnitude + (words >> 16)) >> 16
        largest = 0x7F7F0000
    else:
        exponent = magnitude >> 23
        normal = ((magnitude + (words >> 19)) >> 13) - 0x1C000
        significand = (magnitude & 0x7FFFFF) | 0x800000
        dropped = 126 - tl.minimum(exponent, 113)  # 13, and one more for each halving below the smallest normal number
        beyond = tl.maximum(dropped, 31) - 31
        dropped -= beyond
        subnormal = ((significand >> tl.minimum(beyond, 31)) + (words >> (32 - dropped))) >> dropped
        rounded = tl.where(exponent < 113, subnormal, normal)
        largest = 0x477FE000
    signed = ((bits >> 31) << 15) | rounded
    return tl.where(magnitude > largest, values.to(DTYPE), signed.to(tl.uint16).to(DTYPE, bitcast=True))


# Kernels. What a kernel writes comes first, None stands for what is not there.


@triton.jit
def _gather_rows(
    out, accept, lookups, table, count, order, inverse, unique, places, factors, DIM: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    lookup = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rows = _term(table, count, order, inverse, unique, places, factors, lookup, lookup < lookups, columns, DIM)
    rows = tl.where(tl.load(accept), rows, float("nan"))
    mask = (lookup < lookups)[:, None] & (columns < DIM)[None, :]
    tl.store(out + _offsets(lookup, columns, DIM), rows, mask=mask)


@triton.jit
def _sum_blocks(
    out, blocks, segments, begins, ends, owners, owner_order, table, count, order, inverse, unique, places, factors,
    EVERY: tl.constexpr, OWNER_STEP: tl.constexpr, LEVEL: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The sums of blocks: of terms at LEVEL 0, of the sums of those at LEVEL 1. Places of no block are not written."""
    block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = block < blocks
    if EVERY is not None:
        owner = block * OWNER_STEP // EVERY
    else:
        place = block * OWNER_STEP
        if owner_order is not None:
            place = tl.load(owner_order + place, mask=real, other=0)
        owner = tl.load(owners + place, mask=real, other=segments)
    real = real & (owner < segments)
    begin, length = _list(begins, ends, owner, real, EVERY)
    if LEVEL == 1:
        first = _first_block(begin)
        length = _blocks(length)
        begin = first
    number = block - _first_block(begin)
    used = real & (number < _blocks(length))
    begin += number * _BLOCK
    length = tl.where(used, _BLOCK, 0)
    total = _sum(table, count, order, inverse, unique, places, factors, begin, length, columns, DIM, UNROLL)
    tl.store(out + _offsets(block, columns, DIM), total, mask=used[:, None] & (columns < DIM)[None, :])


@triton.jit
def _write_sums(
    out, accept, segments, begins, ends, table, count, order, inverse, unique, places, factors, block_sums,
    superblock_sums, EVERY: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = segment < segments
    begin, length = _list(begins, ends, segment, real, EVERY)
    if accept is not None:
        accepted = tl.load(accept)
        length = tl.where(accepted, length, 0)
    total = _sum_tree(
        table, count, order, inverse, unique, places, factors, block_sums, superblock_sums, begin, length, columns,
        DIM, UNROLL,
    )  # fmt: skip
    if accept is not None:
        total = tl.where(accepted, total, float("nan"))
    tl.store(out + _offsets(segment, columns, DIM), total, mask=real[:, None] & (columns < DIM)[None, :])


@triton.jit
def _update_rows(
    weights, master, first, second, counts, dirty, accept, capacity, segments, slots, words, coefficients, starts,
    table, count, order, inverse, unique, places, factors, block_sums, superblock_sums, RULE: tl.constexpr,
    DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    real = segment < segments
    slot = tl.load(slots + segment, mask=real, other=0)
    real = real & (slot < tl.where(tl.load(accept), capacity, 0))  # if not accepted, there is nothing to write to
    begin, length = _list(starts, None, segment, real, None)
    g = _sum_tree(
        table, count, order, inverse, unique, places, factors, block_sums, superblock_sums, begin, length, columns,
        DIM, UNROLL,
    )  # fmt: skip

    mask = real[:, None] & (columns < DIM)[None, :]
    at = _offsets(slot, columns, DIM)
    if master is not None:
        w = tl.load(master + at, mask=mask, other=0.0)
    else:
        w = tl.load(weights + at, mask=mask, other=0.0).to(tl.float32)

    if RULE == "sgd":
        w += tl.load(coefficients) * g
    elif RULE == "momentum":
        m = g + tl.load(coefficients) * tl.load(first + at, mask=mask, other=0.0)
        w += tl.load(coefficients + 1) * m
        tl.store(first + at, m, mask=mask)
    elif RULE == "adagrad":
        s = tl.load(first + at, mask=mask, other=0.0) + g * g
        root = tl.sqrt_rn(s + tl.load(coefficients))
        w += tl.load(coefficients + 1) * tl.where(s > 0, tl.div_rn(g, root), 0.0)
        tl.store(first + at, s, mask=mask)
    elif RULE == "rowwise_adagrad":
        mean = tl.div_rn(tl.sum(g * g, axis=1), tl.full([ROWS], DIM, tl.float32))
        s = tl.load(first + slot, mask=real, other=0.0) + mean
        root = tl.sqrt_rn(s) + tl.load(coefficients)
        w += tl.load(coefficients + 1) * tl.div_rn(g, root[:, None])
        tl.debug_barrier()  # one warp writes what all warps of the row have read
        tl.store(first + slot, s, mask=real)
    elif RULE == "adam":
        m = tl.load(coefficients) * tl.load(first + at, mask=mask, other=0.0) + tl.load(coefficients + 1) * g
        v = tl.load(coefficients + 2) * tl.load(second + at, mask=mask, other=0.0) + tl.load(coefficients + 3) * (g * g)
        root = tl.sqrt_rn(tl.div_rn(v, tl.load(coefficients + 7)) + tl.load(coefficients + 5))
        step = tl.div_rn(tl.div_rn(m, tl.load(coefficients + 6)), root + tl.load(coefficients + 4))
        w += tl.load(coefficients + 8) * step
        tl.store(first + at, m, mask=mask)
        tl.store(second + at, v, mask=mask)

    if master is not None:
        tl.store(master + at, w, mask=mask)
    if words is not None:
        bits = tl.load(words + _offsets(segment, columns, DIM), mask=mask, other=0)
        tl.store(weights + at, _round_stochastically(w, bits, weights.dtype.element_ty), mask=mask)
    else:
        tl.store(weights + at, w.to(weights.dtype.element_ty), mask=mask)
    if tile == 0:
        before = tl.load(counts + slot, mask=real, other=0)
        most = 2147483647
        tl.store(counts + slot, tl.where(before > most - length, most, before + length), mask=real)
        tl.store(dirty + slot, tl.full([ROWS], True, tl.int1), mask=real)


@triton.jit
def _exchange_rows(
    buffer, old, accept, capacity, moved, slots, incoming, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = number < moved
    inside = (columns < DIM)[None, :]
    slot = tl.load(slots + number, mask=real, other=0)
    places = buffer + _offsets(slot, columns, DIM)
    numbers = _offsets(number, columns, DIM)
    held = tl.load(places, mask=(real & (slot < capacity))[:, None] & inside, other=0)
    tl.store(old + numbers, held, mask=real[:, None] & inside)
    tl.debug_barrier()  # nothing else would make a thread wait for another that has yet to read what it writes
    written = (real & (slot < tl.where(tl.load(accept), capacity, 0)))[:, None] & inside
    tl.store(places, tl.load(incoming + numbers, mask=written, other=0), mask=written)


# Launches


@functools.cache
def load() -> ModuleType:
    """jax-triton, ready for use; only what runs or lowers kernels needs it.

    Raises:
        ImportError: if it is missing, or too old.
    """
    from triton.backends.nvidia import driver

    # jax-triton 0.4 imports a name that Triton has from 3.7 on, and takes the whole backend for missing without it.
    # It is for tensor descriptors, of which there are none here.
    if not hasattr(driver, "TMA_TF32"):
        driver.TMA_TF32 = 0
    import jax_triton

    if jax_triton.__version_info__ < (0, 4, 1):  # 0.4.0 takes no None for an argument
        raise ImportError(f"jax-triton 0.4.1 or later is needed, this is {jax_triton.__version__}")
    # JAX 0.12 gives one argument more to a rule of dead code elimination than that of jax-triton 0.4.1 takes.
    if jax.__version_info__ >= (0, 12) and jax_triton.__version_info__ <= (0, 4, 1):
        rules: dict[Any, Any] = partial_eval.dce_rules
        primitive = jax_triton.triton_lib.triton_kernel_call_p
        rule = rules[primitive]
        if len(inspect.signature(rule).parameters) == 2:
            rules[primitive] = lambda used, _, equation: rule(used, equation)
    return jax_triton


class _Tile(NamedTuple):
    """What a program works on, and how."""

    rows: int
    columns: int
    unroll: int
    warps: int
    registers: int

    @property
    def options(self) -> dict[str, Any]:
        """Of the compiler.

        A product that is added to something is rounded first. Triton stamps PTX with the version of the assembler that
        it brings; JAX assembles with its own, which may be older: that of CUDA 12.9, the oldest that JAX brings, takes
        8.8. Without a bound the assembler aims at 32 registers, and in some kernels spills one to get there.
        """
        return {
            "num_warps": self.warps,
            "num_stages": 1,
            "maxnreg": self.registers,
            "enable_fp_fusion": False,
            "ptx_version": 88,
        }


def _tile(dim: int, itemsize: int) -> _Tile:
    """For rows of a table of which an element has so many bytes: the one place for tuning.

    A thread takes 16 bytes of a row at once, or a whole row if it has less; and no more, so that registers never run
    short. So four warps have one row of 512 float32 numbers, or the more rows the narrower they are; wider rows have
    more warps. Rows that do not begin at multiples of 16 bytes are read in smaller pieces, each with an address.
    """
    columns = min(triton.next_power_of_2(dim), MAX_COLUMNS)
    elements = 32 * 4 * min(max(16 // itemsize, 1), columns)
    return _Tile(
        max(elements // columns, 1), columns, 4, max(4 * columns // elements, 4), 128 if dim * itemsize % 16 else 64
    )


def _grid(rows: int, dim: int, tile: _Tile) -> tuple[int, int]:
    """Programs over `[rows, dim]`."""
    return triton.cdiv(rows, tile.rows), triton.cdiv(dim, tile.columns)


def _launch(
    kernel: Any,
    grid: tuple[int, int],
    tile: _Tile,
    results: dict[str, jax.ShapeDtypeStruct],
    replaced: dict[str, Array | None],
    arguments: dict[str, Any],
    constants: dict[str, Any],
) -> tuple[list[Array], list[Array | None]]:
    """Runs a kernel; all that runs passes here.

    Args:
        kernel: the kernel.
        grid: its programs.
        tile: of a program; the kernel's constants ROWS and COLUMNS are from here.
        results: what it returns, by the names of its parameters.
        replaced: the buffers that it changes in place, by name; None for those that are not there.
        arguments: everything else, by name: arrays, integers, and None.
        constants: its other constants.

    Returns:
        The results and the changed buffers.
    """
    references = {name: None if array is None else jax.new_ref(array) for name, array in replaced.items()}
    written = load().triton_call(
        **arguments,
        **references,
        **constants,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        kernel=kernel,
        name=kernel.__name__,
        out_type=tuple(results.values()),
        grid=grid,
        backend_options=tile.options,
    )
    return list(written), [None if reference is None else jax.freeze(reference) for reference in references.values()]


# Sums


class _Lists(NamedTuple):
    """The lists to be summed; list s has the terms at positions `begins[s]` to `ends[s]`.

    Attributes:
        segments: number of lists.
        positions: number of positions, more than those that are in lists perhaps.
        longest: no list has more terms; from shapes alone.
        begins: `int32[segments]`, or with one more if `ends` is None: then each ends where the next one begins.
        ends: `int32[segments]` or None.
        every: the length of all lists, if they are equally long and begin at position 0; then there are no arrays.
        owners: `int32[positions]`, the list of each position; `segments` or larger for none.
        owner_order: `int32[positions]` or None; where it is given, position p has `owners[owner_order[p]]`.
        owner_step: how many elements of `owners` are from one multiple of BLOCK to the next.
    """

    segments: int
    positions: int
    longest: int
    begins: Array | None = None
    ends: Array | None = None
    every: int | None = None
    owners: Array | None = None
    owner_order: Array | None = None
    owner_step: int = BLOCK


def _lists_of_bags(bags: Sequence[Bags]) -> _Lists:
    """Those of all features, one behind the other."""
    count = sum(feature.count for feature in bags)
    positions = sum(feature.lookups for feature in bags)
    if not count:
        return _Lists(0, positions, 0)
    # Of ragged bags, one may have all lookups.
    each = [f.lookups if f.owners is not None else f.lookups // f.count for f in bags if f.count]
    longest = max(each, default=0)
    if longest and all(f.owners is None for f in bags) and len(set(each)) == 1:
        return _Lists(count, positions, longest, every=longest)
    if len(bags) == 1 and bags[0].offsets is not None:
        return _Lists(count, positions, longest, begins=bags[0].offsets, owners=bags[0].owners)
    begins, ends, owners, start, bag = [], [], [], 0, 0
    offsets: Array
    mine: Array
    for feature in bags:
        step = range(start + -start % BLOCK, start + feature.lookups, BLOCK)
        if feature.owners is None:
            length = feature.lookups // max(feature.count, 1)
            offsets = jnp.arange(feature.count + 1, dtype=jnp.int32) * length
            mine = (jnp.arange(len(step), dtype=jnp.int32) * BLOCK + (step.start - start)) // max(length, 1)
        else:
            offsets = feature.offsets
            mine = feature.owners[step.start - start :: BLOCK]
        begins.append(offsets[:-1] + start)
        ends.append(offsets[1:] + start)
        owners.append(jnp.where(mine < feature.count, mine + bag, count))
        start += feature.lookups
        bag += feature.count
    return _Lists(
        count,
        positions,
        longest,
        jnp.concatenate(begins),
        jnp.concatenate(ends),
        None,
        jnp.concatenate(owners),
        None,
        1,
    )


def _lists_of_gradients(gradients: Gradients) -> _Lists:
    count, lookups = len(gradients.starts) - 1, len(gradients.order)
    return _Lists(
        count, lookups, lookups, begins=gradients.starts, owners=gradients.inverse, owner_order=gradients.order
    )


def _terms(
    table: Array,
    order: Array | None = None,
    inverse: Array | None = None,
    unique: int | None = None,
    places: Array | None = None,
    factors: Array | None = None,
    bounded: bool = True,
) -> dict[str, Any]:
    """The arguments that lead to a term: see `_term`."""
    count = min(len(table), 2**31 - 1) if bounded else None
    return {
        "table": table, "count": count, "order": order, "inverse": inverse, "unique": unique, "places": places,
        "factors": factors,
    }  # fmt: skip


def _terms_of_gradients(gradients: Gradients) -> dict[str, Any]:
    if gradients.rows.dtype != jnp.float32:
        raise NotImplementedError(f"gradients of dtype {gradients.rows.dtype}")
    return _terms(gradients.rows, gradients.order, places=gradients.sources, factors=gradients.weights)


def _block_sums(lists: _Lists, terms: dict[str, Any]) -> dict[str, Array | None]:
    """The sums of blocks, and of blocks of them, where a list can be so long."""
    dim = terms["table"].shape[1]
    sums: list[Array | None] = [None] * LEVELS
    longest, positions, step = lists.longest, lists.positions, lists.owner_step
    for level in range(LEVELS):
        if longest <= BLOCK:
            break
        longest //= BLOCK
        positions = triton.cdiv(positions, BLOCK)
        tile = _tile(dim, terms["table"].dtype.itemsize)
        [sums[level]], _ = _launch(
            _sum_blocks,
            _grid(positions, dim, tile),
            tile,
            {"out": jax.ShapeDtypeStruct((positions, dim), jnp.float32)},
            {},
            {
                "blocks": positions, "segments": lists.segments, "begins": lists.begins, "ends": lists.ends,
                "owners": lists.owners, "owner_order": lists.owner_order, **terms,
            },
            {"EVERY": lists.every, "OWNER_STEP": step, "LEVEL": level, "DIM": dim, "UNROLL": tile.unroll},
        )  # fmt: skip
        terms = _terms(sums[level], bounded=False)
        step *= BLOCK
    return dict(zip(("block_sums", "superblock_sums"), sums, strict=True))


def _sums(lists: _Lists, terms: dict[str, Any], accept: Array | None) -> Array:
    dim = terms["table"].shape[1]
    if not lists.segments or not dim:
        return jnp.zeros((lists.segments, dim), jnp.float32)
    tile = _tile(dim, terms["table"].dtype.itemsize)
    [summed], _ = _launch(
        _write_sums,
        _grid(lists.segments, dim, tile),
        tile,
        {"out": jax.ShapeDtypeStruct((lists.segments, dim), jnp.float32)},
        {},
        {
            "accept": accept, "segments": lists.segments, "begins": lists.begins, "ends": lists.ends, **terms,
            **_block_sums(lists, terms),
        },
        {"EVERY": lists.every, "DIM": dim, "UNROLL": tile.unroll},
    )  # fmt: skip
    return summed


# Operations: see `xla.py`.


def gather(table: Array, slots: Array, inverse: Array, accept: Array) -> Array:
    """The row of every lookup."""
    _check_rows(table)
    lookups, dim = len(inverse), table.shape[1]
    if not lookups or not dim:
        return jnp.zeros((lookups, dim), jnp.float32)
    tile = _tile(dim, table.dtype.itemsize)
    terms = _terms(table, inverse=inverse, unique=len(slots), places=slots)
    [rows], _ = _launch(
        _gather_rows,
        _grid(lookups, dim, tile),
        tile,
        {"out": jax.ShapeDtypeStruct((lookups, dim), jnp.float32)},
        {},
        {"accept": accept, "lookups": lookups, **terms},
        {"DIM": dim},
    )
    return rows


def pool(
    table: Array, slots: Array, inverse: Array, bags: Sequence[Bags], weights: Array | None, accept: Array
) -> Array:
    """The weighted sums of bags of rows."""
    _check_rows(table)
    terms = _terms(table, inverse=inverse, unique=len(slots), places=slots, factors=weights)
    return _sums(_lists_of_bags(bags), terms, accept)


def sum_occurrences(gradients: Gradients) -> Array:
    """The sum of the gradients of each unique row's lookups."""
    return _sums(_lists_of_gradients(gradients), _terms_of_gradients(gradients), None)


def update(kept: Slots, slots: Array, gradients: Gradients, rule: Rule, accept: Array) -> Slots:
    """Sums the gradients of each unique row and applies a row optimizer, in place where `kept` is donated."""
    _check_rows(kept.weights)
    unique, dim = len(slots), kept.weights.shape[1]
    whole_rows = rule.name == "rowwise_adagrad" and dim > MAX_COLUMNS
    if rule.name is None or whole_rows or not unique or not dim:
        return xla.update_summed(kept, slots, sum_occurrences(gradients), gradients.starts, rule, accept)
    if rule.name not in FUSED:
        raise NotImplementedError(f"the rule {rule.name}")
    for leaf in kept.state:
        if leaf.dtype != jnp.float32:
            raise NotImplementedError(f"state of dtype {leaf.dtype} for the rule {rule.name}")
    # The master copy, and up to two more.
    master, *rest = kept.state if rule.master_copy else (None, *kept.state)
    first, second = (*rest, None, None)[:2]
    lists, terms = _lists_of_gradients(gradients), _terms_of_gradients(gradients)
    tile = _tile(dim, 4)
    _, changed = _launch(
        _update_rows,
        _grid(unique, dim, tile),
        tile,
        {},
        {
            "weights": kept.weights, "master": master, "first": first, "second": second, "counts": kept.counts,
            "dirty": kept.dirty,
        },
        {
            "accept": accept, "capacity": min(len(kept.weights), 2**31 - 1), "segments": unique, "slots": slots,
            "words": rule.words, "coefficients": jnp.stack([jnp.asarray(c, jnp.float32) for c in rule.coefficients]),
            "starts": gradients.starts, **terms, **_block_sums(lists, terms),
        },
        {"RULE": rule.name, "DIM": dim, "UNROLL": tile.unroll},
    )  # fmt: skip
    weights, *state, counts, dirty = changed
    return Slots(weights, tuple(leaf for leaf in state if leaf is not None), counts, dirty)


def exchange(buffer: Any, slots: Array, incoming: Any, accept: Array) -> tuple[Any, Any]:
    """Takes the rows at `slots` out and puts `incoming` in their place, in place where the buffer is donated."""
    leaves, structure = jax.tree.flatten(buffer)
    pairs = [
        _exchange_leaf(leaf, slots, new, accept)
        for leaf, new in zip(leaves, structure.flatten_up_to(incoming), strict=True)
    ]
    return tuple(structure.unflatten(part) for part in zip(*pairs, strict=True)) if pairs else (buffer, incoming)


def _exchange_leaf(buffer: Array, slots: Array, incoming: Array, accept: Array) -> tuple[Array, Array]:
    if buffer.dtype.name not in _MOVABLE or incoming.dtype != buffer.dtype:
        raise NotImplementedError(f"rows of dtype {incoming.dtype} into a buffer of {buffer.dtype}")
    moved, dim = len(slots), math.prod(buffer.shape[1:])
    if not moved or not dim:
        return buffer, incoming
    tile = _tile(dim, buffer.dtype.itemsize)
    [old], [changed] = _launch(
        _exchange_rows,
        _grid(moved, dim, tile),
        tile,
        {"old": jax.ShapeDtypeStruct(incoming.shape, incoming.dtype)},
        {"buffer": buffer},
        {
            "accept": accept, "capacity": min(len(buffer), 2**31 - 1), "moved": moved, "slots": slots,
            "incoming": incoming,
        },
        {"DIM": dim},
    )  # fmt: skip
    return changed, old


def _check_rows(table: Array) -> None:
    if table.dtype.name not in _FLOATS:
        raise NotImplementedError(f"rows of dtype {table.dtype}")
