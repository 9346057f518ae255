"""Kernels for NVIDIA GPUs from Hopper on, in Pallas Mosaic GPU.

Every program is one warpgroup of 128 threads that loads rows from memory into registers and stores them from there:
there are no asynchronous copies and no barriers of our own. What hides the latency of memory is that each program has
several rows on their way at a time, and that many programs share a multiprocessor.

**A row in registers.** Mosaic GPU spreads an array over all 128 threads, so its size is a multiple of 128, or its
layout says which threads hold copies. A row is cut into pieces: as many columns as are a multiple of 128, and what
remains by powers of two. Those are held by a lane for each column, in each warp anew. So any dim goes, at the price of
threads that do the same work: they load the same addresses, which is one access to memory, and store equal values.

**gather**: a program copies a few lookups; all their rows are asked for before the first is stored.

**Sums** (`pool`, `sum_occurrences`, `update`) follow the tree of `xla.py` in up to three launches:
1. a program for each full block of BLOCK terms of a list that has more than BLOCK: the sum of the block;
2. if a list can have more than BLOCK blocks, the same for the blocks of those sums;
3. a program for each few lists, side by side: what no block holds, plus the sums of blocks. This one goes on to what
   is done with the sum: write it, or apply the optimizer.
The number of programs is that of what there could be; which term is in which block comes from a few small XLA
operations on the begins and lengths of the lists, and a program without a block ends at once. A term is found in the
kernel (`order` and `sources`, or `slots[inverse]`), so nothing of size lookups x dim is ever written.

**update** reads the kept rows of its lists and writes them in the same program, through references (`jax.new_ref`),
in place if they are donated. No two programs touch the same slot, since `slots` has each place once. Within a program
a thread must not write a row before the others that hold copies of it have read it: Mosaic puts a barrier of the
warpgroup before and after each store, unless it is told not to, as the other kernels do, which read nothing that they
write. All branches and numbers of rounds depend on scalars that all threads read alike, so all meet at the barriers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from . import xla
from .xla import BLOCK, FUSED, Bags, Gradients, Rule, Slots

plgpu: Any = mosaic_gpu  # its types differ from one version of JAX to the next
THREADS = 128  # of a warpgroup
LANES = 32  # of a warp
MOST = 1024  # columns of a row

Array = Any
Row = tuple[Array, ...]  # a row in registers: its pieces


def gather(table: Array, slots: Array, inverse: Array, accept: Array) -> Array:
    """The row of every lookup: see `xla.gather`."""
    terms, lookups = _lookups(table, slots, inverse, None), len(inverse)
    if not lookups:
        return jnp.zeros((0, terms.dim), jnp.float32)
    width = _in_flight(terms.dim)

    def body(program, operands, out):
        accept, refs = operands
        # The last program may have fewer lookups: it writes the last one several times.
        places = [jnp.minimum(program * width + i, lookups - 1) for i in range(width)]
        rows = [terms.load(refs, place) for place in places]
        for place, row in zip(places, rows, strict=True):
            _store(out, place, _where(accept[0], row, jnp.nan))

    out = jax.ShapeDtypeStruct((lookups, terms.dim), jnp.float32)
    return _launch("gather", body, pl.cdiv(lookups, width), (_flag(accept), terms.operands), out)


def pool(
    table: Array, slots: Array, inverse: Array, bags: Sequence[Bags], weights: Array | None, accept: Array
) -> Array:
    """The weighted sums of bags of rows: see `xla.pool`. All bags are summed by the tree."""
    return _sum(_lookups(table, slots, inverse, weights), _bag_lists(bags), accept)


def sum_occurrences(gradients: Gradients) -> Array:
    """The sum of the gradients of each unique row's lookups: see `xla.sum_occurrences`."""
    return _sum(_occurrences(gradients), _occurrence_lists(gradients), True)


