"""One copy of the data per host: sealed, read-only, checked before it is mapped."""

from __future__ import annotations

import json
import mmap
import os
import resource
import subprocess
import sys

import numpy as np
import pytest

from distbp.data import attach, pack
from distbp.errors import EnvironmentMismatch

ARRAYS = {
    "x": np.random.default_rng(0).normal(size=(7, 3, 2)).astype(np.float32),
    "y": np.arange(7),
    "none": np.empty((0, 5)),
    "bytes": np.arange(200, dtype=np.uint8)[::2],
}


def test_round_trip() -> None:
    """What was packed comes back bit for bit, 64-byte aligned, through a JSON description."""
    fd, description = pack(ARRAYS)
    views = attach(fd, json.loads(json.dumps(description)))
    os.close(fd)
    assert list(views) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert views[name].dtype == array.dtype
        assert views[name].shape == array.shape
        assert views[name].tobytes() == array.tobytes()
        assert views[name].size == 0 or views[name].ctypes.data % 64 == 0


def test_nobody_can_change_the_segment() -> None:
    """The file can be neither truncated, grown nor written, and views are read-only: no SIGBUS, no damage."""
    fd, description = pack(ARRAYS)
    for size in (0, 10**6):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"!", 0)
    with pytest.raises(PermissionError):
        mmap.mmap(fd, 0, flags=mmap.MAP_SHARED)
    with pytest.raises(ValueError, match="read-only"):
        attach(fd, description)["y"][0] = 1
    os.close(fd)


@pytest.mark.parametrize(
    "entry",
    [
        ["x", "float32", [10**9], 0],
        ["x", "float32", [2**62, 2**62], 0],
        ["x", "float32", [1], 2**40],
        ["x", "float32", [1], 4],
        ["x", "float32", [1], -64],
        ["x", "float32", [-1], 0],
        ["x", "object", [1], 0],
        ["x", "float32", ["1"], 0],
        ["x", "float32", [1] * 9, 0],
    ],
)
def test_descriptions_outside_the_segment(entry: list[object]) -> None:
    """An array that would not lie inside the file, or of a strange type, is refused before it is made."""
    fd, _ = pack(ARRAYS)
    with pytest.raises(EnvironmentMismatch, match="expected an array inside the segment"):
        attach(fd, [entry])
    os.close(fd)


def test_descriptors_that_are_no_segment() -> None:
    """A closed descriptor, a plain file and a memory file without seals are refused."""
    unsealed = os.memfd_create("test")
    pipe, other = os.pipe()
    for fd in (10**6, unsealed, pipe):
        with pytest.raises(EnvironmentMismatch, match="memory file"):
            attach(fd, [])
    for fd in (unsealed, pipe, other):
        os.close(fd)


def test_too_little_memory() -> None:
    """More than the machine has or gives is 78 with the size needed, and no descriptor stays open."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(EnvironmentMismatch, match=f"expected {2**50} bytes"):
        pack({"x": np.broadcast_to(np.zeros(1, np.uint8), 2**50)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(EnvironmentMismatch, match="expected 8192 bytes of memory, got: File too large"):
            pack({"x": np.zeros(8192, np.uint8)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(os.listdir("/proc/self/fd")) == before


def test_another_process_sees_the_same_bytes() -> None:
    """A process that inherits the descriptor reads what was packed."""
    fd, description = pack(ARRAYS)
    program = (
        "import json, sys; from distbp.data import attach;"
        "sys.stdout.buffer.write(attach(int(sys.argv[1]), json.loads(sys.argv[2]))['x'].tobytes())"
    )
    command = [sys.executable, "-c", program, str(fd), json.dumps(description)]
    seen = subprocess.run(command, pass_fds=[fd], capture_output=True, check=True, timeout=60).stdout
    os.close(fd)
    assert seen == ARRAYS["x"].tobytes()
