"""The look-ahead pipeline: draws batches, plans them ahead, brings missed rows in and takes victims home."""

from __future__ import annotations

import copy as copying
import dataclasses
import functools
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache import kernels
from jaxcache.batches import Batch, Shapes, padded
from jaxcache.optimizers import Rows
from jaxcache.planner import LookAheadPlanner, PlannedBatch, Planner, ResidentPlanner
from jaxcache.report import Report, Stage
from jaxcache.state import (
    CacheState,
    Exchange,
    Plan,
    Receipt,
    apply_exchange,
    init,
    slot_entries,
    slot_keys,
)
from jaxcache.store import HostStore

_READY_BATCHES = 2  # planned batches whose rows wait on the device
_RETURNING_BATCHES = 3  # exchanges whose victims are on their way home
_REMEMBERED_BATCHES = 16  # more than the batches between a plan and the landing of its victims
_SIZE_CLASSES = 8  # of an exchange, each half the one above, down to
_SMALLEST_EXCHANGE = 64  # rows
_CHUNK_ROWS = 65_536  # rows moved at a time by `flush` and when every row is brought in
_POLL_SECONDS = 0.05  # how often a waiting main thread looks for Ctrl-C


class _Closed(Exception):
    """The channel was closed: its stages end."""


_END = object()


