"""Blocks of steps: the program that runs many of them in one dispatch, and what it is given. Used by `LookAhead.scan`.

A block of k steps brings its missed rows as one array for each leaf, those of each step one behind the other, and its
victims leave the same way: step i reads its rows at `starts[i]` and writes its victims there. All steps go over as many
rows as one step can fetch; what lies behind a step's own rows is padding to it, and overwritten by the step behind it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache.optimizers import Rows
from jaxcache.state import Array, CacheState, Counters, GroupExchange, Plan, count_exchange, exchange_group

TrainStep = Callable[[CacheState, Plan, Any, Any], tuple[CacheState, Any, Any]]


class Moves(NamedTuple):
    """The rows that come in during a block of k steps, in each of G groups.

    Attributes:
        groups: of each group the rows of all steps one behind the other, padded: `[R, ...]`.
        starts: `int32[k, G]`, where the rows of each step begin.
        counts: `int32[k, G]`, how many there are.
    """

    groups: tuple[GroupExchange, ...]
    starts: Array
    counts: Array


def run(
    train_step: TrainStep,
    sizes: tuple[int, ...],
    cache: CacheState,
    train: Any,
    moves: Moves,
    plans: Plan,
    batches: Any,
) -> tuple[CacheState, Any, Any, tuple[Rows, ...], jax.Array]:
    """Exchange and train step of each step of a block, one after the other. Pure.

    Args:
        train_step: called with the cache, a step's plan, `train` and a step's batch.
        sizes: of each group, the most rows that a step fetches; `R` is at least that behind the start of every step.
        cache: the cache before the block.
        train: the other state of the training.
        moves: the incoming rows.
        plans: of all steps, leaves `[k, ...]`.
        batches: of all steps, leaves `[k, ...]`.

    Returns:
        Cache and `train` after the block; the outputs, `[k, ...]`, but without that axis where k is 1; of each group
        the rows that left, `[R, ...]`, those of each step where the rows that it brought in were; and `int32[k, 4]`,
        the records of `count_exchange`.
    """

    def step(carry: tuple[CacheState, Any, list[Rows], Any], part: tuple[Array, Array, Plan, Any]) -> Any:
        (cache, train, home, last), (starts, counts, plan, batch) = carry, part
        counters, groups, left = Counters.of(cache), [], []
        for number, (state, size) in enumerate(zip(cache.groups, sizes, strict=True)):
            incoming = _rows_from(moves.groups[number], starts[number], size)
            own = jnp.arange(size, dtype=jnp.int32) < counts[number]
            incoming = incoming._replace(slots=jnp.where(own, incoming.slots, jnp.int32(state.slots)))
            contents, outgoing = exchange_group(state.contents, counters, incoming, plan.step, cache.backends)
            groups.append(state.holding(contents))
            left.append(_with_rows(home[number], starts[number], outgoing))
        counters, record = count_exchange(counters, plan.step)
        cache = dataclasses.replace(cache, groups=tuple(groups), **counters._asdict())
        # What XLA makes of the train step must not depend on what stands before it.
        cache, plan, train, batch = jax.lax.optimization_barrier((cache, plan, train, batch))
        cache, train, output = _checked(train_step(cache, plan, train, batch), train)
        return (cache, train, left, output), (record, last)

    home = [jax.tree.map(jnp.zeros_like, group.rows) for group in moves.groups]
    parts = (moves.starts, moves.counts, plans, batches)
    first = jax.tree.map(lambda leaf: leaf[0], parts)
    if len(moves.starts) == 1:
        # XLA unrolls a loop of one step, and what then adds the axis to its output would be fused with the step.
        (cache, train, home, outputs), (records, _) = step((cache, train, home, None), first)
        return cache, train, outputs, tuple(home), records
    # Each step hands its output on, and the next one stacks it. In its own step the stacking would be fused with what
    # computes it, which on a CPU changes the last bits, barrier or not.
    _, _, output = _checked(jax.eval_shape(train_step, cache, first[2], train, first[3]), train)
    output = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), output)
    (cache, train, home, output), (records, outputs) = jax.lax.scan(step, (cache, train, home, output), parts)
    outputs = jax.tree.map(lambda earlier, last: jnp.concatenate([earlier[1:], last[None]]), outputs, output)
    return cache, train, outputs, tuple(home), records


def _checked(result: Any, train: Any) -> tuple[CacheState, Any, Any]:
    """What a train step returned that was given `train`."""
    if not (isinstance(result, tuple) and len(result) == 3 and isinstance(result[0], CacheState)):
        raise TypeError(
            "scan needs a train step that returns `cache, train, output`, the cache being what `update` returned; it "
            f"returned {jax.tree.structure(result)}"
        )
    given, returned = _described(train), _described(result[1])
    if given != returned:
        raise TypeError(
            f"scan needs a train step that returns `train` in the form in which it was given: {given}, got {returned}"
        )
    return result


def _described(tree: Any) -> str:
    """Structure, dtypes and shapes of a pytree."""
    leaves, treedef = jax.tree.flatten(jax.eval_shape(lambda: tree))
    return f"{treedef} of {', '.join(f'{leaf.dtype}{list(leaf.shape)}' for leaf in leaves)}"


def _rows_from(tree: Any, start: Array, size: int) -> Any:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size), tree)


def _with_rows(tree: Any, start: Array, rows: Any) -> Any:
    return jax.tree.map(lambda leaf, part: jax.lax.dynamic_update_slice_in_dim(leaf, part, start, 0), tree, rows)


@functools.lru_cache
def block_program(device: jax.Device) -> Any:
    """`run`, compiled for a device; cache and `train` are donated. Kept, so that another pipeline compiles nothing."""
    # Where arrays are is said here, or a batch placed by the loader would leave the cache placed, which it was not at
    # first, and the second block would be compiled anew.
    placed = jax.sharding.SingleDeviceSharding(device)
    return jax.jit(run, static_argnums=(0, 1), donate_argnums=(2, 3), in_shardings=placed)


def block_lengths(steps: int, asked: int) -> Iterator[int]:
    """The lengths of the blocks that `steps` steps in a row make: what was asked for, else powers of two.

    There is a program for each length, so that blocks that were cut short must not be of any length.

    >>> list(block_lengths(100, 100)), list(block_lengths(77, 100))
    ([100], [64, 8, 4, 1])
    """
    while steps:
        length = asked if steps >= asked else 1 << (steps.bit_length() - 1)
        yield length
        steps -= length


def content_kind(content: Any) -> tuple:
    """What two batches must have in common to be stacked: their structure, and what each leaf is made of."""
    leaves, structure = jax.tree.flatten(content)
    return structure, tuple(getattr(leaf, "dtype", type(leaf)) for leaf in leaves)


def stack(trees: Sequence[Any]) -> Any:
    """One tree of `[k, ...]` from k alike. Leaves whose shapes differ become an `object[k]` of copies of them.

    >>> stack([{"label": np.zeros(2)}, {"label": np.ones(2)}])["label"].shape
    (2, 2)
    """
    return jax.tree.map(lambda *leaves: _stack_leaves(leaves), *trees)


def _stack_leaves(leaves: tuple[Any, ...]) -> Any:
    if len({np.shape(leaf) for leaf in leaves}) > 1:
        ragged = np.empty(len(leaves), object)
        for place, leaf in enumerate(leaves):
            ragged[place] = leaf if isinstance(leaf, jax.Array) else np.array(leaf)
        return ragged
    return jnp.stack(leaves) if isinstance(leaves[0], jax.Array) else np.stack(leaves)


def check_stacked(batches: Any, steps: int) -> None:
    """Raises ValueError if a leaf is not an array with a leading axis of `steps`."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(batches):
        name = f"batches{jax.tree_util.keystr(path)}"
        if getattr(getattr(leaf, "dtype", None), "hasobject", False):
            raise ValueError(
                f"scan cannot take {name}, whose shape differs from batch to batch: give it the parts that the train "
                'step uses, such as `{"label": batches["label"]}`'
            )
        if np.shape(leaf)[:1] != (steps,):
            raise ValueError(
                f"scan needs batches with a leading axis of the block's {steps} steps, as they were yielded; {name} "
                f"has shape {np.shape(leaf)}"
            )
