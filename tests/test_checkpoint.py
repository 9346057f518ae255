"""A run that goes on from a checkpoint ends with the bits of one that never stopped; a bad one changes nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import itertools
import json
import os
import shutil
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp_v0
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp

import jaxcache as jc
import make_checkpoint_fixture as fixture
import on_demand
from extent import long
from jaxcache import checkpoint_manager, saved_tables, snapshots
from jaxcache.optimizers import RowOptimizer
from make_checkpoint_fixture import FIXTURE, fill, hold, make_store
from test_blocks import block_step
from training import (
    OPTIMIZERS,
    dense_start,
    make_batches,
    train_step,
)
from training import make_store as make_store_of

STEPS = 9
BATCHES = make_batches(3, ["distinct"] * STEPS)  # as many unique rows in each, so that few programs are compiled


@pytest.fixture(autouse=True, scope="module")
def small_chunks():
    """Tables of some rows are written in several chunks, the last of which is shorter, and sorted in several parts.

    And an optimizer is taken apart once, which takes longer than all else here.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxcache.store.RowOptimizer", functools.cache(RowOptimizer))
        patch.setattr(saved_tables, "_CHUNK_BYTES", 100)
        patch.setattr(snapshots, "_SORTED_KEYS", 7)
        yield


OPTIMIZER_OF = {name: make() for name, make in OPTIMIZERS.items()}


def make_model_store(optimizer: str) -> jc.HostStore:
    return make_store_of(OPTIMIZER_OF[optimizer])


def save(folder, step: int, checkpoint: jc.Checkpoint) -> Path:
    """Saves as Orbax does, on this thread."""
    return save_begun(folder, step, checkpoint)()


def save_begun(folder, step: int, checkpoint: jc.Checkpoint):
    """Takes the snapshot; what is returned writes it."""
    tables = Path(folder) / str(step) / "tables"
    write = checkpoint.begin_save(tables)

    def finish():
        tables.mkdir(parents=True)
        write(tables)
        return tables.parent

    return finish


def restored(path, make=make_store) -> jc.HostStore:
    store = make()
    jc.Checkpoint(store).restore(path)
    return store


def contents(store: jc.HostStore) -> list[np.ndarray]:
    """All that a store holds: its step, and of each group the rows in order of tables and ids, and scalars.

    Of large tables those rows that were written.
    """
    found = [np.array(store.step)]
    for rows in store.groups:
        keys = np.sort(rows.cells[rows.cells[:, 1] != 0, 0].view(np.uint64)).view(np.int64)
        assert len(keys) == rows.rows_written
        held = rows.read(np.arange(rows.group.rows) if rows.group.rows < 1000 else keys)
        found += [held.weights, *held.state, *map(np.asarray, rows.scalars)]
        if rows.group.rows >= 1000:
            found.append(keys)
    return found


def assert_same(found, wanted) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.ascontiguousarray(one).tobytes() == np.ascontiguousarray(other).tobytes()


def filled(make=make_store) -> jc.HostStore:
    """A store with rows in all tables, of step 8."""
    store = make()
    fixture.train(store, 5)
    fixture.train(store, 8)
    return store


# Twins: the bits of a run that never stopped


POLICIES = {
    "lookahead": jc.lookahead,
    "scratchpipe": jc.scratchpipe,
    "lru": jc.lru,
    "lfu": jc.lfu,
    "static": lambda: jc.static(on_demand.COUNTS),
    "no_cache": jc.no_cache,
}


@functools.cache
def uninterrupted(optimizer: str) -> tuple[list[float], list[list[np.ndarray]]]:
    """Of a run without checkpoints: all losses, and what the store holds after each number of steps."""
    store = make_model_store(optimizer)
    held, losses = [contents(store)], []

    def note(ahead, cache, dense, loss):
        held.append(contents(store))
        losses.append(float(loss))

    train(store, dense_start(), after=dict.fromkeys(range(1, STEPS + 1), note))
    return losses, held


def train(store, dense, slots=33, policy="lookahead", cache=None, until=STEPS, after=None):
    """Trains from the store's step on; `after` are functions to call when it was flushed after a step.

    Leaves without a flush, as a run that is killed. Returns losses.
    """
    losses, first, after = [], store.step, after or {}
    with jc.LookAhead(store, BATCHES[first:], lambda b: b["ids"], slots, POLICIES[policy]()) as ahead:
        cache = ahead.start(cache)
        for step, (batch, plan) in enumerate(ahead, first + 1):
            cache, dense, loss = train_step(ahead.exchange(cache, plan), plan, dense, batch["labels"])
            losses.append(loss)
            if step in after:
                cache = ahead.flush(cache)
                jc.check(cache, store)
                after[step](ahead, cache, jnp.array(dense), loss)
            if step == until:
                break
    return [float(loss) for loss in losses]


@st.composite
def runs(draw):
    """One run after the other, each restored from the last checkpoint of the one before and killed at some step."""
    found, first = [], 0
    while first < STEPS:
        last = first >= STEPS - 1 or len(found) == 3
        saves = draw(st.sets(st.integers(first + 1, STEPS - 1), min_size=1, max_size=3)) if not last else set()
        found.append(
            dict(
                slots=draw(st.sampled_from([20, 33])),
                policy=draw(st.sampled_from(sorted(POLICIES))),
                warm=draw(st.booleans()),  # whether it begins with the rows that the saved cache held
                saves={step: draw(st.booleans()) for step in sorted(saves)},  # whether the save is incremental
                late=draw(st.booleans()),  # whether files are written when the next steps have been trained
                killed=draw(st.integers(max(saves), STEPS)) if saves else STEPS,
            )
        )
        first = max(saves, default=STEPS)
    return found


