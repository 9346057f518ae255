"""What a step costs through the cache, with every row on the device, and with optax on the dense table.

    python benchmarks/embedding.py                      # the workload on which peers were measured, about five minutes
    python benchmarks/embedding.py --case kaggle --optimizer rowwise_adagrad --json kaggle.json

Two models: `embedding` is the embedding step alone (planning, lookup, pooling, backward, row update), `dlrm` the
whole step of a DLRM around it. Three contenders: `cached` through a cache of 1.5 % and of 5 % of the rows; `uncached`,
the same code with every row on the device, where nothing moves; `dense`, plain jnp tables and optax on their dense
gradients.

How it is measured. Machines are noisy, so contenders alternate in one process, each for a turn of a few steps, in an
order that rotates, and figures are medians over turns with quartiles. Every contender has a pipeline of its own whose
threads work ahead, and would do so while another contender is timed. So a gate sits in the loader: a turn of k steps
lets exactly k batches into the pipeline and takes k steps, after which the pipeline has nothing left to do but the last
write-back, for which a pause is made. All the work of k steps, that of the threads included, so falls into the turn,
and nothing else. Planning and collecting a turn's first batch overlaps with nothing and is counted too, so that a run
without turns is a little faster than what is printed; `--turn 1` shows all stages one after the other. The loss is
waited for at every step. CPU time is that of all threads of the process, over the turn and its pause.

Contenders start from equal tables and see the same batches, so before a figure is printed their losses are compared:
cached and uncached bit for bit over every step of the run, dense to rounding over the few steps that it makes (not for
adam, which for cached rows is the lazy variant). Warm-up fills the cache, so that rows are evicted at the rate of a
long run; a line says so where it did not.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import jaxcache as jc
from dlrm import DLRM
from synthetic import DENSE_FEATURES, KAGGLE_CARDINALITIES, ClickLog

WINDOW = 8
PAUSE = 0.005  # seconds after a turn, for its last write-back
SHARES = ("1.5%", "5%")
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(0.1),
    "adagrad": lambda: optax.adagrad(0.1),
    "rowwise_adagrad": lambda: jc.rowwise_adagrad(0.1),
    "adam": lambda: optax.adam(0.001),
}
LAZY = ("adam",)  # moves rows whose gradient is zero, which a cached table leaves alone


@dataclass(frozen=True)
class Case:
    """A workload.

    Attributes:
        name: for `--case`.
        rows: rows of each table.
        dim: weights a row.
        batch: samples a batch.
        ids: ids a table and sample; their rows are summed.
        exponent: of the power law of ids, over all rows of a table; None for the click log of the example.
        models: what is measured.
        warm: steps before the first timed one, to fill the cache.
    """

    name: str
    rows: tuple[int, ...]
    dim: int
    batch: int
    ids: int
    exponent: float | None
    models: tuple[str, ...]
    warm: int

    def __str__(self) -> str:
        rows = f"x {self.rows[0]:,} rows" if len(set(self.rows)) == 1 else f"of {sum(self.rows):,} rows in all"
        law = f"power law {self.exponent}" if self.exponent else "click log"
        return (
            f"{self.name}: {len(self.rows)} tables {rows} x dim {self.dim}, batch {self.batch:,}, "
            f"{self.ids} ids a table and sample, {law}"
        )

    @property
    def tables(self) -> dict[str, jc.Table]:
        """The tables, named as the features of the click log are."""
        return {f"C{position + 1}": jc.Table(rows, self.dim) for position, rows in enumerate(self.rows)}

    def batch_of(self, number: int) -> dict[str, Any]:
        """Batch `number`: {"ids": {table: int64 [B, ids], or [B] for one id}, "dense": [B, 13], "label": [B]}."""
        if self.exponent is None:
            return self._log.batch(self.batch, number)
        random = np.random.default_rng((0, number))
        ids = {}
        for (name, table), popular in zip(self.tables.items(), self._popular, strict=True):
            # The inverse CDF of a continuous power law, rounded down.
            power = 1.0 - self.exponent
            uniform = random.random((self.batch, self.ids))
            ranks = ((1.0 + uniform * ((table.rows + 1.0) ** power - 1.0)) ** (1.0 / power)).astype(np.int64) - 1
            ids[name] = popular[np.minimum(ranks, table.rows - 1)]
        return {
            "ids": ids,
            "dense": random.standard_normal((self.batch, DENSE_FEATURES), dtype=np.float32),
            "label": (random.random(self.batch) < 0.26).astype(np.float32),
        }

    @cached_property
    def _popular(self) -> list[np.ndarray]:
        """The ids of each table by popularity: popular rows lie scattered."""
        return [np.random.default_rng((1, position)).permutation(rows) for position, rows in enumerate(self.rows)]

    @cached_property
    def _log(self) -> ClickLog:
        return ClickLog(self.rows)


CASES = {
    case.name: case
    for case in (
        Case("peers", (1_000_000,) * 8, 32, 2048, 4, 1.05, ("embedding", "dlrm"), warm=64),
        # Fills 1.5 %; 5 % would take about 900 steps.
        Case("kaggle", KAGGLE_CARDINALITIES, 16, 2048, 1, None, ("dlrm",), warm=384),
        Case("tiny", (4_000,) * 3, 8, 16, 2, 1.05, ("embedding", "dlrm"), warm=24),
    )
}


# The models: parameters of their own, and a loss of these, the rows of a batch and its other inputs.

Loss = Callable[[Any, dict[str, jax.Array], dict[str, jax.Array]], jax.Array]


def make_model(name: str, case: Case) -> tuple[Any, Loss]:
    def pooled(rows: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {feature: row.sum(axis=1) if row.ndim == 3 else row for feature, row in rows.items()}

    if name == "embedding":
        # The least that gives every row a gradient.
        return {}, lambda _, rows, inputs: sum(jnp.mean(jnp.square(1.0 - row)) for row in pooled(rows).values())

    graph, parameters = nnx.split(DLRM(tuple(case.tables), case.dim, rngs=nnx.Rngs(0)))

    def loss(parameters, rows, inputs):
        logits = nnx.merge(graph, parameters)(inputs["dense"], pooled(rows))
        return optax.sigmoid_binary_cross_entropy(logits, inputs["label"]).mean()

    return parameters, loss


MODEL_OPTIMIZER = optax.adam(0.001)


# The contenders: generators that make a step when asked and yield its loss.


class Gate:
    """Lets batches into a pipeline by number.

    Attributes:
        closed: seconds that the loader stood before it.
    """

    def __init__(self) -> None:
        self._permits = threading.Semaphore(0)
        self.closed = 0.0

    def admit(self, batches: int) -> None:
        """Lets so many more batches in."""
        self._permits.release(batches)

    def loader(self, batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            start = time.perf_counter()
            self._permits.acquire()
            self.closed += time.perf_counter() - start
            yield batch


Steps = Generator[float, None, None]


def through_look_ahead(
    contender: Contender, case: Case, optimizer: str, model: str, batches: Sequence[Any], slots: str
) -> Steps:
    parameters, loss_of = make_model(model, case)
    train = (parameters, MODEL_OPTIMIZER.init(parameters))

    @partial(jax.jit, donate_argnums=(0, 2))
    def train_step(cache, plan, train, inputs):
        parameters, state = train
        rows = jc.lookup(cache, plan)
        loss, (gradients, row_gradients) = jax.value_and_grad(loss_of, argnums=(0, 1))(parameters, rows, inputs)
        steps, state = MODEL_OPTIMIZER.update(gradients, state, parameters)
        return jc.update(cache, plan, row_gradients), (optax.apply_updates(parameters, steps), state), loss

    store = jc.HostStore(case.tables, optimizer=OPTIMIZERS[optimizer]())
    loader = contender.gate.loader(batches)
    contender.gate.admit(WINDOW - 1)  # a plan looks at so many batches behind its own
    with jc.LookAhead(store, loader, ids=lambda batch: batch["ids"], slots=slots, window=WINDOW) as ahead:
        contender.report = ahead.report
        cache = ahead.start()
        try:
            for batch, plan in ahead:
                cache = ahead.exchange(cache, plan)
                cache, train, loss = train_step(cache, plan, train, inputs_of(batch))
                yield float(loss)
        finally:
            contender.gate.admit(len(batches))  # the loader's thread ends


def on_dense_tables(contender: Contender, case: Case, optimizer: str, model: str, batches: Sequence[Any]) -> Steps:
    parameters, loss_of = make_model(model, case)
    transformation = OPTIMIZERS[optimizer]()
    store = jc.HostStore(case.tables, optimizer=optax.sgd(0.0))
    tables = {name: jnp.array(store.rows(name, np.arange(table.rows))) for name, table in case.tables.items()}
    train = (parameters, MODEL_OPTIMIZER.init(parameters), tables, transformation.init(tables))

    @partial(jax.jit, donate_argnums=0)
    def train_step(train, ids, inputs):
        parameters, state, tables, table_state = train

        def loss_of_tables(parameters, tables):
            return loss_of(parameters, {name: tables[name][places] for name, places in ids.items()}, inputs)

        loss, (gradients, table_gradients) = jax.value_and_grad(loss_of_tables, argnums=(0, 1))(parameters, tables)
        steps, state = MODEL_OPTIMIZER.update(gradients, state, parameters)
        table_steps, table_state = transformation.update(table_gradients, table_state, tables)
        tables = optax.apply_updates(tables, table_steps)
        return (optax.apply_updates(parameters, steps), state, tables, table_state), loss

    for batch in batches:
        ids = {name: places.astype(np.int32) for name, places in batch["ids"].items()}
        train, loss = train_step(train, ids, inputs_of(batch))
        yield float(loss)


def inputs_of(batch: dict[str, Any]) -> dict[str, np.ndarray]:
    return {"dense": batch["dense"], "label": batch["label"]}


@dataclass
class Contender:
    """A contender and what was measured of it.

    Attributes:
        name: in the table.
        begin: makes the generator, given this contender.
        turn: steps of a turn.
        rounds: turns at most.
        losses: of every step since the start.
        wall, cpu: seconds a step, one of each a turn.
        timed_from: the pipeline's report at the first timed step, and how long its gate had been closed by then.
        report: gives the pipeline's report, if there is a pipeline.
    """

    name: str
    begin: Callable[[Contender], Steps]
    turn: int
    rounds: int
    gate: Gate = field(default_factory=Gate)
    losses: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    timed_from: tuple[jc.Report, float] | None = None
    report: Callable[[], jc.Report] | None = None

    @cached_property
    def steps(self) -> Steps:
        return self.begin(self)

    def warm_up(self, steps: int) -> None:
        self.gate.admit(steps)
        self.losses += [next(self.steps) for _ in range(steps)]
        time.sleep(PAUSE)
        self.timed_from = (self.report(), self.gate.closed) if self.report else None

    def take_turn(self) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.gate.admit(self.turn)
        self.losses += [next(self.steps) for _ in range(self.turn)]
        self.wall.append((time.perf_counter() - wall) / self.turn)
        time.sleep(PAUSE)
        self.cpu.append((time.process_time() - cpu) / self.turn)

    def record(self) -> dict[str, Any]:
        """The figures: times in ms a step."""
        first, median, third = (1e3 * float(quartile) for quartile in np.quantile(self.wall, (0.25, 0.5, 0.75)))
        record: dict[str, Any] = {
            "contender": self.name,
            "steps": self.turn * len(self.wall),
            "wall_ms": median,
            "wall_quartiles_ms": [first, third],
            "cpu_ms": 1e3 * float(np.median(self.cpu)),
        }
        if self.report and self.timed_from:
            (before, closed), after = self.timed_from, self.report()
            steps = after.steps - before.steps
            fetched, unique = after.rows_fetched - before.rows_fetched, after.unique_rows - before.unique_rows
            lookups = after.lookups - before.lookups
            busy = {
                name: 1e3 * (stage.busy - before.stages[name].busy) / steps
                for name, stage in after.stages.items()
                if name != "step"  # here it spans the turns of the others
            }
            busy["loader"] -= 1e3 * (self.gate.closed - closed) / steps
            record |= {
                "slots": after.slots,
                "slots_filled": after.rows_fetched - after.rows_written_back,
                "hit_rate": 1 - fetched / unique,
                "lookup_hit_rate": (after.lookup_hits - before.lookup_hits) / lookups,
                "unique_rows_a_step": unique / steps,
                "rows_fetched_a_step": fetched / steps,
                "stage_busy_ms": busy,
                "wait_for_batch_ms": 1e3 * (after.stages["step"].wait - before.stages["step"].wait) / steps,
            }
        return record


def contenders_of(case: Case, optimizer: str, model: str, batches: Sequence[Any], chosen: Chosen) -> list[Contender]:
    def planned(slots: str):
        return partial(through_look_ahead, case=case, optimizer=optimizer, model=model, batches=batches, slots=slots)

    dense = partial(on_dense_tables, case=case, optimizer=optimizer, model=model, batches=batches)
    everyone = [
        *(Contender(f"cached {share}", planned(share), chosen.turn, chosen.rounds) for share in SHARES),
        Contender("uncached", planned("100%"), chosen.turn, chosen.rounds),
        Contender("dense", dense, 1, chosen.dense_rounds),
    ]
    return [contender for contender in everyone if contender.name != "dense" or chosen.dense_rounds]


@dataclass(frozen=True)
class Chosen:
    """How much is measured: `rounds` turns of `turn` steps, and `dense_rounds` steps of the slow contender."""

    rounds: int
    turn: int
    dense_rounds: int


def check_losses(contenders: list[Contender], optimizer: str) -> str:
    """Compares every contender's losses with the uncached one's. Raises AssertionError; returns what was found."""
    by_name = {contender.name: contender.losses for contender in contenders}
    reference = by_name["uncached"]
    for name, losses in by_name.items():
        expected = reference[: len(losses)]
        if name.startswith("cached"):
            wrong = [step for step, (one, other) in enumerate(zip(losses, expected, strict=True)) if one != other]
            if wrong:
                step = wrong[0]
                raise AssertionError(f"loss of step {step}: {name} {losses[step]!r}, uncached {expected[step]!r}")
        elif name == "dense" and optimizer not in LAZY:
            np.testing.assert_allclose(losses, expected, rtol=1e-4, err_msg="losses of dense and uncached differ")
    found = f"losses of {len(reference)} steps: cached and uncached equal to the bit"
    if "dense" in by_name:
        found += f"; {len(by_name['dense'])} dense steps " + (
            "not compared, for this optimizer is lazy on cached rows" if optimizer in LAZY else "equal to rounding"
        )
    return found


def measure(case: Case, optimizer: str, model: str, batches: Sequence[Any], chosen: Chosen) -> list[dict[str, Any]]:
    """Runs the contenders of one model and optimizer, prints their table and returns their records."""
    contenders = contenders_of(case, optimizer, model, batches, chosen)
    try:
        for contender in contenders:
            contender.warm_up(2 if contender.name == "dense" else case.warm)
        for number in range(chosen.rounds):
            first = number % len(contenders)
            for contender in contenders[first:] + contenders[:first]:
                # The slow contender's few turns are spread over the rounds.
                due = (number + 1) * contender.rounds // chosen.rounds
                while len(contender.wall) < due:
                    contender.take_turn()
        agreement = check_losses(contenders, optimizer)
        records = [contender.record() for contender in contenders]
    finally:
        for contender in contenders:
            contender.steps.close()
    reference = next(record["wall_ms"] for record in records if record["contender"] == "uncached")
    for record in records:
        record |= {"case": case.name, "model": model, "optimizer": optimizer}
        record["ratio_to_uncached"] = record["wall_ms"] / reference
    print_table(case, optimizer, model, records, agreement)
    return records


def print_table(case: Case, optimizer: str, model: str, records: list[dict[str, Any]], agreement: str) -> None:
    what = "embedding step alone" if model == "embedding" else "whole DLRM step"
    print(f"\n{what}, {optimizer}")
    print(
        f"{'':12}{'ms a step':>10}{'quartiles':>16}{'x uncached':>12}{'CPU ms':>9}{'hit rate':>10}{'lookups hit':>13}"
        f"{'rows fetched':>14}"
    )
    for record in records:
        first, third = record["wall_quartiles_ms"]
        line = (
            f"{record['contender']:12}{record['wall_ms']:>10.1f}{f'{first:.1f} - {third:.1f}':>16}"
            f"{record['ratio_to_uncached']:>12.2f}{record['cpu_ms']:>9.1f}"
        )
        if "hit_rate" in record:
            line += (
                f"{record['hit_rate']:>10.1%}{record['lookup_hit_rate']:>13.1%}{record['rows_fetched_a_step']:>14,.0f}"
            )
        print(line)
    for record in records:
        if "stage_busy_ms" in record:
            name, wait = record["contender"], record["wait_for_batch_ms"]
            busy = ", ".join(f"{stage} {spent:.1f}" for stage, spent in record["stage_busy_ms"].items())
            print(f"  {name}: busy ms a step: {busy}; the step waits {wait:.1f} for its batch")
            if name != "uncached" and record["slots_filled"] < record["slots"]:
                print(f"  {name}: not warm, {record['slots_filled']:,} of {record['slots']:,} slots filled")
    print(f"  {agreement}", flush=True)


def environment() -> dict[str, Any]:
    """Versions and machine."""
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    packages = ("jax", "jaxlib", "numpy", "numba", "optax", "flax")
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "jaxcache": jc.__version__,
        "processor": processor,
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
    }


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, default="peers", help="the workload")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, nargs="+", default=list(OPTIMIZERS), help="of the tables")
    parser.add_argument("--model", choices=("embedding", "dlrm"), nargs="+", help="by default those of the case")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each contender")
    parser.add_argument("--turn", type=int, default=8, help="steps of a turn")
    parser.add_argument(
        "--dense-rounds", type=int, default=4, help="steps of optax on the dense table; 0 leaves it out"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the records there")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.turn) < 1 or options.dense_rounds < 0:
        parser.error("--rounds and --turn must be 1 or more, --dense-rounds 0 or more")

    case = CASES[options.case]
    chosen = Chosen(options.rounds, options.turn, options.dense_rounds)
    machine = environment()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(case)
    print(
        f"{case.warm} warm steps, {chosen.rounds} rounds of {chosen.turn} steps, window {WINDOW}; dense: "
        f"{chosen.dense_rounds} steps",
        flush=True,
    )
    batches = [case.batch_of(number) for number in range(case.warm + chosen.rounds * chosen.turn + WINDOW)]
    records = []
    for model in options.model or case.models:
        for optimizer in options.optimizer:
            records += measure(case, optimizer, model, batches, chosen)
            gc.collect()
    if options.json:
        named = {"environment": machine, "case": asdict(case), "options": asdict(chosen), "window": WINDOW}
        options.json.write_text(json.dumps({**named, "records": records}, indent=2) + "\n")
    return records


if __name__ == "__main__":
    main()
