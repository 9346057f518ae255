"""Stochastic rounding: random words are their hash, values become a neighbour with the right probability."""

import struct
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcache.rounding import random_words, round_stochastically

DTYPES = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
rounded = jax.jit(round_stochastically, static_argnums=2)
NO_WORD, LAST_WORD = 0, 2**32 - 1


# Random words


def murmur3(data, seed=0):
    """MurmurHash3_x86_32 of bytes in whole words, from Appleby's description."""
    most, hashed = 0xFFFFFFFF, seed
    for (word,) in struct.iter_unpack("<I", data):
        word = word * 0xCC9E2D51 & most
        word = (word << 15 | word >> 17) & most
        hashed ^= word * 0x1B873593 & most
        hashed = (hashed << 13 | hashed >> 19) & most
        hashed = (hashed * 5 + 0xE6546B64) & most
    hashed ^= len(data)
    hashed = (hashed ^ hashed >> 16) * 0x85EBCA6B & most
    hashed = (hashed ^ hashed >> 13) * 0xC2B2AE35 & most
    return hashed ^ hashed >> 16


def test_the_reference_gives_the_published_test_vectors():
    assert murmur3(b"", 1) == 0x514E28B7
    assert murmur3(b"\x21\x43\x65\x87") == 0xF55B516B
    assert murmur3(b"aaaa", 0x9747B28C) == 0x5A97808A
    assert murmur3(b"abcd", 0x9747B28C) == 0xF0478627


words_of_32_bits = st.one_of(st.sampled_from([0, 1, 2**31, 2**32 - 1]), st.integers(0, 2**32 - 1))
pairs = st.lists(st.tuples(words_of_32_bits, words_of_32_bits), min_size=3, max_size=3)


@settings(max_examples=30)
@given(pairs, pairs, st.integers(0, 2**31 - 1))
def test_random_words_are_murmur3_of_stream_step_id_and_column(streams, ids, step):
    dim = 5
    words = jax.jit(random_words, static_argnums=3)(np.array(streams, np.uint32), np.array(ids, np.uint32), step, dim)
    assert words.shape == (3, dim) and words.dtype == jnp.uint32
    for i in range(3):
        for column in range(dim):
            assert int(words[i, column]) == murmur3(struct.pack("<6I", *streams[i], step, *ids[i], column))


def test_the_words_of_a_row_depend_neither_on_its_place_nor_on_the_other_rows():
    random = np.random.default_rng(0)
    streams, ids = random.integers(0, 2**32, (2, 40, 2), np.uint32)
    step, order = jnp.array(7, jnp.int32), random.permutation(40)[:25]
    words = np.asarray(random_words(streams, ids, step, 6))
    np.testing.assert_array_equal(random_words(streams[order], ids[order], step, 6), words[order])
    np.testing.assert_array_equal(random_words(streams, ids, step, 3), words[:, :3])
    assert len(np.unique(words)) == words.size


def test_words_of_neighbours_are_uniform_and_independent():
    """Rows, columns and steps that count up, as they do: every bit is set half of the time, and alone."""
    ids = np.stack([np.arange(500), np.zeros(500)], axis=1).astype(np.uint32)
    streams = np.full((500, 2), 3, np.uint32)
    words = np.stack([random_words(streams, ids, jnp.array(step, jnp.int32), 4) for step in range(20)])
    bits = (words[..., None] >> np.arange(32, dtype=np.uint32)) & 1  # [step, row, column, bit]
    signs = 1.0 - 2.0 * bits
    bound = 5 / np.sqrt(words.size)  # five standard deviations, a little more on the shorter products
    assert np.abs(signs.mean(axis=(0, 1, 2))).max() < bound
    for axis in range(4):
        one, next_one = (np.moveaxis(signs, axis, 0)[part] for part in (slice(0, -1), slice(1, None)))
        mean_axes = (1, 2, 3) if axis == 3 else (0, 1, 2)
        assert np.abs((one * next_one).mean(axis=mean_axes)).max() < 1.2 * bound


