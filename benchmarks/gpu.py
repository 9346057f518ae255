"""Everything there is to know about the project on a GPU: checks first, then measurements, in one command.

    python benchmarks/gpu.py --json gpu.json                              # everything, in 8 minutes
    python benchmarks/gpu.py --sections policies --minutes 9              # one section with all the time
    python benchmarks/gpu.py --tiny                                       # tries the program, on a CPU too

Each section runs in a process of its own: what one of them does to the device, or a kernel that never ends, harms no
other, and each starts with the device's memory to itself. The time is shared out beforehand, and what a section leaves
goes to those behind it; one that has too little leaves something out and says so. Results are written after every
section. The exit status is 1 if a check failed or a section broke off.

Sections: `device`; `correctness` of every backend against the definition on the CPU; `twins`, the same training with
and without a cache; `operations`, each against a plain copy and plain JAX; `pipeline`, whole train steps against every
row on the device and no planner, with transfers and planning alone; `policies`, in the setting of ScratchPipe;
`on-demand`; `peers`, PyTorch with the same shapes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from on_gpu import TWINS

BACKENDS = ("triton", "mosaic", "xla")
GRACE = 20  # seconds that a section may take beyond its share before it is ended


@dataclass(frozen=True)
class Section:
    """A section.

    Attributes:
        function: its place, in the folder on_gpu.
        share: of the time, in parts.
        least: seconds without which it is left out.
        shares_device: whether it takes only the device memory that it needs, instead of reserving most.
    """

    function: str
    share: float
    least: float = 10
    shares_device: bool = False


SECTIONS = {
    "device": Section("checks.device", 15, 0),
    "correctness": Section("checks.correctness", 60, shares_device=True),
    "twins": Section("checks.twins", 80, shares_device=True),
    "operations": Section("operations.operations", 140, 20),
    "pipeline": Section("pipeline.pipeline", 120, 20),
    "policies": Section("policies.policies", 130, 20),
    "on-demand": Section("pipeline.on_demand", 60, 20),
    "peers": Section("peers.peers", 50, 15, shares_device=True),
}


@dataclass
class Part:
    """A process: a section, or one variant of it."""

    section: str
    variant: str = ""
    flags: str = ""
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.section + (f" ({self.variant})" if self.variant else "")


def parts_of(section: str, options: argparse.Namespace, device: dict[str, Any]) -> Iterator[list[Part]]:
    """The processes of a section: those of a list run at the same time."""
    if section == "correctness":
        for backend in options.backends:
            reason = device.get("obstacles", {}).get(backend)
            if reason is None:
                yield [Part(section, backend)]
            else:
                print(f"\n=== correctness ({backend})\nrefused: {backend} {reason}", flush=True)
    elif section == "twins":
        names = ["ours"] if device.get("platform") == "cpu" else list(TWINS)
        yield [Part(section, name, TWINS[name][1]) for name in names]
    else:
        yield [Part(section)]


def start(part: Part, options: argparse.Namespace, until: float, folder: Path, shared: bool) -> tuple[Any, Path, Path]:
    """Starts a process; what it prints goes to a file if it shares the screen with others."""
    out = folder / f"{part.name}.json"
    printed = folder / f"{part.name}.txt"
    command = [sys.executable, str(Path(__file__).resolve()), "--part", part.section, "--variant", part.variant]
    command += ["--until", str(until), "--json", str(out), "--backends", ",".join(options.backends)]
    command += ["--tiny"] * options.tiny + (["--profile", str(options.profile)] if options.profile else [])
    environment = dict(os.environ)
    if part.flags:
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {part.flags}".strip()
    platforms = environment.get("JAX_PLATFORMS")
    if platforms and "cpu" not in platforms:
        environment["JAX_PLATFORMS"] = f"{platforms},cpu"  # which computes what is expected
    if SECTIONS[part.section].shares_device:
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    root = str(Path(__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    screen = printed.open("w") if shared else None
    process = subprocess.Popen(
        command, env=environment, stdout=screen, stderr=subprocess.STDOUT if shared else None, start_new_session=True
    )
    return process, out, printed


def run_parts(parts: list[Part], options: argparse.Namespace, limit: float, folder: Path) -> None:
    """Runs processes side by side and takes up their results; ends those that do not end by themselves."""
    until, shared = time.time() + limit, len(parts) > 1
    running = [(part, *start(part, options, until, folder, shared)) for part in parts]
    try:
        for part, process, out, printed in running:
            print(f"\n=== {part.name}", flush=True)
            began, ended = time.time(), None
            try:
                process.wait(max(until + GRACE - time.time(), 0.1))
            except subprocess.TimeoutExpired:
                ended = f"{part.name} was ended, for it took {GRACE} s more than its {limit:.0f} s"
            if ended is None and process.returncode not in (0, 1):
                ended = f"{part.name} broke off with status {process.returncode}"
            _end(process)
            if shared:
                print(printed.read_text().rstrip(), flush=True)
            found = json.loads(out.read_text()) if out.exists() else {"records": [], "failures": [], "skipped": []}
            if ended is not None:
                print(f"FAILED: {ended}", flush=True)
                found["failures"].append(ended)
            part.results = {"variant": part.variant, "seconds": time.time() - began, **found}
    finally:
        for _, process, *_ in running:
            _end(process)


def _end(process: Any) -> None:
    """Ends a process and those that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_part(options: argparse.Namespace) -> int:
    """The inside of a process."""
    from on_gpu.run import Run

    run = Run(options.json, options.until, options.tiny, options.backends, options.variant, options.profile)
    module, function = SECTIONS[options.part].function.split(".")
    try:
        getattr(importlib.import_module(f"on_gpu.{module}"), function)(run)
    except Exception:
        run.fail(f"{options.part} broke off\n{traceback.format_exc()}")
    run.flush()
    return int(bool(run.results["failures"]))


