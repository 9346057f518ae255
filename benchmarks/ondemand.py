"""The cache inside `jit`: what `admit` and its callback cost, whether `prefetch` hides the host's work; and what many
look-ahead steps in a dispatch save.

    python benchmarks/ondemand.py                       # on a CPU about four minutes

`step`: whole train steps of a table of 33.8 million rows with 65,536 lookups each: on demand, one `scan` a round,
beside the `LookAhead` loop with as many slots on the same batches; and `admit` and `lookup` without the rest.
`dispatch`: a small step, 1 to 1,000 of them in a `scan`, beside the same step with every row on the device and no
callback, so that the difference is what the callback and the searches cost. `overlap`: a store that takes a time d for
each fetch and a step that computes for about as long; time a step with and without `prefetch`, over the longer of the
two. `blocks`: a small model in the `LookAhead` loop and in blocks of steps, which `LookAhead.scan` runs in one program.

Rounds of all contenders take turns in one process; figures are medians with quartiles.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcache as jc

OPTIMIZER, ADAM = jc.rowwise_adagrad(0.05), optax.adam(0.01)
ROWS, DIM = 33_800_000, 32
SECTIONS = ("step", "dispatch", "overlap", "blocks")


def quartiles(times: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile, in milliseconds."""
    if len(times) < 2:
        return (1e3 * times[0],) * 3
    first, median, third = statistics.quantiles(times, n=4, method="inclusive")
    return 1e3 * first, 1e3 * median, 1e3 * third


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def show(name: str, times: Sequence[float], note: str = "") -> dict[str, Any]:
    first, median, third = quartiles(times)
    print(f"  {name:<44} {median:9.3f} ms  ({first:.3f} - {third:.3f})  {note}".rstrip(), flush=True)
    return {"name": name, "median_ms": median, "quartiles_ms": [first, third], "note": note}


def skewed_ids(random: np.random.Generator, rows: int, shape: tuple[int, ...]) -> np.ndarray:
    """Ids whose frequencies follow a power law, `int32`."""
    return (rows ** random.random(shape)).astype(np.int64).clip(0, rows - 1).astype(np.int32)


def train_step(cache: jc.CacheState, plan: jc.Plan, weights: jax.Array) -> tuple[jc.CacheState, jax.Array, jax.Array]:
    """A linear model on the rows."""

    def loss(weights, rows):
        return jnp.mean((rows["item"] @ weights - 1.0) ** 2)

    value, (gradient, row_gradients) = jax.value_and_grad(loss, argnums=(0, 1))(weights, jc.lookup(cache, plan))
    return jc.update(cache, plan, row_gradients), weights - 0.1 * gradient, value


