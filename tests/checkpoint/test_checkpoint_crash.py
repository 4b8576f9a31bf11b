"""A save that is killed, refused or out of room never costs a checkpoint that was acknowledged."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter

import numpy as np
import pytest

from distbp.checkpoint import Snapshot, list_checkpoints, newest_verified, remove_leftovers, save
from distbp.errors import CannotWrite

from .checkpoint_states import holds, save_steps, small_snapshot
from .traced_save import KILLED, traced_save, why_not


@pytest.fixture(scope="module")
def strace():
    """Skip, with the reason, where strace cannot be used."""
    reason = why_not()
    if reason:
        pytest.skip(reason)


def forbid_report(path, why):
    """Fail: after a crash no complete name may be damaged."""
    raise AssertionError(f"{path} was passed over: {why}")


def names(directory):
    """Return the names in `directory`, sorted."""
    return sorted(path.name for path in directory.iterdir())


def test_a_kill_at_every_system_call_leaves_a_whole_checkpoint(tmp_path, strace):
    """Killed at each of its system calls, one after the other, a save leaves the old or the new one whole."""
    directory = tmp_path / "undisturbed"
    save_steps(directory, 1, 2)
    lines = traced_save(directory, 3, keep=2, log=tmp_path / "log").calls
    calls = Counter(found[1] for line in lines if (found := re.match(r"\d+ +(\w+)\(", line)))
    for other in (
        "exit_group",
        "read",
        "brk",
        "mmap",
        "munmap",
    ):  # The test's own, and those of the allocator.
        calls.pop(other, None)
    assert {"mkdir", "openat", "write", "fsync", "rename", "unlinkat", "rmdir", "close"} <= set(calls)
    for call, count in calls.items():
        for number in range(1, count + 1):
            directory = tmp_path / f"{call}-{number}"
            save_steps(directory, 1, 2)
            inject = f"{call}:signal=KILL:when={number}"
            outcome = traced_save(directory, 3, keep=2, inject=inject, log=tmp_path / "log")
            if outcome.code != KILLED:  # One `close` more or less: then there is nothing to be killed at.
                made = sum(line.split(maxsplit=1)[1].startswith(f"{call}(") for line in outcome.calls)
                assert outcome.code == 0, outcome.message
                assert made < number, inject
                assert number == count, "only the last one may be missing"
            check_after_kill(directory)
            shutil.rmtree(directory)
    print(f"killed at each of {calls.total()} system calls of {len(calls)} kinds")


def check_after_kill(directory):
    """Assert that every complete name holds, the newest is one of the two, and the save can be repeated."""
    found = newest_verified(directory, forbid_report)
    assert found is not None
    assert found.name in ("step-00000002", "step-00000003")
    assert all(holds(path) for path in list_checkpoints(directory))
    remove_leftovers(directory)
    assert holds(save(directory, small_snapshot(3), keep=2))
    assert names(directory) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("call", ["rename", "fsync", "unlinkat", "rmdir"])
def test_a_kill_while_a_damaged_checkpoint_is_replaced_leaves_the_older_one(tmp_path, strace, call):
    """Killed anywhere while it replaces a damaged one, a save leaves an older or the new one whole."""
    for number in range(1, 100):
        directory = tmp_path / f"{number}"
        _, damaged = save_steps(directory, 1, 2)
        (damaged / "metadata.json").write_text("{}")
        outcome = traced_save(
            directory, 2, keep=0, inject=f"{call}:signal=KILL:when={number}", log=tmp_path / "log"
        )
        found = newest_verified(directory, lambda path, why: None)
        assert found is not None
        assert holds(found)
        if outcome.code == 0:
            break
        remove_leftovers(directory)
        assert holds(save(directory, small_snapshot(2), keep=0))
        assert names(directory) == ["step-00000001", "step-00000002"]
    assert outcome.code == 0
    assert found.name == "step-00000002"


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("fsync", "EIO"),
        ("write", "ENOSPC"),
        ("write", "EDQUOT"),
        ("openat", "EROFS"),
        ("rename", "EIO"),
        ("mkdir", "EACCES"),
    ],
)
def test_an_error_of_the_disk_keeps_the_old_and_removes_its_own(tmp_path, strace, call, error):
    """Whichever call the disk refuses, the save says 73 and why, and only the older checkpoints stay."""
    for number in range(1, 100):
        directory = tmp_path / f"{number}"
        save_steps(directory, 1, 2)
        outcome = traced_save(
            directory, 3, keep=0, inject=f"{call}:error={error}:when={number}", log=tmp_path / "log"
        )
        if outcome.code == 0:
            break
        assert outcome.code == 73, outcome.message
        assert error in outcome.message
        assert "bytes" in outcome.message
        assert names(directory) == ["step-00000001", "step-00000002"]
        assert all(holds(path) for path in list_checkpoints(directory))
        assert holds(save(directory, small_snapshot(3), keep=2))
    assert outcome.code == 0
    assert number > 1, "the call was never made"


@pytest.mark.parametrize("call", ["unlinkat", "rename"])
def test_a_prune_that_fails_says_that_the_checkpoint_is_safe(tmp_path, strace, call):
    """If only the removal of an older checkpoint fails, the save says 73 and that the new one is durable."""
    directory = tmp_path / "checkpoints"
    save_steps(directory, 1, 2)
    number = {"unlinkat": 1, "rename": 2}[call]
    inject = f"{call}:error=EIO:when={number}"
    outcome = traced_save(directory, 3, keep=2, inject=inject, log=tmp_path / "log")
    assert outcome.code == 73
    assert "step-00000003 is saved and durable" in outcome.message
    assert newest_verified(directory, forbid_report) == directory / "step-00000003"


def test_a_failed_fsync_is_never_repeated(tmp_path, strace):
    """After fsync has failed nothing is written or synced again: the kernel would answer that all is well."""
    for number in range(2, 7):  # The first is that of the run directory, before anything is written.
        directory = tmp_path / f"{number}"
        save_steps(directory, 1)
        outcome = traced_save(
            directory, 3, keep=0, inject=f"fsync:error=EIO:when={number}", log=tmp_path / "log"
        )
        assert outcome.code == 73
        failed = next(index for index, line in enumerate(outcome.calls) if "(INJECTED)" in line)
        assert not [line for line in outcome.calls[failed + 1 :] if " write(" in line or " fsync(" in line]


def test_the_order_of_system_calls_is_the_promised_one(tmp_path, strace):
    """Files are synced before the folder, it before the rename, the parent before anything is removed."""
    directory = tmp_path / "checkpoints"
    save_steps(directory, 1, 2)
    calls = traced_save(directory, 3, keep=2, log=tmp_path / "log").calls
    steps = [
        "fsync(.*/state.safetensors>", "fsync(.*/metadata.json>", "fsync(.*/manifest.json>",
        "fsync(.*.tmp-0-[0-9a-f]{8}>",
        "rename(.*tmp-0-.*step-00000003", "fsync(.*/checkpoints>", "rename(.*step-00000001.*pruned", "unlink",
    ]  # fmt: skip
    position = -1
    for step in steps:
        pattern = re.compile(step.replace("(", r"\("))
        position = next(index for index in range(position + 1, len(calls)) if pattern.search(calls[index]))
    first_removal = next(index for index, line in enumerate(calls) if "pruned" in line)
    assert not [line for line in calls[:first_removal] if "unlinkat(" in line or "rmdir(" in line]


def test_a_full_disk_says_need_and_room_and_keeps_the_old(tmp_path):
    """Without room the save fails with 73, ENOSPC and the numbers of bytes; older checkpoints stay whole."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root and the right to mount")
    try:
        saved = save_steps(disk / "checkpoints", 1, 2)
        big = Snapshot(3, {"values": np.ones(16_000, np.float32)}, {})
        with pytest.raises(CannotWrite, match=r"it needs 64\d\d\d bytes, \d+ are free there") as caught:
            save(disk / "checkpoints", big, keep=2)
        assert caught.value.exit_code == 73
        assert "ENOSPC (No space left on device)" in str(caught.value)
        assert "step-00000003" in str(caught.value)
        assert sorted(list_checkpoints(disk / "checkpoints")) == saved
        assert names(disk / "checkpoints") == [path.name for path in saved]
        assert all(holds(path) for path in saved)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_parent_that_is_missing_is_cannot_write(tmp_path):
    """A run directory that does not exist ends with 73 and the path."""
    with pytest.raises(CannotWrite, match=r"ENOENT.*nowhere|nowhere.*ENOENT"):
        save(tmp_path / "nowhere" / "checkpoints", small_snapshot(1), keep=2)


