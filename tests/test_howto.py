"""The guides' code: every block runs, and what it trains gets better."""

from __future__ import annotations

import itertools
import re
import shlex
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcache as jc
from jaxcache import cli

BATCH, STEPS, ITEMS = 32, 30, 100  # of the log for the page on tables
GUIDES = Path(__file__).resolve().parents[1] / "docs" / "howto"


@pytest.fixture(autouse=True)
def promotions_as_a_user_has_them():
    """The strict ones of the other tests are for the library; Flax and optax rely on JAX's defaults."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def blocks(guide: str) -> dict[str, str]:
    """The tested blocks of a guide by name."""
    text = (GUIDES / guide).read_text()
    found = dict(re.findall(r"<!-- tested: (\S+) -->\n```python\n(.*?)```", text, re.DOTALL))
    assert len(found) == text.count("```python"), "a block of code has no name, or one that another has"
    return found


def run(guide: str, name: str, scope: dict) -> dict:
    exec(compile(blocks(guide)[name], f"{guide}, {name}", "exec"), scope)
    return scope


@pytest.fixture
def clicks(monkeypatch):
    """The guide's data, importable as the scripts import it."""
    module = types.ModuleType("clicks")
    run("train.md", "clicks", module.__dict__)
    monkeypatch.setitem(sys.modules, "clicks", module)
    return module


def test_every_script_of_the_guide_is_tested_here():
    assert list(blocks("train.md")) == ["clicks", "plain", "jax", "linen", "nnx", "blocks"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "jax", "linen", "nnx", "blocks"])
def test_the_scripts_train(name, clicks, capsys):
    scope = run("train.md", name, {"__name__": "script"})
    losses = np.array(scope["losses"])
    assert len(losses) == 200 and abs(losses[0] - np.log(2)) < 0.05
    assert losses[-20:].mean() < losses[:20].mean() - 0.05
    assert f"-> {losses[-1]:.3f}" in capsys.readouterr().out
    if name != "plain":
        jc.check(scope["cache"], scope["store"])
        assert scope["store"].step == 200 and scope["ahead"].report().rows_written_back > 0


def ragged_batches():
    random = np.random.default_rng(1)
    for _ in range(STEPS):
        history = random.integers(ITEMS, size=(BATCH, 5))
        history[np.arange(5) >= random.integers(6, size=(BATCH, 1))] = -1
        lengths = random.integers(4, size=BATCH)
        item = random.integers(ITEMS, size=BATCH)
        yield {
            "item": item,
            "history": history,
            "tags": random.integers(800, size=lengths.sum()),
            "tag_offsets": np.concatenate([[0], np.cumsum(lengths)]),
            "tag_weights": random.random(lengths.sum()),
            "label": (item % 2).astype(np.float32),
        }


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """Runs the named block of the page as a reader does, after those that it builds on."""
    monkeypatch.chdir(tmp_path)
    scope = {"loader": list(ragged_batches())}
    for name in ("imports", "features"):
        run("tables.md", name, scope)

    return lambda name: run("tables.md", name, scope)


def train(scope: dict, ahead: jc.LookAhead | None = None) -> tuple[jc.CacheState, list[float], int]:
    """Trains the items to tell odd from even, with a little of everything that is looked up.

    Returns the cache, the losses, and how often the step was compiled.
    """
    if ahead is None:
        names = {feature.table for feature in scope["features"].values()} | {"item"}
        assert names <= set(scope["store"].tables)
        ahead = jc.LookAhead(scope["store"], scope["loader"], scope["ids"], features=scope["features"], slots=4000)

    def loss_of(rows, label, mask):
        everything = sum(jnp.sum(array.reshape(len(label), -1), axis=1) for array in rows.values())
        logits = jnp.sum(rows["item"], axis=1) + 0.02 * everything
        return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, label), where=mask)

    @jax.jit
    def step(cache, plan, label):
        loss, gradients = jax.value_and_grad(loss_of)(jc.lookup(cache, plan), label, plan.mask)
        return jc.update(cache, plan, gradients), loss

    losses = []
    with ahead:
        cache = ahead.start()
        for batch, plan in ahead:
            cache, loss = step(ahead.exchange(cache, plan), plan, batch["label"])
            losses.append(float(loss))
        cache = ahead.flush(cache)
    jc.check(cache, scope["store"])
    assert scope["store"].step == len(losses) == STEPS
    return cache, losses, step._cache_size()


def test_features_of_the_page_train_and_compile_once(tables):
    scope = tables("features")
    _, losses, compiled = train(scope, scope["ahead"])
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.02
    assert compiled == 1 and len({len(batch["tags"]) for batch in scope["loader"]}) > 5


