"""The example with histories, run as a user runs it."""

from __future__ import annotations

import json

import jax
import pytest

import train_din

SMALL = ["--rows", "6000", "--batch-size", "128", "--steps", "150"]


@pytest.fixture(scope="module", autouse=True)
def promotions_as_a_user_has_them():
    """The strict ones of the other tests are for the library; Flax and optax rely on JAX's defaults."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("din") / "summary.json"


@pytest.fixture(scope="module")
def cached(path, promotions_as_a_user_has_them):
    return train_din.main([*SMALL, "--slots", "20%", "--summary", str(path)])


@pytest.mark.slow
def test_a_small_run_learns_and_writes_its_summary(cached, path):
    assert json.loads(path.read_text()) == cached
    assert cached["steps"] == 150 and 0 < cached["hit_rate"] < 1
    # Chance is 0.5, and who is blind to the histories gets 0.64, from users and items that come often.
    assert 0.67 < cached["auc"] < cached["ceiling"]


@pytest.mark.slow
def test_everything_resident_gives_the_same_to_the_last_digit(cached, capsys):
    resident = train_din.main([*SMALL, "--slots", "100%"])
    assert (cached["loss"], cached["auc"]) == (resident["loss"], resident["auc"])
    assert cached["rows_written_back"] > 0 == resident["rows_fetched"] and cached["slots"] == 1200
    printed = capsys.readouterr().out
    for text in (
        "test AUC",
        "ceiling",
        "bytes on the device",
        "bounds the run",
        "user: 3,582 slots",
        "item: 2,388 slots",
    ):
        assert text in printed


def test_tables_share_and_differ_as_the_example_says():
    tables = train_din.make_tables(train_din.make_log(1_000_000, seed=0))
    assert sum(table.rows for table in tables.values()) == 1_000_000
    assert {feature.table for feature in train_din.FEATURES.values()} == set(tables)
    assert len({table.dim for table in tables.values()}) == 3
    assert [name for name, table in tables.items() if table.rounding == "stochastic"] == ["user"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--slots", "200%"], "at most 100%"),
        (["--rows", "4000", "--slots", "3", "--steps", "2"], "argument --slots: LookAhead(slots=3) is too small"),
        (
            ["--rows", "4000", "--device-bytes", "3kB", "--steps", "2"],
            "--device-bytes: LookAhead(device_bytes='3kB') is too small",
        ),
        (["--device-bytes", "0MiB"], "argument --device-bytes: expected bytes or a size such as 4GiB"),
        (["--device-bytes", "4 apples"], "argument --device-bytes: expected bytes or a size such as 4GiB"),
        (["--slots", "5%", "--device-bytes", "4MiB"], "not allowed with argument"),
        (["--rows", "1"], "argument --rows: "),
        (["--summary", "no/folder.json"], "no folder"),
    ],
)
def test_bad_flags_are_one_line(arguments, text, capsys):
    with pytest.raises(SystemExit, match="2"):
        train_din.main(arguments)
    assert text in capsys.readouterr().err.splitlines()[-1]
