"""The command `jaxcache`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jaxcache import kernels
from jaxcache.inspection import describe_checkpoint, format_checkpoint
from jaxcache.saved_tables import SavedTables
from jaxcache.simulate import POLICIES, UNBOUNDED, check_plot_name, describe, format_table, plot, simulate, size
from jaxcache.traces import FORMATS, Trace, load_trace


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv`, that of the process by default, and returns the exit status.

    0, or 1 if `size` finds that nothing keeps the step fed. Arguments or files that cannot be used end in one line on
    the standard error and SystemExit with status 2.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except (OSError, ValueError, TypeError, ImportError, MemoryError, OverflowError, NotImplementedError) as error:
        parser.exit(2, f"jaxcache {arguments.command}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxcache", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")

    text = "what each policy fetches for a trace, at each capacity, found by the planner itself"
    add = _trace_command(commands, "simulate", _simulate, text)
    add("--capacity", nargs="+", required=True, type=_capacities, metavar="C", help="rows, or shares such as 5%%")
    add("--policy", nargs="+", type=_words, metavar="P", help=f"of {', '.join(POLICIES)}; all by default")
    add("--windows", nargs="+", type=_windows, metavar="N", help="look ahead so many batches as well, such as 2 8 32")
    add("--row-bytes", type=_positive, metavar="N", help="bytes of a row with its optimizer state: shows bytes a step")
    add("--plot", type=Path, metavar="FILE", help="draw the curves, .png or .svg")
    add("--json", type=Path, metavar="FILE", help="write the records")

    text = "the smallest slots and window that keep the step fed, for a budget of memory or bandwidth"
    add = _trace_command(commands, "size", _size, text)
    add("--row-bytes", required=True, type=_positive, metavar="N", help="bytes of a row with its optimizer state")
    add("--device-memory", type=quantity("B"), metavar="BYTES", help="for the cache, such as 4GB or 4GiB")
    add("--bandwidth", type=quantity("B/s"), metavar="RATE", help="of the link, both ways together, such as 20GB/s")
    add("--step-time", type=quantity("s"), metavar="TIME", help="of a step, such as 5ms")
    add("--percentile", type=float, default=99.0, metavar="P", help="share of the batches to feed (%(default)g)")
    add("--warmup-batches", type=_count, metavar="N", help="not judged at the start; a fifth of the trace")
    add("--json", type=Path, metavar="FILE", help="write the answer and the curve")

    text = "which backend gathers, updates and exchanges rows on this machine's device, and why"
    add = _command(commands, "kernels", _kernels, text)
    text = "as LookAhead(backends=...) takes it, such as gather=mosaic,update=xla"
    add("--backends", metavar="B", help=text)

    text = "what a checkpoint of tables holds: tables, rows touched, optimizer, cache, sizes"
    add = _command(commands, "inspect", _inspect, text)
    add("checkpoint", metavar="CKPT", help="folder of a step, or of the tables in it")
    add("--json", type=Path, metavar="FILE", help="write the description")

    text = "the weights of a table in a checkpoint as a .npy file, for serving"
    add = _command(commands, "export", _export, text)
    add("checkpoint", metavar="CKPT", help="folder of a step, or of the tables in it")
    add("--table", required=True, metavar="T", help="name of the table")
    add("--rows", type=_range, default=(0, None), metavar="A:B", help="ids from A to B - 1; all by default")
    add("--output", type=Path, metavar="FILE", help="replaced once the new one is complete; T.npy")
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> Callable[..., Any]:
    """A command without arguments; returns what adds one."""
    description = text[0].upper() + text[1:] + "."
    command = commands.add_parser(name, help=text, description=description, allow_abbrev=False)
    command.set_defaults(run=run)
    return command.add_argument


def _trace_command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> Callable[..., Any]:
    """A command with the arguments that all have which read a trace; returns what adds one more."""
    add = _command(commands, name, run, text)
    ends = "; ".join(f"{kind}: {' '.join(ends)}" for kind, ends in FORMATS.items())
    add("trace", type=Path, help=f"file with the ids ({ends})")
    add("--batch-size", required=True, type=_positive, metavar="B", help="samples of a batch")
    add("--format", choices=FORMATS, help="of the trace, if its name does not tell")
    add("--columns", nargs="+", type=_words, metavar="C", help="features to read, all by default")
    add("--share", nargs="+", type=_words, action="append", default=[], metavar="C", help="these share a table")
    add("--samples", type=_positive, metavar="N", help="read the first N samples")
    add("--max-window", type=_positive, default=1024, metavar="N", help="longest window (%(default)s batches)")
    return add


def _trace(arguments: argparse.Namespace) -> Trace:
    tables: dict[str, str] = {}
    for group in arguments.share:
        names = _flat(group)
        if again := [name for name in names if name in tables]:
            raise ValueError(f"--share names {again[0]!r} twice: name all features that share a table at once")
        tables |= dict.fromkeys(names, "+".join(names))
    trace = load_trace(
        arguments.trace,
        format=arguments.format,
        columns=None if arguments.columns is None else _flat(arguments.columns),
        samples=arguments.samples,
        tables=tables,
    )
    print(describe(trace, arguments.batch_size), flush=True)
    return trace


def _simulate(arguments: argparse.Namespace) -> int:
    if arguments.plot:
        check_plot_name(arguments.plot)
    for path in filter(None, (arguments.plot, arguments.json)):
        _check_folder(path)
    records = simulate(
        _trace(arguments),
        arguments.batch_size,
        _flat(arguments.capacity),
        None if arguments.policy is None else _flat(arguments.policy),
        _flat(arguments.windows or []),
        row_bytes=arguments.row_bytes,
        max_window=arguments.max_window,
        progress=True,
    )
    print(format_table(records))
    if arguments.json:
        _write_json(arguments.json, [dataclasses.asdict(record) for record in records])
    if arguments.plot and all(record.error for record in records if record.policy != UNBOUNDED):
        print(f"no plot {arguments.plot}: no capacity holds a batch", file=sys.stderr)
    elif arguments.plot:
        plot(records, arguments.plot, title=f"{arguments.trace.name}, batches of {arguments.batch_size:,}")
    return 0


def _size(arguments: argparse.Namespace) -> int:
    if arguments.json:
        _check_folder(arguments.json)
    answer = size(
        _trace(arguments),
        arguments.batch_size,
        arguments.row_bytes,
        device_memory=arguments.device_memory,
        bandwidth=arguments.bandwidth,
        step_time=arguments.step_time,
        percentile=arguments.percentile,
        warmup_batches=arguments.warmup_batches,
        max_window=arguments.max_window,
        progress=True,
    )
    print(answer)
    if arguments.json:
        _write_json(arguments.json, dataclasses.asdict(answer))
    return 0 if answer.slots else 1


def _kernels(arguments: argparse.Namespace) -> int:
    print(kernels.describe(arguments.backends))
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    if arguments.json:
        _check_folder(arguments.json)
    about = describe_checkpoint(SavedTables(arguments.checkpoint))
    print(format_checkpoint(about))
    if arguments.json:
        _write_json(arguments.json, about)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    path = arguments.output or Path(quote(arguments.table, safe="") + ".npy")
    _check_folder(path)
    saved = SavedTables(arguments.checkpoint)
    if arguments.table not in saved:
        raise ValueError(f"--table: no table named {arguments.table!r}: checkpoint {saved.path} has {', '.join(saved)}")
    size = saved[arguments.table].save(path, *arguments.rows)
    print(f"table {arguments.table!r} as of step {saved.step:,} -> {path}, {size:,} bytes")
    return 0


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def _check_folder(path: Path) -> None:
    """So that a mistake in the name of a result does not cost the run."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} for {path.name}")


