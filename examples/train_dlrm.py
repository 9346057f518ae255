"""Train a DLRM whose embedding tables stay in host memory, behind a cache of rows on the device.

    python examples/train_dlrm.py
    python examples/train_dlrm.py --data train.txt.gz --slots 5% --epochs 2
    python examples/train_dlrm.py --checkpoint runs/1  # goes on where an earlier such command was stopped

Without --data it trains on a synthetic click log with the cardinalities of the Criteo Kaggle log.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

import jaxcache as jc
from common import (
    DenseState,
    Progress,
    Steps,
    evaluate,
    number_or_share,
    positive_integer,
    seed_number,
    summarise,
    write_summary,
)
from criteo import read_criteo
from dlrm import DLRM
from synthetic import KAGGLE_CARDINALITIES, ClickLog, scaled_cardinalities

DEFAULT_STEPS = 500
TEST_BATCHES = 40
CHECKPOINT_EVERY = 100
# Batches of the synthetic log that no training reaches.
FIRST_TEST_BATCH = 10**12

# Rates differ by orders of magnitude because the loss is a mean over the batch: a row that is
# looked up once gets the gradient of one sample, divided by the batch's size.
ROW_OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(10.0),
    "momentum": lambda: optax.sgd(1.0, momentum=0.9),
    # Optax starts the accumulator at 0.1, far above the squares of such gradients.
    "adagrad": lambda: optax.adagrad(0.05, initial_accumulator_value=0.0, eps=1e-14),
    "rowwise_adagrad": lambda: jc.rowwise_adagrad(0.05),
    "adam": lambda: optax.adam(0.005),
}

# Those that need no counts of the data set.
POLICIES: dict[str, Callable[[], jc.Policy]] = {
    "lookahead": jc.lookahead,
    "scratchpipe": jc.scratchpipe,
    "lru": jc.lru,
    "lfu": jc.lfu,
    "no_cache": jc.no_cache,
}


@dataclass(frozen=True)
class Data:
    """What to train and to test on.

    Attributes:
        tables: number of rows of each feature's table.
        train: makes the training batches from a step on, as `ClickLog.batch` and `CriteoLog.batches` show them.
        steps: number of training batches.
        batch_size: samples in each of them, except for a shorter last one in each epoch.
        samples: number of samples in the first so many of them.
        test: makes the test batches.
    """

    tables: dict[str, int]
    train: Callable[[int], Iterable[dict[str, Any]]]
    steps: int
    batch_size: int
    samples: Callable[[int], int]
    test: Callable[[], Iterable[dict[str, Any]]]


def synthetic_data(rows: int | None, batch_size: int, steps: int | None, seed: int) -> Data:
    """Return the synthetic click log, scaled to `rows` rows in all if given."""
    log = ClickLog(scaled_cardinalities(rows) if rows else KAGGLE_CARDINALITIES, seed)
    steps = steps or DEFAULT_STEPS
    return Data(
        tables=dict(zip(log.features, log.cardinalities, strict=True)),
        train=lambda start: log.batches(batch_size, steps - start, start),
        steps=steps,
        batch_size=batch_size,
        samples=lambda count: count * batch_size,
        test=lambda: log.batches(batch_size, TEST_BATCHES, start=FIRST_TEST_BATCH),
    )


def criteo_data(path: Path, rows: int | None, batch_size: int, steps: int | None, epochs: int) -> Data:
    """Return a Criteo log: train on the first 80 % of its lines, `epochs` times, test on the rest.

    Values are enumerated, or hashed to `rows` rows in all if given.
    """
    log = read_criteo(path, scaled_cardinalities(rows) if rows else None)
    if len(log) < 2:
        raise ValueError(f"{path}: one line is too few to train and to test on")
    batch_size = min(batch_size, len(log.train_lines))
    batches_per_epoch = math.ceil(len(log.train_lines) / batch_size)
    steps = min(steps or epochs * batches_per_epoch, epochs * batches_per_epoch)

    def train() -> Iterator[dict[str, Any]]:
        for _ in range(epochs):
            yield from log.batches(batch_size, log.train_lines)

    def samples(count: int) -> int:
        whole_epochs, rest = divmod(count, batches_per_epoch)
        return whole_epochs * len(log.train_lines) + rest * batch_size

    return Data(
        tables=dict(zip(log.features, log.cardinalities, strict=True)),
        train=lambda start: itertools.islice(train(), start, steps),
        steps=steps,
        batch_size=batch_size,
        samples=samples,
        test=lambda: log.batches(batch_size, log.test_lines),
    )


def make_steps(model: DLRM) -> tuple[DenseState, Steps]:
    """Return the state to start from, and the steps.

    `train(cache, plan, state, dense [B, 13], label [B])` returns the next cache and state, which
    take the place of those given, and the mean loss []. `predict(cache, plan, state, dense)`
    returns logits [B].
    """
    definition, parameters = nnx.split(model)
    optimizer = optax.adam(1e-3)

    def loss_of(
        parameters: nnx.State,
        rows: dict[str, jax.Array],
        dense: jax.Array,
        label: jax.Array,
        mask: jax.Array,
    ) -> jax.Array:
        logits = nnx.merge(definition, parameters)(dense, rows)
        losses = optax.sigmoid_binary_cross_entropy(logits, label)
        return jnp.sum(losses, where=mask) / jnp.sum(mask)

    @partial(jax.jit, donate_argnums=(0, 2))
    def train(
        cache: jc.CacheState, plan: jc.Plan, state: DenseState, dense: jax.Array, label: jax.Array
    ) -> tuple[jc.CacheState, DenseState, jax.Array]:
        rows = jc.lookup(cache, plan)
        loss, (gradients, row_gradients) = jax.value_and_grad(loss_of, argnums=(0, 1))(
            state.parameters, rows, dense, label, plan.mask
        )
        cache = jc.update(cache, plan, row_gradients)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer_state)
        parameters = optax.apply_updates(state.parameters, updates)
        return cache, DenseState(parameters, optimizer_state), loss

    @jax.jit
    def predict(cache: jc.CacheState, plan: jc.Plan, state: DenseState, dense: jax.Array) -> jax.Array:
        return nnx.merge(definition, state.parameters)(dense, jc.lookup(cache, plan))

    return DenseState(parameters, optimizer.init(parameters)), Steps(train, predict)


class CannotResume(Exception):
    """The newest checkpoint is damaged, or one of another run."""


class Checkpoints:
    """Checkpoints of a run, the latest two, each of the tables and of the dense state; written beside the training."""

    def __init__(self, folder: Path, store: jc.HostStore) -> None:
        latest = ocp.training.preservation_policies.LatestN(2)
        self._orbax = ocp.training.Checkpointer(folder.absolute(), preservation_policy=latest)
        self._folder, self._store = folder, store

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._orbax.close()  # once what is being written is complete

    def resume(self, state: DenseState, slots: int | str) -> tuple[DenseState, jc.CacheState | None]:
        """Restore the store from the newest checkpoint and return what goes with it; without one, `state`."""
        if self._orbax.latest is None:
            return state, None
        step, tables = self._orbax.latest.step, jc.Checkpoint(self._store)
        try:
            self._orbax.load_checkpointables(step, {"tables": tables})
        except (OSError, ValueError) as error:
            raise CannotResume(str(error)) from error
        state = self._orbax.load_checkpointables(step, {"dense": state})["dense"]
        print(f"resumed from step {step} of {self._folder / str(step)}")
        return state, tables.cache(slots)

    def save(self, ahead: jc.LookAhead, cache: jc.CacheState, state: DenseState) -> jc.CacheState:
        """Begin to write a checkpoint and return the flushed cache."""
        start = time.perf_counter()
        cache = ahead.flush(cache)
        tables = jc.Checkpoint(self._store, cache, ahead=ahead)
        self._orbax.save_checkpointables_async(self._store.step, {"tables": tables, "dense": state}, force=True)
        tqdm.write(f"checkpoint of step {self._store.step}: paused for {time.perf_counter() - start:.3f} s")
        return cache


def run(arguments: argparse.Namespace, data: Data) -> dict[str, Any]:
    """Train and test, print the figures, and return them as `--summary` writes them."""
    store = jc.HostStore(
        {name: jc.Table(rows, arguments.dim) for name, rows in data.tables.items()},
        optimizer=ROW_OPTIMIZERS[arguments.optimizer](),
        seed=arguments.seed,
    )
    model = DLRM(tuple(data.tables), arguments.dim, rngs=nnx.Rngs(arguments.seed))
    state, steps = make_steps(model)
    slots = "100%" if arguments.no_cache else arguments.slots
    with contextlib.ExitStack() as stack:
        checkpoints, warm = None, None
        if arguments.checkpoint:
            checkpoints = stack.enter_context(Checkpoints(arguments.checkpoint, store))
            state, warm = checkpoints.resume(state, slots)
        done, every = store.step, arguments.checkpoint_every or CHECKPOINT_EVERY
        last = max(done, data.steps)
        if done == last:
            print(f"nothing is left to train: {done} steps are done, {data.steps} are asked for")
        ahead = jc.LookAhead(
            store,
            data.train(done),
            ids=lambda batch: batch["ids"],
            slots=slots,
            policy=POLICIES[arguments.policy](),
            window=arguments.window,
        )
        stack.enter_context(ahead)
        cache = ahead.start(warm)
        samples = data.samples(last) - data.samples(done)
        with Progress(ahead, last - done, data.batch_size, samples) as progress:
            for step, (batch, plan) in enumerate(ahead, done + 1):
                cache = ahead.exchange(cache, plan)
                cache, state, loss = steps.train(cache, plan, state, batch["dense"], batch["label"])
                progress.step(loss)
                if checkpoints and (step % every == 0 or step == last):
                    cache = checkpoints.save(ahead, cache, state)
            last_loss, samples_per_second = progress.finish()

        def predict(view: jc.CacheState, plan: jc.Plan, batch: dict[str, Any]) -> jax.Array:
            return steps.predict(view, plan, state, batch["dense"])

        cache, test_auc, ceiling = evaluate(ahead, cache, data.test(), predict)
    return summarise(ahead.report(), last_loss, samples_per_second, test_auc, ceiling)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--data", type=Path, metavar="FILE", help="Criteo log to train on, plain or .gz")
    add("--epochs", type=positive_integer, help="passes over the training lines of --data; 1")
    add(
        "--rows",
        type=positive_integer,
        help="rows of all tables; synthetic: scales them, from 33,762,577; --data: hashes to them",
    )
    add("--dim", type=positive_integer, default=16, help="weights a row (%(default)s)")
    slots = parser.add_mutually_exclusive_group()
    slots.add_argument(
        "--slots",
        type=number_or_share,
        default="1.5%",
        help="rows on the device, as a number or a share (%(default)s)",
    )
    slots.add_argument("--no-cache", action="store_true", help="keep every row on the device")
    add("--policy", choices=POLICIES, default="lookahead", help="which rows make room (%(default)s)")
    add("--window", type=positive_integer, help="batches that lookahead looks at; as many as pay, if not given")
    add("--batch-size", type=positive_integer, default=2048, help="samples a step (%(default)s)")
    add(
        "--optimizer",
        choices=ROW_OPTIMIZERS,
        default="rowwise_adagrad",
        help="of the rows (%(default)s); the dense parameters have adam",
    )
    add(
        "--steps",
        type=positive_integer,
        help=f"batches to train on; synthetic: {DEFAULT_STEPS}, --data: all, and no more than that",
    )
    add("--seed", type=seed_number, default=0, help="of log, rows and model (%(default)s)")
    add("--checkpoint", type=Path, metavar="DIR", help="save there, and go on from the newest checkpoint in it")
    add("--checkpoint-every", type=positive_integer, metavar="N", help=f"steps; {CHECKPOINT_EVERY}, and at the end")
    add("--summary", type=Path, metavar="FILE", help="write the figures as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line `argv` and return the figures; bad arguments exit with one line."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.epochs and not arguments.data:
        parser.error("argument --epochs: needs --data")
    if arguments.checkpoint_every and not arguments.checkpoint:
        parser.error("argument --checkpoint-every: needs --checkpoint")
    if arguments.summary and not arguments.summary.parent.is_dir():
        parser.error(f"argument --summary: no folder {arguments.summary.parent}")
    sizes = (arguments.rows, arguments.batch_size, arguments.steps)
    try:
        if arguments.data:
            data = criteo_data(arguments.data, *sizes, epochs=arguments.epochs or 1)
        else:
            data = synthetic_data(*sizes, seed=arguments.seed)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    try:
        summary = run(arguments, data)
    except jc.TooFewSlots as error:
        parser.error(f"argument --slots: {error}")
    except CannotResume as error:
        parser.error(f"argument --checkpoint: {error}")
    if arguments.summary:
        write_summary(arguments.summary, summary)
    return summary


if __name__ == "__main__":
    main()
