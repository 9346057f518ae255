"""Whole train steps through the cache against every row on the device; transfers, and planning, alone."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcache as jc
import ondemand
from jaxcache.planner import LookAheadPlanner, Workers
from on_gpu.run import Run, on_cpu, print_table, spread
from on_gpu.training import (
    DRAWN_AHEAD,
    RUN_IN,
    Cached,
    Contender,
    OnDevice,
    Workload,
    bound_of,
    first_steps,
    make_unique,
)

GOAL = 0.95  # of the samples a second of the table on the device
SHARES = (1.5, 5.0)  # slots, per cent of the rows
OPTIMIZER = jc.rowwise_adagrad(0.05)
ON_DEVICE = "all on the device"
ROUNDS = 4
PROFILED = 10  # steps
CHECKED = 6  # steps whose losses are compared

# Criteo Kaggle has 33.8 million rows in 26 tables; the other is the workload of benchmarks/embedding.py.
WORKLOADS = (
    (Workload("click log", 26, 1_300_000, 64, 8192, 1, 1.05), "dlrm", 600),
    (Workload("peers", 8, 1_000_000, 32, 2048, 4, 1.05), "embedding", 800),
)
TINY = ((Workload("tiny", 3, 3000, 8, 16, 2, 1.05), "embedding", 100),)


def pipeline(run: Run) -> None:
    """All that the module is about."""
    workloads = TINY if run.tiny else WORKLOADS
    _check_unique(run, workloads[0][0])
    transfers(run)
    planning(run, workloads[0][0])
    for number, (workload, model, steps) in enumerate(workloads):
        seconds = (run.left() - 5) / (len(workloads) - number)
        if seconds < (12 if not run.tiny else 1):
            run.skip(f"pipeline: {workload.name}, {model}: no time")
            continue
        try:
            _compare(run, workload, model, steps, time.time() + seconds, last=number == len(workloads) - 1)
        except Exception:
            run.fail(f"pipeline: {workload.name}, {model}, broke off\n{traceback.format_exc()}")


def _check_unique(run: Run, workload: Workload) -> None:
    """The deduplication without a planner against JAX's own."""
    keys, bound = workload.draw(0)["all"].reshape(-1) % 1000, 1024
    found = jax.jit(make_unique, static_argnums=(1, 2))(keys, bound, -1)
    unique, inverse, order, starts, number = map(np.asarray, found)
    expected = jnp.unique(keys, size=bound, fill_value=-1, return_inverse=True)
    right = np.array_equal(unique, expected[0]) and np.array_equal(inverse, expected[1].reshape(-1))
    for place, key in enumerate(unique[:number]):
        right &= np.array_equal(order[starts[place] : starts[place + 1]], np.flatnonzero(keys == key))
    if not right:
        run.fail("make_unique differs from jnp.unique")


def _compare(run: Run, workload: Workload, model: str, steps: int, until: float, last: bool) -> None:
    print(f"\n{model} step, {workload}")
    batches = workload.batches(steps)
    bound = bound_of(workload, batches)
    contenders: list[Contender] = []
    try:
        contenders.append(OnDevice(ON_DEVICE, workload, model, OPTIMIZER, batches, bound))
        for share in SHARES if not run.tiny else (20.0, 40.0):
            slots = int(workload.all_rows * share / 100)
            store = workload.store(OPTIMIZER)
            contenders.append(Cached(f"cached {share:g} %", workload, model, store, batches, slots))
        if last:
            # A cache of all rows but one that holds them from the start: the same plans, and nothing to move.
            slots = workload.all_rows - 1
            store = workload.store(OPTIMIZER)
            contenders.append(Cached("cached, no misses", workload, model, store, batches, slots))
        times, reports = _take_turns(run, contenders, steps, until)
        _check_losses(run, contenders)
        _print(run, workload, model, contenders, times, reports)
        if last:
            _overlap(run, workload, contenders, times, reports)
        if run.profile is not None:
            with jax.profiler.trace(str(run.profile / f"{workload.name} {model}".replace(" ", "-"))):
                contenders[1].run(PROFILED)
            print(f"a profiler's trace of {contenders[1].name} is in {run.profile}")
    finally:
        for contender in contenders:
            contender.close()


