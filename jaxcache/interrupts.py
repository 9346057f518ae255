"""Ctrl-C that waits until nothing is lost by it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import Any


class Interrupts:
    """While it is installed, the first Ctrl-C is noted instead of raised; a second one is raised at once.

    Between a call that donates a cache and the assignment of its result nobody holds the cache: a KeyboardInterrupt
    there would lose it. Whoever asks `noted` decides when to raise.

    Python runs handlers in the main thread alone, and not while it waits inside a compiled program. Other threads see a
    Ctrl-C nevertheless, through a pipe into which the signal itself is written.
    """

    def __init__(self) -> None:
        self._noted = self._handled = False
        self._previous: Any = None
        self._pipe: tuple[int, int] | None = None

    def install(self) -> None:
        """Takes over from Python's own handler; on another thread, or where the program has its own, does nothing."""
        self._noted = self._handled = False
        on_main = threading.current_thread() is threading.main_thread()
        if not on_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            return
        self._previous = signal.signal(signal.SIGINT, self._handle)
        pipe = os.pipe()
        for end in pipe:
            os.set_blocking(end, False)
        other = signal.set_wakeup_fd(pipe[1], warn_on_full_buffer=False)
        if other == -1:
            self._pipe = pipe
        else:  # that of an event loop
            signal.set_wakeup_fd(other)
            _close(pipe)

    def remove(self) -> None:
        """Gives Ctrl-C back."""
        if self._previous is None:
            return
        if self._pipe is not None:
            pipe, self._pipe = self._pipe, None
            if (other := signal.set_wakeup_fd(-1)) not in (-1, pipe[1]):
                signal.set_wakeup_fd(other)  # that of an event loop that began meanwhile
            _close(pipe)
        signal.signal(signal.SIGINT, self._previous)
        self._previous = None

    def _handle(self, number: int, frame: Any) -> None:
        if self._handled:
            raise KeyboardInterrupt
        self._handled = self._noted = True

    @property
    def noted(self) -> bool:
        """Whether Ctrl-C was pressed and has not been raised."""
        if self._drain():
            self._noted = True
        return self._noted

    def _drain(self) -> bool:
        """Empties the pipe. Whether there was a Ctrl-C in it."""
        if (pipe := self._pipe) is not None:
            with contextlib.suppress(OSError):  # there is nothing in it, or it was closed
                return signal.SIGINT in os.read(pipe[0], 4096)
        return False

    def clear(self) -> None:
        """Forgets what was noted, and presses that came since: one was raised for all of them."""
        self._drain()
        self._noted = self._handled = False

    def raise_if_noted(self) -> None:
        """Raises KeyboardInterrupt for one that was noted, once."""
        if self.noted:
            self.clear()
            raise KeyboardInterrupt


def _close(pipe: tuple[int, int]) -> None:
    for end in pipe:
        os.close(end)
