"""The command `jaxcache`: its output, its files, its errors; and that the page on capacity runs as written."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import jaxcache as jc
from jaxcache import saved_tables
from jaxcache.cli import main, quantity
from jaxcache.simulate import OPTIMUM, POLICIES, UNBOUNDED

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def trace(tmp_path):
    """A file of 100 batches of 8 samples with two fields of 100 declared rows."""
    ids = (100 * np.random.default_rng(0).random((800, 2)) ** 3).astype(np.int32)
    np.savez(tmp_path / "trace.npz", ids=ids, cardinality=np.array([100, 100]))
    return str(tmp_path / "trace.npz")


def test_simulate(trace, tmp_path, capsys):
    files = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.svg")]
    windows = ["--windows", "2,4", "8"]
    assert main(["simulate", trace, "--batch-size", "8", "--capacity", "5%", "10%,40", *windows, *files]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("trace.npz: 800 samples, 100 batches of 8; 1,600 lookups of ")
    assert "100% = 200 declared rows" in output.out and output.err == ""
    assert "5%           10  a batch has 1" in output.out

    records = json.loads((tmp_path / "out.json").read_text())
    kinds = {
        "policy": str,
        "capacity": (int, str),
        "slots": int,
        "window": (int, str),
        "rows_fetched": int,
        "rows_written_back": int,
        "hit_rate_rows": float,
        "hit_rate_lookups": float,
    }
    assert isinstance(records, list)
    for record in records:
        if record["error"] is None:
            assert all(isinstance(record[name], kind) for name, kind in kinds.items()), record
        else:
            assert record["slots"] == 10 and record["rows_fetched"] is None
    found = [(record["policy"], record["window"]) for record in records if record["capacity"] == "10%"]
    assert found[:5] == [(OPTIMUM, "all"), *(("lookahead", window) for window in ("auto", 2, 4, 8))]
    assert {policy for policy, _ in found} == {OPTIMUM, UNBOUNDED, *POLICIES}
    assert {record["capacity"]: record["slots"] for record in records if record["policy"] == "lru"} == {
        "5%": 10,
        "10%": 20,
        40: 40,
    }
    for policy in (OPTIMUM, "lookahead 8", *sorted(set(POLICIES) - {"lookahead"}), UNBOUNDED):
        assert f">{policy}<" in (tmp_path / "out.svg").read_text()


def test_simulate_part_of_a_trace(trace, capsys):
    options = ["--columns", "1", "--samples", "80", "--policy", "lru,lfu", "--row-bytes", "68"]
    assert main(["simulate", trace, "--batch-size", "8", "--capacity", "20", *options]) == 0
    output = capsys.readouterr().out
    assert "80 samples, 10 batches of 8; 80 lookups" in output and "100% = 100 declared rows" in output
    assert len(output.splitlines()) == 2 + 4 and "MB a step" in output


def test_fields_that_share_a_table(trace, capsys):
    assert main(["simulate", trace, "--batch-size", "8", "--capacity", "20", "--policy", "lru", "--share", "0,1"]) == 0
    assert "100% = 100 declared rows" in capsys.readouterr().out


def test_size(trace, tmp_path, capsys):
    options = [
        "--bandwidth",
        "1KB/s",
        "--step-time",
        "100ms",
        "--row-bytes",
        "10",
        "--json",
        str(tmp_path / "out.json"),
    ]
    assert main(["size", trace, "--batch-size", "8", *options]) == 0
    output = capsys.readouterr().out
    answer = json.loads((tmp_path / "out.json").read_text())
    assert answer["rows_a_step"] == 10 and answer["curve"][0].keys() >= {"slots", "window", "rows_moved", "fits"}
    assert f"slots={answer['slots']}, window={answer['window']}: " in output and "yes" in output and "no" in output
    assert len(output.splitlines()) == 2 + len(answer["curve"]) + 1

    assert main(["size", trace, "--batch-size", "8", "--device-memory", "1KiB", "--row-bytes", "15"]) == 0
    assert f"slots={1024 // (15 + 17)}, " in capsys.readouterr().out
    assert main(["size", trace, "--batch-size", "8", "--device-memory", "100B", "--row-bytes", "15"]) == 1
    assert "None: the budget holds 3 slots" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("simulate none.npz --batch-size 8 --capacity 5%", "No such file or directory: 'none.npz'"),
        ("simulate . --batch-size 8 --capacity 5%", "Is a directory: '.'"),
        (
            "simulate TRACE --batch-size 0 --capacity 5%",
            "argument --batch-size: expected a number of 1 or more, got '0'",
        ),
        ("simulate TRACE --batch-size 8 --capacity x", "argument --capacity: expected rows or a share such as 1.5%"),
        ("simulate TRACE --batch-size 8 --capacity 500%", "capacity '500%'"),
        (
            "simulate TRACE --batch-size 8 --capacity 5 --policy opt",
            "no policy named 'opt': the policies are lookahead",
        ),
        ("simulate TRACE --batch-size 8 --capacity 5 --windows auto", "argument --windows: expected a number"),
        ("simulate TRACE --batch-size 8 --capacity 5 --plot a.pdf", "ends in .png or .svg, got a.pdf"),
        ("simulate TRACE --batch-size 8 --capacity 5 --json no/a.json", "there is no folder no for a.json"),
        ("simulate TRACE --batch-size 8 --capacity 5 --columns 2", "has no column '2': it has 0, 1"),
        ("simulate TRACE --batch-size 8 --capacity 5 --share 0,x", "has no feature 'x'"),
        ("simulate TRACE --batch-size 8 --capacity 5 --share 0,1 --share 1,0", "--share names '1' twice"),
        ("simulate TRACE --batch-size 8 --capacity ,", "argument --capacity: expected one or more"),
        ("simulate TRACE --batch-size 8 --capacity 5 --format parquet", "trace.npz"),
        ("simulate TRACE --batch-size 8", "the following arguments are required: --capacity"),
        ("size TRACE --batch-size 8 --row-bytes 4", "size needs a budget"),
        ("size TRACE --batch-size 8 --row-bytes 4 --bandwidth 20", "expected a number with one of B/s, KB/s"),
        ("size TRACE --batch-size 8 --row-bytes 4 --bandwidth 20GB/s", "each needs the other"),
        ("size TRACE --batch-size 8 --row-bytes 4 --device-memory 4XB", "expected a number with one of B, KB"),
        ("", "required: COMMAND"),
    ],
)
def test_mistakes_are_one_line(arguments, message, trace, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([trace if word == "TRACE" else word for word in arguments.split()])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("jaxcache") and ": error: " in last and message in last


@pytest.mark.parametrize("capacity", [10**12, 10**23])
def test_slots_that_no_machine_has_are_planned_as_those_of_the_trace(capacity, trace, capsys):
    assert main(["simulate", trace, "--batch-size", "8", "--capacity", str(capacity)]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == 9 and all(f"{capacity:,}" in line for line in lines[:-1])


def test_a_plot_of_no_capacity_that_holds_a_batch(trace, tmp_path, capsys):
    path = tmp_path / "plot.svg"
    assert main(["simulate", trace, "--batch-size", "8", "--capacity", "1", "--plot", str(path)]) == 0
    assert "no capacity holds a batch" in capsys.readouterr().err and not path.exists()


@pytest.mark.parametrize(
    ("unit", "text", "expected"),
    [
        ("B", "4GB", 4e9),
        ("B", "1.5 GiB", 1.5 * 2**30),
        ("B", "100", 100),
        ("B", ".5TB", 5e11),
        ("B/s", "20GB/s", 2e10),
        ("s", "5ms", 5e-3),
        ("s", "50us", 5e-5),
    ],
)
def test_units(unit, text, expected):
    assert quantity(unit)(text) == pytest.approx(expected, rel=1e-15)


def test_python_m_jaxcache():
    done = subprocess.run([sys.executable, "-m", "jaxcache", "size", "none.npz"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("jaxcache size: error: ")


# ---- docs/howto/choose-capacity.md ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_on_capacity_runs_as_written(tmp_path):
    """Each block of commands runs as it stands, and prints what the block behind it shows."""
    page = (ROOT / "docs/howto/choose-capacity.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```(?:\n+```text\n(.*?)^```)?", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for commands, shown in blocks:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=tmp_path,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{commands}\n{done.stderr}"
        if shown:
            assert done.stdout == shown, f"{commands}\nprints\n{done.stdout}"
    for name in re.findall(r"!\[.*?\]\((.*?)\)", page):
        committed, drawn = (folder / name for folder in (ROOT / "docs/howto", tmp_path))
        assert committed.stat().st_size < 100_000
        words = [re.findall(r">([^<>]+)</text>", file.read_text()) for file in (committed, drawn)]
        assert words[0] == words[1], f"{name} is not what the page's command draws"


# ---- kernels --------------------------------------------------------------------------------------------------------


def test_kernels_says_what_runs_here_and_why(capsys, monkeypatch):
    assert main(["kernels"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("cpu: cpu, JAX 0.")
    assert [line.split() for line in lines[1:4]] == [["gather", "xla"], ["update", "xla"], ["exchange", "xla"]]
    assert lines[4:] == [
        "triton    needs an NVIDIA GPU, this is cpu",
        "mosaic    needs an NVIDIA GPU, this is cpu",
        "xla       runs here: gather, update, exchange",
        "measured: nothing on this kind of device",
    ]
    monkeypatch.setenv("JAXCACHE_KERNELS", "gather=xla")
    assert main(["kernels"]) == 0
    assert "JAXCACHE_KERNELS: gather=xla" in capsys.readouterr().out
    assert main(["kernels", "--backends", "update=xla"]) == 0
    assert "asked for: update=xla" in capsys.readouterr().out


@pytest.mark.parametrize(
    "request_, message",
    [("triton", "backends: triton needs an NVIDIA GPU"), ("cuda", "backends: got 'cuda', expected one of triton,")],
)
def test_kernels_refuses_what_cannot_be(request_, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["kernels", "--backends", request_])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith(f"jaxcache kernels: error: {message}")


# ---- inspect and export ---------------------------------------------------------------------------------------------


@jax.tree_util.register_static
class ones:
    """An initializer that is not ours."""

    def __call__(self, stream, rows, table):
        return np.ones((len(rows), table.dim), np.float32)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A full checkpoint of step 1 and an incremental one of step 2, and their store as of then.

    The rows 0 to 9 and 990 to 999 of "item" were written, and then 5 to 14 again; all of "word", twice, and none else.
    """
    root = tmp_path_factory.mktemp("checkpoints")
    tables = {
        "item": jc.Table(1000, 2, initializer=jc.normal(0.1)),
        "word": jc.Table(4, 3, dtype="bfloat16", optimizer=jc.rowwise_adagrad(0.1)),
        "user": jc.Table(10**12, 5, initializer=ones()),
    }
    store = jc.HostStore(tables, optimizer=optax.adam(0.1), seed=3)
    item, _ = store.locate("item")

    def write(ids, value):
        rows = item.allocate(len(ids))
        rows.weights[:], rows.state[0][:], rows.state[1][:] = value, 7, 8
        item.write(item.group.keys(0, ids), rows)

    features = {"history": jc.Feature("item", combiner="mean", padding=-1)}
    slots = {"item": 1000, "word": 4, "user": 6}
    loader = [{"history": np.array([[3, 4]])}]
    with jc.LookAhead(store, loader, lambda batch: batch, slots=slots, features=features) as ahead:
        cache = ahead.start()
        for step in (1, 2):
            write(np.r_[0:10, 990:1000] if step == 1 else np.arange(5, 15), step)
            word, _ = store.locate("word")
            word.write(word.group.keys(0, np.arange(4)), word.read(word.group.keys(0, np.arange(4))))
            folder = root / str(step) / "tables"
            folder.mkdir(parents=True)
            jc.Checkpoint(store, cache, ahead=ahead, incremental=True).begin_save(folder)(folder)
    return root, store


