"""Tables of every kind whose rows are known without training, and the checkpoint of them that `tests/` keeps.

`python tests/make_checkpoint_fixture.py` writes `tests/checkpoint_format_1/` anew. That is for a new format: those that
were once written must be read forever.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax

import jaxcache as jc
from jaxcache.chunks import bring_in
from jaxcache.state import empty_cache

FIXTURE = Path(__file__).parent / "checkpoint_format_1"
LOADER_STATE = b"\x00\xffat batch 8"
SLOTS = (6, 4, 2)  # of the groups of item and user, word, and page
HELD = {"item": {3: 5, 20: 1}, "user": {10**12 - 1: 9, 12: 3}, "word": {8: 2}}
ADAM, ROWWISE_ADAGRAD = optax.adam(0.125), jc.rowwise_adagrad(0.5)
CHANGED = {
    "item": [3, 21, 22],
    "user": [10**12 - 1],
    "word": [4],
    "page": [],
}  # between the two saves, at steps 5 and 8
WRITTEN = {
    "item": range(0, 40, 3),
    "user": [0, 7, 10**6, 10**12 - 2],
    "word": range(5),
    "page": range(6),
}


def make_store(**changes) -> jc.HostStore:
    """Two tables in a group, with a table of 16 bits and a master copy, and a frozen one."""
    tables = {
        "item": jc.Table(40, 3, jc.normal(0.25)),
        "user": jc.Table(10**12, 3, jc.uniform(0.5)),
        "word": jc.Table(9, 2, dtype="bfloat16", master_copy=True, optimizer=ROWWISE_ADAGRAD),
        "page": jc.Table(6, 4, dtype="float16", frozen=True),
    }
    return jc.HostStore({**tables, **changes}, optimizer=ADAM, seed=7)


def fill(store: jc.HostStore, name: str, ids, step: int) -> None:
    """Sets every leaf of rows to whole numbers that tell table, id, column and step apart."""
    rows, position = store.locate(name)
    ids = np.array(ids, np.int64)
    new = rows.allocate(len(ids))
    for number, leaf in enumerate((new.weights, *new.state), 1):
        columns = np.arange(int(np.prod(leaf.shape[1:]))).reshape(leaf.shape[1:])
        first = (ids % 97 + 10 * number + step).reshape(-1, *[1] * (leaf.ndim - 1))
        leaf[:] = (first + columns).astype(leaf.dtype)
    rows.write(rows.group.keys(position, ids), new)


def train(store: jc.HostStore, step: int) -> None:
    """What the store holds after `step` updates, 5 or 8."""
    for name, ids in (WRITTEN if step == 5 else CHANGED).items():
        fill(store, name, ids, step)
    scalars = tuple(tuple(np.full_like(value, step) for value in rows.scalars) for rows in store.groups)
    store.catch_up(scalars, step)
    store.exchanged = step


def hold(store: jc.HostStore, slots, lookups) -> jc.CacheState:
    """A cache that holds the rows of `lookups`, by table their ids and how often each was looked up, from slot 0 on."""
    cache = empty_cache(store, slots)
    groups = []
    for rows, state in zip(store.groups, cache.groups, strict=True):
        places = [(i, name) for i, name in enumerate(rows.group.names) if name in lookups]
        keys = [rows.group.keys(i, np.array(list(lookups[name]), np.int64)) for i, name in places]
        counts = [count for _, name in places for count in lookups[name].values()]
        if places:
            state = bring_in(state, rows, np.concatenate(keys), cache.backends)
        padded = np.array(counts + [0] * (state.slots - len(counts)), np.int32)
        groups.append(dataclasses.replace(state, counts=jnp.asarray(padded)))
    return dataclasses.replace(cache, groups=tuple(groups))


class Loader:
    """A loader at its end, that can tell where it is."""

    def __iter__(self):
        return self

    def __next__(self):
        raise StopIteration

    def get_state(self) -> bytes:
        return LOADER_STATE


def write(folder: Path) -> Path:
    """Writes a checkpoint of step 8 that goes on from one of step 5, with rows in a cache and the state of a loader."""
    store = make_store()
    for step in (5, 8):
        train(store, step)
        slots = dict(zip(("item", "word", "page"), SLOTS, strict=True))
        with jc.LookAhead(
            store, Loader(), ids=dict, slots=slots, features={"last": jc.Feature("item", "sum")}
        ) as ahead:
            cache = ahead.start(hold(store, SLOTS, HELD))
            tables = folder / str(step) / "tables"
            save = jc.Checkpoint(store, cache, ahead=ahead, incremental=True).begin_save(tables)
        tables.mkdir(parents=True)
        save(tables)
    return tables.parent


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        made = write(Path(folder))
        shutil.rmtree(FIXTURE, ignore_errors=True)
        shutil.copytree(made / "tables", FIXTURE)
