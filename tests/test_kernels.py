"""Every operation of the XLA backend against NumPy; in place where donated; which backend is chosen.

The cases are those of `jaxcache.kernels.cases`; the other backends have the same ones, against the XLA backend, in
test_triton.py and test_mosaic.py.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcache as jc
from jaxcache import kernels
from jaxcache.kernels import xla
from jaxcache.kernels.cases import CASES, Case, Problem, named
from jaxcache.optimizers import RowOptimizer, _known_rule
from jaxcache.state import empty_cache
from oracle import in_order, tree_sum

YES, NO = np.array(True), np.array(False)
small = pytest.mark.parametrize("case", [case for case in CASES if not case.measured], ids=lambda case: case.name)


# The definition, in NumPy


def rows_of_lookups(problem: Problem) -> np.ndarray:
    """The row of each lookup, float32, zeros for none."""
    kept, unique = problem.kept, len(problem.slots)
    slots = np.append(problem.slots, problem.case.slots)[np.minimum(problem.inverse, unique)]
    table = np.concatenate([np.asarray(kept.weights, np.float32), np.zeros((1, problem.case.dim), np.float32)])
    return table[np.minimum(slots, problem.case.slots)]


def bags_of(problem: Problem) -> list[np.ndarray]:
    """The lookups of each bag of each feature."""
    bags, start = [], 0
    for feature in problem.bags:
        lookups = np.arange(start, start + feature.lookups)
        if feature.owners is None:
            bags += np.split(lookups, feature.count)
        else:
            bags += [lookups[feature.owners == bag] for bag in range(feature.count)]
        start += feature.lookups
    return bags


def summed_gradients(problem: Problem, dtype=np.float32) -> np.ndarray:
    gradients = problem.gradients
    sums = np.zeros((len(problem.slots), problem.case.dim), dtype)
    for row in range(len(problem.slots)):
        lookups = np.flatnonzero(problem.inverse == row)
        terms = gradients.rows[lookups if gradients.sources is None else gradients.sources[lookups]]
        if gradients.weights is not None:
            terms = terms * gradients.weights[lookups, None]
        sums[row] = tree_sum(terms.astype(dtype))
    return sums


def updated_rows(case: Case, summed, weights, state):
    """The formulas of `kernels.FUSED`: new weights, before they are rounded, and state. In the dtype of `summed`."""
    value = dict(zip(kernels.FUSED[case.optimizer], map(np.float32, case.coefficients), strict=True))
    if case.optimizer == "sgd":
        return weights + value["rate"] * summed, ()
    if case.optimizer == "momentum":
        momentum = summed + value["decay"] * state[0]
        return weights + value["rate"] * momentum, (momentum,)
    if case.optimizer == "adagrad":
        squares = state[0] + summed**2
        steps = np.where(squares > 0, summed / np.sqrt(squares + value["eps"]), 0)
        return weights + value["rate"] * steps, (squares,)
    if case.optimizer == "rowwise_adagrad":
        squares = state[0] + np.mean(summed**2, axis=1, keepdims=True)
        return weights + value["rate"] * (summed / (np.sqrt(squares) + value["eps"])), (squares,)
    first = value["b1"] * state[0] + value["one_minus_b1"] * summed
    second = value["b2"] * state[1] + value["one_minus_b2"] * summed**2
    root = np.sqrt(second / value["correction2"] + value["eps_root"])
    return weights + value["rate"] * (first / value["correction1"] / (root + value["eps"])), (first, second)


OPTIMIZERS = {
    "sgd": optax.sgd(0.05),
    "momentum": optax.sgd(0.05, 0.9),
    "adagrad": optax.adagrad(0.05, eps=1e-7),
    "rowwise_adagrad": jc.rowwise_adagrad(0.05, eps=1e-7),
    "adam": optax.adam(0.05, eps=1e-7),
}


@functools.cache
def optimizer_of(case: Case) -> RowOptimizer:
    rounding = "stochastic" if case.rounding == "stochastic" else "nearest"
    dtype = jnp.bfloat16 if case.dtype == "bfloat16" else np.dtype(case.dtype)
    return RowOptimizer(OPTIMIZERS[case.optimizer], case.dim, dtype, rounding, case.rounding == "master")


def rule_of(problem: Problem) -> kernels.Rule:
    """At the third update, as `Case.coefficients` has it."""
    optimizer = optimizer_of(problem.case)
    scalars = tuple(np.full_like(scalar, 2) for scalar in optimizer.scalars)
    return optimizer.rule(scalars, optimizer.hyperparameters, problem.words)


# Cases


@small
def test_gather_gives_the_row_of_each_lookup(case):
    problem = Problem(case)
    found = jax.jit(kernels.gather)(problem.kept.weights, problem.slots, problem.inverse, YES)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, rows_of_lookups(problem))


@small
def test_pool_sums_each_bag(case):
    problem = Problem(case)

    def pool(table, slots, inverse, weights, accept):
        return kernels.pool(table, slots, inverse, problem.bags, weights, accept)

    found = jax.jit(pool)(problem.kept.weights, problem.slots, problem.inverse, problem.weights, YES)
    rows = rows_of_lookups(problem)
    if problem.weights is not None:
        rows = rows * problem.weights[:, None]
    bags = bags_of(problem)
    exact = np.array([rows[lookups].astype(np.float64).sum(0) for lookups in bags]).reshape(-1, case.dim)
    size = np.array([np.abs(rows[lookups]).sum(0) for lookups in bags]).reshape(-1, case.dim)
    np.testing.assert_array_less(np.abs(found - exact), 1e-6 * size + 1e-30)
    if problem.weights is None and all(feature.owners is not None for feature in problem.bags):
        expected = np.array([tree_sum(rows[lookups]) for lookups in bags], np.float32).reshape(-1, case.dim)
        np.testing.assert_array_equal(found, expected)


@small
def test_sums_of_gradients_have_the_bits_of_the_tree(case):
    problem = Problem(case)
    found = np.asarray(jax.jit(kernels.sum_occurrences)(problem.gradients))
    np.testing.assert_array_equal(found, summed_gradients(problem))
    exact = summed_gradients(problem, np.float64)
    size = summed_gradients_size(problem)
    np.testing.assert_array_less(np.abs(found - exact), 1e-6 * size + 1e-30)


def summed_gradients_size(problem: Problem) -> np.ndarray:
    rows = np.abs(problem.gradients.rows)
    gradients = problem.gradients._replace(rows=rows)
    copy = Problem(problem.case)
    copy.gradients = gradients
    return summed_gradients(copy, np.float64)


@pytest.mark.slow
@small
def test_update_applies_the_optimizer_to_the_unique_rows_alone(case):
    problem = Problem(case)
    kept, real = problem.kept, problem.slots < case.slots
    rule = rule_of(problem)  # not inside `jit`: the optimizer is found out about by running it
    assert rule.name == case.optimizer
    np.testing.assert_allclose([float(c) for c in rule.coefficients], case.coefficients, rtol=2e-4)

    @jax.jit
    def update(kept, slots, gradients, accept):
        return kernels.update(kept, slots, gradients, rule, accept)

    refused = update(kept, problem.slots, problem.gradients, NO)
    found = jax.tree.map(np.asarray, update(kept, problem.slots, problem.gradients, YES))
    places = problem.slots[real]
    others = np.ones(case.slots, bool)
    others[places] = False
    for new, same, old in zip(*map(jax.tree.leaves, (found, refused, kept)), strict=True):
        np.testing.assert_array_equal(same, old)
        np.testing.assert_array_equal(new[others], old[others])
    sums = summed_gradients(problem)[real]
    old_state = [leaf[places].astype(np.float64) for leaf in kept.state]
    master = case.rounding == "master"
    old = old_state.pop(0) if master else kept.weights[places].astype(np.float64)
    expected, state = updated_rows(case, sums.astype(np.float64), old, old_state)
    new_state = [leaf[places] for leaf in found.state]
    new = found.weights[places]
    if master:
        np.testing.assert_array_equal(new, new_state[0].astype(new.dtype))
        np.testing.assert_allclose(new_state.pop(0), expected, rtol=1e-4, atol=1e-5)
    spacing = {"float32": 0, "float16": 2.0**-10, "bfloat16": 2.0**-7}[case.dtype]
    np.testing.assert_allclose(new.astype(np.float64), expected, rtol=1e-4 + spacing, atol=1e-5)
    for one, other in zip(new_state, state, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    lookups = np.diff(problem.starts)[real].astype(np.int64)
    np.testing.assert_array_equal(found.counts[places], np.minimum(kept.counts[places] + lookups, 2**31 - 1))
    assert found.dirty[places].all()


@small
def test_exchange_swaps_rows(case):
    problem, exchange = Problem(case), jax.jit(kernels.exchange)
    real = problem.slots < case.slots
    for accept in YES, NO:
        found, out = exchange(problem.kept, problem.slots, problem.incoming, accept)
        leaves = (problem.kept, problem.incoming, found, out)
        for before, incoming, after, outgoing in zip(*map(jax.tree.leaves, leaves), strict=True):
            expected = before.copy()
            if accept:
                expected[problem.slots[real]] = incoming[real]
            np.testing.assert_array_equal(after, expected)
            np.testing.assert_array_equal(np.asarray(outgoing)[real], before[problem.slots[real]])
            assert not np.asarray(outgoing)[~real].any()


def test_what_is_not_accepted_is_read_as_nan():
    problem = Problem(named("features of all kinds"))
    table, slots, inverse = map(jnp.asarray, (problem.kept.weights, problem.slots, problem.inverse))
    assert np.isnan(kernels.gather(table, slots, inverse, NO)).all()
    assert np.isnan(kernels.pool(table, slots, inverse, problem.bags, problem.weights, NO)).all()


def test_nothing_is_read_from_nothing():
    """A table without slots, no bags around what is padding, and no gradients."""
    none, many = np.zeros(100, np.int32), np.full(100, 3, np.int32)
    for table in (np.zeros((0, 2), np.float32), np.ones((4, 2), np.float32)):
        assert not jax.jit(kernels.gather)(table, np.full(3, len(table), np.int32), none, YES).any()
        bags = [kernels.Bags(0, 100, none, np.zeros(1, np.int32))]
        assert kernels.pool(jnp.asarray(table), none[:3], none, bags, None, YES).shape == (0, 2)
    gradients = kernels.Gradients(np.zeros((0, 2), np.float32), none, None, many, none, np.zeros(4, np.int32))
    assert not jax.jit(kernels.sum_occurrences)(gradients).any()


# The tree, drawn at random


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 63, 64, 65, 127, 128, 129, 200, 4096, 4160, 4161, 9000]), max_size=6),
    padding=st.integers(0, 70),
    seed=st.integers(0, 2**32),
)
def test_sums_follow_the_tree_whatever_stands_beside(lengths, padding, seed):
    random, unique = np.random.default_rng(seed), len(lengths) + 1
    lengths = np.array([*lengths, 0])
    total = lengths.sum() + padding
    inverse = np.concatenate([np.repeat(np.arange(unique), lengths), np.full(padding, unique)])
    inverse = random.permutation(inverse).astype(np.int32)
    order = np.argsort(inverse, kind="stable").astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    # Sizes so different that another order of the sum has other bits.
    rows = (random.normal(size=(total, 2)) * 10.0 ** random.integers(-4, 5, (total, 1))).astype(np.float32)
    # Lengths of arrays are rounded up, so that few programs are compiled.
    size = 1 << int(max(total, 1) - 1).bit_length()
    more = size - total
    gradients = kernels.Gradients(
        np.concatenate([rows, np.ones((more, 2), np.float32)]),
        None,
        None,
        np.concatenate([inverse, np.full(more, 9, np.int32)]),
        np.concatenate([order, np.arange(total, size, dtype=np.int32)]),
        np.concatenate([starts, np.full(9 - len(starts), starts[-1], np.int32)]),
    )
    found = jax.jit(kernels.sum_occurrences)(gradients)[:unique]
    expected = np.stack([tree_sum(rows[inverse == row]) for row in range(unique)])
    np.testing.assert_array_equal(found, expected)


def test_the_sums_of_blocks_of_blocks_are_added_in_order():
    """67 of them, and some terms more, in one list."""
    lookups = 67 * 64**2 + 70
    rows = np.random.default_rng(0).normal(size=(lookups, 8)).astype(np.float32)
    order, starts = np.arange(lookups, dtype=np.int32), np.array([0, lookups], np.int32)
    gradients = kernels.Gradients(rows, None, None, np.zeros(lookups, np.int32), order, starts)
    expected = tree_sum(rows)
    assert (expected != tree_sum(rows, levels=3)).any()
    np.testing.assert_array_equal(jax.jit(kernels.sum_occurrences)(gradients)[0], expected)


def test_the_tree_is_not_the_plain_order():
    rows = np.random.default_rng(0).normal(size=(200, 1)).astype(np.float32)
    assert tree_sum(rows) != in_order(rows)
    assert (tree_sum(rows[:64]) == in_order(rows[:64])).all()


# Rows by a function


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), real=st.floats(0, 1), accept=st.booleans())
@pytest.mark.parametrize("slots, places, row", [(1, 1, (1,)), (5, 3, (4,)), (6, 6, ()), (4, 9, (2, 3))])
def test_rewrite_and_read_are_loops(slots, places, row, seed, real, accept):
    random = np.random.default_rng(seed)
    table = random.normal(size=(slots, *row)).astype(np.float32)
    count = round(real * min(slots, places))
    where = np.full(places, slots, np.int32)
    where[:count] = random.permutation(slots)[:count]
    where[count:] += random.integers(0, 3, places - count)
    where = random.permutation(where).astype(np.int32)
    buffer = {"weights": table, "count": np.arange(slots, dtype=np.int32)}
    expected = {name: leaf.copy() for name, leaf in buffer.items()}
    rows = {name: np.zeros((places, *leaf.shape[1:]), leaf.dtype) for name, leaf in buffer.items()}
    for number, place in enumerate(where):
        if place < slots:
            for name, leaf in buffer.items():
                rows[name][number] = leaf[place]
        if accept and place < slots:
            expected["weights"][place] = table[place] * np.float32(0.5) + np.float32(1.0)
            expected["count"][place] = place + 3
    found = _halve(buffer, where, accept)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])
        np.testing.assert_array_equal(jax.jit(kernels.read)(buffer, where)[name], rows[name])


@jax.jit
def _halve(buffer, where, accept):
    """Rows that depend on all leaves of their own old rows."""
    return kernels.rewrite(
        buffer, where, lambda old: {"weights": old["weights"] * 0.5 + 1.0, "count": old["count"] + 3}, accept
    )


def test_rows_that_are_not_finite_stay_where_they_are():
    """NaN in a row that is not touched, or in padding's update, reaches no other row."""
    table = np.array([[np.nan], [np.inf], [2.0]], np.float32)
    where = np.array([2, 3], np.int32)

    @jax.jit
    def update(table, where):
        return kernels.rewrite(table, where, lambda old: jnp.where(old == 0, jnp.nan, old + 1), jnp.array(True))

    found = update(table, where)
    np.testing.assert_array_equal(found, np.array([[np.nan], [np.inf], [3.0]], np.float32))