def run_all(options: argparse.Namespace) -> int:
    finish = time.time() + 60 * options.minutes
    results: dict[str, Any] = {"options": {key: str(value) for key, value in vars(options).items()}, "sections": {}}
    device: dict[str, Any] = {}
    names = [name for name in SECTIONS if name in options.sections or name == "device"]  # the others ask it
    with tempfile.TemporaryDirectory() as folder:
        for place, name in enumerate(names):
            found = results["sections"][name] = []
            for parts in parts_of(name, options, device):
                # A section of several processes, one after the other, has its share for each.
                share = SECTIONS[name].share
                limit = (finish - time.time()) * share / (share + sum(SECTIONS[n].share for n in names[place + 1 :]))
                if limit < SECTIONS[name].least and not options.tiny:
                    left = f"{parts[0].name}: {limit:.0f} s are left for it and it needs {SECTIONS[name].least:.0f}"
                    print(f"\n=== {parts[0].name}\nleft out: {left}; give --minutes more", flush=True)
                    found.append({"records": [], "failures": [], "skipped": [left]})
                    continue
                run_parts(parts, options, limit, Path(folder))
                found += [part.results for part in parts]
                if options.json:
                    options.json.write_text(json.dumps(results, indent=2) + "\n")
            if name == "device" and found[0]["records"]:
                device = found[0]["records"][0]
    return print_summary(results, options)


def print_summary(results: dict[str, Any], options: argparse.Namespace) -> int:
    print("\n=== summary")
    failures = [what for found in results["sections"].values() for part in found for what in part["failures"]]
    for name, found in results["sections"].items():
        for part in found:
            variant = f" ({part['variant']})" if part.get("variant") else ""
            state = "FAILED" if part["failures"] else "ok" if part["records"] else "nothing measured"
            left = f", {len(part['skipped'])} left out" if part["skipped"] else ""
            print(f"{part.get('seconds', 0):6.0f} s  {name}{variant}: {state}{left}")
    for what in failures:
        print(f"FAILED: {what.splitlines()[0]}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return int(bool(failures))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )

    def names(known):
        def parse(text):
            chosen = tuple(filter(None, text.replace(" ", "").split(",")))
            if unknown := [name for name in chosen if name not in known]:
                raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
            return chosen

        return parse

    parser.add_argument("--sections", type=names(SECTIONS), default=tuple(SECTIONS), help="some of them, a,b")
    parser.add_argument("--minutes", type=float, default=8, help="for everything (8)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the results there")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="leaves a profiler's trace of some steps there")
    parser.add_argument("--backends", type=names(BACKENDS), default=BACKENDS, help="some of triton,mosaic,xla")
    parser.add_argument("--tiny", action="store_true", help="sizes that only try the program")
    parser.add_argument("--part", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--variant", default="", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error("--minutes must be positive")
    return run_part(options) if options.part else run_all(options)


if __name__ == "__main__":
    sys.exit(main())
