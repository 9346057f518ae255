"""What the training scripts share: progress bar, evaluation, figures, flags."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import jaxcache as jc
from dlrm import auc

STEPS_BETWEEN_FIGURES = 10


class DenseState(NamedTuple):
    """The model's own parameters and their optimizer's state: what does not live in tables."""

    parameters: nnx.State
    optimizer_state: optax.OptState


class Steps(NamedTuple):
    """The jitted functions of a model. B is the number of samples of a batch, padding included."""

    train: Callable[..., tuple[jc.CacheState, DenseState, jax.Array]]
    predict: Callable[..., jax.Array]


class Progress:
    """A bar with the figures of the last few steps, and the speed from the second step on.

    The first step is left out of the speed because it compiles. Only losses of some steps ago are
    fetched, which are there already: fetching the newest one would wait for its step.
    """

    def __init__(self, ahead: jc.LookAhead, steps: int, batch_size: int, samples: int) -> None:
        """`steps` batches are to come, of `batch_size` samples but for shorter ones, and of `samples` in all."""
        self._ahead, self._total_steps, self._batch_size, self._samples = ahead, steps, batch_size, samples
        self._bar = tqdm(total=steps, unit="step", dynamic_ncols=True)
        self._steps, self._report = 0, ahead.report()
        self._start = self._last = time.perf_counter()
        self._loss: jax.Array | None = None
        self._fetchable: jax.Array | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self, loss: jax.Array) -> None:
        """Count a step and take its loss, float32 []."""
        self._steps, self._loss = self._steps + 1, loss
        if self._steps == 1 and self._total_steps > 1:
            jax.block_until_ready(loss)
            self._start = self._last = time.perf_counter()
        if self._steps % STEPS_BETWEEN_FIGURES == 0:
            self._show()

    def finish(self) -> tuple[float, float]:
        """Wait for the last step and return its loss and the samples per second."""
        loss = float("nan") if self._loss is None else float(self._loss)
        seconds = time.perf_counter() - self._start
        self._show()
        samples = self._samples
        if self._total_steps > 1:
            samples -= self._batch_size
        return loss, samples / seconds

    def _show(self) -> None:
        before, report, now = self._report, self._ahead.report(), time.perf_counter()
        steps = report.steps - before.steps
        if not steps:
            return
        unique_rows = report.unique_rows - before.unique_rows
        fetched = report.rows_fetched - before.rows_fetched
        written_back = report.rows_written_back - before.rows_written_back
        figures = {
            "samples/s": f"{steps * self._batch_size / (now - self._last):,.0f}",
            "hit rate": f"{1 - fetched / unique_rows:.1%}",
            "rows in": f"{fetched / steps:,.0f}",
            "rows out": f"{written_back / steps:,.0f}",
        }
        if self._fetchable is not None:
            figures = {"loss": f"{float(self._fetchable):.4f}", **figures}
        self._bar.set_postfix(figures, refresh=False)
        self._bar.update(self._steps - self._bar.n)
        self._report, self._last, self._fetchable = report, now, self._loss


def evaluate(
    ahead: jc.LookAhead,
    cache: jc.CacheState,
    batches: Iterable[dict[str, Any]],
    predict: Callable[[jc.CacheState, jc.Plan, dict[str, Any]], jax.Array],
) -> tuple[jc.CacheState, float, float | None]:
    """Return the flushed cache, the AUC over `batches`, and the planted model's where there is one.

    `predict` maps a cache, a plan and a batch to scores [B].
    """

    def eval_step(view: jc.CacheState, plan: jc.Plan, batch: dict[str, Any]) -> dict[str, Any]:
        known = ("label", "planted") if "planted" in batch else ("label",)
        return {"scores": predict(view, plan, batch), "mask": plan.mask} | {name: batch[name] for name in known}

    cache, outputs = ahead.evaluate(batches, cache, eval_step)
    columns = {name: np.concatenate([np.asarray(output[name]) for output in outputs]) for name in outputs[0]}
    valid = columns.pop("mask")
    columns = {name: column[valid] for name, column in columns.items()}
    ceiling = auc(columns["planted"], columns["label"]) if "planted" in columns else None
    return cache, auc(columns["scores"], columns["label"]), ceiling


def summarise(
    report: jc.Report, last_loss: float, samples_per_second: float, test_auc: float, ceiling: float | None
) -> dict[str, Any]:
    """Print the figures of a run and return them as `write_summary` writes them."""
    print(f"\n{report}\n")
    print(f"loss of the last step {last_loss:.4f}, {samples_per_second:,.0f} samples/s")
    print(f"bytes on the device {report.device_bytes:,}, of the whole tables {report.table_bytes:,}")
    print(
        f"test AUC {test_auc:.4f}"
        + (f", ceiling (the planted model's own AUC) {ceiling:.4f}" if ceiling is not None else "")
    )
    return {
        "steps": report.steps,
        "loss": last_loss,
        "auc": test_auc,
        "ceiling": ceiling,
        "samples_per_second": samples_per_second,
        "hit_rate": report.hit_rate,
        "rows_fetched": report.rows_fetched,
        "rows_written_back": report.rows_written_back,
        "slots": report.slots,
        "device_bytes": report.device_bytes,
        "table_bytes": report.table_bytes,
        "stages": {name: dataclasses.asdict(stage) for name, stage in report.stages.items()},
    }


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Write a summary as JSON."""
    # JSON has no NaN: null stands for it, as for the AUC of labels that are all alike.
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in summary.items()
    }
    path.write_text(json.dumps(finite, indent=2, allow_nan=False) + "\n")


