"""Train a DIN on click histories, with tables of several widths and dtypes behind a cache of rows on the device.

    python examples/train_din.py
    python examples/train_din.py --device-bytes 4MiB --steps 1000

Three tables are looked up by five features: the item on offer and the items of the history share a table, and so do
their categories. The log is synthetic.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxcache as jc
from common import (
    DenseState,
    Progress,
    Steps,
    evaluate,
    number_of_bytes,
    number_or_share,
    positive_integer,
    seed_number,
    summarise,
    write_summary,
)
from din import DIN
from synthetic import SequenceLog

ROWS = 1_000_000
STEPS = 500
TEST_BATCHES = 20
# Batches that no training reaches.
FIRST_TEST_BATCH = 10**12

USER_DIM, ITEM_DIM, CATEGORY_DIM = 32, 16, 8

FEATURES = {
    "user": jc.Feature("user"),
    "item": jc.Feature("item"),
    "category": jc.Feature("category"),
    # Attention wants the rows one by one: zeros where the history has ended.
    "history": jc.Feature("item", padding=-1),
    # Of the categories the mean is enough.
    "history_categories": jc.Feature("category", combiner="mean"),
}


def make_log(rows: int, seed: int) -> SequenceLog:
    """Return a log whose users, items and categories are `rows` in all."""
    categories = max(min(200, rows // 200), 1)
    items = (rows - categories) * 2 // 5
    return SequenceLog(rows - categories - items, items, categories, seed=seed)


def make_tables(log: SequenceLog) -> dict[str, jc.Table]:
    """Return the tables of a log. They differ in width and dtype, so each has a part of the cache of its own."""
    return {
        # Most of the memory, and least of what is learnt: 16 bits are enough, with rounding that loses no small step.
        "user": jc.Table(log.users, USER_DIM, dtype=jnp.bfloat16, rounding="stochastic"),
        "item": jc.Table(log.items, ITEM_DIM),
        "category": jc.Table(log.categories, CATEGORY_DIM),
    }


def ids_of(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the ids of each feature: arrays, and of the categories of the histories as many as there are clicks."""
    names = ("user", "item", "category", "history")
    bags = jc.Bags(batch["history_categories"], offsets=batch["history_offsets"])
    return {name: batch[name] for name in names} | {"history_categories": bags}


def make_steps(model: DIN) -> tuple[DenseState, Steps]:
    """Return the state to start from, and the steps.

    `train(cache, plan, state, history [B, L], label [B])` returns the next cache and state, which take the place of
    those given, and the mean loss []. `predict(cache, plan, state, history)` returns logits [B].
    """
    definition, parameters = nnx.split(model)
    optimizer = optax.adam(3e-3)

    def logits_of(parameters: nnx.State, rows: dict[str, jax.Array], history: jax.Array) -> jax.Array:
        return nnx.merge(definition, parameters)(rows, history >= 0)

    def loss_of(
        parameters: nnx.State, rows: dict[str, jax.Array], history: jax.Array, label: jax.Array, mask: jax.Array
    ) -> jax.Array:
        losses = optax.sigmoid_binary_cross_entropy(logits_of(parameters, rows, history), label)
        return jnp.sum(losses, where=mask) / jnp.sum(mask)

    @partial(jax.jit, donate_argnums=(0, 2))
    def train(
        cache: jc.CacheState, plan: jc.Plan, state: DenseState, history: jax.Array, label: jax.Array
    ) -> tuple[jc.CacheState, DenseState, jax.Array]:
        rows = jc.lookup(cache, plan)
        loss, (gradients, row_gradients) = jax.value_and_grad(loss_of, argnums=(0, 1))(
            state.parameters, rows, history, label, plan.mask
        )
        cache = jc.update(cache, plan, row_gradients)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer_state)
        parameters = optax.apply_updates(state.parameters, updates)
        return cache, DenseState(parameters, optimizer_state), loss

    @jax.jit
    def predict(cache: jc.CacheState, plan: jc.Plan, state: DenseState, history: jax.Array) -> jax.Array:
        return logits_of(state.parameters, jc.lookup(cache, plan), history)

    return DenseState(parameters, optimizer.init(parameters)), Steps(train, predict)


def run(arguments: argparse.Namespace, log: SequenceLog) -> dict[str, Any]:
    """Train and test, print the figures, and return them as `--summary` writes them."""
    store = jc.HostStore(make_tables(log), optimizer=jc.rowwise_adagrad(0.1), seed=arguments.seed)
    state, steps = make_steps(DIN(ITEM_DIM, CATEGORY_DIM, USER_DIM, rngs=nnx.Rngs(arguments.seed)))
    train = log.batches(arguments.batch_size, arguments.steps)
    capacity = {"device_bytes": arguments.device_bytes} if arguments.device_bytes else {"slots": arguments.slots}
    with jc.LookAhead(store, train, ids=ids_of, features=FEATURES, **capacity) as ahead:
        cache = ahead.start()
        samples = arguments.steps * arguments.batch_size
        with Progress(ahead, arguments.steps, arguments.batch_size, samples) as progress:
            for batch, plan in ahead:
                cache = ahead.exchange(cache, plan)
                # Not the whole batch: with other lengths of ragged ids in each, it would be compiled for each.
                cache, state, loss = steps.train(cache, plan, state, batch["history"], batch["label"])
                progress.step(loss)
            last_loss, samples_per_second = progress.finish()

        def predict(view: jc.CacheState, plan: jc.Plan, batch: dict[str, Any]) -> jax.Array:
            return steps.predict(view, plan, state, batch["history"])

        test = log.batches(arguments.batch_size, TEST_BATCHES, start=FIRST_TEST_BATCH)
        cache, test_auc, ceiling = evaluate(ahead, cache, test, predict)
    return summarise(ahead.report(), last_loss, samples_per_second, test_auc, ceiling)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--rows", type=positive_integer, default=ROWS, help="rows of all tables (%(default)s)")
    slots = parser.add_mutually_exclusive_group()
    slots.add_argument(
        "--slots",
        type=number_or_share,
        default="1.5%",
        help="rows on the device, as a number or a share (%(default)s)",
    )
    slots.add_argument(
        "--device-bytes",
        type=number_of_bytes,
        metavar="BYTES",
        help="memory of the device for the cache, as a number or a size such as 4MiB",
    )
    add("--batch-size", type=positive_integer, default=1024, help="samples a step (%(default)s)")
    add("--steps", type=positive_integer, default=STEPS, help="batches to train on (%(default)s)")
    add("--seed", type=seed_number, default=0, help="of log, rows and model (%(default)s)")
    add("--summary", type=Path, metavar="FILE", help="write the figures as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line `argv` and return the figures; bad arguments exit with one line."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.summary and not arguments.summary.parent.is_dir():
        parser.error(f"argument --summary: no folder {arguments.summary.parent}")
    try:
        log = make_log(arguments.rows, arguments.seed)
    except ValueError as error:
        parser.error(f"argument --rows: {error}")
    try:
        summary = run(arguments, log)
    except jc.TooFewSlots as error:
        parser.error(f"argument --{'device-bytes' if arguments.device_bytes else 'slots'}: {error}")
    if arguments.summary:
        write_summary(arguments.summary, summary)
    return summary


if __name__ == "__main__":
    main()