OTHERS = [pytest.param(name, marks=long("two of them")) for name in ("sgd", "momentum", "adagrad", "chain")]


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam", *OTHERS])
@settings(max_examples=4)
@given(runs=runs())
def test_a_restored_run_ends_with_the_bits_of_one_that_never_stopped(optimizer, runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    losses, held = uninterrupted(optimizer)
    make = functools.partial(make_model_store, optimizer)
    store, other, dense, saved, path = make(), make(), dense_start(), {}, None
    for run in runs:
        cache = None
        if path is not None:
            store, other = other, store  # whatever was in it
            checkpoint = jc.Checkpoint(store)
            checkpoint.restore(path)
            assert_same(contents(store), held[store.step])
            dense, old = saved[store.step]
            if run["warm"]:
                cache = checkpoint.cache(run["slots"])
                jc.check(cache, store)
                if cache.slots == old.slots:
                    assert_same_residents(cache, old)
        begun = []

        def keep(ahead, cache, dense, loss, run=run, begun=begun, store=store):
            checkpoint = jc.Checkpoint(store, cache, ahead=ahead, incremental=run["saves"][store.step])
            begun.append(save_begun(folder, store.step, checkpoint))
            saved[store.step] = dense, jax.tree.map(jnp.array, cache)
            if not run["late"]:
                begun.append(begun.pop()())

        first, after = store.step, dict.fromkeys(run["saves"], keep)
        if run["killed"] == STEPS and STEPS not in after:
            after[STEPS] = lambda ahead, cache, dense, loss, store=store: assert_same(contents(store), held[STEPS])
        found = train(store, dense, run["slots"], run["policy"], cache, run["killed"], after)
        assert found == losses[first : run["killed"]]
        paths = [finish() if callable(finish) else finish for finish in begun]
        path = paths[-1] if paths else None
    assert store.step == STEPS
    for step in saved:
        jc.Checkpoint(other).restore(folder / str(step))
        assert_same(contents(other), held[step])


def assert_same_residents(cache: jc.CacheState, other: jc.CacheState) -> None:
    """The same rows in the same slots with the same counts."""
    for one, two in zip(cache.groups, other.groups, strict=True):
        np.testing.assert_array_equal(one.slot_table, two.slot_table)
        np.testing.assert_array_equal(one.counts, two.counts)


@pytest.mark.parametrize(("before", "after"), [("demand", "demand"), ("ahead", "demand"), ("demand", "ahead")])
def test_runs_in_on_demand_mode(before, after, tmp_path):
    losses, _ = uninterrupted("adagrad")
    wanted_losses, wanted_rows = on_demand.train_ahead("adagrad", BATCHES, 33)
    assert wanted_losses == losses
    step, _ = on_demand.programs("adagrad")

    def train_some(mode, store, cache, dense, batches):
        found = []
        if mode == "demand":
            carry = (jc.init(store, 20) if cache is None else jc.on_demand(cache, store), dense)
            for batch in batches:
                carry, loss = step(carry, (on_demand.int32(batch), batch["labels"], on_demand.int32(batch)))
                found.append(float(loss))
            cache, dense = jc.flush(carry[0], store), jnp.array(carry[1])
        else:
            with jc.LookAhead(store, batches, lambda b: b["ids"], 20) as ahead:
                cache = ahead.start(cache)
                for batch, plan in ahead:
                    cache = ahead.exchange(cache, plan)
                    cache, dense, loss = on_demand.train_step(cache, plan, dense, batch["labels"])
                    found.append(float(loss))
                cache = ahead.flush(cache)
        jc.check(cache, store)
        return cache, dense, found

    store = on_demand.shared_store("adagrad")
    cache, dense, found = train_some(before, store, None, dense_start(), BATCHES[:4])
    path = save(tmp_path, 4, jc.Checkpoint(store, cache))
    kept = jnp.array(dense)
    train_some(before, store, cache, dense, BATCHES[5:6])  # lost
    store = on_demand.shared_store("adagrad")  # the same object as new: the program that it is in is not compiled again
    checkpoint = jc.Checkpoint(store)
    checkpoint.restore(path)
    _, _, rest = train_some(after, store, checkpoint.cache(), kept, BATCHES[4:])
    assert found + rest == losses
    assert_same(on_demand.rows_and_state(store), wanted_rows)


def test_a_cache_of_on_demand_mode_is_stale_after_a_restore(tmp_path):
    store = on_demand.shared_store("adagrad")
    cache = jc.init(store, 20)
    path = save(tmp_path, 0, jc.Checkpoint(store, cache))
    jc.Checkpoint(store).restore(path)
    with pytest.raises(ValueError, match="on_demand got a stale cache"):
        jc.on_demand(cache, store)


# Tables of all kinds

MIXED = {
    "wide": (jc.Table(30, 3), 30),
    "huge": (jc.Table(10**12, 3), 50),
    "half": (jc.Table(30, 4, dtype="bfloat16", rounding="stochastic", optimizer=optax.sgd(0.1, momentum=0.9)), 30),
    "copied": (jc.Table(30, 2, dtype="bfloat16", master_copy=True, optimizer=jc.rowwise_adagrad(0.1)), 30),
    "frozen": (jc.Table(30, 4, dtype="float16", frozen=True), 30),
    "scheduled": (jc.Table(30, 3, optimizer=OPTIMIZER_OF["chain"]), 30),
}


@functools.partial(jax.jit, donate_argnums=0)
def mixed_step(cache, plan):
    rows = jc.lookup(cache, plan)
    gradients = {name: leaf * jnp.float32(0.5) + jnp.float32(0.1) for name, leaf in rows.items()}
    return jc.update(cache, plan, gradients), sum(leaf.sum() for leaf in rows.values())


@pytest.mark.slow
def test_groups_of_all_kinds_in_a_chain_of_incremental_checkpoints(tmp_path):
    random = np.random.default_rng(0)
    batches = [
        {
            name: random.permutation(ids)[:6].astype(np.int64) * (table.rows // ids)
            for name, (table, ids) in MIXED.items()
        }
        for _ in range(9)
    ]

    def make():
        store = jc.HostStore({name: table for name, (table, _) in MIXED.items()}, optax.adam(0.05), seed=5)
        store.load("frozen", np.arange(120).reshape(30, 4).astype(np.float32))
        return store

    def train_mixed(store, cache=None, until=9, saves=()):
        losses = []
        with jc.LookAhead(store, batches[store.step :], dict, dict.fromkeys(groups, 14)) as ahead:
            cache = ahead.start(cache)
            for _, plan in ahead:
                cache, loss = mixed_step(ahead.exchange(cache, plan), plan)
                losses.append(loss)
                step = int(cache.step)
                if step in (*saves, 9):
                    cache = ahead.flush(cache)
                    held[step] = contents(store)
                if step in saves:
                    checkpoint = jc.Checkpoint(store, cache, ahead=ahead, incremental=True)
                    save(tmp_path, step, checkpoint)
                    figures.append(checkpoint.figures)
                if step == until:
                    break
        return [float(loss) for loss in losses]

    held, figures = {}, []
    groups = [rows.group.name for rows in make().groups]
    assert len(groups) == 5
    wanted = train_mixed(make())
    expected = held.pop(9)
    losses = train_mixed(make(), until=7, saves=(3, 5, 6))
    assert [f.incremental for f in figures] == [False, True, True]
    assert figures[0].rows > figures[2].rows > 0
    for step in (5, 6):
        store = make()
        checkpoint = jc.Checkpoint(store)
        checkpoint.restore(tmp_path / str(step))
        assert_same(contents(store), held[step])
        cache = checkpoint.cache()
        jc.check(cache, store)
        rest = train_mixed(store, cache)
        assert losses[:step] + rest == wanted
        assert_same(held.pop(9), expected)


# Which rows the cache holds


def test_as_many_slots_hold_the_same_rows_in_the_same_slots(tmp_path):
    store = filled()
    cache = hold(store, fixture.SLOTS, fixture.HELD)
    path = save(tmp_path, 8, jc.Checkpoint(store, cache))
    other = make_store()
    checkpoint = jc.Checkpoint(other)
    checkpoint.restore(path)
    for slots in (None, fixture.SLOTS, {"user": 6, "word": 4, "page": 2}):
        found = checkpoint.cache(slots)
        assert found.slots == fixture.SLOTS
        assert_same_residents(found, cache)
        jc.check(found, other)
        assert int(found.step) == int(found.exchanged) == 8


def test_fewer_slots_hold_the_rows_that_were_looked_up_most(tmp_path):
    store = filled()
    lookups = {"item": {30: 5, 20: 1, 6: 7}, "user": {7: 6, 10**12 - 1: 9, 12: 3}, "word": {8: 2, 0: 5, 3: 9}}
    path = save(tmp_path, 8, jc.Checkpoint(store, hold(store, (6, 4, 2), lookups)))
    other = make_store()
    checkpoint = jc.Checkpoint(other)
    checkpoint.restore(path)
    fewer = checkpoint.cache((4, 2, 1))
    jc.check(fewer, other)
    assert residents(fewer) == {("item", 30): 5, ("item", 6): 7, ("user", 7): 6, ("user", 10**12 - 1): 9} | {
        ("word", 0): 5,
        ("word", 3): 9,
    }
    more = checkpoint.cache((20, 9, 2))
    jc.check(more, other)
    assert residents(more) == {(name, i): count for name, ids in lookups.items() for i, count in ids.items()}


def residents(cache: jc.CacheState) -> dict[tuple[str, int], int]:
    """The counts of the rows that are in the cache, by table and id."""
    found = {}
    for state in cache.groups:
        slots, keys = jc.state.slot_keys(state.group, np.array(state.slot_table))
        for slot, table, i in zip(slots, *state.group.locate(keys), strict=True):
            found[state.group.names[table], int(i)] = int(state.counts[slot])
    return found


def test_a_cache_is_filled_after_a_restore_from_the_store_as_it_is_then(tmp_path):
    store = filled()
    path = save(tmp_path, 8, jc.Checkpoint(store, hold(store, fixture.SLOTS, fixture.HELD)))
    bare = save(tmp_path, 9, jc.Checkpoint(store))
    checkpoint = jc.Checkpoint(store)
    with pytest.raises(RuntimeError, match=r"cache\(\) is for after a restore, checkpointer\.load_checkpointables"):
        checkpoint.cache()
    checkpoint.restore(bare)
    with pytest.raises(ValueError, match=r"no cache was saved in .*9/tables: give a number of slots"):
        checkpoint.cache()
    assert residents(checkpoint.cache([3, 3, 3])) == {}
    with pytest.raises(ValueError, match="the store has 3 groups"):
        checkpoint.cache(3)
    checkpoint.restore(path)
    old = checkpoint.cache()
    checkpoint.restore(path)
    slots = dict(zip(("user", "word", "page"), old.slots, strict=True))
    stale = pytest.raises(ValueError, match="rows were loaded into the store since the cache given to start")
    with jc.LookAhead(store, [], lambda b: b, slots) as ahead, stale:
        ahead.start(old)
    store.load("page", np.zeros((6, 4), np.float32))
    jc.check(checkpoint.cache(), store)
    store.mark_behind()
    with pytest.raises(RuntimeError, match="the newest rows are still in the cache"):
        checkpoint.cache()


# Orbax


def test_orbax_saves_beside_other_things_and_restores_them(tmp_path):
    """As its current documentation says, saves are asynchronous and several names lie in a checkpoint."""
    store = filled()
    cache = hold(store, fixture.SLOTS, fixture.HELD)
    wanted, figures = contents(store), []
    model = {"kernel": jnp.arange(6.0), "step": 8}
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        for step in (8, 9):
            checkpoint = jc.Checkpoint(store, cache, incremental=step == 9)
            response = checkpointer.save_checkpointables_async(step, dict(tables=checkpoint, model=model))
            fill(store, "item", [1, 2], 40)
            response.result()
            figures.append(checkpoint.figures)
        other = make_store()
        checkpoint = jc.Checkpoint(other)
        abstract = {"kernel": jnp.zeros(6), "step": 0}
        loaded = checkpointer.load_checkpointables(8, dict(tables=checkpoint, model=abstract))
        assert loaded["tables"] is checkpoint and loaded["model"]["step"] == 8
        np.testing.assert_array_equal(loaded["model"]["kernel"], model["kernel"])
        assert_same(contents(other), wanted)
        jc.check(checkpoint.cache(), other)
        checkpointer.load_checkpointables(9, dict(tables=checkpoint))
        assert other.rows("item", [1]).tolist() == [[51, 52, 53]]
    first, second = figures
    assert not first.incremental and second.incremental
    assert second.rows == 2 and second.rows_bytes == 2 * store.groups[0].row_bytes
    assert first.rows == sum(rows.rows_written for rows in other.groups) - 2
    assert first.rows_bytes == sum(
        (rows.rows_written - 2 * (n == 0)) * rows.row_bytes for n, rows in enumerate(other.groups)
    )
    assert first.step == second.step == 8 and first.pause_seconds > 0 and first.write_seconds > 0
    assert jc.SavedTables(tmp_path / "9").step == 8


def test_the_older_checkpoint_manager_saves_and_restores(tmp_path):
    store, args = filled(), ocp_v0.args
    first, figures = contents(store), []
    with ocp_v0.CheckpointManager(tmp_path, options=ocp_v0.CheckpointManagerOptions(max_to_keep=2)) as manager:
        for step in (1, 2, 3):
            checkpoint = jc.Checkpoint(store, incremental=True)
            tables = checkpoint_manager.Save(checkpoint)
            manager.save(step, args=args.Composite(tables=tables, model=args.JsonSave({"step": step})))
            fill(store, "word", [step], 60)
            manager.wait_until_finished()
            figures.append(checkpoint.figures)
        assert [f.incremental for f in figures] == [False, True, True]
        assert [f.rows for f in figures[1:]] == [1, 1]
        assert manager.all_steps() == [2, 3]  # what 3 goes on from was deleted, and is still there under its other name
        other = make_store()
        found = manager.restore(3, args=args.Composite(tables=checkpoint_manager.Restore(jc.Checkpoint(other))))
        assert found["tables"].store is other
        fill(other, "word", [3], 60)
        assert_same(contents(other), contents(store))
        manager.restore(2, args=args.Composite(tables=checkpoint_manager.Restore(jc.Checkpoint(other))))
        fill(other, "word", [1], 5)
        assert_same(contents(other), first)


def test_the_older_manager_without_its_threads(tmp_path):
    store = filled()
    options = ocp_v0.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp_v0.CheckpointManager(tmp_path, options=options) as manager:
        manager.save(1, args=ocp_v0.args.Composite(tables=checkpoint_manager.Save(jc.Checkpoint(store))))
    assert_same(contents(restored(tmp_path / "1")), contents(store))


# Training beside a save


class Gate:
    """Lets chunks be written once it is opened."""

    def __init__(self, monkeypatch):
        self._opened, write = threading.Event(), saved_tables._Arrays.write
        self.chunks = 0

        def wait(arrays, start, parts):
            assert self._opened.wait(60)
            self.chunks += 1
            return write(arrays, start, parts)

        monkeypatch.setattr(saved_tables._Arrays, "write", wait)

    def open(self):
        self._opened.set()


def test_what_is_trained_while_a_save_runs_is_not_in_it(tmp_path, monkeypatch):
    losses, held = uninterrupted("adam")
    gate, store, final = Gate(monkeypatch), make_model_store("adam"), []
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        responses = []

        def begin(ahead, cache, dense, loss):
            checkpoint = jc.Checkpoint(store, cache, ahead=ahead)
            responses.append((checkpointer.save_checkpointables_async(4, dict(tables=checkpoint)), checkpoint))

        def end(ahead, cache, dense, loss):
            final.append(contents(store))

        assert train(store, dense_start(), 20, after={4: begin, STEPS: end}) == losses
        assert gate.chunks == 0 and store.groups[0].has_snapshots
        with pytest.raises(RuntimeError, match="still being saved: wait for that before it is restored"):
            store.restore([rows.emptied() for rows in store.groups], 0, "mark")
        gate.open()
        [(response, checkpoint)] = responses
        response.result()
    assert gate.chunks > 5 and not store.groups[0].has_snapshots
    assert_same(final[0], held[STEPS])
    assert_same(contents(store), held[STEPS])
    assert_same(contents(restored(tmp_path / "4", lambda: make_model_store("adam"))), held[4])
    figures = checkpoint.figures
    assert figures.step == 4
    assert 0 < figures.copied_bytes <= figures.rows_bytes and figures.copied_bytes % store.groups[0].row_bytes == 0


class Failed:
    """What a write gives that fails."""

    def __init__(self, error):
        self._error = error

    def result(self):
        raise self._error


def fail_after(monkeypatch, chunks: int, error: Exception):
    write = saved_tables._Arrays.write
    count = itertools.count(1)

    def failing(arrays, start, parts):
        return [Failed(error)] if next(count) > chunks else write(arrays, start, parts)

    monkeypatch.setattr(saved_tables._Arrays, "write", failing)


@pytest.mark.parametrize("chunks", [0, 3, 9])
def test_a_save_that_fails_leaves_everything_as_it_was(tmp_path, monkeypatch, chunks):
    store, wanted = filled(), contents(filled())
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save_checkpointables(1, dict(tables=jc.Checkpoint(store)))
    fill(store, "user", range(60), 30)
    changed = contents(store)
    failing = jc.Checkpoint(store, incremental=chunks == 3)
    checkpointer = ocp.training.Checkpointer(tmp_path)
    with monkeypatch.context() as patch:
        fail_after(patch, chunks, ValueError("RESOURCE_EXHAUSTED: No space left on device"))
        response = checkpointer.save_checkpointables_async(2, dict(tables=failing))
        with pytest.raises(OSError, match=r"table '\w+': the arrays in .* could not be written, there is no room"):
            response.result()
    assert failing.figures is None
    assert not any(rows.has_snapshots for rows in store.groups)
    assert_same(contents(store), changed)
    fill(store, "user", range(60), 31)
    fill(store, "item", [0], 31)
    with contextlib.suppress(OSError):  # Orbax raises it once more
        checkpointer.close()
    assert [step.name for step in tmp_path.iterdir() if saved_tables.UNFINISHED not in step.name] == ["1"]
    assert_same(contents(restored(tmp_path / "1")), wanted)
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        later = jc.Checkpoint(store, incremental=True)
        checkpointer.save_checkpointables(3, dict(tables=later))
    assert later.figures.incremental and later.figures.rows == 61  # since 1, and not since 2
    assert_same(contents(restored(tmp_path / "3")), contents(store))


class Bad:
    """Something else in a checkpoint, that fails at once."""

    async def save(self, directory):
        raise ValueError("another checkpointable fails")

    async def load(self, directory):
        raise ValueError("another checkpointable fails")


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")  # Orbax lets those of the others go
@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_something_else_that_fails_holds_up_no_writer(tmp_path, names, monkeypatch):
    """Its rows are copied for as long as Orbax's thread waits for a folder that is not made: 300 s, and here one."""
    monkeypatch.setattr("orbax.checkpoint._src.multihost.multihost._DEFAULT_BARRIER_TIMEOUT", 1)
    store = filled()
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpoint = jc.Checkpoint(store)
        with pytest.raises(ValueError, match="another checkpointable fails"):
            checkpointer.save_checkpointables_async(1, dict(zip(names, (checkpoint, Bad()), strict=True)))
        fill(store, "item", [0], 30)
        fill(store, "item", [3], 30)
        while any(rows.has_snapshots for rows in store.groups):
            time.sleep(0.01)
            gc.collect()
        checkpointer.save_checkpointables(2, dict(zip(names, (checkpoint, {"x": 1}), strict=True)))
        other = used_store()
        with pytest.raises(ValueError, match="another checkpointable fails"):
            checkpointer.load_checkpointables(2, dict(zip(names, (jc.Checkpoint(other), Bad()), strict=True)))
        gc.collect()
    assert_same(contents(other), contents(used_store()))
    assert_same(contents(restored(tmp_path / "2")), contents(store))


# What is refused


def test_only_a_flushed_store_and_its_newest_cache_are_saved(tmp_path):
    store, seen = make_model_store("sgd"), []
    with jc.LookAhead(store, BATCHES, lambda b: b["ids"], 33) as ahead:
        old = cache = ahead.start()
        for batch, plan in itertools.islice(ahead, 2):
            cache, _, _ = train_step(ahead.exchange(cache, plan), plan, dense_start(), batch["labels"])
        with pytest.raises(RuntimeError, match=r"still in the cache: call `cache = ahead\.flush\(cache\)`.* is saved"):
            save(tmp_path, 2, jc.Checkpoint(store, cache))
        flushed = ahead.flush(cache)
        for given, kind, text in (
            (old, RuntimeError, "a cache that was donated to an earlier call: give the newest one"),
            (hold(filled(), (2, 2, 2), {}), ValueError, "a cache of another store: its tables are not those"),
            (
                dataclasses.replace(flushed, step=flushed.step - 1),
                RuntimeError,
                "of step 1, and the store .* at step 2",
            ),
        ):
            with pytest.raises(kind, match=text):
                save(tmp_path, 2, jc.Checkpoint(store, given))
        assert not list(tmp_path.iterdir()) and not store.groups[0].has_snapshots and store.groups[0].marks == []
        path = save(tmp_path, 2, jc.Checkpoint(store, flushed, ahead=ahead))
        before = contents(store)
        with pytest.raises(
            RuntimeError, match=r"serves an open LookAhead.* restore before its `with` block or after it"
        ):
            jc.Checkpoint(store).restore(path)
        assert_same(contents(store), before)
        assert seen == []
    jc.Checkpoint(store).restore(path)
    with pytest.raises(ValueError, match="the cache given to start"):
        stale = dataclasses.replace(flushed, exchanged=flushed.exchanged + 1)
        with jc.LookAhead(store, BATCHES, lambda b: b["ids"], 33) as ahead:
            ahead.start(stale)


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ((3,), TypeError, r"Checkpoint\(store=\.\.\.\) needs a HostStore, got int"),
        ((None,), TypeError, r"Checkpoint\(store=\.\.\.\) needs a HostStore, got NoneType"),
        ((filled, 3), TypeError, r"Checkpoint\(cache=\.\.\.\) needs a CacheState, got int"),
    ],
)
def test_wrong_arguments_are_errors(arguments, kind, text):
    with pytest.raises(kind, match=text):
        jc.Checkpoint(*(argument() if callable(argument) else argument for argument in arguments))
    with pytest.raises(TypeError, match=r"Checkpoint\(ahead=\.\.\.\) needs a LookAhead, got list"):
        jc.Checkpoint(make_store(), ahead=[])
    with pytest.raises(ValueError, match="a LookAhead of another store"):
        jc.Checkpoint(
            filled(), ahead=jc.LookAhead(filled(), [], lambda batch: batch, {"user": 6, "word": 4, "page": 2})
        )


