"""Saving in the background: what is copied, when it is written, and what happens when the disk refuses."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import re
import shutil
import struct
import subprocess
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distbp.checkpoint import list_checkpoints, load, newest_verified, state_sha256, verify
from distbp.errors import CannotWrite, Diverged
from distbp.saver import AUTO, MOST_LOST_S, MOST_SPENT, Pace, Saver, interval_s


@pytest.fixture
def saver(tmp_path):
    """Make savers that write to `tmp_path`/checkpoints, or another directory; their events are collected."""
    made = []

    def make(directory=None, *, keep=3, every=None, report=None, patience_s=100.0):
        events = []
        directory = directory or tmp_path / "checkpoints"
        options = {"every_seconds": every, "report": report or events.append, "patience_s": patience_s}
        made.append(Saver(directory, keep=keep, start=1, **options))
        made[-1].events = events
        return made[-1]

    yield make
    for one in made:
        with contextlib.suppress(CannotWrite, Diverged):
            one.wait()


@contextlib.contextmanager
def mounted(directory, options):
    """Mount a tmpfs on `directory`, or skip with the reason."""
    directory.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a tmpfs needs root and the right to mount")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


@contextlib.contextmanager
def immutable(path):
    """Make a path one that even root cannot rename or remove, or skip with the reason."""
    get_flags, set_flags, flag = 0x80086601, 0x40086602, 0x10
    descriptor = os.open(path, os.O_RDONLY)
    try:
        (flags,) = struct.unpack("l", fcntl.ioctl(descriptor, get_flags, bytes(8)))
        fcntl.ioctl(descriptor, set_flags, struct.pack("l", flags | flag))
    except OSError as error:
        os.close(descriptor)
        pytest.skip(f"the file system has no immutable files, or this is not root: {error}")
    try:
        yield
    finally:
        fcntl.ioctl(descriptor, set_flags, struct.pack("l", flags))
        os.close(descriptor)


def state(step, elements=1000):
    """Tensors whose every value follows from the step."""
    return {"parameters/w": np.full(elements, step, np.float32), "scalars": np.array([step, 0.5])}


def test_the_state_of_the_call_is_saved(saver, tmp_path):
    """What is saved is the state at the call, although training overwrites its arrays at once."""
    one = saver()
    tensors = state(5, elements=1 << 20)
    expected = state_sha256(tensors)
    one.save(5, tensors, {"note": 1})
    for array in tensors.values():
        array.fill(-1)
    one.wait_durable(5)
    assert state_sha256(load(tmp_path / "checkpoints" / "step-00000005").tensors) == expected
    (event,) = one.events
    assert (event["kind"], event["status"], event["step"]) == ("checkpoint", "saved", 5)
    assert event["seconds"] >= 0
    assert event["stalled_seconds"] >= 0
    assert event["cpu_seconds"] > 0


def test_one_save_is_in_flight_at_a_time(saver, tmp_path):
    """While a save is written no other is due; one that is asked for waits, and both are whole."""
    one = saver(every=1e-9)
    assert one.is_due()
    one.save(1, state(1, elements=4 << 20), {})
    assert one.in_flight
    assert not one.is_due()
    one.save(2, state(2, elements=4 << 20), {})
    one.wait_durable(2)
    assert [event["step"] for event in one.events] == [1, 2]
    assert [verify(path) for path in list_checkpoints(tmp_path / "checkpoints")] == [[], []]
    assert one.is_due()


def test_a_save_gives_way_until_it_is_waited_for():
    """A paced save sleeps after a block; whoever needs it wakes it at once, and it sleeps no more."""
    pace = Pace(1, 1000.0)
    done = threading.Event()

    def work():
        pace.begin()
        until = time.thread_time() + 0.1
        while time.thread_time() < until:
            pass
        pace.pause(1)  # A tenth of a second of work for a twentieth of a core: nearly two seconds.
        pace.pause(1)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert not done.wait(0.5)
    pace.hurry()
    assert done.wait(20)
    thread.join()


def test_a_paced_save_ends_in_time():
    """However much work a block was, the sleeps of a whole save are not longer than was allowed."""
    pace = Pace(100, 0.5)
    begun = time.monotonic()
    pace.begin()
    for _ in range(100):
        until = time.thread_time() + 0.001
        while time.thread_time() < until:
            pass
        pace.pause(1)
    # 0.1 s of work at a twentieth of a core would be 2 s; 20 allow for others on this machine.
    slept = time.monotonic() - begun - 0.1
    assert slept > 0.4
    assert slept < 20


def test_waiting_says_that_it_waits(saver):
    """Whoever waits for a save can say so meanwhile, so that nobody takes it for stuck."""
    one = saver()
    one.save(1, state(1, elements=16 << 20), {})
    told = []
    one.wait_durable(1, lambda: told.append(time.monotonic()))
    assert told


def test_three_failures_in_a_row_end_the_run(saver, tmp_path, capfd):
    """A disk without room costs two checkpoints, with errno, need and room; the third failure is 73."""
    with mounted(tmp_path / "full", "size=64k") as disk:
        one = saver(disk / "checkpoints", every=1e-9)
        big = state(0, elements=40_000)
        for step in (1, 2):
            one.save(step, big, {})
            one.wait()
            assert one.is_due(), "training goes on"
        one.save(3, big, {})
        for ask in (one.wait, one.is_due):
            with pytest.raises(CannotWrite, match="3 checkpoints in a row could not be written") as caught:
                ask()
            assert caught.value.exit_code == 73
            assert "ENOSPC (No space left on device)" in str(caught.value)
            assert re.search(r"needs 16\d{4} bytes, \d+ are free there", str(caught.value))
        assert list((disk / "checkpoints").iterdir()) == []
    said = capfd.readouterr().err
    for step in (1, 2, 3):
        assert f"E_SAVE_FAILED step={step} in_a_row={step}/3 cannot save" in said
    assert [event["status"] for event in one.events] == ["failed"] * 3


def test_a_success_forgets_the_failures(saver, tmp_path):
    """Two failures, a success and two failures do not end the run; what was saved before stays whole."""
    with mounted(tmp_path / "small", "size=256k") as disk:
        one = saver(disk / "checkpoints")
        for step in (1, 2, 3, 4, 5):
            if step == 3:
                (disk / "ballast").unlink()
            elif step in (1, 4):
                (disk / "ballast").write_bytes(bytes(210_000 if step == 1 else 60_000))
            one.save(step, state(step, elements=40_000), {})
            one.wait()
        assert [event["status"] for event in one.events] == ["failed", "failed", "saved", "failed", "failed"]
        (path,) = (disk / "checkpoints").iterdir()
        assert load(path).step == one.saved_step == 3


def test_the_last_save_must_succeed(saver, tmp_path):
    """A run that ends, or is stopped, without a checkpoint of its last step says so with 73."""
    with mounted(tmp_path / "readonly", "size=256k") as disk:
        (disk / "checkpoints").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        one = saver(disk / "checkpoints")
        one.save(9, state(9), {})
        with pytest.raises(CannotWrite, match=r"step 9 could not be written: .*EROFS"):
            one.wait_durable(9)


def test_what_is_not_finite_is_not_saved(saver, tmp_path):
    """A state with one NaN or infinity, wherever it stands, is never written: 79, and the older one stays."""
    for number, bad in enumerate((np.nan, np.inf, -np.inf)):
        one = saver(tmp_path / f"{number}")
        one.save(1, state(1, elements=(1 << 18) + 1), {})
        one.wait_durable(1)
        tensors = state(2, elements=(1 << 18) + 1)
        tensors["parameters/w"][-1] = bad
        one.save(2, tensors, {})
        with pytest.raises(Diverged, match="parameters/w is not finite after step 2") as caught:
            one.wait()
        with pytest.raises(Diverged):
            one.is_due()
        assert caught.value.exit_code == 79
        assert [path.name for path in list_checkpoints(tmp_path / f"{number}")] == ["step-00000001"]


def test_a_prune_that_fails_is_said_and_costs_nothing_else(saver, tmp_path, capfd):
    """An old checkpoint that cannot be removed is named on stderr; the new one counts as saved."""
    one = saver(keep=2)
    for step in (1, 2):
        one.save(step, state(step), {})
        one.wait_durable(step)
    with immutable(tmp_path / "checkpoints" / "step-00000001"):
        for step in (3, 4, 5, 6):
            one.save(step, state(step), {})
            one.wait_durable(step)
        assert "W_PRUNE_FAILED" in capfd.readouterr().err
        assert (tmp_path / "checkpoints" / "step-00000001").is_dir()
    assert newest_verified(tmp_path / "checkpoints", print).name == "step-00000006"


def test_a_report_that_nobody_takes_costs_nothing_else(saver, capfd):
    """If the job cannot take the event, the save counts nevertheless."""

    def refuse(record):
        raise BrokenPipeError("nobody there")

    one = saver(report=refuse)
    one.save(1, state(1), {})
    one.wait_durable(1)
    assert "W_RECORD_LOST" in capfd.readouterr().err


def test_a_disk_that_hangs_is_named_and_not_waited_for(saver, tmp_path, capfd):
    """When a disk (frozen here) writes nothing for long, it is named once, and who waits ends with 73."""
    with frozen_disk(tmp_path) as (disk, thaw):
        one = saver(disk / "checkpoints", every=1e-9, patience_s=0.3)
        one.save(1, state(1), {})
        time.sleep(0.5)
        assert not one.is_due()
        assert not one.is_due()
        assert capfd.readouterr().err.count("W_SAVE_SLOW") == 1
        with pytest.raises(CannotWrite, match="see whether that disk still answers"):
            one.wait()
        thaw()
        while one.in_flight:
            time.sleep(0.01)
        assert one.saved_step == 1


@contextlib.contextmanager
def frozen_disk(folder):
    """Mount an ext4 file system that is frozen: whoever writes is held up; skip with the reason if not."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("mkfs.ext4", "fsfreeze"))):
        pytest.skip("freezing a disk needs root, mkfs.ext4 and fsfreeze")
    (folder / "disk").mkdir()
    with open(folder / "image", "wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", folder / "image"], check=True)
    mount = ["mount", "-o", "loop", folder / "image", folder / "disk"]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a loop device is not allowed here")
    thaw = functools.partial(subprocess.run, ["fsfreeze", "-u", folder / "disk"], capture_output=True)
    try:
        subprocess.run(["fsfreeze", "-f", folder / "disk"], check=True)
        yield folder / "disk", thaw
    finally:
        thaw()
        subprocess.run(["umount", "--lazy", folder / "disk"], check=True)