def test_groups_of_the_page(tables, capsys):
    scope = tables("groups")
    assert "[('user', 'item'), ('tag',)]" in capsys.readouterr().out
    with scope["ahead"] as ahead:
        assert ahead.start().slots == (7500, 800)
    assert set(scope["ahead"].report().groups) == {"user", "tag"}


def test_dtypes_of_the_page(tables):
    scope = tables("dtypes")
    store = scope["store"]
    before = {name: store.rows(name, np.arange(ITEMS)) for name in ("item", "tag")}
    train(scope)
    assert store.rows("user", [1]).dtype == store.rows("item", [1]).dtype == jnp.bfloat16
    (master, accumulator) = store.row_state("item", np.arange(ITEMS))
    assert master.dtype == np.float32 and accumulator.shape == (ITEMS, 1)
    np.testing.assert_array_equal(master.astype(jnp.bfloat16), store.rows("item", np.arange(ITEMS)))
    for name, weights in before.items():
        assert (weights != store.rows(name, np.arange(ITEMS))).any()


def test_bytes_of_the_page():
    """Rows of 64 weights: what 16 bits save beside row-wise adagrad, and beside adam."""
    sizes = [
        jc.HostStore({"a": jc.Table(9, 64, dtype=dtype)}, optimizer=optimizer).groups[0].row_bytes
        for optimizer in (jc.rowwise_adagrad(0.1), optax.adam(0.1))
        for dtype in (jnp.float32, jnp.bfloat16)
    ]
    text = (GUIDES / "tables.md").read_text().replace("\n", " ")
    assert "from {} bytes to {}, with adam from {} to {}".format(*sizes) in text


def test_optimizers_of_the_page(tables):
    scope = tables("optimizers")
    store = scope["store"]
    tags, items = store.rows("tag", np.arange(800)), store.rows("item", np.arange(ITEMS))
    train(scope)
    np.testing.assert_array_equal(store.rows("tag", np.arange(800)), tags)
    assert (store.rows("item", np.arange(ITEMS)) != items).any() and store.row_state("tag", [1]) == ()
    assert store.locate("user")[0].scalars == (STEPS,)  # counted, though no batch looked up a user


def test_adam_of_the_page(tables):
    scope = tables("adam")
    scope["ids"] = lambda batch, before=scope["ids"]: before(batch) | {"user": batch["item"]}
    train(scope)
    states = [scope["store"].row_state(name, np.arange(ITEMS)) for name in ("user", "item")]
    assert [len(state) for state in states] == [3, 2]
    # Moments that faded are smaller than those that rested, unless the row came with every update.
    (faded, *_), (rested, *_) = states
    assert np.abs(faded).sum() < 0.9 * np.abs(rested).sum()


def test_weights_of_the_page(tables):
    scope = tables("weights")
    store = scope["store"]
    assert scope["some"].shape == (2, 16)
    np.testing.assert_array_equal(store.rows("tag", np.arange(800)), scope["vectors"].astype(jnp.bfloat16))
    np.testing.assert_array_equal(np.load("item.npy"), store.rows("item", np.arange(50_000)))


@pytest.mark.slow
def test_the_guide_to_training_inside_jit_runs(capsys):
    scope: dict = {"__name__": "script"}
    names = list(blocks("inside-jit.md"))
    assert names == ["loop", "scan", "prefetch", "keys", "several", "failure"]
    losses = {}
    for name in names:
        run("inside-jit.md", name, scope)
        losses[name] = np.array(scope["memory_losses" if name == "keys" else "losses"])
        jc.check(scope["cache"], scope["store"])
    assert losses["loop"][-20:].mean() < losses["loop"][:20].mean() - 0.02
    assert losses["scan"].mean() < losses["loop"].mean() and losses["prefetch"].mean() < losses["scan"].mean()
    assert losses["keys"][-1] < 0.5 * losses["keys"][0]
    assert np.isfinite([scope["test_loss"]]).all() and np.isnan(scope["loss"])
    assert scope["store"].step == 401 and scope["memory"].step == 50
    printed = capsys.readouterr().out
    assert "200 calls of admit, policy lru" in printed and "item' has id 20000" in printed