# Restoring a part


def test_a_table_and_a_range_of_rows_are_read_alone(tmp_path):
    store = filled()
    fill(store, "item", range(40), 5)
    path = save(tmp_path, 8, jc.Checkpoint(store))
    saved = jc.SavedTables(path)
    segment = next((path / "tables" / "segments").iterdir())
    files = sorted((segment / "table-item" / "weights" / "c").iterdir(), key=lambda file: int(file.name))
    rows = json.loads((segment / "table-item" / "weights" / "zarr.json").read_text())["chunk_grid"]["configuration"]
    chunk = rows["chunk_shape"][0]
    assert len(files) == -(-40 // chunk) >= 4
    for table in ("user", "word"):
        shutil.rmtree(segment / f"table-{table}")
    for file in (files[0], files[-1]):
        shutil.rmtree(file)
    wanted = store.rows("item", np.arange(40))
    for start, stop in itertools.combinations((chunk, chunk + 1, 2 * chunk - 1, 2 * chunk, 2 * chunk + 1), 2):
        np.testing.assert_array_equal(saved["item"][start:stop], wanted[start:stop])
        found = list(saved["item"].chunks(start, stop))
        assert np.concatenate([ids for ids, _ in found]).tolist() == list(range(start, stop))
        weights, moments = (
            np.concatenate([leaf(rows) for _, rows in found]) for leaf in (lambda r: r.weights, lambda r: r.state[1])
        )
        np.testing.assert_array_equal(weights, wanted[start:stop])
        np.testing.assert_array_equal(moments, store.row_state("item", range(start, stop))[1])
    shutil.rmtree(files[2])  # not even the one that begins where the range ends
    np.testing.assert_array_equal(saved["item"][chunk : 2 * chunk], wanted[chunk : 2 * chunk])
    for part in (slice(0, chunk + 1), slice(2 * chunk, 40), slice(None), slice(-1, None)):
        with pytest.raises(OSError, match=r"table 'item' of checkpoint .*table-item are damaged or missing"):
            saved["item"][part]
    np.testing.assert_array_equal(saved["page"][:], store.rows("page", np.arange(6)))
    assert saved["page"].state_names == () and saved["item"].state_names == ("0.mu", "0.nu")


def test_rows_that_were_never_written_have_their_initial_weights(tmp_path):
    store = filled()
    saved = jc.SavedTables(save(tmp_path, 8, jc.Checkpoint(store)))
    for name, table in store.tables.items():
        last = min(table.rows, 60)
        found = saved[name][0:last]
        wanted = store.rows(name, np.arange(last))
        assert found.dtype == wanted.dtype == saved[name].dtype and saved[name].shape == (table.rows, table.dim)
        np.testing.assert_array_equal(found.view(np.uint16), wanted.view(np.uint16))
    for start, stop in ((5, 5), (7, 3), (40, 50)):
        assert saved["item"][start:stop].shape == (0, 3)
    big = saved["user"][10**12 - 5 :]
    np.testing.assert_array_equal(big, store.rows("user", np.arange(10**12 - 5, 10**12)))
    assert (
        repr(saved["user"]) == "SavedTable('user', 1,000,000,000,000 x 3 float32; 5 of 1,000,000,000,000 rows written)"
    )
    assert repr(saved).endswith("step 8: item, user, word, page)") and len(saved) == 4
    with pytest.raises(KeyError, match=r"no table named 'town': checkpoint .* has item, user, word, page"):
        saved["town"]
    with pytest.raises(TypeError, match=r"read by ranges of rows, table\[start:stop\], got 3"):
        saved["item"][3]
    with pytest.raises(ValueError, match="ranges of rows without a step"):
        saved["item"][::2]


@dataclasses.dataclass(frozen=True)
class Ramp:
    """Weights that grow with the id."""

    start: float

    def __call__(self, stream, rows, table):
        return np.float32(self.start) + rows[:, None].astype(np.float32) * np.ones((1, table.dim), np.float32)


def ramp(stream, rows, table):
    return Ramp(2.0)(stream, rows, table)


def test_initializers_of_ones_own(tmp_path):
    def make(initializer=Ramp(1.0)):
        return make_store(item=jc.Table(40, 3, initializer))

    store = filled(make)
    path = save(tmp_path, 8, jc.Checkpoint(store))
    with pytest.raises(
        ValueError, match=r"'item' .*never written, whose weights come from Ramp\(start=1\.0\): give it, Sav"
    ):
        jc.SavedTables(path)["item"][:]
    assert jc.SavedTables(path)["item"][3:4].tolist() == store.rows("item", [3]).tolist()  # was written
    given = jc.SavedTables(path, initializers={"item": Ramp(1.0)})["item"]
    np.testing.assert_array_equal(given[:], store.rows("item", np.arange(40)))
    assert_same(contents(restored(path, make)), contents(store))
    with pytest.raises(
        ValueError, match=r"the initializer of table 'item' is 'Ramp\(start=1\.0\)' there and 'Ramp\(start=2"
    ):
        restored(path, lambda: make(Ramp(2.0)))
    path = save(tmp_path, 9, jc.Checkpoint(filled(lambda: make(ramp))))
    assert "0x" not in jc.SavedTables(path).manifest["tables"]["item"]["initializer"]
    assert restored(path, lambda: make(ramp)).rows("item", [1]).tolist() == [[3.0, 3.0, 3.0]]


def test_a_store_takes_over_the_weights_of_a_table(tmp_path):
    store = filled()
    saved = jc.SavedTables(save(tmp_path, 8, jc.Checkpoint(store)))
    other = jc.HostStore(
        {"new": jc.Table(40, 3), "short": jc.Table(9, 2, dtype="bfloat16")}, optimizer=optax.sgd(0.1), seed=99
    )
    other.load("new", saved["item"])
    other.load("short", saved["word"])
    np.testing.assert_array_equal(other.rows("new", np.arange(40)), store.rows("item", np.arange(40)))
    np.testing.assert_array_equal(other.rows("short", np.arange(9)), store.rows("word", np.arange(9)))
    with pytest.raises(ValueError, match=r"of shape .*40, 3.*: its rows and dim are"):
        other.load("short", saved["item"])


# Damage


def damage(file: Path, kind: str) -> None:
    content = file.read_bytes()
    if kind == "deleted":
        file.unlink()
    elif kind == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif kind == "emptied":
        file.write_bytes(b"")
    else:
        place = len(content) // 2
        file.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])


