"""The simulator: what each policy would fetch for a trace, found by the planner itself, without a model or a device.

`simulate` runs every policy at every capacity, between two bounds: Belady's optimum, which knows the whole future, and
the unbounded cache, which fetches each row once. `size` turns it around: from a budget to slots and window.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxcache import policies as policies_
from jaxcache.capacity import SLOT_BYTES, rows_of
from jaxcache.planner import REMEMBERED_BATCHES, LookAheadPlanner, Window
from jaxcache.policies import Policy
from jaxcache.report import aligned
from jaxcache.traces import Trace, load_trace

POLICIES: Mapping[str, Callable[[Mapping[str, np.ndarray]], Policy]] = {
    "lookahead": lambda counts: policies_.lookahead(),
    "scratchpipe": lambda counts: policies_.scratchpipe(),
    "frequency": policies_.frequency,
    "lfu": lambda counts: policies_.lfu(),
    "lru": lambda counts: policies_.lru(),
    "static": policies_.static,
    "no_cache": lambda counts: policies_.no_cache(),
}
"""The policies by name; each makes one from the lookups of each row in the trace."""

OPTIMUM, UNBOUNDED = "optimum", "unbounded"
_PRECISION = 0.01  # to which `size` finds slots, and to which a shorter window may be worse than the longest


@dataclass(frozen=True)
class Record:
    """What one policy moves at one capacity. `dataclasses.asdict` makes the record of the JSON file.

    A rate or a count is None where there is an `error`.

    Attributes:
        policy: its name; `optimum` and `unbounded` are the bounds.
        capacity: as it was asked for, such as 5000 or "5%".
        slots: rows that the cache holds; for `unbounded` all rows of the trace.
        window: batches that a plan looks at, its own included, as asked for: a number, "auto" or "all".
        batches: batches of the trace, an incomplete last one counted.
        lookups: lookups in them, repetitions counted.
        unique_rows: unique rows of each batch, added up.
        rows_fetched: rows brought to the device, those of the warm start included: they are moved as well. It is
            `rows_fetched` and `rows_warmed` of a run's `Report` together, and only for `unbounded` less than for
            `optimum`.
        rows_warmed: rows of the warm start, before the first batch.
        rows_written_back: rows taken home to make room; what a flush at the end would write is not counted.
        hit_rate_rows: share of `unique_rows` that were resident when their batch was planned. It is what the steps
            see, so rows of a warm start can lift it above the optimum's.
        hit_rate_lookups: share of `lookups` whose row was resident when its batch was planned.
        rows_per_batch: `rows_fetched` over `batches`.
        over_optimum: `rows_fetched` over those of the optimum with as many slots.
        mean_window: batches that a plan looked at, on average. No policy looks ahead before the cache is full.
        longest_window: most batches that a plan looked at.
        bytes_per_step: `rows_fetched` and `rows_written_back` in bytes, over `batches`; None without the size of a row.
        error: why there is no result: the capacity is too small for one batch.
    """

    policy: str
    capacity: int | str
    slots: int
    window: int | str
    batches: int
    lookups: int
    unique_rows: int
    rows_fetched: int | None = None
    rows_warmed: int | None = None
    rows_written_back: int | None = None
    hit_rate_rows: float | None = None
    hit_rate_lookups: float | None = None
    rows_per_batch: float | None = None
    over_optimum: float | None = None
    mean_window: float | None = None
    longest_window: int | None = None
    bytes_per_step: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class _Run:
    """What the planner did: unique, fetched and written rows and batches looked at, `int64[batches]` each."""

    unique: np.ndarray
    fetched: np.ndarray
    written: np.ndarray
    window: np.ndarray
    lookup_hits: int
    rows_warmed: int


def _replay(
    trace: Trace,
    batch_size: int,
    slots: int,
    policy: Policy,
    window: Window,
    max_window: int,
    advance: Callable[[], Any],
) -> _Run:
    """Plans the whole trace; calls `advance` after each batch."""
    # As `LookAhead` starts: the hottest rows count as the most recently used ones.
    warm = policy.warm_keys(trace.group, slots)[::-1]
    resident = (warm, np.arange(len(warm)), np.zeros(len(warm), np.int64)) if len(warm) else None
    planner = LookAheadPlanner(
        trace.group, min(slots, trace.rows), policy, window, max_window, memory=REMEMBERED_BATCHES, resident=resident
    )
    source = trace.batches(batch_size)
    ahead: deque[np.ndarray] = deque()
    figures, hits = [], 0
    while True:
        while planner.wants_batch() and (batch := next(source, None)) is not None:
            ahead.append(planner.observe(*batch).occurrences)
        if not planner.ahead:
            break
        looked_at = planner.ahead
        planned, occurrences = planner.plan(), ahead.popleft()
        figures.append((len(occurrences), len(planned.missed), len(planned.victims), looked_at))
        hits += int(occurrences.sum()) - int(occurrences[planned.missed].sum())
        advance()
    unique, fetched, written, window_of = np.array(figures, np.int64).T
    return _Run(unique, fetched, written, window_of, hits, len(warm))


def simulate(
    trace: Trace | str | os.PathLike[str] | Iterable[Any],
    batch_size: int,
    capacities: Sequence[int | str],
    policies: Sequence[str | Policy] | None = None,
    windows: Sequence[int] = (),
    *,
    row_bytes: int | None = None,
    max_window: int = 1024,
    progress: bool = False,
) -> list[Record]:
    """Plans a trace with each policy at each capacity, and with the two bounds.

    Every run uses `LookAheadPlanner` as training does. Memory is that of the trace and of one planner: up to 150 bytes
    for each row in a slot or in the window, and 16 to 28 for each unique row of a batch in the window. The window of
    the optimum is the whole trace.

    Args:
        trace: a trace, or what `load_trace` reads one from.
        batch_size: samples of a batch. The last samples make a smaller batch.
        capacities: slots, each a number of rows or a share such as "5%", rounded up: of the rows that the tables were
            declared to hold, as with `LookAhead(slots="5%")`, or if they were not, of the distinct rows of the trace.
        policies: names or policies; all of `POLICIES` by default. The counts of those named are the lookups in
            the trace; counts in a policy are by id, as for training.
        windows: numbers of batches; policies that leave the window open, which run with "auto", run with these as well.
        row_bytes: bytes of a row with its optimizer state, for `Record.bytes_per_step`.
        max_window: most batches that "auto" looks at.
        progress: whether to show a bar on a terminal, if tqdm is there.

    Returns:
        For each capacity in turn the optimum, the policies in their order, each with "auto" before the `windows`, and
        the unbounded cache. At a capacity too small for a batch all but the last have an `error`.

    Raises:
        ValueError, TypeError: for arguments that are not as above, or a trace that `load_trace` refuses.

    >>> trace = load_trace([{"user": [1, 2]}, {"user": [3, 1]}, {"user": [2, 1]}])
    >>> for record in simulate(trace, 2, [2], ["lookahead", "no_cache"]):
    ...     print(record.policy, record.window, record.slots, record.rows_fetched, record.hit_rate_rows)
    optimum all 2 4 0.3333333333333333
    lookahead auto 2 4 0.3333333333333333
    no_cache 1 2 6 0.0
    unbounded 1 3 3 0.5
    """
    trace = trace if isinstance(trace, Trace) else load_trace(trace)
    _check_positive(batch_size=batch_size, max_window=max_window, row_bytes=1 if row_bytes is None else row_bytes)
    for number in windows:
        _check_positive(windows=number)
    slots_of = [_slots(capacity, trace) for capacity in capacities]
    chosen: list[tuple[Policy, Window]] = []
    for name in POLICIES if policies is None else policies:
        policy = _policy(name, trace)
        wanted: list[Window] = ["auto", *windows] if policy.window is None else [policy.window]
        chosen += [(policy, window) for window in wanted]

    optimum = dataclasses.replace(policies_.lookahead(), name=OPTIMUM)
    unbounded = dataclasses.replace(policies_.lookahead(), name=UNBOUNDED)
    runs = 1 + len(slots_of) * (1 + len(chosen))
    with _bar(runs * -(-trace.samples // batch_size), progress) as advance:

        def run(policy: Policy, slots: int, window: Window) -> _Run:
            return _replay(trace, batch_size, slots, policy, window, max_window, advance)

        whole = run(unbounded, trace.rows, 1)
        records = []
        for capacity, slots in zip(capacities, slots_of, strict=True):
            least: int | None = None
            for policy, window in [(optimum, "all"), *chosen]:
                if slots < whole.unique.max():
                    record = _record(policy, capacity, slots, window, trace, whole)
                    too_small = f"a batch has {whole.unique.max():,} unique rows and needs as many slots"
                    records.append(dataclasses.replace(record, error=too_small))
                    continue
                result = run(policy, slots, window)
                least = least or int(result.fetched.sum())
                record = _record(policy, capacity, slots, window, trace, whole)
                records.append(_completed(record, result, least, row_bytes))
            record = _record(unbounded, capacity, trace.rows, 1, trace, whole)
            records.append(_completed(record, whole, least, row_bytes))
    return records


def _record(policy: Policy, capacity: int | str, slots: int, window: Window, trace: Trace, whole: _Run) -> Record:
    batches, unique_rows = len(whole.unique), int(whole.unique.sum())
    return Record(policy.name, capacity, slots, window, batches, trace.lookups, unique_rows)


def _completed(record: Record, run: _Run, least: int | None, row_bytes: int | None) -> Record:
    fetched, written = run.rows_warmed + int(run.fetched.sum()), int(run.written.sum())
    return dataclasses.replace(
        record,
        rows_fetched=fetched,
        rows_warmed=run.rows_warmed,
        rows_written_back=written,
        hit_rate_rows=(record.unique_rows - int(run.fetched.sum())) / record.unique_rows,
        hit_rate_lookups=run.lookup_hits / record.lookups,
        rows_per_batch=fetched / record.batches,
        over_optimum=fetched / least if least else None,
        mean_window=float(run.window.mean()),
        longest_window=int(run.window.max()),
        bytes_per_step=(fetched + written) * row_bytes / record.batches if row_bytes else None,
    )


def _policy(policy: str | Policy, trace: Trace) -> Policy:
    """The policy for the trace's numbers of rows."""
    if isinstance(policy, Policy):
        if policy.counts is None:
            return policy
        counts = {}
        for table, values in trace.values.items():
            if table not in policy.counts:
                raise ValueError(f"{policy.name}(counts) has no counts of table {table!r} of {trace.source}")
            if len(values) and not 0 <= values[0] <= values[-1] < len(policy.counts[table]):
                raise ValueError(
                    f"{policy.name}(counts) has counts of {len(policy.counts[table]):,} rows for table {table!r}, and "
                    f"{trace.source} has ids from {values[0]} to {values[-1]}: give one count a row"
                )
            counts[table] = policy.counts[table][values]
        return dataclasses.replace(policy, counts=counts)
    if policy not in POLICIES:
        raise ValueError(f"no policy named {policy!r}: the policies are {', '.join(POLICIES)}")
    return POLICIES[policy](trace.counts)


