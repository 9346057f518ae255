"""Stochastic rounding to 16 bits, and the random numbers for it: pure JAX on integers of 32 bits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def random_words(streams: jax.Array, ids: jax.Array, step: jax.Array, dim: int) -> jax.Array:
    """32 random bits for each weight of each row: a pure function of (stream, step, id, column).

    So the bits depend neither on the other rows, nor on where a row stands among them, nor on anything drawn before.
    They are MurmurHash3_x86_32 (Appleby, public domain) with seed 0 of the six words `stream[0], stream[1], step,
    id[0], id[1], column`.

    Args:
        streams: `uint32[N, 2]`, the two halves of the number that stands for seed and table of each row.
        ids: `uint32[N, 2]`, the two halves of each row's id; which one comes first is the caller's choice.
        step: `int32[]`.
        dim: number of columns.

    Returns:
        `uint32[N, dim]`.

    >>> words = random_words(jnp.array([[1, 2]], jnp.uint32), jnp.array([[7, 0]], jnp.uint32), jnp.array(3), 3)
    >>> [hex(word) for word in words[0].tolist()]
    ['0x6a8679ab', '0x39f45453', '0x8a8b4e82']
    """
    hashed: Any = jnp.zeros(ids.shape[:1], jnp.uint32)
    for word in (streams[:, 0], streams[:, 1], jnp.asarray(step).astype(jnp.uint32), ids[:, 0], ids[:, 1]):
        hashed = _mix_in(hashed, word)
    hashed = _mix_in(hashed[:, None], jnp.arange(dim, dtype=jnp.uint32)[None, :])
    hashed = hashed ^ np.uint32(24)  # the length in bytes
    hashed = (hashed ^ (hashed >> 16)) * np.uint32(0x85EBCA6B)
    hashed = (hashed ^ (hashed >> 13)) * np.uint32(0xC2B2AE35)
    return hashed ^ (hashed >> 16)


def _mix_in(hashed: Any, word: Any) -> Any:
    word = _rotate(word * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)
    return _rotate(hashed ^ word, 13) * np.uint32(5) + np.uint32(0xE6546B64)


def _rotate(word: Any, by: int) -> Any:
    return (word << by) | (word >> (32 - by))


def round_stochastically(values: jax.Array, words: jax.Array, dtype: Any) -> jax.Array:
    """Each value becomes one of its two neighbours in `dtype`, the nearer one with the greater probability.

    With neighbours a < v < b, v becomes b with probability (v - a) / (b - a), so that its expectation is v (Gupta et
    al., ICML 2015, arXiv 1502.02551). A value that `dtype` can represent stays, -0 and infinities included; NaN stays
    NaN. -v with the same word becomes minus what v becomes. The probabilities are exact, except that they are cut to
    multiples of 2**-31 between the subnormal numbers of float16 (below 2**-14, 2**-24 apart); subnormal numbers are
    neighbours as any others in both dtypes. There is no expectation between the largest finite value and infinity:
    beyond it a value is rounded as by `astype`, to nearest, and becomes infinite where it is nearer to the next power
    of two. All is done on the bits, as XLA may take subnormal float32 numbers for zero.

    Args:
        values: `float32[...]`.
        words: `uint32[...]` of the same shape, uniform random bits.
        dtype: bfloat16 or float16.

    Returns:
        `dtype[...]`.

    Raises:
        ValueError: for another dtype, or if the shapes differ.

    >>> halfway = jnp.full(2, 1 + 2**-11, jnp.float32)  # float16 has 1 and 1 + 2**-10
    >>> round_stochastically(halfway, jnp.array([0x7FFFFFFF, 0x80000000], jnp.uint32), jnp.float16).tolist()
    [1.0, 1.0009765625]
    """
    dtype = np.dtype(dtype)
    if dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"round_stochastically(dtype={dtype}): dtype must be bfloat16 or float16")
    if values.shape != words.shape:
        raise ValueError(f"round_stochastically needs one word a value: got {values.shape} and {words.shape}")
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    rounded = _round_bfloat16(magnitude, words) if dtype == jnp.bfloat16 else _round_float16(magnitude, words)
    signed = ((bits >> 31) << 15) | rounded
    largest = np.float32(jnp.finfo(dtype).max).view(np.uint32)  # NaN and infinities compare as larger
    return jnp.where(
        magnitude > largest,
        values.astype(dtype),
        jax.lax.bitcast_convert_type(signed.astype(jnp.uint16), dtype),
    )


# Bits of a positive float count up with its value. So random bits added in the place of those that are dropped carry
# into those that stay with the right probability, from one exponent into the next as well.


def _round_bfloat16(magnitude: Any, words: Any) -> Any:
    return (magnitude + (words >> 16)) >> 16


def _round_float16(magnitude: Any, words: Any) -> Any:
    exponent = magnitude >> 23
    smallest = np.uint32(127 - 14)  # exponent of the smallest normal float16
    normal = ((magnitude + (words >> 19)) >> 13) - np.uint32((127 - 15) << 10)
    # Below it a significand of 24 bits loses a bit more at each halving.
    significand = (magnitude & np.uint32(0x7FFFFF)) | np.uint32(0x800000)
    dropped = 13 + smallest - jnp.minimum(exponent, smallest)
    beyond = jnp.maximum(dropped, 31) - 31  # more than there are random bits for
    dropped = dropped - beyond
    subnormal = ((significand >> jnp.minimum(beyond, 31)) + (words >> (32 - dropped))) >> dropped
    return jnp.where(exponent < smallest, subnormal, normal)
