"""The operations in plain XLA: their definition, and the backend that runs everywhere.

Conventions: a *buffer* is a pytree of arrays with a leading axis of `slots`; `slots[U]` are `int32` places in it, each
at most once; a place equal to the number of slots, or larger, is padding: it reads as zero and is never written.
`inverse[L]` are `int32` positions in `slots`, one for each lookup; U or larger stands for no row.

Sums are taken by one tree, which depends on nothing but the number of terms, so that every backend can make the same
bits and none has to add up a hot row one term after another. Up to BLOCK terms are added in order, starting from zero.
Of more terms each full block of BLOCK is summed that way; the sums of the blocks, if they are more than BLOCK, go
through the same once more, and what that leaves is added in order. What did not fill a block at the end of a list is
summed by itself, and added to the sum of the list's blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 64
LEVELS = 2  # lists that are cut into blocks: the terms, and the sums of their blocks

Array = Any


@dataclass(frozen=True)
class Bags:
    """The bags of one feature; its lookups follow each other, bag after bag.

    Attributes:
        count: number of bags.
        lookups: number of lookups, padding included.
        owners: for ragged bags `int32[lookups]`, the bag of each lookup; `count` for padding, which comes last. Else
            None: every bag has `lookups // count` of them.
        offsets: for ragged bags `int32[count + 1]`, where each begins; the last is the number of lookups in bags.
    """

    count: int
    lookups: int
    owners: Array | None = None
    offsets: Array | None = None

    @property
    def size(self) -> int:
        """Lookups of each bag, if they all have as many."""
        return self.lookups // self.count if self.count else 0


class Gradients(NamedTuple):
    """The gradients of the lookups of a batch, to be summed by row. Lookup l has `weights[l] * rows[sources[l]]`.

    Attributes:
        rows: `float32[R, dim]`.
        sources: `int32[L]`, below R but for lookups that stand for no row; None where lookup l has row l.
        weights: `float32[L]`, or None where all are 1.
        inverse: `int32[L]`, the position of each lookup's row among the unique rows; U or larger for none.
        order: `int32[L]`, the lookups of each unique row one behind the other, in order; those of no row come last.
        starts: `int32[U + 1]`, where the lookups of each unique row begin in `order`; the last is where they end.
    """

    rows: Array
    sources: Array | None
    weights: Array | None
    inverse: Array
    order: Array
    starts: Array


class Slots(NamedTuple):
    """What an update changes, each with a leading axis of slots.

    Attributes:
        weights: `[slots, dim]`, float32, bfloat16 or float16.
        state: what the optimizer keeps, `[slots, ...]` each.
        counts: `int32[slots]`, grows by the lookups of a row, up to 2**31 - 1.
        dirty: `bool[slots]`, becomes true.
    """

    weights: Array
    state: tuple[Array, ...]
    counts: Array
    dirty: Array


class Rule(NamedTuple):
    """A row optimizer.

    Attributes:
        apply: the definition: from summed gradients `float32[U, dim]`, weights `[U, dim]` and state, to new weights
            and state.
        name: if `apply` is one of the rules that backends may know, its name: see `FUSED`. Else None.
        coefficients: the float32 scalars of that rule, in the order that `FUSED` gives.
        master_copy: whether the first leaf of the state, `float32[U, dim]`, is what the rule works on; the weights are
            that, rounded.
        words: `uint32[U, dim]`, random bits where weights of 16 bits are rounded stochastically; else None.
    """

    apply: Callable[[Array, Array, tuple[Array, ...]], tuple[Array, tuple[Array, ...]]]
    name: str | None = None
    coefficients: tuple[Array, ...] = ()
    master_copy: bool = False
    words: Array | None = None


# Rules that backends may know, with g the summed gradient, w the weights, and what else is kept for a row; the names
# of their coefficients. All is float32 and taken element by element, but for the mean of rowwise_adagrad.
FUSED = {
    # w += rate * g, where rate is minus the learning rate, here and below
    "sgd": ("rate",),
    # m = g + decay * m; w += rate * m
    "momentum": ("decay", "rate"),
    # s += g * g; w += rate * (g / sqrt(s + eps) where s > 0, else 0)
    "adagrad": ("eps", "rate"),
    # s += mean(g * g) over the row; w += rate * (g / (sqrt(s) + eps))
    "rowwise_adagrad": ("eps", "rate"),
    # m = b1 * m + (1 - b1) * g; v = b2 * v + (1 - b2) * (g * g);
    # w += rate * ((m / correction1) / (sqrt(v / correction2 + eps_root) + eps)), where correction1 = 1 - b1**updates
    "adam": ("b1", "one_minus_b1", "b2", "one_minus_b2", "eps", "eps_root", "correction1", "correction2", "rate"),
}


def _take(table: Array, places: Array) -> Array:
    if not len(table):  # which JAX refuses to read from
        return jnp.zeros((*places.shape, *table.shape[1:]), table.dtype)
    return table.at[places].get(mode="fill", fill_value=0)


def _put(table: Array, places: Array, rows: Array) -> Array:
    return table.at[places].set(rows, mode="drop")


def _replace(buffer: Any, slots: Array, old: Any, new: Any, accept: Array) -> Any:
    """Writes `new` if the scalar `accept` holds, else `old`, which was read from the same slots. So the write depends
    on the read, without which XLA would copy the whole buffer to keep the two apart."""
    return jax.tree.map(lambda table, n, o: _put(table, slots, jnp.where(accept, n, o)), buffer, new, old)


def read(buffer: Any, slots: Array) -> Any:
    """The rows at `slots` (`int32[M]`): a pytree of `[M, ...]` from a pytree of `[slots, ...]`."""
    return jax.tree.map(lambda table: _take(table, slots), buffer)


def rewrite(buffer: Any, slots: Array, rows: Callable[[Any], Any], accept: Array) -> Any:
    """Replaces the rows at `slots` by `rows(old rows)`, in place where the buffer is donated.

    Args:
        buffer: pytree of `[slots, ...]`.
        slots: `int32[U]`.
        rows: maps the old rows, a pytree of `[U, ...]`, to the new ones, each by itself.
        accept: `bool[]`; where false the buffer stays as it is.
    """
    old = read(buffer, slots)
    return _replace(buffer, slots, old, rows(old), accept)


def _read_unique(table: Array, slots: Array) -> Array:
    """The rows at `slots`. What is made of them must not depend on how XLA would fuse it with a table of this size."""
    return jax.lax.optimization_barrier(_take(table, slots))


def gather(table: Array, slots: Array, inverse: Array, accept: Array) -> Array:
    """The row of every lookup.

    Args:
        table: `[slots, dim]`, float32, bfloat16 or float16.
        slots: `int32[U]`, the places of the unique rows.
        inverse: `int32[L]`.
        accept: `bool[]`; where false the result is NaN.

    Returns:
        `float32[L, dim]`, lookup i being `table[slots[inverse[i]]]`, and zeros if it stands for no row.
    """
    # The unique rows first: few reads at random from the large table, the many then from a small one.
    rows = _take(_read_unique(table, slots), inverse).astype(jnp.float32)
    return jnp.where(accept, rows, jnp.nan)


def pool(
    table: Array, slots: Array, inverse: Array, bags: Sequence[Bags], weights: Array | None, accept: Array
) -> Array:
    """The weighted sums of bags of rows.

    Args:
        table, slots, inverse, accept: as for `gather`.
        bags: of each feature; their lookups follow each other in `inverse`.
        weights: `float32[L]`, or None where all are 1. Those of lookups that stand for no row are not looked at.

    Returns:
        `float32[bags, dim]`, those of all features, by the tree of this module; zeros for an empty bag. A backend may
        add bags that all have the same number of lookups in another fixed order.
    """
    unique = slots.shape[0]
    small = _read_unique(table, slots)
    parts, start = [jnp.zeros((0, table.shape[1]), jnp.float32)], 0
    for feature in bags:
        stop = start + feature.lookups
        rows = _take(small, inverse[start:stop]).astype(jnp.float32)
        if weights is not None:
            rows = rows * jnp.where(inverse[start:stop] < unique, weights[start:stop], jnp.float32(0))[:, None]
        if feature.owners is None:
            parts.append(_sum_equal(rows.reshape(feature.count, feature.size, rows.shape[1])))
        else:
            parts.append(_sum_segments(rows, feature.owners, feature.offsets))
        start = stop
    return jnp.where(accept, jnp.concatenate(parts), jnp.nan)


def sum_occurrences(gradients: Gradients) -> Array:
    """The sum of the gradients of each unique row's lookups, `float32[U, dim]`, by the tree of this module.

    On CPU that is exact; the scatter of a GPU adds in no fixed order unless XLA runs with
    `--xla_gpu_deterministic_ops`.
    """
    rows = gradients.rows
    if gradients.sources is not None:
        rows = _take(rows, gradients.sources)
    if gradients.weights is not None:
        rows = rows * gradients.weights[:, None]
    return _sum_segments(rows, gradients.inverse, gradients.starts, gradients.order)


def update(kept: Slots, slots: Array, gradients: Gradients, rule: Rule, accept: Array) -> Slots:
    """Sums the gradients of each unique row and applies a row optimizer, in place where `kept` is donated.

    Args:
        kept: everything that is kept in the slots.
        slots: `int32[U]`, the places of the unique rows.
        gradients: of the lookups.
        rule: the optimizer.
        accept: `bool[]`; where false nothing changes.

    Returns:
        The same after the update.
    """
    return update_summed(kept, slots, sum_occurrences(gradients), gradients.starts, rule, accept)


def update_summed(kept: Slots, slots: Array, summed: Array, starts: Array, rule: Rule, accept: Array) -> Slots:
    """The second half of `update`, from summed gradients `float32[U, dim]`."""
    # So that what XLA makes of the optimizer cannot depend on how the sums came about.
    summed = jax.lax.optimization_barrier(summed)

    def updated(old: Slots) -> Slots:
        weights, state = rule.apply(summed, old.weights, old.state)
        return Slots(weights, state, add_counts(old.counts, starts[1:] - starts[:-1]), jnp.ones_like(old.dirty))

    return rewrite(kept, slots, updated, accept)


def add_counts(counts: Array, more: Array) -> Array:
    """`counts + more`, both `int32`, at most 2**31 - 1: a hot row of a long run stays there."""
    most = jnp.iinfo(counts.dtype).max
    return jnp.where(counts > most - more, most, counts + more)


def exchange(buffer: Any, slots: Array, incoming: Any, accept: Array) -> tuple[Any, Any]:
    """Takes the rows at `slots` out and puts `incoming` in their place, in place where the buffer is donated.

    Args:
        buffer: pytree of `[slots, ...]`.
        slots: `int32[M]`.
        incoming: pytree of `[M, ...]`.
        accept: `bool[]`; where false the buffer stays as it is.

    Returns:
        The buffer and the rows that were at `slots`, a pytree of `[M, ...]`.
    """
    old = read(buffer, slots)
    return _replace(buffer, slots, old, incoming, accept), old


# The tree


def _sum_equal(rows: Array, levels: int = LEVELS) -> Array:
    """The sum over the second axis of `float32[bags, n, dim]`."""
    bags, terms, dim = rows.shape
    if terms <= BLOCK or not levels:
        return jnp.sum(rows, axis=1)
    blocks = terms // BLOCK
    summed = jnp.sum(rows[:, : blocks * BLOCK].reshape(bags, blocks, BLOCK, dim), axis=2)
    rest = jnp.sum(rows[:, blocks * BLOCK :], axis=1)
    return _sum_equal(summed, levels - 1) + rest


def _sum_segments(rows: Array, owners: Array, starts: Array, order: Array | None = None, levels: int = LEVELS) -> Array:
    """The sum of the rows of each segment.

    Args:
        rows: `float32[L, dim]`.
        owners: `int32[L]`, the segment of each row; S or larger for none.
        starts: `int32[S + 1]`: when the rows stand in `order`, segment s has those from `starts[s]` on.
        order: `int32[L]`, None if the rows already stand that way.
        levels: lists that may be cut into blocks, this one included.

    Returns:
        `float32[S, dim]`.
    """
    owners, starts = jnp.asarray(owners), jnp.asarray(starts)
    sorted_owners = owners if order is None else owners[order]
    return _sum_lists(rows, sorted_owners, starts[:-1], starts[1:] - starts[:-1], order, levels)


def _sum_lists(rows, owners, begins, lengths, order, levels):
    """As `_sum_segments`, for segments at `begins`, with owners that stand in order."""
    count, segments = len(rows), len(begins)
    if count <= BLOCK or not levels or not segments:
        if order is not None:
            owners = jnp.zeros_like(owners).at[order].set(owners, unique_indices=True)
        return jnp.zeros((segments, rows.shape[1]), rows.dtype).at[owners].add(rows, mode="drop")
    # A list that begins at b has its first block sum at ceil(b / BLOCK) among those of all lists. There is room for
    # them: a list of n has n // BLOCK full blocks and spans as many multiples of BLOCK. So the owner of a block sum is
    # that of the term at BLOCK times its place.
    blocks = jnp.where(lengths > BLOCK, lengths // BLOCK, 0)
    firsts = (begins + BLOCK - 1) // BLOCK
    places = -(-count // BLOCK)

    rank = jnp.arange(count, dtype=jnp.int32) - begins[owners]
    in_block = rank // BLOCK < blocks[owners]  # an owner that is none reads the last one's, and is dropped
    target = jnp.where(in_block, segments + firsts[owners] + rank // BLOCK, owners)
    target = jnp.where(owners < segments, target, segments + places)
    if order is not None:
        target = jnp.zeros_like(target).at[order].set(target, unique_indices=True)
    sums = jnp.zeros((segments + places, rows.shape[1]), rows.dtype).at[target].add(rows, mode="drop")
    rests, block_sums = sums[:segments], sums[segments:]

    # The lists of block sums, each known by the place of its first: there are few, and most segments have none.
    place, owner = jnp.arange(places, dtype=jnp.int32), owners[::BLOCK]
    first = firsts[owner]
    used = (owner < segments) & (place - first < blocks[owner])
    is_first = used & (place == first)
    totals = _sum_lists(
        block_sums,
        jnp.where(used, first, places),
        place,
        jnp.where(is_first, blocks[owner], 0),
        None,
        levels - 1,
    )
    return rests.at[jnp.where(is_first, owner, segments)].add(totals, mode="drop")
