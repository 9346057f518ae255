"""Row optimizers are plain optax on the touched rows, compare by value, and refuse what mixes rows."""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optax import contrib

import jaxcache as jc
import oracle
from extent import long
from jaxcache.rounding import random_words
from test_rounding import round_by_chance

ROWS, DIM, STEPS = 30, 6, 5
TOUCHED = 12  # rows of a step; one number keeps compilations few


def chain(rate=0.3):
    return optax.chain(optax.clip(0.5), optax.adagrad(optax.exponential_decay(rate, 2, 0.7)))


def decayed(rate=0.3):
    return optax.chain(optax.add_decayed_weights(0.1), optax.sgd(rate))


def rowwise_scheduled(rate=0.3):
    return jc.rowwise_adagrad(optax.linear_schedule(rate, 0.1, 4), eps=1e-3, initial_accumulator=0.1)


OPTIMIZERS = {
    "sgd": optax.sgd,
    "momentum": partial(optax.sgd, momentum=0.9),
    "nesterov": partial(optax.sgd, momentum=0.9, nesterov=True),
    "adagrad": optax.adagrad,
    "rowwise_adagrad": jc.rowwise_adagrad,
    "rowwise_adagrad, scheduled": rowwise_scheduled,
    "adam": optax.adam,
    "adamw": optax.adamw,
    "catch_up_adam": jc.catch_up_adam,
    "chain": chain,
    "inject_hyperparams": lambda rate=0.3: optax.inject_hyperparams(optax.adam)(learning_rate=rate),
    "injected schedule": lambda rate=0.3: optax.inject_hyperparams(optax.sgd)(
        learning_rate=optax.piecewise_constant_schedule(rate, {2: 0.5})
    ),
    "injected constant": lambda rate=0.3: optax.inject_hyperparams(optax.sgd)(
        learning_rate=optax.constant_schedule(rate)
    ),
    "weight decay": decayed,
    "schedule free": contrib.schedule_free_sgd,
}
optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def draw_weights(seed=0):
    return np.random.default_rng(seed).normal(size=(ROWS, DIM)).astype(np.float32)


def draw_steps(seed=1):
    """Distinct rows and their gradients, which are of very different sizes, zero among them."""
    random = np.random.default_rng(seed)
    for _ in range(STEPS):
        gradients = random.normal(size=(TOUCHED, DIM)) * random.choice([0.0, 1e-3, 1.0, 30.0], size=(TOUCHED, 1))
        yield random.permutation(ROWS)[:TOUCHED], gradients.astype(np.float32)


class Trained:
    """A table trained by a `RowOptimizer`, rows and scalars apart."""

    def __init__(self, optimizer, weights):
        self.optimizer, self.weights = optimizer, jnp.array(weights.astype(optimizer.dtype))
        self.state = tuple(jnp.array(leaf) for leaf in optimizer.initial_state(weights))
        self.scalars = optimizer.scalars

    def update(self, rows, gradients, hyperparameters=None, words=None, update=None):
        hyperparameters = self.optimizer.hyperparameters if hyperparameters is None else hyperparameters
        rows, update = np.asarray(rows), self.optimizer.update if update is None else update
        weights, state, self.scalars = update(
            jnp.array(gradients), self.weights[rows], tuple(leaf[rows] for leaf in self.state), self.scalars,
            hyperparameters, words,
        )  # fmt: skip
        self.weights = self.weights.at[rows].set(weights)
        self.state = tuple(leaf.at[rows].set(new) for leaf, new in zip(self.state, state, strict=True))


def assert_close(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=2e-7)


# Against optax


@optimizers
def test_an_update_is_that_of_optax_on_the_touched_rows_of_a_plain_array(make):
    weights = draw_weights()
    found, expected = Trained(jc.RowOptimizer(make(0.3), DIM), weights), oracle.PlainTable(make(0.3), weights)
    for rows, gradients in draw_steps():
        before = np.asarray(expected.weights)
        found.update(rows, gradients)
        expected.update_touched(rows, gradients)
        assert_close([found.weights], [expected.weights])
        assert_close(found.state, expected.row_leaves())
        assert_close(found.scalars, expected.scalars())
        rest = np.setdiff1d(np.arange(ROWS), rows)
        np.testing.assert_array_equal(found.weights[rest], before[rest])
    assert (np.abs(found.weights - weights).max(axis=1) > 0.01).sum() > ROWS / 2  # most rows were trained


