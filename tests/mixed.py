"""Models over tables and features of every kind, drawn by hypothesis and trained through a cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import strategies as st

import jaxcache as jc

SAMPLES = 6

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.05, momentum=0.9),
    "adagrad": lambda: optax.adagrad(0.2),
    "rowwise_adagrad": lambda: jc.rowwise_adagrad(0.2),
    "adam": lambda: optax.adam(0.05),
    "catch_up_adam": lambda: jc.catch_up_adam(0.05),
    "chain": lambda: optax.chain(optax.clip(0.05), optax.adagrad(optax.exponential_decay(0.3, 3, 0.7))),
    "decay": lambda: optax.chain(optax.add_decayed_weights(0.05), optax.sgd(0.1)),
}


@dataclass(frozen=True)
class TableKind:
    """What a table is made of. Equal pairs of an optimizer's name and `copy` are one object; None is the store's."""

    rows: int
    dim: int
    dtype: str = "float32"
    keeps: str = "nearest"  # or "stochastic", "master_copy", "frozen"
    optimizer: tuple[str, int] | None = None
    out_of_range: str = "error"


@dataclass(frozen=True)
class FeatureKind:
    """A feature, and how its ids arrive."""

    table: str
    combiner: str | None = None
    padding: int | None = None
    layout: str = "one"  # [B], or "many" [B, L], "deep" [B, 2, L], "ragged"
    length: int = 3
    dtype: str = "int64"
    weights: str | None = None  # the dtype of the weights, if there are any
    on_device: bool = False
    named: bool = True  # or it is the table itself, without a `Feature`

    @property
    def feature(self) -> jc.Feature:
        return jc.Feature(self.table, self.combiner, self.padding)


@dataclass(frozen=True)
class Configuration:
    """Tables, features, a stream of batches, and how the cache that is compared with full residency works.

    Attributes:
        sizes: samples of each batch.
        capacity: "mapping", "number", "share" or "bytes".
        spare: slots above the fewest that will do, for each group or in all.
        flush_after: a step after which the cache is flushed and checked, if there are as many.
        all_gradients: whether those of frozen tables are given to `update` too.
    """

    tables: dict[str, TableKind]
    features: dict[str, FeatureKind]
    optimizer: str
    sizes: tuple[int, ...]
    seed: int
    capacity: str = "mapping"
    spare: int = 0
    window: int | str = "auto"
    policy: str = "lookahead"
    flush_after: int = 0
    all_gradients: bool = True

    def make_store(self) -> jc.HostStore:
        objects: dict[tuple[str, int], optax.GradientTransformation] = {}

        def table(kind: TableKind) -> jc.Table:
            optimizer = kind.optimizer
            if optimizer is not None and optimizer not in objects:
                objects[optimizer] = OPTIMIZERS[optimizer[0]]()
            return jc.Table(
                kind.rows,
                kind.dim,
                jc.uniform(0.5),
                dtype=jnp.dtype(kind.dtype),
                rounding="stochastic" if kind.keeps == "stochastic" else "nearest",
                master_copy=kind.keeps == "master_copy",
                optimizer=None if optimizer is None else objects[optimizer],
                frozen=kind.keeps == "frozen",
                out_of_range=kind.out_of_range,
            )

        tables = {name: table(kind) for name, kind in self.tables.items()}
        return jc.HostStore(tables, optimizer=OPTIMIZERS[self.optimizer](), seed=self.seed)

    @property
    def named_features(self) -> dict[str, jc.Feature]:
        return {name: kind.feature for name, kind in self.features.items() if kind.named}

    def batches(self) -> list[dict[str, Any]]:
        random = np.random.default_rng(self.seed)
        return [
            {
                "ids": {name: self._draw(random, kind, samples) for name, kind in self.features.items()},
                "labels": random.normal(size=samples).astype(np.float32),
            }
            for samples in self.sizes
        ]

    def _draw(self, random: np.random.Generator, kind: FeatureKind, samples: int) -> Any:
        """The ids of a feature as a loader yields them."""
        put = jnp.asarray if kind.on_device else np.asarray
        shape = {"one": (samples,), "many": (samples, kind.length), "deep": (samples, 2, kind.length)}
        offsets = None
        if kind.layout == "ragged":
            lengths = random.integers(0, kind.length + 1, samples) * (random.random(samples) < 0.8)
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(random.choice(["int32", "int64"]))
            shape["ragged"] = (int(offsets[-1]),)
            if kind.on_device:
                offsets = jnp.asarray(offsets.astype(np.int32))
        ids = self._draw_ids(random, kind, shape[kind.layout])
        weights = None
        if kind.weights is not None:
            weights = random.choice([0.0, 0.25, 1.0, 1.7, 2.0], ids.shape) * random.choice([0.3, 1.0])
            if kind.combiner == "sum":
                weights = weights * random.choice([-1.0, 1.0], ids.shape)
            weights = put(weights.astype(jnp.dtype(kind.weights)))
        if offsets is None and weights is None:
            return put(ids)
        return jc.Bags(put(ids), offsets, weights)

    def _draw_ids(self, random: np.random.Generator, kind: FeatureKind, shape: tuple[int, ...]) -> np.ndarray:
        table, limits = self.tables[kind.table], np.iinfo(kind.dtype)
        how = random.choice(["skewed", "uniform", "few"])
        if how == "skewed":
            ids = random.zipf(1.4, shape) % table.rows
        elif how == "uniform":
            ids = random.integers(0, table.rows, shape)
        else:
            ids = random.integers(0, min(table.rows, 3), shape)
        ids = ids.astype(kind.dtype)
        others = []
        if kind.padding is not None:
            others.append(kind.padding)
        if table.out_of_range == "ignore":
            others += [-1, table.rows, table.rows + 5, int(limits.max), int(limits.min)]
        for other in others:
            if limits.min <= other <= limits.max and (other == kind.padding or not 0 <= other < table.rows):
                ids[random.random(shape) < (0.2 if other == kind.padding else 0.04)] = other
        return ids

    def present(self, name: str, ids: np.ndarray) -> np.ndarray:
        """The lookups of `ids` that stand for rows, and not for padding or something outside the table."""
        return np.array([i for i in self._integers(ids) if i != self.features[name].padding and self._is_in(name, i)])

    def ignored(self) -> dict[str, int]:
        """How many lookups of each feature are out of range, over all batches."""
        counts = dict.fromkeys(self.features, 0)
        for batch in self.batches():
            for name, ids in batch["ids"].items():
                outside = (i for i in self._integers(ids) if not self._is_in(name, i))
                counts[name] += sum(i != self.features[name].padding for i in outside)
        return counts

    def _is_in(self, name: str, i: int) -> bool:
        return 0 <= i < self.tables[self.features[name].table].rows

    @staticmethod
    def _integers(ids: Any) -> list[int]:
        return np.asarray(ids.ids if isinstance(ids, jc.Bags) else ids).reshape(-1).tolist()

    def fewest_slots(self, store: jc.HostStore) -> dict[str, int]:
        """By the first table of each group, the most unique rows that a batch has in it; at least 1."""
        fewest = {}
        for part in store.groups:
            sizes = [1]
            for batch in self.batches():
                rows = [
                    (self.features[name].table, row)
                    for name, ids in batch["ids"].items()
                    if self.features[name].table in part.group.names
                    for row in self.present(name, ids).tolist()
                ]
                sizes.append(len(set(rows)))
            fewest[part.group.name] = max(sizes)
        return fewest

    def capacity_arguments(self, store: jc.HostStore) -> dict[str, Any]:
        """What `LookAhead` gets for `capacity`."""
        fewest = self.fewest_slots(store)
        if self.capacity == "mapping":
            # A group is named by any of its tables.
            names = {part.group.name: part.group.names[self.seed % len(part.group.names)] for part in store.groups}
            return {"slots": {names[name]: number + self.spare for name, number in fewest.items()}}
        total = sum(fewest.values()) + self.spare
        if self.capacity == "number":
            return {"slots": total}
        if self.capacity == "share":
            rows = sum(kind.rows for kind in self.tables.values())
            return {"slots": f"{min(100, math.ceil(100 * total / rows))}%"}
        # Beside its row a slot takes three words of the slot table, a count and a flag.
        takes = sum(
            min(fewest[part.group.name] + self.spare, part.group.rows) * (part.row_bytes + 17) for part in store.groups
        )
        return {"device_bytes": takes + 1024}

    def cached_arguments(self, store: jc.HostStore) -> dict[str, Any]:
        looks = {"window": self.window} if self.policy == "lookahead" else {}
        return {**self.capacity_arguments(store), **looks, "policy": getattr(jc, self.policy)()}


def loss_function(outputs: dict[str, jax.Array], labels: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean squared error of a sum over all that was looked up, over the samples that are no padding."""
    found = jnp.zeros_like(labels)
    for output in outputs.values():
        factors = jnp.linspace(0.2, 0.5, output.shape[-1], dtype=jnp.float32)
        terms = jnp.tanh(output) * jnp.broadcast_to(factors, output.shape)
        found = found + jnp.sum(terms.reshape(labels.shape[0], -1), axis=1)
    errors = jnp.where(mask, (found - labels) ** 2, 0.0)
    return jnp.sum(errors) / jnp.maximum(jnp.sum(mask.astype(jnp.float32)), 1.0)


