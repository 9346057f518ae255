"""The example of factorized clicks, run as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import matrix_factorization
from extent import long

SMALL = ["--users", "300", "--items", "200", "--dim", "8", "--batch-size", "32", "--steps", "40"]
SMALL += ["--steps-per-dispatch", "20"]
CLICKS = Path(__file__).resolve().parents[2] / "shared" / "data" / "clicks.npz"


@pytest.fixture(scope="module", autouse=True)
def promotions_as_a_user_has_them():
    """The strict ones of the other tests are for the library."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("factors") / "summary.json"


@pytest.fixture(scope="module")
def cached(path, promotions_as_a_user_has_them):
    return matrix_factorization.main([*SMALL, "--slots", "25%", "--summary", str(path)])


def test_a_small_run_writes_its_summary(cached, path):
    assert json.loads(path.read_text()) == cached
    assert cached["steps"] == 40 and cached["slots"] == 125 and 0 < cached["hit_rate"] < 1
    assert cached["rows_written_back"] > 0
    assert 0 <= cached["popularity"] < cached["ceiling"] <= 1


@pytest.mark.parametrize(
    "flags",
    [
        ["--slots", "100%"],
        pytest.param(["--slots", "25%", "--prefetch"], marks=long("others move rows too")),
        pytest.param(["--slots", "25%", "--steps-per-dispatch", "40"], marks=pytest.mark.slow),
    ],
)
def test_however_rows_are_moved_the_same_is_trained(cached, flags, capsys):
    other = matrix_factorization.main([*SMALL, *flags])
    assert other["recall"] == cached["recall"]
    if "--steps-per-dispatch" not in flags:  # by which the losses are averaged
        assert other["loss"] == cached["loss"]
    if flags == ["--slots", "100%"]:
        assert other["rows_written_back"] == 0 and other["rows_fetched"] < cached["rows_fetched"]
    printed = capsys.readouterr().out
    for text in ("step    40: loss", "rows fetched a step", "recall@20 of 278 held-out clicks", "ceiling"):
        assert text in printed


def test_planted_clicks_are_parted_and_repeat():
    clicks, again = (matrix_factorization.planted_clicks(300, 200, seed=3) for _ in range(2))
    assert all(np.array_equal(getattr(clicks, name), getattr(again, name)) for name in ("train", "test"))
    pairs = np.concatenate([clicks.train, clicks.test])
    assert len(np.unique(pairs, axis=0)) == len(pairs)
    assert (pairs >= 0).all() and (pairs < [300, 200]).all()
    assert (np.diff(clicks.test[:, 0]) > 0).all()
    np.testing.assert_allclose(clicks.planted(np.arange(300)).sum(axis=1), 1, rtol=1e-4)


def test_a_user_keeps_two_clicks_and_loses_the_last():
    pairs = np.array([[0, 3], [1, 3], [0, 1], [0, 3], [1, 2], [0, 2], [2, 0], [2, 0], [2, 0]])
    clicks = matrix_factorization.split(pairs, 3, 4, np.random.default_rng(0))
    assert clicks.train.tolist() == [[0, 3], [1, 3], [0, 1], [1, 2], [2, 0]]
    assert clicks.test.tolist() == [[0, 2]]


def test_recall_is_what_sorting_every_users_items_gives():
    clicks = matrix_factorization.planted_clicks(120, 60, seed=1)
    scores = np.random.default_rng(0).standard_normal((120, 60)).astype(np.float32)
    hits = 0
    for user, item in clicks.test:
        seen = {other for owner, other in clicks.train.tolist() if owner == user}
        ranking = [other for other in np.argsort(-scores[user]) if other not in seen]
        hits += item in ranking[:5]
    assert matrix_factorization.recall(clicks, 5, lambda users: scores[users]) == hits / len(clicks.test)
    assert matrix_factorization.recall(clicks, 5, lambda users: np.full((len(users), 60), np.nan)) == 0


def test_clicks_come_from_files_of_sessions_and_of_pairs(tmp_path):
    users, items = [7, 7, 9, 7, 9, 9], [30, 10, 30, 20, 10, 40]
    np.savez(tmp_path / "sessions.npz", ids=np.array(items)[:, None], session=users)
    np.savez(tmp_path / "pairs.npz", ids=np.stack([users, items], axis=1))
    for name in ("sessions.npz", "pairs.npz"):
        clicks = matrix_factorization.read_clicks(tmp_path / name, seed=0)
        assert (clicks.users, clicks.items, clicks.planted) == (2, 4, None)
        assert clicks.train.tolist() == [[0, 2], [0, 0], [1, 2], [1, 0]]
        assert clicks.test.tolist() == [[0, 1], [1, 3]]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--slots", "3"], "argument --slots: admit, step 0:"),
        (["--slots", "200%"], "at most 100%"),
        (["--policy", "fifo"], "invalid choice: 'fifo'"),
        (["--data", "nowhere.npz"], "argument --data: "),
        (["--summary", "no/folder.json"], "no folder"),
        (["--users", "1", "--items", "1"], "argument --users or --items: no user has three clicks"),
    ],
)
def test_bad_flags_are_one_line(arguments, text, capsys):
    with pytest.raises(SystemExit, match="2"):
        matrix_factorization.main([*SMALL, *arguments])
    assert text in capsys.readouterr().err.splitlines()[-1]


def test_a_file_without_users_is_refused(tmp_path, capsys):
    np.savez(tmp_path / "items.npz", ids=np.arange(6)[:, None])
    with pytest.raises(SystemExit, match="2"):
        matrix_factorization.main(["--data", str(tmp_path / "items.npz")])
    assert "expected two fields, user and item, or one and an array 'session'" in capsys.readouterr().err


@pytest.mark.slow
@long("real clicks")
def test_at_default_size_it_recommends():
    figures = matrix_factorization.main([])
    assert figures["table_bytes"] > 5 * figures["device_bytes"]
    assert 2.5 * figures["popularity"] < figures["recall"] < figures["ceiling"]


@pytest.mark.slow
@pytest.mark.skipif(not CLICKS.exists(), reason=f"no {CLICKS}")
def test_it_recommends_from_real_clicks():
    figures = matrix_factorization.main(["--data", str(CLICKS)])
    assert figures["ceiling"] is None and figures["recall"] > 10 * figures["popularity"] > 0
