"""Workloads, and two ways to train on them: through `LookAhead`, and with every row on the device and no planner."""

from __future__ import annotations

import dataclasses
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcache as jc
from embedding import MODEL_OPTIMIZER, inputs_of, make_model
from jaxcache import kernels
from jaxcache.state import empty_cache, slot_entries
from synthetic import DENSE_FEATURES

SCATTER = 2_654_435_761  # a prime: popular rows lie scattered over a table
DRAWN_AHEAD = 32  # batches that window "auto" may hold, so that it has opened before anything is timed
RUN_IN = 8  # steps before each timed turn, in which the pipeline fills again

Batch = dict[str, Any]


def zeros(stream: int, rows: np.ndarray, table: jc.Table) -> np.ndarray:
    """Initial rows. The cache and the tables on the device start from the same ones without a way for them."""
    return np.zeros((len(rows), table.dim), np.float32)


@dataclass(frozen=True)
class Workload:
    """Tables that are alike, looked up by one power law.

    Attributes:
        name: of the workload.
        tables, rows, dim: their number, and the rows and width of each.
        batch, ids: samples a batch, and ids a table and sample; several are pooled to their sum.
        exponent: rank r of a table is looked up in proportion to r**-exponent, in its continuous form.
    """

    name: str
    tables: int
    rows: int
    dim: int
    batch: int
    ids: int
    exponent: float

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.tables} tables x {self.rows:,} rows x dim {self.dim}, batch {self.batch:,}, "
            f"{self.ids} ids a table and sample, power law {self.exponent:.3f}: the hottest 2 % of the rows have "
            f"{share_of_hottest(self.exponent, self.rows):.1%} of the lookups"
        )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"C{number + 1}" for number in range(self.tables))

    @property
    def all_rows(self) -> int:
        return self.tables * self.rows

    @property
    def features(self) -> dict[str, jc.Feature]:
        return {name: jc.Feature(name, "sum" if self.ids > 1 else None) for name in self.names}

    def store(self, optimizer: optax.GradientTransformation) -> jc.HostStore:
        return jc.HostStore({name: jc.Table(self.rows, self.dim, zeros) for name in self.names}, optimizer)

    def places(self, ranks: np.ndarray) -> np.ndarray:
        """The ids of rows by popularity."""
        return ranks * SCATTER % self.rows

    def hottest(self, number: int) -> np.ndarray:
        """Keys `int64[number]` of the rows with the most lookups, the hottest first."""
        ranks = np.arange(-(-number // self.tables))
        return (np.arange(self.tables) * self.rows + self.places(ranks)[:, None]).ravel()[:number]

    def counts(self) -> dict[str, np.ndarray]:
        """How often each row is looked up, by the law itself."""
        edges = _cumulative(np.arange(self.rows + 1), self.exponent, self.rows)
        counts = np.empty(self.rows, np.int32)
        counts[self.places(np.arange(self.rows))] = np.maximum(np.diff(edges) * 2e9, 1)
        return dict.fromkeys(self.names, counts)

    def draw(self, number: int) -> Batch:
        """Batch `number`: {"all": int32 [tables, B, ids], "ids": the same by table, "dense": [B, 13], "label": [B]}."""
        random = np.random.default_rng((7, number))
        power, most = _power(self.exponent), np.log(self.rows + 1.0)
        drawn = random.random((self.tables, self.batch, self.ids))
        ranks = np.expm1(np.log1p(drawn * np.expm1(power * most)) / power).astype(np.int64)
        every = self.places(np.minimum(ranks, self.rows - 1)).astype(np.int32)
        shape = (self.batch, self.ids) if self.ids > 1 else (self.batch,)
        return {
            "all": every,
            "ids": {name: ids.reshape(shape) for name, ids in zip(self.names, every, strict=True)},
            "dense": random.standard_normal((self.batch, DENSE_FEATURES), dtype=np.float32),
            "label": (random.random(self.batch) < 0.26).astype(np.float32),
        }

    def batches(self, number: int) -> list[Batch]:
        """So many batches, drawn on all cores before anything is timed."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(self.draw, range(number)))


def _power(exponent: float) -> float:
    return 1.0 - exponent if abs(1.0 - exponent) > 1e-9 else 1e-9


def _cumulative(ranks: Any, exponent: float, rows: int) -> Any:
    """Share of the lookups that go to the first `ranks` rows."""
    power = _power(exponent)
    return np.expm1(power * np.log(np.asarray(ranks) + 1.0)) / np.expm1(power * np.log(rows + 1.0))


def share_of_hottest(exponent: float, rows: int, part: float = 0.02) -> float:
    """Share of the lookups that go to the hottest `part` of the rows."""
    return float(_cumulative(part * rows, exponent, rows))


def exponent_for(share: float, rows: int) -> float:
    """The exponent for which the hottest 2 % of the rows have `share` of the lookups."""
    low, high = 0.0, 3.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if share_of_hottest(middle, rows) < share else (low, middle)
    return low


def unique_rows(batch: Batch, rows: int) -> np.ndarray:
    """Keys `int64[U]` of the rows that a batch looks up."""
    every = batch["all"]
    keys = np.sort((every.reshape(len(every), -1) + rows * np.arange(len(every))[:, None]).ravel())
    return keys[np.concatenate([[True], keys[1:] != keys[:-1]])]  # np.unique takes several times as long


def bound_of(workload: Workload, batches: Sequence[Batch]) -> int:
    """A bound on the unique rows of a batch, from some of them."""
    return roomy(max(len(unique_rows(batch, workload.rows)) for batch in batches[:: max(1, len(batches) // 40)]))


def first_steps(contenders: Sequence[Contender]) -> None:
    """Their first steps, side by side, for what these compile."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda contender: contender.run(1), contenders))


def roomy(number: int) -> int:
    """A bound an eighth above a number."""
    return -(-(number + number // 8) // 128) * 128


def on_device(optimizer: jc.RowOptimizer, rows: int) -> kernels.Slots:
    """Untrained rows on the device."""
    initial = optimizer.initial_state(np.zeros((1, optimizer.dim), np.float32))

    @jax.jit
    def make() -> kernels.Slots:
        state = tuple(jnp.broadcast_to(leaf[0], (rows, *leaf.shape[1:])) for leaf in initial)
        return kernels.Slots(
            jnp.zeros((rows, optimizer.dim), optimizer.dtype), state, jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool)
        )

    return make()


def filled(store: jc.HostStore, slots: int, keys: np.ndarray) -> jc.CacheState:
    """A cache that holds the untrained rows at `keys`, the hottest first; the coldest are the first to go."""
    (rows,), cached = store.groups, empty_cache(store, slots)
    entries = np.full((slots, 3), jc.GroupCache.FREE, np.int32)
    entries[: len(keys)] = slot_entries(rows.group, keys[::-1])
    (group,) = cached.groups
    kept = on_device(rows.optimizer, slots)
    group = dataclasses.replace(
        group, buffer=jc.Rows(kept.weights, kept.state), slot_table=jnp.array(entries), counts=kept.counts
    )
    return dataclasses.replace(cached, groups=(group,))


def _train_model(loss_of: Callable, train: Any, rows: dict[str, jax.Array], inputs: Any) -> tuple[Any, Any, jax.Array]:
    """A step of the model's own parameters; also the gradients of the rows, and the loss."""
    parameters, state = train
    loss, (gradients, row_gradients) = jax.value_and_grad(loss_of, argnums=(0, 1))(parameters, rows, inputs)
    steps, state = MODEL_OPTIMIZER.update(gradients, state, parameters)
    return (optax.apply_updates(parameters, steps), state), row_gradients, loss


@cache  # contenders of one workload share what is compiled
def _model(model: str, workload: Workload) -> tuple[Any, Callable]:
    @dataclass(frozen=True)
    class Described:
        tables: tuple[str, ...] = workload.names
        dim: int = workload.dim

    return make_model(model, Described())


def _start(model: str, workload: Workload) -> Any:
    parameters = jax.tree.map(jnp.copy, _model(model, workload)[0])
    return parameters, MODEL_OPTIMIZER.init(parameters)


class Contender(ABC):
    """Trains step after step when asked.

    Attributes:
        name: in tables.
        losses: of all steps, on the device.
    """

    def __init__(self, name: str, batches: Sequence[Batch]):
        self.name, self.losses = name, []
        self._batches: Iterator[Batch] = iter(batches)

    @abstractmethod
    def step(self) -> None:
        """Makes one step, without waiting for it."""

    @abstractmethod
    def close(self) -> None:
        """Ends its threads, and checks what is known at the end."""

    def run(self, steps: int) -> float:
        """Makes so many steps; seconds until the last one's loss is there. The loss is not waited for in between."""
        start = time.perf_counter()
        for _ in range(steps):
            try:
                self.step()
            except StopIteration:
                raise RuntimeError(f"{self.name}: the batches ended after {len(self.losses)}") from None
        jax.block_until_ready(self.losses[-1])
        return time.perf_counter() - start


class Cached(Contender):
    """Through `LookAhead`. The cache starts with the hottest rows in it, unless it is told not to."""

    def __init__(
        self,
        name: str,
        workload: Workload,
        model: str,
        store: jc.HostStore,
        batches: Sequence[Batch],
        slots: int,
        warm: bool = True,
        **arguments: Any,
    ):
        super().__init__(name, batches)
        given = [{name: batch[name] for name in ("ids", "dense", "label")} for batch in batches]
        if "policy" not in arguments and "window" not in arguments:
            arguments["max_window"] = DRAWN_AHEAD
        self._stack = ExitStack()
        self.ahead = self._stack.enter_context(
            jc.LookAhead(store, given, lambda batch: batch["ids"], slots, features=workload.features, **arguments)
        )
        try:
            self.cache = self.ahead.start(filled(store, slots, workload.hottest(slots)) if warm else None)
        except BaseException:
            self._stack.close()
            raise
        self._train, self._step = _start(model, workload), _cached_step(model, workload)

    def step(self) -> None:
        batch, plan = next(self.ahead)
        cache = self.ahead.exchange(self.cache, plan)
        self.cache, self._train, loss = self._step(cache, plan, self._train, inputs_of(batch))
        self.losses.append(loss)

    def close(self) -> None:
        self._stack.close()


@cache
def _cached_step(model: str, workload: Workload) -> Callable:
    loss_of = _model(model, workload)[1]

    @partial(jax.jit, donate_argnums=(0, 2))
    def step(cached, plan, train, inputs):
        rows = jc.lookup(cached, plan)
        train, row_gradients, loss = _train_model(loss_of, train, rows, inputs)
        return jc.update(cached, plan, row_gradients), train, loss

    return step


class OnDevice(Contender):
    """Every row on the device and no planner: raw ids go into `jit`, and are made unique there.

    The same kernels look up and update. Its bound on unique rows, without which nothing can be compiled, it is given
    from the batches themselves.
    """

    def __init__(self, name: str, workload: Workload, model: str, optimizer: Any, batches: Sequence[Batch], bound: int):
        super().__init__(name, batches)
        self._optimizer = jc.RowOptimizer(optimizer, workload.dim)
        self._kept, self._scalars = on_device(self._optimizer, workload.all_rows), self._optimizer.scalars
        self._train, self._unique = _start(model, workload), []
        self._step = _step_without_planner(model, workload, self._optimizer, bound, kernels.choose())
        self._bound = bound

    def step(self) -> None:
        batch = next(self._batches)
        self._kept, self._scalars, self._train, loss, unique = self._step(
            self._kept, self._scalars, self._train, batch["all"], inputs_of(batch)
        )
        self.losses.append(loss)
        self._unique.append(unique)

    def close(self) -> None:
        most = max(map(int, self._unique), default=0)
        if most > self._bound:
            raise AssertionError(f"{self.name}: {most:,} unique rows, and the step was compiled for {self._bound:,}")


def make_unique(keys: jax.Array, bound: int, absent: int) -> tuple[jax.Array, ...]:
    """What `jnp.unique(keys, size=bound, fill_value=absent, return_inverse=True)` returns, and by the same one sort
    the order of the lookups, where each unique key begins in it, and how many there are."""
    order = jnp.argsort(keys, stable=True).astype(jnp.int32)
    ranked = keys[order]
    first = jnp.concatenate([jnp.ones(1, bool), ranked[1:] != ranked[:-1]])
    rank = jnp.cumsum(first, dtype=jnp.int32) - 1
    inverse = jnp.zeros_like(order).at[order].set(rank, unique_indices=True)
    begins = jnp.nonzero(first, size=bound, fill_value=len(keys))[0].astype(jnp.int32)
    unique = ranked.at[begins].get(mode="fill", fill_value=absent)
    starts = jnp.concatenate([begins, jnp.full(1, len(keys), jnp.int32)])
    return unique, inverse, order, starts, rank[-1] + 1


@cache
def _step_without_planner(
    model: str, workload: Workload, optimizer: jc.RowOptimizer, bound: int, choice: kernels.Choice
) -> Callable:
    loss_of = _model(model, workload)[1]
    tables, batch, ids = workload.tables, workload.batch, workload.ids

    @partial(jax.jit, donate_argnums=(0, 2))
    def step(kept, scalars, train, every, inputs):
        keys = (every + workload.rows * jnp.arange(tables, dtype=jnp.int32)[:, None, None]).reshape(-1)
        unique, inverse, order, starts, number = make_unique(keys, bound, workload.all_rows)
        yes = number <= bound
        sources = None
        if ids == 1:
            found = kernels.gather(kept.weights, unique, inverse, yes, choice=choice)
        else:
            bags = [kernels.Bags(batch, batch * ids)] * tables
            found = kernels.pool(kept.weights, unique, inverse, bags, None, yes, choice=choice)
            sources = jnp.arange(tables * batch * ids, dtype=jnp.int32) // ids
        rows = dict(zip(workload.names, found.reshape(tables, batch, -1), strict=True))
        train, row_gradients, loss = _train_model(loss_of, train, rows, inputs)
        gradient = jnp.concatenate([row_gradients[name] for name in workload.names])
        gradients = kernels.Gradients(gradient, sources, None, inverse, order, starts)
        rule = optimizer.rule(scalars, optimizer.hyperparameters)
        kept = kernels.update(kept, unique, gradients, rule, yes, choice=choice)
        return kept, optimizer.advance(scalars, optimizer.hyperparameters), train, loss, number

    return step
