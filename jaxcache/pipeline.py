"""The look-ahead pipeline: draws batches, plans them ahead, brings missed rows in and takes victims home."""

from __future__ import annotations

import contextlib
import copy as copying
import dataclasses
import functools
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache import kernels
from jaxcache.batches import Batch, Lookups, Shapes, doubled, fingerprint, padded, roomy
from jaxcache.blocks import Moves, TrainStep, block_lengths, block_program, check_stacked, content_kind, stack
from jaxcache.capacity import MEASURED_BATCHES, Capacity
from jaxcache.chunks import bring_in, cleaned, write_dirty_rows
from jaxcache.features import Feature, FeatureLayout, Features
from jaxcache.index import ABSENT
from jaxcache.interrupts import Interrupts
from jaxcache.optimizers import Rows
from jaxcache.planner import (
    REMEMBERED_BATCHES,
    LookAheadPlanner,
    Observed,
    PlannedBatch,
    Planner,
    ResidentPlanner,
    Window,
    Workers,
)
from jaxcache.policies import Policy, lookahead
from jaxcache.report import GroupReport, Report, Stage
from jaxcache.state import (
    CacheState,
    Counters,
    GroupCache,
    GroupExchange,
    Plan,
    count_exchange,
    empty_cache,
    exchange_group,
    slot_entries,
    slot_keys,
)
from jaxcache.store import HostStore, RowStore

_READY_BATCHES = 2  # planned batches, or blocks of them, whose rows wait on the device
_RETURNING_BATCHES = 3  # exchanges whose victims are on their way home
_SIZE_CLASSES = 8  # of an exchange, each half the one above, down to
_SMALLEST_EXCHANGE = 64  # rows
_BLOCKS_AHEAD = 3  # from the one that is being collected to the one whose victims are on their way home
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
class _Ahead:
    """A batch that was planned, in every group, looking at `window` batches, which a bound cut short if `limited`."""

    number: int
    batch: Batch
    observed: tuple[Observed, ...]
    planned: tuple[PlannedBatch, ...]
    wait_for: int  # the latest batch whose victims are among the rows that this one fetches, and are to come home
    window: int
    limited: bool

    @property
    def home_first(self) -> bool:
        """Whether the batch fetches rows that are among its own victims."""
        return self.wait_for == self.number


@dataclass(frozen=True)
class _Ready:
    """A batch whose plan and missed rows are on the device; `exchange` is None if its victims must be home first."""

    ahead: _Ahead
    content: Any
    plan: Any
    exchange: _Exchange | None
    lookup_hits: tuple[int, ...]
    unique_bounds: tuple[int, ...]
    growths: int


@dataclass(frozen=True)
class _Block:
    """As `_Ready` for the steps of a block, which themselves have no content, plan and exchange any more."""

    steps: tuple[_Ready, ...]
    content: Any
    plan: Any
    moves: Moves | None
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class _Exchange:
    """What the exchange of a batch needs on the device, and the programs that make it, of each group."""

    groups: tuple[GroupExchange, ...]
    step: Any
    programs: tuple[Any, ...]


@dataclass(frozen=True)
class _Returning:
    """Victims of a step, or of those of a block, on their way home.

    Attributes:
        planned: of each step and group.
        rows: of each group, what left the slots; that of each step where the rows that it fetched were.
        copies: the same on the host, where there are any.
        record: of each step.
    """

    planned: tuple[tuple[PlannedBatch, ...], ...]
    rows: tuple[Rows, ...]
    copies: tuple[Rows | None, ...]
    record: Any


