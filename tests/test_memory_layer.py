"""The example of a memory layer, run as a user runs it."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memory_layer
from extent import long
from memory_layer import BEST, HEADS, WIDTH

SMALL = ["--pairs", "50", "--sub-keys", "16", "--batch-size", "8", "--steps", "10", "--steps-per-dispatch", "5"]


@pytest.fixture(scope="module", autouse=True)
def promotions_as_a_user_has_them():
    """The strict ones of the other tests are for the library; Flax and optax rely on JAX's defaults."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("memory") / "summary.json"


@pytest.fixture(scope="module")
def cached(path, promotions_as_a_user_has_them):
    return memory_layer.main([*SMALL, "--slots", "25%", "--summary", str(path)])


@pytest.mark.slow
def test_a_small_run_writes_its_summary(cached, path):
    assert json.loads(path.read_text()) == cached
    assert cached["steps"] == 10 and cached["slots"] == 64 and 0 < cached["hit_rate"] < 1
    assert cached["rows_written_back"] > 0


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--slots", "100%"], marks=[pytest.mark.slow, long("others move rows too")]),
        pytest.param(["--slots", "25%", "--policy", "lfu", "--prefetch"], marks=pytest.mark.slow),
    ],
)
def test_however_rows_are_moved_the_same_is_trained(cached, flags, capsys):
    other = memory_layer.main([*SMALL, *flags])
    for figure in ("loss", "with_memory", "without"):
        assert other[figure] == cached[figure]
    if flags == ["--slots", "100%"]:
        assert other["rows_written_back"] == 0
    assert "pairs recalled with memory" in capsys.readouterr().out


def test_a_query_finds_the_best_of_all_keys():
    model = memory_layer.MemoryModel(16, rngs=nnx.Rngs(0))
    hidden = jax.random.normal(jax.random.key(1), (5, WIDTH))
    ids, weights = (np.asarray(array).reshape(5, HEADS, BEST) for array in model.query(hidden))
    halves = np.asarray(model.half_norm(model.to_query(model.query_norm(hidden)).reshape(5, HEADS, 2, WIDTH)))
    keys = np.asarray(model.sub_keys[...])
    for sample in range(5):
        for head in range(HEADS):
            first, second = (keys[head, half] @ halves[sample, head, half] for half in (0, 1))
            scores = (first[:, None] + second[None, :]).reshape(-1)
            best = np.argsort(-scores)[:BEST]
            assert ids[sample, head].tolist() == best.tolist()
            expected = np.exp(scores[best] - scores[best].max())
            np.testing.assert_allclose(weights[sample, head], expected / expected.sum(), rtol=1e-5)


def test_pairs_have_different_keys_and_all_are_tested_once():
    pairs = memory_layer.make_pairs(50, seed=0)
    assert len(np.unique(pairs.keys, axis=0)) == 50
    assert pairs.keys.min() >= 0 and pairs.keys.max() < memory_layer.TOKENS
    batches = memory_layer.in_batches(pairs.keys, 8)
    assert batches.shape == (7, 8, memory_layer.LENGTH)
    assert np.array_equal(batches.reshape(56, -1)[:50], pairs.keys)
    logits = jax.nn.one_hot(jnp.resize(pairs.values, (7, 8)), memory_layer.VALUES)
    assert memory_layer.accuracy(logits, pairs) == 1
    assert memory_layer.accuracy(logits.at[0, 0].multiply(-1), pairs) == 0.98


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--slots", "3"], "argument --slots: admit, step 0:"),
        (["--pairs", "70000"], "argument --pairs: there are 65536 keys of 4 tokens"),
        (["--sub-keys", "3"], "argument --sub-keys: expected 4 to 46340"),
        (["--sub-keys", "46341"], "argument --sub-keys: expected 4 to 46340"),
        (["--summary", "no/folder.json"], "no folder"),
    ],
)
def test_bad_flags_are_one_line(arguments, text, capsys):
    with pytest.raises(SystemExit, match="2"):
        memory_layer.main([*SMALL, *arguments])
    assert text in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
@long("small runs")
def test_at_default_size_the_memory_recalls_what_the_model_alone_cannot():
    figures = memory_layer.main([])
    assert figures["table_bytes"] > 5 * figures["device_bytes"]
    assert figures["with_memory"] > 0.95 and figures["without"] < 0.3