def used_store() -> jc.HostStore:
    """A store with other rows than the fixture's, of step 5."""
    store = make_store()
    fixture.train(store, 5)
    fill(store, "item", [1, 2], 20)
    return store


def assert_refused(path, kind, text, store=None) -> None:
    """Restoring raises, and nothing in memory has changed."""
    store = used_store() if store is None else store
    before = contents(store)
    groups = [(rows.cells, rows._rows, rows.scalars, rows.marks) for rows in store.groups]
    checkpoint = jc.Checkpoint(store)
    with pytest.raises(kind, match=text):
        checkpoint.restore(path)
    assert_same(contents(store), before)
    for rows, (cells, arrays, scalars, marks) in zip(store.groups, groups, strict=True):
        assert rows.cells is cells and rows._rows is arrays and rows.scalars is scalars and rows.marks == marks
    assert (store.step, store.exchanged, store.behind, store.loaded) == (before[0], before[0], False, False)
    assert checkpoint.loader_state is None
    with pytest.raises(RuntimeError, match="after a restore"):
        checkpoint.cache()


FILES = sorted(file.relative_to(FIXTURE) for file in FIXTURE.rglob("*") if file.is_file())


@pytest.mark.parametrize("kind", ["deleted", "truncated", "emptied", "flipped"])
def test_a_damaged_file_is_an_error_and_changes_nothing(tmp_path, kind):
    folder = shutil.copytree(FIXTURE, tmp_path / "tables")
    store, other = used_store(), make_store()
    assert len(FILES) == 73 and {file.parts[0] for file in FILES} == {"manifest.json", "segments", "cache"}
    for file in FILES:
        path = folder / file
        content = path.read_bytes()
        damage(path, kind)
        if file.name == "manifest.json":
            if kind == "deleted":
                assert_refused(tmp_path, FileNotFoundError, "there is no checkpoint of tables in", store)
            else:
                assert_refused(tmp_path, ValueError, f"{path} is damaged.*: restore another checkpoint", store)
        elif file.parts[0] == "segments" and file.parts[1][:4] == "0001" and file.parts[2] == "table-page":
            jc.Checkpoint(other).restore(folder)  # of a table of which no row had changed
            assert_same(contents(other), contents(filled()))
        elif file.parts[0] == "segments":
            _, segment, table, leaf, *_ = file.parts
            text = (
                rf"table '{table[6:]}' of checkpoint {folder}: the arrays in {folder}/segments/{segment}/{table} are "
            )
            assert_refused(
                folder, OSError, text + r"damaged or missing: restore another checkpoint\. (.|\n)*" + leaf, store
            )
        else:  # the rows themselves are whole: one goes on with an empty cache
            checkpoint = jc.Checkpoint(other)
            checkpoint.restore(folder)
            with pytest.raises(
                OSError, match=rf"the rows of table '{file.parts[1][6:]}' in the cache: .*damaged or missing"
            ):
                checkpoint.cache()
            assert_same(contents(other), contents(filled()))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    jc.Checkpoint(store).restore(folder)
    assert_same(contents(store), contents(filled()))