@optimizers
def test_initial_state_is_that_of_optax(make):
    weights = draw_weights()
    optimizer, plain = jc.RowOptimizer(make(0.3), DIM), oracle.PlainTable(make(0.3), weights)
    assert_close(optimizer.initial_state(weights), plain.row_leaves())
    assert_close(optimizer.scalars, plain.scalars())
    for count in (0, 1, 15, 16, 17):
        for part, whole in zip(optimizer.initial_state(weights[:count]), plain.row_leaves(), strict=True):
            np.testing.assert_array_equal(part, whole[:count])
    assert [(leaf.shape, leaf.dtype) for leaf in optimizer.row_shapes] == [
        (leaf.shape[1:], leaf.dtype) for leaf in plain.row_leaves()
    ]


def test_state_that_starts_from_the_weights_is_found_in_the_store_too():
    """schedule_free keeps a slow copy of the weights, which untouched rows must get from their own initial weights."""
    store = jc.HostStore({"t": jc.Table(10**9, DIM, jc.normal())}, optimizer=contrib.schedule_free_sgd(0.1))
    ids = [3, 10**9 - 1, 3, 77]
    assert store.rows_written == 0 and np.ptp(store.rows("t", ids)) > 0
    [slow] = store.row_state("t", ids)
    np.testing.assert_array_equal(slow, store.rows("t", ids))


@pytest.mark.parametrize("name", ["sgd", "adagrad", "rowwise_adagrad"])
def test_rows_with_zero_gradient_rest_so_that_dense_training_is_the_same(name):
    """On the whole dense table, optax leaves the rows alone that no id names: touching the others is enough."""
    make, weights, random = OPTIMIZERS[name], draw_weights(), np.random.default_rng(2)
    found, dense = Trained(jc.RowOptimizer(make(0.3), DIM), weights), oracle.PlainTable(make(0.3), weights)
    for _ in range(STEPS):
        rows = random.permutation(ROWS // 2)[:TOUCHED]
        inverse = np.concatenate([np.arange(TOUCHED), random.integers(0, TOUCHED, 20)])
        ids = rows[inverse]
        gradients = random.normal(size=(len(ids), DIM)).astype(np.float32)
        summed = np.zeros((TOUCHED, DIM), np.float32)
        np.add.at(summed, inverse, gradients)
        found.update(rows, summed)
        dense.update_dense(ids, gradients)
        assert_close([found.weights, *found.state], [dense.weights, *dense.row_leaves()])
    np.testing.assert_array_equal(dense.weights[ROWS // 2 :], weights[ROWS // 2 :])


@pytest.mark.parametrize("dim, eps, initial", [(1, 1e-8, 0.0), (2, 0.5, 0.25), (7, 1e-8, 0.25), (64, 0.5, 0.0)])
def test_rowwise_adagrad_is_its_definition(dim, eps, initial):
    random = np.random.default_rng(3)
    weights = random.normal(size=(ROWS, dim)).astype(np.float32)
    optimizer = jc.rowwise_adagrad(0.2, eps=eps, initial_accumulator=initial)
    found = Trained(jc.RowOptimizer(optimizer, dim), weights)
    expected = oracle.RowWiseAdagrad(weights, 0.2, eps, initial)
    for _ in range(4):
        rows = random.permutation(ROWS)[:TOUCHED]
        gradients = random.normal(size=(TOUCHED, dim)) * 10.0 ** random.integers(-2, 3, (TOUCHED, 1))
        gradients = gradients.astype(np.float32)
        found.update(rows, gradients)
        expected.update(rows, gradients)
        assert_close(found.state, [expected.accumulator[:, None].astype(np.float32)])
        assert_close([found.weights], [expected.weights.astype(np.float32)])


def test_rowwise_adagrad_is_an_optax_transformation_for_one_row_and_for_many():
    weights, gradients = draw_weights(), draw_weights(5)
    transformation = jc.rowwise_adagrad(0.2)
    together, state = transformation.update(gradients, transformation.init(weights))
    apart, states = jax.vmap(lambda w, g: transformation.update(g, transformation.init(w)))(weights, gradients)
    assert_close([together], [apart])
    assert_close(jax.tree.leaves(state), jax.tree.leaves(states))


# Adam that catches up


def adam_by_row(weights, stream, rate, b1, b2, eps):
    """Adam with moments over time, row by row in float64: what each row is after each step of `stream`.

    Yields, for each element (steps of other rows before, dict of row to gradient), a dict of row to (weights, mu, nu).
    """
    decay1, decay2 = float(np.float32(b1)), float(np.float32(b2))
    rows, now = {}, 0
    for idle, gradients in stream:
        now += idle + 1
        touched = {}
        for row, gradient in gradients.items():
            weight, mu, nu, last = rows.get(row, (weights[row].astype(np.float64), 0.0, 0.0, 0))
            g = gradient.astype(np.float64)
            for _ in range(min(now - last, 30000)):  # by then nothing is left
                mu, nu = mu * decay1, nu * decay2
            mu, nu = mu + (1 - b1) * g, nu + (1 - b2) * g**2
            corrected = mu / (1 - decay1**now), nu / (1 - decay2**now)
            weight = weight - rate(now - 1) * corrected[0] / (np.sqrt(corrected[1]) + eps)
            rows[row] = (weight, mu, nu, now)
            touched[row] = (weight, mu, nu)
        yield touched


DECAYS = [(0.9, 0.999), (0.0, 0.9), (0.5, 0.99)]
streams = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 3), st.sampled_from([10, 100, 1000, 20000])),
        st.lists(st.tuples(st.integers(0, 4), st.integers(-3, 3)), min_size=3, max_size=3, unique_by=lambda r: r[0]),
    ),
    min_size=1,
    max_size=8,
)
updated = jax.jit(lambda optimizer, *arguments: optimizer.update(*arguments), static_argnums=0)


