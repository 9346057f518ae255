"""Row optimizers are plain optax on the touched rows, compare by value, and refuse what mixes rows."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import jaxcache as jc
import oracle

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
        self.optimizer, self.weights = optimizer, jnp.array(weights)
        self.state = tuple(jnp.array(leaf) for leaf in optimizer.initial_state(weights))
        self.scalars = optimizer.scalars

    def update(self, rows, gradients, hyperparameters=None):
        hyperparameters = self.optimizer.hyperparameters if hyperparameters is None else hyperparameters
        weights, state, self.scalars = self.optimizer.update(
            jnp.array(gradients), self.weights[rows], tuple(leaf[rows] for leaf in self.state), self.scalars,
            hyperparameters,
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


def test_different_transformations_are_unequal():
    different = {name: jc.RowOptimizer(make(0.3), DIM) for name, make in OPTIMIZERS.items()}
    different["sgd of another dim"] = jc.RowOptimizer(optax.sgd(0.3), DIM + 1)
    different["clipped sgd"] = jc.RowOptimizer(optax.chain(optax.clip(1.0), optax.sgd(0.3)), DIM)
    different["ascent"] = jc.RowOptimizer(optax.scale_by_sign(), DIM)
    different["momentum in bfloat16"] = jc.RowOptimizer(
        optax.sgd(0.3, momentum=0.9, accumulator_dtype=jnp.bfloat16), DIM
    )
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


@pytest.mark.parametrize("dim", [1, 4, 130])
@pytest.mark.parametrize("make, message", REFUSED.values(), ids=REFUSED)
def test_what_does_not_treat_rows_apart_is_refused_at_construction(make, message, dim):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        jc.HostStore({"user": jc.Table(10, dim)}, optimizer=make())


@pytest.mark.parametrize("wrong", ["adam", 0.1, None, optax.sgd])
def test_what_is_no_transformation_is_refused(wrong):
    with pytest.raises(TypeError, match="optimizer must be an optax transformation such as"):
        jc.RowOptimizer(wrong, DIM)
