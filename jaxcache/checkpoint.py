"""`Checkpoint`: host tables and what a cache holds, for Orbax to save and to restore."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache import kernels
from jaxcache.chunks import bring_in
from jaxcache.ondemand import parse_group_slots
from jaxcache.pipeline import LookAhead
from jaxcache.saved_tables import (
    FORMAT,
    SavedTables,
    describe_scalars,
    describe_tables,
    encode_loader_state,
    find_base,
    write_tables,
)
from jaxcache.state import CacheState, empty_cache, slot_keys
from jaxcache.store import HostStore


@dataclass(frozen=True)
class SaveFigures:
    """What a save did.

    Attributes:
        step: updates done before it.
        incremental: whether it wrote the rows alone that changed since the checkpoint before.
        rows: rows written.
        rows_bytes: their bytes.
        pause_seconds: how long the caller of `save` was held up; a flush before it aside.
        write_seconds: how long the files took, beside the training.
        copied_bytes: rows that were copied because training overwrote them before they were in a file.
    """

    step: int
    incremental: bool
    rows: int
    rows_bytes: int
    pause_seconds: float
    write_seconds: float
    copied_bytes: int


class Checkpoint:
    """A store's tables, with optimizer state, and which rows a cache holds: what Orbax calls a stateful checkpointable.

    Saving is asynchronous where the caller's Orbax call is: what is saved is the store as it was at the call, whatever
    is trained meanwhile. Rows that training overwrites before they are saved are copied first, into a file without a
    name beside the checkpoints. Rows that were never written are not saved. Restoring replaces everything that the
    store holds, once all of it was read and is sound.

    Args:
        store: the tables; to be saved, flushed.
        cache: the newest cache, which is not donated. With it, which rows it holds is saved too, with their counts.
        ahead: the pipeline, where there is one: the state of its loader is saved, and its features are described.
        incremental: saves the rows alone that changed since the newest checkpoint that this process saved or restored
            and that lies beside the new one. The files of that one get a second name in the new one, so that each can
            be deleted or restored without the other. Where there is none, all rows are saved.

    Attributes:
        store: the tables.
        figures: `SaveFigures` of the latest save that is done, or None.
        loader_state: after a restore, the state of the loader after the batch trained last; None if there is none.

    Raises:
        TypeError: for something else than a `HostStore`, a `CacheState` and a `LookAhead`.
        ValueError: for a `LookAhead` of another store.

    >>> import optax, tempfile
    >>> from orbax.checkpoint import v1 as ocp
    >>> from jaxcache import HostStore, Table
    >>> store = HostStore({"item": Table(1000, 2)}, optimizer=optax.adam(0.1))
    >>> store.load("item", np.ones((1000, 2), np.float32))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with ocp.training.Checkpointer(folder) as checkpointer:
    ...         _ = checkpointer.save_checkpointables(7, dict(tables=Checkpoint(store)))
    ...         other = HostStore({"item": Table(1000, 2)}, optimizer=optax.adam(0.1))
    ...         _ = checkpointer.load_checkpointables(7, dict(tables=Checkpoint(other)))
    >>> other.rows("item", [999]).tolist()
    [[1.0, 1.0]]
    """

    def __init__(
        self,
        store: HostStore,
        cache: CacheState | None = None,
        *,
        ahead: LookAhead | None = None,
        incremental: bool = False,
    ):
        for name, value, kind in (
            ("store", store, HostStore),
            ("cache", cache, CacheState),
            ("ahead", ahead, LookAhead),
        ):
            if not isinstance(value, kind) and (value is not None or name == "store"):
                raise TypeError(f"Checkpoint({name}=...) needs a {kind.__name__}, got {type(value).__name__}")
        if ahead is not None and ahead.store is not store:
            raise ValueError(
                "Checkpoint(store, ahead=...) got a LookAhead of another store: give the store that it has"
            )
        self.store, self._cache, self._ahead, self._incremental = store, cache, ahead, bool(incremental)
        self.figures: SaveFigures | None = None
        self.loader_state: Any = None
        self._restored: SavedTables | None = None

    # What Orbax calls

    async def save(self, directory: Any) -> Awaitable[None]:
        """Takes a snapshot of the store. The result writes it. Raises as `begin_save`."""
        write = self.begin_save(directory.path)

        async def finish() -> None:
            folder = await directory.await_creation()
            await asyncio.to_thread(write, folder)

        return finish()

    async def load(self, directory: Any) -> Awaitable[None]:
        """Reads the checkpoint. The result replaces what the store holds. Raises as `restore`."""
        # All that may fail is done here: Orbax hides what the result raises behind an error of its own about handlers,
        # and asks for the result once everything else that is loaded with the tables was found.
        return _Later(await asyncio.to_thread(self._read, directory))

    # What it does

    def begin_save(self, folder: Any) -> Callable[[Any], None]:
        """Takes a snapshot of the store as it is.

        Args:
            folder: that of the tables in the checkpoint to be; it need not exist.

        Returns:
            What writes the snapshot, once, on any thread. It is given the folder, which exists by then, and raises
            OSError if there is no room or a file cannot be written.

        Raises:
            RuntimeError: if a cache holds newer rows than the store, or `cache` is not the newest.
            TypeError: if the state of the loader is not made of dicts, lists, tuples, numbers, strings and bytes.
        """
        started = time.perf_counter()
        store, cache, ahead = self.store, self._cache, self._ahead
        store.refuse_behind("saved")
        if cache is not None:
            _check_newest(cache, store)
        description: dict[str, Any] = {
            "format": FORMAT,
            "step": store.step,
            "seed": store.seed,
            "tables": describe_tables(store.groups),
            "scalars": describe_scalars(store.groups),
            "slots": None if cache is None else list(cache.slots),
            "features": None
            if ahead is None
            else {name: dataclasses.asdict(feature) for name, feature in ahead.features.items()},
            "loader_state": None if ahead is None else encode_loader_state(ahead.loader_state),
        }
        held = {} if cache is None else _held_rows(cache)
        base = find_base(folder, store.groups) if self._incremental else None
        since, mark = None if base is None else base.mark, uuid.uuid4().hex
        root = folder.parent.parent  # of all checkpoints
        copies = root if os.path.isdir(root) else tempfile.gettempdir()
        snapshots = [(rows, rows.snapshot(mark, since, copies)) for rows in store.groups]
        pause = time.perf_counter() - started

        def write(folder: Any) -> None:
            started = time.perf_counter()
            try:
                figures = write_tables(folder, description, mark, base, snapshots, held)
            finally:
                for _, snapshot in snapshots:
                    snapshot.close()
            self.figures = SaveFigures(
                step=description["step"],
                incremental=base is not None,
                pause_seconds=pause,
                write_seconds=time.perf_counter() - started,
                copied_bytes=sum(snapshot.copied_bytes for _, snapshot in snapshots),
                **figures,
            )

        return write

    def restore(self, folder: Any) -> None:
        """Replaces everything that the store holds by the tables of a checkpoint, and forgets caches of it.

        Args:
            folder: that of the tables, or the one of a step in which it lies.

        Raises:
            FileNotFoundError: if there is no checkpoint.
            OSError: if a file of it is missing or damaged.
            ValueError: if it is damaged, of a format that is not known, or not one of these tables.
            RuntimeError: while a pipeline has the store open, or while it is being saved.

        Nothing has changed when one of these is raised.
        """
        self._read(folder)()

    def _read(self, folder: Any) -> Callable[[], None]:
        """Reads everything; what it returns replaces what the store holds."""
        store, saved = self.store, SavedTables(folder)
        store.refuse_restore()  # before everything is read
        saved.check_fits(store)
        groups, loader_state = [saved.read_group(rows) for rows in store.groups], saved.loader_state

        def replace() -> None:
            store.restore(groups, saved.step, saved.mark)
            self.loader_state, self._restored = loader_state, saved

        return replace

    def cache(
        self,
        slots: int | str | Sequence[int] | Mapping[str, int | str] | None = None,
        *,
        backends: str | Mapping[str, str] | kernels.Choice | None = None,
    ) -> CacheState:
        """After a restore, a cache that holds rows which the saved one held, for `LookAhead.start` or `jc.on_demand`.

        It is filled from the store as that is now.

        Args:
            slots: as for `jc.init`; by default as many as were saved. If they are fewer than the rows that the saved
                cache held, those that were looked up most while they were in it.
            backends: as for `LookAhead`.

        Returns:
            A `CacheState` on the default device, empty if no cache was saved.

        Raises:
            RuntimeError: before `restore`, or if another cache holds newer rows than the store.
            ValueError: for slots that are no such number, or none where no cache was saved.
        """
        if self._restored is None:
            raise RuntimeError(
                "cache() is for after a restore, checkpointer.load_checkpointables(step, dict(tables=checkpoint))"
            )
        store, saved = self.store, self._restored
        store.refuse_behind("read")
        slots = saved.slots if slots is None else slots
        if slots is None:
            raise ValueError(f"no cache was saved in {saved.path}: give a number of slots, or start() with none")
        cache = empty_cache(store, parse_group_slots(store, slots), backends=backends)
        groups = []
        for rows, state in zip(store.groups, cache.groups, strict=True):
            keys, counts = saved.held(rows.group, state.slots)
            state = bring_in(state, rows, keys, cache.backends)
            padded_counts = np.zeros(state.slots, np.int32)
            padded_counts[: len(counts)] = counts
            groups.append(dataclasses.replace(state, counts=jnp.asarray(padded_counts)))
        store.loaded = False
        return dataclasses.replace(cache, groups=tuple(groups))


class _Later:
    """Calls a function once it is awaited. Unlike a coroutine it may as well never be."""

    def __init__(self, function: Callable[[], None]):
        self._function = function

    def __await__(self) -> Generator[Any, None, None]:
        self._function()
        yield from ()


def _check_newest(cache: CacheState, store: HostStore) -> None:
    """Raises ValueError or RuntimeError unless `cache` is that of the store, as it was flushed last."""
    if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(cache)):
        raise RuntimeError("Checkpoint got a cache that was donated to an earlier call: give the newest one")
    found = [(state.group, state.optimizer) for state in cache.groups]
    if found != [(rows.group, rows.optimizer) for rows in store.groups]:
        raise ValueError("Checkpoint got a cache of another store: its tables are not those of this one")
    if int(cache.step) != store.step:
        raise RuntimeError(
            f"Checkpoint got a cache of step {int(cache.step)}, and the store was flushed at step {store.step}: give "
            "the one that flush returned, `cache = ahead.flush(cache)`"
        )


def _held_rows(cache: CacheState) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each table, the ids `int64[N]`, slots `int32[N]` and counts `int32[N]` of the rows in the cache."""
    held = {}
    for state in cache.groups:
        slots, keys = slot_keys(state.group, np.array(state.slot_table))
        tables, ids = state.group.locate(keys)
        counts = np.array(state.counts)[slots]
        for number, name in enumerate(state.group.names):
            here = np.flatnonzero(tables == number)
            held[name] = (ids[here], slots[here].astype(np.int32), counts[here].astype(np.int32))
    return held