@cache
def catching_up(rate, decays, eps):
    return jc.RowOptimizer(jc.catch_up_adam(rate, *decays, eps), DIM)


decaying = optax.exponential_decay(0.3, 50, 0.9)


@settings(max_examples=25)
@given(streams, st.sampled_from(DECAYS), st.booleans(), st.integers(0, 2**32))
def test_catch_up_adam_is_adam_over_time_for_each_row(stream, decays, scheduled, seed):
    random = np.random.default_rng(seed)
    weights, eps = draw_weights(seed), 1e-3
    rates = (lambda step: 0.3 * 0.9 ** (step / 50)) if scheduled else (lambda step: 0.3)
    stream = [
        (idle, {row: (random.normal(size=DIM) * 10.0**size).astype(np.float32) for row, size in touched})
        for idle, touched in stream
    ]
    found = Trained(catching_up(decaying if scheduled else 0.3, decays, eps), weights)
    for (idle, gradients), expected in zip(stream, adam_by_row(weights, stream, rates, *decays, eps), strict=True):
        found.scalars = tuple(scalar + np.int32(idle) for scalar in found.scalars)
        rows = np.array(list(gradients))
        found.update(rows, np.stack(list(gradients.values())), update=partial(updated, found.optimizer))
        for row, (weight, mu, nu) in expected.items():
            mu_found, nu_found, last = (leaf[row] for leaf in found.state)
            np.testing.assert_allclose(mu_found, mu, rtol=1e-3, atol=1e-6)
            np.testing.assert_allclose(nu_found, nu, rtol=1e-3, atol=1e-9)
            np.testing.assert_allclose(found.weights[row], weight, rtol=1e-4, atol=1e-4)
            assert int(last[0]) == int(found.scalars[0])