def _take_turns(run: Run, contenders: Sequence[Contender], steps: int, until: float) -> tuple[Any, Any]:
    """Seconds a step, of each turn; and the pipelines' reports at the first timed step and at the end.

    Threads of a pipeline whose contender waits for its turn stop as soon as their queues are full; the first steps of a
    turn, which find full queues, are not timed.
    """
    first_steps(contenders)
    begun = time.time()
    for contender in contenders:
        contender.run(CHECKED - 1)
    most, taken = steps // 4, {contender.name: CHECKED for contender in contenders}
    turn = {}
    for contender in contenders:  # until rows are evicted as in a long run, and the window is open
        while taken[contender.name] < most and time.time() < begun + 0.5 * (until - begun):
            spent = contender.run(5) / 5
            taken[contender.name] += 5
            turn[contender.name] = spent
            if contender.name == ON_DEVICE and taken[contender.name] > 20:
                break
    # The loader must not end while queues fill.
    room = (steps - max(taken.values()) - PROFILED - (DRAWN_AHEAD if steps > 100 else 0)) // ROUNDS - RUN_IN
    slowest = max(turn.values(), default=0.1)
    number = max(2, min(room, int(0.8 * (until - time.time()) / ROUNDS / len(contenders) / slowest) - RUN_IN, 150))
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    before = {c.name: c.ahead.report() for c in contenders if isinstance(c, Cached)}
    for rounds in range(ROUNDS):
        for contender in contenders[rounds % len(contenders) :] + contenders[: rounds % len(contenders)]:
            if rounds and time.time() > until:
                continue
            time.sleep(0.05)  # the others' queues fill
            contender.run(RUN_IN)
            times[contender.name].append(contender.run(number) / number)
    after = {c.name: c.ahead.report() for c in contenders if isinstance(c, Cached)}
    print(f"{ROUNDS} turns of {number} steps after {min(taken.values())} to {max(taken.values())} warm steps")
    return times, {name: (before[name], after[name]) for name in before}


def _check_losses(run: Run, contenders: Sequence[Contender]) -> None:
    """All start from the same rows and see the same batches; matrix products may differ in the last bits."""
    losses = {c.name: np.array([float(loss) for loss in c.losses[:CHECKED]]) for c in contenders}
    expected = losses.pop(ON_DEVICE)
    off = {name: float(np.max(np.abs(found / expected - 1))) for name, found in losses.items()}
    each = ", ".join(f"{value:.1g}" for value in off.values())
    print(f"losses of {CHECKED} steps differ from those of {ON_DEVICE} by {each}")
    if not all(o < 1e-3 for o in off.values()):
        run.fail(f"losses of cached and {ON_DEVICE} differ: {off}")


def _print(run: Run, workload: Workload, model: str, contenders: Any, times: Any, reports: Any) -> None:
    reference = workload.batch / spread(times[ON_DEVICE])[1]
    rows, lines = [], []
    for contender in contenders:
        name = contender.name
        first, median, third = spread(times[name])
        rate = workload.batch / median
        row = [name, f"{1e3 * median:.2f}", f"{1e3 * first:.2f} - {1e3 * third:.2f}", f"{rate:,.0f}"]
        row.append(f"{rate / reference:.3f}")
        record: dict[str, Any] = {"workload": str(workload), "model": model, "contender": name, "seconds": median}
        record |= {"quartiles": [first, third], "samples_a_second": rate, "ratio": rate / reference}
        if name in reports:
            figures = figures_of(*reports[name])
            record |= figures
            row += [f"{figures['hit_rate']:.1%}", f"{figures['rows_fetched']:,.0f}"]
            row.append(f"below the goal of {GOAL}" if rate < GOAL * reference and "no misses" not in name else "")
            busy = ", ".join(f"{stage} {spent:.2f}" for stage, spent in figures["stage_busy_ms"].items())
            lines.append(f"  {name}: busy ms a step: {busy}; bound by {figures['bound_by']}")
            lines.append(f"  {name}: {figures['evicted_of_slots']:.1f} times its slots were evicted since the start")
        else:
            row += ["", "", ""]
        rows.append(row)
        run.record(**record)
    print_table(["", "ms a step", "quartiles", "samples/s", "ratio", "hit rate", "rows fetched", ""], rows)
    print("\n".join(lines), flush=True)