def _flat(groups: Sequence[Sequence[Any]]) -> list[Any]:
    return [item for group in groups for item in group]


def _words(text: str) -> list[str]:
    words = [word for word in text.split(",") if word]
    if not words:
        raise argparse.ArgumentTypeError(f"expected one or more, separated by commas, got {text!r}")
    return words


def _positive(text: str) -> int:
    if not re.fullmatch("[0-9]+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of 1 or more, got {text!r}")
    return int(text)


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _windows(text: str) -> list[int]:
    return [_positive(word) for word in _words(text)]


def _capacities(text: str) -> list[int | str]:
    for word in _words(text):
        if not re.fullmatch(r"[0-9]+|[0-9]*\.?[0-9]+%", word):
            raise argparse.ArgumentTypeError(f"expected rows or a share such as 1.5%, got {word!r}")
    return [word if word.endswith("%") else int(word) for word in _words(text)]


def _range(text: str) -> tuple[int, int | None]:
    found = re.fullmatch("([0-9]*):([0-9]*)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"expected ids A:B, such as 0:1000, got {text!r}")
    return int(found[1] or 0), int(found[2]) if found[2] else None


_UNITS = {
    "B": {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
    | {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40},
    "s": {"s": 1, "ms": 1e-3, "us": 1e-6},
}
_UNITS["B/s"] = {f"{unit}/s": factor for unit, factor in _UNITS["B"].items() if unit}


def quantity(unit: str) -> Callable[[str], float]:
    """What reads a quantity in bytes ("B"), bytes a second ("B/s") or seconds ("s").

    >>> quantity("B/s")("20GB/s")
    20000000000.0
    """
    units = _UNITS[unit]

    def parse(text: str) -> float:
        found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(.*)", text)
        if not found or found[2] not in units or not float(found[1]):
            raise argparse.ArgumentTypeError(
                f"expected a number with one of {', '.join(filter(None, units))}, got {text!r}"
            )
        return float(found[1]) * units[found[2]]

    return parse