def test_the_moments_of_catch_up_adam_are_those_of_dense_adam_where_rows_are_touched():
    weights, random = draw_weights(), np.random.default_rng(4)
    found, lazy = (Trained(jc.RowOptimizer(make(0.3), DIM), weights) for make in (jc.catch_up_adam, optax.adam))
    dense = oracle.PlainTable(optax.adam(0.3), weights)
    for _ in range(12):
        rows = random.permutation(ROWS)[:TOUCHED]
        gradients = random.normal(size=(TOUCHED, DIM)).astype(np.float32)
        untouched, before = np.setdiff1d(np.arange(ROWS), rows), found.weights
        for table in (found, lazy):
            table.update(rows, gradients)
        dense.update_dense(rows, gradients)
        for one, other in zip(found.state[:2], dense.row_leaves(), strict=True):
            np.testing.assert_allclose(one[rows], other[rows], rtol=2e-6, atol=1e-9)
        np.testing.assert_array_equal(found.weights[untouched], before[untouched])
    assert np.abs(lazy.state[0][rows] - dense.row_leaves()[0][rows]).max() > 0.1  # whose moments rest


def test_catch_up_adam_is_optax_adam_to_the_bit_for_rows_updated_in_every_step():
    with jax.numpy_dtype_promotion("standard"):
        one, other = jc.catch_up_adam(0.3, 0.8, 0.99, 1e-6), optax.adam(0.3, 0.8, 0.99, 1e-6)
        weights = jnp.array(draw_weights())
        state, other_state = one.init(weights), other.init(weights)
        for step in range(5):
            gradients = jnp.array(draw_weights(step))
            found, state = one.update(gradients, state, weights)
            expected, other_state = other.update(gradients, other_state, weights)
            np.testing.assert_array_equal(found, expected)


def test_a_row_that_comes_back_late_has_the_step_of_the_docstring_and_the_count_may_reach_its_end():
    gradients = np.ones((1, DIM), np.float32)
    for count in (200_000, 2**31 - 10, 2**31 - 1):
        found = Trained(jc.RowOptimizer(jc.catch_up_adam(0.5), DIM), np.zeros((1, DIM), np.float32))
        found.update([0], -1e3 * gradients)
        before, found.scalars = found.weights, (np.array(count, np.int32),)
        found.update([0], 1e-2 * gradients)
        np.testing.assert_allclose(found.weights - before, -0.5 * 0.1 / np.sqrt(0.001), rtol=1e-4)
    mu = found.state[0]
    found.update([0], 0 * gradients)
    assert int(found.scalars[0]) == int(found.state[2][0, 0]) == 2**31 - 1
    np.testing.assert_allclose(found.state[0], 0.9 * mu)


# Weights of 16 bits