def test_leftovers_of_others_are_removed_at_the_start(saver, tmp_path):
    """What a killed process left half written is gone when the next one takes over."""
    (tmp_path / "checkpoints" / "step-00000004.tmp-1-abcdef01").mkdir(parents=True)
    saver()
    assert list((tmp_path / "checkpoints").iterdir()) == []


@given(cost=st.floats(0, 1e4), seconds=st.floats(0, 1e4))
def test_auto_keeps_its_promises(cost, seconds):
    """ "auto" never spends more than 3.5 %, and loses at most 60 s wherever it need not spend more."""
    interval = interval_s(AUTO, (cost, seconds))
    assert cost <= MOST_SPENT * interval * (1 + 1e-9)
    if cost / MOST_SPENT + 1.5 * seconds + 1 <= MOST_LOST_S:
        assert interval + 1.5 * seconds <= MOST_LOST_S


def test_the_first_save_comes_early():
    """Before the cost of a save is known "auto" leaves half of the minute for it; others know no change."""
    assert interval_s(AUTO, None) == 30
    for cost in (None, (1.0, 1.0), (100.0, 100.0)):
        assert interval_s(7.5, cost) == 7.5
        assert interval_s(None, cost) is None


def test_a_state_that_changes_no_more_is_written_where_it_lies(saver, tmp_path):
    """The last save of a run copies nothing; the file is that of any other save."""
    last = saver()
    last.save(1, state(1), {})
    last.wait()
    accepted = []
    tensors = state(2)
    assert last.save(2, tensors, {}, accept=lambda given: accepted.append(given) or True, changes=False)
    last.wait()
    assert all(accepted[0][name] is tensor for name, tensor in tensors.items())
    written = load(newest_verified(tmp_path / "checkpoints", print))
    assert state_sha256(written.tensors) == state_sha256(state(2))
    last.save(3, state(3), {})  # A copy again, into memory of its own.
    last.wait()
    assert tensors["parameters/w"][0] == 2