# ---- checkpoint.md --------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path, monkeypatch):
    """The page's model, importable as the scripts import it, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("model")
    run("checkpoint.md", "model", module.__dict__)
    monkeypatch.setitem(sys.modules, "model", module)
    return module


class Killed(Exception):
    pass


def check_resumed(name: str, model, steps: int, killed: int) -> dict:
    """Runs a script that is killed in the step after so many, runs it again, and compares with one that was not killed.

    Losses, rows, and their state, bit for bit. Returns what the second run left.
    """
    step, steps_made = model.train_step, itertools.count()

    def killed_step(*arguments):
        if next(steps_made) == killed:
            raise Killed
        return step(*arguments)

    scopes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "train_step", killed_step)
        with pytest.raises(Killed):
            run("checkpoint.md", name, {"__name__": "script"})
    scopes.append(run("checkpoint.md", name, {"__name__": "script"}))
    with pytest.MonkeyPatch.context() as patch:
        Path("elsewhere").mkdir()
        patch.chdir("elsewhere")
        scopes.append(run("checkpoint.md", name, {"__name__": "script"}))
    resumed, whole = scopes
    assert whole["store"].step == resumed["store"].step == len(whole["losses"]) == steps
    assert killed - 50 <= steps - len(resumed["losses"]) < killed
    assert np.array(whole["losses"][-len(resumed["losses"]) :]).tobytes() == np.array(resumed["losses"]).tobytes()
    for table in whole["store"].tables:
        every = np.arange(whole["store"].tables[table].rows)
        for read in (jc.HostStore.rows, jc.HostStore.row_state):
            found, expected = (jax.tree.leaves(read(scope["store"], table, every)) for scope in scopes)
            assert [leaf.tobytes() for leaf in found] == [leaf.tobytes() for leaf in expected]
    assert np.mean(whole["losses"][-20:]) < np.mean(whole["losses"][:20]) - 0.005
    return resumed


def test_the_loop_of_the_page_resumes_and_what_reads_its_checkpoints(model, capsys, monkeypatch):
    scope = check_resumed("train", model, steps=200, killed=120)
    assert capsys.readouterr().out == "resumed from step 100\n"
    assert sorted(path.name for path in Path("runs").iterdir()) == ["150", "200"]

    monkeypatch.chdir("elsewhere")  # the run that was not killed: after a resume a cache holds other rows
    page = (GUIDES / "checkpoint.md").read_text()
    pairs = re.findall(r"^```bash\n(.*?)^```\n\n```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(pairs) == 2
    for commands, shown in pairs:
        for line in commands.splitlines():
            assert cli.main(shlex.split(line)[1:]) == 0
        # The size of files that Orbax and TensorStore add is theirs.
        assert re.sub("disk: .*", "disk:", capsys.readouterr().out) == re.sub("disk: .*", "disk:", shown)

    store = scope["store"]
    read = run("checkpoint.md", "elsewhere", {})
    np.testing.assert_array_equal(np.load("item.npy"), store.rows("item", np.arange(20_000)))
    np.testing.assert_array_equal(np.load("part.npy"), store.rows("user", np.arange(10_000)))
    np.testing.assert_array_equal(read["some"], store.rows("item", np.arange(1_000, 2_000)))
    np.testing.assert_array_equal(read["table"], store.rows("user", np.arange(50_000)))
    np.testing.assert_array_equal(read["store"].rows("item", np.arange(20_000)), store.rows("item", np.arange(20_000)))
    assert read["names"] == ("0.accumulator",) and len(read["row_ids"]) > 100
    np.testing.assert_array_equal(read["rows"].state[0], store.row_state("item", read["row_ids"])[0])

    tables = jc.Checkpoint(model.make_store())
    tables.restore(Path("runs/200"))
    assert tables.cache(slots="5%").slots == (3500,)
    folder = Path("../runs/201/tables").resolve()
    folder.mkdir(parents=True)
    tables = run("checkpoint.md", "incremental", scope | {"step": 201})["tables"]
    tables.begin_save(folder)(folder)
    assert tables.figures.incremental and tables.figures.rows == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["manager", "grain"])
def test_other_loops_of_the_page_resume(name, model):
    if name == "grain":
        pytest.importorskip("grain")
    check_resumed(name, model, steps=200, killed=120)


@pytest.mark.slow
def test_the_page_inside_jit_resumes(model, monkeypatch):
    whole, batches = run("checkpoint.md", "on-demand", {"__name__": "script"}), model.batches
    Path("jit-runs").rename("before")
    with monkeypatch.context() as patch, pytest.raises(Killed):

        def killed(start, stop):
            yield from batches(start, 30)
            raise Killed

        patch.setattr(model, "batches", killed)
        run("checkpoint.md", "on-demand", {"__name__": "script"})
    resumed = run("checkpoint.md", "on-demand", {"__name__": "script"})
    assert len(resumed["losses"]) == 40
    assert np.array(resumed["losses"]).tobytes() == np.array(whole["losses"][20:]).tobytes()
    for table in ("user", "item"):
        every = np.arange(model.ITEMS)
        assert resumed["store"].rows(table, every).tobytes() == whole["store"].rows(table, every).tobytes()
