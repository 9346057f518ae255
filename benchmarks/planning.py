"""What planning a batch costs, against `np.unique` on the same ids.

    python benchmarks/planning.py                       # Criteo Kaggle's 33.8 million rows, about two minutes

A plan deduplicates the lookups, probes the index, keeps next uses, chooses victims and gives slots: `observe` and
`plan` of `LookAheadPlanner`, everything included that they do. The peer is `np.unique(keys, return_inverse=True)`,
which does the first of these alone, on the same keys in two orders: one table after the other, as the planner gets
them, and one sample after the other, as a data set stores them.

How it is measured. The planner starts with the slots full of the hottest rows of the log's first part, so that rows are
evicted at the rate of a long run; it and the peer take turns on batch after batch in one process. Figures are medians
over the batches with quartiles. With "auto" the window is filled first and then moves on by about a batch a plan.
Plans of several threads are the same as those of one, which the tests show.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numba
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from jaxcache import Table
from jaxcache.planner import LookAheadPlanner, Window, Workers
from jaxcache.policies import frequency
from jaxcache.tables import Group
from synthetic import KAGGLE_CARDINALITIES, ClickLog, scaled_cardinalities

WARM_LOOKUPS = 12_000_000  # of the log's first part, whose hottest rows fill the slots


def batches(log: ClickLog, size: int, first: int) -> Iterator[np.ndarray]:
    """Ids `int64[fields * size]` of each batch, one field after the other."""
    for number in count(first):
        yield np.concatenate(list(log.batch(size, number)["ids"].values())).astype(np.int64)


def measure(log: ClickLog, size: int, slots: int, window: Window, threads: int, plans: int) -> dict[str, Any]:
    """Times `plans` plans of batches of `size` samples, and the peer on the same batches."""
    group = Group.stack({f"C{i}": Table(rows, 1) for i, rows in enumerate(log.cardinalities)})
    fields = len(log.cardinalities)
    starts, tables = np.arange(fields + 1) * size, np.arange(fields)
    bases = np.repeat(group.bases.astype(np.int64), size)

    warm = WARM_LOOKUPS // (fields * size)
    counts = np.zeros(group.rows, np.int64)
    source = batches(log, size, 0)
    for _ in range(warm):
        np.add.at(counts, next(source) + bases, 1)
    named = {
        name: counts[int(base) : int(base) + table.rows]
        for name, base, table in zip(group.names, group.bases, group.tables, strict=True)
    }
    hottest = frequency(named, warmup_ratio=1.0).warm_keys(group, slots)[::-1]
    # Where the log's first part had too few rows, rows that were never looked up stand for long forgotten ones.
    others = np.flatnonzero(counts == 0)[: slots - len(hottest)]
    keys = np.concatenate([others, hottest])
    resident = (keys, np.arange(slots), np.maximum(counts[keys], 1))
    workers = Workers(threads)
    planner = LookAheadPlanner(group, slots, window=window, max_window=10_000, resident=resident, workers=workers)

    times: dict[str, list[float]] = {"observe": [], "plan": [], "np_unique_tables": [], "np_unique_samples": []}
    unique, missed, windows = [], [], []
    for number in range(-3, plans):  # the first few compile, and open the window
        ids = None
        while planner.wants_batch():
            ids = next(source)
            started = time.perf_counter()
            planner.observe(ids, starts, tables)
            times["observe"].append(time.perf_counter() - started)
        windows.append(planner.ahead)
        started = time.perf_counter()
        planned = planner.plan()
        planning = time.perf_counter() - started
        if ids is None:
            ids = next(batches(log, size, warm))
        peers = {"np_unique_tables": ids + bases, "np_unique_samples": (ids + bases).reshape(fields, size).T.ravel()}
        for name, keys in peers.items():
            started = time.perf_counter()
            np.unique(keys, return_inverse=True)
            if number >= 0:
                times[name].append(time.perf_counter() - started)
        if number >= 0:
            times["plan"].append(planning)
            unique.append(len(planned.unique_slots))
            missed.append(len(planned.missed))
    workers.close()
    # With "auto" some plans draw no batch and others two: the latest are taken one for one, as in a long run.
    times["observe"] = times["observe"][-plans:]
    both = [sum(pair) for pair in zip(times["observe"], times["plan"], strict=False)]
    record = {
        "lookups": fields * size,
        "slots": slots,
        "window": window,
        "mean_window": float(np.mean(windows)),
        "threads": threads,
        "plans": plans,
        "unique_rows": float(np.mean(unique)),
        "rows_fetched": float(np.mean(missed)),
        "planner_bytes": planner.nbytes,
        **{f"{name}_ms": 1e3 * float(np.median(spent)) for name, spent in times.items()},
        "ms": 1e3 * float(np.median(both)),
        "quartiles_ms": [1e3 * float(value) for value in np.quantile(both, (0.25, 0.75))],
    }
    record["ns_a_lookup"] = 1e6 * record["ms"] / record["lookups"]
    for name in ("np_unique_tables", "np_unique_samples"):
        record[f"ratio_{name}"] = record["ms"] / record[f"{name}_ms"]
    return record


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=sum(KAGGLE_CARDINALITIES), help="rows of all 26 tables")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[2048, 16_384], help="samples")
    parser.add_argument("--share", type=float, nargs="+", default=[1.5, 3.0], help="slots, per cent of the rows")
    parser.add_argument("--window", nargs="+", default=["8", "auto"], help='batches, or "auto"')
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of the planner")
    parser.add_argument("--plans", type=int, default=100, help="plans timed in each row of the table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the records there")
    options = parser.parse_args(arguments)
    log = ClickLog(scaled_cardinalities(options.rows))
    environment = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "cores": os.cpu_count(),
    }
    print(", ".join(f"{name} {value}" for name, value in environment.items()))
    print(
        f"{'lookups':>8}{'slots':>11}{'window':>12}{'threads':>8}{'unique':>8}{'fetched':>8}{'observe':>9}{'plan':>7}"
        f"{'ms':>8}{'quartiles':>15}{'ns/lookup':>10}{'np.unique: tables':>19}{'samples':>9}{'ratios':>13}"
    )
    records = []
    for size in options.batch_size:
        for share in options.share:
            for window in options.window:
                for threads in options.threads:
                    slots = int(options.rows * share / 100)
                    known: Window = "auto" if window == "auto" else int(window)
                    record = measure(log, size, slots, known, threads, options.plans)
                    records.append(record)
                    first, third = record["quartiles_ms"]
                    shown = f"{window} ({record['mean_window']:.0f})"
                    print(
                        f"{record['lookups']:>8}{slots:>11,}{shown:>12}{threads:>8}{record['unique_rows']:>8,.0f}"
                        f"{record['rows_fetched']:>8,.0f}{record['observe_ms']:>9.2f}{record['plan_ms']:>7.2f}"
                        f"{record['ms']:>8.2f}{f'{first:.2f} - {third:.2f}':>15}{record['ns_a_lookup']:>10.1f}"
                        f"{record['np_unique_tables_ms']:>19.2f}{record['np_unique_samples_ms']:>9.2f}"
                        f"{record['ratio_np_unique_tables']:>7.2f}{record['ratio_np_unique_samples']:>6.2f}",
                        flush=True,
                    )
    if options.json:
        options.json.write_text(json.dumps({"environment": environment, "records": records}, indent=2) + "\n")
    return records


if __name__ == "__main__":
    main()
