"""Each operation alone: against the bytes that it must move, a plain copy, and what one would write plainly."""

from __future__ import annotations

import math
import os
import pprint
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache import kernels
from jaxcache.kernels import Gradients, Rule, Slots
from jaxcache.kernels.cases import CASES, Case, Equal, Problem
from on_gpu.checks import choice_of, rules_of
from on_gpu.run import Run, on_cpu, print_table, seconds, spread

SETS = 3  # inputs that a loop takes in turn, so that the caches of the device do not hold them
TURNS = 40  # of a loop, each over all sets
ROUNDS = 7
GOALS = {"gather": 0.90, "pool": 0.90, "update": 0.85, "exchange": 0.90}  # of a plain copy's bytes a second
PLAIN = "plain JAX"  # what a user would write without this project
FASTER = 1.02  # noise does not make a backend slower than plain JAX


class Inputs(NamedTuple):
    """One set of inputs, on the device."""

    table: Any
    slots: Any
    inverse: Any
    gradients: Gradients
    words: Any
    incoming: Any
    accept: Any


@dataclass
class Timed:
    """A contender for an operation."""

    name: str
    program: Any
    times: list[float] = field(default_factory=list)


def operations(run: Run) -> None:
    """Times, bytes and bytes a second of every measured case, and who is fastest."""
    copy = _copy_rate(run)
    print(
        "Bytes: each unique row, gradient and index is read once, each result written once; an update and an exchange "
        f"read and write everything that is kept for a row. Times are medians over {ROUNDS} rounds of loops inside one "
        f"program that take {SETS} sets of inputs in turn, with quartiles; backends alternate."
    )
    won: dict[str, dict[str, list[float]]] = {}
    cases = [case for case in CASES if case.measured]
    if run.tiny:
        cases = [replace(case, slots=500, rows=100, dim=min(case.dim, 20), **_few(case)) for case in cases[2:5:2]]
    for case in cases:
        if run.left() < (15 if not run.tiny else 2):
            run.skip(f"operations of {case.name!r} and the cases behind it: no time")
            break
        _measure_case(run, case, copy, won)
    _print_speeds(run, won)


def _few(case: Case) -> dict[str, Any]:
    return {"bags": tuple(Equal(8, bag.lookups) for bag in case.bags), "lookups": min(case.lookups, 200)}


def _copy_rate(run: Run) -> float:
    """Bytes a second, reading and writing, of the faster of two plain copies of a few GB."""
    array = jnp.ones((1 << (16 if on_cpu() else 29),), jnp.float32)
    program, times = jax.jit(jnp.copy), []
    for _ in range(ROUNDS + 1):
        times.append(seconds(program, array))
    rates = {"one copy": 2 * array.nbytes / spread(times[1:])[1]}
    # In a loop, and so without the time that it takes to start a program.
    program = jax.jit(lambda x: jax.lax.fori_loop(0, TURNS, lambda _, x: -x, x), donate_argnums=0)
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        array = jax.block_until_ready(program(array))
        times.append(time.perf_counter() - start)
    rates["negatives in a loop"] = 2 * array.nbytes * TURNS / spread(times[1:])[1]
    print(
        f"a plain copy of {array.nbytes / 1e9:.1f} GB: "
        + ", ".join(f"{n} {r / 1e9:,.0f} GB/s" for n, r in rates.items())
    )
    run.record(plain_copy=rates, bytes=array.nbytes)
    return max(rates.values())