@dataclass
class Result:
    """Losses of all steps; after the last flush all weights and row leaves of each table, and scalars of each group."""

    losses: list[float]
    rows: dict[str, list[np.ndarray]]
    scalars: list[np.ndarray]
    report: jc.Report

    def assert_same_bits(self, other: Result) -> None:
        assert np.isfinite(self.losses).all() and len(self.losses) == len(other.losses)
        np.testing.assert_array_equal(self.losses, other.losses)
        assert self.rows.keys() == other.rows.keys()
        for name, leaves in self.rows.items():
            for mine, theirs in zip(leaves, other.rows[name], strict=True):
                assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
                assert np.isfinite(mine.astype(np.float32)).all()
                np.testing.assert_array_equal(_bits(mine), _bits(theirs), name)
        for mine, theirs in zip(self.scalars, other.scalars, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(f"u{array.itemsize}").reshape(array.shape)


def make_step(loss: Callable = loss_function, without: tuple[str, ...] = ()) -> Any:
    """A train step that leaves the gradients of the features `without` out."""

    @partial(jax.jit, donate_argnums=0)
    def step(cache, plan, labels):
        outputs = jc.lookup(cache, plan)
        value, gradients = jax.value_and_grad(loss)(outputs, labels, plan.mask)
        return jc.update(cache, plan, {name: leaf for name, leaf in gradients.items() if name not in without}), value

    return step


def train(configuration: Configuration, store: jc.HostStore, loss: Callable = loss_function, **arguments) -> Result:
    """Trains, flushes, checks every invariant, and sees that the step compiled once and with each growth of shapes."""
    frozen = [
        name for name, kind in configuration.features.items() if configuration.tables[kind.table].keeps == "frozen"
    ]
    step = make_step(loss, () if configuration.all_gradients else tuple(frozen))
    losses = []
    with jc.LookAhead(
        store,
        configuration.batches(),
        ids=lambda batch: batch["ids"],
        features=configuration.named_features,
        **arguments,
    ) as ahead:
        cache = ahead.start()
        for batch, plan in ahead:
            cache = ahead.exchange(cache, plan)
            cache, value = step(cache, plan, batch["labels"])
            losses.append(value)
            if len(losses) == configuration.flush_after:
                cache = ahead.flush(cache)
                jc.check(cache, store)
        cache = ahead.flush(cache)
    jc.check(cache, store)
    report = ahead.report()
    assert step._cache_size() <= 1 + report.bound_growths
    assert report.steps == store.step == len(configuration.sizes)
    rows = {}
    for name, kind in configuration.tables.items():
        every = np.arange(kind.rows)
        rows[name] = [store.rows(name, every), *store.row_state(name, every)]
        assert rows[name][0].shape == (kind.rows, kind.dim)
    scalars = [np.asarray(scalar) for part in store.groups for scalar in part.scalars]
    return Result([float(value) for value in losses], rows, scalars, report)


# Strategies

NARROW = ("float16", "bfloat16")
DTYPES = ("int8", "uint8", "int16", "int32", "uint32", "int64", "uint64")


@st.composite
def table_kinds(draw) -> dict[str, TableKind]:
    """1 to 5 tables. Few dims, so that some are stacked."""
    dims = draw(st.lists(st.integers(1, 9), min_size=1, max_size=2))
    kinds = {}
    for number in range(draw(st.integers(1, 5))):
        dtype = draw(st.sampled_from(["float32", "float32", *NARROW]))
        keeps = ["nearest", "nearest", "frozen"] + (["stochastic", "master_copy"] * 2 if dtype in NARROW else [])
        kept = draw(st.sampled_from(keeps))
        own = st.tuples(st.sampled_from(list(OPTIMIZERS)), st.integers(0, 1))
        kinds[f"table {number}"] = TableKind(
            rows=draw(st.integers(3, 60)),
            dim=draw(st.sampled_from(dims)),
            dtype=dtype,
            keeps=kept,
            optimizer=None if kept == "frozen" else draw(st.one_of(st.none(), own)),
            out_of_range=draw(st.sampled_from(["error", "ignore"])),
        )
    return kinds


@st.composite
def feature_kinds(draw, tables: dict[str, TableKind]) -> dict[str, FeatureKind]:
    """1 to 6 features; a table may have several or none."""
    kinds = {}
    for number in range(draw(st.integers(1, 6))):
        table = draw(st.sampled_from(sorted(tables)))
        combiner = draw(st.sampled_from([None, "sum", "mean", "sum", "mean"]))
        layout = draw(st.sampled_from(["one", "many", "deep"] + (["ragged"] * 3 if combiner else [])))
        dtype = draw(st.sampled_from(DTYPES))
        kind = FeatureKind(
            table=table,
            combiner=combiner,
            padding=draw(st.sampled_from([None, None, -1, 0, tables[table].rows + 2])),
            layout=layout,
            length=draw(st.integers(1, 4)),
            dtype=dtype,
            weights=draw(st.sampled_from([None, "float32", "float64", "float16"])) if combiner else None,
            on_device=draw(st.booleans()),
        )
        if np.dtype(dtype).itemsize == 8 or kind.weights == "float64":
            kind = replace(kind, on_device=False)  # without x64 JAX has no such arrays
        kinds[f"feature {number}"] = kind
    bare = draw(st.sampled_from([None, *sorted(tables)]))
    if bare is not None:
        kinds[bare] = FeatureKind(bare, layout=draw(st.sampled_from(["one", "many"])), named=False)
    return kinds


@st.composite
def configurations(draw) -> Configuration:
    """Whole models, streams and caches."""
    tables = draw(table_kinds())
    capacity = draw(st.sampled_from(["mapping", "number", "share", "bytes"]))
    # Shares are taken from the first 8 batches: more could ask for another split.
    steps = draw(st.integers(1, 12 if capacity == "mapping" else 8))
    last = draw(st.sampled_from([SAMPLES, SAMPLES, 1, 3, 0]))
    return Configuration(
        tables=tables,
        features=draw(feature_kinds(tables)),
        optimizer=draw(st.sampled_from(list(OPTIMIZERS))),
        sizes=(*[SAMPLES] * (steps - 1), last if steps > 1 else SAMPLES),
        seed=draw(st.integers(0, 2**16)),
        capacity=capacity,
        spare=draw(st.sampled_from([0, 0, 1, 6])),
        window=draw(st.sampled_from([1, 2, 3, 5, "auto"])),
        policy=draw(st.sampled_from(["lookahead"] * 4 + ["lru", "no_cache"])),
        flush_after=draw(st.integers(0, 4)),
        all_gradients=draw(st.booleans()),
    )