def figures_of(before: jc.Report, after: jc.Report) -> dict[str, Any]:
    """What happened between two reports, a step; the step's own time has turns of others in it and is left out."""
    steps = after.steps - before.steps
    fetched, unique = after.rows_fetched - before.rows_fetched, after.unique_rows - before.unique_rows
    busy = {
        name: 1e3 * (stage.busy - before.stages[name].busy) / steps
        for name, stage in after.stages.items()
        if name != "step"
    }
    return {
        "hit_rate": 1 - fetched / unique,
        "rows_fetched": fetched / steps,
        "rows_written_back": (after.rows_written_back - before.rows_written_back) / steps,
        "unique_rows": unique / steps,
        "stage_busy_ms": busy,
        "bound_by": max(busy, key=lambda name: busy[name]) if busy else "",
        "longest_window": after.longest_window,
        "evicted_of_slots": after.rows_written_back / after.slots,
        "report": str(after),
    }


def _overlap(run: Run, workload: Workload, contenders: Any, times: Any, reports: Any) -> None:
    """How much of what transfers take by themselves the loop hides."""
    optimizer = jc.RowOptimizer(OPTIMIZER, workload.dim)
    free = spread(times["cached, no misses"])[1]
    for contender in contenders[1:3]:
        figures = figures_of(*reports[contender.name])
        number = max(1, round(figures["rows_fetched"]))
        leaves = [np.ones((number, workload.dim), np.float32)]
        leaves += [np.ones((number, *leaf.shape), leaf.dtype) for leaf in optimizer.row_shapes]
        alone = spread([_there(leaves) + _and_back(leaves) for _ in range(9)])[1]
        with_misses = spread(times[contender.name])[1]
        hidden = 1 - max(0.0, with_misses - free) / alone
        print(
            f"  {contender.name}: {number:,} rows a step take {1e3 * alone:.2f} ms there and back by themselves; the "
            f"loop takes {1e3 * with_misses:.2f} ms with and {1e3 * free:.2f} ms without misses: {max(hidden, 0):.0%} "
            "of the transfers is hidden"
        )
        run.record(overlap=contender.name, transfers=alone, loop=with_misses, loop_without_misses=free, hidden=hidden)