# In place


def abstract(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


LARGE = Case("large", dim=32, slots=200_000, rows=200, lookups=256, optimizer="rowwise_adagrad")


@pytest.mark.parametrize("operation", ["update", "exchange"])
def test_a_donated_buffer_is_changed_in_place(operation):
    problem = Problem(LARGE)

    rule = rule_of(problem)

    def update(kept, slots, gradients, accept):
        return kernels.update(kept, slots, gradients, rule, accept)

    def exchange(kept, slots, incoming, accept):
        return kernels.exchange(kept, slots, incoming, accept)

    function, last = {"update": (update, problem.gradients), "exchange": (exchange, problem.incoming)}[operation]
    arguments = abstract((problem.kept, problem.slots, last, YES))
    figures = jax.jit(function, donate_argnums=0).lower(*arguments).compile().memory_analysis()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(problem.kept))
    assert figures.alias_size_in_bytes >= size
    assert figures.temp_size_in_bytes < size / 40


@pytest.mark.parametrize("bags", [(), (jc.kernels.cases.Equal(64, 4),)], ids=["gather", "pool"])
def test_gather_takes_memory_of_the_batch_alone(bags):
    problem = Problem(dataclasses.replace(LARGE, bags=bags))

    def read(table, slots, inverse):
        if bags:
            return kernels.pool(table, slots, inverse, problem.bags, None, YES)
        return kernels.gather(table, slots, inverse, YES)

    arguments = abstract((problem.kept.weights, problem.slots, problem.inverse))
    figures = jax.jit(read).lower(*arguments).compile().memory_analysis()
    rows = (problem.case.total + len(problem.slots)) * LARGE.dim * 4
    assert figures.temp_size_in_bytes < 1.1 * rows < problem.kept.weights.nbytes / 100


