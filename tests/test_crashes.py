"""A run that is killed at any moment goes on from its last finished checkpoint and ends with the bits of one that never
stopped; what goes wrong while a checkpoint is written leaves the earlier ones, and the training, as they were."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import json
import mmap
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import absl.logging
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

import jaxcache as jc
from extent import long
from jaxcache import checkpoint, saved_tables, snapshots

STEPS = 100
WINDOW = 64
SAMPLES = 8
SAVE_EVERY = 20
TABLES = {"user": 150, "item": 250}  # rows
SLOTS = {"user": 30, "item": 40}
DENSE_OPTIMIZER = optax.sgd(0.05, momentum=0.9)


class Clicks:
    """A data source for Grain: samples by their number."""

    def __init__(self) -> None:
        random = np.random.default_rng(11)
        self.ids = {name: random.zipf(1.3, STEPS * SAMPLES // 2) % rows for name, rows in TABLES.items()}
        self.labels = random.normal(size=STEPS * SAMPLES // 2).astype(np.float32)

    def __repr__(self) -> str:
        return "Clicks()"  # is in the state of a `DataLoader`, and an address would be another in each process

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"ids": {name: ids[number] for name, ids in self.ids.items()}, "labels": self.labels[number]}


def make_loader() -> Any:
    """A Grain iterator of STEPS batches: two epochs, each shuffled in another way."""
    data = grain.MapDataset.source(Clicks()).seed(5).shuffle().repeat(2).batch(SAMPLES)
    return iter(data.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


def make_store() -> jc.HostStore:
    tables = {
        "user": jc.Table(TABLES["user"], 4, jc.uniform(0.5), optimizer=optax.adam(0.05)),
        "item": jc.Table(TABLES["item"], 8, jc.normal(0.3)),
    }
    return jc.HostStore(tables, optimizer=jc.rowwise_adagrad(0.3), seed=3)


def dense_start() -> dict[str, Any]:
    """Dense parameters and their optimizer's state."""
    parameters = {
        "user": jnp.linspace(-1.0, 1.0, 4 * 5).reshape(4, 5),
        "item": jnp.linspace(1.0, -1.0, 8 * 5).reshape(8, 5),
    }
    return {"parameters": parameters, "state": DENSE_OPTIMIZER.init(parameters)}


def loss_of(parameters, rows, labels):
    user, item = (jnp.tanh(rows[name] @ parameters[name]) for name in ("user", "item"))
    return jnp.mean((jnp.sum(user * item, axis=-1) - labels) ** 2)


@partial(jax.jit, donate_argnums=(0, 2))
def train_step(cache, plan, dense, labels):
    rows = jc.lookup(cache, plan)
    loss, (gradients, row_gradients) = jax.value_and_grad(loss_of, argnums=(0, 1))(dense["parameters"], rows, labels)
    changes, state = DENSE_OPTIMIZER.update(gradients, dense["state"])
    dense = {"parameters": optax.apply_updates(dense["parameters"], changes), "state": state}
    return jc.update(cache, plan, row_gradients), dense, loss


def everything(store: jc.HostStore, dense: Any) -> dict[str, np.ndarray]:
    """All that training has changed but the losses, by name."""
    found = {str(number): np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(dense))}
    for name, rows in TABLES.items():
        found[name] = store.rows(name, np.arange(rows))
        for number, leaf in enumerate(store.row_state(name, np.arange(rows))):
            found[f"{name} {number}"] = leaf
    for group in store.groups:
        for number, scalar in enumerate(group.scalars):
            found[f"{group.group.name} scalar {number}"] = scalar
    return found


def train(store: jc.HostStore, loader: Any, between: Any = None, cache: Any = None, dense: Any = None) -> Any:
    """Trains to the end. `between(ahead, cache, dense, step, loss)` comes after each step. Returns the dense part."""
    dense = dense_start() if dense is None else dense
    with jc.LookAhead(store, loader, ids=lambda batch: batch["ids"], slots=SLOTS, window=WINDOW) as ahead:
        cache = ahead.start(cache)
        for batch, plan in ahead:
            cache = ahead.exchange(cache, plan)
            cache, dense, loss = train_step(cache, plan, dense, batch["labels"])
            if between is not None:
                cache = between(ahead, cache, dense, int(plan.step) + 1, loss)
        ahead.flush(cache)
    return dense