def test_any_flipped_bit_is_an_error_or_of_no_account(tmp_path):
    """Of all files together, at random places: never are other rows restored."""
    folder = shutil.copytree(FIXTURE, tmp_path / "tables")
    random, store, wanted, errors = np.random.default_rng(0), used_store(), contents(filled()), 0
    other, before = make_store(), contents(store)
    of_account = [file for file in FILES if file.parts[0] != "cache"]
    for _ in range(150):
        path = folder / of_account[random.integers(len(of_account))]
        content = bytearray(path.read_bytes())
        content[random.integers(len(content))] ^= 1 << random.integers(8)
        whole = path.read_bytes()
        path.write_bytes(content)
        try:
            jc.Checkpoint(other).restore(folder)
            assert_same(contents(other), wanted)
        except (OSError, ValueError) as error:
            assert "tables" in str(error)
            with pytest.raises(type(error)):
                jc.Checkpoint(store).restore(folder)
            assert_same(contents(store), before)
            errors += 1
        path.write_bytes(whole)
    assert errors > 120


def test_each_number_in_the_manifest_counts(tmp_path):
    folder = shutil.copytree(FIXTURE, tmp_path / "tables")
    text, store = (folder / "manifest.json").read_text(), used_store()
    for place in [i for i, character in enumerate(text) if character in "123456789"][::9]:
        (folder / "manifest.json").write_text(text[:place] + "0" + text[place + 1 :])
        assert_refused(folder, ValueError, r"manifest\.json is (damaged|of format 0)", store)


def test_rows_that_are_missing_are_found_out(tmp_path):
    """A manifest that is whole, and does not fit the files."""
    folder = shutil.copytree(FIXTURE, tmp_path / "tables")
    rewrite(folder, lambda manifest: manifest["rows_written"].update(item=17))
    assert_refused(folder, OSError, r"is damaged: item, user have 2\d rows instead of \d+")
    rewrite(folder, lambda manifest: manifest["rows_written"].update(item=15, word=7))
    assert_refused(folder, OSError, "is damaged")


def rewrite(folder: Path, change) -> None:
    """Changes the manifest, with a checksum that fits."""
    manifest = saved_tables.read_manifest(folder)
    change(manifest)
    saved_tables._write_manifest(folder, manifest)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_an_unknown_format_is_an_error(tmp_path, version):
    folder = shutil.copytree(FIXTURE, tmp_path / "tables")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["manifest"]["format"] = version
    (folder / "manifest.json").write_text(json.dumps(manifest))
    text = f"manifest.json is of format {version!r}, and this jaxcache reads format 1: install the one that wrote it"
    assert_refused(folder, ValueError, text)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"manifest": 3}', '{"manifest": {}}', '{"crc32": 1}', "null"])