# Which backend


class Device:
    """What `choose` asks of a device."""

    def __init__(self, platform="gpu", kind="NVIDIA H100 80GB HBM3", capability="9.0"):
        self.platform, self.device_kind, self.compute_capability = platform, kind, capability


H100 = Device()


@pytest.fixture
def backends(monkeypatch):
    """All backends can be imported, whatever is installed; they are recorded in the list."""
    used = []

    class Backend:
        def __init__(self, name):
            self.name = name

        def gather(self, table, *arguments):
            if self.name == "triton" and table.shape[1] == 5:
                raise NotImplementedError("rows of 5")
            used.append(self.name)
            return xla.gather(table, *arguments)

    monkeypatch.setattr(kernels, "_module", Backend)
    monkeypatch.setattr(kernels, "_VERSION", (0, 10))
    return used


def test_a_cpu_has_xla_alone():
    assert kernels.choose() == kernels.XLA
    assert kernels.choose("xla") == kernels.XLA
    assert "needs an NVIDIA GPU" in kernels.obstacle("triton", jax.local_devices()[0])
    with pytest.raises(NotImplementedError, match=r"backends: triton needs an NVIDIA GPU, this is cpu; leave it out"):
        kernels.choose("triton")


def test_what_a_device_can_run_is_tried_in_order(backends):
    assert kernels.choose(device=H100) == (("triton", "mosaic", "xla"), ("triton", "mosaic", "xla"), ("triton", "xla"))
    ampere = Device(kind="NVIDIA A100-SXM4-40GB", capability="8.0")
    assert kernels.choose(device=ampere).gather == ("triton", "xla")
    turing = Device(kind="Tesla T4", capability="7.5")
    assert kernels.choose(device=turing) == kernels.XLA
    assert kernels.choose(device=Device("gpu", "AMD Instinct MI300X", "gfx942")) == kernels.XLA