def test_inspect(checkpoints, tmp_path, capsys):
    root, _ = checkpoints
    assert main(["inspect", str(root / "2"), "--json", str(tmp_path / "out.json")]) == 0
    about = json.loads((tmp_path / "out.json").read_text())
    size = sum(file.stat().st_size for file in (root / "2").rglob("*") if file.is_file())
    shared = sum(file.stat().st_size for file in (root / "1/tables/segments").rglob("*") if file.is_file())
    assert capsys.readouterr().out.splitlines() == [
        f"{root}/2/tables: step 0, seed 3, format 1",
        "table               rows  dim  dtype     touched  share  bytes  in cache  optimizer's state and counts",
        "item               1,000    2  float32        25   2.5%    600     1,000  0.mu[2] 0.nu[2] 0.count=0",
        "word                   4    3  bfloat16        4   100%     40         4  0.accumulator[1]",
        "user   1,000,000,000,000    5  float32         0     0%      0         0  0.mu[5] 0.nu[5] 0.count=0",
        "features: history = mean of item, padding -1",
        "cache: 1,000 + 4 + 6 slots hold 1,004 rows",
        "segments: 1 full of 24 rows, 2 incremental of 14 rows",
        "loader's state: no",
        f"on disk: {size:,} bytes, {shared:,} of them in files of other checkpoints too",
    ]
    assert about["path"] == f"{root}/2/tables" and about["step"] == 0 and about["seed"] == 3 and about["format"] == 1
    assert about["tables"]["item"]["state"]["0.mu"] == {"shape": [2], "dtype": "float32"}
    assert about["tables"]["item"]["scalars"] == {"0.count": 0} and about["tables"]["user"]["rows"] == 10**12
    assert [segment["kind"] for segment in about["segments"]] == ["full", "incremental"]
    assert about["segments"][1]["rows"] == {"item": 10, "word": 4, "user": 0}
    assert about["slots"] == [1000, 4, 6] and about["tables"]["word"]["rows_in_cache"] == 4
    assert about["features"] == {"history": {"table": "item", "combiner": "mean", "padding": -1}}
    assert not about["loader_state"] and (about["disk_bytes"], about["shared_bytes"]) == (size, shared)


