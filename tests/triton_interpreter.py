"""Runs the Triton kernels in Triton's interpreter, on NumPy arrays, against definitions in NumPy and `xla.py`.

A program of its own, as Triton reads TRITON_INTERPRET when it is imported: `python tests/triton_interpreter.py`, with
names of checks to run only those. Prints a JSON object, for each check a list of what is wrong. What makes the kernels'
arguments is the code that a GPU runs; `_launch` alone is replaced.
"""

import os

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import dataclasses
import itertools
import json
import mmap
import sys
import time
import traceback
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import triton.language as tl
import triton.runtime.interpreter as interpreter

import jaxcache as jc
from jaxcache.kernels import XLA, Choice, xla
from jaxcache.kernels import triton as backend
from jaxcache.kernels.cases import CASES, Case, Equal, Problem
from jaxcache.kernels.xla import Rule, Slots
from jaxcache.optimizers import Rows
from jaxcache.rounding import round_stochastically
from jaxcache.state import Counters, GroupExchange, exchange_group
from oracle import tree_sum

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The interpreter


def convert_float(original, data, source, target, mode):
    """Triton's interpreter cuts float32 to bfloat16 instead of rounding it."""
    if (source.name, target.name) == ("fp32", "bf16"):
        return data.astype(ml_dtypes.bfloat16).view(np.uint16)
    if (source.name, target.name) == ("bf16", "fp32"):
        return data.view(ml_dtypes.bfloat16).astype(np.float32)
    return original(data, source, target, mode)


def patch_once(original, patched, function):
    """Triton's interpreter patches its language at each call of a function, which takes much of its time."""
    modules = frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
    if modules not in patched:
        patched[modules] = original(function)
        patched[modules].restore = lambda: None
        # That of Triton 3.6 fails with recent versions of NumPy.
        tl.tensor.__index__ = lambda self: int(self.handle.data.squeeze())
    return patched[modules]


def short_name(dtype):
    """Triton's name of a dtype."""
    name = np.dtype(dtype).name
    if name == "bool":
        return "i1"
    return name.replace("bfloat", "bf").replace("float", "fp").replace("uint", "u").replace("int", "i")


