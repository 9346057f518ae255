"""The example script, run as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest

import train_dlrm

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "criteo_80k.tsv.gz"
SMALL = ["--rows", "5000", "--slots", "90%", "--batch-size", "64", "--steps", "12"]
KEYS = {
    "steps", "loss", "auc", "ceiling", "samples_per_second", "hit_rate", "rows_fetched", "rows_written_back", "slots",
    "device_bytes", "table_bytes", "stages",
}  # fmt: skip


@pytest.fixture(autouse=True)
def promotions_as_a_user_has_them():
    """The strict ones of the other tests are for the library; Flax and optax rely on JAX's defaults."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_a_small_run_writes_its_summary_and_prints_its_figures(tmp_path, capsys):
    path = tmp_path / "summary.json"
    summary = train_dlrm.main([*SMALL, "--summary", str(path)])
    assert json.loads(path.read_text()) == summary and set(summary) == KEYS
    assert summary["steps"] == 12 and 0 < summary["hit_rate"] < 1
    assert set(summary["stages"]) == {"loader", "plan", "collect", "send", "step", "write-back"}
    printed = capsys.readouterr().out
    for text in ("test AUC", "ceiling", "bytes on the device", "bounds the run", "hit rate"):
        assert text in printed


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_cached_and_uncached_runs_agree_to_the_last_digit(optimizer):
    arguments = ["--rows", "5000", "--batch-size", "64", "--steps", "12", "--optimizer", optimizer]
    cached = train_dlrm.main([*arguments, "--slots", "40%", "--window", "3"])
    uncached = train_dlrm.main([*arguments, "--no-cache"])
    assert (cached["loss"], cached["auc"]) == (uncached["loss"], uncached["auc"])
    assert cached["rows_written_back"] > 0 == uncached["rows_fetched"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--slots", "0"], "argument --slots"),
        (["--slots", "200%"], "at most 100%"),
        (["--rows", "5000", "--slots", "3", "--steps", "2"], "slots for its unique rows"),
        (["--data", "no-such-file"], "no-such-file"),
        (["--epochs", "2"], "needs --data"),
        (["--optimizer", "lamb"], "invalid choice"),
    ],
)
def test_bad_flags_are_one_line(arguments, text, capsys):
    with pytest.raises(SystemExit, match="2"):
        train_dlrm.main(arguments)
    assert text in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.skipif(not REAL_DATA.exists(), reason="the real click log is not on this machine")
@pytest.mark.parametrize(("slots", "batch"), [("10%", "512"), ("5%", "256"), ("1.5%", "128")])
def test_auc_on_the_real_log_is_that_without_a_cache(slots, batch):
    arguments = ["--data", str(REAL_DATA), "--batch-size", batch]
    cached = train_dlrm.main([*arguments, "--slots", slots])
    uncached = train_dlrm.main([*arguments, "--no-cache"])
    assert (cached["auc"], cached["loss"]) == (uncached["auc"], uncached["loss"])
    assert cached["auc"] > 0.75 and cached["rows_fetched"] > cached["slots"]
