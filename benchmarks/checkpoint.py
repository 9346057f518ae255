"""What checkpoints of host tables cost: bytes a second, memory, pauses of training, and what incremental ones save.

    python benchmarks/checkpoint.py                       # a table of 8 GB and its peers, some minutes, 25 GB of disk
    python benchmarks/checkpoint.py --gigabytes 1 --sections save incremental --json checkpoint.json

Sections:
- `save`: a table of which every row was written, with row-wise Adagrad: saved and restored through Orbax, beside
  `np.save` and `np.load` of as many bytes (which keep neither order nor checksums, and hold the table in memory once
  more), both with the files forced to the disk.
- `arrays`: the same at a size at which Orbax's own saving of arrays fits: `ocp.save` of weights and state as NumPy
  arrays, which it copies.
- `incremental`: of the rows, 1 %, 10 % and 100 % were written since the checkpoint before.
- `training`: steps while a checkpoint is written, against steps before and after; what flush and save hold up, and the
  rows that were copied because training overwrote them first.

Memory is that of the process without mapped files (RssAnon), sampled every few milliseconds, its peak less what it was
before. Contenders take turns where they are short; figures are medians with the range.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import jaxcache as jc

DIM = 64
ROW_BYTES = 4 * DIM + 4  # weights, and the accumulator of row-wise Adagrad
SECTIONS = ("save", "arrays", "incremental", "training")
SHARES = (0.01, 0.1, 1.0)


class Weights:
    """Weights of a whole table that are made as they are read."""

    def __init__(self, rows: int):
        self.shape, self.dtype = (rows, DIM), np.dtype(np.float32)
        self._block = np.random.default_rng(0).random((1 << 16, DIM), np.float32)

    def __getitem__(self, rows: slice) -> np.ndarray:
        count = rows.stop - rows.start
        return np.resize(self._block, (count, DIM)) + np.float32(rows.start)


class Usage:
    """Seconds and bytes of memory that a block took.

    Attributes:
        seconds: wall time.
        cpu_seconds: of all threads.
        peak_bytes: the most memory, less what was in use before.
    """

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self.peak_bytes = 0


@contextmanager
def measured() -> Iterator[Usage]:
    """Measures a block."""
    gc.collect()
    usage, done, before = Usage(), threading.Event(), _anonymous_bytes()

    def sample() -> None:
        while not done.wait(0.005):
            usage.peak_bytes = max(usage.peak_bytes, _anonymous_bytes() - before)

    sampler = threading.Thread(target=sample)
    sampler.start()
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield usage
    finally:
        usage.seconds, usage.cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
        done.set()
        sampler.join()


def _anonymous_bytes() -> int:
    """Memory of the process that is no mapped file; 0 where it is not known."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def make_store(rows: int) -> jc.HostStore:
    """A store of one table."""
    return jc.HostStore({"item": jc.Table(rows, DIM)}, jc.rowwise_adagrad(0.1))