class Pointer:
    """An array between two guards, as what the interpreter takes for a tensor of PyTorch on the CPU."""

    def __init__(self, array, guarded=True):
        self.dtype = short_name(array.dtype)
        self.guard = max(4096, 8 * array.nbytes // max(len(array), 1)) // 64 * 64 if guarded and array.ndim else 0
        if self.guard:
            # All ones: NaN, or an index of -1.
            self.memory = np.full(array.nbytes + 2 * self.guard, 0xFF, np.uint8)
            self.array = self.memory[self.guard : self.guard + array.nbytes].view(array.dtype).reshape(array.shape)
            self.array[...] = array
        else:
            self.array = array

    def intact(self):
        ends = (self.memory[: self.guard], self.memory[self.guard + self.array.nbytes :]) if self.guard else ()
        return all((end == 0xFF).all() for end in ends)

    def data_ptr(self):
        return self.array.ctypes.data

    def itself(self, *_, **__):
        return self

    untyped_storage = cpu = new_empty = itself

    def nothing(self, *_, **__):
        return None

    set_ = copy_ = storage_offset = size = stride = nothing


def launch(guarded, kernel, grid, tile, results, replaced, arguments, constants):
    def pointer(value):
        return value if value is None or isinstance(value, int) else Pointer(np.asarray(value), guarded)

    given = {name: pointer(value) for name, value in arguments.items()}
    changed = {name: pointer(value) for name, value in replaced.items()}
    written = {}
    for name, result in results.items():
        dtype = np.dtype(result.dtype)
        # NaN, so that it shows what was not written.
        start = np.full(int(np.prod(result.shape)) * dtype.itemsize, 0xFF, np.uint8).view(dtype).reshape(result.shape)
        written[name] = Pointer(start, guarded)
    pointers = {**given, **changed, **written}
    assert set(pointers) | set(constants) | {"ROWS", "COLUMNS"} == set(kernel.arg_names)
    before = {name: value.array.copy() for name, value in given.items() if guarded and isinstance(value, Pointer)}
    with np.errstate(all="ignore"):
        kernel[grid](**pointers, **constants, ROWS=tile.rows, COLUMNS=tile.columns)
    for name, value in pointers.items():
        assert not isinstance(value, Pointer) or value.intact(), f"{kernel.__name__} wrote outside of {name}"
    for name, value in before.items():
        assert bits_equal(given[name].array, value), f"{kernel.__name__} changed {name}"

    def array(value):
        return None if value is None else value.array if not guarded else jnp.asarray(value.array)

    return [array(value) for value in written.values()], [array(value) for value in changed.values()]


# Definitions


def bits(array):
    array = np.ascontiguousarray(np.asarray(array))
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def bits_equal(one, other):
    one, other = np.asarray(one), np.asarray(other)
    return one.dtype == other.dtype and one.shape == other.shape and np.array_equal(bits(one), bits(other))


def looked_up(table, slots, inverse):
    """The row of every lookup, float32."""
    padded = np.concatenate([slots, [len(table)]])[np.minimum(inverse, len(slots))]
    zeros = np.zeros((1, table.shape[1]), table.dtype)
    return np.concatenate([table, zeros])[np.minimum(padded, len(table))].astype(np.float32)


def pooled(problem, table):
    rows = looked_up(table, problem.slots, problem.inverse)
    if problem.weights is not None:
        known = problem.inverse < len(problem.slots)
        rows = rows * np.where(known, problem.weights, np.float32(0))[:, None]
    sums, start = [], 0
    for feature in problem.bags:
        offsets = feature.offsets
        if offsets is None:
            offsets = np.arange(feature.count + 1) * (feature.lookups // max(feature.count, 1))
        sums += [tree_sum(rows[start + a : start + b]) for a, b in itertools.pairwise(offsets)]
        start += feature.lookups
    return np.stack(sums)


def summed(gradients):
    order, starts = gradients.order, gradients.starts
    lists = [order[a:b] for a, b in itertools.pairwise(starts)]

    def terms(lookups):
        rows = gradients.rows[lookups if gradients.sources is None else gradients.sources[lookups]]
        return rows if gradients.weights is None else rows * gradients.weights[lookups][:, None]

    return np.stack([tree_sum(terms(lookups)) for lookups in lists])


def rule_in(dtype, name, coefficients, g, w, state):
    """FUSED as it is written there, and a size for the rounding errors of each result: that of what is added up."""
    g, w = g.astype(dtype), w.astype(dtype)
    state = [leaf.astype(dtype) for leaf in state]
    c = [dtype(np.float32(coefficient)) for coefficient in coefficients]
    if name == "sgd":
        [rate] = c
        steps, sizes, new, new_sizes = rate * g, abs(rate * g), [], []
    elif name == "momentum":
        (decay, rate), (m,) = c, state
        size = abs(g) + abs(decay * m)
        m = g + decay * m
        steps, sizes, new, new_sizes = rate * m, abs(rate) * size, [m], [size]
    elif name == "adagrad":
        (eps, rate), (s,) = c, state
        s = s + g * g
        steps = rate * np.where(s > 0, g / np.sqrt(s + eps), 0)
        sizes, new, new_sizes = abs(steps), [s], [s]
    elif name == "rowwise_adagrad":
        (eps, rate), (s,) = c, state
        s = s + np.mean(g * g, axis=1, keepdims=True)
        steps = rate * (g / (np.sqrt(s) + eps))
        sizes, new, new_sizes = abs(steps), [s], [s]
    else:
        (b1, one_minus_b1, b2, one_minus_b2, eps, eps_root, correction1, correction2, rate), (m, v) = c, state
        size = abs(b1 * m) + abs(one_minus_b1 * g)
        m = b1 * m + one_minus_b1 * g
        v = b2 * v + one_minus_b2 * (g * g)
        root = np.sqrt(v / correction2 + eps_root) + eps
        steps, sizes = rate * ((m / correction1) / root), abs(rate) * size / correction1 / root
        new, new_sizes = [m, v], [size, v]
    return w + steps, abs(w) + sizes, new, new_sizes


ROUNDINGS = 16  # of half a unit in the last place each: more than any rule has, with the mean of rowwise_adagrad


def check(failures, what, holds):
    if not holds:
        failures.append(what)


def near(found, expected, sizes):
    with np.errstate(all="ignore"):
        return bool(np.all(abs(np.asarray(found).astype(np.float64) - expected) <= ROUNDINGS * 2.0**-24 * sizes))


def device(value):
    return jnp.asarray(value) if isinstance(value, np.ndarray) else value


# Checks

YES, NO = np.array(True), np.array(False)


def check_gather(problem, failures):
    table = problem.kept.weights.copy()
    table[:, 0] = -0.0
    found = backend.gather(table, problem.slots, problem.inverse, YES)
    check(failures, "gather", bits_equal(found, looked_up(table, problem.slots, problem.inverse)))
    refused = np.asarray(backend.gather(table, problem.slots, problem.inverse, NO))
    check(failures, "gather, not accepted", refused.shape == found.shape and np.isnan(refused).all())


def check_pool(problem, failures):
    table, arguments = problem.kept.weights, (problem.slots, problem.inverse, problem.bags, problem.weights)
    found = backend.pool(table, *arguments, YES)
    check(failures, "pool", bits_equal(found, pooled(problem, table)))
    if all(feature.owners is not None for feature in problem.bags):
        # Bags that are equally long may be added in another order.
        expected = jax.jit(lambda table: xla.pool(table, *jax.tree.map(device, arguments), device(YES)))(table)
        check(failures, "pool as XLA", bits_equal(found, expected))
    refused = np.asarray(backend.pool(table, *arguments, NO))
    check(failures, "pool, not accepted", refused.shape == found.shape and np.isnan(refused).all())


def check_sums(problem, failures):
    found = backend.sum_occurrences(problem.gradients)
    check(failures, "sum_occurrences as XLA", bits_equal(found, jax.jit(xla.sum_occurrences)(problem.gradients)))
    check(failures, "sum_occurrences", bits_equal(found, summed(problem.gradients)))


def counted(problem):
    counts, slots = problem.kept.counts.astype(np.int64), problem.slots
    real = slots < len(counts)
    counts[slots[real]] += np.diff(problem.gradients.starts)[real]
    return np.minimum(counts, 2**31 - 1).astype(np.int32)


def check_update(problem, failures):
    case, kept, slots, gradients = problem.case, problem.kept, problem.slots, problem.gradients
    real = slots[slots < case.slots]
    sums = summed(gradients)[slots < case.slots]
    rule = Rule(None, case.optimizer, tuple(map(np.float32, case.coefficients)))
    master = case.rounding == "master"
    start = kept.state[0] if master else kept.weights.astype(np.float32)
    state = kept.state[1:] if master else kept.state

    # With weights of float32, against float64; and bit by bit against float32, but for the order of a mean.
    plain = Slots(start, state, kept.counts, kept.dirty)
    exact = backend.update(plain, slots, gradients, rule, YES)
    arguments = case.optimizer, case.coefficients, sums, start[real], [leaf[real] for leaf in state]
    w, sizes, new, new_sizes = rule_in(np.float64, *arguments)
    if case.optimizer != "rowwise_adagrad":
        narrow, _, narrow_state, _ = rule_in(np.float32, *arguments)
        check(failures, "weights bit by bit", bits_equal(np.asarray(exact.weights)[real], narrow))
        for leaf, expected in zip(exact.state, narrow_state, strict=True):
            check(failures, "state bit by bit", bits_equal(np.asarray(leaf)[real], expected))
    check(failures, "weights", near(np.asarray(exact.weights)[real], w, sizes))
    check(failures, "number of leaves", len(exact.state) == len(state))
    for number, (leaf, expected, size) in enumerate(zip(exact.state, new, new_sizes, strict=True)):
        check(failures, f"state {number}", near(np.asarray(leaf)[real], expected, size))
    dirty = kept.dirty.copy()
    dirty[real] = True
    check(failures, "counts", bits_equal(exact.counts, counted(problem)))
    check(failures, "dirty", bits_equal(exact.dirty, dirty))
    others = np.setdiff1d(np.arange(case.slots), real)
    for leaf, before in zip(jax.tree.leaves(exact), jax.tree.leaves(plain), strict=True):
        check(failures, "rows that are not updated", bits_equal(np.asarray(leaf)[others], before[others]))

    # With narrow ones: those of float32, rounded.
    if case.dtype != "float32":
        rule = rule._replace(master_copy=master, words=problem.words)
        found = backend.update(kept, slots, gradients, rule, YES)
        values = np.asarray(exact.weights)
        if problem.words is None:
            rounded = values.astype(kept.weights.dtype)
        else:
            rounded = kept.weights.copy()
            words = problem.words[slots < case.slots]
            rounded[real] = round_stochastically(jnp.asarray(values[real]), jnp.asarray(words), kept.weights.dtype)
        check(failures, "rounded", bits_equal(np.asarray(found.weights)[real], rounded[real]))
        check(failures, "rounded elsewhere", bits_equal(np.asarray(found.weights)[others], kept.weights[others]))
        check(failures, "number of leaves", len(found.state) == len(kept.state))
        if master:
            check(failures, "master copy", bits_equal(found.state[0], exact.weights))
        for leaf, wide in zip(found.state[-len(state) :] if state else (), exact.state, strict=True):
            check(failures, "state, narrow", bits_equal(leaf, wide))
        check(failures, "counts, narrow", bits_equal(found.counts, exact.counts))

    refused = backend.update(kept, slots, gradients, rule, NO)
    for leaf, before in zip(jax.tree.leaves(refused), jax.tree.leaves(kept), strict=True):
        check(failures, "update, not accepted", bits_equal(leaf, before))


def check_unknown_rule(problem, failures):
    def apply(summed, weights, state):
        return (weights.astype(jnp.float32) - 0.25 * summed).astype(weights.dtype), state

    arguments = jax.tree.map(jnp.asarray, (problem.kept, problem.slots, problem.gradients))
    found, expected = (module.update(*arguments, Rule(apply), jnp.asarray(YES)) for module in (backend, xla))
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        check(failures, "unknown rule", bits_equal(leaf, other))


def check_exchange(buffer, slots, incoming, failures):
    for accept in YES, NO:
        changed, old = backend.exchange(buffer, slots, incoming, accept)
        check(failures, "structure", jax.tree.structure(changed) == jax.tree.structure(buffer))
        check(failures, "structure of old rows", jax.tree.structure(old) == jax.tree.structure(incoming))
        leaves = map(jax.tree.leaves, (buffer, incoming, changed, old))
        for table, new, found, victims in zip(*leaves, strict=True):
            held = slots < len(table)
            expected, victim = table.copy(), np.zeros_like(new)
            victim[held] = table[slots[held]]
            if accept:
                expected[slots[held]] = new[held]
            check(failures, f"buffer of {table.dtype}{table.shape}, {accept}", bits_equal(found, expected))
            check(failures, f"old rows of {table.dtype}{table.shape}, {accept}", bits_equal(victims, victim))


def check_all(case, failures):
    problem = Problem(case)
    check_gather(problem, failures)
    if problem.bags:
        check_pool(problem, failures)
    check_sums(problem, failures)
    check_update(problem, failures)
    check_exchange(problem.kept, problem.slots, problem.incoming, failures)
    if problem.weights is not None:
        check_unknown_rule(problem, failures)


def check_leaves(failures):
    """Rows of all widths and dtypes."""
    random = np.random.default_rng(0)
    slots = np.array([3, 0, 50, 7, 51, 49, 2**31 - 1], np.int32)
    buffer, incoming = {}, {}
    dtypes = ("bool", "int8", "int32", "uint32", "float16", "bfloat16", "float32", "int16", "uint8")
    for number, row in enumerate([(), (1,), (3,), (2, 5), (64,), (100,), (1000,), (1024,), (1100,), (0,)]):
        dtype = np.dtype(dtypes[number % len(dtypes)])
        below = 2 if dtype.name == "bool" else 100
        buffer[f"{number}"] = random.integers(0, below, (50, *row)).astype(dtype)
        incoming[f"{number}"] = random.integers(0, below, (len(slots), *row)).astype(dtype)
    check_exchange(buffer, slots, incoming, failures)
    check_exchange((), slots, (), failures)


def check_nothing(failures):
    """No lookups, no bags, no rows, no slots."""
    none, table = np.zeros(0, np.int32), np.ones((4, 8), np.float32)
    check(failures, "gather", backend.gather(table, none, none, YES).shape == (0, 8))
    found = backend.gather(table[:0], np.zeros(2, np.int32), np.array([0, 1, 5], np.int32), YES)
    check(failures, "gather of no slots", bits_equal(found, np.zeros((3, 8), np.float32)))
    features = [xla.Bags(0, 0), xla.Bags(3, 0), xla.Bags(2, 4, np.array([2, 2, 2, 2], np.int32), np.zeros(3, np.int32))]
    zeros = np.zeros((5, 8), np.float32)
    for accept, expected in (YES, zeros), (NO, zeros * np.nan):
        found = backend.pool(table, none, np.zeros(4, np.int32), features, None, accept)
        check(failures, "pool", np.array_equal(found, expected, equal_nan=True))
        found = backend.pool(table, none, none, features[1:2], None, accept)
        check(failures, "pool of empty bags", np.array_equal(found, expected[:3], equal_nan=True))
    check(failures, "pool of nothing", backend.pool(table, none, none, [], None, YES).shape == (0, 8))
    check(failures, "pool of no bags", backend.pool(table, none, none, [xla.Bags(0, 0)], None, YES).shape == (0, 8))
    gradients = xla.Gradients(table[:0], None, None, none, none, np.zeros(3, np.int32))
    check(failures, "sums", bits_equal(backend.sum_occurrences(gradients), zeros[:2]))
    kept = Slots(table, (table,), np.zeros(4, np.int32), np.zeros(4, bool))
    found = backend.update(kept, np.array([1, 4], np.int32), gradients, momentum(), YES)
    check(failures, "update without lookups", bits_equal(found.dirty, np.array([False, True, False, False])))
    gradients = gradients._replace(starts=np.zeros(1, np.int32))
    found = backend.update(*jax.tree.map(jnp.asarray, (kept, none, gradients)), momentum(), jnp.asarray(YES))
    for leaf, before in zip(jax.tree.leaves(found), jax.tree.leaves(kept), strict=True):
        check(failures, "update of nothing", bits_equal(leaf, before))


def momentum():
    return Rule(lambda g, w, s: (w, s), "momentum", (np.float32(0.9), np.float32(-0.05)))


def check_adagrad_of_zeros(failures):
    """No division by zero where a row had no gradient yet."""
    one, table = np.zeros(1, np.int32), np.ones((4, 8), np.float32)
    gradients = xla.Gradients(np.zeros((1, 8), np.float32), None, None, one, one, np.array([0, 1], np.int32))
    kept = Slots(table, (np.zeros_like(table),), np.zeros(4, np.int32), np.zeros(4, bool))
    found = backend.update(kept, one, gradients, Rule(None, "adagrad", (np.float32(0), np.float32(-1))), YES)
    check(failures, "adagrad", bits_equal(found.weights, table))


def check_refusals(failures):
    def refused(text, operation, *arguments):
        try:
            operation(*arguments)
        except NotImplementedError as error:
            check(failures, f"{text} is not in {error}", text in str(error))
        else:
            failures.append(f"not refused: {text}")

    table = np.ones((4, 8), np.float64)
    one, accept = np.zeros(1, np.int32), YES
    gradients = xla.Gradients(np.ones((1, 8), np.float32), None, None, one, one, np.array([0, 1], np.int32))
    kept = Slots(table.astype(np.float32), (table,), np.zeros(4, np.int32), np.zeros(4, bool))
    refused("rows of dtype float64", backend.gather, table, one, one, accept)
    refused("rows of dtype float64", backend.pool, table, one, one, [xla.Bags(1, 1)], None, accept)
    refused("gradients of dtype float64", backend.sum_occurrences, gradients._replace(rows=table[:1]))
    refused("state of dtype float64", backend.update, kept, one, gradients, momentum(), accept)
    refused("the rule lion", backend.update, kept, one, gradients, momentum()._replace(name="lion"), accept)
    refused(
        "buffer of complex64",
        backend.exchange,
        table.astype(np.complex64),
        one,
        (table[:1] * 1j).astype(np.complex64),
        accept,
    )


def check_more_than_32_bits(failures):
    """Rows beyond 2**31 elements of a table. The kernels see a window of memory of which hardly a page is ever used; it
    begins so far below the table that a place times columns that wraps around is in it too, and reads zero."""
    dim, last = 1024, 2**21 + 5  # row 2**21 begins at element 2**31
    slots, below = 2**21 + 8, 2**31
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python 3.13 has the name
    memory = mmap.mmap(-1, (slots * dim + below) * 2, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    table = np.frombuffer(memory, np.float16)[below:].reshape(slots, dim)
    random = np.random.default_rng(1)
    places = np.array([last, 2**21, 3], np.int32)
    rows = random.normal(size=(3, dim)).astype(np.float16)
    table[places] = rows
    backend._launch = partial(launch, False)
    lookups = np.arange(3, dtype=np.int32)
    found = backend.gather(table, places, lookups, YES)
    check(failures, "gather", bits_equal(found, rows.astype(np.float32)))
    found = backend.pool(table, places, lookups, [xla.Bags(3, 3)], None, YES)
    check(failures, "pool", bits_equal(found, rows.astype(np.float32)))
    new = random.normal(size=rows.shape).astype(np.float16)
    changed, old = backend.exchange(table, places, new, YES)
    check(failures, "exchange", bits_equal(old, rows) and bits_equal(changed[places], new))
    gradients = xla.Gradients(np.ones((3, dim), np.float32), None, None, lookups, lookups, np.arange(4, dtype=np.int32))
    kept = Slots(table, (), np.zeros(slots, np.int32), np.zeros(slots, bool))
    rule = Rule(None, "sgd", (np.float32(1.0),))
    found = backend.update(kept, places, gradients, rule, YES)
    expected = (new.astype(np.float32) + np.float32(1)).astype(np.float16)
    check(failures, "update", bits_equal(found.weights[places], expected))


# Lengths at which the tree gets another block or level; wide rows, in several tiles; long lists of features together.
LENGTHS = (63, 64, 65, 0, 127, 128, 129, 4095, 4096, 4159, 4160, 4161, 1, 8320)
EXTRA = (
    Case("lengths about the blocks of the tree", dim=3, bags=(LENGTHS,), weighted=True),
    Case("equal bags of 4,200", dim=2, bags=(Equal(3, 4200),), skew="hot"),
    Case("equal bags of 64", dim=4, bags=(Equal(5, 64),), skew="power"),
    Case("long bags of several features", dim=4, bags=(Equal(3, 70), (200, 0, 130), Equal(2, 64), (4500,)), skew="hot"),
    Case("dim 1", dim=1, optimizer="adam"),
    Case("dim 1300, adam", dim=1300, slots=20, rows=9, lookups=90, optimizer="adam", dtype="bfloat16"),
    Case("one slot", dim=8, slots=1, rows=1, lookups=70, optimizer="momentum"),
)
WIDE = Case("dim 1100, rowwise adagrad", dim=1100, slots=20, rows=9, lookups=30, optimizer="rowwise_adagrad")


def check_wide_rowwise(failures):
    """Rows of more than one tile are not updated in one kernel."""
    problem = Problem(WIDE)

    def apply(g, w, state):
        s = state[0] + jnp.mean(g * g, axis=1, keepdims=True)
        return w - 0.05 * g / (jnp.sqrt(s) + 1e-7), (s,)

    rule = Rule(apply, "rowwise_adagrad", (np.float32(1e-7), np.float32(-0.05)))
    arguments = jax.tree.map(jnp.asarray, (problem.kept, problem.slots, problem.gradients))
    found, expected = (module.update(*arguments, rule, jnp.asarray(YES)) for module in (backend, xla))
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        check(failures, "wide", bits_equal(leaf, other))


def check_training(failures):
    """Lookup, update and exchange of a cache as a training has them: with Triton's kernels and with XLA's."""
    rows = {"user": 30, "word": 50, "city": 9}
    narrow = {"dtype": jnp.bfloat16, "rounding": "stochastic"}
    tables = {name: jc.Table(number, 8, **narrow if name == "city" else {}) for name, number in rows.items()}
    features = {
        "user": jc.Feature("user"),
        "history": jc.Feature("word", "mean"),
        "words": jc.Feature("word", "mean"),
        "city": jc.Feature("city", "sum"),
    }

    def batch(seed):
        random = np.random.default_rng(seed)
        offsets = np.array([0, 3, 3, 80, 81])
        return {
            "user": random.integers(0, 30, 4),
            "history": random.integers(0, 50, (4, 3)),
            "words": jc.Bags(random.integers(0, 50, 81), offsets, random.uniform(0.5, 2, 81).astype(np.float32)),
            "city": jc.Bags(random.integers(0, 2, (4, 40)), None, random.uniform(0.5, 2, (4, 40)).astype(np.float32)),
        }

    store = jc.HostStore(tables, optax.adagrad(0.1))
    triton = Choice(("triton",), ("triton",), ("triton",))
    slots = {"user": 60, "city": 4}
    with jc.LookAhead(store, map(batch, range(3)), lambda ids: ids, slots, features=features, window=2) as ahead:
        cache = ahead.start()
        for _, plan in ahead:
            group, counters = cache.groups[0], Counters.of(cache)
            free = jnp.arange(50, 65, dtype=jnp.int32)  # the last ones stand for nothing
            incoming = Rows(jnp.ones((15, 8)), (jnp.ones((15, 8)),))
            moved = GroupExchange(free, jnp.full((15, 3), 7, jnp.int32), incoming)
            found, expected = (
                exchange_group(group.contents, counters, moved, cache.step, choice) for choice in (triton, XLA)
            )
            for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                check(failures, "exchange", bits_equal(leaf, other))

            cache = ahead.exchange(cache, plan)
            rows = jc.lookup(cache, plan)
            found = jc.lookup(dataclasses.replace(cache, backends=triton), plan)
            for name, other in rows.items():
                # Weighted rows of one size XLA may add in another order.
                close = bits_equal if name != "city" else partial(np.allclose, rtol=1e-5)
                check(failures, f"lookup of {name}", close(found[name], other))
            gradients = jax.tree.map(jnp.tanh, rows)
            found = jc.update(dataclasses.replace(cache, backends=triton), plan, gradients)
            cache = jc.update(cache, plan, gradients)
            for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(cache), strict=True):
                # Of two neighbours the other one, where the last bit decides.
                exact = partial(np.allclose, rtol=2.0**-7 if leaf.dtype == jnp.bfloat16 else 1e-5)
                floats = jnp.issubdtype(leaf.dtype, jnp.floating)
                one, same = (np.asarray(a, np.float32 if floats else a.dtype) for a in (leaf, other))
                check(failures, f"update of {leaf.dtype}{leaf.shape}", (exact if floats else bits_equal)(one, same))
        ahead.flush(cache)


CHECKS = {
    **{case.name: partial(check_all, case) for case in (*CASES, *EXTRA) if not case.measured},
    "rowwise adagrad of wide rows": check_wide_rowwise,
    "leaves of all widths": check_leaves,
    "nothing to do": check_nothing,
    "adagrad of zeros": check_adagrad_of_zeros,
    "refusals": check_refusals,
    "a training": check_training,
    "more than 2**31 elements": check_more_than_32_bits,
}


# Those that take the longest.
SLOW = {
    name
    for name in CHECKS
    if name.startswith(("dim 384", "dim 1000", "dim 1024", "dim 48", "dim 128, adam", "lengths", "3 rows"))
}


def main():
    interpreter._convert_float = partial(convert_float, interpreter._convert_float)
    interpreter._patch_lang = partial(patch_once, interpreter._patch_lang, {})
    found = {}
    for name in sys.argv[1:] or CHECKS:
        backend._launch = partial(launch, True)
        failures, start = [], time.process_time()
        try:
            CHECKS[name](failures)
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")
            traceback.print_exc()
        found[name] = failures
        print(f"{time.process_time() - start:6.2f} s  {name}", file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