@pytest.mark.parametrize("keep", [2, 3])
def test_prune_keeps_the_newest_that_verify(tmp_path, keep):
    """Damaged checkpoints do not count: as many whole ones stay as were asked for, and the older go."""
    paths = save_steps(tmp_path, *range(1, 8))
    (paths[5] / "state.safetensors").write_bytes(b"")
    save(tmp_path, small_snapshot(9), keep=keep)
    whole = [9, 7, 5, 4][:keep]
    kept = {step for step in [*range(1, 8), 9] if step >= whole[-1]}
    assert names(tmp_path) == [f"step-{step:08d}" for step in sorted(kept)]


def test_prune_removes_nothing_while_too_few_verify(tmp_path):
    """With one whole checkpoint beside the new one, keep=3 removes nothing, not even damaged ones."""
    paths = save_steps(tmp_path, 1, 2, 3, 4)
    for path in paths[1:]:
        os.unlink(path / "metadata.json")
    save(tmp_path, small_snapshot(5), keep=3)
    assert len(names(tmp_path)) == 5


def test_a_run_that_went_back_keeps_what_it_saves(tmp_path):
    """Saved below later steps, a checkpoint is not pruned in their favour, and they are left alone."""
    save_steps(tmp_path, 1, 2, 3, 8, 9)
    assert holds(save(tmp_path, small_snapshot(5), keep=2))
    assert names(tmp_path) == [f"step-{step:08d}" for step in (3, 5, 8, 9)]