def filled_store(gigabytes: float) -> jc.HostStore:
    """A store of so many bytes of rows, all of them written."""
    rows = max(int(gigabytes * 1e9) // ROW_BYTES, 1000)
    store = make_store(rows)
    store.load("item", Weights(rows))
    return store


def save(store: jc.HostStore, folder: Path, step: int = 0, **options: Any) -> jc.Checkpoint:
    """Saves through Orbax, waiting for it."""
    checkpoint = jc.Checkpoint(store, **options)
    ocp.save_checkpointables(folder / str(step), {"tables": checkpoint})
    return checkpoint


def restore(store: jc.HostStore, folder: Path, step: int = 0) -> None:
    """Restores through Orbax."""
    ocp.load_checkpointables(folder / str(step), {"tables": jc.Checkpoint(store)})


def files_bytes(folder: Path) -> int:
    """Bytes of the files in a folder, each once."""
    found = {(stat := path.stat()).st_ino: stat.st_size for path in folder.rglob("*") if path.is_file()}
    return sum(found.values())


def measure_save(gigabytes: float, folder: Path) -> list[dict[str, Any]]:
    """`jaxcache` and `np.save` of as many bytes, each saved and read again."""
    store = filled_store(gigabytes)
    rows = store.rows_written
    size = rows * ROW_BYTES
    records = []

    def note(what: str, usage: Usage) -> None:
        records.append({"contender": what, "bytes": size, **vars(usage), "bytes_per_second": size / usage.seconds})
        print(
            f"  {what:<28} {usage.seconds:7.2f} s, {size / usage.seconds / 1e9:5.2f} GB/s, "
            f"{usage.cpu_seconds:6.2f} s of CPU, {usage.peak_bytes / 2**20:8,.0f} MiB more",
            flush=True,
        )

    print(f"table of {rows:,} rows, {size / 1e9:.2f} GB with state")
    with measured() as usage:
        save(store, folder)
    note("jaxcache save", usage)
    del store
    gc.collect()
    other = make_store(rows)
    with measured() as usage:
        restore(other, folder)
    usage.peak_bytes -= other.nbytes  # the table itself
    note("jaxcache restore", usage)
    some = np.arange(0, rows, max(rows // 1000, 1))
    assert (other.rows("item", some[:1]) == Weights(rows)[0:1]).all() and other.rows_written == rows
    del other
    shutil.rmtree(folder / "0")
    gc.collect()
    weights, state = np.ones((rows, DIM), np.float32), np.ones((rows, 1), np.float32)
    with measured() as usage:
        for name, array in (("weights", weights), ("state", state)):
            with open(folder / f"{name}.npy", "wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
    note("np.save", usage)
    del weights, state
    with measured() as usage:
        loaded = [np.load(folder / f"{name}.npy") for name in ("weights", "state")]
    usage.peak_bytes -= size
    note("np.load", usage)
    assert loaded[0].shape == (rows, DIM)
    for name in ("weights", "state"):
        (folder / f"{name}.npy").unlink()
    return records


def measure_arrays(gigabytes: float, folder: Path) -> list[dict[str, Any]]:
    """`jaxcache` and Orbax's own arrays in turns, three each."""
    store = filled_store(gigabytes)
    rows = store.rows_written
    arrays = {"weights": np.ones((rows, DIM), np.float32), "state": np.ones((rows, 1), np.float32)}
    other = make_store(rows)
    contenders: dict[str, Callable[[int], Any]] = {
        "jaxcache save": lambda turn: save(store, folder / "tables", turn),
        "orbax save of arrays": lambda turn: ocp.save(folder / "arrays" / str(turn), arrays),
        "jaxcache restore": lambda turn: restore(other, folder / "tables", turn),
        "orbax load of arrays": lambda turn: ocp.load(folder / "arrays" / str(turn), arrays),
    }
    found: dict[str, list[Usage]] = {name: [] for name in contenders}
    for turn in range(3):
        for name, run in contenders.items():
            with measured() as usage:
                run(turn)
            found[name].append(usage)
        for part in ("tables", "arrays"):
            shutil.rmtree(folder / part / str(turn))
    records = []
    size = rows * ROW_BYTES
    print(f"{size / 1e9:.2f} GB, three turns")
    for name, usages in found.items():
        seconds = sorted(usage.seconds for usage in usages)
        peak = max(usage.peak_bytes for usage in usages)
        records.append({"contender": name, "bytes": size, "seconds": seconds, "peak_bytes": peak})
        print(
            f"  {name:<28} {seconds[1]:7.2f} s ({seconds[0]:.2f} to {seconds[2]:.2f}), "
            f"{size / seconds[1] / 1e9:5.2f} GB/s, {peak / 2**20:8,.0f} MiB more",
            flush=True,
        )
    return records


def measure_incremental(gigabytes: float, folder: Path) -> list[dict[str, Any]]:
    """A full checkpoint, and incremental ones after so many rows were written anew."""
    store = filled_store(gigabytes)
    rows, draw = store.rows_written, np.random.default_rng(1)
    group = store.groups[0]
    with measured() as usage:
        save(store, folder, 0)
    full = usage.seconds, files_bytes(folder / "0")
    print(f"full: {full[0]:.2f} s, {full[1] / 1e9:.2f} GB of files")
    records = [{"share": None, "seconds": full[0], "bytes": full[1]}]
    for step, share in enumerate(SHARES, 1):
        changed = np.sort(draw.choice(rows, max(int(share * rows), 1), replace=False))
        for part in np.array_split(changed, max(len(changed) // 100_000, 1)):
            keys = group.group.keys(0, part)
            group.write(keys, group.read(keys))
        before = files_bytes(folder)
        with measured() as usage:
            checkpoint = save(store, folder, step, incremental=True)
        figures = checkpoint.figures
        assert figures is not None and figures.incremental and figures.rows == len(changed)
        new = files_bytes(folder) - before
        other = make_store(rows)
        with measured() as restoring:
            restore(other, folder, step)
        assert other.rows_written == rows
        del other
        records.append({"share": share, "seconds": usage.seconds, "bytes": new, "restore_seconds": restoring.seconds})
        print(
            f"{share:>5.0%} changed: {usage.seconds:.2f} s ({usage.seconds / full[0]:.2f} of full), {new / 1e9:.3f} GB "
            f"({new / full[1]:.3f}); restored with those before it in {restoring.seconds:.2f} s",
            flush=True,
        )
    return records


def measure_training(gigabytes: float, folder: Path, steps: int) -> list[dict[str, Any]]:
    """Steps before, while and after a checkpoint is written."""
    store = filled_store(gigabytes)
    rows = store.rows_written

    def batches() -> Iterator[dict[str, np.ndarray]]:
        draw = np.random.default_rng(2)
        while True:
            yield {"item": np.minimum((rows * draw.random(8192) ** 3).astype(np.int64), rows - 1)}

    @jax.jit
    def step(cache: jc.CacheState, plan: jc.Plan) -> jc.CacheState:
        return jc.update(cache, plan, jc.lookup(cache, plan))

    step = jax.jit(step, donate_argnums=0)
    phases: dict[str, list[float]] = {"before": [], "while": [], "after": []}
    checkpoints: list[jc.Checkpoint] = []
    pauses = []
    with jc.LookAhead(store, batches(), ids=lambda batch: batch, slots="2%", window=8) as ahead:
        cache = ahead.start()
        response, phase, number = None, "warm", 0
        for _, plan in ahead:
            started = time.perf_counter()
            cache = step(ahead.exchange(cache, plan), plan)
            jax.block_until_ready(cache.step)
            if phase in phases:
                phases[phase].append(time.perf_counter() - started)
            number += 1
            if phase == "warm" and number == steps:
                phase, number = "before", 0
            elif phase == "before" and number == steps:
                begun = time.perf_counter()
                cache = ahead.flush(cache)
                flushed = time.perf_counter()
                checkpoints.append(jc.Checkpoint(store, cache, ahead=ahead))
                response = ocp.save_checkpointables_async(folder / "0", {"tables": checkpoints[-1]})
                pauses.append((flushed - begun, time.perf_counter() - flushed))
                phase, number = "while", 0
            elif phase == "while" and checkpoints[-1].figures is not None:
                response.result()
                phase, number = "after", 0
            elif phase == "after" and number == steps:
                break
        cache = ahead.flush(cache)
    figures = checkpoints[-1].figures
    assert figures is not None
    medians = {name: 1e3 * statistics.median(taken) for name, taken in phases.items()}
    (flush, call), beside = pauses[0], (medians["before"] + medians["after"]) / 2
    print(
        f"steps of {beside:.1f} ms, and of {medians['while']:.1f} ms ({medians['while'] / beside:.2f} x) while "
        f"{figures.rows_bytes / 1e9:.2f} GB were written in {figures.write_seconds:.2f} s "
        f"({len(phases['while'])} steps)\n"
        f"held up: flush {flush * 1e3:.0f} ms, the call {call * 1e3:.1f} ms, of which the snapshot "
        f"{figures.pause_seconds * 1e3:.1f} ms; copied {figures.copied_bytes / 1e6:.1f} MB"
    )
    return [{"medians_ms": medians, "flush_seconds": flush, "call_seconds": call, **vars(figures)}]


def main() -> None:
    """Runs the sections that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8.0, help="of rows, in `save` (%(default)s)")
    parser.add_argument("--smaller", type=float, default=1.0, help="of rows, in the other sections (%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="of each phase of `training` (%(default)s)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--folder", type=Path, help="where files go, a temporary folder by default")
    parser.add_argument("--json", type=Path, help="write the records")
    arguments = parser.parse_args()
    environment = {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        **{name: version(name) for name in ("jax", "numpy", "orbax-checkpoint", "tensorstore")},
    }
    print(", ".join(f"{name} {value}" for name, value in environment.items()))
    run: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
        "save": lambda folder: measure_save(arguments.gigabytes, folder),
        "arrays": lambda folder: measure_arrays(arguments.smaller, folder),
        "incremental": lambda folder: measure_incremental(arguments.smaller, folder),
        "training": lambda folder: measure_training(arguments.smaller, folder, arguments.steps),
    }
    records: dict[str, Any] = {"environment": environment}
    for section in arguments.sections:
        print(f"\n{section}")
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            records[section] = run[section](Path(folder))
        gc.collect()
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