def test_the_capability_that_is_missing_is_named(backends):
    assert kernels.obstacle("mosaic", Device(capability="8.6")) == "needs compute capability 9.0, this device has 8.6"
    assert kernels.obstacle("triton", Device("gpu", "AMD Instinct MI300X", "gfx942")) == (
        "needs an NVIDIA GPU, this is AMD Instinct MI300X"
    )


def test_old_jax_is_named(backends, monkeypatch):
    monkeypatch.setattr(kernels, "_VERSION", (99, 0))
    assert kernels.obstacle("triton", H100).startswith("needs JAX 99.0 or later, this is 0.")


def test_the_choice_is_described(backends, monkeypatch):
    lines = kernels.describe(None, H100).splitlines()
    assert lines[0].startswith("gpu: NVIDIA H100 80GB HBM3, JAX 0.")
    assert lines[1:] == [
        "gather    triton, then mosaic, then xla",
        "update    triton, then mosaic, then xla",
        "exchange  triton, then xla",
        "triton    runs here: gather, update, exchange",
        "mosaic    runs here: gather, update",
        "xla       runs here: gather, update, exchange",
        "measured: nothing on this kind of device",
    ]
    monkeypatch.setattr(kernels, "SPEEDS", {H100.device_kind: {"gather": ("mosaic",)}})
    lines = kernels.describe("update=xla", H100).splitlines()
    assert lines[1:3] == ["gather    mosaic, then triton, then xla", "update    xla"]
    assert lines[7].startswith("XLA adds in no fixed order here, unless XLA_FLAGS has --xla_gpu_determ")
    assert lines[8:] == ["asked for: update=xla", "measured: {'gather': ('mosaic',)}"]


