"""The host's side of on-demand mode: hands out rows, takes victims home, keeps what went wrong. NumPy, no JAX."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from jaxcache import index
from jaxcache.index import ABSENT
from jaxcache.interrupts import Interrupts
from jaxcache.optimizers import Rows

if TYPE_CHECKING:
    from jaxcache.store import RowStore

_RETURNING = 4  # sets of victims on their way home, before whoever brings another waits
_PREFETCHES = 4  # that nobody has picked up, before the oldest is dropped
_POLL_SECONDS = 0.05  # how often whoever waits looks for Ctrl-C and for the store being closed


class Interrupted(Exception):
    """What was waited for will not come."""


@dataclass(frozen=True)
class _Part:
    """Some rows of one group: keys `int64[N]`, each once, and where each is among them."""

    keys: np.ndarray
    cells: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray) -> _Part:
        cells = index.empty(len(keys))
        index.find_or_insert_all(cells, keys, 0, np.empty(len(keys), np.int64))
        return cls(keys, cells)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The position of each of `keys`, `int64[M]`, or ABSENT."""
        positions = np.empty(len(keys), np.int64)
        index.find_all(self.cells, keys, positions)
        return positions


@dataclass(frozen=True, eq=False)
class _Victims:
    """Victims on their way home, of each group."""

    parts: tuple[_Part, ...]
    rows: tuple[Rows, ...]


@dataclass
class _Prefetch:
    """Rows that are read ahead, of each group."""

    parts: tuple[_Part, ...]
    stale: tuple[np.ndarray, ...]  # which have been victims since
    future: Future = field(init=False)  # of their `Rows`, with room for as many as one call hands out behind the last
    used: bool = False