def _measure_case(run: Run, case: Case, copy: float, won: dict[str, dict[str, list[float]]]) -> None:
    problem, sets = _inputs(case)
    unique = int((problem.slots < case.slots).sum())
    rows = []
    moves = _bytes(case, problem, unique)
    carries = {operation: partial(_carry, operation, case, problem) for operation in moves}
    programs = _compiled(run, case, problem, carries, sets)
    for operation, moved in moves.items():
        timed = programs[operation]
        _time(run, timed, carries[operation], sets)
        medians = {one.name: spread(one.times)[1] for one in timed if one.times}
        if not medians:
            continue
        best = min(medians.values())
        rivals = [median for name, median in medians.items() if name in (PLAIN, "xla")]
        for one in timed:
            if not one.times:
                continue
            first, median, third = spread(one.times)
            share, flags = moved / median / copy, []
            if one.name not in (PLAIN, "xla"):
                if share < GOALS[operation]:
                    flags.append(f"below the goal of {GOALS[operation]:.0%}")
                if rivals and median > FASTER * min(rivals):
                    flags.append("slower than XLA's own")
            if one.name != PLAIN:
                won.setdefault(operation, {}).setdefault(one.name, []).append(median / best)
            times = [f"{1e6 * median:,.1f}", f"{1e6 * first:,.1f} - {1e6 * third:,.1f}"]
            sizes = [f"{moved / 1e6:,.1f}", f"{moved / median / 1e9:,.0f}", f"{share:.0%}"]
            rows.append([operation, one.name, *times, *sizes, ", ".join(flags)])
            run.record(
                case=case.name, operation=operation, backend=one.name, seconds=median, quartiles=[first, third],
                bytes=moved, share_of_copy=share, flags=flags, unique_rows=unique, lookups=case.total,
            )  # fmt: skip
    print(f"\n{case.name}: {case.total:,} lookups of {unique:,} rows, {case.dtype}, {case.optimizer}")
    print_table(["", "backend", "us", "quartiles", "MB", "GB/s", "of a copy", ""], rows)


def _inputs(case: Case) -> tuple[Problem, list[Inputs]]:
    """Sets of inputs of equal shapes: the same lookups in other orders, rows in other places, other gradients."""
    problem, random = Problem(case), np.random.default_rng(0)
    real, unique = int((problem.slots < case.slots).sum()), len(problem.slots)
    sources = _sources(problem)
    count = sum(bags.count for bags in problem.bags) if case.bags else case.total
    table = _normal(0, (case.slots, case.dim), case.dtype)
    sets = []
    for number in range(SETS):
        inverse, slots = random.permutation(problem.inverse), problem.slots.copy()
        slots[:real] = random.choice(case.slots, real, replace=False)
        order = np.argsort(inverse, kind="stable").astype(np.int32)
        gradients = Gradients(_normal(number, (count, case.dim)), sources, None, inverse, order, problem.starts)
        words = None
        if case.rounding == "stochastic":
            words = jax.random.bits(jax.random.key(number), (unique, case.dim), jnp.uint32)
        sets.append(
            jax.device_put(Inputs(table, slots, inverse, gradients, words, _kept(case, unique), np.array(True)))
        )
    return problem, sets


def _sources(problem: Problem) -> np.ndarray | None:
    """The bag of each lookup; all measured bags of a feature have one size."""
    if not problem.bags:
        return None
    return np.repeat(
        np.arange(sum(bags.count for bags in problem.bags), dtype=np.int32),
        np.concatenate([np.full(bags.count, bags.size) for bags in problem.bags]),
    )


@partial(jax.jit, static_argnums=(0, 1, 2))
def _normal(seed: int, shape: tuple[int, ...], dtype: str = "float32") -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.dtype(dtype))


@partial(jax.jit, static_argnums=(0, 1))
def _kept(case: Case, rows: int) -> Slots:
    """All that is kept for so many rows. Made on the device, as the values do not matter."""
    weights = jnp.ones((rows, case.dim), jnp.dtype(case.dtype))
    state = tuple(jnp.ones((rows, *shape), jnp.float32) for shape in case.state_shapes)
    return Slots(weights, state, jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool))