def test_what_was_measured_comes_first(backends, monkeypatch):
    speeds = {"gather": ("mosaic", "triton"), "exchange": ("xla", "triton")}
    monkeypatch.setattr(kernels, "SPEEDS", {H100.device_kind: speeds})
    choice = kernels.choose(device=H100)
    assert choice == (("mosaic", "triton", "xla"), ("triton", "mosaic", "xla"), ("xla",))


def test_sums_in_a_fixed_order_come_before_fast_ones(backends, monkeypatch):
    speeds = dict.fromkeys(kernels.Choice._fields, ("xla", "mosaic", "triton"))
    monkeypatch.setattr(kernels, "SPEEDS", {H100.device_kind: speeds})
    assert kernels.choose(device=H100) == (("mosaic", "triton", "xla"), ("mosaic", "triton", "xla"), ("xla",))


def test_the_environment_decides_and_an_argument_overrules_it(backends, monkeypatch):
    monkeypatch.setenv("JAXCACHE_KERNELS", "gather=mosaic, update=xla")
    assert kernels.choose(device=H100) == (("mosaic",), ("xla",), ("triton", "xla"))
    assert kernels.choose("triton", H100) == (("triton",), ("triton",), ("triton",))
    assert kernels.choose({"exchange": "xla"}, H100).exchange == ("xla",)
    assert kernels.choose("mosaic", H100) == (("mosaic",), ("mosaic",), ("xla",))
    monkeypatch.setenv("JAXCACHE_KERNELS", "cuda")
    with pytest.raises(ValueError, match=r"the environment variable JAXCACHE_KERNELS: got 'cuda', expected one of "):
        kernels.choose(device=H100)