@dataclass(frozen=True)
class _Expected:
    """A batch whose ids were given beforehand: enough to find out that the loader yields others."""

    features: tuple[FeatureLayout, ...]
    fingerprint: int
    nbytes = 0

    @classmethod
    def of(cls, batch: Batch) -> _Expected:
        arrays = [part.ids for part in batch.lookups]
        arrays += [part.places for part in batch.lookups if part.places is not None]
        # Which rows are looked up, and where: what they weigh, and in which bags they lie, changes no plan.
        return cls(tuple(part._replace(bags=None, weighted=False) for part in batch.features), fingerprint(arrays))


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
        loader: an iterable of batches, pytrees of arrays, drawn in a thread of its own. Those in the window and 8
            more are held by reference: NumPy arrays in them must not be written again unless `copy` is set. Those
            that were drawn and not trained when the loop is left are dropped.
        ids: maps a batch to its ids: a mapping of feature names to integer arrays `[B, ...]`, or to `Bags` of them,
            the same features in every batch and B the same for all features.
        slots: capacity of the cache in rows, or as a share of all rows such as "1.5%". It must hold the unique rows of
            any one batch. With as many slots as rows ("100%") every row is brought in at the start and stays. Where
            the tables are of several groups (dims, dtypes, optimizers), slots are split in proportion to the unique
            rows of each group in the first 8 batches, which `start` then draws; or a mapping gives the slots of each
            group, by the name of one of its tables.
        device_bytes: capacity of the cache in bytes on the device, such as "4GiB", instead of `slots`.
        features: by name, what the model looks up; the name of a table is its own feature where none is given.
        policy: which rows make room, by default `lookahead()`; see `jaxcache.policies`. It changes what is moved and
            never what is trained.
        window: for `lookahead()`, batches that a plan looks at, from its own on. A row that they want is evicted only
            where there is no other, and then the one that is wanted last. "auto" looks until the choice is exact, or
            until the batches ahead hold four times as many distinct rows as there are slots.
        max_window: most batches that "auto" holds ahead.
        max_window_bytes: most bytes of batches that "auto" holds ahead: their arrays, and 4 bytes a lookup.
        future: for `lookahead()`, the ids of all batches, each a mapping as `ids` returns it, in the order of the
            loader. The whole future is then the window, no policy can fetch fewer rows, and 4 bytes a lookup and 16
            bytes a unique row of each batch are held.
        threads: threads that deduplicate and probe a large batch; by default half of the CPUs, at most 16.
        copy: copies the NumPy arrays of each batch as it is drawn, for loaders that reuse theirs.
        backends: what gathers, updates and exchanges rows on the device, such as "xla" or "gather=mosaic"; see
            `jaxcache.kernels.choose`. By default the environment decides, and what is fastest on the device. Every
            one is right; in the last bits they may differ.
        loader_state: returns the position of the loader behind the batch that it yielded last, called in the loader's
            thread after each; for checkpoints. By default `get_state()` of the loader's iterator, where it has that,
            as Grain's have.

    Attributes:
        store: the tables.
        features: as given.

    Raises:
        ValueError: if `slots` or a bound is out of range, if `window` or `future` is given and the policy has a window
            of its own, or if the counts of the policy do not fit the tables.
        KeyError: for a feature of an unknown table.
        NotImplementedError: for a backend that does not run here.

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
        slots: int | str | Mapping[str, int | str] | None = None,
        policy: Policy | None = None,
        window: int | Literal["auto"] | None = None,
        max_window: int = 1024,
        max_window_bytes: int = 1 << 30,
        future: Iterable[Mapping[str, Any]] | None = None,
        threads: int | None = None,
        copy: bool = False,
        *,
        device_bytes: int | str | None = None,
        features: Mapping[str, Feature] | None = None,
        backends: str | Mapping[str, str] | kernels.Choice | None = None,
        loader_state: Callable[[], Any] | None = None,
    ):
        policy = lookahead() if policy is None else policy
        if not isinstance(policy, Policy):
            raise TypeError(f"LookAhead(policy=...) needs a policy such as lookahead(), got {type(policy).__name__}")
        if threads is None:
            threads = max(1, min((os.cpu_count() or 1) // 2, 16))
        if window not in (None, "auto") and not _is_positive(window):
            raise ValueError(f'LookAhead(window={window!r}): window must be a number of batches, at least 1, or "auto"')
        bounds = {"max_window": max_window, "max_window_bytes": max_window_bytes, "threads": threads}
        for name, value in bounds.items():
            if not _is_positive(value):
                raise ValueError(f"LookAhead({name}={value!r}): {name} must be an integer, at least 1")
        if policy.window is not None and not (window is None and future is None):
            raise ValueError(
                f"LookAhead(window=..., future=...) are for lookahead(); {policy.name}() looks at {policy.window} "
                "batches: leave them out"
            )
        if window is not None and future is not None:
            raise ValueError("LookAhead(window=..., future=...): the whole future is the window, leave window out")
        if not isinstance(store, HostStore):
            raise TypeError(f"LookAhead(store=...) needs a HostStore, got {type(store).__name__}")
        if future is not None and not isinstance(future, Iterable):
            raise TypeError(
                f"LookAhead(future=...) needs an iterable of the ids of each batch, got {type(future).__name__}"
            )
        if not isinstance(loader, Iterable):
            raise TypeError(f"LookAhead(loader=...) needs an iterable of batches, got {type(loader).__name__}")
        if not callable(ids):
            raise TypeError('LookAhead(ids=...) needs a function of a batch, such as lambda batch: batch["ids"]')
        if loader_state is not None and not callable(loader_state):
            raise TypeError("LookAhead(loader_state=...) needs a function without arguments")
        self.store, self._loader, self._ids, self._copy = store, loader, ids, copy
        self._get_loader_state = loader_state
        self._loader_states: deque[Any] = deque()  # behind batch `_loader_states_from`, and each that was drawn after
        self._loader_states_from = 0
        self._trained_state: Any = None  # that behind the batch trained last, as of the latest flush
        self._loader_opened = threading.Event()
        groups = [rows.group for rows in store.groups]
        self._features = Features(groups, features)
        self.features = dict(features or {})
        self._backends = backends
        empty = jax.eval_shape(lambda: empty_cache(store, [0] * len(groups), backends=backends))
        fixed_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(empty))
        row_bytes = [rows.row_bytes for rows in store.groups]
        self._capacity = Capacity.parse(groups, row_bytes, fixed_bytes, slots, device_bytes)
        self._policy, self._future, self._thread_number = policy, future, int(threads)
        for group in groups:
            policy.group_counts(group)
        self._window: Window = policy.window or ("all" if future is not None else window or "auto")
        self._max_window, self._max_window_bytes = int(max_window), int(max_window_bytes)
        self._report = Report(
            {rows.group.name: GroupReport(rows.group.names, rows.group.rows, rows.row_bytes) for rows in store.groups},
            policy=policy.name,
            window=self._window,
        )
        self._stages = self._report.stages
        self._slots: tuple[int, ...] = ()  # of each group, set by `start`
        self._first_batches: deque[Any] = deque()  # those that were drawn to find them
        self._programs: dict[tuple[int, int], Any] = {}  # exchanges by group and size
        self._read_programs: dict[tuple[int, int], Any] = {}  # reads of victims, for policies whose rows pass through
        self._row_bounds: dict[tuple[int, int], int] = {}  # rows that blocks bring, by group and length
        self._drawn, self._planned = _Channel(1), _Channel(1)
        self._ready, self._returning = _Channel(_READY_BATCHES), _Channel(_RETURNING_BATCHES + 1)
        self._threads: list[threading.Thread] = []
        self._progress = threading.Condition()  # guards what follows
        self._exchanged = self._landed = 0
        self._scanned = 0  # exchanges before those of the latest block
        self._error: BaseException | None = None
        self._write_error: BaseException | None = None
        self._write_error_seen = False
        self._landing: _Returning | None = None
        self._started = self._entered = self._left = False
        self._first_step = 0
        self._current: _Ready | _Block | None = None
        self._collecting = False
        self._steps: int | None = None  # a block, if blocks are collected
        self._remembered = REMEMBERED_BATCHES
        self._flushed_before_update = False
        self._number = 0
        self._handed_over: float | None = None
        self._interrupts = Interrupts()

    # Life

    def __enter__(self) -> LookAhead:
        if self._entered:
            raise RuntimeError("this LookAhead was used already: make a new one for another pass")
        self.store.open(self)
        self._entered = True
        self._interrupts.install()
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
                # A thread may sit in the next() of the user's loader or future; it is a daemon and ends with it.
                sits = thread.name.endswith("loader") or (self._future is not None and thread.name.endswith("plan"))
                thread.join(timeout=0.2 if sits else None)
        finally:
            # Also if an impatient second Ctrl-C came in between.
            self._returning.close()
            self.store.close(self)
            self._interrupts.remove()
        if error is None:
            if not self._write_error_seen:
                self._raise_write_error()
            self._interrupts.raise_if_noted()
        elif self._write_error is not None and error is not self._write_error:
            error.add_note(f"besides, rows could not be written back: {self._write_error!r}")

    def start(self, cache: CacheState | None = None) -> CacheState:
        """Starts to draw and plan, and returns the cache to train with.

        Args:
            cache: a cache of this store to go on with, from an earlier pipeline of as many slots; by default an empty
                one is made. One of on-demand mode is taken once it is flushed.

        Returns:
            A `CacheState` on the default device.

        Raises:
            RuntimeError: outside `with`, at the second call, or if a cache that was not flushed holds newer rows than
                the store.
            ValueError: if `cache` is of another configuration, larger than what was asked for, or older than the store.
            TooFewSlots: if slots are to be split over groups and do not hold each of the first batches.
            Exception: what the loader raised, where the first batches are drawn.
        """
        if not self._entered or self._left:
            raise RuntimeError("call start() inside the block: `with LookAhead(...) as ahead: cache = ahead.start()`")
        if self._started:
            raise RuntimeError("start() was called already: train on with the cache that you have")
        if self.store.unwritten is not None:
            raise RuntimeError(
                "victims of an earlier pipeline could not be written home: call flush on that one, which tries again"
            ) from self.store.unwritten
        if cache is None and self.store.behind:
            raise RuntimeError(
                "a cache that was never flushed holds newer rows than the store: "
                "go on with it, ahead.start(cache), or flush it first"
            )
        if cache is not None:
            cache = self._checked_warm(cache)
        self._device = next(iter((jnp.zeros(()) if cache is None else cache.step).devices()))
        self._slots = self._split_slots() if cache is None else cache.slots
        self._shapes, self._evaluation_shapes = Shapes(self._slots), Shapes([0] * len(self._slots))
        # A group that got all its rows in a split fetches those that are used, which may be few of them.
        given = self._capacity.slots is not None and not self._policy.passes
        self._resident = [
            given and slots == rows.group.rows for slots, rows in zip(self._slots, self.store.groups, strict=True)
        ]
        if cache is None:
            cache = empty_cache(self.store, self._slots, backends=self._backends)
        elif self._backends is not None:
            cache = dataclasses.replace(cache, backends=kernels.choose(self._backends, self._device))
        self._choice = cache.backends
        self.store.transfers.expire()  # from now on this cache is trained, and no other
        self._first_step = self.store.exchanged = int(cache.step)
        for report, state in zip(self._report.groups.values(), cache.groups, strict=True):
            report.slots, report.device_bytes = state.slots, state.nbytes
        self._abstract_groups, self._abstract_counters = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (cache.groups, Counters.of(cache))
        )
        workers = Workers(self._thread_number)
        made = [self._make_planner(number, state, workers) for number, state in enumerate(cache.groups)]
        cache = dataclasses.replace(cache, groups=tuple(state for _, state in made))
        planners = [planner for planner, _ in made]
        self._started = True
        if not self._threads:
            self._start_thread("loader", self._draw_batches)
        self._start_thread("plan", lambda: self._plan_batches(planners, workers))
        self._start_thread("write-back", self._write_back)
        return cache

    def _start_thread(self, name: str, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=self._run_stage, args=(work, name), name=f"jaxcache-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _split_slots(self) -> tuple[int, ...]:
        """The slots of each group; where they are to be split, the first batches say how."""
        if self._capacity.slots is not None:
            return self._capacity.slots
        if not self._threads:
            self._start_thread("loader", self._draw_batches)
        unique: list[list[int]] = []
        while len(unique) < MEASURED_BATCHES:
            if len(unique) == len(self._first_batches):
                try:
                    self._first_batches.append(self._drawn.get(self._stages["plan"], poll=self._poll))
                except _Closed:
                    self._raise_errors()
                    raise
            batch = self._first_batches[len(unique)]
            if batch is _END:
                break
            pairs = zip(batch.lookups, self.store.groups, strict=True)
            unique.append([len(np.unique(part.keys(rows.group), return_inverse=True)[0]) for part, rows in pairs])
        return self._capacity.split(np.array(unique, np.int64).reshape(len(unique), len(self.store.groups)))

    def _next_drawn(self) -> Any:
        """The next batch of the loader, or _END."""
        return self._first_batches.popleft() if self._first_batches else self._drawn.get(self._stages["plan"])

    def _checked_warm(self, cache: CacheState) -> CacheState:
        self._check_cache(cache, "start")
        if int(cache.fault) != CacheState.NO_FAULT:
            raise ValueError("the cache given to start() met a fault in its last pipeline: its steps are not sound")
        if not self._capacity.holds(cache.slots):
            raise ValueError(
                f"the cache given to start() has {_counted(cache.slots)} slots, which is more than "
                f"{self._capacity.asked}: ask for as much as it has, or flush it and start() with none"
            )
        if cache.on_demand is not None and self.store.behind:
            raise RuntimeError(
                "the cache given to start() comes from on-demand mode and holds newer rows than the store: flush it "
                "first, cache = jc.flush(cache, store), after an update or jc.release(cache)"
            )
        if cache.on_demand is not None and int(cache.on_demand.admitted) != self.store.transfers.admitted:
            raise ValueError(
                "the cache given to start() comes from on-demand mode and is not the newest, or rows were loaded "
                "since: give the newest, or start() with none"
            )
        if self.store.loaded and cache.on_demand is None:
            raise ValueError(
                "rows were loaded into the store since the cache given to start() was filled, which has older ones: "
                "start() with none"
            )
        step, newest = int(cache.step), self.store.exchanged
        if int(cache.exchanged) != newest:
            raise ValueError(
                f"the cache given to start() is of step {step} and the newest one "
                + (f"of step {newest}" if newest >= 0 else "is that of on-demand mode")
                + ": give that one, or, if it was flushed, start() with none"
            )
        # A loop that was left between exchange and update has an exchange too many.
        return dataclasses.replace(cache, exchanged=jnp.array(step, jnp.int32), on_demand=None)

    def _make_planner(self, number: int, state: GroupCache, workers: Workers) -> tuple[Planner, GroupCache]:
        """The planner of a group, and its cache with the rows in it that are to be there before the first batch."""
        group, slots = self.store.groups[number].group, self._slots[number]
        occupied, keys = slot_keys(group, np.array(state.slot_table))
        if self._resident[number]:
            if len(keys) == 0:
                state = bring_in(state, self.store.groups[number], np.arange(slots, dtype=np.int64), self._choice)
            elif len(keys) != slots or not (keys == occupied).all():
                raise ValueError(
                    "start(cache) with every row on the device needs a cache from such a run: flush this one, and "
                    "start() with none"
                )
            return ResidentPlanner(group), state
        if len(keys) == 0:
            warm = self._policy.warm_keys(group, slots)[::-1]  # the hottest is to go last
            state = bring_in(state, self.store.groups[number], warm, self._choice)
            self._report.groups[group.name].rows_warmed = len(warm)
            occupied, keys = slot_keys(group, np.array(state.slot_table))
        # The rows looked up least come first in the order of eviction.
        lookups = np.array(state.counts)[occupied]
        order = np.argsort(lookups, kind="stable")
        if len(keys) and occupied[-1] != len(keys) - 1:
            raise ValueError("the slots in use must be the first ones: the cache given to start() is damaged")
        planner = LookAheadPlanner(
            group,
            slots,
            self._policy,
            self._window,
            self._max_window,
            memory=REMEMBERED_BATCHES,
            resident=(keys[order], occupied[order], lookups[order].astype(np.int64)),
            workers=workers,
        )
        return planner, state

    # The caller's side

    def __iter__(self) -> Iterator[tuple[Any, Plan]]:
        return self

    def __next__(self) -> tuple[Any, Plan]:
        self._collect("next()", None)
        if self._flushed_before_update:
            # The loop was not left after that flush, so the update that was still to come has been made since.
            self._flushed_before_update = False
            self.store.mark_behind()
        ready = self._next_ready()
        if ready is _END:
            raise StopIteration
        try:
            ready.ahead.batch.check_unchanged(self._number)
        except RuntimeError as error:
            self._error = error  # the batch is lost: none can follow it
            raise
        self._current = ready
        self._forget_loader_states()
        self._number += 1
        self._handed_over = time.perf_counter()
        return ready.content, ready.plan

    def blocks(self, steps: int) -> Iterator[tuple[Any, Plan]]:
        """Yields batches and plans of up to `steps` steps at once, for `scan`, instead of one by one.

        A block has as many steps as was asked for, or else a power of two of them: before a row is fetched that the
        block itself evicts, where shapes grow, and at the end of the data.

        Args:
            steps: most steps of a block. Rows and batches of three such blocks are held beside those in the window.

        Returns:
            An iterator of `(batches, plans)`: trees like a batch and a `Plan` whose leaves are stacked, `[k, ...]`, so
            that `plans.step` is `int32[k]`. Leaves that differ in shape from batch to batch, such as ragged ids,
            become an `object[k]` of arrays.

        Raises:
            ValueError: if `steps` is no integer of at least 1.
            RuntimeError: outside `with`, before `start`, and after `next()` or blocks of other sizes; from the
                iterator, if a block was not scanned.
            Exception: from the iterator, what the loader or an earlier write-back raised.

        >>> import optax
        >>> from jaxcache import HostStore, Table, lookup, update
        >>> store = HostStore({"user": Table(100, 2)}, optimizer=optax.sgd(0.5))
        >>> def train_step(cache, plan, total, batch):
        ...     rows = lookup(cache, plan)["user"]
        ...     return update(cache, plan, {"user": rows}), total + batch["user"], batch["user"].sum()
        >>> batches = [{"user": np.array([i, i + 1], np.int32)} for i in range(5)]
        >>> total = np.zeros(2, np.int32)
        >>> with LookAhead(store, batches, ids=lambda batch: batch, slots=20) as ahead:
        ...     cache = ahead.start()
        ...     for batches, plans in ahead.blocks(4):
        ...         cache, total, outputs = ahead.scan(train_step, cache, plans, total, batches)
        ...         print(outputs)
        ...     cache = ahead.flush(cache)
        [1 3 5 7]
        [9]
        >>> print(total, store.step)
        [10 15] 5
        """
        if not _is_positive(steps):
            raise ValueError(f"blocks({steps!r}): the steps of a block must be an integer, at least 1")
        self._collect("blocks", int(steps))
        return iter(functools.partial(self._next_block, int(steps)), _END)

    def _next_block(self, steps: int) -> Any:
        """The next block's batches and plans, or _END."""
        self._collect("blocks", steps)
        block = self._next_ready()
        if block is _END:
            return _END
        self._current = block
        self._forget_loader_states()
        self._number += len(block.steps)
        self._handed_over = time.perf_counter()
        return block.content, block.plan

    def _collect(self, what: str, steps: int | None) -> None:
        """Starts to collect rows of single steps, or of blocks, when `what` is called first; later both must agree."""
        self._count_step()
        self._require_running(what)
        if not self._collecting:
            self._collecting, self._steps = True, steps
            if steps is not None:
                self._remembered = max(REMEMBERED_BATCHES, _BLOCKS_AHEAD * steps)
            self._start_thread("collect", self._collect_rows if steps is None else self._collect_blocks)
        if steps != self._steps:
            raise RuntimeError(
                f"{what if steps is None else f'blocks({steps})'} was called on a pipeline that yields "
                + ("batches one by one" if self._steps is None else f"blocks({self._steps})")
                + ": it goes on as it began, make a new LookAhead for another pass"
            )

    def _next_ready(self) -> Any:
        """What was collected next, or _END."""
        self._interrupts.raise_if_noted()
        if isinstance(self._current, _Block):
            raise RuntimeError(
                f"the block up to batch {self._number - 1} was not scanned: the first line of the loop must be "
                "`cache, train, outputs = ahead.scan(train_step, cache, plans, train, batches)`"
            )
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
        return ready

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
        self._interrupts.raise_if_noted()
        self._check_cache(cache, "exchange")
        ready = self._current
        if self._steps is not None:
            raise RuntimeError(
                "exchange is for single steps, and this pipeline yields blocks of them: call "
                "`cache, train, outputs = ahead.scan(train_step, cache, plans, train, batches)`"
            )
        if not isinstance(ready, _Ready):
            raise RuntimeError(
                "exchange was called twice for one batch, or before the first: call it once, first thing in the loop"
            )
        if plan is not ready.plan:
            raise RuntimeError(
                "exchange got the plan of another batch: give the very object that was yielded last, with batch "
                f"{self._number - 1}"
            )
        self._wait_for_landing(self._exchanged - _RETURNING_BATCHES + 1)
        exchange, planned = ready.exchange, ready.ahead.planned
        if exchange is None:
            exchange = self._take_victims_home(
                cache, ready, lambda: self._exchange(ready.ahead, ready.unique_bounds), _sent
            )
            planned = _without_victims(planned)
        counters = Counters.of(cache)
        groups, rows = [], []
        for program, group, part in zip(exchange.programs, cache.groups, exchange.groups, strict=True):
            contents, outgoing = program(group.contents, counters, part, exchange.step)
            groups.append(group.holding(contents))
            rows.append(outgoing)
        counters, record = _compile_count(self._device)(counters, exchange.step)
        state = dataclasses.replace(cache, groups=tuple(groups), **counters._asdict())
        self._send_home((planned,), tuple(rows), record)
        self._count_exchange(ready)
        return state

    def scan(
        self, train_step: TrainStep, cache: CacheState, plans: Plan, train: Any, batches: Any
    ) -> tuple[CacheState, Any, Any]:
        """Exchanges and trains the steps of a block, one after the other, in one program: a `jax.lax.scan`.

        The training is that of the loop with `exchange`, bit for bit.

        Args:
            train_step: `(cache, plan, train, batch) -> (cache, train, output)`, the step of that loop: pure, jitted or
                not. It is compiled for each length of a block, so give the same function every time.
            cache: the cache after the block before. It is donated.
            plans: the plans that were yielded last.
            train: what else the step changes, such as parameters and optimizer state: a pytree of arrays, whose shapes
                and dtypes stay. It is donated.
            batches: the batches that were yielded last, or a pytree of those parts that the step uses.

        Returns:
            The cache and `train` after the block, and the outputs of its k steps, leaves `[k, ...]`.

        Raises:
            RuntimeError: for other plans than those yielded last, at the second call for them, for a cache that was
                donated; and for a mistake of an earlier step that only the device could see, a block or two later.
            ValueError: if leaves of `batches` have no leading axis of k steps.
            TypeError: if `train_step` returns something else.
            Exception: what an earlier write-back raised.
        """
        self._require_running("scan")
        self._interrupts.raise_if_noted()
        self._check_cache(cache, "scan")
        block = self._current
        if not isinstance(block, _Block):
            raise RuntimeError(
                "scan runs what `for batches, plans in ahead.blocks(steps)` yields: call it once for each block"
                + ("" if block is None else ", and exchange for single batches")
            )
        if plans is not block.plan:
            raise RuntimeError(
                "scan got the plans of another block: give the very object that was yielded last, with the batches up "
                f"to {self._number - 1}"
            )
        check_stacked(batches, len(block.steps))
        self._wait_for_landing(self._scanned)
        moves, planned = block.moves, tuple(step.ahead.planned for step in block.steps)
        if moves is None:
            moves = self._take_victims_home(
                cache, block.steps[0], lambda: self._moves(block.steps, block.sizes), jax.device_put
            )
            planned = tuple(map(_without_victims, planned))
        with jax.default_device(self._device):
            cache, train, outputs, rows, records = block_program(self._device)(
                train_step, block.sizes, cache, train, moves, plans, batches
            )
        if len(block.steps) == 1:
            outputs = _add_axis(outputs)
        self._scanned = self._exchanged
        self._send_home(planned, rows, records)
        for step in block.steps:
            self._count_exchange(step)
        return cache, train, outputs

    def _send_home(self, planned: tuple[tuple[PlannedBatch, ...], ...], rows: tuple[Rows, ...], record: Any) -> None:
        """Sends the victims of the batch, or the block, that was yielded last on their way."""
        copies: list[Rows | None] = [None] * len(rows)
        if (host := _host_memory(self._device)) is not None:
            # Copied while the device goes on, into memory that NumPy reads as it is.
            for number, store in enumerate(self.store.groups):
                if any(len(moved[number].victims) for moved in planned) and not store.group.frozen:
                    # Where there is none left they are read from the device: the cache was donated, and is not lost.
                    with contextlib.suppress(jax.errors.JaxRuntimeError):
                        copies[number] = jax.device_put(rows[number], host)
        self._current = None
        self.store.mark_behind()
        # In this order: if a signal handler of the caller raises between the two, nobody waits for what never comes.
        self._returning.put(_Returning(planned, rows, tuple(copies), record), self._stages["step"])
        with self._progress:
            self._exchanged += len(planned)

    def _take_victims_home(
        self, cache: CacheState, ready: _Ready, collect: Callable[[], Any], send: Callable[[Any], Any]
    ) -> Any:
        """Writes a batch's victims home, and only then reads the rows that it fetches: some are the same."""
        with self._progress:
            while self._landed < self._exchanged and self._write_error is None:
                self._progress.wait(_POLL_SECONDS)
                self._interrupts.raise_if_noted()
            self._raise_write_error()
        newest, found = self.store.exchanged, int(cache.exchanged)  # waits for the step
        if found != newest:
            raise RuntimeError(_explain_fault(CacheState.NO_FAULT, int(cache.step), found, newest))
        started = time.perf_counter()
        for number, (planned, state) in enumerate(zip(ready.ahead.planned, cache.groups, strict=True)):
            if state.group.frozen:
                continue
            victims, bound = len(planned.victims), ready.unique_bounds[number]
            slots = padded(planned.slots[len(planned.slots) - victims :], bound, state.slots)
            rows = self._read_programs[number, bound](state.buffer, slots)
            with self._stages["write-back"].working():
                self._write_home(self.store.groups[number], planned.victims, rows, slice(0, victims))
        with self._stages["collect"].working():
            exchange = collect()
        with self._stages["send"].working():
            exchange = send(exchange)
        self._count_wait(time.perf_counter() - started)
        return exchange

    def _wait_for_landing(self, number: int) -> None:
        """Waits until the victims of `number` exchanges are home, where the device, or the write-back, is behind."""
        started, written = time.perf_counter(), self._stages["write-back"].busy
        with self._progress:
            while self._landed < number and self._write_error is None:
                self._progress.wait(_POLL_SECONDS)
                self._interrupts.raise_if_noted()
            self._raise_write_error()
        # While victims are being written the step waits for them; the rest of the time the device is at work.
        waited = min(time.perf_counter() - started, self._stages["write-back"].busy - written)
        self._count_wait(waited)

    def _count_wait(self, waited: float) -> None:
        """Counts time of the caller's loop body as that of the step waiting for other stages."""
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
        started = time.perf_counter()
        if self._left:
            self.store.open(self)  # raises if another pipeline has the store now
        try:
            with self._progress:
                self._progress.wait_for(lambda: self._landed >= self._exchanged or self._write_error is not None)
            if self.store.unwritten is not None:
                self._write_again()
            faulty = self._write_error if isinstance(self._write_error, _FaultError) else None
            newest, found = self.store.exchanged, int(cache.exchanged)
            if found != newest:
                if faulty is not None:
                    self._raise_write_error()
                raise RuntimeError(
                    f"flush got a stale cache, of step {found}; the newest is of step {newest}: assign what exchange "
                    "and the train step return, `cache = ...`, and flush that"
                )
            # A cache that met a fault has kept its last good rows: they are saved before the fault is raised.
            if self.store.loaded and any(np.asarray(state.dirty).any() for state in cache.groups):
                raise RuntimeError(
                    "rows were loaded into the store since this cache was flushed, and it would write its older ones "
                    "over them: start() a new cache, and assign what flush returns, `cache = ahead.flush(cache)`"
                )
            for report, written in zip(self._report.groups.values(), write_dirty_rows(cache, self.store), strict=True):
                report.rows_flushed += written
            self._flushed_before_update = int(cache.step) < found
            trained = max(int(cache.step) - self._first_step, self._loader_states_from)
            self._trained_state = self._loader_states[trained - self._loader_states_from]
            fault = int(cache.fault)
            if faulty is None and fault != CacheState.NO_FAULT:
                faulty = _FaultError(_explain_fault(fault, int(cache.step), found, newest))
            if faulty is not None:
                self._write_error_seen = True
                raise faulty
        finally:
            if self._left:
                self.store.close(self)
        self._report.flushes += 1
        self._report.flush_seconds += time.perf_counter() - started
        return cleaned(cache)

    def _write_again(self) -> None:
        """Writes home the victims whose write-back failed, and those behind them; raises what still prevents it."""
        while self._landed < self._exchanged:
            self._landing = self._landing or self._returning.get_rest()
            self._land(self._landing)
            self._landing = None
        self.store.unwritten, self._write_error_seen = None, True

    @staticmethod
    def _write_home(store: RowStore, keys: np.ndarray, rows: Rows, part: slice | np.ndarray) -> None:
        """Writes the rows at `part` of arrays on the device into the store."""
        store.write(keys, jax.tree.map(lambda leaf: np.asarray(leaf)[part], rows))

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
        shapes, outputs = self._evaluation_shapes, []
        for number, content in enumerate(loader):
            self._interrupts.raise_if_noted()
            batch = Batch.read(content, self._ids, self._features, hold=False)
            found = [
                np.unique(part.keys(rows.group), return_inverse=True, return_counts=True)
                for part, rows in zip(batch.lookups, self.store.groups, strict=True)
            ]
            shapes.fit(batch, [len(keys) for keys, _, _ in found])
            every = [
                (inverse.astype(np.int32), occurrences.astype(np.int32), np.arange(bound, dtype=np.int32))
                for (_, inverse, occurrences), bound in zip(found, shapes.unique_bounds, strict=True)
            ]
            plan = shapes.plan(batch, every, number)
            view = CacheState(
                groups=tuple(
                    _group_view(rows, keys, bound)
                    for rows, (keys, _, _), bound in zip(self.store.groups, found, shapes.unique_bounds, strict=True)
                ),
                step=np.array(number, np.int32),
                exchanged=np.array(number + 1, np.int32),
                fault=np.array(CacheState.NO_FAULT, np.int32),
                backends=cache.backends,
            )
            view, plan = jax.tree.map(jnp.asarray, (view, plan))
            outputs.append(eval_step(view, plan, shapes.pad(batch)))
        return cache, outputs

    def report(self) -> Report:
        """The figures so far, as a copy."""
        return copying.deepcopy(self._report)

    @property
    def loader_state(self) -> Any:
        """The state of the loader after the batch trained last, as of the latest `flush`, or at the start.

        Batches are drawn ahead: the loader itself is further on. A loader that is set to this state yields the batch
        that comes next in training. None where the loader has no state; see `LookAhead(loader_state=...)`.

        Raises:
            RuntimeError: before `start`.
            Exception: what opening the loader raised.
        """
        if not self._started:
            raise RuntimeError("loader_state is known after start(): `cache = ahead.start()`")
        while not self._loader_opened.wait(_POLL_SECONDS):
            self._poll()
        return copying.deepcopy(self._trained_state)

    def _forget_loader_states(self) -> None:
        """Those before the batch that is yielded now: all batches before it are trained."""
        for _ in range(self._number - self._loader_states_from):
            self._loader_states.popleft()
        self._loader_states_from = self._number

    def _count_step(self) -> None:
        if self._handed_over is not None:
            self._stages["step"].busy += time.perf_counter() - self._handed_over
            self._handed_over = None

    def _count_exchange(self, ready: _Ready) -> None:
        report, ahead = self._report, ready.ahead
        report.steps += 1
        for number, group in enumerate(report.groups.values()):
            planned = ahead.planned[number]
            group.lookups += len(ahead.observed[number].inverse)
            group.unique_rows += len(planned.unique_slots)
            group.lookup_hits += ready.lookup_hits[number]
            group.rows_fetched += len(planned.fetched)
            group.rows_written_back += 0 if self.store.groups[number].group.frozen else len(planned.victims)
            group.unique_bound = ready.unique_bounds[number]
        for feature, ignored in ahead.batch.ignored.items():
            report.ignored[feature] = report.ignored.get(feature, 0) + ignored
        report.longest_window = max(report.longest_window, ahead.window)
        report.window_limited += ahead.limited
        report.bound_growths = ready.growths

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
        found = [(state.group, state.optimizer) for state in cache.groups]
        expected = [(rows.group, rows.optimizer) for rows in self.store.groups]
        slots = self._slots or self._capacity.slots or cache.slots  # any will do if they are still to be split
        if found != expected or cache.slots != slots:

            def described(configuration: Sequence[tuple[Any, Any]], slots: tuple[int, ...]) -> str:
                tables = "; ".join(f"{', '.join(group.names)} with {optimizer}" for group, optimizer in configuration)
                return f"{_counted(slots)} slots for {tables}"

            raise ValueError(
                f"{where} got a cache of another configuration: {described(found, cache.slots)}; expected "
                f"{described(expected, slots)}"
            )

    def _poll(self) -> None:
        self._interrupts.raise_if_noted()
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
                    self.store.unwritten = None if isinstance(error, _FaultError) else error
                elif self._error is None:
                    self._error = error
                self._progress.notify_all()
            for channel in (self._drawn, self._planned, self._ready):
                channel.close()

    def _draw_batches(self) -> None:
        stage = self._stages["loader"]
        with stage.working():
            iterator = iter(self._loader)
            get_state: Any = self._get_loader_state or getattr(iterator, "get_state", lambda: None)
            self._trained_state = copying.deepcopy(get_state())
            self._loader_states.append(self._trained_state)
            self._loader_opened.set()
        while True:
            with stage.working():
                content = next(iterator, _END)
                if content is _END:
                    break
                self._loader_states.append(copying.deepcopy(get_state()))
                batch = Batch.read(content, self._ids, self._features, self._copy)
            self._drawn.put(batch, stage)
        self._drawn.put(_END, stage)

    def _plan_batches(self, planners: Sequence[Planner], workers: Workers) -> None:
        stage = self._stages["plan"]
        source = self._drawn_batches() if self._future is None else self._future_batches(self._future)
        ahead: deque[tuple[Batch | _Expected, tuple[Observed, ...]]] = deque()
        held, number, drawn = 0, 0, None
        try:
            while True:
                limited = False
                # A plan that needs victims waits for all of its window: which rows go depends on the batches alone,
                # never on time. All groups look at the same batches.
                while any([planner.wants_batch() for planner in planners]):
                    limited = self._window == "auto" and len(ahead) > 0 and held >= self._max_window_bytes
                    if limited or (item := next(source, None)) is None:
                        break
                    batch, lookups = item
                    with stage.working():
                        observed = tuple(
                            planner.observe(part.ids, part.starts, part.tables)
                            for planner, part in zip(planners, lookups, strict=True)
                        )
                    ahead.append((batch, observed))
                    held += batch.nbytes
                if not ahead:
                    break
                window = len(ahead)
                batch, observed = ahead.popleft()
                held -= batch.nbytes
                if isinstance(batch, _Expected):
                    drawn = self._next_drawn()
                    if drawn is _END:
                        break
                    if _Expected.of(drawn) != batch:
                        raise ValueError(
                            f"batch {number} of the loader has other ids than LookAhead(future=...) gave for it: both "
                            "must yield the same ids in the same order (is the loader shuffled anew?)"
                        )
                    batch = drawn.observed()
                limited = limited or any(planner.limited for planner in planners)
                with stage.working():
                    for planner in planners:
                        planner.memory = self._remembered
                    planned = tuple(planner.plan() for planner in planners)
                limited = limited and any(len(part.victims) for part in planned)
                trained = (not rows.group.frozen for rows in self.store.groups)
                wait_for = max((part.wait_for for part in itertools.compress(planned, trained)), default=ABSENT)
                self._planned.put(_Ahead(number, batch, observed, planned, wait_for, window, limited), stage)
                number += 1
            if self._future is not None and drawn is not _END and self._next_drawn() is not _END:
                raise ValueError(
                    f"LookAhead(future=...) ended after {number} batches and the loader goes on: it must yield the ids "
                    "of every batch of the loader"
                )
            self._planned.put(_END, stage)
        finally:
            workers.close()

    def _drawn_batches(self) -> Iterator[tuple[Batch, tuple[Lookups, ...]]]:
        while (batch := self._next_drawn()) is not _END:
            yield batch.observed(), batch.lookups

    def _future_batches(self, future: Iterable[Mapping[str, Any]]) -> Iterator[tuple[_Expected, tuple[Lookups, ...]]]:
        for mapping in future:
            if self._left or self._error is not None:
                raise _Closed
            batch = Batch.read(mapping, lambda ids: ids, self._features, hold=False)
            yield _Expected.of(batch), batch.lookups

    def _collect_rows(self) -> None:
        collect, send = self._stages["collect"], self._stages["send"]
        while (ahead := self._planned.get(collect)) is not _END:
            batch = ahead.batch
            home = -1 if ahead.home_first else ahead.wait_for
            self._wait_for_write_back(max(home, ahead.number - REMEMBERED_BATCHES), collect)
            with collect.working():
                self._shapes.fit(batch, [len(planned.unique_slots) for planned in ahead.planned])
                self._compile_exchanges()
                exchange = None if ahead.home_first else self._exchange(ahead, self._shapes.unique_bounds)
                ready = self._collected(ahead)
            with send.working():
                # These arrays are fresh and never written again, so that a transfer without a copy is sound.
                plan, exchange = jax.device_put(ready.plan), None if exchange is None else _sent(exchange)
            self._ready.put(dataclasses.replace(ready, plan=plan, exchange=exchange), send)
        self._ready.put(_END, send)

    def _collected(self, ahead: _Ahead) -> _Ready:
        """A batch that the shapes fit, with its plan in memory of the host, and without its rows."""
        batch, shapes = ahead.batch, self._shapes
        rows = [
            (observed.inverse, observed.occurrences, planned.unique_slots)
            for observed, planned in zip(ahead.observed, ahead.planned, strict=True)
        ]
        plan = shapes.plan(batch, rows, self._first_step + ahead.number)
        hits = tuple(
            len(observed.inverse) - int(observed.occurrences[planned.missed].sum())
            for observed, planned in zip(ahead.observed, ahead.planned, strict=True)
        )
        return _Ready(ahead, shapes.pad(batch), plan, None, hits, shapes.unique_bounds, shapes.growths)

    def _collect_blocks(self) -> None:
        collect, send = self._stages["collect"], self._stages["send"]
        steps: list[_Ready] = []
        while (ahead := self._planned.get(collect)) is not _END:
            home = -1 if ahead.home_first else ahead.wait_for
            if ahead.home_first or home >= ahead.number - len(steps):
                # It fetches rows that the block itself is to evict, or evicts before it fetches.
                steps = self._send_blocks(steps)
            self._wait_for_write_back(max(home, ahead.number - self._remembered), collect)
            with collect.working():
                self._shapes.fit(ahead.batch, [len(planned.unique_slots) for planned in ahead.planned])
                if self._policy.passes:
                    self._compile_exchanges()  # for the reads of victims among them
                ready = self._collected(ahead)
            if steps and (
                steps[-1].growths != ready.growths or content_kind(steps[-1].content) != content_kind(ready.content)
            ):
                steps = self._send_blocks(steps)
            steps.append(ready)
            if ahead.home_first or len(steps) == self._steps:
                steps = self._send_blocks(steps)
        self._send_blocks(steps)
        self._ready.put(_END, send)

    def _send_blocks(self, steps: list[_Ready]) -> list[_Ready]:
        """Makes blocks of steps in a row. Returns those that are left: none."""
        collect, send, first = self._stages["collect"], self._stages["send"], 0
        for length in block_lengths(len(steps), self._steps or 1):
            part = tuple(steps[first : first + length])
            first += length
            with collect.working():
                content, plan = stack([step.content for step in part]), stack([step.plan for step in part])
                for step in part:
                    step.ahead.batch.check_unchanged(step.ahead.number)
                sizes = tuple(self._sizes(number, bound)[-1] for number, bound in enumerate(part[0].unique_bounds))
                moves = None if part[0].ahead.home_first else self._moves(part, sizes)
                part = tuple(map(_emptied, part))
            with send.working():
                plan, moves = jax.device_put((plan, moves))
            self._ready.put(_Block(part, content, plan, moves, sizes), send)
        return []

    def _moves(self, steps: Sequence[_Ready], sizes: tuple[int, ...]) -> Moves:
        """The rows that the steps of a block fetch, in NumPy, all of each group in one array with room to spare."""
        groups = []
        counts = np.array([[len(part.fetched) for part in step.ahead.planned] for step in steps], np.int32)
        starts = np.cumsum(counts, axis=0, dtype=np.int32) - counts
        for number, size in enumerate(sizes):
            needed = max(int(starts[-1, number]), 1)
            bound = doubled(self._row_bounds.get((number, len(steps)), roomy(needed)), needed)
            self._row_bounds[number, len(steps)] = bound
            most = 0 if self._resident[number] else (len(steps) - 1) * size
            planned = [step.ahead.planned[number] for step in steps]
            fetched = np.concatenate([part.fetched for part in planned])
            slots = np.concatenate([part.slots for part in planned])
            groups.append(self._group_exchange(number, fetched, slots, min(bound, most) + size))
        return Moves(tuple(groups), starts, counts)

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

    def _sizes(self, number: int, bound: int) -> list[int]:
        """The sizes of an exchange of a group with at most `bound` unique rows a batch, ascending."""
        smallest = min(bound, _SMALLEST_EXCHANGE)
        classes = 0 if self._resident[number] else _SIZE_CLASSES
        return sorted({smallest, *(max(-(-bound // 2**i), smallest) for i in range(classes))})

    def _compile_exchanges(self) -> None:
        """Compiles the exchanges of all sizes whose bound is new."""
        _compile_count(self._device)
        for number, bound in enumerate(self._shapes.unique_bounds):
            for size in self._sizes(number, bound):
                if (number, size) not in self._programs:
                    self._programs[number, size] = self._exchange_program(number, size)
            if self._policy.passes and (number, bound) not in self._read_programs:
                leaves, treedef = jax.tree.flatten(self._abstract_groups[number].buffer)
                self._read_programs[number, bound] = _compile_read(treedef, tuple(leaves), bound, self._device)

    def _exchange_program(self, number: int, size: int) -> Any:
        abstract = jax.eval_shape(
            lambda: jax.tree.map(jnp.asarray, self._group_exchange(number, _NO_KEYS, _NO_SLOTS, size))
        )
        contents = self._abstract_groups[number].contents
        leaves, treedef = jax.tree.flatten((contents, self._abstract_counters, abstract))
        return _compile_exchange(treedef, tuple(leaves), self._device, self._choice)

    def _exchange(self, ahead: _Ahead, bounds: Sequence[int]) -> _Exchange:
        """What the exchange of a batch needs, in NumPy: in each group padded to the smallest size that holds it."""
        groups, programs = [], []
        for number, (planned, bound) in enumerate(zip(ahead.planned, bounds, strict=True)):
            size = next(size for size in self._sizes(number, bound) if size >= len(planned.fetched))
            groups.append(self._group_exchange(number, planned.fetched, planned.slots, size))
            programs.append(self._programs[number, size])
        return _Exchange(tuple(groups), np.array(self._first_step + ahead.number, np.int32), tuple(programs))

    def _group_exchange(self, number: int, fetched: np.ndarray, slots: np.ndarray, size: int) -> GroupExchange:
        rows = self.store.groups[number]
        return GroupExchange(
            slots=padded(slots, size, self._slots[number]),
            slot_table=padded(slot_entries(rows.group, fetched), size, GroupCache.FREE),
            rows=rows.read(fetched, size),
        )

    def _write_back(self) -> None:
        stage = self._stages["write-back"]
        while True:
            self._landing = self._returning.get(stage)
            self._land(self._landing)
            self._landing = None

    def _land(self, returning: _Returning) -> None:
        """Reads the records of exchanges and writes home the victims of those that were made."""
        stage = self._stages["write-back"]
        with stage.waiting():
            records = np.asarray(returning.record).reshape(-1, 4)
        made = int(np.minimum.accumulate(records[:, 3]).sum())
        with stage.working():
            parts = zip(returning.rows, returning.copies, self.store.groups, strict=True)
            for number, (rows, copy, store) in enumerate(parts):
                victims, places = _victims([planned[number] for planned in returning.planned[:made]])
                if len(victims) and not store.group.frozen:
                    self._write_home(store, victims, _arrived(rows, copy), places)
        with self._progress:
            self._landed += made
            self.store.exchanged += made
            self._progress.notify_all()
        if made < len(records):
            fault, step, exchanged, _ = records[made].tolist()
            raise _FaultError(_explain_fault(fault, step, exchanged, self.store.exchanged))


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


def _is_positive(value: Any) -> bool:
    """Whether `value` is an integer of at least 1."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= 1)


def _counted(slots: tuple[int, ...]) -> str:
    return " + ".join(f"{number:,}" for number in slots)


def _sent(exchange: _Exchange) -> _Exchange:
    """The exchange with its arrays on the device."""
    groups, step = jax.device_put((exchange.groups, exchange.step))
    return dataclasses.replace(exchange, groups=groups, step=step)


def _emptied(step: _Ready) -> _Ready:
    """A step of a block, whose content and plan were stacked, so that its batch is held no longer."""
    batch = dataclasses.replace(step.ahead.batch, content=None, held=[])
    return dataclasses.replace(step, ahead=dataclasses.replace(step.ahead, batch=batch), content=None, plan=None)


def _without_victims(planned: tuple[PlannedBatch, ...]) -> tuple[PlannedBatch, ...]:
    return tuple(dataclasses.replace(part, victims=_NO_KEYS) for part in planned)


def _victims(planned: Sequence[PlannedBatch]) -> tuple[np.ndarray, slice | np.ndarray]:
    """The victims of steps of a group, and their places where the rows that these steps fetched are in a row."""
    stops = np.cumsum([len(part.fetched) for part in planned])
    places = [slice(stop - len(part.victims), stop) for part, stop in zip(planned, stops, strict=True)]
    if len(planned) == 1:
        return planned[0].victims, places[0]
    keys = np.concatenate([_NO_KEYS, *(part.victims for part in planned)])
    return keys, np.concatenate([_NO_SLOTS, *(np.arange(part.start, part.stop) for part in places)])


def _host_memory(device: jax.Device) -> jax.sharding.Sharding | None:
    """Where victims land: page-locked memory of the host, if the device is not the host itself and has such."""
    if device.platform == "cpu" or "pinned_host" not in {memory.kind for memory in device.addressable_memories()}:
        return None
    return jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")


def _arrived(rows: Rows, copy: Rows | None) -> Rows:
    """A copy of rows in memory of the host, or the rows, if there is none or it failed while it was made."""
    if copy is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            return jax.block_until_ready(copy)
    return rows


def _group_view(store: RowStore, keys: np.ndarray, bound: int) -> GroupCache:
    """The rows at `keys` as a group of a cache of `bound` slots that holds nothing else, and weights alone."""
    return GroupCache(
        buffer=Rows(store.read(keys, bound).weights, ()),
        slot_table=padded(slot_entries(store.group, keys), bound, GroupCache.FREE),
        counts=np.zeros(bound, np.int32),
        dirty=np.zeros(bound, bool),
        scalars=(),
        hyperparameters=(),
        streams=np.zeros((0, 2), np.uint32),
        group=store.group,
        optimizer=store.optimizer,
    )


@functools.lru_cache(maxsize=256)
def _compile_exchange(
    treedef: Any, leaves: tuple[jax.ShapeDtypeStruct, ...], device: jax.Device, choice: kernels.Choice
) -> Any:
    """The exchange of a group compiled for a size class; kept, so that an equal group or pipeline compiles nothing."""
    contents, counters, exchange = jax.tree.unflatten(treedef, leaves)
    program = jax.jit(exchange_group, donate_argnums=0, static_argnames="choice")
    with jax.default_device(device):
        return program.lower(contents, counters, exchange, counters.step, choice=choice).compile()


@functools.lru_cache
def _compile_count(device: jax.Device) -> Any:
    """What counts an exchange, compiled; kept as well."""
    number = jax.ShapeDtypeStruct((), np.int32)
    with jax.default_device(device):
        return jax.jit(count_exchange).lower(Counters(number, number, number), number).compile()


@functools.lru_cache(maxsize=256)
def _compile_read(treedef: Any, leaves: tuple[jax.ShapeDtypeStruct, ...], size: int, device: jax.Device) -> Any:
    """What reads `size` rows of a buffer, compiled; kept as well."""
    slots = jax.ShapeDtypeStruct((size,), np.int32)
    with jax.default_device(device):
        return _read_rows.lower(jax.tree.unflatten(treedef, leaves), slots).compile()


_NO_KEYS, _NO_SLOTS = np.zeros(0, np.int64), np.zeros(0, np.int32)
_read_rows = jax.jit(kernels.read)
_add_axis = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf[None], tree))