def update(kept: Slots, slots: Array, gradients: Gradients, rule: Rule, accept: Array) -> Slots:
    """Sums gradients and applies a row optimizer: see `xla.update`. XLA applies rules that have no name."""
    if rule.name is None:
        return xla.update_summed(kept, slots, sum_occurrences(gradients), gradients.starts, rule, accept)
    _check_update(kept, rule)
    unique, count = len(slots), len(kept.weights)
    if not unique:
        return kept
    terms, lists = _occurrences(gradients), _occurrence_lists(gradients)
    levels = _sum_blocks(terms, lists)
    width = _side_by_side(terms.dim, 1 + len(kept.state) + (rule.words is not None))

    def body(program, operands):
        accept, slots, coefficients, words, lists, refs, levels, kept = operands
        reads, ranges = _ranges(program, width, lists)
        slots = [slots[read] for read in reads]
        places = [jnp.minimum(slot, count - 1) for slot in slots]
        old = [_load_kept(kept, place, rule) for place in places]
        bits = [_load(words, read) if rule.words is not None else None for read in reads]
        sums = _sum_lists(terms, refs, levels, ranges)
        scalars = {name: coefficients[i] for i, name in enumerate(("one", *FUSED[str(rule.name)]))}
        for i in range(width):
            new = _updated(rule, scalars, sums[i], old[i], bits[i], lists[1][reads[i]], kept.weights.dtype)

            @pl.when((program * width + i < unique) & (slots[i] < count) & accept[0])
            def _(place=places[i], new=new):
                _store_kept(kept, place, new)

    refs = jax.tree.map(jax.new_ref, kept)
    coefficients = jnp.stack([jnp.asarray(value, jnp.float32) for value in (1, *rule.coefficients)])
    operands = (_flag(accept), slots, coefficients, rule.words, lists[:2], terms.operands, levels, refs)
    _launch("update", body, pl.cdiv(unique, width), operands, (), barriers=True)
    return jax.tree.map(jax.freeze, refs)


def _launch(name: str, body: Callable, programs: int, operands: Any, out: Any, barriers: bool = False) -> Any:
    """Runs `body(program, operands, *out)` in so many programs, with references in the place of all arrays."""
    leaves, tree = jax.tree.flatten(operands)

    def kernel(*refs):
        body(lax.axis_index("program"), jax.tree.unflatten(tree, refs[: len(leaves)]), *refs[len(leaves) :])

    kernel.__name__ = name
    return plgpu.kernel(
        kernel,
        out_type=out,
        grid=(programs,),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(
            # Layouts are given here, not inferred.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=not barriers,
        ),
    )(*leaves)


def _flag(accept: Array) -> Array:
    return jnp.asarray(accept, jnp.bool)[None]


# Rows in registers