@pytest.mark.parametrize("request_", ["tritom", "gather=cuda", "scatter=xla", "gather", {"gather": "numpy"}])
def test_a_request_that_means_nothing_is_refused(request_):
    with pytest.raises(ValueError, match=r"backends: got .*, expected one of triton, mosaic, xla, or pairs such as "):
        kernels.choose(request_)


def test_an_operation_that_a_backend_does_not_have_is_refused(backends):
    with pytest.raises(ValueError, match="backends: mosaic has no exchange"):
        kernels.choose("exchange=mosaic", H100)


def test_a_backend_that_refuses_is_passed_over(backends):
    slots, inverse = jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32)
    automatic, asked = kernels.choose(device=H100), kernels.choose("triton", H100)
    for dim, name in ((4, "triton"), (5, "mosaic")):
        kernels.gather(jnp.ones((2, dim)), slots, inverse, YES, choice=automatic)
        assert backends.pop() == name
    kernels.gather(jnp.ones((2, 4)), slots, inverse, YES, choice=asked)
    with pytest.raises(NotImplementedError, match=r"no backend of \('triton',\) can do this gather; triton: rows of 5"):
        kernels.gather(jnp.ones((2, 5)), slots, inverse, YES, choice=asked)
    with pytest.warns(UserWarning, match="XLA does this gather instead of triton: rows of 5"):
        kernels.gather(jnp.ones((2, 5)), slots, inverse, YES, choice=asked._replace(gather=("triton", "xla")))
    assert backends.pop() == "xla"