# kill -9

STARTING, STEPS_ALONE, FULL, INCREMENTAL, FINISHING = range(5)
PHASES = [
    "before its first step",
    "in steps alone",
    "in a full save",
    "in an incremental save",
    "as a save was finished",
]
# Seconds of it, at most. The first full save is not aimed at, so that the second run goes on from an incremental one.
AIMS = {INCREMENTAL: 0.1, FULL: 0.1, STEPS_ALONE: 0.1, FINISHING: 0.05, STARTING: 1.0}


class Shared:
    """What a killed process leaves behind in memory: the losses of its steps, what it was doing, and what it finished.

    Attributes:
        losses: `float32[STEPS]`, NaN where no attempt has come yet.
        numbers: the phase, and the last step whose checkpoint was reported as finished.
    """

    def __init__(self) -> None:
        self.losses = np.frombuffer(mmap.mmap(-1, 4 * STEPS), np.float32)
        self.numbers = np.frombuffer(mmap.mmap(-1, 16), np.int64)
        self.losses[:] = np.nan

    @property
    def phase(self) -> int:
        return int(self.numbers[0])

    @property
    def finished(self) -> int:
        return int(self.numbers[1])

    def note_loss(self, step: int, loss: float) -> None:
        before = self.losses[step - 1]
        assert np.isnan(before) or before == np.float32(loss), f"step {step} had loss {before}, and has {loss} now"
        self.losses[step - 1] = loss


def slow_down(shared: Shared) -> None:
    """Makes saving take long enough to be hit, and says what it does."""
    write_tables, read, rename = checkpoint.write_tables, snapshots.Snapshot.read, os.rename

    def write_slowly(folder, description, mark, base, *rest):
        shared.numbers[0] = FULL if base is None else INCREMENTAL
        time.sleep(0.02)
        try:
            return write_tables(folder, description, mark, base, *rest)
        finally:
            time.sleep(0.02)
            shared.numbers[0] = FINISHING

    def read_slowly(snapshot, keys):
        time.sleep(0.005)
        return read(snapshot, keys)

    def rename_slowly(*arguments, **options):
        time.sleep(0.02)
        rename(*arguments, **options)
        time.sleep(0.02)

    saved_tables._CHUNK_BYTES = 512
    checkpoint.write_tables, snapshots.Snapshot.read, os.rename = write_slowly, read_slowly, rename_slowly


def train_killed(folder: Path | None, shared: Shared, result: Path, with_cache: bool = True) -> None:
    """Trains to the end, from the latest checkpoint in `folder` on; without a folder, without checkpoints."""
    store, dense, loader, cache, last = make_store(), dense_start(), make_loader(), None, 0
    with contextlib.ExitStack() as stack:
        if folder is not None:
            slow_down(shared)
            keep = ocp.training.preservation_policies.LatestN(2)
            checkpointer = stack.enter_context(ocp.training.Checkpointer(folder, preservation_policy=keep))
            last = 0 if checkpointer.latest is None else checkpointer.latest.step
            assert last >= shared.finished, f"checkpoint {shared.finished} was finished, and {last} is the latest"
            if last:
                saved = jc.Checkpoint(store)
                dense = checkpointer.load_checkpointables(last, dict(model=dense, tables=saved))["model"]
                loader.set_state(saved.loader_state)
                cache = saved.cache() if with_cache else None

        def between(ahead, cache, dense, step, loss):
            nonlocal last
            assert step == last + 1
            last = step
            shared.note_loss(step, float(loss))
            if folder is None:
                return cache
            if shared.phase == STARTING:
                shared.numbers[0] = STEPS_ALONE
            time.sleep(0.005)
            if step % SAVE_EVERY == 0:
                cache = ahead.flush(cache)
                tables = jc.Checkpoint(store, cache, ahead=ahead, incremental=step % (2 * SAVE_EVERY) == 0)
                response = checkpointer.save_checkpointables_async(step, dict(model=dense, tables=tables), force=True)

                def finished(_):
                    shared.numbers[:] = STEPS_ALONE, step

                response.on_complete(finished)
            return cache

        dense = train(store, loader, between, cache, dense)
        assert last == STEPS, "batches were lost"
    np.savez(result, **everything(store, dense))