def test_a_manifest_that_is_none_is_an_error(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    assert_refused(tmp_path, ValueError, r"manifest\.json is damaged .*: restore another checkpoint")


def test_folders_that_are_no_checkpoint(tmp_path):
    assert_refused(tmp_path / "none", FileNotFoundError, "there is no checkpoint .*none")
    assert_refused(tmp_path, FileNotFoundError, "there is no checkpoint of tables in")
    (tmp_path / "file").write_text("text")
    assert_refused(tmp_path / "file", FileNotFoundError, "there is no checkpoint .*file")
    (tmp_path / "7" / "model").mkdir(parents=True)
    assert_refused(tmp_path / "7", FileNotFoundError, "there is no checkpoint of tables in")
    shutil.copytree(FIXTURE, tmp_path / "7.orbax-checkpoint-tmp" / "tables")
    shutil.copytree(FIXTURE, tmp_path / "7" / "tables.orbax-checkpoint-tmp")
    for path in (tmp_path, tmp_path / "7"):
        assert_refused(path, FileNotFoundError, "there is no checkpoint of tables in")
    shutil.copytree(FIXTURE, tmp_path / "8" / "tables")
    shutil.copytree(FIXTURE, tmp_path / "9" / "tables")
    assert_refused(tmp_path, ValueError, r"several checkpoints: choose .*/STEP, with STEP of 8, 9")
    shutil.copytree(FIXTURE, tmp_path / "9" / "others")
    assert_refused(tmp_path / "9", ValueError, "tables under several names: choose one of .*/9/others, .*/9/tables")
    for path in (tmp_path / "8", str(tmp_path / "8"), tmp_path / "9" / "others"):
        assert_same(contents(restored(path)), contents(filled()))


MOMENTUM, ADAGRAD = OPTIMIZER_OF["momentum"], OPTIMIZER_OF["adagrad"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(more=jc.Table(3, 9)), "it has tables item, user, word, page; the store has item, user, word, page, more"),
        (dict(item=jc.Table(41, 3, jc.normal(0.25))), "the number of rows of table 'item' is 40 there and 41 here"),
        (dict(item=jc.Table(40, 4, jc.normal(0.25))), "the dim of table 'item' is 3 there and 4 here"),
        (dict(page=jc.Table(6, 4, frozen=True)), "the dtype of table 'page' is 'float16' there and 'float32' here"),
        (
            dict(page=jc.Table(6, 4, dtype="float16", optimizer=optax.sgd(1.0))),
            "the frozen of table 'page' is True there",
        ),
        (
            dict(word=jc.Table(9, 2, dtype="bfloat16", rounding="stochastic", optimizer=jc.rowwise_adagrad(0.5))),
            "the rounding of table 'word' is 'nearest' there and 'stochastic' here",
        ),
        (
            dict(word=jc.Table(9, 2, dtype="bfloat16", optimizer=jc.rowwise_adagrad(0.5))),
            "the master_copy of table 'word' is True there and False here",
        ),
        (
            dict(item=jc.Table(40, 3, jc.normal(0.5))),
            r"the initializer of table 'item' is 'normal\(standard_deviation=0\.25",
        ),
        (
            dict(item=jc.Table(40, 3, jc.normal(0.25), optimizer=MOMENTUM)),
            r"the optimizer's state of table 'item' is \[\['0\.mu', .* and \[\['0\.trace', ",
        ),
    ],
)
def test_a_checkpoint_of_other_tables_is_an_error(changes, text):
    store = make_store(**changes)
    fill(store, "item", [1, 2], 20)
    assert_refused(FIXTURE, ValueError, f"checkpoint {FIXTURE} is not one of this store: {text}", store)


def test_the_error_says_what_to_do():
    with pytest.raises(
        ValueError, match=r"or take over weights alone, store\.load\('item', SavedTables\(path\)\['item'\]\)"
    ):
        restored(FIXTURE, lambda: make_store(item=jc.Table(41, 3)))


@pytest.mark.parametrize(("saved", "given"), [(MOMENTUM, ADAGRAD), (ADAGRAD, MOMENTUM), (MOMENTUM, optax.sgd(0.1))])
def test_optimizers_whose_state_has_the_same_shapes_are_told_apart(tmp_path, saved, given):
    def make(optimizer):
        return jc.HostStore({"item": jc.Table(40, 3)}, optimizer)

    store = make(saved)
    fill(store, "item", [1, 2], 20)
    path = save(tmp_path, 0, jc.Checkpoint(store))
    assert_refused(path, ValueError, "the optimizer's state of table 'item' is", make(given))
    assert_same(contents(restored(path, lambda: make(saved))), contents(store))


def test_another_optimizers_counts_are_told_apart(tmp_path):
    """Two schedules of sgd keep no state for a row, and one of them counts steps."""
    one, other = optax.sgd(0.1), optax.sgd(optax.exponential_decay(0.5, 3, 0.7))
    path = save(tmp_path, 0, jc.Checkpoint(jc.HostStore({"item": jc.Table(40, 3)}, one)))
    store = jc.HostStore({"item": jc.Table(40, 3)}, other)
    assert_refused(
        path, ValueError, r"the optimizer's counts of table 'item' is \[\] there and \['1\.count'\] here", store
    )


def test_another_seed_is_an_error(tmp_path):
    path = save(tmp_path, 0, jc.Checkpoint(jc.HostStore({"item": jc.Table(40, 3)}, MOMENTUM, seed=1)))
    store = jc.HostStore({"item": jc.Table(40, 3)}, MOMENTUM, seed=2)
    assert_refused(path, ValueError, r"its seed is 1 and the store's 2, .*: HostStore\(\.\.\., seed=1\)", store)


def test_tables_may_be_grouped_otherwise_if_their_counts_agree(tmp_path):
    def make(*optimizers):
        tables = {f"table {n}": jc.Table(40, 3, optimizer=optimizer) for n, optimizer in enumerate(optimizers)}
        return jc.HostStore(tables)

    def trained(store, *counts):
        for n in range(2):
            fill(store, f"table {n}", [5, n], 8)
        store.catch_up(
            tuple((np.full_like(rows.scalars[0], count),) for rows, count in zip(store.groups, counts, strict=True)), 8
        )
        return store

    shared = optax.adam(0.1)
    apart = lambda: make(optax.adam(0.1), optax.adam(0.1))  # noqa: E731
    path = save(tmp_path, 1, jc.Checkpoint(trained(make(shared, shared), 8)))
    assert_same(contents(restored(path, apart)), contents(trained(apart(), 8, 8)))
    path = save(tmp_path, 2, jc.Checkpoint(trained(apart(), 8, 8)))
    assert_same(contents(restored(path, lambda: make(shared, shared))), contents(trained(make(shared, shared), 8)))
    path = save(tmp_path, 3, jc.Checkpoint(trained(apart(), 8, 3)))
    text = "tables table 0, table 1 share an optimizer here, and there they have counts of their own: give each an"
    assert_refused(path, ValueError, text, make(shared, shared))
    assert_same(contents(restored(path, apart)), contents(trained(apart(), 8, 3)))


# The first format, and files that last


def test_the_first_format_is_read():
    store = make_store()
    checkpoint = jc.Checkpoint(store)
    checkpoint.restore(FIXTURE)
    wanted = filled()
    assert_same(contents(store), contents(wanted))
    assert checkpoint.loader_state == fixture.LOADER_STATE
    cache = checkpoint.cache()
    jc.check(cache, store)
    assert_same_residents(cache, hold(wanted, fixture.SLOTS, fixture.HELD))
    saved = jc.SavedTables(FIXTURE)
    assert (saved.step, saved.seed, saved.slots) == (8, 7, [6, 4, 2])
    assert saved.manifest["features"] == {"last": {"table": "item", "combiner": "sum", "padding": None}}
    assert len(saved.manifest["segments"]) == 2
    # The numbers themselves, so that a change of what makes them is seen too.
    assert store.rows("item", [3]).tolist() == saved["item"][3:4].tolist() == [[21, 22, 23]]
    assert store.rows("user", [10**12 - 1]).tolist() == saved["user"][10**12 - 1 :].tolist() == [[67, 68, 69]]
    assert store.rows("word", [4]).tolist() == [[22, 23]] and store.row_state("word", [4])[0].tolist() == [[32, 33]]
    assert saved["page"][1:2].tolist() == [[16, 17, 18, 19]]
    assert (saved["user"][1:2] * 2**24).tolist() == [[6592986, -4329579, -8218346]]  # never written