class Transfers:
    """Moves rows between the tables and the callbacks of jitted programs, which run one at a time.

    Reads see victims that are still on their way home. Nothing here raises into a program: what goes wrong is kept by
    `keep`, and from then on `failed` is true, until `raise_failure` raises it to a caller on the host.

    Args:
        groups: of the store.

    Attributes:
        admitted: calls of `admit` whose rows were handed out: what the newest cache has counted too.
        failure: the first thing that went wrong; None if nothing did.
        interrupts: notes Ctrl-C in `with store:`.
        calls: of `admit`, since the store was made.
        counted: for each group in them lookups, unique rows, lookups of rows that were there, rows fetched, rows taken
            home, rows flushed: `int64[groups, 6]`.
    """

    def __init__(self, groups: Sequence[RowStore]):
        self._groups = tuple(groups)
        self._changed = threading.Condition()  # guards what follows
        self.admitted = 0
        self.failure: BaseException | None = None
        self.interrupts = Interrupts()
        self.calls = 0
        self.counted = np.zeros((len(self._groups), 6), np.int64)
        self._opened = self._closed = False
        self._returning: deque[_Victims] = deque()
        self._write_error: BaseException | None = None
        self._prefetches: deque[_Prefetch] = deque()
        self._writer: ThreadPoolExecutor | None = None
        self._reader: ThreadPoolExecutor | None = None

    # Failures

    def keep(self, error: BaseException) -> None:
        """Notes what went wrong; the first one stays, as it is the cause of those that follow."""
        with self._changed:
            if self.failure is None:
                self.failure = error
            self._changed.notify_all()

    @property
    def failed(self) -> bool:
        """Whether nothing may be moved; Ctrl-C and a closed store are noted as failures here."""
        if self.failure is None and self._write_error is not None:
            self.keep(self._write_error)
        if self.failure is None and self.interrupts.noted:
            self.keep(KeyboardInterrupt())
        if self.failure is None and self._closed:
            self.keep(
                RuntimeError(
                    "a program called admit or prefetch after its store was closed: leave `with store:` only when "
                    "every program that uses the store has returned, or enter it again"
                )
            )
        return self.failure is not None

    def raise_failure(self) -> None:
        """Raises what went wrong, or a Ctrl-C that came, once; then training can start again."""
        with self._changed:
            failure, self.failure = self.failure, None
        if isinstance(failure, KeyboardInterrupt):
            self.interrupts.clear()
        if failure is not None:
            raise failure
        self.interrupts.raise_if_noted()

    # For callbacks, which catch what these raise

    def read(self, group: int, keys: np.ndarray, size: int) -> Rows:
        """The newest rows at `keys` of a group, with room for `size`, from a prefetch where there is one.

        Raises:
            Interrupted: if what was prefetched is waited for, and it failed, or Ctrl-C came.
        """
        with self._changed:
            prefetches = list(self._prefetches)
        source = None
        for prefetch in prefetches:
            positions = prefetch.parts[group].find(keys)
            found = positions != ABSENT
            found[found] = ~prefetch.stale[group][positions[found]]
            if found.any() and source is None:
                source = prefetch, positions, found
            # What is in the cache now may change there: it must not be handed out once more.
            prefetch.stale[group][positions[found]] = True
        if source is not None:
            prefetch, positions, found = source
            prefetch.used = True
            ahead: Rows = self._arrived(prefetch.future)[group]
            first = int(positions[0])
            in_order = found.all() and (positions == np.arange(first, first + len(keys))).all()
            if in_order and first + size <= len(ahead.weights):
                part = slice(first, first + size)
                return Rows(ahead.weights[part], tuple(leaf[part] for leaf in ahead.state))
            rest = np.flatnonzero(~found)
            rows = self._read_newest(group, keys[rest], len(rest))
            return _merged(size, (np.flatnonzero(found), ahead, positions[found]), (rest, rows, np.arange(len(rest))))
        return self._read_newest(group, keys, size)

    def _read_newest(self, group: int, keys: np.ndarray, size: int) -> Rows:
        """The rows as they are on the host: those of victims on their way home, and else the store's."""
        with self._changed:
            returning = list(self._returning)  # before the store is read: what lands meanwhile is there then
        pieces, rest = [], np.arange(len(keys))
        for victims in reversed(returning):
            positions = victims.parts[group].find(keys[rest])
            found = positions != ABSENT
            if found.any():
                pieces.append((rest[found], victims.rows[group], positions[found]))
                rest = rest[~found]
        if not pieces:
            return self._groups[group].read(keys, size)
        pieces.append((rest, self._groups[group].read(keys[rest]), np.arange(len(rest))))
        return _merged(size, *pieces)

    def take_home(self, victims: Sequence[tuple[np.ndarray, Rows]]) -> None:
        """Takes victims, keys and rows `[N, ...]` of each group, which nobody writes again; returns at once.

        Raises:
            Interrupted: if there are too many under way, and Ctrl-C came or writing fails while one of them is waited
                for. The victims were not taken then.
        """
        if not any(len(keys) for keys, _ in victims):
            return
        taken = _Victims(tuple(_Part.of(keys) for keys, _ in victims), tuple(rows for _, rows in victims))
        self._wait_for_room()
        with self._changed:
            for prefetch in self._prefetches:
                for (keys, _), part, stale in zip(victims, prefetch.parts, prefetch.stale, strict=True):
                    positions = part.find(keys)
                    stale[positions[positions != ABSENT]] = True
            self._returning.append(taken)
            if self._writer is None:
                self._writer = ThreadPoolExecutor(1, "jaxcache-write-back")
            self._writer.submit(self._write, taken)

    def _write(self, victims: _Victims) -> None:
        # Those behind one that failed wait for it, or older rows would land last; a flush may have written them.
        if self._write_error is not None or victims not in self._returning:
            return
        try:
            self._land(victims)
        except BaseException as error:
            with self._changed:  # both at once, or it could be raised and forgotten before it is kept
                self._write_error = error
                self.keep(error)

    def _land(self, victims: _Victims) -> None:
        for store, part, rows in zip(self._groups, victims.parts, victims.rows, strict=True):
            store.write(part.keys, rows)
        with self._changed:
            self._returning.popleft()
            self._changed.notify_all()

    def prefetch(self, keys: Sequence[np.ndarray], room: Sequence[int]) -> None:
        """Starts to read rows, of each group those at `keys`, of which `read` hands out `room` at a time."""
        if not any(map(len, keys)):
            return
        parts = tuple(map(_Part.of, keys))
        prefetch = _Prefetch(parts, tuple(np.zeros(len(part), bool) for part in keys))
        sizes = [-(-len(part) // size) * size for part, size in zip(keys, room, strict=True)]
        with self._changed:
            while len(self._prefetches) >= _PREFETCHES:
                self._prefetches.popleft().future.cancel()
            self._prefetches.append(prefetch)
            if self._reader is None:
                self._reader = ThreadPoolExecutor(1, "jaxcache-prefetch")
            prefetch.future = self._reader.submit(
                lambda: [
                    self._read_newest(group, part, size)
                    for group, (part, size) in enumerate(zip(keys, sizes, strict=True))
                ]
            )

    def drop_used(self) -> None:
        """Drops what was prefetched for an `admit` that is over."""
        with self._changed:
            self._prefetches = deque(prefetch for prefetch in self._prefetches if not prefetch.used)

    def _wait_for_room(self) -> None:
        with self._changed:
            while len(self._returning) >= _RETURNING:
                if self.failed:
                    raise Interrupted
                self._changed.wait(_POLL_SECONDS)

    def _arrived(self, future: Future) -> list[Rows]:
        while not future.done():
            if self.failed:
                raise Interrupted
            wait([future], _POLL_SECONDS)
        return future.result()

    # For callers on the host

    def wait_until_home(self) -> None:
        """Waits until every victim is home; where writing failed, writes them again. Raises what still prevents it."""
        with self._changed:
            while self._returning and self._write_error is None:
                self._changed.wait(_POLL_SECONDS)
        while self._returning:
            self._land(self._returning[0])
        self._write_error = None

    def _drop_prefetches(self) -> None:
        while self._prefetches:
            self._prefetches.popleft().future.cancel()

    def expire(self) -> None:
        """Makes every cache stale that there is."""
        with self._changed:
            self.admitted += 1
            self._drop_prefetches()

    def forget_interrupt(self) -> None:
        """Drops a Ctrl-C that was noted: another exception is on its way."""
        with self._changed:
            if isinstance(self.failure, KeyboardInterrupt):
                self.failure = None
        self.interrupts.clear()

    def open(self) -> None:
        """Lets programs move rows until `close`, after which they may no more. Raises RuntimeError if it was open."""
        if self._opened:
            raise RuntimeError("this store is open: `with store:` cannot be nested, enter it once around all programs")
        self._opened, self._closed = True, False
        self.interrupts.install()

    def close(self) -> None:
        """Refuses everything from now on, and waits for victims on their way home and for the threads."""
        with self._changed:
            self._opened, self._closed = False, True
            self._drop_prefetches()
            writer, reader, self._writer, self._reader = self._writer, self._reader, None, None
        try:
            for pool in (writer, reader):
                if pool is not None:
                    pool.shutdown()
        finally:
            self.interrupts.remove()


def _merged(size: int, *pieces: tuple[np.ndarray, Rows, np.ndarray]) -> Rows:
    """New rows, with room for `size`: of each piece those at the last positions go to the first ones."""

    def merged(*leaves: np.ndarray) -> np.ndarray:
        out = np.empty((size, *leaves[0].shape[1:]), leaves[0].dtype)
        for (places, _, positions), leaf in zip(pieces, leaves, strict=True):
            out[places] = leaf[positions]
        return out

    weights = merged(*(rows.weights for _, rows, _ in pieces))
    return Rows(weights, tuple(merged(*leaves) for leaves in zip(*(rows.state for _, rows, _ in pieces), strict=True)))
