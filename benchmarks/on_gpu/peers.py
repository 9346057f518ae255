"""Others on the same device, with the same shapes and batches."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import optax

from on_gpu.run import Run, print_table, spread
from on_gpu.training import Cached, Contender, OnDevice, Workload, bound_of, first_steps

WORKLOADS = (
    Workload("peers", 8, 1_000_000, 32, 2048, 4, 1.05),
    Workload("8 tables, 20 lookups a bag", 8, 500_000, 128, 2048, 20, 1.05),
)
TINY = (Workload("tiny", 2, 2000, 8, 16, 2, 1.05),)
OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.05),
    "adagrad": lambda: optax.adagrad(0.05),
    "adam": lambda: optax.adam(0.05),  # SparseAdam: lazy, as it is here
}
STEPS = 120
THEIRS = "PyTorch, all on the device"
SHARE = 0.05  # slots


def peers(run: Run) -> None:
    """PyTorch's EmbeddingBag beside ours; the step is a lookup, the sums of bags, and the update."""
    if importlib.util.find_spec("torch") is None:
        print("PyTorch is not installed")
        run.skip("peers: PyTorch is not installed")
        return
    workloads = TINY if run.tiny else WORKLOADS
    for place, workload in enumerate(workloads):
        limit = run.left() / (len(workloads) - place)
        if limit < (10 if not run.tiny else 1):
            run.skip(f"peers: {workload.name}: no time")
            continue
        _workload(run, workload, limit)


def _workload(run: Run, workload: Workload, limit: float) -> None:
    batches = workload.batches(STEPS)
    theirs = _pytorch(run, workload, batches, limit / 3)
    until, share = time.time() + limit / 2, 0.2 if run.tiny else SHARE
    bound, slots = bound_of(workload, batches), int(workload.all_rows * share)
    ours: dict[tuple[str, str], Contender] = {}
    rows = []
    try:
        for name, optimizer in OPTIMIZERS.items():
            store = workload.store(optimizer())
            ours[name, "jaxcache, all on the device"] = OnDevice(
                "on the device", workload, "embedding", optimizer(), batches, bound
            )
            ours[name, f"jaxcache, {share:.0%} of the rows"] = Cached(
                "cached", workload, "embedding", store, batches, slots
            )
        first_steps(list(ours.values()))
        found = {(name, THEIRS): theirs[name]["ms"] for name in OPTIMIZERS if name in theirs}
        for place, (key, contender) in enumerate(ours.items()):
            contender.run(10)
            once = contender.run(10) / 10
            turn = max(2, min(20, int((until - time.time()) / (len(ours) - place) / 4 / once)))
            found[key] = 1e3 * spread([contender.run(turn) / turn for _ in range(3)])[1]
        for (name, label), ms in sorted(found.items()):
            reference = found.get((name, THEIRS))
            rows.append([f"{name}: {label}", f"{ms:.2f}", f"{ms / reference:.2f}" if reference else ""])
            run.record(workload=str(workload), optimizer=name, contender=label, ms=ms)
    finally:
        for contender in ours.values():
            contender.close()
    print(f"\n{workload}; the sums of bags and their mean square alone")
    print_table(["", "ms a step", "x PyTorch"], rows)


def _pytorch(run: Run, workload: Workload, batches: list[dict[str, Any]], limit: float) -> dict[str, Any]:
    """ms a step of each optimizer, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        ids = Path(folder) / "ids.npy"
        np.save(ids, np.stack([batch["all"] for batch in batches[:32]]))
        given = {"tables": workload.tables, "rows": workload.rows, "dim": workload.dim, "ids": str(ids)}
        given |= {"optimizers": list(OPTIMIZERS), "seconds": max(limit - 8, 2)}
        command = [sys.executable, str(Path(__file__).with_name("pytorch.py")), json.dumps(given)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit + 20)
        except subprocess.TimeoutExpired:
            run.fail("peers: PyTorch did not end in time")
            return {}
    if done.returncode:
        run.fail(f"peers: PyTorch broke off: {done.stderr[-2000:]}")
        return {}
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"PyTorch {found['version']} on {found['device']}")
    return found["optimizers"]