def forked(work) -> int:
    """Runs `work` in a process of its own, which has all modules and no thread of this one. Returns its number."""
    if process := os.fork():
        return process
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(process: int, wait: bool = True) -> int | None:
    """The exit status of a process, minus the signal's number if one killed it; None if it goes on."""
    found, status = os.waitpid(process, 0 if wait else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def kill_when(process: int, shared: Shared, aim: int, random: np.random.Generator) -> bool:
    """Kills a process at a moment of what was aimed at. Returns whether it was there to be killed."""
    status = None
    while shared.phase != aim and (status := ended(process, wait=False)) is None:
        time.sleep(0.001)
    if status is None:
        time.sleep(random.uniform(0, AIMS[aim]))
        status = ended(process, wait=False)
    if status is None:
        os.kill(process, signal.SIGKILL)
        assert ended(process) == -signal.SIGKILL
        return True
    assert status == 0, f"the run ended with {status}"
    return False


def run_and_kill(folder: Path, result: Path, shared: Shared, kills: int, done: Counter[int], random: Any) -> None:
    """A run in as many processes as it takes, which are killed as long as `done` is less than `kills` in all."""
    for attempt in itertools.count():
        shared.numbers[0] = STARTING
        process = forked(partial(train_killed, folder, shared, result, with_cache=attempt % 2 == 0))
        if done.total() == kills:
            assert ended(process) == 0
            return
        if not kill_when(process, shared, list(AIMS)[done.total() % len(AIMS)], random):
            return
        done[shared.phase] += 1


def kill_often(kills: int, seed: int) -> None:
    """Runs that are killed `kills` times in all, each compared with one that never was."""
    random, done, runs, started = np.random.default_rng(seed), Counter[int](), 0, time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        jax.config.update("jax_compilation_cache_dir", root + "/compiled")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        expected = Shared()
        assert ended(forked(partial(train_killed, None, expected, Path(root, "expected.npz")))) == 0
        # From here on nothing is written there, so that nothing is written by half.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
        while runs == 0 or done.total() < kills:
            runs, shared = runs + 1, Shared()
            folder, result = Path(root, f"run {runs}"), Path(root, f"run {runs}.npz")
            run_and_kill(folder, result, shared, kills, done, random)
            np.testing.assert_array_equal(shared.losses, expected.losses)
            with np.load(result) as found, np.load(root + "/expected.npz") as tables:
                assert found.files == tables.files
                for name in found.files:
                    assert found[name].tobytes() == tables[name].tobytes(), name
    said = ", ".join(f"{done[phase]} {name}" for phase, name in enumerate(PHASES))
    print(f"{kills} kills ({said}) of {runs} runs: the bits of one never killed, {time.monotonic() - started:.0f} s")


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "seed"), [(3, 0), pytest.param(50, 1, marks=long("3 kills"))])
def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_bits(kills, seed):
    """In a process that has no thread, so that it can be forked; see `kill_often`."""
    output = run_alone(sys.executable, "-W", "error", __file__, str(kills), str(seed))
    assert f"{kills} kills" in output


def run_alone(*command: str) -> str:
    """The output of a command that imports from here, and starts no thread when it does."""
    folders = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": folders}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-20_000:]
    return done.stdout


# A full disk


def fill_disks(folder: str, *kinds: str) -> None:
    """A run for each: on a small file system of its own ("tmpfs"), and with a limit on the size of files ("limit")."""
    absl.logging.set_verbosity("fatal")  # Orbax's tracebacks
    for how in kinds:
        root = Path(folder, how)
        root.mkdir()
        if how == "tmpfs":
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", root], check=True)
        fill_disk(root, how)
        print(how)


