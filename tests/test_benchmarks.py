"""The benchmarks run, on sizes that say nothing about speed."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from extent import LONG, long

BENCHMARKS = pathlib.Path(__file__).resolve().parents[1] / "benchmarks"


def run(name, *arguments):
    # In a process of its own: without the strict settings of the tests, and as users start it.
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """The records of the tiny case."""
    out = tmp_path_factory.mktemp("benchmark") / "records.json"
    sizes = ("--case", "tiny", "--optimizer", "adagrad", "--rounds", "2", "--turn", "2", "--dense-rounds", "1")
    done = run("embedding.py", *sizes, "--json", str(out))
    assert done.returncode == 0, done.stderr
    assert "equal to the bit" in done.stdout
    assert "dense steps equal to rounding" in done.stdout
    assert "not warm" not in done.stdout
    return json.loads(out.read_text())


@pytest.mark.slow
def test_every_contender_of_both_models_has_a_record(records):
    found = [(record["model"], record["contender"]) for record in records["records"]]
    contenders = ("cached 1.5%", "cached 5%", "uncached", "dense")
    assert found == [(model, contender) for model in ("embedding", "dlrm") for contender in contenders]
    for record in records["records"]:
        first, third = record["wall_quartiles_ms"]
        assert 0 < first <= record["wall_ms"] <= third
        assert record["cpu_ms"] > 0
        assert record["ratio_to_uncached"] > 0


@pytest.mark.slow
def test_figures_cover_the_timed_steps_alone(records):
    by_name = {record["contender"]: record for record in records["records"] if record["model"] == "embedding"}
    for name, record in by_name.items():
        assert record["steps"] == (1 if name == "dense" else 4)
    # Cold misses would fill the cache; in a warm one as many rows leave as come.
    small, large = by_name["cached 1.5%"], by_name["cached 5%"]
    assert 0 < small["hit_rate"] < large["hit_rate"] < 1
    for record in (small, large):
        missed = record["unique_rows_a_step"] * (1 - record["hit_rate"])
        assert record["rows_fetched_a_step"] == pytest.approx(missed)
    assert by_name["uncached"]["rows_fetched_a_step"] == 0
    assert by_name["uncached"]["hit_rate"] == 1
    assert all(0 <= busy < 1000 for record in (small, large) for busy in record["stage_busy_ms"].values())
    assert small["stage_busy_ms"]["loader"] < 100  # the time at the closed gate is taken off


@pytest.mark.slow
def test_says_what_was_measured_where(records):
    assert {"python", "jax", "numba", "optax", "processor", "cores"} <= records["environment"].keys()
    assert records["case"]["name"] == "tiny"


def test_an_unknown_case_is_an_error_that_names_the_known_ones():
    done = run("embedding.py", "--case", "nonsense")
    assert done.returncode == 2
    assert "peers" in done.stderr


@pytest.mark.slow
def test_planning_is_timed_with_every_window_and_number_of_threads(tmp_path):
    out = tmp_path / "records.json"
    sizes = ("--rows", "200000", "--batch-size", "64", "--share", "3", "--window", "2", "auto", "--threads", "1", "2")
    done = run("planning.py", *sizes, "--plans", "4", "--json", str(out))
    assert done.returncode == 0, done.stderr
    records = json.loads(out.read_text())["records"]
    assert [(record["window"], record["threads"]) for record in records] == [(2, 1), (2, 2), ("auto", 1), ("auto", 2)]
    for record in records:
        first, third = record["quartiles_ms"]
        assert 0 < first <= record["ms"] <= third
        assert record["lookups"] == 26 * 64 and record["slots"] == 6000
        assert 0 < record["rows_fetched"] < record["unique_rows"] < record["lookups"]
        assert record["ratio_np_unique_tables"] == pytest.approx(record["ms"] / record["np_unique_tables_ms"])
    by_threads = [{**record, "threads": 1} for record in records]
    for one, two in (by_threads[:2], by_threads[2:]):
        # The same plans, whatever the number of threads.
        assert all(one[name] == two[name] for name in ("mean_window", "unique_rows", "rows_fetched"))
    assert records[0]["mean_window"] == 2 < records[2]["mean_window"]


@pytest.mark.slow
def test_the_on_demand_benchmark_reports_every_contender(tmp_path):
    out = tmp_path / "ondemand.json"
    sections = ("step", "dispatch", "overlap", "blocks") if LONG else ("overlap", "blocks")
    done = run("ondemand.py", "--tiny", "--sections", ",".join(sections), "--json", str(out))
    assert done.returncode == 0, done.stderr
    records = json.loads(out.read_text())
    assert {record["section"] for record in records} == set(sections)
    names = {record["name"] for record in records}
    assert names >= {"prefetch", "no prefetch", "loop", "blocks(10)"}
    assert not LONG or names >= {"on demand, lru", "look-ahead loop"}
    for record in records:
        assert 0 < record["quartiles_ms"][0] <= record["median_ms"] <= record["quartiles_ms"][1]
    assert run("ondemand.py", "--sections", "nonsense").returncode == 2


@pytest.fixture(scope="module")
def gpu_results(tmp_path_factory):
    """What `benchmarks/gpu.py` finds with sizes that only try it."""
    folder = tmp_path_factory.mktemp("gpu")
    options = ["--profile", str(folder)] if LONG else ["--sections", "device,correctness,operations"]
    done = run("gpu.py", "--tiny", "--minutes", "4", "--json", str(folder / "gpu.json"), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout and "broke off" not in done.stdout
    assert not LONG or list(folder.rglob("*.xplane.pb"))  # the profiler's trace
    return done.stdout, json.loads((folder / "gpu.json").read_text())


@pytest.mark.slow
@long("some sections")
def test_every_section_of_the_gpu_benchmark_runs_on_a_cpu_and_says_that_it_is_one(gpu_results):
    printed, results = gpu_results
    platform = results["sections"]["device"][0]["records"][0]["platform"]
    assert platform != "cpu" or "THIS IS A CPU" in printed
    measured = {name for name, parts in results["sections"].items() if all(part["records"] for part in parts)}
    assert measured >= {"device", "correctness", "twins", "operations", "pipeline", "policies", "on-demand"}
    # What could not be done is named, there and here.
    assert all(part["records"] or part["skipped"] for part in results["sections"]["peers"])


@pytest.mark.slow
def test_the_gpu_benchmark_measures_every_operation_with_plain_jax_beside_it(gpu_results):
    printed, results = gpu_results
    records = [record for record in results["sections"]["operations"][0]["records"] if "seconds" in record]
    found = {(record["operation"], record["backend"]) for record in records}
    assert found >= {(o, b) for o in ("gather", "pool", "update", "exchange") for b in ("plain JAX", "xla")}
    for record in records:
        assert 0 < record["quartiles"][0] <= record["seconds"] <= record["quartiles"][1]
        assert record["unique_rows"] < record["lookups"] and record["bytes"] > 0
    assert "For SPEEDS in kernels/__init__.py" in printed


@pytest.mark.slow
@long("some sections")
def test_the_policies_of_the_gpu_benchmark_move_what_they_should(gpu_results):
    _, results = gpu_results
    records = [record for record in results["sections"]["policies"][0]["records"] if "rows_fetched" in record]
    for locality in ("none", "high"):
        fetched = {r["policy"]: r["rows_fetched"] / r["unique_rows"] for r in records if r["locality"] == locality}
        assert fetched["no_cache"] == 1
        assert fetched["lookahead"] < fetched["scratchpipe"] < 1
        assert fetched["static"] < 1
    # Uniform lookups: a static cache of a fifth of the rows, less what passes through, hits a fifth of them.
    assert fetched["lookahead"] < min(r["rows_fetched"] / r["unique_rows"] for r in records if r["locality"] == "none")


def test_an_unknown_section_is_an_error_that_names_the_known_ones():
    done = run("gpu.py", "--sections", "device,nonsense")
    assert done.returncode == 2
    assert "unknown: nonsense" in done.stderr and "policies" in done.stderr
