"""Time in which a process was stopped is not waiting."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

from distbp.deadline import Deadline

LOOK_S = 0.01


def wait_out(seconds, connection):
    """Say that it began, wait until a deadline is over, and say for how many looks."""
    deadline, looks = Deadline(seconds), 0
    connection.send(os.getpid())
    while not deadline.is_over():
        time.sleep(LOOK_S)
        looks += 1
    connection.send(looks)


def looks_of(seconds, stopped_s):
    """Return how often a process looked within a deadline, of which it was stopped for a while."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=wait_out, args=(seconds, theirs))
    process.start()
    try:
        pid = ours.recv()
        if stopped_s:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(stopped_s)
            os.kill(pid, signal.SIGCONT)
        assert ours.poll(30)
        return ours.recv()
    finally:
        process.kill()
        process.join()


def test_time_in_which_the_process_was_stopped_does_not_count():
    """Stopped for longer than its deadline, it still waits for most of it, in looks."""
    assert looks_of(1.5, stopped_s=3.0) > 20


def test_a_deadline_is_over_and_begins_again():
    """Without a stop it is over after its time, and not before; renewed it has all of it again."""
    begun = time.monotonic()
    deadline = Deadline(0.2)
    assert not deadline.is_over() or time.monotonic() - begun > 0.2
    time.sleep(0.25)
    assert deadline.is_over()
    begun = time.monotonic()
    deadline.renew()
    assert not deadline.is_over() or time.monotonic() - begun > 0.2
