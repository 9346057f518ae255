"""A small model trained through a cache, and the same training on plain arrays: what the twin tests compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcache as jc

DIM = 4
ROWS = 40  # of each table
SAMPLES = 8
TABLES = {"user": jc.Table(ROWS, DIM, jc.uniform(0.5)), "item": jc.Table(ROWS, DIM, jc.normal(0.3))}

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(0.3),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adagrad": lambda: optax.adagrad(0.3),
    "rowwise_adagrad": lambda: jc.rowwise_adagrad(0.3),
    "adam": lambda: optax.adam(0.05),
    "chain": lambda: optax.chain(optax.clip(0.05), optax.adagrad(optax.exponential_decay(0.5, 3, 0.7))),
}


def dense_start() -> jax.Array:
    return jnp.linspace(-1.0, 1.0, 2 * DIM, dtype=jnp.float32)


def loss_function(dense: jax.Array, rows: dict[str, jax.Array], labels: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean squared error of a small network with products of rows, over the samples that are no padding."""
    user, item = (rows[name] for name in ("user", "item"))
    hidden = jnp.tanh(jnp.concatenate([user * item, user - item], axis=-1))
    errors = (hidden @ dense + jnp.sum(user * item, axis=-1) - labels) ** 2
    return jnp.sum(jnp.where(mask, errors, 0.0)) / jnp.sum(mask.astype(jnp.float32))


@partial(jax.jit, donate_argnums=(0, 2))
def train_step(cache, plan, dense, labels):
    rows = jc.lookup(cache, plan)
    loss, (gradient, row_gradients) = jax.value_and_grad(loss_function, argnums=(0, 1))(dense, rows, labels, plan.mask)
    return jc.update(cache, plan, row_gradients), dense - 0.1 * gradient, loss


def make_batch(random: np.random.Generator, kind: str, samples: int = SAMPLES) -> dict[str, Any]:
    """A batch whose ids are of a kind: skewed, uniform, equal, or distinct."""
    if kind == "skewed":
        ids = [random.zipf(1.4, samples) % ROWS for _ in range(2)]
    elif kind == "uniform":
        ids = [random.integers(0, ROWS, samples) for _ in range(2)]
    elif kind == "equal":
        ids = [np.full(samples, random.integers(0, 3)) for _ in range(2)]
    else:
        ids = [random.permutation(ROWS)[:samples] for _ in range(2)]
    labels = random.normal(size=samples).astype(np.float32)
    return {"ids": dict(zip(TABLES, ids, strict=True)), "labels": labels}


def make_batches(seed: int, kinds: Iterable[str], last: int = SAMPLES) -> list[dict[str, Any]]:
    """Batches of the given kinds; the last one has `last` samples."""
    random = np.random.default_rng(seed)
    kinds = list(kinds)
    return [make_batch(random, kind, SAMPLES if i < len(kinds) - 1 else last) for i, kind in enumerate(kinds)]


def most_unique_rows(batches) -> int:
    return max(sum(len(np.unique(ids)) for ids in batch["ids"].values()) for batch in batches)


def make_store(optimizer: str | optax.GradientTransformation, seed: int = 3) -> jc.HostStore:
    return jc.HostStore(
        TABLES, optimizer=OPTIMIZERS[optimizer]() if isinstance(optimizer, str) else optimizer, seed=seed
    )


def replace_group(cache: jc.CacheState, **fields: Any) -> jc.CacheState:
    """The cache of a store of one group with some fields of that group replaced."""
    (group,) = cache.groups
    return dataclasses.replace(cache, groups=(dataclasses.replace(group, **fields),))


@dataclass
class Result:
    """Losses of all steps, and after the last flush all weights and row leaves of every table."""

    losses: list[float]
    weights: dict[str, np.ndarray]
    states: dict[str, tuple[np.ndarray, ...]]
    report: jc.Report

    @classmethod
    def of(cls, store: jc.HostStore, losses: list, report: jc.Report) -> Result:
        every = np.arange(ROWS)
        return cls(
            [float(loss) for loss in losses],
            {name: store.rows(name, every) for name in TABLES},
            {name: store.row_state(name, every) for name in TABLES},
            report,
        )

    def assert_same_bits(self, other: Result) -> None:
        np.testing.assert_array_equal(self.losses, other.losses)
        for name in TABLES:
            np.testing.assert_array_equal(self.weights[name].view(np.int32), other.weights[name].view(np.int32), name)
            for mine, theirs in zip(self.states[name], other.states[name], strict=True):
                np.testing.assert_array_equal(mine, theirs, name)


def train(
    store: jc.HostStore,
    batches,
    slots: int | str,
    window: int = 4,
    steps: int | None = None,
    between: Callable[[jc.LookAhead, jc.CacheState, int], jc.CacheState] | None = None,
    cache: jc.CacheState | None = None,
    **arguments,
) -> Result:
    """Trains, flushes and checks every invariant.

    `steps` leaves the loop early; `between(ahead, cache, step)` runs after each step.
    """
    dense, losses = dense_start(), []
    with jc.LookAhead(store, batches, ids=lambda b: b["ids"], slots=slots, window=window, **arguments) as ahead:
        cache = ahead.start(cache)
        for batch, plan in ahead:
            cache = ahead.exchange(cache, plan)
            cache, dense, loss = train_step(cache, plan, dense, batch["labels"])
            losses.append(loss)
            if between is not None:
                cache = between(ahead, cache, len(losses))
            if len(losses) == steps:
                break
        cache = ahead.flush(cache)
    jc.check(cache, store)
    return Result.of(store, losses, ahead.report())


def plain_training(optimizer: str, batches, lazy: bool) -> tuple[list[float], dict[str, np.ndarray]]:
    """The same training on plain arrays with optax itself: no cache, no plan.

    With `lazy`, optax is applied to the touched rows alone; else to whole tables with dense gradients.

    Returns:
        Losses, and the weights of each table.
    """
    store = make_store(optimizer)
    weights = np.concatenate([store.rows(name, np.arange(ROWS)) for name in TABLES])
    transformation = OPTIMIZERS[optimizer]()
    state = transformation.init(jnp.asarray(weights))
    dense, losses = dense_start(), []

    def is_row_leaf(leaf) -> bool:
        return leaf.ndim > 0 and leaf.shape[0] == len(weights)

    for batch in batches:
        places = {name: ids + i * ROWS for i, (name, ids) in enumerate(batch["ids"].items())}
        mask = np.ones(len(batch["labels"]), bool)

        def loss_of(dense, table, places=places, batch=batch, mask=mask):
            rows = {name: table[place] for name, place in places.items()}
            return loss_function(dense, rows, batch["labels"], mask)

        loss, (dense_gradient, gradient) = jax.value_and_grad(loss_of, argnums=(0, 1))(dense, jnp.asarray(weights))
        touched = np.unique(np.concatenate(list(places.values()))) if lazy else np.arange(len(weights))
        part = jax.tree.map(lambda leaf, touched=touched: leaf[touched] if is_row_leaf(leaf) else leaf, state)
        with jax.numpy_dtype_promotion("standard"):
            steps, new = transformation.update(gradient[touched], part, jnp.asarray(weights[touched]))
        state = jax.tree.map(
            lambda old, leaf, touched=touched: old.at[touched].set(leaf) if is_row_leaf(old) else leaf, state, new
        )
        weights[touched] += np.asarray(steps)
        dense = dense - 0.1 * dense_gradient
        losses.append(float(loss))
    return losses, {name: weights[i * ROWS : (i + 1) * ROWS] for i, name in enumerate(TABLES)}
