"""The operations in plain XLA: their definition, and the backend that runs everywhere.

Conventions: a *buffer* is a pytree of arrays with a leading axis of `slots`; `slots[U]` are `int32` places in it, each
at most once; a place equal to the number of slots, or larger, is padding: it reads as zero and is never written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def _take(table: jax.Array, places: jax.Array) -> jax.Array:
    return table.at[places].get(mode="fill", fill_value=0)


def _put(table: jax.Array, places: jax.Array, rows: jax.Array) -> jax.Array:
    return table.at[places].set(rows, mode="drop")


def _replace(buffer: Any, slots: jax.Array, old: Any, new: Any, accept: jax.Array) -> Any:
    """Writes `new` if the scalar `accept` holds, else `old`, which was read from the same slots. So the write depends
    on the read, without which XLA would copy the whole buffer to keep the two apart."""
    return jax.tree.map(lambda table, n, o: _put(table, slots, jnp.where(accept, n, o)), buffer, new, old)


def read(buffer: Any, slots: jax.Array) -> Any:
    """The rows at `slots` (`int32[M]`): a pytree of `[M, ...]` from a pytree of `[slots, ...]`."""
    return jax.tree.map(lambda table: _take(table, slots), buffer)


def gather(table: jax.Array, slots: jax.Array, inverse: jax.Array) -> jax.Array:
    """The row of every lookup.

    Args:
        table: `[slots, ...]`.
        slots: `int32[U]`, the places of the unique rows.
        inverse: `int32[L]`, for each lookup the position of its row in `slots`; U is padding and gives zeros.

    Returns:
        `[L, ...]`, lookup i being `table[slots[inverse[i]]]`.
    """
    # The unique rows first: few reads at random from the large table, the many then from a small one.
    return _take(_take(table, slots), inverse)


def sum_occurrences(gradients: jax.Array, inverse: jax.Array, unique: int) -> jax.Array:
    """Sums the gradients of the lookups of each unique row, in order of occurrence.

    Args:
        gradients: `[L, dim]`.
        inverse: `int32[L]`, positions below `unique`; a larger one is padding and is left out.
        unique: U.

    Returns:
        `[U, dim]`. On CPU the sum is taken in order of lookup; the scatter of a GPU has no fixed order unless XLA runs
        with `--xla_gpu_deterministic_ops`.
    """
    zeros = jnp.zeros((unique, gradients.shape[-1]), gradients.dtype)
    return zeros.at[inverse].add(gradients, mode="drop")


def update(buffer: Any, slots: jax.Array, rows: Callable[[Any], Any], accept: jax.Array) -> Any:
    """Replaces the rows at `slots` by `rows(old rows)`, in place where the buffer is donated.

    Args:
        buffer: pytree of `[slots, ...]`.
        slots: `int32[U]`.
        rows: maps the old rows, a pytree of `[U, ...]`, to the new ones, each by itself.
        accept: `bool[]`; where false the buffer stays as it is.
    """
    old = read(buffer, slots)
    return _replace(buffer, slots, old, rows(old), accept)


def exchange(buffer: Any, slots: jax.Array, incoming: Any, accept: jax.Array) -> tuple[Any, Any]:
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