DTYPES = [np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def assert_same(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@dtypes
@pytest.mark.parametrize("kept", ["nearest", "stochastic", "master copy"])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_weights_of_16_bits_are_updated_in_float32_and_rounded(name, kept, dtype):
    """Bit by bit what NumPy makes of the result of the float32 optimizer."""
    random, weights = np.random.default_rng(5), draw_weights()
    plain = jc.RowOptimizer(OPTIMIZERS[name](0.3), DIM)
    narrow = jc.RowOptimizer(
        OPTIMIZERS[name](0.3), DIM, dtype, "stochastic" if kept == "stochastic" else "nearest", kept == "master copy"
    )
    found = Trained(narrow, weights)
    assert_same(found.weights, weights.astype(dtype))
    if kept == "master copy":
        assert_same(found.state[0], weights)
    # Rows by number, as float32 weights and state; weights are what the next step starts from.
    state = plain.initial_state(weights)
    table = {row: (weights[row] if kept == "master copy" else weights[row].astype(dtype).astype(np.float32),
                   [leaf[row] for leaf in state]) for row in range(ROWS)}  # fmt: skip
    scalars = plain.scalars
    for rows, gradients in draw_steps():
        words = random.integers(0, 2**32, gradients.shape, np.uint32) if narrow.draws else None
        found.update(rows, gradients, words=words)
        updated_weights, updated_state, scalars = plain.update(
            jnp.array(gradients), jnp.stack([table[row][0] for row in rows]),
            tuple(jnp.stack(leaves) for leaves in zip(*(table[row][1] for row in rows), strict=True)),
            scalars, plain.hyperparameters,
        )  # fmt: skip
        exact = np.asarray(updated_weights)
        rounded = exact.astype(dtype) if words is None else round_by_chance(exact, words, dtype)
        assert_same(found.weights[rows], rounded)
        leaves = [exact, *updated_state] if kept == "master copy" else list(updated_state)
        for leaf, expected in zip(found.state, leaves, strict=True):
            assert_same(leaf[rows], expected)
        for position, row in enumerate(rows):
            kept_weights = exact[position] if kept == "master copy" else rounded[position].astype(np.float32)
            table[row] = (kept_weights, [leaf[position] for leaf in updated_state])
    assert (np.asarray(found.weights) != weights.astype(dtype)).any(axis=1).sum() > ROWS / 2


@dtypes
def test_rows_of_a_master_copy_have_it_first_and_no_others_have_one(dtype):
    plain = jc.RowOptimizer(jc.rowwise_adagrad(0.3), DIM)
    assert jc.RowOptimizer(jc.rowwise_adagrad(0.3), DIM, dtype).row_shapes == plain.row_shapes
    master = jc.RowOptimizer(jc.rowwise_adagrad(0.3), DIM, dtype, master_copy=True)
    assert master.row_shapes == (jax.ShapeDtypeStruct((DIM,), jnp.float32), *plain.row_shapes)
    weights = draw_weights()
    copy, *_ = master.initial_state(weights)
    weights[:] = 0  # the caller's
    assert_same(copy, draw_weights())


@dtypes
def test_small_steps_are_lost_by_rounding_to_nearest_and_by_nothing_else(dtype):
    """500 steps of 1e-4 on weights of 1, whose neighbours are 4e-3 or more away in bfloat16, 5e-4 in float16."""
    rows, steps = 40, 500
    gradients, ids = jnp.full((rows, DIM), -1e-4, jnp.float32), np.zeros((rows, 2), np.uint32)
    ids[:, 0] = np.arange(rows)
    means = {}
    for rounding, master_copy in (("nearest", False), ("nearest", True), ("stochastic", False)):
        optimizer = jc.RowOptimizer(optax.sgd(1.0), DIM, dtype, rounding, master_copy)

        @jax.jit
        def train(weights, state, optimizer=optimizer):
            def one(step, carry):
                words = random_words(ids, ids, step, DIM) if optimizer.draws else None
                return optimizer.update(gradients, *carry, (), optimizer.hyperparameters, words)[:2]

            return jax.lax.fori_loop(0, steps, one, (weights, state))

        weights = np.ones((rows, DIM), np.float32)
        means[rounding, master_copy] = np.asarray(
            train(jnp.array(weights.astype(dtype)), optimizer.initial_state(weights))[0].astype(np.float32)
        ).mean()
    assert means["nearest", False] == 1.0
    spacing = float(ml_dtypes.finfo(dtype).eps)
    assert abs(means["nearest", True] - 1.05) <= spacing / 2
    # A step rounds up with probability p = 1e-4 / spacing, or nearly so: spacing * sqrt(500 * p) for one weight.
    assert abs(means["stochastic", False] - 1.05) <= 5 * np.sqrt(steps * 1e-4 * spacing / (rows * DIM))


@dtypes
@pytest.mark.parametrize("count", [0, 1])
def test_narrow_updates_take_any_number_of_rows(dtype, count):
    found = Trained(jc.RowOptimizer(optax.adam(0.1), DIM, dtype, master_copy=True), draw_weights())
    found.update(np.arange(count), np.ones((count, DIM), np.float32))
    assert int(found.scalars[0]) == 1 and found.weights.dtype == dtype


def test_words_are_needed_for_stochastic_rounding_alone():
    words = np.zeros((1, DIM), np.uint32)
    for rounding, given_words, message in (("stochastic", None, "got no words"), ("nearest", words, "got words")):
        found = Trained(jc.RowOptimizer(optax.sgd(0.1), DIM, np.float16, rounding), draw_weights())
        assert found.optimizer.draws == (rounding == "stochastic")
        with pytest.raises(ValueError, match=f"{message} for rounding='{rounding}'"):
            found.update([0], np.ones((1, DIM), np.float32), words=given_words)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"dtype": np.float64}, "dtype must be float32, bfloat16 or float16"),
        ({"dtype": np.float16, "rounding": "up"}, "rounding must be 'nearest' or 'stochastic'"),
        ({"rounding": "stochastic"}, "no rounding of float32 weights"),
        ({"master_copy": True}, "the weights are float32 themselves"),
        ({"dtype": np.float16, "rounding": "stochastic", "master_copy": True}, "beside a master copy"),
    ],
)
def test_contradictions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        jc.RowOptimizer(optax.sgd(0.1), DIM, **arguments)


