"""One copy of the data per host: arrays in a nameless memory file that every worker maps read-only.

`pack` writes the arrays into a memfd and seals it: from then on nobody, not even the owner, can shrink, grow
or write it, so a mapping can never end in SIGBUS and a wild pointer in a worker cannot damage the data.  The
memory is reserved before it is filled, so that too little of it is an error here and not a kill later.  The
descriptor is handed to workers by inheritance; the segment is gone when the last holder is.  It needs no
space in /dev/shm.

Rejected: `multiprocessing.shared_memory` (named segments survive a crash, and one larger than /dev/shm dies
by SIGBUS: FACTS 2), and mapping the user's file (it may be truncated while it is mapped).  Linux only.
"""

from __future__ import annotations

import errno
import fcntl
import math
import mmap
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp.errors import EnvironmentMismatch
from distbp.partition import round_up

__all__ = ["Description", "attach", "pack"]

ALIGNMENT = 64
TYPES = ("uint8", "uint16", "uint32", "int64", "float32", "float64")
MAX_DIMENSIONS = 8
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL

# One system call writes less than 2 GiB.
WRITE_BYTES = 1 << 30

# JSON-able: one [name, dtype, shape, offset] per array.
Description = list[list[Any]]


def pack(arrays: Mapping[str, NDArray[Any]]) -> tuple[int, Description]:
    """Return the descriptor of a sealed memory file with a copy of the arrays, and where each one lies in it.

    The caller owns the descriptor (it is close-on-exec) and may drop the arrays.  Raises EnvironmentMismatch
    if there is not enough memory.
    """
    description: Description = []
    end = 0
    for name, array in arrays.items():
        assert array.dtype.name in TYPES, f"{name}: expected one of {TYPES}, got {array.dtype}"
        offset = round_up(end, ALIGNMENT)
        description.append([name, array.dtype.name, list(array.shape), offset])
        end = offset + array.nbytes
    size = max(end, ALIGNMENT)
    fd = os.memfd_create("distbp-data", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        _reserve(fd, size)
        for array, (_, _, _, offset) in zip(arrays.values(), description, strict=True):
            _write(fd, array, offset)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd, description


def attach(fd: int, description: Description) -> dict[str, NDArray[Any]]:
    """Return read-only views of the arrays in a memory file that `pack` made.

    The mapping lives as long as a view does; `fd` may be closed.  Raises EnvironmentMismatch if the
    descriptor is not a sealed memory file or an array would not lie inside it.
    """
    try:
        size = os.fstat(fd).st_size
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise EnvironmentMismatch(
            f"shared data: expected a memory file as descriptor {fd}, got: {error.strerror}; start the "
            "worker "
            "through distbp"
        ) from error
    if seals & SEALS != SEALS:
        raise EnvironmentMismatch(f"shared data: expected a sealed memory file, got seals {seals:#x}")
    # A private mapping: kernels before 6.7 refuse a shared one of a sealed file.  Pages that nobody can write
    # are never copied, so all processes still share them.
    mapping = mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    return {entry[0]: _view(mapping, size, entry) for entry in description}


def _view(mapping: mmap.mmap, size: int, entry: list[Any]) -> NDArray[Any]:
    """Return one array of the mapping after checking that it lies inside."""
    name, dtype, shape, offset = entry
    numbers = [*shape, offset]
    sane = dtype in TYPES and len(shape) <= MAX_DIMENSIONS and all(type(n) is int and n >= 0 for n in numbers)
    if not sane or offset % ALIGNMENT or offset + math.prod(shape) * np.dtype(dtype).itemsize > size:
        raise EnvironmentMismatch(
            f"shared data: {name!r}: expected an array inside the segment of {size} bytes, got {dtype!r} "
            "of shape "
            f"{shape!r} at offset {offset!r}"
        )
    return np.frombuffer(mapping, dtype, math.prod(shape), offset).reshape(shape)


def _reserve(fd: int, size: int) -> None:
    """Give the file its size and its memory.  Raises EnvironmentMismatch if there is not enough."""
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cure = "use fewer samples or a machine with more memory"
    # The kernel would take what there is and look for a process to kill; so the hopeless case is refused
    # first.
    if size > present:
        raise EnvironmentMismatch(
            f"shared data: expected {size} bytes of memory, this machine has {present}; {cure}"
        )
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
            raise
        raise EnvironmentMismatch(
            f"shared data: expected {size} bytes of memory, got: {error.strerror}; {cure}"
        ) from error


def _write(fd: int, array: NDArray[Any], offset: int) -> None:
    """Write an array at `offset`, not through a mapping: the seal refuses writable mappings."""
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    done = 0
    while done < len(content):
        done += os.pwrite(fd, content[done : done + WRITE_BYTES], offset + done)