class _Channel:
    """A bounded queue between two stages that counts how long each side waited and can be closed under both."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._items: deque = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, item: Any, stage: Stage) -> None:
        with self._changed:
            if len(self._items) >= self._capacity:
                with stage.waiting():
                    self._changed.wait_for(lambda: self._closed or len(self._items) < self._capacity)
            if self._closed:
                raise _Closed
            self._items.append(item)
            self._changed.notify_all()

    def get(self, stage: Stage, poll: Callable[[], None] | None = None) -> Any:
        with self._changed:
            if not self._items and not self._closed:
                with stage.waiting():
                    while not self._items and not self._closed:
                        self._changed.wait(_POLL_SECONDS if poll else None)
                        if poll:
                            poll()
            if self._closed:
                raise _Closed
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def get_rest(self) -> Any:
        """Takes an item without waiting, closed or not."""
        return self._items.popleft()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


@dataclass(frozen=True)
class _Ready:
    """A batch whose plan and missed rows are on the device."""

    batch: Batch
    content: Any
    plan: Plan
    exchange: Exchange
    planned: PlannedBatch
    lookup_hits: int
    unique_bound: int
    growths: int


class LookAhead:
    """Trains with rows that are on the device before their step starts, because the batches are known ahead.

    Iterating yields `(batch, plan)`. For each, `cache = ahead.exchange(cache, plan)` comes before the step, which calls
    `lookup(cache, plan)` and `update(cache, plan, row_gradients)`; and before the store is read,
    `cache = ahead.flush(cache)`. Threads draw, plan, collect and send the batches ahead and carry victims home.
    The stages are ScratchPipe's (Kwon & Rhu, ISCA 2022, section IV): plan, collect, exchange, insert, train.

    Inside `with`, on the main thread, Ctrl-C takes effect at the next `next()` or `exchange`, where the cache is in the
    caller's hands; a second one takes effect at once.

    Args:
        store: the tables. It serves one open pipeline at a time.
        loader: an iterable of batches, pytrees of arrays, drawn in a thread of its own. About `window` + 6 of them are
            held by reference: NumPy arrays in them must not be written again unless `copy` is set. Those that were
            drawn and not trained when the loop is left are dropped.
        ids: maps a batch to its ids: a mapping of feature names, here names of tables, to integer arrays `[B, ...]`,
            the same features in every batch and B the same for all features.
        slots: capacity of the cache in rows, or as a share of all rows such as "1.5%". It must hold the unique rows of
            any one batch. With as many slots as rows ("100%") every row is brought in at the start and stays.
        window: batches that a plan looks at, from its own on. A row that they want is not evicted; where capacity is
            short, the one wanted last goes first.
        copy: copies the NumPy arrays of each batch as it is drawn, for loaders that reuse theirs.

    Raises:
        ValueError: if `slots` or `window` is out of range.

    >>> import optax
    >>> from jaxcache import HostStore, Table, lookup, update
    >>> store = HostStore({"user": Table(100, 2)}, optimizer=optax.sgd(0.5))
    >>> batches = [{"user": np.array([i, i + 1])} for i in range(3)]
    >>> with LookAhead(store, batches, ids=lambda batch: batch, slots=2) as ahead:
    ...     cache = ahead.start()
    ...     for batch, plan in ahead:
    ...         cache = ahead.exchange(cache, plan)
    ...         rows = lookup(cache, plan)
    ...         cache = update(cache, plan, rows)  # the gradient of half the sum of squares
    ...     cache = ahead.flush(cache)
    >>> ahead.report().rows_fetched, store.step
    (4, 3)
    """

    def __init__(
        self,
        store: HostStore,
        loader: Iterable[Any],
        ids: Callable[[Any], Mapping[str, Any]],
        slots: int | str,
        window: int = 8,
        copy: bool = False,
    ):
        if isinstance(window, bool) or not isinstance(window, int | np.integer) or window < 1:
            raise ValueError(f"LookAhead(window={window!r}): window must be a number of batches, at least 1")
        if not isinstance(store, HostStore):
            raise TypeError(f"LookAhead(store=...) needs a HostStore, got {type(store).__name__}")
        if not isinstance(loader, Iterable):
            raise TypeError(f"LookAhead(loader=...) needs an iterable of batches, got {type(loader).__name__}")
        if not callable(ids):
            raise TypeError('LookAhead(ids=...) needs a function of a batch, such as lambda batch: batch["ids"]')
        self._store, self._loader, self._ids, self._copy = store, loader, ids, copy
        self._slots, self._window = _parse_slots(slots, store.group.rows), int(window)
        self._resident = self._slots == store.group.rows
        self._report = Report(
            row_bytes=store.row_bytes, slots=self._slots, table_bytes=store.table_bytes, window=self._window
        )
        self._stages = self._report.stages
        self._shapes, self._evaluation_shapes = Shapes(self._slots), Shapes(0)
        self._programs: dict[int, Any] = {}
        self._drawn, self._planned = _Channel(1), _Channel(1)
        self._ready, self._returning = _Channel(_READY_BATCHES), _Channel(_RETURNING_BATCHES + 1)
        self._threads: list[threading.Thread] = []
        self._progress = threading.Condition()  # guards what follows
        self._exchanged = self._landed = 0
        self._error: BaseException | None = None
        self._write_error: BaseException | None = None
        self._write_error_seen = False
        self._landing: tuple[PlannedBatch, Receipt] | None = None
        self._started = self._entered = self._left = False
        self._first_step = 0
        self._current: _Ready | None = None
        self._flushed_before_update = False
        self._number = 0
        self._handed_over: float | None = None
        self._interrupted = False
        self._previous_handler: Any = None

    # Life

    def __enter__(self) -> LookAhead:
        if self._entered:
            raise RuntimeError("this LookAhead was used already: make a new one for another pass")
        self._store.open(self)
        self._entered = True
        on_main = threading.current_thread() is threading.main_thread()
        # A program that handles Ctrl-C in its own way keeps its handler.
        if on_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._previous_handler = signal.signal(signal.SIGINT, self._on_interrupt)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self._count_step()
            for channel in (self._drawn, self._planned, self._ready):
                channel.close()
            with self._progress:
                self._left = True
                self._progress.notify_all()
                self._progress.wait_for(lambda: self._landed >= self._exchanged or self._write_error is not None)
            self._returning.close()
            for thread in self._threads:
                # The loader's thread may sit in the user's own next(); it is a daemon and ends with it.
                thread.join(timeout=0.2 if thread.name.endswith("loader") else None)
        finally:
            # Also if an impatient second Ctrl-C came in between.
            self._returning.close()
            self._store.close(self)
            if self._previous_handler is not None:
                signal.signal(signal.SIGINT, self._previous_handler)
        if error is None:
            if not self._write_error_seen:
                self._raise_write_error()
            self._raise_if_interrupted()
        elif self._write_error is not None and error is not self._write_error:
            error.add_note(f"besides, rows could not be written back: {self._write_error!r}")

    def _on_interrupt(self, number, frame) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True

    def _raise_if_interrupted(self) -> None:
        if self._interrupted:
            self._interrupted = False
            raise KeyboardInterrupt

    def start(self, cache: CacheState | None = None) -> CacheState:
        """Starts to draw and plan, and returns the cache to train with.

        Args:
            cache: a cache of this store to go on with, from an earlier pipeline of as many slots; by default an empty
                one is made.

        Returns:
            A `CacheState` on the default device.

        Raises:
            RuntimeError: outside `with`, at the second call, or if a cache that was not flushed holds newer rows than
                the store.
            ValueError: if `cache` is of another configuration, or older than the store.
        """
        if not self._entered or self._left:
            raise RuntimeError("call start() inside the block: `with LookAhead(...) as ahead: cache = ahead.start()`")
        if self._started:
            raise RuntimeError("start() was called already: train on with the cache that you have")
        if self._store.unwritten is not None:
            raise RuntimeError(
                "victims of an earlier pipeline could not be written home: call flush on that one, which tries again"
            ) from self._store.unwritten
        if cache is None:
            if self._store.behind:
                raise RuntimeError(
                    "a cache that was never flushed holds newer rows than the store: "
                    "go on with it, ahead.start(cache), or flush it first"
                )
            cache = init(self._store, self._slots)
        else:
            cache = self._checked_warm(cache)
        self._first_step = self._store.exchanged = int(cache.step)
        self._device = next(iter(cache.step.devices()))
        self._report.device_bytes = cache.nbytes
        self._abstract_state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), cache)
        planner, cache = self._make_planner(cache)
        self._started = True
        for name, work in (
            ("loader", self._draw_batches),
            ("plan", lambda: self._plan_batches(planner)),
            ("collect", self._collect_rows),
            ("write-back", self._write_back),
        ):
            thread = threading.Thread(target=self._run_stage, args=(work, name), name=f"jaxcache-{name}", daemon=True)
            self._threads.append(thread)
            thread.start()
        return cache

    def _checked_warm(self, cache: CacheState) -> CacheState:
        self._check_cache(cache, "start")
        if int(cache.fault) != CacheState.NO_FAULT:
            raise ValueError("the cache given to start() met a fault in its last pipeline: its steps are not sound")
        step, newest = int(cache.step), self._store.exchanged
        if int(cache.exchanged) != newest:
            raise ValueError(
                f"the cache given to start() is of step {step} and the newest one of step {newest}: give that one, or, "
                "if it was flushed, start() with none"
            )
        # A loop that was left between exchange and update has an exchange too many.
        return dataclasses.replace(cache, exchanged=jnp.array(step, jnp.int32))

    def _make_planner(self, cache: CacheState) -> tuple[Planner, CacheState]:
        """The planner, and the cache with every row in it if all of them fit."""
        occupied, keys = slot_keys(self._store.group, np.array(cache.slot_table))
        if self._resident:
            if len(keys) == 0:
                cache = self._bring_in_every_row(cache)
            elif len(keys) != self._slots or not (keys == occupied).all():
                raise ValueError("start(cache) with every row on the device needs a cache from such a run")
            return ResidentPlanner(self._store.group), cache
        # The rows looked up least come first in the order of eviction.
        order = np.argsort(np.array(cache.counts)[occupied], kind="stable")
        if len(keys) and occupied[-1] != len(keys) - 1:
            raise ValueError("the slots in use must be the first ones: the cache given to start() is damaged")
        planner = LookAheadPlanner(
            self._store.group,
            self._slots,
            self._window,
            memory=_REMEMBERED_BATCHES,
            resident=(keys[order], occupied[order]),
        )
        return planner, cache

    def _bring_in_every_row(self, cache: CacheState) -> CacheState:
        size = min(_CHUNK_ROWS, self._slots)
        insert = self._exchange_program(size)
        for first in range(0, self._slots, size):
            keys = np.arange(first, min(first + size, self._slots), dtype=np.int64)
            exchange = self._exchange(keys, keys.astype(np.int32), size, self._first_step)
            cache, _ = insert(cache, jax.tree.map(jnp.asarray, exchange))
            cache = dataclasses.replace(cache, exchanged=jnp.array(self._first_step, jnp.int32))
        return cache

    # The caller's side

    def __iter__(self) -> Iterator[tuple[Any, Plan]]:
        return self

    def __next__(self) -> tuple[Any, Plan]:
        self._count_step()
        self._require_running("next()")
        if self._flushed_before_update:
            # The loop was not left after that flush, so the update that was still to come has been made since.
            self._flushed_before_update = False
            self._store.mark_behind()
        self._raise_if_interrupted()
        if self._current is not None:
            raise RuntimeError(
                f"batch {self._number - 1} was not exchanged: the first line of the loop must be "
                "`cache = ahead.exchange(cache, plan)`"
            )
        self._raise_errors()
        try:
            ready = self._ready.get(self._stages["step"], poll=self._poll)
        except _Closed:
            self._raise_errors()
            raise
        if ready is _END:
            self._ready.put(_END, self._stages["step"])  # so that another next() ends as well
            raise StopIteration
        try:
            ready.batch.check_unchanged(self._number)
        except RuntimeError as error:
            self._error = error  # the batch is lost: none can follow it
            raise
        self._current = ready
        self._number += 1
        self._handed_over = time.perf_counter()
        return ready.content, ready.plan

    def exchange(self, cache: CacheState, plan: Plan) -> CacheState:
        """Brings the missed rows of a batch into the cache and takes victims out; both go on while Python goes on.

        Args:
            cache: the cache after the step before. It is donated.
            plan: the plan that was yielded last.

        Returns:
            The cache that the batch's step needs.

        Raises:
            RuntimeError: for another plan than the one yielded last, at the second call for it, for a cache that was
                donated; and, for a mistake of an earlier step that only the device could see (a stale cache, no
                `update`), a few steps later.
            Exception: what an earlier write-back raised.
        """
        self._require_running("exchange")
        self._raise_if_interrupted()
        self._check_cache(cache, "exchange")
        ready = self._current
        if ready is None:
            raise RuntimeError(
                "exchange was called twice for one batch, or before the first: call it once, first thing in the loop"
            )
        if plan is not ready.plan:
            raise RuntimeError(
                "exchange got the plan of another batch: give the very object that was yielded last, with batch "
                f"{self._number - 1}"
            )
        self._wait_for_landing()
        state, receipt = self._programs[len(ready.exchange.slots)](cache, ready.exchange)
        self._current = None
        self._store.mark_behind()
        # In this order: if a signal handler of the caller raises between the two, nobody waits for what never comes.
        self._returning.put((ready.planned, receipt), self._stages["step"])
        with self._progress:
            self._exchanged += 1
        self._count_exchange(ready)
        return state

    def _wait_for_landing(self) -> None:
        """Waits while as many exchanges are under way as may be: the device, or the write-back, is behind."""
        started, written = time.perf_counter(), self._stages["write-back"].busy
        with self._progress:
            while self._exchanged - self._landed >= _RETURNING_BATCHES and self._write_error is None:
                self._progress.wait(_POLL_SECONDS)
                self._raise_if_interrupted()
            self._raise_write_error()
        # While victims are being written the step waits for them; the rest of the time the device is at work.
        waited = min(time.perf_counter() - started, self._stages["write-back"].busy - written)
        self._stages["step"].wait += waited
        if self._handed_over is not None:
            self._handed_over += waited

    def flush(self, cache: CacheState) -> CacheState:
        """Writes every row that is newer in the cache home to the store; residency and the plans ahead stay.

        May be called between any two steps, and after the `with` block. Between a batch's exchange and its update it
        saves the rows as they are before that update. Victims whose write-back failed are written again first.

        Args:
            cache: the newest cache. It is not donated.

        Returns:
            The same cache with nothing dirty.

        Raises:
            RuntimeError: if the cache is not the newest, or for a mistake in an earlier step that only the device saw.
            Exception: what a write-back raised, if it fails once more.
        """
        if not self._started:
            raise RuntimeError("flush needs a started pipeline: call it after `cache = ahead.start()`")
        self._check_cache(cache, "flush")
        if self._left:
            self._store.open(self)  # raises if another pipeline has the store now
        try:
            with self._progress:
                self._progress.wait_for(lambda: self._landed >= self._exchanged or self._write_error is not None)
            if self._store.unwritten is not None:
                self._write_again()
            faulty = self._write_error if isinstance(self._write_error, _FaultError) else None
            newest, found = self._store.exchanged, int(cache.exchanged)
            if found != newest:
                if faulty is not None:
                    self._raise_write_error()
                raise RuntimeError(
                    f"flush got a stale cache, of step {found}; the newest is of step {newest}: assign what exchange "
                    "and the train step return, `cache = ...`, and flush that"
                )
            # A cache that met a fault has kept its last good rows: they are saved before the fault is raised.
            self._write_dirty_rows(cache)
            self._flushed_before_update = int(cache.step) < found
            fault = int(cache.fault)
            if faulty is None and fault != CacheState.NO_FAULT:
                faulty = _FaultError(_explain_fault(fault, int(cache.step), found, newest))
            if faulty is not None:
                self._write_error_seen = True
                raise faulty
        finally:
            if self._left:
                self._store.close(self)
        return dataclasses.replace(cache, dirty=jnp.zeros(cache.slots, bool))

    def _write_again(self) -> None:
        """Writes home the victims whose write-back failed, and those behind them; raises what still prevents it."""
        while self._landed < self._exchanged:
            self._landing = self._landing or self._returning.get_rest()
            self._land(*self._landing)
            self._landing = None
        self._store.unwritten, self._write_error_seen = None, True

    def _write_dirty_rows(self, cache: CacheState) -> None:
        dirty = np.flatnonzero(np.array(cache.dirty))
        occupied, keys = slot_keys(self._store.group, np.array(cache.slot_table))
        key_of = np.zeros(cache.slots, np.int64)
        key_of[occupied] = keys
        size = min(_CHUNK_ROWS, cache.slots)
        for first in range(0, len(dirty), size):
            slots = dirty[first : first + size]
            rows = _read_rows(cache.buffer, padded(slots.astype(np.int32), size, cache.slots))
            self._store.write(key_of[slots], jax.tree.map(np.asarray, rows))
        self._report.rows_flushed += len(dirty)
        self._store.catch_up(tuple(np.array(scalar) for scalar in cache.scalars), int(cache.step))

    def evaluate(
        self, loader: Iterable[Any], cache: CacheState, eval_step: Callable[[CacheState, Plan, Any], Any]
    ) -> tuple[CacheState, list[Any]]:
        """Evaluates between two training steps, without touching what is planned for training.

        The cache is flushed, and the rows of each evaluation batch are read from the store into a buffer of their own.

        Args:
            loader: an iterable of batches, such as `LookAhead` was given, drawn in the caller's thread.
            cache: the newest cache.
            eval_step: called with `(view, plan, batch)` for each batch, jitted or not; `lookup(view, plan)` gives the
                rows. A short batch is padded: see `Plan.mask`.

        Returns:
            The flushed cache, and the list of what `eval_step` returned.
        """
        cache = self.flush(cache)
        group, shapes, outputs = self._store.group, self._evaluation_shapes, []
        for number, content in enumerate(loader):
            self._raise_if_interrupted()
            batch = Batch.read(content, self._ids, group, hold=False)
            keys = [group.keys(table, ids) for table, ids in zip(batch.tables, batch.ids, strict=True)]
            unique, inverse, occurrences = np.unique(np.concatenate(keys), return_inverse=True, return_counts=True)
            shapes.fit(batch, len(unique))
            bound = shapes.unique_bound
            plan = shapes.plan(
                batch, inverse.astype(np.int32), occurrences.astype(np.int32),
                np.arange(bound, dtype=np.int32), number,
            )  # fmt: skip
            view = CacheState(
                buffer=Rows(self._store.read(unique, bound).weights, ()),
                slot_table=padded(slot_entries(group, unique), bound, CacheState.FREE),
                counts=np.zeros(bound, np.int32),
                dirty=np.zeros(bound, bool),
                scalars=(),
                hyperparameters=(),
                step=np.array(number, np.int32),
                exchanged=np.array(number + 1, np.int32),
                fault=np.array(CacheState.NO_FAULT, np.int32),
                group=group,
                optimizer=self._store.optimizer,
            )
            view, plan = jax.tree.map(jnp.asarray, (view, plan))
            outputs.append(eval_step(view, plan, shapes.pad(batch)))
        return cache, outputs

    def report(self) -> Report:
        """The figures so far, as a copy."""
        return copying.deepcopy(self._report)

    def _count_step(self) -> None:
        if self._handed_over is not None:
            self._stages["step"].busy += time.perf_counter() - self._handed_over
            self._handed_over = None

    def _count_exchange(self, ready: _Ready) -> None:
        report, planned = self._report, ready.planned
        report.steps += 1
        report.lookups += len(planned.inverse)
        report.unique_rows += len(planned.unique_slots)
        report.lookup_hits += ready.lookup_hits
        report.rows_fetched += len(planned.fetched)
        report.rows_written_back += len(planned.victims)
        report.unique_bound, report.bound_growths = ready.unique_bound, ready.growths

    def _require_running(self, what: str) -> None:
        if self._left or not self._started:
            raise RuntimeError(
                f"{what} works inside the block, after start(): "
                "`with LookAhead(...) as ahead: cache = ahead.start()` comes first"
            )

    def _check_cache(self, cache: CacheState, where: str) -> None:
        if not isinstance(cache, CacheState):
            raise TypeError(
                f"{where} needs the CacheState that start(), exchange or update returned, got {type(cache)}"
            )
        if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(cache)):
            raise RuntimeError(
                f"{where} got a cache that was donated to an earlier call: assign the newest one, "
                "`cache = ahead.exchange(cache, plan)` and `cache, ... = train_step(cache, ...)`"
            )
        if (cache.group, cache.optimizer, cache.slots) != (self._store.group, self._store.optimizer, self._slots):
            raise ValueError(
                f"{where} got a cache of another configuration: {cache.slots:,} slots for {cache.group.names} with "
                f"{cache.optimizer}; expected {self._slots:,} slots for {self._store.group.names} with "
                f"{self._store.optimizer}"
            )

    def _poll(self) -> None:
        self._raise_if_interrupted()
        self._raise_errors()

    def _raise_errors(self) -> None:
        self._raise_write_error()
        if self._error is not None:
            raise self._error

    def _raise_write_error(self) -> None:
        if self._write_error is not None:
            self._write_error_seen = True
            raise self._write_error

    # The stages, each in its thread

    def _run_stage(self, work: Callable[[], None], name: str) -> None:
        try:
            with jax.default_device(self._device):  # a thread has a default of its own
                work()
        except _Closed:
            pass
        except BaseException as error:
            if isinstance(error, StopIteration):  # raised in the caller's next() it would end the loop unseen
                error = RuntimeError("the loader or ids() raised StopIteration in the wrong place").with_traceback(
                    error.__traceback__
                )
            with self._progress:
                if name == "write-back":
                    self._write_error = error
                    self._store.unwritten = None if isinstance(error, _FaultError) else error
                elif self._error is None:
                    self._error = error
                self._progress.notify_all()
            for channel in (self._drawn, self._planned, self._ready):
                channel.close()

    def _draw_batches(self) -> None:
        stage = self._stages["loader"]
        with stage.working():
            iterator = iter(self._loader)
        while True:
            with stage.working():
                content = next(iterator, _END)
                if content is _END:
                    break
                batch = Batch.read(content, self._ids, self._store.group, self._copy)
            self._drawn.put(batch, stage)
        self._drawn.put(_END, stage)

    def _plan_batches(self, planner: Planner) -> None:
        stage = self._stages["plan"]
        batches: deque[Batch] = deque()
        number, ended = 0, False

        def observe_until(count: int) -> None:
            nonlocal ended
            while len(batches) < count and not ended:
                batch = self._drawn.get(stage)
                if batch is _END:
                    ended = True
                    break
                with stage.working():
                    planner.observe(batch.ids, batch.tables)
                batches.append(batch)

        while True:
            # The first step starts as soon as its own batch is planned, so the window opens by a batch a plan. A plan
            # that needs victims waits for all of it: which rows go depends on the batches alone, never on time.
            observe_until(min(self._window, number + 1))
            if not batches:
                break
            if planner.needs_window():
                observe_until(self._window)
            with stage.working():
                planned = planner.plan()
            self._planned.put((number, batches.popleft(), planned), stage)
            number += 1
        self._planned.put(_END, stage)

    def _collect_rows(self) -> None:
        collect, send = self._stages["collect"], self._stages["send"]
        while (item := self._planned.get(collect)) is not _END:
            number, batch, planned = item
            self._wait_for_write_back(max(planned.wait_for, number - _REMEMBERED_BATCHES), collect)
            with collect.working():
                self._shapes.fit(batch, len(planned.unique_slots))
                size = self._size_class(len(planned.fetched))
                step = self._first_step + number
                exchange = self._exchange(planned.fetched, planned.slots, size, step)
                plan = self._shapes.plan(batch, planned.inverse, planned.occurrences, planned.unique_slots, step)
                content = self._shapes.pad(batch)
            with send.working():
                # These arrays are fresh and never written again, so that a transfer without a copy is sound.
                plan, exchange = jax.device_put((plan, exchange))
            hits = len(planned.inverse) - int(planned.occurrences[planned.missed].sum())
            bound, growths = self._shapes.unique_bound, self._shapes.growths
            ready = _Ready(batch, content, plan, exchange, planned, hits, bound, growths)
            self._ready.put(ready, send)
        self._ready.put(_END, send)

    def _wait_for_write_back(self, number: int, stage: Stage) -> None:
        """Waits until the victims of batch `number` are home."""
        with self._progress:
            if self._landed <= number:
                with stage.waiting():
                    self._progress.wait_for(
                        lambda: self._landed > number or self._left or self._write_error is not None
                    )
            if self._landed <= number:
                raise _Closed

    def _size_class(self, rows: int) -> int:
        """The smallest size compiled for an exchange that holds `rows`; compiles all sizes when the bound is new."""
        bound = self._shapes.unique_bound
        smallest = min(bound, _SMALLEST_EXCHANGE)
        classes = 0 if self._resident else _SIZE_CLASSES
        sizes = sorted({smallest, *(max(-(-bound // 2**i), smallest) for i in range(classes))})
        for size in sizes:
            if size not in self._programs:
                self._programs[size] = self._exchange_program(size)
        return next(size for size in sizes if size >= rows)

    def _exchange_program(self, size: int) -> Any:
        abstract = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, self._exchange(_NO_KEYS, _NO_SLOTS, size, 0)))
        leaves, treedef = jax.tree.flatten((self._abstract_state, abstract))
        return _compile_exchange(treedef, tuple(leaves), self._device)

    def _exchange(self, fetched: np.ndarray, slots: np.ndarray, size: int, step: int) -> Exchange:
        return Exchange(
            slots=padded(slots, size, self._slots),
            slot_table=padded(slot_entries(self._store.group, fetched), size, CacheState.FREE),
            rows=self._store.read(fetched, size),
            step=np.array(step, np.int32),
        )

    def _write_back(self) -> None:
        stage = self._stages["write-back"]
        while True:
            self._landing = self._returning.get(stage)
            self._land(*self._landing)
            self._landing = None

    def _land(self, planned: PlannedBatch, receipt: Receipt) -> None:
        """Reads the receipt of an exchange and writes its victims home."""
        stage = self._stages["write-back"]
        with stage.waiting():
            fault, step, exchanged, accepted = np.asarray(receipt.record).tolist()
        if not accepted:
            raise _FaultError(_explain_fault(fault, step, exchanged, self._store.exchanged))
        with stage.working():
            if len(planned.victims):
                last = len(planned.fetched)
                part = slice(last - len(planned.victims), last)
                self._store.write(planned.victims, jax.tree.map(lambda leaf: np.asarray(leaf)[part], receipt.rows))
        with self._progress:
            self._landed += 1
            self._store.exchanged += 1
            self._progress.notify_all()


class _FaultError(RuntimeError):
    """A mistake in the caller's loop that only the device could see."""


