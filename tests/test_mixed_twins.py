"""Tables, features and optimizers mixed freely: a small cache gives the bits of full residency, and a dict's values."""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import jaxcache as jc
import oracle
from extent import examples
from mixed import SAMPLES, Configuration, TableKind, configurations, feature_kinds, train

# Twins


def check_twins(configuration: Configuration) -> None:
    """Trains through a small cache and with every row on the device."""
    small = configuration.make_store()
    cached = train(configuration, small, **configuration.cached_arguments(small))
    whole = configuration.make_store()
    uncached = train(configuration, whole, slots="100%", window=1)
    cached.assert_same_bits(uncached)
    assert uncached.report.rows_fetched == 0
    for report in (cached.report, uncached.report):
        assert {name: report.ignored.get(name, 0) for name in configuration.features} == configuration.ignored()
    if configuration.capacity == "bytes":
        assert cached.report.device_bytes <= configuration.capacity_arguments(small)["device_bytes"]
    for part in (*small.groups, *whole.groups):
        assert not (part.group.frozen and part.rows_written)
    for name, kind in configuration.tables.items():
        if kind.keeps == "frozen":
            untouched = configuration.make_store().rows(name, np.arange(kind.rows))
            np.testing.assert_array_equal(cached.rows[name][0], untouched)


@settings(max_examples=examples(3, 12))
@given(configuration=configurations())
def test_a_small_cache_gives_the_bits_of_full_residency(configuration):
    check_twins(configuration)


def fuzz(seconds: float) -> None:
    """The same, and the comparison below, for many configurations: `python tests/test_mixed_twins.py 600`."""
    start, done = time.monotonic(), 0

    def run(kinds, how):
        @settings(max_examples=20, database=None, derandomize=False, phases=[Phase.generate])
        @given(configuration=kinds)
        def check(configuration):
            nonlocal done
            done += 1
            how(configuration)

        check()
        jax.clear_caches()
        print(f"{done} configurations in {time.monotonic() - start:.0f} s", flush=True)

    while time.monotonic() - start < seconds:
        run(configurations(), check_twins)
        run(plain_configurations(), check_against_dicts)


# In double precision, with dicts and loops

RULES = {"sgd": oracle.Sgd(0.1), "adagrad": oracle.Adagrad(0.2), "adam": oracle.LazyAdam(0.05)}
SCALE = 0.1


@st.composite
def plain_configurations(draw) -> Configuration:
    """Features of all kinds over float32 tables with the optimizers that the oracle knows."""
    tables = {
        f"table {number}": TableKind(
            rows=draw(st.integers(3, 30)),
            dim=draw(st.sampled_from([1, 3])),
            keeps=draw(st.sampled_from(["nearest", "nearest", "frozen"])),
            out_of_range=draw(st.sampled_from(["error", "ignore"])),
        )
        for number in range(draw(st.integers(1, 3)))
    }
    for name, kind in tables.items():
        if kind.keeps != "frozen":
            rule = st.tuples(st.sampled_from(list(RULES)), st.just(0))
            tables[name] = replace(kind, optimizer=draw(st.one_of(st.none(), rule)))
    last = draw(st.sampled_from([SAMPLES, 2]))
    return Configuration(
        tables=tables,
        features=draw(feature_kinds(tables)),
        optimizer=draw(st.sampled_from(list(RULES))),
        sizes=(*[SAMPLES] * draw(st.integers(1, 4)), last),
        seed=draw(st.integers(0, 2**16)),
        window=draw(st.integers(1, 3)),
    )


def half_sum_of_squares(outputs, labels, mask):
    """What the oracle computes; the outputs of padding are zero."""
    return sum(jnp.sum(SCALE / 2 * coefficients(output.shape) * output**2) for output in outputs.values())


def coefficients(shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(np.linspace(0.5, 1.5, shape[-1], dtype=np.float32), shape)


def as_lists(value) -> tuple[list, list | None]:
    """Ids and weights with an entry for each sample."""
    if not isinstance(value, jc.Bags):
        return np.asarray(value).tolist(), None
    ids, weights = np.asarray(value.ids), None if value.weights is None else np.asarray(value.weights, np.float64)
    if value.offsets is not None:
        cuts = np.asarray(value.offsets)[1:-1]
        ids, weights = np.split(ids, cuts), None if weights is None else np.split(weights, cuts)
        return [part.tolist() for part in ids], None if weights is None else [part.tolist() for part in weights]
    return ids.tolist(), None if weights is None else weights.tolist()


def check_against_dicts(configuration: Configuration) -> None:
    store, batches = configuration.make_store(), configuration.batches()
    tables = {
        name: oracle.DictTable(
            store.rows(name, np.arange(kind.rows)),
            None if kind.keeps == "frozen" else RULES[kind.optimizer[0] if kind.optimizer else configuration.optimizer],
            ignores=kind.out_of_range == "ignore",
        )
        for name, kind in configuration.tables.items()
    }
    features = {
        name: oracle.DictFeature(tables[kind.table], kind.combiner, kind.padding)
        for name, kind in configuration.features.items()
    }
    losses = oracle.train_in_double(
        tables,
        features,
        [{name: as_lists(ids) for name, ids in batch["ids"].items()} for batch in batches],
        {name: coefficients((feature.table.dim,)) for name, feature in features.items()},
        SCALE,
    )
    found = train(configuration, store, half_sum_of_squares, **configuration.cached_arguments(store))
    np.testing.assert_allclose(found.losses, losses, rtol=1e-4, atol=1e-6)
    for name, table in tables.items():
        np.testing.assert_allclose(found.rows[name][0], list(table.rows.values()), rtol=1e-4, atol=2e-5, err_msg=name)


@settings(max_examples=examples(4, 12))
@given(configuration=plain_configurations())
def test_a_small_cache_agrees_with_dicts_and_loops_in_double_precision(configuration):
    check_against_dicts(configuration)


if __name__ == "__main__":
    import conftest  # noqa: F401 - strict JAX

    fuzz(float(sys.argv[1]))