# Frozen rows


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), *DTYPES], ids=str)
def test_frozen_rows_have_no_state_and_no_update(dtype):
    frozen = jc.RowOptimizer(None, DIM, dtype)
    assert frozen.frozen and not jc.RowOptimizer(optax.sgd(0.1), DIM, dtype).frozen and not frozen.draws
    assert frozen.row_shapes == frozen.scalars == frozen.hyperparameters == frozen.initial_state(draw_weights()) == ()
    weights = draw_weights().astype(dtype)
    with pytest.raises(ValueError, match="frozen table"):
        frozen.update(draw_weights(), weights, (), (), ())
    with pytest.raises(ValueError, match="never trained"):
        jc.RowOptimizer(None, DIM, np.float16, master_copy=True)


# Scalars


@pytest.mark.parametrize("count", [0, 1, ROWS])
def test_scalars_advance_once_an_update_touched_rows_or_not(count):
    found = Trained(jc.RowOptimizer(optax.adam(0.1), DIM), draw_weights())
    assert [int(scalar) for scalar in found.scalars] == [0]
    for step in range(1, 4):
        found.update(np.arange(count), np.ones((count, DIM), np.float32))
        assert [int(scalar) for scalar in found.scalars] == [step]


# Equality


def nested(constants):
    """A transformation whose constants sit inside of a jitted function."""
    scale = jax.jit(lambda gradients: gradients * jnp.asarray(constants, jnp.float32))
    return optax.stateless(lambda gradients, params: scale(gradients))


def tabled(values):
    """A schedule that reads its rates from an array of more elements than a printed array shows."""
    values = np.asarray(values, np.float32)
    return optax.sgd(lambda count: jnp.take(jnp.asarray(values), count, mode="clip"))


@optimizers
def test_an_optimizer_built_anew_is_equal_and_so_is_one_with_another_rate(make):
    one, again, changed = (jc.RowOptimizer(make(rate), DIM) for rate in (0.3, 0.3, 0.4))
    assert one == again and hash(one) == hash(again)
    np.testing.assert_array_equal(one.hyperparameters, again.hyperparameters)
    assert one == changed and hash(one) == hash(changed)


FORMATS = {
    "bfloat16": (jc.catch_up_adam, ml_dtypes.bfloat16),
    "float16, stochastic": (optax.adam, np.float16, "stochastic"),
    "bfloat16, master copy": (optax.adam, "bfloat16", "nearest", True),
    "frozen": (lambda rate: None, np.float32),
    "frozen float16": (lambda rate: None, np.dtype(np.float16)),
}


@pytest.mark.parametrize("make, arguments", [(f[0], f[1:]) for f in FORMATS.values()], ids=FORMATS)
def test_equal_formats_are_equal(make, arguments):
    one, again, changed = (jc.RowOptimizer(make(rate), DIM, *arguments) for rate in (0.3, 0.3, 0.4))
    assert one == again == changed and hash(one) == hash(again) == hash(changed)
    assert one.dtype == arguments[0]


def test_an_optimizer_says_how_its_rows_are_kept():
    reprs = [repr(jc.RowOptimizer(optax.adam(0.1), 4)), repr(jc.RowOptimizer(None, 4, np.float16)),
             repr(jc.RowOptimizer(optax.sgd(0.1), 4, "bfloat16", "stochastic")),
             repr(jc.RowOptimizer(optax.sgd(0.1), 4, "bfloat16", master_copy=True))]  # fmt: skip
    assert reprs == [
        "RowOptimizer(dim=4, row_leaves=2, scalars=1)",
        "RowOptimizer(dim=4, row_leaves=0, scalars=0, dtype=float16, frozen)",
        "RowOptimizer(dim=4, row_leaves=0, scalars=0, dtype=bfloat16, stochastic rounding)",
        "RowOptimizer(dim=4, row_leaves=1, scalars=0, dtype=bfloat16, master copy)",
    ]


