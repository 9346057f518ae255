"""On-demand training equals look-ahead training and training with every row on the device, bit for bit."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import jaxcache as jc
import mixed
from extent import examples, long
from on_demand import (
    POLICIES,
    check_on_demand,
    check_residents,
    int32,
    programs,
    rows_and_state,
    shared_store,
    stacked,
    train_ahead,
    train_on_demand,
)
from training import dense_start, make_batches, most_unique_rows

KINDS = ["skewed", "uniform", "distinct", "equal"]


def assert_twins(store: jc.HostStore, losses, expected) -> None:
    """Against the result of `train_ahead`."""
    np.testing.assert_array_equal(np.asarray(losses, np.float64), expected[0])
    for mine, other in zip(rows_and_state(store), expected[1], strict=True):
        np.testing.assert_array_equal(mine.view(np.int32), other.view(np.int32))


@pytest.mark.parametrize(
    "optimizer",
    ["adam", pytest.param("chain", marks=pytest.mark.slow)],
)
def test_every_optimizer_gives_the_bits_of_full_residency(optimizer):
    batches = make_batches(5, KINDS * 5)
    store, _, losses = train_on_demand(optimizer, batches, 16)
    assert_twins(store, losses, train_ahead(optimizer, batches, "100%"))


# Runs of steps and scans, with flushes between them and prefetches of right and wrong ids

SLOTS = 16  # what a batch of "distinct" ids needs
SCANNED = 3


@dataclass(frozen=True)
class Variant:
    """A policy, and how programs call `admit`."""

    policy: str
    fetch_bound: int | None
    split: bool
    prefetches: bool
    scans: bool = True  # or scans are steps too, which saves a compilation


VARIANTS = [
    Variant("lru", 3, split=False, prefetches=True),
    Variant("lfu", 5, split=True, prefetches=False, scans=False),
    Variant("static", None, split=False, prefetches=False, scans=False),
]


@dataclass(frozen=True)
class Run:
    """What is drawn. Segments are steps, or scans of some; what is prefetched comes from `seed`."""

    kinds: tuple[str, ...]
    segments: tuple[str, ...]
    flushes: tuple[bool, ...]
    prefetched: tuple[str, ...]
    seed: int


@st.composite
def runs(draw, longest: int = 6) -> Run:
    segments = draw(st.lists(st.sampled_from(["step", "step", "scan"]), min_size=1, max_size=longest))
    steps = sum(SCANNED if segment == "scan" else 1 for segment in segments)

    def each(values, number):
        return tuple(draw(st.lists(st.sampled_from(values), min_size=number, max_size=number)))

    return Run(
        each(KINDS, steps),
        tuple(segments),
        each([False, False, True], len(segments)),
        each(["right", "right", "wrong", "later", "used"], steps),
        draw(st.integers(0, 2**16)),
    )


@cache
def expected_of(run: Run, optimizer: str):
    batches = make_batches(run.seed, run.kinds)
    whole = train_ahead(optimizer, batches, "100%")
    losses, rows = train_ahead(optimizer, batches, most_unique_rows(batches))
    np.testing.assert_array_equal(losses, whole[0])
    for mine, theirs in zip(rows, whole[1], strict=True):
        np.testing.assert_array_equal(mine.view(np.int32), theirs.view(np.int32))
    return whole


def check_run(run: Run, variant: Variant, optimizer: str = "adam") -> None:
    batches = make_batches(run.seed, run.kinds)
    others = make_batches(run.seed + 1, run.kinds)
    following = [
        {"right": batches[(i + 1) % len(batches)], "later": batches[(i + 2) % len(batches)], "used": batches[i]}.get(
            how, others[i]
        )
        for i, how in enumerate(run.prefetched)
    ]
    step, scan = programs(optimizer, variant.fetch_bound, variant.split, variant.prefetches)
    store = shared_store(optimizer)
    with store:
        carry, losses = (jc.init(store, SLOTS, POLICIES[variant.policy]()), dense_start()), []
        for segment, flush in zip(run.segments, run.flushes, strict=True):
            first = len(losses)
            if segment == "scan" and variant.scans:
                part = slice(first, first + SCANNED)
                carry, of_scan = scan(carry, stacked(batches[part], following[part]))
                losses += np.asarray(of_scan).tolist()
            else:
                for number in range(first, first + (SCANNED if segment == "scan" else 1)):
                    batch = batches[number]
                    carry, loss = step(carry, (int32(batch), batch["labels"], int32(following[number])))
                    losses.append(float(loss))
            if flush:
                flushed = jc.flush(carry[0], store)
                check_on_demand(flushed, store)
                carry = flushed, carry[1]
            check_residents(carry[0])
        flushed = jc.flush(carry[0], store)
        check_on_demand(flushed, store)
    assert store.step == len(batches)
    assert_twins(store, losses, expected_of(run, optimizer))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.policy)
@settings(max_examples=examples(3, 12))
@given(run=runs(longest=5))
def test_runs_of_steps_and_scans_give_the_bits_of_full_residency(variant, run):
    check_run(run, variant)


# Tables, features and optimizers of every kind


@dataclass(frozen=True)
class Mixed:
    """A configuration of `mixed.py`, whose batches all have one size, and how it is trained on demand."""

    configuration: mixed.Configuration
    policy: str
    fetch_bound: int | None
    split: int  # features of the first `admit`; 0 if there is only one
    prefetch: str
    flush_after: int


@st.composite
def mixed_runs(draw) -> Mixed:
    configuration = draw(mixed.configurations())
    return Mixed(
        replace(configuration, sizes=(mixed.SAMPLES,) * len(configuration.sizes), capacity="mapping"),
        draw(st.sampled_from(list(POLICIES))),
        draw(st.sampled_from([None, 1, 2, 5])),
        draw(st.integers(0, len(configuration.features) - 1)),
        draw(st.sampled_from(["none", "right", "wrong"])),
        draw(st.integers(0, 4)),
    )


def loss_function(outputs, labels, mask):
    """With a mask that is no constant, as `plan.mask` is in on-demand mode: XLA would take it into account."""
    return mixed.loss_function(outputs, labels, labels == labels)


def as_arrays(run: Mixed) -> list[tuple[dict[str, tuple], Any]]:
    """Ids, offsets and weights of each batch as 32-bit arrays of one shape: something is behind the last bags."""
    kinds, batches, random = run.configuration.features, run.configuration.batches(), np.random.default_rng(0)
    most = {
        name: max(np.size(batch["ids"][name].ids) for batch in batches)
        for name, kind in kinds.items()
        if kind.layout == "ragged"
    }
    result = []
    for batch in batches:
        features = {}
        for name, value in batch["ids"].items():
            bags = value if isinstance(value, jc.Bags) else jc.Bags(value)
            ids, weights, offsets = np.asarray(bags.ids), bags.weights, bags.offsets
            limits = np.iinfo(np.int32)
            far = np.array([not limits.min <= i <= limits.max for i in ids.reshape(-1).tolist()], bool)
            if ids.dtype.itemsize == 8:
                ids = np.where(far.reshape(ids.shape), -7, ids.astype(np.int64)).astype(np.int32)
            weights = None if weights is None else np.asarray(weights).astype(np.float32)
            if name in most:
                behind = most[name] - len(ids)
                ids = np.concatenate([ids, random.integers(0, 100, behind).astype(ids.dtype)])
                weights = None if weights is None else np.concatenate([weights, np.full(behind, np.nan, np.float32)])
                offsets = np.asarray(offsets).astype(np.int32)
            features[name] = ids, offsets, weights
        result.append((features, batch["labels"]))
    return result


def check_mixed(run: Mixed, few_ahead: bool = True) -> None:
    configuration = run.configuration
    batches, whole = as_arrays(run), configuration.make_store()
    expected = mixed.train(configuration, whole, loss_function, slots="100%", window=1)
    if few_ahead:
        few = configuration.make_store()
        ahead = mixed.train(configuration, few, loss_function, **configuration.cached_arguments(few))
        ahead.assert_same_bits(expected)

    store, losses = configuration.make_store(), []
    fewest = configuration.fewest_slots(store)
    slots = [min(fewest[part.group.name] + configuration.spare, part.group.rows) for part in store.groups]
    counts = {name: np.arange(kind.rows) % 7 for name, kind in configuration.tables.items()}
    policy = jc.static(counts) if run.policy == "static" else POLICIES[run.policy]()
    frozen = {
        name for name, kind in configuration.features.items() if configuration.tables[kind.table].keeps == "frozen"
    }
    admit = partial(jc.admit, features=configuration.named_features, fetch_bound=run.fetch_bound)

    def bags(features):
        return {name: jc.Bags(*arrays) for name, arrays in sorted(features.items())}

    @partial(jax.jit, donate_argnums=0)
    def step(cache, features, labels, following):
        ids = bags(features)
        names, plans = list(ids), []
        for part in (names[: run.split], names[run.split :]):
            if part:
                cache, plan = admit(cache, store, {name: ids[name] for name in part})
                plans.append(plan)
        if run.prefetch != "none":
            cache = jc.prefetch(
                cache, store, bags(following), configuration.named_features, fetch_bound=run.fetch_bound
            )
        plan = jc.merge(cache, plans) if len(plans) > 1 else plans[0]
        outputs = jc.lookup(cache, plan)
        value, gradients = jax.value_and_grad(loss_function)(outputs, labels, plan.mask)
        if not configuration.all_gradients:
            gradients = {name: leaf for name, leaf in gradients.items() if name not in frozen}
        return jc.update(cache, plan, gradients), value

    cache = jc.init(store, slots, policy)
    for number, (features, labels) in enumerate(batches):
        following, _ = batches[(number + (1 if run.prefetch == "right" else 3)) % len(batches)]
        cache, value = step(cache, features, labels, following)
        losses.append(value)
        if len(losses) == run.flush_after:
            cache = jc.flush(cache, store)
            check_on_demand(cache, store)
            cache = jc.on_demand(cache, store, policy) if run.policy != "static" else cache
    cache = jc.flush(cache, store)
    check_on_demand(cache, store)
    store.transfers.close()
    assert step._cache_size() == 1
    found = {
        name: [store.rows(name, np.arange(kind.rows)), *store.row_state(name, np.arange(kind.rows))]
        for name, kind in configuration.tables.items()
    }
    scalars = [np.asarray(scalar) for part in store.groups for scalar in part.scalars]
    mixed.Result([float(value) for value in losses], found, scalars, expected.report).assert_same_bits(expected)


RICH = Mixed(
    mixed.Configuration(
        tables={
            "half": mixed.TableKind(40, 3, "bfloat16", "stochastic", ("adam", 0)),
            "other half": mixed.TableKind(9, 3, "bfloat16", "stochastic", ("adam", 0), "ignore"),
            "copied": mixed.TableKind(50, 2, "float16", "master_copy"),
            "frozen": mixed.TableKind(30, 2, keeps="frozen"),
        },
        features={
            "feature 0": mixed.FeatureKind("half", "mean", 0, "ragged", 4, "int16", "float32"),
            "feature 1": mixed.FeatureKind("half", None, None, "many", 2, "uint32"),
            "feature 2": mixed.FeatureKind("other half", "sum", None, "many", 3, "int8"),
            "feature 3": mixed.FeatureKind("copied", "sum", -1, "deep", 2, "int32", "float16"),
            "feature 4": mixed.FeatureKind("frozen", "mean", None, "many", 3),
            "half": mixed.FeatureKind("half", named=False),
        },
        optimizer="rowwise_adagrad",
        sizes=(mixed.SAMPLES,) * 8,
        seed=1,
        spare=1,
        all_gradients=False,
    ),
    policy="lfu",
    fetch_bound=2,
    split=2,
    prefetch="right",
    flush_after=3,
)


@pytest.mark.slow
@long("drawn runs of simpler models")
def test_a_model_of_every_kind_gives_the_bits_of_full_residency():
    check_mixed(RICH, few_ahead=False)


def fuzz(seconds: float) -> None:
    """The same for many that are drawn: `python tests/test_ondemand_twins.py 600`."""
    start, done = time.monotonic(), 0

    @settings(max_examples=10, database=None, derandomize=False, phases=[Phase.generate])
    @given(run=mixed_runs())
    def check(run):
        check_mixed(run)

    while time.monotonic() - start < seconds:
        check()
        jax.clear_caches()
        done += 10
        print(f"{done} runs in {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    import conftest  # noqa: F401 - strict JAX

    fuzz(float(sys.argv[1]))
