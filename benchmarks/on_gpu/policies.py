"""ScratchPipe's setting (Kwon & Rhu, ISCA 2022): what each policy moves, and what a step then takes."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import numpy as np

import jaxcache as jc
from on_gpu.pipeline import OPTIMIZER, figures_of
from on_gpu.run import Run, print_table
from on_gpu.training import (
    DRAWN_AHEAD,
    SCATTER,
    Batch,
    Cached,
    Contender,
    OnDevice,
    Workload,
    exponent_for,
    roomy,
    unique_rows,
)

# The hottest 2 % of the rows have this share of the lookups.
LOCALITIES = {"none": 0.02, "low": 0.09, "medium": 0.40, "high": 0.80}
SHARES = (2.0, 5.0, 10.0)  # slots, per cent of the rows
WORKLOAD = Workload("ScratchPipe", 8, 10_000_000, 128, 2048, 20, 0.0)
TINY = Workload("ScratchPipe, tiny", 2, 4000, 8, 16, 4, 0.0)
ON_DEVICE, NO_CACHE = "all on the device", "no_cache"
MOST_STEPS = 60  # of a cell
WRITTEN = 500_000  # rows at a time, to prepare the store
FASTER = 1.02  # less is noise
PUBLISHED = "the paper: 2.8 times static on average, 4.2 at most"


def policies(run: Run) -> None:
    """A table for each locality and capacity."""
    base, shares = (TINY, (20.0,)) if run.tiny else (WORKLOAD, SHARES)
    base, shrunk = fitted(base)
    if shrunk:
        run.skip(shrunk)
    print(
        f"{PUBLISHED}. Every cache but no_cache starts with the hottest rows by the law; then steps warm it, until as "
        f"many rows as slots were evicted or half of a cell's time is over. A cell has {MOST_STEPS} steps at most. All "
        "rows that its batches look up are in the store before. Model: the sums of bags and their mean square alone."
    )
    localities = {name: LOCALITIES[name] for name in (("none", "high") if run.tiny else LOCALITIES)}
    cells = len(localities) * (4 * len(shares) + 2)
    speedups: dict[str, list[float]] = {}
    for place, (locality, share) in enumerate(localities.items()):
        # Localities in the order of what is moved; each has what time is left, shared out.
        limit = run.left() / (len(localities) - place)
        if limit < (15 if not run.tiny else 0.5):
            run.skip(f"policies: locality {locality} and those behind it: no time")
            break
        _locality(run, base, locality, share, shares, time.time() + limit, speedups)
    measured = len(run.results["records"])
    for name, found in speedups.items():
        mean = math.exp(sum(map(math.log, found)) / len(found))
        print(
            f"{name}: {mean:.2f} times static on average (geometric), {max(found):.2f} at most, of {len(found)} cells"
        )
        run.record(policy=name, mean_speedup=mean, most=max(found), cells=len(found))
    print(f"{PUBLISHED}; {measured} of {cells} cells were measured")


def _locality(
    run: Run, base: Workload, locality: str, share: float, shares: Any, until: float, speedups: dict[str, list[float]]
) -> None:
    """The cells of one locality, as many as there is time for; small caches first."""
    workload = replace(base, name=f"{base.name}, locality {locality}", exponent=exponent_for(share, base.rows))
    began = time.time()
    batches = workload.batches(MOST_STEPS + DRAWN_AHEAD + 16)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        keys = list(pool.map(lambda batch: unique_rows(batch, workload.rows), batches[:MOST_STEPS]))
    found = np.concatenate([_ranks(workload, batch) for batch in batches[:3]])
    hot = float(np.mean(found < 0.02 * workload.rows))
    print(f"\n{workload}; of those drawn {hot:.1%}; {np.mean(list(map(len, keys))):,.0f} unique rows a step")
    bound = roomy(max(map(len, keys)) * 21 // 20)
    most = max(bound, int(workload.all_rows * max(shares) / 100))
    store, steps, written = _store(workload, keys, most, until)
    counts = workload.counts()
    print(f"prepared in {time.time() - began:.0f} s: {written:,} rows in the store, for {steps} steps")

    tables: dict[str, dict[str, dict[str, float]]] = {}
    makers: list[tuple[str, str, Callable[[], Contender]]] = [
        ("", ON_DEVICE, lambda: OnDevice(ON_DEVICE, workload, "embedding", OPTIMIZER, batches, bound)),
    ]
    for percent in shares:
        slots = max(int(workload.all_rows * percent / 100), bound)
        label = f"{slots / workload.all_rows:.0%}"

        def cached(name, slots=slots):
            policy = {"static": lambda: jc.static(counts), NO_CACHE: jc.no_cache}.get(name) or getattr(jc, name)
            given = {} if name == "lookahead" else {"policy": policy()}
            return Cached(name, workload, "embedding", store(), batches, slots, warm=name != NO_CACHE, **given)

        names = ["static", "lookahead", "scratchpipe", "lru"] + [NO_CACHE] * (percent == shares[0])
        makers += [(label, name, lambda name=name, cached=cached: cached(name)) for name in names]
    for place, (label, name, make) in enumerate(makers):
        left = until - time.time()
        least = 8 if not run.tiny else 0.2
        if left < least:
            run.skip(f"policies: {locality}, {label} {name} and {len(makers) - place - 1} cells behind it: no time")
            break
        figures = _cell(run, make, steps, time.time() + max(left / (len(makers) - place), least))
        if figures is not None:
            tables.setdefault(label, {})[name] = figures
            run.record(locality=locality, exponent=workload.exponent, slots=label, policy=name, **figures)
    _print(run, locality, tables, speedups)
    gc.collect()


def _ranks(workload: Workload, batch: Batch) -> np.ndarray:
    """The popularity of every row that a batch looks up."""
    return batch["all"].astype(np.int64) * pow(SCATTER, -1, workload.rows) % workload.rows


def _store(
    workload: Workload, keys: list[np.ndarray], slots: int, until: float
) -> tuple[Callable[[], jc.HostStore], int, int]:
    """A store that has, as after a long run, all rows that will be read or written; otherwise every cell would make
    some, which takes ten times as long as to read them.

    Returns:
        What makes a store for a cell, all with the same rows: their values differ from a run of its own, which no time
        depends on. For how many batches that holds; and the rows in it.
    """
    (rows,) = workload.store(OPTIMIZER).groups
    stop, covered = time.time() + 0.3 * (until - time.time()), 0
    for number, part in enumerate([workload.hottest(slots), *keys]):
        if time.time() > stop and covered >= min(12, len(keys)):
            break
        for first in range(0, len(part), WRITTEN):
            some = part[first : first + WRITTEN]
            rows.write(some, rows.read(some[:0], len(some)))
        covered = number

    def store() -> jc.HostStore:
        made = workload.store(OPTIMIZER)
        made.groups = (rows,)
        return made

    return store, covered, rows.rows_written


def _cell(run: Run, make: Callable[[], Contender], steps: int, until: float) -> dict[str, Any] | None:
    """Warms a contender up and times it."""
    made, contender = time.time(), None
    try:
        contender = make()
        contender.run(1)  # compiles
        taken, spent, began = 1, 1.0, time.time()
        until = max(until, began + 0.5 * (until - made))
        while taken < 2 * steps // 3 and not _is_warm(contender) and time.time() < began + 0.5 * (until - began):
            spent = contender.run(2) / 2
            taken += 2
        before = contender.ahead.report() if isinstance(contender, Cached) else None
        number = max(3, min(steps - taken, int((until - time.time()) / spent)))
        figures: dict[str, Any] = {"ms": 1e3 * contender.run(number) / number, "steps": number, "warm_steps": taken}
        if before is not None:
            figures |= figures_of(before, contender.ahead.report())
        return figures
    except Exception as error:
        run.fail(f"a cell of policies: {type(error).__name__}: {error}")
        return None
    finally:
        if contender is not None:
            contender.close()


def _is_warm(contender: Contender) -> bool:
    """Whether as many rows as slots were evicted; without a cache, or one of its own rows, three steps will do."""
    if not isinstance(contender, Cached) or contender.name in ("static", NO_CACHE):
        return len(contender.losses) >= 3
    report = contender.ahead.report()
    return report.rows_written_back >= report.slots


def _print(
    run: Run, locality: str, tables: dict[str, dict[str, dict[str, Any]]], speedups: dict[str, list[float]]
) -> None:
    uncached = tables.get("", {}).get(ON_DEVICE, {}).get("ms")
    rows = []
    for label, cells in tables.items():
        static = cells.get("static", {}).get("ms")
        for name, cell in cells.items():
            row = [f"{locality} {label} {name}", f"{cell['ms']:.2f}", "", "", "", "", "", ""]
            if "rows_fetched" in cell:
                row[2], row[3] = f"{cell['rows_fetched']:,.0f}", f"{cell['hit_rate']:.1%}"
                row[4] = f"{cell['evicted_of_slots']:.1f}"
            row[5] = f"{static / cell['ms']:.2f}" if static else ""
            row[6] = f"{cell['ms'] / uncached:.2f}" if uncached else ""
            if static and name in ("lookahead", "scratchpipe", "lru"):
                speedups.setdefault(name, []).append(static / cell["ms"])
            scratchpipe = cells.get("scratchpipe", {}).get("ms")
            if name == "lookahead" and scratchpipe and cell["ms"] > FASTER * scratchpipe:
                row[7] = "slower than scratchpipe"
            rows.append(row)
    if rows:
        head = ["", "ms a step", "rows fetched", "hit rate", "turnovers", "x static", "x on the device", ""]
        print_table(head, rows)
        print("  turnovers: times as many rows as slots were evicted before the last step", flush=True)


def fitted(workload: Workload) -> tuple[Workload, str]:
    """A workload with so many rows that all fit the device, for the contender that keeps them there."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:  # a CPU
        limit = 0.3 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    needed = 1.1 * workload.all_rows * (4 * workload.dim + 4 + 17)
    if needed < limit:
        return workload, ""
    rows = int(workload.rows * limit / needed) // 10_000 * 10_000
    why = f"{rows:,} rows a table instead of {workload.rows:,}: all of them must fit the device for one contender"
    return replace(workload, rows=rows), why
