"""Ctrl-C is noted, seen by every thread, raised once, and given back."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from jaxcache.interrupts import Interrupts


@pytest.fixture
def interrupts():
    """Installed as by a program that leaves Ctrl-C to Python."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    made = Interrupts()
    made.install()
    yield made
    made.remove()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.set_wakeup_fd(-1) == -1
    signal.signal(signal.SIGINT, before)


def press():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)  # Python runs its handler between two steps of its own


def test_the_first_is_noted_and_raised_when_asked_for_once(interrupts):
    assert not interrupts.noted
    press()
    assert interrupts.noted and interrupts.noted
    with pytest.raises(KeyboardInterrupt):
        interrupts.raise_if_noted()
    interrupts.raise_if_noted()
    assert not interrupts.noted


def test_a_second_one_is_raised_at_once(interrupts):
    press()
    with pytest.raises(KeyboardInterrupt):
        press()


def test_other_threads_see_it_before_pythons_handler_ran(interrupts):
    """As while the main thread waits in a compiled program: here the handler is held back."""
    seen = []
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:

        def other():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            press()
            seen.append(interrupts.noted)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    assert seen == [True]
    interrupts.clear()


def test_presses_that_came_before_one_was_raised_are_raised_with_it(interrupts):
    press()
    os.write(interrupts._pipe[1], bytes([signal.SIGINT]))  # a second one, whose handler has not run
    with pytest.raises(KeyboardInterrupt):
        interrupts.raise_if_noted()
    assert not interrupts.noted


def test_nothing_is_remembered_into_the_next_time(interrupts):
    press()
    interrupts.remove()
    interrupts.install()
    assert not interrupts.noted
    press()
    assert interrupts.noted


def test_a_program_with_a_handler_of_its_own_keeps_it():
    pressed = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    interrupts = Interrupts()
    interrupts.install()
    press()
    assert pressed == [signal.SIGINT] and not interrupts.noted
    interrupts.remove()
    signal.signal(signal.SIGINT, before)


def test_off_the_main_thread_nothing_is_installed():
    handler, interrupts = signal.getsignal(signal.SIGINT), Interrupts()
    thread = threading.Thread(target=interrupts.install)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is handler
    interrupts.remove()


def test_the_pipe_of_an_event_loop_stays():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    loop = os.pipe()
    for end in loop:
        os.set_blocking(end, False)
    signal.set_wakeup_fd(loop[1])
    try:
        interrupts = Interrupts()
        interrupts.install()
        press()
        assert interrupts.noted and os.read(loop[0], 10) == bytes([signal.SIGINT])
        interrupts.remove()
    finally:
        left = signal.set_wakeup_fd(-1)
        for end in loop:
            os.close(end)
        signal.signal(signal.SIGINT, before)
    assert left == loop[1]