def _slots(capacity: int | str, trace: Trace) -> int:
    rows = trace.rows if trace.declared_rows is None else trace.declared_rows
    slots = rows_of(capacity, rows)
    if slots is None:
        raise ValueError(f'capacity {capacity!r}: expected a number of rows, or a share such as "5%"')
    return slots


def _check_positive(**arguments: Any) -> None:
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name}={value!r}: expected an integer of 1 or more")


@contextlib.contextmanager
def _bar(total: int | None, wanted: bool) -> Iterator[Callable[[], Any]]:
    """A progress bar on a terminal, if one is wanted and tqdm is there; yields what advances it by a batch."""
    try:
        from tqdm import tqdm
    except ImportError:
        wanted = False
    if not wanted:
        yield lambda: None
        return
    with tqdm(total=total, unit=" batches", disable=None, leave=False) as bar:
        yield bar.update


# ---- what a person reads ---------------------------------------------------------------------------------------------


def describe(trace: Trace, batch_size: int) -> str:
    """One line on a trace: how long it is and what shares of rows are shares of.

    >>> print(describe(load_trace([{"user": [1, 2, 1]}]), 2))
    the trace: 3 samples, 2 batches of 2; 3 lookups of 2 distinct rows; 100% = 2 distinct rows
    """
    whole = f"{trace.rows:,} distinct rows" if trace.declared_rows is None else f"{trace.declared_rows:,} declared rows"
    return (
        f"{trace.source}: {trace.samples:,} samples, {-(-trace.samples // batch_size):,} batches of {batch_size:,}; "
        f"{trace.lookups:,} lookups of {trace.rows:,} distinct rows; 100% = {whole}"
    )