def test_different_transformations_are_unequal():
    different = {name: jc.RowOptimizer(make(0.3), DIM) for name, make in OPTIMIZERS.items()}
    different["sgd of another dim"] = jc.RowOptimizer(optax.sgd(0.3), DIM + 1)
    different["clipped sgd"] = jc.RowOptimizer(optax.chain(optax.clip(1.0), optax.sgd(0.3)), DIM)
    different["ascent"] = jc.RowOptimizer(optax.scale_by_sign(), DIM)
    different["momentum in bfloat16"] = jc.RowOptimizer(
        optax.sgd(0.3, momentum=0.9, accumulator_dtype=jnp.bfloat16), DIM
    )
    for dtype in DTYPES:
        different[f"{dtype}"] = jc.RowOptimizer(optax.sgd(0.3), DIM, dtype)
        different[f"{dtype}, stochastic"] = jc.RowOptimizer(optax.sgd(0.3), DIM, dtype, "stochastic")
        different[f"{dtype}, master copy"] = jc.RowOptimizer(optax.sgd(0.3), DIM, dtype, master_copy=True)
        different[f"{dtype}, frozen"] = jc.RowOptimizer(None, DIM, dtype)
    different["frozen"] = jc.RowOptimizer(None, DIM)
    different["frozen, another dim"] = jc.RowOptimizer(None, DIM + 1)
    for (name, one), (other_name, other) in itertools.combinations(different.items(), 2):
        assert one != other, f"{name} == {other_name}"
    assert all(optimizer != "sgd" for optimizer in different.values())


LOOKALIKES = {
    "rates": [optax.adam(rate) for rate in (0.1, 0.2)],
    "decays": [optax.adam(0.1, b1=b1, b2=b2, eps=eps) for b1, b2, eps in ((0.9, 0.99, 1e-8), (0.5, 0.999, 1e-3))],
    "clips": [optax.chain(optax.clip(limit), optax.sgd(0.1)) for limit in (0.1, 0.2)],
    "schedules": [optax.sgd(optax.exponential_decay(rate, 2, decay)) for rate, decay in ((0.1, 0.5), (0.2, 0.7))],
    "lengths of schedules": [optax.sgd(optax.linear_schedule(0.5, 0.1, steps)) for steps in (2, 3)],
    "piecewise schedules": [optax.sgd(optax.piecewise_constant_schedule(0.5, {at: 0.1})) for at in (1, 2)],
    "cosine schedules": [optax.sgd(optax.cosine_decay_schedule(0.5, n, end)) for n, end in ((3, 0.1), (4, 0.0))],
    "injected rates": [optax.inject_hyperparams(optax.sgd)(learning_rate=rate) for rate in (0.1, 0.2)],
    "injected schedules": [OPTIMIZERS["injected constant"](rate) for rate in (0.1, 0.2)],
    "catch_up_adam": [
        jc.catch_up_adam(rate, b1, b2, eps) for rate, b1, b2, eps in ((0.1, 0.9, 0.999, 1e-8), (0.2, 0.5, 0.9, 1e-2))
    ],
    "schedules of catch_up_adam": [
        jc.catch_up_adam(optax.exponential_decay(rate, 2, decay)) for rate, decay in ((0.1, 0.5), (0.2, 0.7))
    ],
    "rowwise": [jc.rowwise_adagrad(0.1, eps=eps) for eps in (1e-8, 0.5)],
    "nested constants": [nested(range(first, first + DIM)) for first in (0, 1)],
    "tables of rates": [tabled(np.linspace(0.1, last, 2000)) for last in (0.5, 0.9)],
    "tables that differ in the middle": [tabled(np.where(np.arange(2000) == 3, rate, 0.1)) for rate in (0.5, 0.9)],
}