def _explain_fault(fault: int, step: int, exchanged: int, expected: int) -> str:
    """What the caller did wrong: `step` and `exchanged` were found in the cache, `expected` exchanges were made."""
    if fault == CacheState.UPDATE_MISMATCH:
        return (
            f"update was called with a cache and a plan that do not belong together, at step {step}: give both "
            "`lookup` and `update` the cache that exchange returned and the plan that was yielded with the batch"
        )
    if exchanged == expected and step == expected - 1:
        return (
            f"step {step} has no update: end the train step with `cache = update(cache, plan, row_gradients)` and "
            "return that cache"
        )
    return (
        f"exchange got a stale cache, of step {step} with {exchanged} exchanges, instead of the one after step "
        f"{expected - 1}: assign what exchange and the train step return, `cache = ...`, and give that"
    )


def _parse_slots(slots: int | str, rows: int) -> int:
    """Number of slots from `LookAhead(slots=...)`, at most the number of rows."""
    try:
        if isinstance(slots, str) and slots.endswith("%"):
            share = float(slots[:-1])
            if not 0 < share <= 100:
                raise ValueError
            count = math.ceil(rows * share / 100)
        elif isinstance(slots, int | np.integer) and not isinstance(slots, bool) and slots > 0:
            count = int(slots)
        else:
            raise ValueError
    except ValueError:
        raise ValueError(
            f'LookAhead(slots={slots!r}): slots must be a positive number of rows or a share such as "1.5%"'
        ) from None
    count = min(count, rows)
    if count >= 2**31 - 1:
        raise ValueError(f"LookAhead(slots={slots!r}) asks for {count:,} slots: a cache holds fewer than 2**31 - 1")
    return count


@functools.lru_cache(maxsize=64)
def _compile_exchange(treedef: Any, leaves: tuple[jax.ShapeDtypeStruct, ...], device: jax.Device) -> Any:
    """The exchange compiled for a state and a size class; kept, so that an equal pipeline compiles nothing."""
    state, exchange = jax.tree.unflatten(treedef, leaves)
    with jax.default_device(device):
        return jax.jit(apply_exchange, donate_argnums=0).lower(state, exchange).compile()


_NO_KEYS, _NO_SLOTS = np.zeros(0, np.int64), np.zeros(0, np.int32)
_read_rows = jax.jit(kernels.read)