def _bytes(case: Case, problem: Problem, unique: int) -> dict[str, int]:
    """Bytes that each operation of a case must move."""
    row = case.dim * jnp.dtype(case.dtype).itemsize
    kept = row + sum(4 * math.prod(shape) for shape in case.state_shapes) + 4 + 1  # the count, and the flag
    lookups, wide = case.total, 4 * case.dim
    bags = sum(bags.count for bags in problem.bags)
    read = unique * (row + 4) + lookups * 4  # rows and their slots, inverse
    words = unique * wide if case.rounding == "stochastic" else 0
    # Gradients, the order, where they come from, starts and slots; what is kept both ways.
    update = (bags or lookups) * wide + lookups * (4 + 4 * bool(bags)) + unique * (8 + 2 * kept) + words
    return {
        "pool" if bags else "gather": read + (bags or lookups) * wide,
        "update": update,
        "exchange": unique * (4 + 4 * kept),
    }


def _carry(operation: str, case: Case, problem: Problem) -> Any:
    """What a loop carries: buffers that are changed in place, if there are any, and the results of each set."""
    kept = _kept(case, case.slots) if operation in ("update", "exchange") else None
    if operation == "update":
        return kept, (None,) * SETS
    if operation == "exchange":
        return kept, tuple(_kept(case, len(problem.slots)) for _ in range(SETS))
    results = sum(bags.count for bags in problem.bags) or case.total
    return kept, tuple(jnp.zeros((results, case.dim), jnp.float32) for _ in range(SETS))


def _step(operation: str, backend: str, problem: Problem, rules: Callable[[Any], Rule]) -> Callable[[Any, Inputs], Any]:
    """One turn of a loop: the operation by a backend, or as one would write it without this project."""
    if backend == PLAIN:
        return partial(_PLAINLY[operation], problem=problem, rules=rules)
    choice = choice_of(backend, operation)

    def step(kept: Any, given: Inputs) -> Any:
        if operation == "gather":
            return kept, kernels.gather(given.table, given.slots, given.inverse, given.accept, choice=choice)
        if operation == "pool":
            bags = problem.bags
            return kept, kernels.pool(given.table, given.slots, given.inverse, bags, None, given.accept, choice=choice)
        if operation == "update":
            rule = rules(given.words)
            return kernels.update(kept, given.slots, given.gradients, rule, given.accept, choice=choice), None
        return kernels.exchange(kept, given.slots, given.incoming, given.accept, choice=choice)

    return step


def _plain_gather(kept, given, problem, rules):
    return kept, given.table[given.slots[given.inverse]].astype(jnp.float32)


def _plain_pool(kept, given, problem, rules):
    (_, rows), start, sums = _plain_gather(kept, given, problem, rules), 0, []
    for bags in problem.bags:
        sums.append(rows[start : start + bags.lookups].reshape(bags.count, bags.size, -1).sum(axis=1))
        start += bags.lookups
    return kept, jnp.concatenate(sums)


def _plain_update(kept, given, problem, rules):
    slots, gradients = given.slots, given.gradients
    rows = gradients.rows if gradients.sources is None else gradients.rows[gradients.sources]
    summed = jax.ops.segment_sum(rows, gradients.inverse, len(slots))
    state = tuple(leaf[slots] for leaf in kept.state)
    weights, state = rules(given.words).apply(summed, kept.weights[slots], state)
    updated = Slots(
        kept.weights.at[slots].set(weights, mode="drop"),
        tuple(leaf.at[slots].set(new, mode="drop") for leaf, new in zip(kept.state, state, strict=True)),
        kept.counts.at[slots].add(jnp.diff(gradients.starts), mode="drop"),
        kept.dirty.at[slots].set(True, mode="drop"),
    )
    return updated, None


def _plain_exchange(kept, given, problem, rules):
    out = jax.tree.map(lambda leaf: leaf[given.slots], kept)
    return jax.tree.map(lambda leaf, new: leaf.at[given.slots].set(new, mode="drop"), kept, given.incoming), out


_PLAINLY = {"gather": _plain_gather, "pool": _plain_pool, "update": _plain_update, "exchange": _plain_exchange}