@pytest.mark.parametrize("transformations", LOOKALIKES.values(), ids=LOOKALIKES)
def test_optimizers_that_are_equal_are_interchangeable(transformations):
    """Equal static data finds the program compiled for the first: it must compute the second, given its numbers."""
    first, second = (jc.RowOptimizer(transformation, DIM) for transformation in transformations)
    own, borrowed = Trained(second, draw_weights()), Trained(second, draw_weights())
    if first == second:
        borrowed.optimizer = first
    different = Trained(first, draw_weights())
    for rows, gradients in draw_steps():
        own.update(rows, gradients)
        borrowed.update(rows, gradients, second.hyperparameters)
        different.update(rows, gradients)
        for one, other in zip([own.weights, *own.state, *own.scalars],
                              [borrowed.weights, *borrowed.state, *borrowed.scalars], strict=True):  # fmt: skip
            np.testing.assert_array_equal(one, other)
    assert (np.asarray(own.weights) != np.asarray(different.weights)).any()  # the two do differ


@optimizers
def test_a_changed_rate_recompiles_nothing(make):
    @partial(jax.jit, static_argnums=0)
    def update(optimizer, gradients, weights, state, scalars, hyperparameters):
        return optimizer.update(gradients, weights, state, scalars, hyperparameters)

    weights, results = draw_weights(), []
    for rate in (0.3, 0.3, 0.1):
        o = jc.RowOptimizer(make(rate), DIM)
        results.append(update(o, draw_weights(1), weights, o.initial_state(weights), o.scalars, o.hyperparameters))
    assert update._cache_size() == 1
    same, changed = (
        [np.array_equal(one, other) for one, other in zip(*map(jax.tree.leaves, pair), strict=True)]
        for pair in (results[:2], results[1:])
    )
    assert all(same) and not all(changed)


# What is refused


def add_noise():
    return optax.add_noise(0.1, 0.5, 0)


def scaled_by_largest_row():
    def update(gradients, state, params=None):
        return jax.tree.map(lambda g: g / (1 + jnp.max(jnp.abs(g))), gradients), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


REFUSED = {
    "clip_by_global_norm, small": (partial(optax.clip_by_global_norm, 1e-6), "mixes rows"),
    "clip_by_global_norm": (partial(optax.clip_by_global_norm, 1.0), "mixes rows"),
    "clip_by_global_norm, huge": (partial(optax.clip_by_global_norm, 1e30), "mixes rows"),
    "clip_by_global_norm in a chain": (
        lambda: optax.chain(optax.clip_by_global_norm(1e30), optax.adam(1e-3)),
        "mixes rows.*optax.clip instead of clip_by_global_norm",
    ),
    "lamb": (partial(optax.lamb, 0.1), "mixes rows"),
    "lars": (partial(optax.lars, 0.1), "mixes rows"),
    "adafactor": (partial(optax.adafactor, 0.1), "neither one value a row nor one for the table.*adafactor"),
    "adafactor without factors": (partial(optax.adafactor, 0.1, factored=False), "neither one value a row|mixes rows"),
    "apply_if_finite": (lambda: optax.apply_if_finite(optax.sgd(0.1), 5), "mixes rows.*scalar of its state depends"),
    "adaptive_grad_clip": (partial(optax.adaptive_grad_clip, 0.1), "mixes rows"),
    "clip_by_block_rms": (partial(optax.clip_by_block_rms, 1.0), "mixes rows"),
    "centralize": (optax.centralize, "mixes rows"),
    "scaled by the largest row": (scaled_by_largest_row, "mixes rows"),
    "add_noise": (add_noise, "draws random numbers"),
    "lbfgs": (optax.lbfgs, "neither one value a row"),
    "polyak_sgd": (optax.polyak_sgd, "cannot update a row from its gradient alone.*value"),
}


@pytest.mark.parametrize("dim", [4, *(pytest.param(dim, marks=long("rows of 4")) for dim in (1, 130))])
@pytest.mark.parametrize("make, message", REFUSED.values(), ids=REFUSED)
def test_what_does_not_treat_rows_apart_is_refused_at_construction(make, message, dim):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        jc.HostStore({"user": jc.Table(10, dim)}, optimizer=make())


@pytest.mark.parametrize("wrong", ["adam", 0.1, optax.sgd])
def test_what_is_no_transformation_is_refused(wrong):
    with pytest.raises(TypeError, match="optimizer must be an optax transformation such as"):
        jc.RowOptimizer(wrong, DIM)