def test_the_choice_travels_with_the_cache():
    store = jc.HostStore({"user": jc.Table(10, 4)}, optimizer=optax.sgd(0.1))
    assert empty_cache(store, 4).backends == kernels.XLA
    cache = jax.eval_shape(lambda: empty_cache(store, 4, backends=kernels.Choice(("triton",), ("triton",), ("xla",))))
    assert cache.backends.gather == ("triton",)
    assert jax.tree.structure(cache) != jax.tree.structure(empty_cache(store, 4))  # so a step is compiled for each
    with pytest.raises(ValueError, match="backends: got 'fast'"):
        jc.LookAhead(store, [], ids=dict, slots=4, backends="fast")


def test_the_choice_reaches_every_part_of_a_pipeline(monkeypatch):
    chosen, used, dispatch = kernels.Choice(*[("xla", "xla")] * 3), [], kernels._dispatch

    def recorded(backends, operation, *arguments):
        used.append((operation, backends))
        return dispatch(backends, operation, *arguments)

    monkeypatch.setattr(kernels, "_dispatch", recorded)
    store = jc.HostStore({"user": jc.Table(30, 4)}, optimizer=optax.sgd(0.1))
    batches = [{"user": np.array([i, i + 1])} for i in range(6)]
    cache = None
    for backends, expected in ((None, kernels.XLA), (chosen, chosen), (None, chosen), ("xla", kernels.XLA)):
        used.clear()
        with jc.LookAhead(store, batches, ids=dict, slots=4, backends=backends) as ahead:
            cache = ahead.start(cache)
            for _, plan in ahead:
                cache = ahead.exchange(cache, plan)
                cache = jc.update(cache, plan, jc.lookup(cache, plan))
            cache, views = ahead.evaluate(batches[:1], cache, lambda view, plan, batch: view.backends)
        assert cache.backends == expected and views == [expected]
        assert {backends for _, backends in used} == {expected.gather}
        # Programs of the exchange are kept from one pipeline to the next.
        assert {operation for operation, _ in used} >= {"gather", "update"}
        assert "exchange" in dict(used) or backends != chosen