def test_a_checkpoint_can_be_moved(tmp_path):
    store = filled()
    save(tmp_path / "old", 8, jc.Checkpoint(store))
    assert not any(str(tmp_path).encode() in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    (tmp_path / "old").rename(tmp_path / "new place")
    assert_same(contents(restored(tmp_path / "new place" / "8")), contents(store))


def test_names_of_tables_may_be_anything(tmp_path):
    names = ["a/b", "..", "/../../../../up", "ü %2F", "a b", "A", "a", "con.", "*?"]
    tables = {name: jc.Table(40, 3) for name in names}

    def make():
        return jc.HostStore(tables, optax.sgd(0.1))

    store = make()
    for number, name in enumerate(names):
        fill(store, name, [number, 20], number)
    cache = hold(store, 20, {name: {number: 1} for number, name in enumerate(names)})
    path = save(tmp_path, 0, jc.Checkpoint(store, cache))
    [segment] = (path / "tables" / "segments").iterdir()
    assert len(list(segment.iterdir())) == len(list((path / "tables" / "cache").iterdir())) == len(names)
    assert_same(contents(restored(path, make)), contents(store))
    for name in names:
        np.testing.assert_array_equal(jc.SavedTables(path)[name][:], store.rows(name, np.arange(40)))
    checkpoint = jc.Checkpoint(make())
    checkpoint.restore(path)
    assert residents(checkpoint.cache()) == residents(cache)


def test_a_small_table_takes_little_room(tmp_path, monkeypatch):
    """Chunks are no longer than needed: the last one is filled up."""
    store = filled()
    fill(store, "item", range(40), 5)
    sizes = []
    for chunk_bytes in (2**23, 12 * 27):
        monkeypatch.setattr(saved_tables, "_CHUNK_BYTES", chunk_bytes)
        [segment] = (save(tmp_path, chunk_bytes, jc.Checkpoint(store)) / "tables" / "segments").iterdir()
        sizes.append([file.stat().st_size for file in (segment / "table-item" / "weights" / "c").glob("*/*")])
    assert sizes == [[12 * 40 + 4], [12 * 20 + 4] * 2]  # with checksums


def test_a_store_without_rows_is_restored_as_one(tmp_path):
    path = save(tmp_path, 0, jc.Checkpoint(make_store()))
    store = used_store()
    store.unwritten = OSError("rows of an earlier pipeline")  # which are of no account any more
    jc.Checkpoint(store).restore(path)
    assert store.unwritten is None
    assert_same(contents(store), contents(make_store()))
    assert store.rows_written == 0
    np.testing.assert_array_equal(jc.SavedTables(path)["item"][:], make_store().rows("item", np.arange(40)))


# Incremental


def file_sizes(folder: Path) -> dict[int, int]:
    """The size of each file under its inode."""
    return {file.stat().st_ino: file.stat().st_size for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("links", [True, False])
def test_incremental_checkpoints_write_what_changed_and_outlive_each_other(tmp_path, monkeypatch, links):
    if not links:

        def refuse(*arguments):
            raise OSError("no links here")

        monkeypatch.setattr(os, "link", refuse)
    store, held, checkpoints = filled(), {}, {}
    changes = {1: {}, 2: {"item": [0, 39]}, 3: {}, 4: {"item": [1, 39], "user": [5]}}
    for step, change in changes.items():
        for name, ids in change.items():
            fill(store, name, ids, 20 + step)
        checkpoints[step] = jc.Checkpoint(store, incremental=True)
        save(tmp_path, step, checkpoints[step])
        held[step] = contents(store)
    figures = [checkpoints[step].figures for step in changes]
    assert [f.incremental for f in figures] == [False, True, True, True]
    assert [f.rows for f in figures] == [sum(rows.rows_written for rows in filled().groups), 2, 0, 3]
    shared = file_sizes(tmp_path / "1").keys() & file_sizes(tmp_path / "4").keys()
    assert bool(shared) == links and len(jc.SavedTables(tmp_path / "4").manifest["segments"]) == 4
    assert jc.SavedTables(tmp_path / "4")["item"].rows_written == 14 + 2
    for deleted in (2, 1, 3):
        shutil.rmtree(tmp_path / str(deleted))
        for step in (int(folder.name) for folder in tmp_path.iterdir()):
            assert_same(contents(restored(tmp_path / str(step))), held[step])
    np.testing.assert_array_equal(jc.SavedTables(tmp_path / "4")["item"][:], store.rows("item", np.arange(40)))


def test_what_an_incremental_checkpoint_goes_on_from(tmp_path):
    store = filled()

    def saved_rows(step, folder=tmp_path, name="tables", store=store):
        checkpoint = jc.Checkpoint(store, incremental=True)
        tables = folder / str(step) / name
        write = checkpoint.begin_save(tables)
        tables.mkdir(parents=True)
        write(tables)
        assert checkpoint.figures.incremental == (checkpoint.figures.rows < every)
        assert_same(contents(restored(tables)), contents(store))
        return checkpoint.figures.rows

    every = sum(rows.rows_written for rows in store.groups)
    assert saved_rows(1) == every
    fill(store, "item", [0], 20)
    assert saved_rows(2) == 1
    assert saved_rows(3, name="others") == every  # other tables, for all that is known
    assert saved_rows(31, name="others") == 0
    fill(store, "item", [3], 21)
    shutil.rmtree(tmp_path / "2")
    assert saved_rows(4) == 2  # since 1
    shutil.rmtree(tmp_path / "1")
    shutil.rmtree(tmp_path / "4")
    assert saved_rows(5) == every
    assert saved_rows(6, folder=tmp_path / "elsewhere") == every
    # Not committed, or without the last of its files.
    (tmp_path / "5").rename(tmp_path / "5.orbax-checkpoint-tmp-17")
    assert saved_rows(7) == every
    (tmp_path / "7" / "tables" / "manifest.json").unlink()
    assert saved_rows(8) == every
    assert saved_rows(9) == 0
    # A full one in between is as good.
    full = jc.Checkpoint(store)
    save(tmp_path, 10, full)
    assert not full.figures.incremental and full.figures.rows == every
    fill(store, "word", [0], 20)
    assert saved_rows(11) == 1
    # Another process knows nothing of what was written since; one that restored does.
    assert saved_rows(12, store=filled()) == every
    other = restored(tmp_path / "11")
    fill(other, "word", [1], 20)
    assert saved_rows(13, store=other) == 1
    fill(other, "word", [2], 20)
    assert saved_rows(14, store=other) == 1
    shutil.rmtree(tmp_path / "13")
    shutil.rmtree(tmp_path / "14")
    assert saved_rows(15, store=other) == 2
    # What was written is known since the latest eight.
    for number in range(20, 29):
        jc.Checkpoint(store).begin_save(tmp_path / str(number) / "tables")
    assert saved_rows(30) == every


def test_a_restored_store_goes_on_from_what_it_was_restored_from_alone(tmp_path):
    store = filled()
    save(tmp_path, 1, jc.Checkpoint(store))
    fill(store, "item", [0], 20)
    save(tmp_path, 2, jc.Checkpoint(store, incremental=True))
    jc.Checkpoint(store).restore(tmp_path / "1")  # back again
    fill(store, "item", [3], 21)
    again = jc.Checkpoint(store, incremental=True)
    save(tmp_path, 3, again)
    assert again.figures.incremental and again.figures.rows == 1
    assert_same(contents(restored(tmp_path / "3")), contents(store))


# The state of the loader


class Loader:
    """Batches that are drawn one by one from a position on."""

    def __init__(self, position=0, stop=STEPS, encode=lambda position: {"position": position, "epochs": [0, None]}):
        self.position, self._stop, self._encode = position, stop, encode

    def __iter__(self):
        return self

    def __next__(self):
        if self.position >= self._stop:
            raise StopIteration
        self.position += 1
        return BATCHES[self.position - 1]

    def get_state(self):
        return self._encode(self.position)


def trained_states(loader, look_at, **arguments):
    """What `look_at(ahead, cache)` gives after each step."""
    store, found = make_model_store("sgd"), []
    with jc.LookAhead(store, loader, lambda b: b["ids"], 33, window=64, **arguments) as ahead:
        cache, dense = ahead.start(), dense_start()
        found.append(look_at(ahead, cache))
        for batch, plan in ahead:
            cache, dense, _ = train_step(ahead.exchange(cache, plan), plan, dense, batch["labels"])
            found.append(look_at(ahead, cache))
    return found


def test_the_loaders_state_is_that_after_the_batch_trained_last():
    loader = Loader()

    def look(ahead, cache):
        ahead.flush(cache)
        while loader.position < STEPS:  # the loader itself is a window ahead: a plan that needs victims waits for that
            time.sleep(0.001)
        return ahead.loader_state["position"]

    assert trained_states(loader, look) == list(range(STEPS + 1))


def test_the_loaders_state_is_as_of_the_latest_flush():
    """Whatever was trained since, which is not in the store."""

    def look(ahead, cache):
        if int(cache.step) % 4 == 3:
            ahead.flush(cache)
        return ahead.loader_state["position"]

    assert trained_states(Loader(), look) == [0, 0, 0, 3, 3, 3, 3, 7, 7, 7]


def test_a_function_says_where_the_loader_is():
    positions = itertools.count()

    def look(ahead, cache):
        ahead.flush(cache)
        return ahead.loader_state

    found = trained_states(iter(BATCHES), look, loader_state=lambda: f"behind {next(positions)}")
    assert found == [f"behind {step}" for step in range(STEPS + 1)]
    assert trained_states(BATCHES, look) == [None] * (STEPS + 1)
    with pytest.raises(TypeError, match=r"LookAhead\(loader_state=\.\.\.\) needs a function without arguments"):
        jc.LookAhead(make_model_store("sgd"), BATCHES, dict, 33, loader_state=3)
    with pytest.raises(RuntimeError, match="loader_state is known after start"):
        _ = jc.LookAhead(make_model_store("sgd"), BATCHES, dict, 33).loader_state


def test_a_state_that_changes_later_is_kept_as_it_was():
    state = {"position": 0}

    def draw():
        for batch in BATCHES:
            state["position"] += 1
            yield batch

    def look(ahead, cache):
        ahead.flush(cache)
        ahead.loader_state["position"] = 99  # what is given away is a copy
        return ahead.loader_state["position"]

    assert trained_states(draw(), look, loader_state=lambda: state) == list(range(STEPS + 1))


def test_between_exchange_and_update_the_batch_is_not_trained_yet(tmp_path):
    store = make_model_store("sgd")
    with jc.LookAhead(store, Loader(), lambda b: b["ids"], 33, window=64) as ahead:
        cache, dense = ahead.start(), dense_start()
        for batch, plan in itertools.islice(ahead, 4):
            cache = ahead.exchange(cache, plan)
            step = int(cache.step)
            cache = ahead.flush(cache)
            assert ahead.loader_state["position"] == step == store.step
            if step == 3:
                save(tmp_path, step, jc.Checkpoint(store, cache, ahead=ahead))
            cache, dense, _ = train_step(cache, plan, dense, batch["labels"])
    assert store.step == 3
    other = make_model_store("sgd")
    checkpoint = jc.Checkpoint(other)
    checkpoint.restore(tmp_path / "3")
    assert checkpoint.loader_state["position"] == 3
    assert_same(contents(other), uninterrupted("sgd")[1][3])
    cache = checkpoint.cache()
    jc.check(cache, other)
    assert int(cache.exchanged) == 3


def test_blocks_go_on_from_a_checkpoint_where_the_loader_was(tmp_path):
    losses, held = uninterrupted("momentum")
    store, found = make_model_store("momentum"), []

    def blocks(store, cache, dense, position, stop):
        found = []
        with jc.LookAhead(store, Loader(position), lambda b: b["ids"], 33, window=64) as ahead:
            cache = ahead.start(cache)
            for batches, plans in ahead.blocks(4):
                cache = ahead.flush(cache)  # before the block is trained
                assert ahead.loader_state["position"] == store.step
                cache, dense, outputs = ahead.scan(block_step, cache, plans, dense, {"labels": batches["labels"]})
                found.extend(map(float, outputs["loss"]))
                cache = ahead.flush(cache)
                assert ahead.loader_state["position"] == store.step
                if store.step == stop:
                    save(tmp_path, stop, jc.Checkpoint(store, cache, ahead=ahead))
                    break
        return found, jnp.array(dense)

    found, dense = blocks(store, None, dense_start(), 0, 4)
    store = make_model_store("momentum")
    checkpoint = jc.Checkpoint(store)
    checkpoint.restore(tmp_path / "4")
    rest, _ = blocks(store, checkpoint.cache(), dense, checkpoint.loader_state["position"], STEPS)
    assert found + rest == losses
    assert_same(contents(store), held[STEPS])


def test_an_iterator_of_grain_goes_on_where_training_was(tmp_path):
    dataset = pytest.importorskip("grain").MapDataset.source(BATCHES).shuffle(seed=3).to_iter_dataset()
    drawn = list(dataset)

    def look(ahead, cache):
        ahead.flush(cache)
        return saved_tables.decode_loader_state(saved_tables.encode_loader_state(ahead.loader_state))

    for step, state in enumerate(trained_states(dataset, look)):
        iterator = iter(dataset)
        iterator.set_state(state)
        rest = list(iterator)
        assert len(rest) == STEPS - step
        for one, other in zip(rest, drawn[step:], strict=True):
            np.testing.assert_array_equal(one["labels"], other["labels"])


@pytest.mark.parametrize(
    "state",
    [None, b"", b"\x00\xff", "text", 3, 2.5, float("inf"), True, [], {}, {"a": [1, {"b": None}]}],
    ids=repr,
)
def test_states_of_loaders_come_back(tmp_path, state):
    encoded = saved_tables.encode_loader_state(state)
    found = saved_tables.decode_loader_state(json.loads(json.dumps(encoded)))
    assert found == state and type(found) is type(state)


def test_numpy_numbers_in_a_loaders_state_come_back_as_pythons():
    state = {"a": np.int64(3), "b": [np.float32(0.5), np.bool_(True)]}
    found = saved_tables.decode_loader_state(saved_tables.encode_loader_state(state))
    assert found == {"a": 3, "b": [0.5, True]} and type(found["a"]) is int


@pytest.mark.parametrize("state", [{1}, {"a": object()}, [np.zeros(2)]], ids=str)
def test_states_that_cannot_be_kept_are_errors(tmp_path, state):
    store = make_model_store("sgd")
    with jc.LookAhead(store, BATCHES, lambda b: b["ids"], 33, loader_state=lambda: state) as ahead:
        ahead.start()
        with pytest.raises(TypeError, match="the loader's state must be made of dicts, lists, tuples, numbers"):
            save(tmp_path, 0, jc.Checkpoint(store, ahead=ahead))
    assert not store.groups[0].has_snapshots and not list(tmp_path.iterdir())


def test_features_are_described(tmp_path):
    store = make_model_store("sgd")
    features = {"pair": jc.Feature("user", "mean", 0)}
    with jc.LookAhead(store, [], lambda b: b, 33, features=features) as ahead:
        path = save(tmp_path, 0, jc.Checkpoint(store, ahead.start(), ahead=ahead))
    manifest = jc.SavedTables(path).manifest
    assert manifest["features"] == {"pair": {"table": "user", "combiner": "mean", "padding": 0}}
    assert manifest["slots"] == [33] and jc.SavedTables(save(tmp_path, 1, jc.Checkpoint(store))).slots is None