def _pieces(dim: int) -> list[tuple[int, int]]:
    """The pieces of a row: first column and number of columns."""
    pieces = [(0, dim // THREADS * THREADS)] if dim >= THREADS else []
    first = dim // THREADS * THREADS
    for bit in reversed(range(THREADS.bit_length() - 1)):
        if dim >> bit & 1:
            pieces.append((first, 1 << bit))
            first += 1 << bit
    return pieces


def _registers(dim: int) -> int:
    """How many registers of a thread a row takes."""
    return sum(pl.cdiv(size, THREADS if size >= THREADS else LANES) for _, size in _pieces(dim))


def _layout(dim: int, size: int) -> Any:
    """How a piece of a row of `dim` columns lies in registers."""
    if size % THREADS == 0:
        # As wide as a vector may be: each row begins at a multiple of it.
        vector = next(v for v in (4, 2, 1) if size % (v * THREADS) == 0 and dim % v == 0)
        return plgpu.Layout.WG_STRIDED((size,), vec_size=vector)
    lanes = min(size, LANES)
    spread = (-2,) if lanes == LANES else (plgpu.Replicated(LANES // lanes), -2)
    return plgpu.Layout.TILED(plgpu.Tiling(((lanes,), (1,))), (plgpu.Replicated(THREADS // LANES),), spread, -1)


def _load(ref: Any, index: Any) -> Row:
    """The row at `ref[index]`, float32 if it is of floats."""
    dim = ref.shape[1]

    def load(first, size):
        if size == 1:
            return ref[index, first]
        return plgpu.load(ref.at[index, pl.ds(first, size)], layout=_layout(dim, size), optimized=False)

    pieces = [load(*piece) for piece in _pieces(dim)]
    return tuple(p.astype(jnp.float32) if jnp.issubdtype(p.dtype, jnp.floating) else p for p in pieces)


def _store(ref: Any, index: Any, row: Row) -> None:
    for (first, size), piece in zip(_pieces(ref.shape[1]), row, strict=True):
        if size == 1:
            ref[index, first] = piece
        elif hasattr(plgpu, "store"):
            plgpu.store(ref.at[index, pl.ds(first, size)], piece, optimized=False)
        else:  # JAX 0.11, where an assignment does that, and later refuses to
            ref[index, pl.ds(first, size)] = piece


def _zeros(dim: int) -> Row:
    def zeros(size):
        if size == 1:
            return jnp.float32(0)
        return plgpu.layout_cast(jnp.zeros(size, jnp.float32), _layout(dim, size))

    return tuple(zeros(size) for _, size in _pieces(dim))


def _where(condition: Any, row: Row, other: Row | float) -> Row:
    others = other if isinstance(other, tuple) else (other,) * len(row)
    return tuple(jnp.where(condition, a, b) for a, b in zip(row, others, strict=True))


# What is summed


class Terms(NamedTuple):
    """Rows that stand one behind the other, and may be found by a detour.

    Attributes:
        dim: of the rows.
        operands: what the kernel gets.
        load: the row at a position, from references to the operands.
    """

    dim: int
    operands: Any
    load: Callable[[Any, Any], Row]


def _lookups(table: Array, slots: Array, inverse: Array, weights: Array | None) -> Terms:
    """The rows of lookups, weighted."""
    _check_table(table)
    (count, dim), unique = table.shape, len(slots)

    def load(operands, position):
        table, slots, inverse, weights, one = operands
        which = inverse[position]
        slot = slots[jnp.minimum(which, unique - 1)]
        row = _load(table, jnp.minimum(slot, count - 1))
        if weights is not None:
            weight = weights[position]
            row = tuple(_product(piece, weight, one[0]) for piece in row)
        return _where((which < unique) & (slot < count), row, 0.0)

    return Terms(dim, (table, *jax.tree.map(_not_empty, (slots, inverse, weights)), _one()), load)


def _occurrences(gradients: Gradients) -> Terms:
    """The gradients of lookups, weighted, in the order of their rows."""
    _check_rows("gradients", gradients.rows, jnp.float32)

    def load(operands, position):
        rows, sources, weights, order, one = operands
        lookup = order[position]
        row = _load(rows, lookup if sources is None else sources[lookup])
        if weights is not None:
            weight = weights[lookup]
            row = tuple(_product(piece, weight, one[0]) for piece in row)
        return row

    operands = jax.tree.map(_not_empty, (gradients.rows, gradients.sources, gradients.weights, gradients.order))
    return Terms(gradients.rows.shape[1], (*operands, _one()), load)


def _not_empty(array: Array) -> Array:
    """The same with one entry at least, so that it may be read, if in vain."""
    return array if len(array) else jnp.zeros((1, *array.shape[1:]), array.dtype)


# Sums


class Lists(NamedTuple):
    """Lists of terms that follow each other.

    Attributes:
        begins: `int32[S]`, the position of each list's first term.
        lengths: `int32[S]`.
        owners: `int32[...]`, the list that the term at each multiple of BLOCK is in; S or larger for none.
        longest: no list can be longer.
    """

    begins: Array
    lengths: Array
    owners: Array
    longest: int


def _bag_lists(bags: Sequence[Bags]) -> Lists:
    begins, lengths, owners = ([jnp.zeros(0, jnp.int32)] for _ in range(3))
    first = start = longest = 0
    for feature in bags:
        owner: Array
        if feature.owners is None or feature.offsets is None:
            each = feature.lookups // max(feature.count, 1)
            offsets = each * jnp.arange(feature.count + 1, dtype=jnp.int32)
            owner = jnp.arange(feature.lookups, dtype=jnp.int32) // max(each, 1)
        else:
            each, offsets, owner = feature.lookups, feature.offsets, feature.owners
        begins.append(start + offsets[:-1])
        lengths.append(offsets[1:] - offsets[:-1])
        none = sum(feature.count for feature in bags)
        owners.append(jnp.where(owner < feature.count, first + owner, none)[-start % BLOCK :: BLOCK])
        first, start, longest = first + feature.count, start + feature.lookups, max(longest, each)
    return Lists(jnp.concatenate(begins), jnp.concatenate(lengths), jnp.concatenate(owners), longest)


def _occurrence_lists(gradients: Gradients) -> Lists:
    inverse, order, starts = gradients.inverse, gradients.order, gradients.starts
    return Lists(starts[:-1], starts[1:] - starts[:-1], inverse[order[::BLOCK]], len(order))


def _sum(terms: Terms, lists: Lists, accept: Array | bool) -> Array:
    """The sum of each list, NaN where `accept` is false."""
    count = len(lists.begins)
    if not count:
        return jnp.zeros((0, terms.dim), jnp.float32)
    levels = _sum_blocks(terms, lists)
    width = _side_by_side(terms.dim)

    def body(program, operands, out):
        accept, lists, refs, levels = operands
        reads, ranges = _ranges(program, width, lists)
        # The last program may have fewer lists: its last sum is that of no term.
        sums = _sum_lists(terms, refs, levels, ranges)
        for i, (read, row) in enumerate(zip(reads, sums, strict=True)):
            row = _where(accept[0], row, jnp.nan)

            @pl.when(program * width + i < count)
            def _(read=read, row=row):
                _store(out, read, row)

    out = jax.ShapeDtypeStruct((count, terms.dim), jnp.float32)
    return _launch("sum", body, pl.cdiv(count, width), (_flag(accept), lists[:2], terms.operands, levels), out)


def _sum_blocks(terms: Terms, lists: Lists) -> tuple[Array, ...]:
    """The sums of the blocks of each list, then the sums of the blocks of those: as many as a list can have.

    A list that begins at b has its first block sum at ceil(b / BLOCK) among those of all lists: see `xla._sum_lists`.
    Entries of no block are not written, and never read.
    """
    levels: list[Array] = []
    begins, lengths, owners, longest = lists
    while longest > BLOCK and len(levels) < xla.LEVELS:
        firsts, blocks = _blocks(begins, lengths)
        place, some = jnp.arange(len(owners), dtype=jnp.int32), jnp.minimum(owners, len(begins) - 1)
        rank = place - firsts[some]
        used = (owners < len(begins)) & (rank < blocks[some])
        levels.append(_sum_each(terms, jnp.where(used, begins[some] + BLOCK * rank, -1)))
        terms = Terms(terms.dim, levels[-1], _load)
        begins, lengths, longest = firsts, blocks, longest // BLOCK
        owners = jnp.where(used, owners, len(begins))[::BLOCK]
    return tuple(levels)


def _blocks(begin: Array, length: Array) -> tuple[Array, Array]:
    """Of a list: the place of its first block sum, and their number."""
    block = jnp.int32(BLOCK)
    return lax.div(begin + (BLOCK - 1), block), jnp.where(length > BLOCK, lax.div(length, block), 0)


def _sum_each(terms: Terms, begins: Array) -> Array:
    """The sums of the BLOCK terms from each begin on; nothing is written for negative ones."""

    def body(program, operands, out):
        begins, refs = operands
        begin = begins[program]

        @pl.when(begin >= 0)
        def _():
            (row,) = _in_order(
                lambda place: terms.load(refs, place), [(begin, jnp.int32(BLOCK))], terms.dim, _in_flight(terms.dim)
            )
            _store(out, program, row)

    out = jax.ShapeDtypeStruct((len(begins), terms.dim), jnp.float32)
    return _launch("sum_blocks", body, len(begins), (begins, terms.operands), out)


def _in_flight(dim: int) -> int:
    """How many rows a program loads at a time: 8 unless they are long."""
    return 8 if _registers(dim) <= 12 else 4


def _side_by_side(dim: int, kept: int = 0) -> int:
    """How many lists a program sums at a time, while it holds so many other rows for each."""
    return next(width for width in (4, 2, 1) if width == 1 or width * (1 + kept) * _registers(dim) <= 48)


def _ranges(program: Any, width: int, lists: Any) -> tuple[list[Any], list[tuple[Any, Any]]]:
    """The lists of a program, and where their terms are; of those beyond the last, no terms."""
    begins, lengths = lists
    count = begins.shape[0]
    places = [program * width + i for i in range(width)]
    reads = [jnp.minimum(place, count - 1) for place in places]
    pairs = zip(places, reads, strict=True)
    return reads, [(begins[read], jnp.where(place < count, lengths[read], 0)) for place, read in pairs]


def _sum_lists(terms: Terms, refs: Any, levels: Sequence[Any], ranges: list[tuple[Any, Any]]) -> list[Row]:
    """The sums of a few lists (begin, length), by the tree."""
    blocks = [_blocks(*list_) if levels else (0, 0) for list_ in ranges]
    rests = [
        (begin + BLOCK * count, length - BLOCK * count)
        for (begin, length), (_, count) in zip(ranges, blocks, strict=True)
    ]
    sums = _in_order(lambda place: terms.load(refs, place), rests, terms.dim, _in_flight(terms.dim) // len(ranges))
    if not levels:
        return sums
    # Most lists have no blocks, and end here at once; those that have some have many.
    return [_add(row, _sum_level(levels, list_, terms.dim)) for row, list_ in zip(sums, blocks, strict=True)]


def _sum_level(levels: Sequence[Any], list_: tuple[Any, Any], dim: int) -> Row:
    """The sum of a list (begin, length) of block sums."""
    here, *above = levels
    begin, length = list_
    blocks = _blocks(begin, length) if above else (0, 0)
    ranges = [(begin + BLOCK * blocks[1], length - BLOCK * blocks[1])]
    (row,) = _in_order(lambda place: _load(here, place), ranges, dim, _in_flight(dim))
    return _add(row, _sum_level(above, blocks, dim)) if above else row


def _in_order(load: Callable[[Any], Row], ranges: list[tuple[Any, Any]], dim: int, ahead: int) -> list[Row]:
    """The sums of the terms of a few lists (begin, length), in order; `ahead` terms of each are loaded at a time."""
    longest = ranges[0][1]
    for _, length in ranges[1:]:
        longest = jnp.maximum(longest, length)

    def step(i, sums):
        ranks = [i * ahead + k for k in range(ahead)]
        # Where a list has ended, some row is loaded and not added.
        rows = [[load(jnp.where(rank < length, begin + rank, 0)) for rank in ranks] for begin, length in ranges]
        for k, rank in enumerate(ranks):
            sums = [
                _where(rank < length, _add(total, row[k]), total)
                for total, row, (_, length) in zip(sums, rows, ranges, strict=True)
            ]
        return sums

    return lax.fori_loop(0, lax.div(longest + (ahead - 1), jnp.int32(ahead)), step, [_zeros(dim) for _ in ranges])


def _add(row: Row, other: Row) -> Row:
    return tuple(a + b for a, b in zip(row, other, strict=True))


# Arithmetic
#
# Mosaic GPU lets the compiler fuse products and sums, and divide and take roots with an error of up to two units in the
# last place. What is below is rounded as IEEE 754 says, by the help of a 1 that the compiler does not know to be one.


def _one() -> Array:
    return jnp.ones(1, jnp.float32)


def _product(a: Array, b: Array, one: Array) -> Array:
    """`a * b`, rounded before it is added to anything: what the compiler may fuse is the product with 1, exact."""
    return (a * b) * one


def _quotient(a: Array, b: Array, one: Array) -> Array:
    """`a / b` by way of float64, whose second rounding does no harm: it has more than twice the bits.

    Without the product with 1 the compiler takes the whole for a division of float32.
    """
    with jax.enable_x64(True):
        return (_wide(a) * _wide(one) / _wide(b)).astype(jnp.float32)


def _root(a: Array, one: Array) -> Array:
    """The square root, by way of float64 as well."""
    with jax.enable_x64(True):
        return jnp.sqrt(_wide(a) * _wide(one)).astype(jnp.float32)


def _wide(a: Array) -> Array:
    return a.astype(jnp.float64)


# Optimizers


def _load_kept(kept: Slots, place: Any, rule: Rule) -> Slots:
    """What is kept in a slot: rows, but for the one number that rowwise_adagrad keeps."""
    scalars = (len(kept.state) - 1,) if rule.name == "rowwise_adagrad" else ()
    state = tuple(leaf[place, 0] if i in scalars else _load(leaf, place) for i, leaf in enumerate(kept.state))
    return Slots(_load(kept.weights, place), state, kept.counts[place], None)


def _store_kept(kept: Slots, place: Any, new: Slots) -> None:
    _store(kept.weights, place, new.weights)
    for leaf, value in zip(kept.state, new.state, strict=True):
        if isinstance(value, tuple):
            _store(leaf, place, value)
        else:
            leaf[place, 0] = value
    kept.counts[place] = new.counts
    kept.dirty[place] = True


def _updated(
    rule: Rule, scalars: dict[str, Any], summed: Row, old: Slots, words: Row | None, lookups: Any, dtype: Any
) -> Slots:
    """What is kept in a slot after the update, the weights in their dtype."""
    if rule.master_copy:
        weights, state = _apply(str(rule.name), scalars, summed, old.state[0], old.state[1:])
        state = (weights, *state)
    else:
        weights, state = _apply(str(rule.name), scalars, summed, old.weights, old.state)
    if words is None or rule.master_copy:
        rounded = tuple(piece.astype(dtype) for piece in weights)
    else:
        rounded = tuple(_round_stochastically(p, w, dtype) for p, w in zip(weights, words, strict=True))
    return Slots(rounded, state, xla.add_counts(old.counts, lookups), None)


def _apply(name: str, c: dict[str, Any], g: Row, w: Row, state: Sequence[Any]) -> tuple[Row, tuple[Any, ...]]:
    """The rules of FUSED, in its order of operations: new weights and state from summed gradient, weights and state."""

    def times(a, b):
        return _product(a, b, c["one"])

    def over(a, b):
        return _quotient(a, b, c["one"])

    def root(a):
        return _root(a, c["one"])

    match name:
        case "sgd":
            return _each(lambda w, g: w + times(c["rate"], g), w, g), ()
        case "momentum":
            m = _each(lambda m, g: g + times(c["decay"], m), state[0], g)
            return _each(lambda w, m: w + times(c["rate"], m), w, m), (m,)
        case "adagrad":
            s = _each(lambda s, g: s + times(g, g), state[0], g)
            steps = _each(lambda g, s: jnp.where(s > 0, over(g, root(s + c["eps"])), 0.0), g, s)
            return _each(lambda w, step: w + times(c["rate"], step), w, steps), (s,)
        case "rowwise_adagrad":
            squares = _each(lambda g: times(g, g), g)
            total = sum(jnp.sum(square) if square.ndim else square for square in squares)
            s = state[0] + over(total, jnp.float32(sum(piece.size for piece in g)))
            scale = root(s) + c["eps"]
            return _each(lambda w, g: w + times(c["rate"], over(g, scale)), w, g), (s,)
        case "adam":
            m = _each(lambda m, g: times(c["b1"], m) + times(c["one_minus_b1"], g), state[0], g)
            v = _each(lambda v, g: times(c["b2"], v) + times(c["one_minus_b2"], g * g), state[1], g)

            def step(w, m, v):
                scale = root(over(v, c["correction2"]) + c["eps_root"]) + c["eps"]
                return w + times(c["rate"], over(over(m, c["correction1"]), scale))

            return _each(step, w, m, v), (m, v)
    raise NotImplementedError(f"the rule {name!r}")


def _each(function: Callable[..., Array], *rows: Row) -> Row:
    return tuple(function(*pieces) for pieces in zip(*rows, strict=True))


def _round_stochastically(values: Array, words: Array, dtype: Any) -> Array:
    """Each value to one of its two neighbours in a dtype of 16 bits, by random bits, up where these carry.

    Bits of a positive float count up with its value, from one exponent into the next as well. What is larger than
    the largest of the dtype, infinite or no number is rounded to nearest.
    """
    bits = lax.bitcast_convert_type(values, jnp.uint32)
    magnitude = bits & jnp.uint32(0x7FFFFFFF)
    if dtype == jnp.bfloat16:
        rounded = (magnitude + (words >> 16)) >> 16
    else:
        exponent = magnitude >> 23
        smallest = 127 - 14  # exponent of the smallest normal float16
        normal = ((magnitude + (words >> 19)) >> 13) - jnp.uint32((127 - 15) << 10)
        # Below it a significand of 24 bits loses a bit more at each halving; there are random bits for 31 of them.
        significand = (magnitude & jnp.uint32(0x7FFFFF)) | jnp.uint32(0x800000)
        dropped = jnp.uint32(13 + smallest) - jnp.minimum(exponent, jnp.uint32(smallest))
        beyond = jnp.maximum(dropped, jnp.uint32(31)) - jnp.uint32(31)
        dropped = dropped - beyond
        kept = significand >> jnp.minimum(beyond, jnp.uint32(31))
        subnormal = (kept + (words >> (jnp.uint32(32) - dropped))) >> dropped
        rounded = jnp.where(exponent < smallest, subnormal, normal)
    signed = ((bits >> 31) << 15) | rounded
    largest = int(np.float32(jnp.finfo(dtype).max).view(np.uint32))
    narrow = lax.bitcast_convert_type(signed.astype(jnp.uint16), dtype)
    return jnp.where(magnitude > jnp.uint32(largest), values.astype(dtype), narrow)


# What is refused


def _check_rows(name: str, rows: Array, *dtypes: Any) -> None:
    if rows.ndim != 2:
        raise NotImplementedError(f"{name} of {rows.ndim} axes: rows have one, so that there are 2")
    if rows.dtype not in dtypes:
        raise NotImplementedError(f"{name} of {rows.dtype}: expected {', '.join(jnp.dtype(d).name for d in dtypes)}")
    if not 1 <= rows.shape[1] <= MOST:
        raise NotImplementedError(f"{name} of {rows.shape[1]} columns: 1 to {MOST} fit in registers")


def _check_table(table: Array) -> None:
    _check_rows("a table", table, jnp.float32, jnp.bfloat16, jnp.float16)
    if not len(table):
        raise NotImplementedError("a table without rows: a program reads one even where it needs none")


def _check_update(kept: Slots, rule: Rule) -> None:
    _check_table(kept.weights)
    if rule.name not in FUSED:
        raise NotImplementedError(f"the rule {rule.name!r}: those with kernels are {', '.join(FUSED)}")
    dim = kept.weights.shape[1]
    sizes = {"sgd": (), "rowwise_adagrad": (1,), "adam": (dim, dim)}.get(str(rule.name), (dim,))
    expected = [f"float32[{size}]" for size in ((dim, *sizes) if rule.master_copy else sizes)]
    found = [f"{leaf.dtype}{[*leaf.shape[1:]]}" for leaf in kept.state]
    if found != expected:
        raise NotImplementedError(
            f"{rule.name} with a state of [{', '.join(found)}] a slot: expected [{', '.join(expected)}]"
        )
    if rule.words is not None and kept.weights.dtype == jnp.float32:
        raise NotImplementedError("random bits to round float32 weights: only those of 16 bits are rounded")