def _there(leaves: Sequence[np.ndarray]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(jax.device_put(leaves))
    return time.perf_counter() - start


def _and_back(leaves: Sequence[np.ndarray]) -> float:
    """To page-locked memory, as victims go, where there is such."""
    arrays = jax.block_until_ready(jax.device_put(leaves))
    start = time.perf_counter()
    host = _pinned()
    for array in jax.device_put(arrays, host) if host is not None else arrays:
        np.asarray(array)
    return time.perf_counter() - start


def _pinned() -> jax.sharding.Sharding | None:
    device = jax.devices()[0]
    if "pinned_host" not in {memory.kind for memory in device.addressable_memories()}:
        return None
    return jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")


def _put(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.device_put(array, sharding)


def transfers(run: Run) -> dict[str, float]:
    """Rates between host and device, and the link's: the fastest that a large copy reaches in this run."""
    device, pinned = jax.devices()[0], _pinned()
    here = jax.sharding.SingleDeviceSharding(device)
    sizes = (1 << 14, 1 << 18) if on_cpu() else (1 << 20, 1 << 23, 1 << 26, 1 << 29)
    ways: dict[str, tuple[str, Callable[[Any], Any], Callable[[np.ndarray], Any]]] = {
        "NumPy to device": ("there", lambda x: jax.device_put(x, here), lambda x: x),
        "device to NumPy": ("back", np.asarray, lambda x: jax.device_put(x, here) + 1),  # a new one: copies are kept
    }
    if pinned is not None:
        to_here, to_pinned = (partial(_put, sharding=sharding) for sharding in (here, pinned))
        ways["page-locked to device"] = ("there", to_here, to_pinned)
        ways["device to page-locked"] = ("back", to_pinned, to_here)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for size in sizes:
        array = np.ones(size // 4, np.float32)
        for name, (_, move, make) in ways.items():
            times = []
            for _ in range(3 if run.tiny else 7):
                given = jax.block_until_ready(make(array))
                start = time.perf_counter()
                jax.block_until_ready(move(given))
                times.append(time.perf_counter() - start)
            rates[name].append(size / spread(times)[1])
    link = {way: max(r[-1] for name, r in rates.items() if ways[name][0] == way) for way in ("there", "back")}
    rows = [
        [name, *(f"{rate / 1e9:.1f} ({rate / link[ways[name][0]]:.0%})" for rate in found)]
        for name, found in rates.items()
    ]
    print("GB/s by size, and the share of the link, the best rate of the largest size in its direction")
    print_table(["", *(f"{size / 2**20:g} MiB" for size in sizes)], rows)
    run.record(transfers=rates, sizes=sizes, link=link)
    return link


def planning(run: Run, workload: Workload) -> None:
    """Planning alone: what a batch costs on some numbers of threads, the cache being full."""
    store, plans = workload.store(OPTIMIZER), 6 if run.tiny else 40
    (rows,) = store.groups
    slots = int(workload.all_rows * (0.2 if run.tiny else 0.05))
    hottest = workload.hottest(slots)[::-1]
    batches = [np.asarray(batch["all"]).reshape(-1).astype(np.int64) for batch in workload.batches(plans + 24)]
    lookups = workload.batch * workload.ids
    starts, tables = np.arange(workload.tables + 1) * lookups, np.arange(workload.tables)
    found = []
    for threads in (1, 2, 4, 8, 16):
        if threads > (os.cpu_count() or 1):
            break
        workers = Workers(threads)
        resident = (hottest, np.arange(slots), np.ones(slots, np.int64))
        planner = LookAheadPlanner(rows.group, slots, window=8, resident=resident, workers=workers)
        source, times = iter(batches), []
        for _ in range(plans + 10):
            start = time.perf_counter()
            while planner.wants_batch():
                planner.observe(next(source), starts, tables)
            planner.plan()
            times.append(time.perf_counter() - start)
        workers.close()
        first, median, third = spread(times[10:])  # the window opens, and code is compiled
        found.append([str(threads), f"{1e3 * median:.2f}", f"{1e3 * first:.2f} - {1e3 * third:.2f}"])
        found[-1].append(f"{1e9 * median / len(batches[0]):.1f}")
        run.record(planning_threads=threads, seconds=median, quartiles=[first, third], lookups=len(batches[0]))
    print(f"\nplanning a batch of {workload.name}: {len(batches[0]):,} lookups, {slots:,} slots, window 8")
    print_table(["threads", "ms", "quartiles", "ns a lookup"], found)


def on_demand(run: Run) -> None:
    """The cache inside `jit`: what `benchmarks/ondemand.py` measures, and that few slots train what many do."""
    losses = []
    for slots in (300, 2000):
        store = jc.HostStore({"item": jc.Table(2000, ondemand.DIM)}, OPTIMIZER)
        steps = ondemand.on_demand_steps(store, jc.init(store, slots), train=True)
        losses.append(np.asarray(steps(ondemand.skewed_ids(np.random.default_rng(0), 2000, (50, 256)))))
    if not np.allclose(*losses, rtol=1e-4, equal_nan=False):
        run.fail(f"on-demand: few slots give other losses than many: {losses[0][-1]} and {losses[1][-1]}")
    for section in ondemand.SECTIONS[:1] if run.tiny else ondemand.SECTIONS:
        if run.left() < 20 and not run.tiny:
            run.skip(f"on-demand: {section}: no time")
            continue
        for record in ondemand.measure(run.tiny, [section]):
            run.record(**record)