def format_table(records: Sequence[Record]) -> str:
    """The records as text, one a line, with one line for a capacity that is too small for a batch.

    >>> trace = load_trace([{"user": [1, 2]}, {"user": [3, 1]}, {"user": [2, 1]}])
    >>> print(format_table(simulate(trace, 2, [2], ["lru"])))
    capacity  slots  policy     window  rows a batch  × optimum  hit rows  hit lookups  written a batch
    2             2  optimum       all           1.3      1.000   33.33 %      33.33 %              0.7
    2             2  lru             1           1.3      1.000   33.33 %      33.33 %              0.7
    2             3  unbounded       1           1.0      0.750   50.00 %      50.00 %              0.0
    """
    sized = any(record.bytes_per_step is not None for record in records)
    head = ["capacity", "slots", "policy", "window", "rows a batch", "× optimum", "hit rows", "hit lookups"]
    lines: list[list[str]] = [[*head, "written a batch", *(["MB a step"] if sized else [])]]
    for record in records:
        capacity = record.capacity if isinstance(record.capacity, str) else f"{record.capacity:,}"
        start = [capacity, f"{record.slots:,}"]
        if record.error is not None:
            if lines[-1][:2] != start:
                lines.append([*start, record.error])
            continue
        figures = [
            (record.rows_per_batch, "{:,.1f}"),
            (record.over_optimum, "{:.3f}"),
            (record.hit_rate_rows, "{:.2%}"),
            (record.hit_rate_lookups, "{:.2%}"),
            ((record.rows_written_back or 0) / record.batches, "{:,.1f}"),
            *([(record.bytes_per_step and record.bytes_per_step / 1e6, "{:,.3f}")] if sized else []),
        ]
        texts = ["" if value is None else form.format(value).replace("%", " %") for value, form in figures]
        lines.append([*start, record.policy, str(record.window), *texts])
    return aligned(lines, left=(0, 2))