def test_inspect_says_what_was_not_saved(tmp_path, capsys):
    store = jc.HostStore({"item": jc.Table(1000, 2, frozen=True)})
    jc.Checkpoint(store).begin_save(tmp_path)(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].endswith("0     0%      0  none") and "in cache" not in lines[1]
    assert lines[3:6] == ["features: not saved", "cache: not saved", "segments: 1 full of 0 rows"]


@pytest.mark.parametrize("weights", [2**22, 50])  # in memory at a time: all of them, or those of some rows
def test_export(weights, checkpoints, tmp_path, capsys, monkeypatch):
    root, store = checkpoints
    monkeypatch.setattr(saved_tables, "_SAVED_WEIGHTS", weights)
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(root / "2"), "--table", "item"]) == 0
    assert capsys.readouterr().out == "table 'item' as of step 0 -> item.npy, 8,000 bytes\n"
    found, expected = np.load("item.npy"), store.rows("item", np.arange(1000))
    assert found.dtype == np.float32 and found.tobytes() == expected.tobytes()
    assert [found[row, 0] for row in (4, 5, 14, 999)] == [1, 2, 2, 1] and abs(found[15:990]).max() < 1

    parts = [("7:996", slice(7, 996)), ("990:", slice(990, None)), (":3", slice(3)), (":", slice(None))]
    for text, rows in parts:
        assert main(["export", str(root / "2/tables"), "--table", "item", "--rows", text, "--output", "part.npy"]) == 0
        np.testing.assert_array_equal(np.load("part.npy"), expected[rows])
    assert main(["export", str(root / "1"), "--table", "item", "--rows", "5:15", "--output", "part.npy"]) == 0
    np.testing.assert_array_equal(np.load("part.npy")[:5], np.ones((5, 2)))
    np.testing.assert_array_equal(
        np.load("part.npy")[5:], jc.HostStore(store.tables, optax.sgd(1.0), seed=3).rows("item", np.arange(10, 15))
    )

    assert main(["export", str(root / "1"), "--table", "word"]) == 0  # bfloat16 as float32
    found = np.load("word.npy")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, store.rows("word", np.arange(4)).astype(np.float32))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["item.npy", "part.npy", "word.npy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("inspect none", "there is no checkpoint none"),
        ("inspect ROOT", "has several checkpoints: choose "),
        ("inspect ROOT/1 --json no/a.json", "there is no folder no for a.json"),
        ("inspect .", "there is no checkpoint of tables in ."),
        ("export ROOT/1", "the following arguments are required: --table"),
        ("export ROOT/1 --table tag", "no table named 'tag': checkpoint ROOT/1/tables has item, word, user"),
        ("export ROOT/1 --table item --output no/a.npy", "there is no folder no for a.npy"),
        ("export ROOT/1 --table item --rows 5", "argument --rows: expected ids A:B, such as 0:1000, got '5'"),
        ("export ROOT/1 --table item --rows 5:5", "table 'item' has rows 0 to 999, and none of 5:5"),
        ("export ROOT/1 --table item --rows 0:1001", "table 'item' has rows 0 to 999, and not all of 0:1001"),
        ("export ROOT/1 --table user --rows 0:9", "whose weights come from "),
        ("export DAMAGED --table item --output old.npy", "table 'item' of checkpoint DAMAGED/tables: the arrays in "),
    ],
)
def test_mistakes_with_checkpoints_are_one_line(
    arguments, message, checkpoints, tmp_path, tmp_path_factory, capsys, monkeypatch
):
    root, _ = checkpoints
    if "DAMAGED" in arguments:
        damaged = tmp_path_factory.mktemp("damaged")
        shutil.copytree(root / "1", damaged, dirs_exist_ok=True)
        [chunk] = damaged.glob("tables/segments/*/table-item/weights/c/0/0")
        os.truncate(chunk, chunk.stat().st_size - 1)
        arguments, message = (text.replace("DAMAGED", str(damaged)) for text in (arguments, message))
    monkeypatch.chdir(tmp_path)
    Path("old.npy").write_text("as it was")
    with pytest.raises(SystemExit) as stopped:
        main([word.replace("ROOT", str(root)) for word in arguments.split()])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("jaxcache") and ": error: " in last and message.replace("ROOT", str(root)) in last
    assert [path.name for path in tmp_path.iterdir()] == ["old.npy"] and Path("old.npy").read_text() == "as it was"
