"""The example script, run as a user runs it."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import pytest

import jaxcache as jc
import train_dlrm
from extent import long

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


def small_run(optimizer, steps=12):
    return ["--rows", "5000", "--batch-size", "64", "--steps", str(steps), "--optimizer", optimizer]


@functools.cache
def uncached_run(optimizer):
    return train_dlrm.main([*small_run(optimizer), "--no-cache"])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", pytest.param("adam", marks=long("row-wise adagrad"))])
def test_cached_and_uncached_runs_agree_to_the_last_digit(optimizer):
    cached = train_dlrm.main([*small_run(optimizer), "--slots", "40%", "--window", "3"])
    uncached = uncached_run(optimizer)
    assert (cached["loss"], cached["auc"]) == (uncached["loss"], uncached["auc"])
    assert cached["rows_written_back"] > 0 == uncached["rows_fetched"]


def test_a_run_that_was_stopped_goes_on_and_ends_as_if_it_had_not_been(tmp_path, capsys):
    folder = tmp_path / "runs"
    cached = ["--slots", "40%", "--window", "3", "--checkpoint", str(folder)]
    train_dlrm.main([*small_run("adam", steps=7), *cached, "--checkpoint-every", "3"])
    printed = capsys.readouterr().out
    assert [f"checkpoint of step {step}: paused for " in printed for step in (3, 6, 7)] == [True] * 3
    assert "resumed" not in printed and sorted(path.name for path in folder.iterdir()) == ["6", "7"]

    resumed = train_dlrm.main([*small_run("adam"), *cached])
    printed, expected = capsys.readouterr().out, uncached_run("adam")
    assert f"resumed from step 7 of {folder / '7'}\n" in printed and "checkpoint of step 12: " in printed
    assert resumed["steps"] == 5 and (resumed["loss"], resumed["auc"]) == (expected["loss"], expected["auc"])
    assert jc.SavedTables(folder / "12")["C3"].rows_written > 0

    capsys.readouterr()
    again = train_dlrm.main([*small_run("adam", steps=9), *cached])
    assert "nothing is left to train: 12 steps are done, 9 are asked for" in capsys.readouterr().out
    assert again["steps"] == 0 and again["auc"] == expected["auc"]
    assert sorted(path.name for path in folder.iterdir()) == ["12", "7"]

    for flags, text in [
        (["--seed", "1"], "its seed is 0 and the store's 1"),
        (["--optimizer", "sgd"], "the optimizer's state of table 'C1' is "),
        (["--rows", "6000"], "the number of rows of table 'C3' is 1068 there and 1374 here"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            train_dlrm.main([*small_run("adam"), *cached, *flags])
        assert (
            f"argument --checkpoint: checkpoint {folder}/12/tables is not one of this store: {text}"
            in (capsys.readouterr().err.splitlines()[-1])
        )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--slots", "0"], "argument --slots"),
        (["--slots", "200%"], "at most 100%"),
        (["--rows", "5000", "--slots", "3", "--steps", "2"], "slots for its unique rows"),
        (["--data", "no-such-file"], "no-such-file"),
        (["--epochs", "2"], "needs --data"),
        (["--checkpoint-every", "2"], "needs --checkpoint"),
        (["--optimizer", "lamb"], "invalid choice"),
    ],
)
def test_bad_flags_are_one_line(arguments, text, capsys):
    with pytest.raises(SystemExit, match="2"):
        train_dlrm.main(arguments)
    assert text in capsys.readouterr().err.splitlines()[-1]


SMALLER, SMALLEST = (
    pytest.param(slots, batch, marks=long("10 % of the rows")) for slots, batch in (("5%", "256"), ("1.5%", "128"))
)


@pytest.mark.slow
@pytest.mark.skipif(not REAL_DATA.exists(), reason="the real click log is not on this machine")
@pytest.mark.parametrize(("slots", "batch"), [("10%", "512"), SMALLER, SMALLEST])
def test_auc_on_the_real_log_is_that_without_a_cache(slots, batch):
    arguments = ["--data", str(REAL_DATA), "--batch-size", batch]
    cached = train_dlrm.main([*arguments, "--slots", slots])
    uncached = train_dlrm.main([*arguments, "--no-cache"])
    assert (cached["auc"], cached["loss"]) == (uncached["auc"], uncached["loss"])
    assert cached["auc"] > 0.75 and cached["rows_fetched"] > cached["slots"]
