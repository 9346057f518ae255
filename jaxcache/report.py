"""Figures of a run: what moved, and which stage of the pipeline held it back."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Stage:
    """Time of one stage, in seconds.

    Attributes:
        busy: time at work.
        wait: time spent waiting for its neighbours.
    """

    busy: float = 0.0
    wait: float = 0.0

    @contextmanager
    def working(self) -> Iterator[None]:
        """Counts the time of its block as busy."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.busy += time.perf_counter() - start

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time of its block as waiting."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.wait += time.perf_counter() - start


STAGES = ("loader", "plan", "collect", "send", "step", "write-back")


@dataclass
class GroupReport:
    """Figures of one group of tables, over the batches that were exchanged.

    Attributes:
        tables: names of its tables.
        rows: rows of all of them.
        slots: rows of the group that the cache holds.
        row_bytes: bytes of a row with its optimizer state.
        device_bytes: bytes of its part of the cache on the device.
        unique_bound: bound on the unique rows of a batch that the step was compiled for.
        lookups, unique_rows, lookup_hits, rows_fetched, rows_warmed, rows_written_back, rows_flushed: as in `Report`.
    """

    tables: tuple[str, ...]
    rows: int
    row_bytes: int
    slots: int = 0
    device_bytes: int = 0
    unique_bound: int = 0
    lookups: int = 0
    unique_rows: int = 0
    lookup_hits: int = 0
    rows_fetched: int = 0
    rows_warmed: int = 0
    rows_written_back: int = 0
    rows_flushed: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of unique rows that were resident when their batch was planned; 0.0 before the first step."""
        return 1 - self.rows_fetched / self.unique_rows if self.unique_rows else 0.0


@dataclass
class Report:
    """Figures of one `LookAhead` from its start, over the batches that were exchanged; or, from `report`, of on-demand
    mode, over all calls of `admit` with a store.

    Numbers of rows and bytes are those of all groups together.

    Attributes:
        groups: the figures of each group, by the name of its first table.
        steps: batches exchanged, or calls of `admit`.
        policy: name of the policy.
        window: batches that a plan looks at, as asked for; 0 on demand, where there is none.
        longest_window: most batches that a plan looked at.
        window_limited: steps whose plan would have looked further, had `max_window` or `max_window_bytes` let it.
        bound_growths: how often a bound on unique rows, or the shape of a batch, had to grow, each time compiling the
            step anew.
        ignored: ids that were out of range and left out, by feature.
        flushes: calls of `flush`, those of `evaluate` included.
        flush_seconds: how long they took, all together.
        stages: busy and wait time of each stage. `step` is busy while the caller's loop body runs or waits for the
            device, and waits while the next batch is not ready. None on demand.
    """

    groups: dict[str, GroupReport]
    steps: int = 0
    policy: str = ""
    window: int | str = 0
    longest_window: int = 0
    window_limited: int = 0
    bound_growths: int = 0
    ignored: dict[str, int] = field(default_factory=dict)
    flushes: int = 0
    flush_seconds: float = 0.0
    stages: dict[str, Stage] = field(default_factory=lambda: {name: Stage() for name in STAGES})

    def _total(self, name: str) -> int:
        return sum(getattr(group, name) for group in self.groups.values())

    @property
    def lookups(self) -> int:
        """Ids of the batches that looked up a row, repetitions counted."""
        return self._total("lookups")

    @property
    def unique_rows(self) -> int:
        """Unique rows of each batch, added up."""
        return self._total("unique_rows")

    @property
    def lookup_hits(self) -> int:
        """Lookups of rows that were resident when their batch was planned."""
        return self._total("lookup_hits")

    @property
    def rows_fetched(self) -> int:
        """Rows brought to the device for a batch."""
        return self._total("rows_fetched")

    @property
    def rows_warmed(self) -> int:
        """Rows brought to the device at the start, before any batch, because the policy says so."""
        return self._total("rows_warmed")

    @property
    def rows_written_back(self) -> int:
        """Victims carried home; what `flush` writes is not counted."""
        return self._total("rows_written_back")

    @property
    def rows_flushed(self) -> int:
        """Rows that `flush` wrote home."""
        return self._total("rows_flushed")

    @property
    def slots(self) -> int:
        """Capacity of the cache, in rows."""
        return self._total("slots")

    @property
    def device_bytes(self) -> int:
        """Bytes of the cache on the device."""
        return self._total("device_bytes")

    @property
    def table_bytes(self) -> int:
        """Bytes that all rows of the tables take."""
        return sum(group.rows * group.row_bytes for group in self.groups.values())

    @property
    def unique_bound(self) -> int:
        """Bound on the unique rows of a batch that the step was compiled for."""
        return self._total("unique_bound")

    @property
    def hit_rate(self) -> float:
        """Share of unique rows that were resident when their batch was planned; 0.0 before the first step."""
        return 1 - self.rows_fetched / self.unique_rows if self.unique_rows else 0.0

    @property
    def lookup_hit_rate(self) -> float:
        """Share of lookups whose row was resident when their batch was planned; 0.0 before the first step."""
        return self.lookup_hits / self.lookups if self.lookups else 0.0

    @property
    def bytes_fetched(self) -> int:
        """Bytes of rows brought to the device, padding of the size classes not counted."""
        return sum(group.rows_fetched * group.row_bytes for group in self.groups.values())

    @property
    def bytes_written_back(self) -> int:
        """Bytes of victims carried home, padding of the size classes not counted."""
        return sum(group.rows_written_back * group.row_bytes for group in self.groups.values())

    @property
    def bound_by(self) -> str:
        """The stage that bounds the run: the one that was busy longest."""
        return max(self.stages, key=lambda name: self.stages[name].busy)

    def __str__(self) -> str:
        steps = max(self.steps, 1)
        lines = [
            f"{self.steps:,} steps, policy {self.policy}, window {self.window} (longest {self.longest_window}"
            + (f", cut short in {self.window_limited:,} steps" if self.window_limited else "")
            + ")"
            if self.window
            else f"{self.steps:,} calls of admit, policy {self.policy}",
            f"{self.slots:,} slots: "
            f"{self.device_bytes / 1e6:,.1f} MB on the device, tables {self.table_bytes / 1e6:,.1f} MB "
            f"({self.table_bytes / max(self.device_bytes, 1):.1f} x)",
        ]
        if len(self.groups) > 1:
            lines += [
                f"  {name}{f' + {len(group.tables) - 1}' if len(group.tables) > 1 else ''}: {group.slots:,} slots of "
                f"{group.row_bytes} B for {group.rows:,} rows, hit rate {group.hit_rate:.2%} of unique rows"
                for name, group in self.groups.items()
            ]
        lines += [
            f"hit rate {self.hit_rate:.2%} of unique rows, {self.lookup_hit_rate:.2%} of lookups",
            f"fetched {self.rows_fetched:,} rows, {self.bytes_fetched / 1e6:,.1f} MB "
            f"({self.rows_fetched / steps:,.0f} rows a step)"
            + (f"; {self.rows_warmed:,} rows at the start" if self.rows_warmed else ""),
            f"written back {self.rows_written_back:,} rows, {self.bytes_written_back / 1e6:,.1f} MB "
            f"({self.rows_written_back / steps:,.0f} rows a step); flushed {self.rows_flushed:,} rows"
            + (f" in {self.flush_seconds:.3f} s" if self.flushes else ""),
        ]
        if self.unique_bound:
            lines.append(f"compiled for {self.unique_bound:,} unique rows a batch, grown {self.bound_growths} times")
        if self.ignored:
            each = ", ".join(f"{name} {number:,}" for name, number in self.ignored.items())
            lines.append(f"ids out of range and ignored: {each}")
        if self.stages:
            lines.append(f"{'stage':<12}{'busy s':>10}{'wait s':>10}{'busy ms a step':>17}")
        lines += [
            f"{name:<12}{stage.busy:>10.2f}{stage.wait:>10.2f}{1e3 * stage.busy / steps:>17.2f}"
            + ("  <- bounds the run" if name == self.bound_by else "")
            for name, stage in self.stages.items()
        ]
        return "\n".join(lines)


def aligned(lines: Sequence[Sequence[str]], left: tuple[int, ...] = ()) -> str:
    """Lines of cells as text, those of the columns `left` to the left.

    Columns are as wide as the cells of the lines that have all of them.
    """
    whole = [line for line in lines if len(line) == len(lines[0])]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=False))
        ).rstrip()
        for line in lines
    )