def plot(records: Sequence[Record], path: str | os.PathLike[str], title: str = "") -> None:
    """Draws rows fetched a batch, both hit rates and, if a row's size was given, bytes a step against capacity.

    Args:
        records: from `simulate`.
        path: a file that ends in .png or .svg.
        title: a line above the panels.

    Raises:
        ImportError: without matplotlib.
        ValueError: for another suffix, or if no capacity holds a batch.
        OSError: if the file cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install 'jaxcache[simulate]'") from error
    suffix = check_plot_name(path)
    drawn = [record for record in records if record.error is None and record.policy != UNBOUNDED]
    if not drawn:
        raise ValueError(f"no plot {os.fspath(path)}: no capacity holds a batch")
    lines: dict[str, list[Record]] = {}
    for record in sorted(drawn, key=lambda record: record.slots):
        several = len({other.window for other in drawn if other.policy == record.policy}) > 1
        lines.setdefault(f"{record.policy} {record.window}" if several else record.policy, []).append(record)
    colors = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(lines)))
    slots = sorted({record.slots for record in drawn})
    unbounded = next(record for record in records if record.policy == UNBOUNDED)
    panels = {
        "rows_per_batch": "rows fetched a batch",
        "hit_rate_rows": "hit rate of unique rows",
        "hit_rate_lookups": "hit rate of lookups",
    }
    if unbounded.bytes_per_step is not None:
        panels["bytes_per_step"] = "MB a step, both ways"

    # Text stays text, and equal records give equal files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jaxcache", "font.size": 9}):
        grid = (2, 2) if len(panels) == 4 else (1, 3)
        figure = Figure(figsize=(10, 3.2 * grid[0] + 0.8), layout="constrained")
        for axes, (attribute, panel) in zip(figure.subplots(*grid).flat, panels.items(), strict=True):
            unit = 1e-6 if attribute == "bytes_per_step" else 1
            for place, (label, points) in enumerate(lines.items()):
                values = [unit * getattr(point, attribute) for point in points]
                style = {"color": "black", "linestyle": "--", "zorder": 3} if label == OPTIMUM else {}
                style = {"color": colors[place], "marker": "osv^D"[place % 5], "markersize": 3.5} | style
                axes.plot([point.slots for point in points], values, label=label, **style)
            axes.axhline(unit * getattr(unbounded, attribute), color="grey", linestyle=":", label=UNBOUNDED)
            axes.set(title=panel, xlabel="slots", xscale="log", ylim=(0, 1 if "hit" in attribute else None))
            axes.set_xticks(slots, [f"{number:,}" for number in slots])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6)
        if title:
            figure.suptitle(title)
        figure.savefig(path, format=suffix, metadata={"Date": None} if suffix == "svg" else {"Software": None})


def check_plot_name(path: str | os.PathLike[str]) -> str:
    """The format of a plot by its file's name, "png" or "svg". Raises ValueError for another one."""
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix not in ("png", "svg"):
        raise ValueError(f"a plot is a file that ends in .png or .svg, got {os.fspath(path)}")
    return suffix


