"""The device, and whether it computes what it should."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcache as jc
from embedding import environment
from jaxcache import kernels
from jaxcache.kernels.cases import CASES, Case, Problem
from on_gpu import DETERMINISTIC, TWINS
from on_gpu.run import Run, on_cpu, print_table


def device(run: Run) -> None:
    """What is measured where, and what XLA was told."""
    found = jax.devices()[0]
    memory = found.memory_stats() or {}
    record = environment() | {
        "platform": found.platform,
        "compute_capability": getattr(found, "compute_capability", None),
        "memory_bytes": memory.get("bytes_limit"),
        "memories": sorted(kind.kind for kind in found.addressable_memories()),
        "obstacles": {backend: kernels.obstacle(backend, found) for backend in kernels.BACKENDS},
    }
    packages = ("jax-cuda13-plugin", "jax-cuda12-plugin", "triton", "jax-triton", "torch")
    for package in packages:
        try:
            record[package] = version(package)
        except PackageNotFoundError:
            record[package] = None
    names = ("XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION", kernels.ENVIRONMENT, "JAX_PLATFORMS")
    record["variables"] = {name: os.environ.get(name) for name in names}
    if on_cpu():
        print("THIS IS A CPU: what follows tries the program, and its figures say nothing about a GPU.")
    for name, value in record.items():
        print(f"{name:22}{value}")
    print(
        "Twins that are to have equal bits need no flag with kernels of this project, which sum in a fixed order, and "
        f"{DETERMINISTIC} with backends='xla', whose scatters do not."
    )
    run.record(**record)


# Every operation against its definition

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {  # with the coefficients of kernels.cases
    "sgd": lambda: optax.sgd(0.05),
    "momentum": lambda: optax.sgd(0.05, 0.9),
    "adagrad": lambda: optax.adagrad(0.05, eps=1e-7),
    "rowwise_adagrad": lambda: jc.rowwise_adagrad(0.05, 1e-7),
    "adam": lambda: optax.adam(0.05, eps=1e-7),
}
YES = np.array(True)
_LOWERING = threading.Lock()  # programs are made one at a time, and compiled side by side

# Bounds, as a share of the larger of the value before and after, and for float32 absolute as well.
NEAR = 4e-6  # another order of the same arithmetic on equal sums: contracted products, roots and quotients
FAR = 1e-2  # sums in another order, of terms that differ by powers of ten
NARROW = {"float32": 0.0, "bfloat16": 2.0**-7, "float16": 2.0**-10}  # the distance of two neighbours


def rules_of(case: Case) -> Callable[[Any], kernels.Rule]:
    """The row optimizer of a case, at its third update: a rule from random words, or from None.

    Not inside `jit`, what it returns may be: optimizers are found out about by running them.
    """
    rounding = "stochastic" if case.rounding == "stochastic" else "nearest"
    optimizer = jc.RowOptimizer(
        OPTIMIZERS[case.optimizer](), case.dim, jnp.dtype(case.dtype), rounding, case.rounding == "master"
    )
    scalars = tuple(np.full_like(scalar, 2) for scalar in optimizer.scalars)
    return partial(optimizer.rule, scalars, optimizer.hyperparameters)


def choice_of(backend: str, operation: str) -> kernels.Choice:
    """One that tries the backend alone. Raises NotImplementedError where it does not run, or has no such operation."""
    of = {"pool": "gather", "sum_occurrences": "update"}.get(operation, operation)
    try:
        return kernels.choose({of: backend})
    except ValueError as error:
        raise NotImplementedError(str(error)) from error


def correctness(run: Run) -> None:
    """One backend on the device against the XLA backend on the CPU."""
    backend = run.variant
    cases = [case for case in CASES if not case.measured]
    # Every rule where one row has most of the lookups, and in 16 bits.
    for case in [c for c in cases if c.name in ("one row has 82 %", "dim 100, bfloat16, stochastic, adam")]:
        cases += [
            dataclasses.replace(case, name=f"{case.name}; {rule}", optimizer=rule)
            for rule in OPTIMIZERS
            if rule != case.optimizer
        ]
    if run.tiny:
        cases = cases[10:23:12]
    print(
        f"{backend}: {len(cases)} cases. Sums and copies must be equal to the bit"
        + (", here only to rounding (no flag that orders scatters is set)" if not _is_ordered(backend) else "")
        + f"; bags of one size, which a backend may add in another order, to {NEAR} of the sum of their terms' sizes; "
        f"optimizers to {NEAR if _is_ordered(backend) else FAR} of the larger of old and new value, with 16 bits to a "
        "neighbouring number."
    )
    found: dict[str, list[str]] = {}
    with ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 1))) as pool:
        checks = [pool.submit(_check_case, case, backend, run) for case in cases]
        for case, check in zip(cases, checks, strict=True):
            for operation, what in check.result().items():
                found.setdefault(operation, []).append(what.split(":")[0])
                if what.startswith("wrong"):
                    run.fail(f"{backend}, {case.name}, {operation}: {what}")
                elif what.startswith("refused"):
                    print(f"  {case.name}, {operation}: {what}", flush=True)
                run.record(backend=backend, case=case.name, operation=operation, found=what)
    kinds = ("bits", "bound", "refused", "wrong", "not tried")
    rows = [[operation, *(str(whats.count(kind)) for kind in kinds)] for operation, whats in found.items()]
    print_table(["operation", "equal to the bit", "within the bound", "refused", "wrong", "not tried"], rows)
    if any("not tried" in whats for whats in found.values()):
        run.skip(f"cases of {backend} for which there was no time")


def _is_ordered(backend: str) -> bool:
    """Whether sums have one order on the device."""
    return backend != "xla" or on_cpu() or DETERMINISTIC in os.environ.get("XLA_FLAGS", "")


def _check_case(case: Case, backend: str, run: Run) -> dict[str, str]:
    """What is found of each operation."""
    lookup = "pool" if case.bags else "gather"
    operations = (lookup, "sum_occurrences", "update", "exchange")
    if run.left() < 3:
        return dict.fromkeys(operations, "not tried")
    problem = Problem(case)
    rule = rules_of(case)(problem.words)
    arguments = (problem.kept, problem.slots, problem.inverse, problem.weights, problem.gradients, problem.incoming)
    xla, found = partial(_operation, problem=problem, rule=rule, choice=kernels.XLA), {}
    sizes = None
    device, cpu = jax.devices()[0], jax.local_devices(backend="cpu")[0]
    for operation in operations:
        try:
            choice, given = choice_of(backend, operation), jax.device_put((*arguments, YES), device)
            call = jax.jit(partial(_operation, operation, problem=problem, rule=rule, choice=choice))
            with _LOWERING:
                program = call.lower(*given)
            result = jax.tree.map(np.asarray, program.compile()(*given))
        except NotImplementedError as error:
            found[operation] = f"refused: {error}"
            continue
        except Exception as error:
            found[operation] = f"wrong: {type(error).__name__}: {error}"
            continue
        expected = jax.tree.map(np.asarray, jax.jit(partial(xla, operation))(*jax.device_put((*arguments, YES), cpu)))
        if operation in ("pool", "sum_occurrences"):
            sizes = jax.jit(partial(xla, operation))(*jax.device_put((*jax.tree.map(_size, arguments), YES), cpu))
        found[operation] = _compare(operation, case, problem, backend, result, expected, sizes)
    return found


def _size(leaf: np.ndarray) -> np.ndarray:
    return leaf if leaf.dtype in (np.int32, bool) else np.abs(leaf)


def _operation(operation, kept, slots, inverse, weights, gradients, incoming, accept, *, problem, rule, choice):
    if operation == "gather":
        return kernels.gather(kept.weights, slots, inverse, accept, choice=choice)
    if operation == "pool":
        bags = [
            dataclasses.replace(one, owners=jnp.asarray(one.owners), offsets=jnp.asarray(one.offsets))
            if one.owners is not None
            else one
            for one in problem.bags
        ]
        return kernels.pool(kept.weights, slots, inverse, bags, weights, accept, choice=choice)
    if operation == "sum_occurrences":
        return kernels.sum_occurrences(gradients, choice=choice)
    if operation == "update":
        return kernels.update(kept, slots, gradients, rule, accept, choice=choice)
    return kernels.exchange(kept, slots, incoming, accept, choice=choice)


def _compare(operation, case, problem, backend, result, expected, sizes) -> str:
    """ "bits", "bound" and how near, or "wrong" and what."""
    leaves, others = jax.tree.leaves(result), jax.tree.leaves(expected)
    if all(_same_bits(leaf, other) for leaf, other in zip(leaves, others, strict=True)):
        return "bits"
    ordered = _is_ordered(backend)
    if operation in ("gather", "exchange"):
        return "wrong: a copy has other bits"
    if operation in ("pool", "sum_occurrences"):
        off = _largest(np.abs(result - expected), np.asarray(sizes) * NEAR)
        equal_bags = operation == "pool" and all(bags.owners is None for bags in problem.bags)
        if ordered and not equal_bags:
            return f"wrong: a sum has other bits, off by {off:.2g} of the bound for another order"
        return f"bound: {off:.2g} of it" if off <= 1 else f"wrong: off by {off:.2g} of the bound"
    if not _same_bits(result.counts, expected.counts) or not _same_bits(result.dirty, expected.dirty):
        return "wrong: counts or dirty"
    near, worst = NEAR if ordered else FAR, 0.0
    before = (problem.kept.weights, *problem.kept.state)
    for old, leaf, other in zip(before, (result.weights, *result.state), (expected.weights, *expected.state)):  # noqa: B905
        share = max(near, 1.01 * NARROW[str(leaf.dtype)])
        old, leaf, other = (np.asarray(array, np.float64) for array in (old, leaf, other))
        bound = share * np.maximum(np.abs(old), np.abs(other)) + near / 4
        worst = max(worst, _largest(np.abs(np.where(leaf == other, 0, leaf - other)), bound))
    return f"bound: {worst:.2g} of it" if worst <= 1 else f"wrong: off by {worst:.2g} of the bound"


def _largest(off: np.ndarray, bound: np.ndarray) -> float:
    """The largest quotient; infinity where something is NaN."""
    if not off.size:
        return 0.0
    share = np.where(off == 0, 0, off / np.maximum(bound, 1e-30))
    return float("inf") if np.isnan(share).any() else float(share.max())


def _same_bits(one: Any, other: Any) -> bool:
    one, other = np.ascontiguousarray(one), np.ascontiguousarray(other)
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


# Twins

ROWS = {"user": 3000, "item": 2000, "word": 1500, "brand": 300}
SAMPLES = 64


def _tables(names: Sequence[str]) -> dict[str, jc.Table]:
    every = {
        "user": jc.Table(ROWS["user"], 16, optimizer=optax.adam(0.01)),
        "item": jc.Table(
            ROWS["item"], 24, dtype=jnp.bfloat16, rounding="stochastic", optimizer=jc.rowwise_adagrad(0.05)
        ),
        "word": jc.Table(ROWS["word"], 8, dtype=jnp.float16, master_copy=True, optimizer=optax.adam(0.01)),
        "brand": jc.Table(ROWS["brand"], 16, optimizer=jc.rowwise_adagrad(0.05)),
    }
    return {name: every[name] for name in names}


FEATURES = {
    "user": jc.Feature("user"),
    "words": jc.Feature("word", "sum"),
    "title": jc.Feature("word"),
    "items": jc.Feature("item", "mean", padding=-1),
    "query": jc.Feature("word", "mean"),
    "brand": jc.Feature("brand", "mean"),
}


def _twin_batches(features: Sequence[str], steps: int) -> list[dict[str, Any]]:
    """Some rows popular, ragged bags, weights, padding, and a short batch at the end."""
    random = np.random.default_rng(zlib.crc32(b"twins"))

    def ids(table, shape):
        popular, others = random.zipf(1.3, shape), random.integers(0, 2**31, shape)
        return np.where(random.random(shape) < 0.5, popular, others) % ROWS[table]

    def ragged(table, samples):
        offsets = np.concatenate([[0], np.cumsum(random.integers(0, 90, samples))])
        return jc.Bags(ids(table, offsets[-1]), offsets, random.uniform(0.5, 2, offsets[-1]).astype(np.float32))

    batches = []
    for step in range(steps):
        samples = SAMPLES if step < steps - 1 else 11
        items = ids("item", (samples, 5))
        items[random.random(items.shape) < 0.2] = -1
        found = {"user": ids("user", samples), "items": items, "title": ids("word", samples)}
        found |= {"words": ragged("word", samples), "query": ragged("word", samples)}
        found["brand"] = ids("brand", (samples, 70))
        label = random.normal(size=samples).astype(np.float32)
        batches.append({"ids": {name: found[name] for name in features}, "label": label})
    return batches


def _train_twin(
    features: dict[str, jc.Feature], batches: list[dict[str, Any]], slots: Any, backends: str | None
) -> tuple[list[Any], jc.Report]:
    """Losses, and every row with its state after the last flush."""
    store = jc.HostStore(_tables(sorted({feature.table for feature in features.values()})), seed=1)
    width = sum(store.tables[feature.table].dim for feature in features.values())
    dense = jnp.asarray(np.random.default_rng(2).normal(size=(width, 32)).astype(np.float32) / 8)

    def loss_of(dense, rows, label, mask):
        hidden = jnp.tanh(jnp.concatenate([rows[name] for name in features], axis=1) @ dense)
        return jnp.sum(jnp.where(mask, (hidden.sum(axis=1) - label) ** 2, 0)) / mask.sum()

    @partial(jax.jit, donate_argnums=(0, 2))
    def step(cache, plan, dense, label):
        rows = jc.lookup(cache, plan)
        loss, (gradient, row_gradients) = jax.value_and_grad(loss_of, (0, 1))(dense, rows, label, plan.mask)
        return jc.update(cache, plan, row_gradients), dense - 0.01 * gradient, loss

    losses = []
    with jc.LookAhead(
        store, batches, lambda batch: batch["ids"], slots, window=3, features=features, backends=backends
    ) as ahead:
        cache = ahead.start()
        for batch, plan in ahead:
            cache = ahead.exchange(cache, plan)
            cache, dense, loss = step(cache, plan, dense, batch["label"])
            losses.append(loss)
        cache = ahead.flush(cache)
    jc.check(cache, store)
    rows = []
    for name, table in store.tables.items():
        every = np.arange(table.rows)
        rows += [store.rows(name, every), *store.row_state(name, every)]
    return [np.asarray(losses), np.asarray(dense), *rows], ahead.report()


def twins(run: Run) -> None:
    """The same training with few slots and with all rows on the device, compared bit for bit."""
    backends, flag = TWINS[run.variant]
    steps = 8 if run.tiny else 40
    features = {name: FEATURES[name] for name in (("user", "words", "title") if run.tiny else FEATURES)}
    batches = _twin_batches(tuple(features), steps)
    slots = dict.fromkeys((feature.table for feature in features.values()), 0)
    for batch in batches:
        for table in slots:  # as few as hold the unique rows of any one batch
            ids = [given for name, given in batch["ids"].items() if features[name].table == table]
            keys = np.concatenate([np.ravel(getattr(given, "ids", given)) for given in ids])
            slots[table] = max(slots[table], len(np.unique(keys[keys >= 0])))
    began = time.time()
    few, report = _train_twin(features, batches, slots, backends)
    every, _ = _train_twin(features, batches, "100%", backends)
    different = [place for place, (one, other) in enumerate(zip(few, every, strict=True)) if not _same_bits(one, other)]
    sums = kernels.choose(backends)
    if not report.rows_written_back or not np.isfinite(few[0]).all():
        run.fail(f"twins ({run.variant}) show nothing: no row was evicted, or a loss is not finite")
    what = "equal to the bit" if not different else f"{len(different)} of {len(few)} arrays differ"
    if different and 0 in different:
        what += f", losses from step {int(np.flatnonzero(few[0] != every[0])[0])} on"
    promised = _promises_bits(sums, flag)
    print(
        f"{run.variant}: backends {tuple(sums)}, XLA_FLAGS {os.environ.get('XLA_FLAGS', '')!r}; {steps} steps, "
        f"{len(slots)} tables, slots {sum(slots.values()):,} of {sum(ROWS[name] for name in slots):,} rows, "
        f"{report.rows_written_back:,} rows evicted: {what} ({'promised' if promised else 'not promised'}), "
        f"{time.time() - began:.0f} s"
    )
    if different and promised:
        run.fail(f"twins ({run.variant}): {what}")
    run.record(variant=run.variant, choice=sums._asdict(), flag=flag, promised=promised, equal=not different, what=what)


def _promises_bits(choice: kernels.Choice, flag: str) -> bool:
    """Whether sums have one order: by the flag, on a CPU, or because a kernel of this project makes them."""
    return bool(flag) or on_cpu() or "xla" not in (choice.gather[0], choice.update[0])
