"""Every operation against NumPy loops; in place where donated, from the compiled program's own figures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcache import kernels

# Number of slots, places and lookups, and the rest of a row's shape: few, as each is compiled anew.
SHAPES = [(1, 1, 1, (1,)), (5, 3, 7, (4,)), (6, 6, 9, ()), (4, 9, 5, (2, 3))]
shapes = pytest.mark.parametrize("slots, places, lookups, row", SHAPES)
seeds = given(seed=st.integers(0, 2**32), real=st.floats(0, 1), accept=st.booleans())


def draw(seed, slots, places, lookups, row, real):
    """A table, distinct places in it, the rest padding of several kinds, and lookups, some of them padding."""
    random = np.random.default_rng(seed)
    table = random.normal(size=(slots, *row)).astype(np.float32)
    count = round(real * min(slots, places))
    where = np.full(places, slots, np.int32)
    where[:count] = random.permutation(slots)[:count]
    where[count:] += random.integers(0, 3, places - count)
    where = random.permutation(where).astype(np.int32)
    inverse = random.integers(0, places + 2, lookups).astype(np.int32)
    return random, table, where, inverse


@shapes
@settings(max_examples=20)
@seeds
def test_gather_is_a_loop(slots, places, lookups, row, seed, real, accept):
    _, table, where, inverse = draw(seed, slots, places, lookups, row, real)
    expected = np.zeros((lookups, *row), np.float32)
    for lookup, position in enumerate(inverse):
        if position < places and where[position] < slots:
            expected[lookup] = table[where[position]]
    np.testing.assert_array_equal(jax.jit(kernels.gather)(table, where, inverse), expected)


@shapes
@settings(max_examples=20)
@seeds
def test_sum_occurrences_is_a_loop_in_order_of_lookup(slots, places, lookups, row, seed, real, accept):
    random, _, _, inverse = draw(seed, slots, places, lookups, row, real)
    # Sizes so different that another order of the sum has other bits.
    gradients = (random.normal(size=(lookups, 3)) * 10.0 ** random.integers(-4, 5, (lookups, 1))).astype(np.float32)
    expected = np.zeros((places, 3), np.float32)
    for lookup, position in enumerate(inverse):
        if position < places:
            expected[position] = expected[position] + gradients[lookup]
    found = jax.jit(kernels.sum_occurrences, static_argnums=2)(gradients, inverse, places)
    np.testing.assert_array_equal(found, expected)


@jax.jit
def halve(buffer, where, accept):
    """Rows that depend on all leaves of their own old rows."""
    return kernels.update(
        buffer, where, lambda old: {"weights": old["weights"] * 0.5 + 1.0, "count": old["count"] + 3}, accept
    )


@shapes
@settings(max_examples=20)
@seeds
def test_update_is_a_loop(slots, places, lookups, row, seed, real, accept):
    _, table, where, _ = draw(seed, slots, places, lookups, row, real)
    buffer = {"weights": table, "count": np.arange(slots, dtype=np.int32)}
    expected = {name: leaf.copy() for name, leaf in buffer.items()}
    for place in where:
        if accept and place < slots:
            expected["weights"][place] = table[place] * np.float32(0.5) + np.float32(1.0)
            expected["count"][place] = place + 3
    found = halve(buffer, where, accept)
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found[name], leaf)


@shapes
@settings(max_examples=20)
@seeds
def test_exchange_is_a_loop(slots, places, lookups, row, seed, real, accept):
    random, table, where, _ = draw(seed, slots, places, lookups, row, real)
    buffer = {"weights": table, "count": np.arange(1, slots + 1, dtype=np.int32)}
    incoming = {
        "weights": random.normal(size=(places, *row)).astype(np.float32),
        "count": -np.arange(1, places + 1, dtype=np.int32),
    }
    expected = {name: leaf.copy() for name, leaf in buffer.items()}
    outgoing = {name: np.zeros_like(leaf) for name, leaf in incoming.items()}
    for number, place in enumerate(where):
        if place < slots:
            for name, leaf in buffer.items():
                outgoing[name][number] = leaf[place]
                if accept:
                    expected[name][place] = incoming[name][number]
    found, out = jax.jit(kernels.exchange)(buffer, where, incoming, accept)
    for name in buffer:
        np.testing.assert_array_equal(found[name], expected[name])
        np.testing.assert_array_equal(out[name], outgoing[name])


def test_rows_that_are_not_finite_stay_where_they_are():
    """NaN in a row that is not touched, or in padding's update, reaches no other row."""
    table = np.array([[np.nan], [np.inf], [2.0]], np.float32)
    where = np.array([2, 3], np.int32)

    @jax.jit
    def update(table, where):
        return kernels.update(table, where, lambda old: jnp.where(old == 0, jnp.nan, old + 1), jnp.array(True))

    found = update(table, where)
    np.testing.assert_array_equal(found, np.array([[np.nan], [np.inf], [3.0]], np.float32))


# In place

SLOTS, PLACES, DIM = 200_000, 256, 32
BUFFER = {
    "weights": jax.ShapeDtypeStruct((SLOTS, DIM), jnp.float32),
    "accumulator": jax.ShapeDtypeStruct((SLOTS, 1), jnp.float32),
}
BUFFER_BYTES = SLOTS * (DIM + 1) * 4
ROWS = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((PLACES, *leaf.shape[1:]), leaf.dtype), BUFFER)
WHERE = jax.ShapeDtypeStruct((PLACES,), jnp.int32)
ACCEPT = jax.ShapeDtypeStruct((), jnp.bool_)


def scaled(buffer, where, accept):
    return kernels.update(buffer, where, lambda old: jax.tree.map(lambda leaf: leaf * 0.5, old), accept)


@pytest.mark.parametrize(
    "operation, arguments",
    [(scaled, (BUFFER, WHERE, ACCEPT)), (kernels.exchange, (BUFFER, WHERE, ROWS, ACCEPT))],
    ids=["update", "exchange"],
)
def test_a_donated_buffer_is_changed_in_place(operation, arguments):
    figures = jax.jit(operation, donate_argnums=0).lower(*arguments).compile().memory_analysis()
    assert figures.alias_size_in_bytes >= BUFFER_BYTES
    assert figures.temp_size_in_bytes < 20 * PLACES * (DIM + 1) * 4 < BUFFER_BYTES / 20


def test_gather_takes_memory_of_the_batch_alone():
    inverse = jax.ShapeDtypeStruct((4 * PLACES,), jnp.int32)
    figures = jax.jit(kernels.gather).lower(BUFFER["weights"], WHERE, inverse).compile().memory_analysis()
    assert figures.temp_size_in_bytes < 10 * PLACES * DIM * 4 < BUFFER_BYTES / 20
