"""What every section has at hand: its time, its place for results, a table printer and a clock."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax


@dataclass
class Run:
    """One section while it runs.

    Attributes:
        file: where its results go, as JSON, after every record.
        until: `time.time()` at which it should be done.
        tiny: whether sizes are such that only the program is tried.
        backends: those to check and to measure.
        variant: of the section, if it has several.
        profile: folder for a profiler's trace, or None.
        results: records, failed checks and what was left out.
    """

    file: Path
    until: float
    tiny: bool
    backends: tuple[str, ...]
    variant: str = ""
    profile: Path | None = None
    results: dict[str, Any] = field(default_factory=lambda: {"records": [], "failures": [], "skipped": []})

    def left(self) -> float:
        """Seconds until it should be done."""
        return self.until - time.time()

    def record(self, **fields: Any) -> None:
        self.results["records"].append(fields)
        self.flush()

    def fail(self, what: str) -> None:
        """A check that did not hold."""
        print(f"FAILED: {what}", flush=True)
        self.results["failures"].append(what)
        self.flush()

    def skip(self, what: str) -> None:
        """Something that was left out, and why."""
        print(f"left out: {what}", flush=True)
        self.results["skipped"].append(what)
        self.flush()

    def flush(self) -> None:
        self.file.write_text(json.dumps(self.results, indent=2, default=str) + "\n")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints columns, the first aligned to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([row[0].ljust(len(first)), *others]).rstrip(), flush=True)


def seconds(call: Callable[..., Any], *arguments: Any) -> float:
    """Time of one call until its results are there."""
    start = time.perf_counter()
    jax.block_until_ready(call(*arguments))
    return time.perf_counter() - start


def spread(times: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    if len(times) < 2:
        return times[0], times[0], times[0]
    first, median, third = statistics.quantiles(times, n=4, method="inclusive")
    return first, median, third


def on_cpu() -> bool:
    return jax.devices()[0].platform == "cpu"