# ---- from a budget to slots and window -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A point of the miss curve that `size` reads: look-ahead with so many slots and so long a window.

    Attributes:
        slots: rows that the cache holds.
        window: batches that a plan looks at, its own included.
        rows_fetched: mean rows fetched a step, over the batches that are judged.
        rows_moved: mean rows fetched and written back a step.
        rows_moved_high: the percentile of rows fetched and written back by the batches.
        fits: whether both carry in a step's time; True without a bandwidth.
    """

    slots: int
    window: int
    rows_fetched: float
    rows_moved: float
    rows_moved_high: float
    fits: bool


@dataclass(frozen=True)
class Size:
    """The answer of `size`.

    Attributes:
        slots: slots to ask for; None if nothing keeps the step fed.
        window: window to ask for; None if nothing keeps the step fed.
        device_bytes: bytes of so many slots on the device.
        answer: the answer in a sentence or two: what to ask for, or why nothing suffices and what would.
        percentile: of the batches, for `Point.rows_moved_high`.
        batches: batches that were judged, those after the warm-up.
        rows_a_step: rows that the link carries in a step's time, both ways together; None without a bandwidth.
        curve: all that was tried, by slots and window.
    """

    slots: int | None
    window: int | None
    device_bytes: int | None
    answer: str
    percentile: float
    batches: int
    rows_a_step: float | None
    curve: tuple[Point, ...]

    def __str__(self) -> str:
        high = f"p{self.percentile:g}"
        lines = [["slots", "window", "fetched a step", "moved a step", f"moved, {high}"]]
        lines[0] += ["fits"] * (self.rows_a_step is not None)
        for point in self.curve:
            figures = (point.rows_fetched, point.rows_moved, point.rows_moved_high)
            lines.append([f"{point.slots:,}", f"{point.window:,}", *(f"{rows:,.1f}" for rows in figures)])
            lines[-1] += ["yes" if point.fits else "no"] * (self.rows_a_step is not None)
        return "\n".join([*([aligned(lines)] if self.curve else []), self.answer])


def size(
    trace: Trace | str | os.PathLike[str] | Iterable[Any],
    batch_size: int,
    row_bytes: int,
    *,
    device_memory: float | None = None,
    bandwidth: float | None = None,
    step_time: float | None = None,
    percentile: float = 99.0,
    warmup_batches: int | None = None,
    max_window: int = 1024,
    progress: bool = False,
) -> Size:
    """The smallest slots and window that keep the step fed, by planning the trace with look-ahead.

    A step is fed if the rows that it fetches and those that it writes back cross the link in the time of a step, on
    average and in all but the worst batches. Both ways share the bandwidth, which errs on the safe side: a full-duplex
    link carries up to twice as much. What is counted is rows; leave headroom for padding, as an exchange is padded to
    a size class of at most twice its rows.

    With a bandwidth the smallest slots are found to 1 %, looking `max_window` batches ahead, and then the shortest
    window with which those suffice. With a budget of memory alone slots are what fits, and the window is the shortest
    that moves at most 1 % more rows than the longest.

    Args:
        trace: a trace, or what `load_trace` reads one from.
        batch_size: samples of a batch.
        row_bytes: bytes of a row with its optimizer state, such as 4 * (16 + 1) for 16 weights and row-wise adagrad.
        device_memory: bytes of the device for the cache: a slot takes `row_bytes` and 17 more.
        bandwidth: bytes a second between host and device; goes with `step_time`.
        step_time: seconds of a step.
        percentile: share of the batches that must be fed, in percent.
        warmup_batches: batches at the start that are planned and not judged, as an empty cache has to be filled
            whatever its size; by default the first fifth.
        max_window: longest window.
        progress: whether to show a count of batches on a terminal, if tqdm is there.

    Raises:
        ValueError, TypeError: for arguments that are not as above, or a trace that `load_trace` refuses.

    >>> batches = [{"user": [user, user + 1]} for user in range(100)]
    >>> result = size(batches, 2, row_bytes=64, bandwidth=12_800, step_time=0.01)
    >>> result.slots, result.window, result.curve[0].rows_moved
    (2, 1, 2.0)
    """
    trace = trace if isinstance(trace, Trace) else load_trace(trace)
    _check_positive(batch_size=batch_size, row_bytes=row_bytes, max_window=max_window)
    if device_memory is None and bandwidth is None:
        raise ValueError("size needs a budget: device_memory=, or bandwidth= and step_time=")
    if (bandwidth is None) != (step_time is None):
        raise ValueError("size(bandwidth=..., step_time=...): each needs the other")
    for name, value in (("device_memory", device_memory), ("bandwidth", bandwidth), ("step_time", step_time)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"size({name}={value!r}): expected a positive number")
    if not 0 < percentile <= 100:
        raise ValueError(f"size(percentile={percentile!r}): expected a number above 0, at most 100")
    batches = -(-trace.samples // batch_size)
    skipped = batches // 5 if warmup_batches is None else warmup_batches
    if not 0 <= skipped < batches:
        raise ValueError(
            f"size(warmup_batches={skipped}): the trace has {batches} batches, and one must be left to judge"
        )
    capacity = None if bandwidth is None or step_time is None else bandwidth * step_time / row_bytes
    longest = min(max_window, batches)
    points: dict[tuple[int, int], Point] = {}

    with _bar(None, progress) as advance:

        def replay(slots: int, window: int) -> _Run:
            return _replay(trace, batch_size, slots, policies_.lookahead(), window, max_window, advance)

        def at(slots: int, window: int = longest) -> Point:
            if (slots, window) not in points:
                run = replay(slots, window)
                fetched, moved = run.fetched[skipped:], (run.fetched + run.written)[skipped:]
                mean, high = float(moved.mean()), float(np.percentile(moved, percentile))
                fits = capacity is None or max(mean, high) <= capacity
                points[slots, window] = Point(slots, window, float(fetched.mean()), mean, high, fits)
            return points[slots, window]

        def answer(text: str, slots: int | None = None, window: int | None = None) -> Size:
            curve = tuple(points[key] for key in sorted(points))
            taken = None if slots is None else slots * (row_bytes + SLOT_BYTES)
            return Size(slots, window, taken, text, percentile, batches - skipped, capacity, curve)

        least = int(replay(trace.rows, 1).unique.max())
        most = trace.rows if device_memory is None else min(trace.rows, int(device_memory // (row_bytes + SLOT_BYTES)))
        if most < least:
            return answer(
                f"None: the budget holds {most:,} slots, and a batch has {least:,} unique rows and needs as many: "
                f"take {least * (row_bytes + SLOT_BYTES):,} bytes or more, or smaller batches"
            )
        if not at(most).fits:
            point = at(most)
            share = max(point.rows_moved, point.rows_moved_high) / (capacity or 1)
            more = ", or more memory" if most < trace.rows and at(trace.rows).fits else ""
            which = "all rows of the trace" if most == trace.rows else "what the memory holds"
            return answer(
                f"None: with {most:,} slots, {which}, {_moves(point, percentile)}, and the link carries "
                f"{capacity:,.0f}: take {share:.2f} times the bandwidth or step time{more}"
            )
        if capacity is None:
            slots = most
            for part in (2, 4, 8):
                at(max(least, slots // part))
            enough = at(slots).rows_moved * (1 + _PRECISION)
            window = _smallest(1, longest, lambda window: at(slots, window).rows_moved <= enough)
        else:
            slots = _smallest(least, most, lambda slots: at(slots).fits, _PRECISION)
            window = _smallest(1, longest, lambda window: at(slots, window).fits)
        point = at(slots, window)
        text = (
            f"slots={slots}, window={window}: {slots * (row_bytes + SLOT_BYTES) / 1e6:,.1f} MB on the device, "
            f"{_moves(point, percentile)}"
        )
        if capacity is not None:
            text += f", of {capacity:,.0f} that the link carries"
        if point.rows_moved == point.rows_fetched:
            text += "; nothing is evicted: take a longer trace, if the run is longer"
        return answer(text, slots, window)


def _moves(point: Point, percentile: float) -> str:
    return f"a step moves {point.rows_moved:,.0f} rows on average, {point.rows_moved_high:,.0f} at p{percentile:g}"


def _smallest(low: int, high: int, fits: Callable[[int], bool], precision: float = 0.0) -> int:
    """The smallest number from `low` to `high` that fits, at most `precision` too large. `high` fits."""
    if fits(low):
        return low
    while high - low > max(1, precision * low):
        middle = min(max(math.isqrt(low * high), low + 1), high - 1)
        if fits(middle):
            high = middle
        else:
            low = middle
    return high