def fill_disk(root: Path, how: str) -> None:
    """Trains with a disk that is full between two saves."""
    store, states, checkpoints, responses = make_store(), {}, {}, {}

    def fill():
        if how == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
            return
        free = os.statvfs(root)
        (root / "ballast").write_bytes(bytes(free.f_bavail * free.f_bsize - 2**16))

    def make_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        (root / "ballast").unlink(missing_ok=True)

    def save(ahead, cache, dense, step):
        states[step] = everything(store, dense)
        tables = jc.Checkpoint(store, cache, ahead=ahead, incremental=step > 10)
        checkpoints[step] = tables
        responses[step] = checkpointer.save_checkpointables_async(step, dict(tables=tables), force=True)

    def between(ahead, cache, dense, step, loss):
        if step == 40:
            make_room()
        if step == 30:
            with pytest.raises(OSError, match="there is no room"):  # Orbax says once more what happened to the last one
                save(ahead, ahead.flush(cache), dense, step)
        elif step in (10, 20, 40, 50):
            cache = ahead.flush(cache)
            save(ahead, cache, dense, step)
        if step == 10:
            assert responses[10].result()
            fill()
        if step == 20:
            with pytest.raises(OSError, match=r"table .*there is no room") as raised:
                responses[20].result()
            assert "tensorstore_spec" not in str(raised.value)
        return cache

    with ocp.training.Checkpointer(root) as checkpointer:
        train(store, make_loader(), between)
        for step in (40, 50):
            assert responses[step].result()
        assert [saved.step for saved in checkpointer.checkpoints] == [10, 40, 50]
    assert not any(rows.has_snapshots for rows in store.groups)
    twin = make_store()
    expected, found = everything(twin, train(twin, make_loader())), everything(store, states[50]["0"])
    assert all(found[name].tobytes() == expected[name].tobytes() for name in found if not name.isdigit())

    assert [checkpoints[step].figures is not None for step in states] == [True, False, False, True, True]
    assert len(jc.SavedTables(root / "40").manifest["segments"]) == 2, "what was refused is the base of another"
    for left in root.glob("*.orbax-checkpoint-tmp"):
        assert not list(left.rglob("zarr.json")), "what was refused takes the room of others"
        with pytest.raises(FileNotFoundError, match="no checkpoint"):
            jc.SavedTables(left)
    with ocp.training.Checkpointer(root) as checkpointer:
        assert checkpointer.latest.step == 50
        for step in (10, 40, 50):
            other = make_store()
            checkpointer.load_checkpointables(step, dict(tables=jc.Checkpoint(other)))
            found = everything(other, {})
            assert all(found[name].tobytes() == states[step][name].tobytes() for name in found)


@pytest.mark.slow
def test_a_full_disk_is_an_error_and_leaves_training_and_earlier_checkpoints(tmp_path):
    alone, how = [], ["limit"]
    if shutil.which("unshare"):
        alone = ["unshare", "--user", "--map-root-user", "--mount"]
        mounted = [*alone, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
        if subprocess.run(mounted, capture_output=True, check=False).returncode == 0:
            how.append("tmpfs")
        else:
            alone = []  # no file system can be mounted here
    code = "import sys, conftest, test_crashes; test_crashes.fill_disks(*sys.argv[1:])"
    output = run_alone(*alone, sys.executable, "-W", "error", "-c", code, str(tmp_path), *how)
    assert output.split() == how


# What goes wrong while files are written


@pytest.fixture
def slow_files(monkeypatch):
    """Some milliseconds for each few rows."""
    read = snapshots.Snapshot.read

    def read_slowly(snapshot, keys):
        time.sleep(0.01)
        return read(snapshot, keys)

    monkeypatch.setattr(saved_tables, "_CHUNK_BYTES", 256)
    monkeypatch.setattr(snapshots.Snapshot, "read", read_slowly)


def assert_saved(folder: Path, step: int, expected: dict[str, np.ndarray]) -> jc.Checkpoint:
    """The latest checkpoint is that of `step`, and what was saved is `expected`."""
    with ocp.training.Checkpointer(folder) as checkpointer:
        assert checkpointer.latest.step == step
        store = make_store()
        saved = jc.Checkpoint(store)
        dense = checkpointer.load_checkpointables(step, dict(model=dense_start(), tables=saved))["model"]
    found = everything(store, dense)
    assert list(found) == list(expected)
    assert all(found[name].tobytes() == array.tobytes() for name, array in expected.items())
    return saved


def leave(number, frame):
    raise SystemExit


@pytest.mark.parametrize("how", [KeyboardInterrupt, SystemExit, ValueError])
def test_a_loop_that_is_left_while_files_are_written_finishes_the_checkpoint(tmp_path, slow_files, how):
    store, states = make_store(), {}

    def between(ahead, cache, dense, step, loss):
        if step == 10:
            cache = ahead.flush(cache)
            states[step] = everything(store, dense)
            tables = jc.Checkpoint(store, cache, ahead=ahead)
            checkpointer.save_checkpointables_async(step, dict(model=dense, tables=tables), force=True)
        if step == 12:
            assert all(rows.has_snapshots for rows in store.groups)
            if how is ValueError:
                raise ValueError
            os.kill(os.getpid(), signal.SIGINT if how is KeyboardInterrupt else signal.SIGTERM)
        return cache

    # A process that was started in the background has Ctrl-C switched off.
    before = signal.signal(signal.SIGTERM, leave), signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(how), ocp.training.Checkpointer(tmp_path) as checkpointer:
            train(store, make_loader(), between)
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    assert not any(rows.has_snapshots for rows in store.groups)
    assert_saved(tmp_path, 10, states[10])


@pytest.mark.parametrize("where", ["main thread", "event loop"])
def test_training_goes_on_beside_slow_files(tmp_path, slow_files, where):
    store, states = make_store(), {}

    def between(ahead, cache, dense, step, loss):
        if step == 10:
            cache = ahead.flush(cache)
            states[step] = everything(store, dense)
            states["tables"] = jc.Checkpoint(store, cache, ahead=ahead)
            checkpointer.save_checkpointables_async(step, dict(model=dense, tables=states["tables"]), force=True)
        return cache

    async def as_a_notebook_does():
        train(store, make_loader(), between)

    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        if where == "event loop":
            asyncio.run(as_a_notebook_does())
        else:
            train(store, make_loader(), between)
    assert_saved(tmp_path, 10, states[10])
    assert states["tables"].figures.copied_bytes > 0
    twin = make_store()
    train(twin, make_loader())
    found, expected = everything(store, {}), everything(twin, {})
    assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)