# Rounding


def neighbours(values, dtype):
    """The finite numbers of `dtype` at or next below and next above each magnitude in `values`, as float64."""
    infinity = np.array(np.inf, dtype).view(np.uint16)
    numbers = np.arange(infinity, dtype=np.uint16).view(dtype).astype(np.float64)  # from zero up, in order
    below = np.searchsorted(numbers, np.abs(values.astype(np.float64)), side="right") - 1
    return numbers[below], numbers[np.minimum(below + 1, len(numbers) - 1)]


def round_by_chance(values, words, dtype):
    """Stochastic rounding of float32 values within the range of `dtype`, in float64.

    A value at a fraction f of the way from the neighbour nearer to zero to the other one becomes the latter for the
    share f of the words, the highest. Of a word count as many leading bits as the value has in excess, at most 31.
    """
    low, high = neighbours(values, dtype)
    magnitudes = np.abs(values.astype(np.float64))
    fraction = np.where(high > low, (magnitudes - low) / np.where(high > low, high - low, 1), 0)
    least = np.finfo(np.float32).smallest_subnormal.astype(np.float64)
    significance = np.maximum(2.0 ** (np.frexp(magnitudes)[1] - 24), least)  # of the last bit of the float32
    excess = np.clip(np.log2(np.where(high > low, high - low, 1) / significance), 0, 31)
    chance = np.floor(words / 2.0 ** (32 - excess)) / 2.0**excess
    fraction = np.floor(fraction * 2.0**31) / 2.0**31
    result = np.where(fraction + chance >= 1, high, low)
    return np.copysign(result, values).astype(dtype)


def draw_values(dtype, seed=0, count=20000):
    """Values whose bits are random, and some in every interesting region; within the range of `dtype`."""
    random = np.random.default_rng(seed)
    values = [random.integers(0, 2**32, count, np.uint32).view(np.float32)]
    smallest = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    for scale in (1.0, 1e-3, smallest, 20 * smallest, 300 * smallest):
        values.append((random.normal(size=count) * scale).astype(np.float32))
    least = np.finfo(np.float32).smallest_subnormal
    values.append(np.array([0.0, -0.0, least, -least, 2**-14, -(2**-24), 2**-25, 2**-55, 2**-57], np.float32))
    values = np.concatenate(values)
    return values[np.abs(values) <= float(ml_dtypes.finfo(dtype).max)]


def assert_same_bits(one, other):
    one, other = np.asarray(one), np.asarray(other)
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(one.view(np.uint16), other.view(np.uint16))


@dtypes
def test_rounding_is_its_definition(dtype):
    values = draw_values(dtype)
    random = np.random.default_rng(1)
    for words in (
        random.integers(0, 2**32, len(values), np.uint32),
        np.full(len(values), NO_WORD, np.uint32),
        np.full(len(values), LAST_WORD, np.uint32),
    ):
        found = np.asarray(rounded(values, words, dtype))
        low, high = neighbours(values, dtype)
        magnitudes = np.abs(found.astype(np.float64))
        assert ((magnitudes == low) | (magnitudes == high)).all()
        assert_same_bits(found, round_by_chance(values, words, dtype))
        assert_same_bits(rounded(-values, words, dtype), -found)


@dtypes
@pytest.mark.parametrize("unit", ["normal", "subnormal", "smallest normal", "next to zero"])
def test_the_share_of_words_that_round_up_is_the_nearness_of_the_upper_neighbour(dtype, unit):
    """So the expectation over all words is the value: counted exactly, over words evenly spaced."""
    info = ml_dtypes.finfo(dtype)
    low = {
        "normal": np.float64(1.5),
        "subnormal": 5 * np.float64(info.smallest_subnormal),
        "smallest normal": np.float64(info.smallest_normal),
        "next to zero": np.float64(0),
    }[unit]
    high = np.float64(np.nextafter(np.array(low, dtype), np.array(np.inf, dtype)))
    words = np.arange(2**16, dtype=np.uint32) << 16
    for share in (0.0, 1 / 8192, 1 / 8, 0.5, 1 - 1 / 8192):
        value = np.float32(low + share * (high - low))
        exact = (np.float64(value) - low) / (high - low)
        assert abs(exact - share) < 1e-4  # float32 can tell
        found = np.asarray(rounded(np.full(2**16, value), words, dtype)).astype(np.float64)
        assert set(np.unique(found)) <= {low, high}
        assert (found == high).mean() == exact