def _loop(step: Callable[[Any, Inputs], Any], turns: int) -> Any:
    """A program that takes the sets in turn. A program of one operation would cost as much to start as to run."""

    def program(carry: Any, sets: list[Inputs]) -> Any:
        def body(_: Any, carry: Any) -> Any:
            # All results leave the loop, and inputs seem to come out of the step before: otherwise XLA drops steps
            # whose result is overwritten, or moves work out of the loop. (A barrier alone does not keep results.)
            kept, results = carry[0], list(carry[1])
            for number, given in enumerate(sets):
                kept, results, given = jax.lax.optimization_barrier((kept, results, given))
                kept, results[number] = step(kept, given)
            return kept, tuple(results)

        return jax.lax.fori_loop(0, turns, body, carry)

    return jax.jit(program, donate_argnums=0)


def _compiled(
    run: Run, case: Case, problem: Problem, carries: dict[str, Callable], sets: list[Inputs]
) -> dict[str, list[Timed]]:
    """By operation the contenders whose programs could be made. All programs of a case are compiled side by side."""
    rules, turns = rules_of(case), 2 if run.tiny else TURNS
    usable = [name for name in run.backends if kernels.obstacle(name, jax.devices()[0]) is None]

    def attempt(operation: str, name: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except NotImplementedError as error:
            print(f"  {case.name}, {operation}: {name} refused: {error}")
            run.record(case=case.name, operation=operation, backend=name, refused=str(error))
        except Exception as error:
            run.fail(f"{case.name}, {operation}: {name}: {type(error).__name__}: {error}")

    def lower(operation: str, name: str) -> Any:
        shapes = jax.eval_shape(lambda: (carries[operation](), sets))
        return _loop(_step(operation, name, problem, rules), turns).lower(*shapes)

    found: dict[str, list[Timed]] = {operation: [] for operation in carries}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiling = {}
        for operation in carries:
            for name in (PLAIN, *usable):
                lowered = attempt(operation, name, partial(lower, operation, name))
                if lowered is not None:
                    compiling[operation, name] = pool.submit(lowered.compile)
        for (operation, name), program in compiling.items():
            compiled = attempt(operation, name, program.result)
            if compiled is not None:
                found[operation].append(Timed(name, compiled))
    return found


def _time(run: Run, timed: list[Timed], carry: Callable, sets: list[Inputs]) -> None:
    """Times the contenders in turn; one that fails is out."""
    broken: set[str] = set()
    state = None
    for number in range(-1, 2 if run.tiny else ROUNDS):  # the first round warms up
        for one in timed:
            if one.name in broken or (number > 0 and run.left() < 5):
                continue
            if state is None:
                state = jax.block_until_ready(carry())
            try:
                start = time.perf_counter()
                state = jax.block_until_ready(one.program(state, sets))
                spent = time.perf_counter() - start
            except Exception as error:
                run.fail(f"{one.name}: {type(error).__name__}: {error}")
                broken.add(one.name)
                state = None
                continue
            if number >= 0:
                one.times.append(spent / (2 if run.tiny else TURNS) / len(sets))


def _print_speeds(run: Run, won: dict[str, dict[str, list[float]]]) -> None:
    """The entry of `kernels.SPEEDS`: backends by the geometric mean of their times over that of the fastest."""
    means: dict[str, dict[str, float]] = {}
    for operation, backends in won.items():
        for name, ratios in backends.items():
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            of = "gather" if operation == "pool" else operation
            # A gather and the pooling of bags have one order for both: the cases of both count alike.
            before = means.setdefault(of, {}).get(name)
            means[of][name] = mean if before is None else math.sqrt(before * mean)
    entry = {jax.devices()[0].device_kind: {of: tuple(sorted(found, key=found.get)) for of, found in means.items()}}
    print("\nTime over that of the fastest, geometric mean over the cases: " + pprint.pformat(means, width=120))
    print(f"For SPEEDS in kernels/__init__.py: {pprint.pformat(entry, width=120, sort_dicts=False)}")
    run.record(speeds=entry, means=means)