def test_callbacks_go_on_beside_slow_files(tmp_path, slow_files):
    """Victims of on-demand mode are written into the store from within a compiled program."""
    store = make_store()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(cache, dense, ids, labels):
        cache, plan = jc.admit(cache, store, ids)
        return train_step(cache, plan, dense, labels)

    with store, ocp.training.Checkpointer(tmp_path) as checkpointer:
        cache, dense = jc.init(store, SLOTS), dense_start()
        for number, batch in enumerate(itertools.islice(make_loader(), 40)):
            ids = {name: ids.astype(np.int32) for name, ids in batch["ids"].items()}
            cache, dense, _ = step(cache, dense, ids, batch["labels"])
            if number == 9:
                cache = jc.flush(cache, store)
                expected = everything(store, dense)
                tables = jc.Checkpoint(store, cache)
                checkpointer.save_checkpointables_async(10, dict(model=dense, tables=tables), force=True)
        jc.flush(cache, store)
    assert tables.figures.copied_bytes > 0
    assert_saved(tmp_path, 10, expected)


def overwrite(store: jc.HostStore, value: float) -> None:
    """Other weights in all rows, some at a time."""
    for rows in store.groups:
        for part in np.split(rows.group.keys(0, np.arange(100)), 20):
            old = rows.read(part)
            rows.write(part, old._replace(weights=np.full_like(old.weights, value)))


def test_a_save_that_begins_late_holds_nobody_up_and_saves_what_was(tmp_path):
    """Or never: where Orbax fails over something else after it has asked for the tables, it tells them nothing."""
    store, other = make_store(), make_store()
    overwrite(store, 1.0)
    expected, tables = everything(store, {}), jc.Checkpoint(store)
    write = tables.begin_save(tmp_path)
    overwrite(store, 2.0)
    write(tmp_path)
    jc.Checkpoint(other).restore(tmp_path)
    found = everything(other, {})
    assert all(found[name].tobytes() == array.tobytes() for name, array in expected.items())