def steps(lookups: int, slots: int, rows: int, number: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Train steps on demand and ahead, `number` a round."""
    random = np.random.default_rng(0)
    table = {"item": jc.Table(rows, DIM)}
    print(f"steps of {lookups:,} lookups, {rows:,} rows, {slots:,} slots, {number} steps a round")
    contenders: dict[str, Callable[[np.ndarray], Any]] = {}
    for name, policy in {"lru": jc.lru(), "lfu": jc.lfu()}.items():
        store = jc.HostStore(table, OPTIMIZER)
        contenders[f"on demand, {name}"] = on_demand_steps(store, jc.init(store, slots, policy), train=True)
    store = jc.HostStore(table, OPTIMIZER)
    contenders["admit and lookup alone, lru"] = on_demand_steps(store, jc.init(store, slots), train=False)

    times: dict[str, list[float]] = {name: [] for name in [*contenders, "look-ahead loop"]}
    fetched: list[float] = []
    rounds_of_ids = [skewed_ids(random, rows, (number, lookups)) for _ in range(rounds + 2)]
    ahead_batches = ({"item": ids} for round_ids in rounds_of_ids for ids in round_ids)
    weights = jnp.zeros(DIM)
    step = jax.jit(train_step, donate_argnums=0)
    with jc.LookAhead(jc.HostStore(table, OPTIMIZER), ahead_batches, lambda batch: batch, slots=slots) as ahead:
        cache = ahead.start()
        loop = iter(ahead)
        for turn, ids in enumerate(rounds_of_ids):
            for name, run in contenders.items():
                spent = timed(lambda run=run, ids=ids: run(ids)) / number
                if turn >= 2:  # the first ones compile, and fill the slots
                    times[name].append(spent)
            before, start = ahead.report().rows_fetched, time.perf_counter()
            for _ in range(number):
                _, plan = next(loop)
                cache, weights, value = step(ahead.exchange(cache, plan), plan, weights)
            value.block_until_ready()
            if turn >= 2:
                times["look-ahead loop"].append((time.perf_counter() - start) / number)
                fetched.append((ahead.report().rows_fetched - before) / number)
    for name, spent in times.items():
        note = f"{statistics.median(fetched):,.0f} rows fetched a step" if name == "look-ahead loop" else ""
        yield {"section": "step", "lookups": lookups, "slots": slots, **show(name, spent, note)}


def on_demand_steps(store: jc.HostStore, cache: jc.CacheState, train: bool) -> Callable[[np.ndarray], Any]:
    """Runs a `scan` of steps on ids `int32[steps, lookups]`, from where it stopped last."""

    @partial(jax.jit, donate_argnums=0)
    def run(cache, weights, ids):
        def body(carry, ids):
            cache, weights = carry
            cache, plan = jc.admit(cache, store, {"item": ids})
            if not train:
                value = jnp.sum(jc.lookup(cache, plan)["item"])
                return (jc.release(cache), weights), value
            cache, weights, value = train_step(cache, plan, weights)
            return (cache, weights), value

        (cache, weights), values = jax.lax.scan(body, (cache, weights), ids)
        return cache, weights, values

    state: list[Any] = [cache, jnp.zeros(DIM)]

    def next_round(ids: np.ndarray) -> jax.Array:
        *state[:], values = run(*state, ids)
        store.raise_failure()
        return values

    return next_round


def dispatches(lookups: int, slots: int, rows: int, rounds: int, most: int) -> Iterator[dict[str, Any]]:
    """A small step, few and many in a program."""
    random = np.random.default_rng(0)
    print(f"steps of {lookups:,} lookups, {rows:,} rows of which {slots:,} are cached, by steps in a dispatch")
    for number in (1, 10, 100, 1000):
        if number > most:
            continue
        store = jc.HostStore({"item": jc.Table(rows, DIM)}, OPTIMIZER)
        on_demand = on_demand_steps(store, jc.init(store, slots), train=True)

        @jax.jit
        def plain(table, weights, ids):
            def body(carry, ids):
                table, weights = carry
                loss = lambda weights, read: jnp.mean((read @ weights - 1.0) ** 2)  # noqa: E731
                value, (gradient, of_rows) = jax.value_and_grad(loss, argnums=(0, 1))(weights, table[ids])
                return (table.at[ids].add(-0.05 * of_rows), weights - 0.1 * gradient), value

            return jax.lax.scan(body, (table, weights), ids % slots)[1]

        plain = partial(plain, jnp.zeros((slots, DIM)), jnp.zeros(DIM))
        times: dict[str, list[float]] = {"on demand": [], "no cache, no callback": []}
        calls = max(1, 200 // number)
        for turn in range(rounds + 2):
            ids = skewed_ids(random, rows, (calls, number, lookups))
            for name, call in {
                "on demand": on_demand,
                "no cache, no callback": plain,
            }.items():
                start = time.perf_counter()
                for part in ids:
                    jax.block_until_ready(call(part))
                if turn >= 2:
                    times[name].append((time.perf_counter() - start) / (calls * number))
        for name, spent in times.items():
            yield {"section": "dispatch", "steps": number, **show(f"{name}, {number:,} a dispatch", spent)}


class SlowStore(jc.RowStore):
    """Waits before each read."""

    delay = 0.0

    def read(self, keys: np.ndarray, size: int | None = None) -> Any:
        if len(keys):
            time.sleep(self.delay)
        return super().read(keys, size)


def overlap(delays: Sequence[float], rounds: int, number: int) -> Iterator[dict[str, Any]]:
    """Steps that compute for about as long as the host takes to fetch, one `scan` of `number` steps a round."""
    matrix = jnp.eye(256) * 0.999
    rows, lookups, slots = 1_000_000, 1024, 4096
    random = np.random.default_rng(0)

    def compute(start, times):
        return jax.lax.fori_loop(0, times, lambda _, x: x @ matrix, start)

    lone = jax.jit(compute)
    block = jnp.ones((256, 256))
    timed(lambda: lone(block, 10))
    each = statistics.median(timed(lambda: lone(block, 200)) for _ in range(5)) / 200
    for delay in delays:
        work = max(1, round(delay / each))
        runs: dict[str, Callable[[np.ndarray], Any]] = {}
        for name in ("prefetch", "no prefetch"):
            store = jc.HostStore({"item": jc.Table(rows, 16)}, OPTIMIZER)
            for group in store.groups:
                group.__class__, group.delay = SlowStore, delay
            runs[name] = _overlapped(store, jc.init(store, slots), compute, work, name == "prefetch")
        times: dict[str, list[float]] = {"prefetch": [], "no prefetch": [], "compute alone": []}
        for turn in range(rounds + 1):
            ids = random.permutation(rows)[: (number + 1) * lookups].reshape(number + 1, lookups).astype(np.int32)
            spent = {name: timed(lambda run=run, ids=ids: run(ids)) / number for name, run in runs.items()}
            spent["compute alone"] = timed(lambda work=work: lone(block, work))
            if turn:
                for name, value in spent.items():
                    times[name].append(value)
        longer = max(delay, statistics.median(times["compute alone"]))
        print(f"overlap: {1e3 * delay:.0f} ms for a fetch, {number} steps in a scan")
        for name, values in times.items():
            note = "" if name == "compute alone" else f"{statistics.median(values) / longer:.2f} x the longer of both"
            yield {"section": "overlap", "delay": delay, **show(name, values, note)}


def _overlapped(
    store: jc.HostStore, cache: jc.CacheState, compute: Callable[..., Any], work: int, ahead: bool
) -> Callable[[np.ndarray], Any]:
    @partial(jax.jit, donate_argnums=0)
    def run(cache, block, ids):
        def body(carry, ids):
            cache, block = carry
            cache, plan = jc.admit(cache, store, {"item": ids[0]})
            if ahead:
                cache = jc.prefetch(cache, store, {"item": ids[1]})
            read = jc.lookup(cache, plan)
            # The step computes with the rows, and their update with what it computed.
            block = compute(block.at[0, 0].set(jnp.mean(read["item"])), work)
            cache = jc.update(cache, plan, {"item": read["item"] * block[0, 0]})
            return (cache, block), block[0, 0]

        return jax.lax.scan(body, (cache, block), jnp.stack([ids[:-1], ids[1:]], axis=1))

    state: list[Any] = [cache]

    def next_round(ids: np.ndarray) -> jax.Array:
        (state[0], _), values = run(state[0], jnp.ones((256, 256)), ids)
        store.raise_failure()
        return values

    return next_round


def small_step(cache: jc.CacheState, plan: jc.Plan, train: Any, batch: Any) -> tuple[jc.CacheState, Any, jax.Array]:
    """A hidden layer over users and items, trained by adam."""
    parameters, state = train

    def loss(parameters, rows):
        hidden = jax.nn.relu(jnp.concatenate([rows["user"], rows["item"]], axis=1) @ parameters["hidden"])
        logits = hidden @ parameters["out"]
        return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, batch["label"]), where=plan.mask)

    value, (gradient, of_rows) = jax.value_and_grad(loss, argnums=(0, 1))(parameters, jc.lookup(cache, plan))
    updates, state = ADAM.update(gradient, state)
    return jc.update(cache, plan, of_rows), (optax.apply_updates(parameters, updates), state), value


def blocks(samples: int, rows: int, warm: int, number: int, rounds: int) -> Iterator[dict[str, Any]]:
    """The same training one by one (0) and in blocks, `number` steps after the first `warm`."""
    print(f"look-ahead steps of {samples} samples, two tables of {rows:,} rows, by steps in a dispatch")
    step = jax.jit(small_step, donate_argnums=(0, 2))
    lengths = [length for length in (0, 1, 10, 100) if length <= number]

    def loader():
        random = np.random.default_rng(0)
        for _ in range(warm + number):
            user, item = (rows * random.random((2, samples)) ** 3).astype(np.int64)
            yield {"user": user, "item": item, "label": (random.random(samples) < 0.5).astype(np.float32)}

    def train(slots: str, length: int) -> tuple[float, jc.Report]:
        keys = jax.random.split(jax.random.key(0))
        parameters = {
            "hidden": 0.1 * jax.random.normal(keys[0], (32, 32)),
            "out": 0.1 * jax.random.normal(keys[1], (32,)),
        }
        state = parameters, ADAM.init(parameters)
        store = jc.HostStore({"user": jc.Table(rows, 16), "item": jc.Table(rows, 16)}, jc.rowwise_adagrad(0.1))
        with jc.LookAhead(
            store, loader(), lambda batch: {name: batch[name] for name in ("user", "item")}, slots=slots
        ) as ahead:
            cache, done, began = ahead.start(), 0, (0, 0.0)
            for batch, plan in ahead.blocks(length) if length else ahead:
                if done >= warm and not began[0]:
                    jax.block_until_ready(state)
                    began = done, time.perf_counter()
                if length:
                    cache, state, _ = ahead.scan(small_step, cache, plan, state, batch)
                    done += len(plan.step)
                else:
                    cache, state, _ = step(ahead.exchange(cache, plan), plan, state, batch)
                    done += 1
            jax.block_until_ready(state)
            spent = time.perf_counter() - began[1]
            ahead.flush(cache)
        return spent / (done - began[0]), ahead.report()

    for slots in ("100%", "40%", "10%")[: 3 if number >= 100 else 1]:
        times: dict[int, list[float]] = {length: [] for length in lengths}
        for turn in range(rounds + 1):
            for length, found in times.items():
                spent, report = train(slots, length)
                if turn:  # the first one compiles
                    found.append(spent)
        note = f"{slots} of the rows in slots, {report.rows_fetched / report.steps:.0f} rows fetched a step"
        for length, found in times.items():
            yield {"section": "blocks", **show(f"blocks({length})" if length else "loop", found, note)}


def measure(tiny: bool, sections: Collection[str]) -> Iterator[dict[str, Any]]:
    """The sections asked for, at full size or just to see that they run."""
    if "step" in sections:
        yield from steps(256, 1024, 10_000, 2, 2) if tiny else steps(65_536, 2**18, ROWS, 10, 12)
    if "dispatch" in sections:
        yield from dispatches(16, 256, 1000, 2, 10) if tiny else dispatches(256, 65_536, 1_000_000, 9, 1000)
    if "overlap" in sections:
        yield from overlap([0.002], 1, 2) if tiny else overlap([0.1, 0.03], 7, 10)
    if "blocks" in sections:
        yield from blocks(8, 200, 2, 10, 1) if tiny else blocks(64, 20_000, 200, 1000, 7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that it runs")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    sections = arguments.sections.split(",")
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"unknown sections {sorted(unknown)}")
    print(f"JAX {jax.__version__} on {jax.devices()[0].device_kind}, Python {platform.python_version()}")
    records = list(measure(arguments.tiny, sections))
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