def test_a_run_directory_may_be_a_symbolic_link(tmp_path):
    """A run directory that links to another disk is saved to and loaded from like any other."""
    (tmp_path / "scratch").mkdir()
    os.symlink(tmp_path / "scratch", tmp_path / "run")
    path = save(tmp_path / "run" / "checkpoints", small_snapshot(1), keep=2)
    assert holds(path)
    assert newest_verified(path.parent, forbid_report) == path


def test_keep_zero_keeps_all(tmp_path):
    """keep=0 never removes a checkpoint."""
    save_steps(tmp_path, *range(10))
    assert len(list_checkpoints(tmp_path)) == 10


def test_saving_a_step_twice_keeps_the_first(tmp_path):
    """A verified checkpoint of the same step is kept as it is, file for file."""
    (path,) = save_steps(tmp_path, 3)
    before = {file.name: file.stat().st_ino for file in path.iterdir()}
    assert save(tmp_path, small_snapshot(3), keep=2, attempt=1) == path
    assert {file.name: file.stat().st_ino for file in path.iterdir()} == before


@pytest.mark.parametrize("what", ["damaged folder", "file", "symbolic link"])
def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path, what):
    """Whatever bears the name of this step and is damaged gives way; links are not followed."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("mine")
    directory = tmp_path / "checkpoints"
    (path,) = save_steps(directory, 3)
    for file in path.iterdir():
        file.unlink()
    if what != "damaged folder":
        path.rmdir()
        if what == "file":
            path.write_text("not a folder")
        else:
            os.symlink(outside, path)
    assert holds(save(directory, small_snapshot(3), keep=2))
    assert names(directory) == ["step-00000003"]
    assert (outside / "precious").read_text() == "mine"


def test_leftovers_are_ignored_and_removed(tmp_path):
    """Temporary folders are never listed nor chosen, and nothing else is removed with them."""
    (path,) = save_steps(tmp_path, 3)
    for name in ("step-00000009.tmp-0", "step-00000003.tmp-damaged", "step-00000001.tmp-pruned"):
        os.mkdir(tmp_path / name)
        (tmp_path / name / "state.safetensors").write_bytes(b"half")
    os.symlink(path, tmp_path / "step-00000008.tmp-1")
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "step-8").mkdir()
    assert list_checkpoints(tmp_path) == [path]
    assert newest_verified(tmp_path, forbid_report) == path
    assert len(remove_leftovers(tmp_path)) == 4
    assert names(tmp_path) == ["notes", "step-00000003", "step-8"]
    assert holds(path)
    assert remove_leftovers(tmp_path) == []
    assert remove_leftovers(tmp_path / "nowhere") == []


def test_every_save_has_a_name_of_its_own(tmp_path):
    """A second try for the same step writes under a new name: nothing of a failed one is used again."""
    seen = set()
    for _ in range(3):

        def stop(size):
            seen.update(names(tmp_path))
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, small_snapshot(3), keep=2, pause=stop)
    assert len(seen) == 3
    assert names(tmp_path) == []


def test_an_exception_while_saving_leaves_nothing(tmp_path):
    """An exception raised while the save pauses passes through, and the temporary folder is gone."""

    def stop(size):
        raise KeyboardInterrupt

    save_steps(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, small_snapshot(2), keep=2, pause=stop)
    assert names(tmp_path) == ["step-00000001"]