def test_a_full_disk_for_copies_ends_the_save_and_not_the_training(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    store, folders = make_store(), [tmp_path / str(step) / "tables" for step in (1, 2, 3)]
    for folder in folders:
        folder.mkdir(parents=True)
    overwrite(store, 1.0)
    jc.Checkpoint(store).begin_save(folders[0])(folders[0])
    overwrite(store, 2.0)
    with monkeypatch.context() as full:
        full.setattr("jaxcache.store._zeros_in_file", refuse)
        tables = jc.Checkpoint(store, incremental=True)
        write = tables.begin_save(folders[1])
        overwrite(store, 3.0)
    with pytest.raises(OSError, match="rows of user were written while they were saved, and there was no room"):
        write(folders[1])
    assert tables.figures is None and not any(folders[1].rglob("zarr.json"))
    for step, value in ((1, 1.0), (3, 3.0)):
        other, folder = make_store(), folders[step - 1]
        if step == 3:
            jc.Checkpoint(store, incremental=True).begin_save(folder)(folder)
        jc.Checkpoint(other).restore(folder)
        assert np.all(other.rows("item", np.arange(100)) == value)


def test_a_checkpoint_whose_deletion_was_cut_short_is_no_base(tmp_path):
    """A kill may come then as well."""
    store = make_store()
    store.load("user", np.zeros((TABLES["user"], 4), np.float32))
    for step in (1, 2):
        (tmp_path / f"{step}" / "tables").mkdir(parents=True)
        jc.Checkpoint(store, incremental=True).begin_save(tmp_path / f"{step}" / "tables")(
            tmp_path / f"{step}" / "tables"
        )
    shutil.rmtree(tmp_path / "1" / "tables" / "segments")
    (tmp_path / "3" / "tables").mkdir(parents=True)
    tables = jc.Checkpoint(store, incremental=True)
    tables.begin_save(tmp_path / "3" / "tables")(tmp_path / "3" / "tables")
    assert tables.figures.incremental and tables.figures.rows == 0
    assert jc.SavedTables(tmp_path / "3")["user"].rows_written == TABLES["user"]


# Loaders


def mapped() -> Any:
    return make_loader()


def data_loader() -> Any:
    """Grain's other interface, whose state is bytes."""
    sampler = grain.samplers.IndexSampler(len(Clicks()), shuffle=True, seed=3, num_epochs=2)
    return iter(grain.DataLoader(data_source=Clicks(), sampler=sampler, operations=[grain.transforms.Batch(SAMPLES)]))


def windows() -> Any:
    """Shuffled within windows, and two data sets mixed."""
    one, two = (
        grain.experimental.WindowShuffleIterDataset(
            grain.MapDataset.source(Clicks()).seed(seed).to_iter_dataset(), window_size=20, seed=seed
        ).batch(SAMPLES)
        for seed in (1, 2)
    )
    return iter(grain.IterDataset.mix([one, two], weights=[0.3, 0.7]))


@pytest.mark.parametrize("make", [mapped, data_loader, windows])
def test_a_loader_of_grain_goes_on_behind_the_batch_trained_last(tmp_path, make):
    store, trained, trained_until = make_store(), [], 17

    def between(ahead, cache, dense, step, loss):
        if step == trained_until:
            cache = ahead.flush(cache)
            jc.Checkpoint(store, cache, ahead=ahead).begin_save(tmp_path)(tmp_path)
            trained.append(ahead.loader_state)
            raise StopAsyncIteration
        return cache

    with pytest.raises(StopAsyncIteration):
        train(store, make(), between)
    state = jc.SavedTables(tmp_path).loader_state
    assert state == trained[0] and type(state) is type(trained[0])
    loader, every = make(), list(make())
    loader.set_state(state)
    rest = list(loader)
    assert len(rest) == len(every) - trained_until > 0
    for found, expected in zip(rest, every[trained_until:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    "state",
    [
        b"\x00\xff",
        {"next_index": np.int64(3), "remainder": {"a": (-1, -1)}, "futures": {2: {"next_index": 1}}},  # as Grain's
        [(1, [2.5, None]), {"bytes": "no bytes"}, {"tuple": b"bytes"}, {"dict": {"tuple": ()}}, {}],
        {"state": 2**127 + 1, "has": True},  # as that of a NumPy generator
    ],
)
def test_states_of_loaders_come_back_equal(state):
    encoded = json.loads(json.dumps(saved_tables.encode_loader_state(state)))
    assert saved_tables.decode_loader_state(encoded) == state


def test_a_state_that_cannot_be_kept_is_an_error():
    with pytest.raises(TypeError, match=r"made of dicts.* has a set in it: \{1\}"):
        saved_tables.encode_loader_state({"epoch": 1, "seen": [{1}]})


if __name__ == "__main__":
    import conftest  # noqa: F401 - strict JAX

    kill_often(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