POLICIES = {"lru": jc.lru, "lfu": jc.lfu}


class DispatchProgress:
    """On-demand mode: a line for each dispatch of several steps, and the speed from the second one on.

    The first dispatch is left out of the speed because it compiles.
    """

    def __init__(self, store: jc.HostStore) -> None:
        self._store, self._report, self._loss = store, None, float("nan")
        self._start = self._last = time.perf_counter()
        self._steps, self._first_steps = 0, 0

    def dispatch(self, cache: jc.CacheState, losses: np.ndarray) -> None:
        """Count the steps of a dispatch that is done, with their losses, float32 [steps]."""
        report, now, steps = jc.report(cache, self._store), time.perf_counter(), len(losses)
        self._steps, self._loss = self._steps + steps, float(losses.mean())
        unique_rows, fetched = report.unique_rows, report.rows_fetched
        if self._report is None:
            self._start, self._first_steps = now, steps
        else:
            unique_rows, fetched = unique_rows - self._report.unique_rows, fetched - self._report.rows_fetched
        print(
            f"step {self._steps:5,}: loss {self._loss:.4f}, {steps / (now - self._last):.0f} steps/s, "
            f"hit rate {1 - fetched / unique_rows:.1%}, {fetched / steps:,.0f} rows fetched a step",
            flush=True,
        )
        self._report, self._last = report, now

    def summary(self) -> dict[str, Any]:
        """Return the figures of the run as `write_summary` writes them; the loss is the last dispatch's mean."""
        report, timed = self._report, self._steps - self._first_steps
        return {
            "steps": self._steps,
            "loss": self._loss,
            "steps_per_second": timed / (self._last - self._start) if timed else float("nan"),
            "hit_rate": report.hit_rate,
            "rows_fetched": report.rows_fetched,
            "rows_written_back": report.rows_written_back,
            "slots": report.slots,
            "device_bytes": report.device_bytes,
            "table_bytes": report.table_bytes,
        }


def add_on_demand_flags(parser: argparse.ArgumentParser, slots: str, steps: int, steps_per_dispatch: int) -> None:
    """Add the flags that the examples of on-demand mode share, with these defaults."""
    add = parser.add_argument
    help = "rows on the device, as a number or a share; 100%% for all (%(default)s)"
    add("--slots", type=number_or_share, default=slots, help=help)
    add("--policy", choices=POLICIES, default="lru", help="which rows make room (%(default)s)")
    help = "read the rows of the next step on the host meanwhile"
    add("--prefetch", action=argparse.BooleanOptionalAction, default=False, help=help)
    add("--steps", type=positive_integer, default=steps, help="steps to train (%(default)s)")
    help = "steps that one call of the program makes (%(default)s)"
    add("--steps-per-dispatch", type=positive_integer, default=steps_per_dispatch, help=help)
    add("--seed", type=seed_number, default=0, help="of data, rows and model (%(default)s)")
    add("--summary", type=Path, metavar="FILE", help="write the figures as JSON")


def positive_integer(text: str) -> int:
    """Read a flag's number, 1 or more."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return int(text)


def seed_number(text: str) -> int:
    """Read the seed, 0 to 2**32 - 1."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 2**32 - 1, got {text!r}")
    return int(text)


def number_or_share(text: str) -> int | str:
    """Read --slots: a number of rows, or a share of them such as 1.5%."""
    if not re.fullmatch(r"[0-9]+|[0-9]*\.?[0-9]+%", text) or not float(text.rstrip("%")) > 0:
        raise argparse.ArgumentTypeError(f"expected rows or a share such as 1.5%, got {text!r}")
    if not text.endswith("%"):
        return int(text)
    if float(text[:-1]) > 100:
        raise argparse.ArgumentTypeError(f"expected a share of at most 100%, got {text!r}")
    return text


def number_of_bytes(text: str) -> int | str:
    """Read --device-bytes: a number of bytes, or a size such as 4GiB."""
    if not re.fullmatch(r"[0-9]+|[0-9]*\.?[0-9]+([kMGT]i?)?B", text) or not float(re.match(r"[0-9.]*", text)[0]) > 0:
        raise argparse.ArgumentTypeError(f"expected bytes or a size such as 4GiB, got {text!r}")
    return int(text) if text.isdecimal() else text