@dtypes
def test_what_the_dtype_can_represent_stays_whatever_the_word(dtype):
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    values = every.astype(np.float32)
    random = np.random.default_rng(2).integers(0, 2**32, 2**16, np.uint32)
    for words in (random, np.full_like(random, NO_WORD), np.full_like(random, LAST_WORD)):
        found = np.asarray(rounded(values, words, dtype))
        np.testing.assert_array_equal(np.isnan(found.astype(np.float32)), np.isnan(values))
        kept = ~np.isnan(values)
        assert_same_bits(found[kept], every[kept])


@dtypes
def test_beyond_the_largest_finite_value_rounding_is_to_nearest_and_nan_stays(dtype):
    largest = np.float32(ml_dtypes.finfo(dtype).max)
    halfway = np.float32({ml_dtypes.bfloat16: 2.0**128 - 2.0**119, np.float16: 65520.0}[dtype.type])
    ends = {
        np.nextafter(largest, np.float32(np.inf)): largest,
        np.nextafter(halfway, np.float32(0)): largest,
        halfway: np.inf,
        np.finfo(np.float32).max: np.inf,
        np.float32(np.inf): np.inf,
    }
    values, expected = np.array(list(ends), np.float32), np.array(list(ends.values()), np.float32)
    every_nan = np.array([0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001], np.uint32).view(np.float32)
    for word in (NO_WORD, 2**31, LAST_WORD):
        words = np.full(len(values), word, np.uint32)
        np.testing.assert_array_equal(rounded(values, words, dtype).astype(np.float32), expected)
        np.testing.assert_array_equal(rounded(-values, words, dtype).astype(np.float32), -expected)
        assert np.isnan(rounded(every_nan, words, dtype).astype(np.float32)).all()


@dtypes
def test_the_mean_over_steps_is_the_value(dtype):
    """With the words of `random_words`, to five standard deviations."""
    steps = 4000
    values = np.array([1.001, -0.3, 1e-3, 3.3e-8, 12345.678, 1e-39], np.float32)[None, :]
    identity = np.array([[1, 2]], np.uint32)

    @jax.jit
    def mean():
        def one(step):
            words = random_words(identity, identity, step, values.shape[1])
            return round_stochastically(jnp.asarray(values), words, dtype)

        return jax.lax.map(one, jnp.arange(steps, dtype=jnp.int32))

    found = np.asarray(mean()).astype(np.float64)
    low, high = neighbours(values, dtype)
    deviation = np.abs(found.mean(axis=0) - values.astype(np.float64))
    assert (deviation <= 5 * (high - low) * 0.5 / np.sqrt(steps)).all()
    assert (deviation < 0.2 * (high - low)).all() and (np.ptp(found, axis=0) > 0)[:, :5].all()


@dtypes
def test_rounding_works_under_vmap(dtype):
    values = draw_values(dtype)[:600].reshape(6, 100)
    words = np.random.default_rng(3).integers(0, 2**32, values.shape, np.uint32)
    apart = jax.vmap(partial(round_stochastically, dtype=dtype))(values, words)
    assert_same_bits(apart, rounded(values, words, dtype))


def test_what_cannot_be_rounded_is_refused():
    values, words = jnp.zeros((2, 3), jnp.float32), jnp.zeros((2, 3), jnp.uint32)
    with pytest.raises(ValueError, match="dtype must be bfloat16 or float16"):
        round_stochastically(values, words, np.float32)
    with pytest.raises(ValueError, match=r"one word a value: got \(2, 3\) and \(2, 1\)"):
        round_stochastically(values, words[:, :1], np.float16)