# Rules that backends know


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dim", [1, 6])
def test_the_rules_are_recognized(name, dim):
    optimizer = RowOptimizer(OPTIMIZERS[name], dim)
    case = Case("any", dim=dim, optimizer=name)
    rule = optimizer.rule(tuple(np.full_like(s, 2) for s in optimizer.scalars), optimizer.hyperparameters)
    assert rule.name == name
    np.testing.assert_allclose([float(c) for c in rule.coefficients], case.coefficients, rtol=2e-4)
    random = np.random.default_rng(0)
    summed, weights = random.normal(size=(2, 7, dim)).astype(np.float32)
    state = tuple(np.abs(random.normal(size=(7, *s))).astype(np.float32) for s in case.state_shapes)
    new, new_state = rule.apply(summed, weights, state)
    expected, expected_state = updated_rows(case, summed.astype(np.float64), weights, state)
    np.testing.assert_allclose(new, expected, rtol=1e-4, atol=1e-6)
    for one, other in zip(new_state, expected_state, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def _other_adagrad(threshold):
    """Adagrad whose one constant that is no coefficient is another."""

    def update(gradients, state, parameters=None):
        squares = gradients * gradients + state.sum_of_squares
        steps = jnp.where(squares > threshold, jax.lax.rsqrt(squares + 1e-7), 0.0) * gradients
        return steps, optax.ScaleByRssState(sum_of_squares=squares)

    rss = optax.scale_by_rss(0.1, 1e-7)
    return optax.chain(optax.GradientTransformation(rss.init, update), optax.scale(-0.05))


class _CountedRows(NamedTuple):
    mu: Any
    nu: Any
    count: Any


def _adam_of_rows():
    """Adam that counts the updates of each row: for one row the very function that adam is."""
    adam = optax.scale_by_adam()

    def init(rows):
        return _CountedRows(jnp.zeros_like(rows), jnp.zeros_like(rows), jnp.zeros(rows.shape[:-1], jnp.int32))

    def one(gradient, state):
        step, new = adam.update(gradient, optax.ScaleByAdamState(state.count, state.mu, state.nu))
        return step, _CountedRows(new.mu, new.nu, new.count)

    def update(gradients, state, parameters=None):
        return (one if gradients.ndim == 1 else jax.vmap(one))(gradients, state)

    return optax.chain(optax.GradientTransformation(init, update), optax.scale(-0.05))


@pytest.mark.parametrize(
    "transformation",
    [
        optax.sgd(0.05, 0.9, nesterov=True),
        optax.sgd(optax.linear_schedule(0.1, 0.2, 10)),
        optax.adamw(0.05),
        optax.chain(optax.clip(1.0), optax.sgd(0.05)),
        _other_adagrad(0.5),
        jc.catch_up_adam(0.05),
        _adam_of_rows(),
    ],
    ids=["nesterov", "schedule", "adamw", "clip", "another constant", "catch_up_adam", "a count of each row"],
)
def test_other_optimizers_are_no_known_rule(transformation):
    optimizer = RowOptimizer(transformation, 4)
    rule = optimizer.rule(optimizer.scalars, optimizer.hyperparameters)
    assert rule.name is None and rule.coefficients == ()


def test_a_coefficient_has_one_value_wherever_it_occurs():
    """Adam has b1 and b2 in the moments and in their corrections: with others there it would be no adam."""
    optimizer = RowOptimizer(optax.adam(0.05, b1=0.7, b2=0.6, eps=0.1, eps_root=0.2), 4)
    values = optimizer.hyperparameters
    known = []
    for place, value in enumerate(values):
        optimizer.hyperparameters = (*values[:place], value + np.float32(1), *values[place + 1 :])
        known.append(_known_rule(optimizer) is not None)
    assert known == [values.count(value) == 1 for value in values]
    assert sum(known) == 5  # 1 - b1, 1 - b2, eps, eps_root, rate


def test_a_constant_that_is_no_coefficient_makes_another_optimizer():
    """Compiled steps are shared by equal optimizers: one with a rule built in must not serve one that has none."""
    known, other = RowOptimizer(_other_adagrad(0.0), 4), RowOptimizer(_other_adagrad(0.5), 4)
    assert known.rule((), known.hyperparameters).name == "adagrad"
    assert other.rule((), other.hyperparameters).name is None
    assert known != other


@pytest.mark.parametrize("transformation", [*OPTIMIZERS.values(), jc.catch_up_adam(0.1)])
def test_scalars_advance_without_rows(transformation):
    optimizer = RowOptimizer(transformation, 3, jnp.bfloat16, master_copy=True)
    scalars = tuple(np.full_like(scalar, 5) for scalar in optimizer.scalars)
    weights = np.ones((2, 3), np.float32)
    state = optimizer.initial_state(weights)
    narrow = jnp.asarray(weights, jnp.bfloat16)
    expected = optimizer.update(weights, narrow, state, scalars, optimizer.hyperparameters)[2]
    found = optimizer.advance(scalars, optimizer.hyperparameters)
    assert [int(one) for one in found] == [int(other) for other in expected]
