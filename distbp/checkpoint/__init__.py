"""One durable, verified checkpoint format that knows nothing of worker count.

Theory of operation
===================

**What is stored.**  A `Snapshot`: a step, named tensors, and metadata.  The state of training after a step is
a pure function of configuration and data, so nothing here mentions ranks, lanes or hosts; a checkpoint of
four workers is a checkpoint of one.

**The folder.**  `RUN/checkpoints/step-00001000/` holds three files and nothing else that is ever read:

    state.safetensors   every tensor, in the public safetensors layout, written by `layout.py`
    metadata.json       identity, preprocessing, environment: whatever is JSON
    manifest.json       size, CRC-32 and SHA-256 of the other two; step, format version; its own SHA-256

Every byte of the folder is thus under a hash: the first two files under the manifest, the manifest under
itself.

**Saving** (`writing.py`).  A name without suffix is a promise that the content is complete and on the disk.
It is kept by the order of the system calls:

    mkdir step-N.tmp-X  ->  write, fsync each file  ->  write, fsync manifest  ->  fsync the folder
        ->  rename to step-N  ->  fsync the parent  ->  only now are older checkpoints removed

A kill or a power cut before the rename leaves a `.tmp-` folder, which nobody reads and `remove_leftovers`
deletes; after it, a whole checkpoint.  Removal goes the other way: first the name is renamed to `.tmp-`, then
the files go, so that no half-removed folder ever carries a complete name.  After a failed fsync the kernel
may have dropped the dirty pages and marked them clean, so that a second fsync would answer "fine": nothing is
retried, the files are removed, and the next save starts with new ones under a new name (X is the number of
the job's start and a random part).

The work is done in blocks of 1 MiB.  After each block `pause` is called, so that a save beside training can
give way (`saver.py`), and the system is asked to begin with the writing and to keep nothing in memory.

**Loading** (`reading.py`).  Everything is verified before anything is returned: each byte is hashed on its
way into the arrays, and no array leaves before the hashes held.  `newest_verified` walks from the newest to
older ones and reports each that it passes over; a path that the user named never falls back.

**Hostile input.**  Claims inside a file are checked against limits and against the real size of the file
before anything is allocated (`strict_json.py`, `layout.py`).  Symbolic links, pipes and devices are refused
at open.  Nothing is unpickled.  The limits exist only on the reading side: `save` reads its own headers back
through them, so whatever it writes can be loaded.

**Two checksums.**  SHA-256 decides at load, and is what two checkpoints are compared by.  CRC-32 alone, 2.5
times cheaper here, decides which old checkpoints may be removed: there accidental damage is the question,
and an error costs an old checkpoint, not a run.

**Limits admitted.**  A bit that flips in memory before it is hashed is stored and verified (the lane
checksums of the arena are for that).  A new file is not read back; the next save does so, from the disk,
before it removes an older one.  Hashing runs on one thread.  The entries of a header are Python objects while
it is read: 19 times the room of its text where the entries are shortest, and a text has at most 16 MiB
(`python -m tests.hostile.corpus measure`).

**Tried and rejected.**  The safetensors library for writing: version 0.8.0 writes wrong numbers for arrays
that are not C-contiguous, has no checksum and never calls fsync.  `.npy` and `.npz`: 396 of 400 flipped bits
load silently, and a 65 kB archive can claim 1 GiB.  mmap for reading: a file that shrinks is SIGBUS.  One
file with the hash at its end: it would save an fsync, and no other tool could read it.
"""

from __future__ import annotations

from distbp.checkpoint.folders import list_checkpoints, newest_verified, remove_leftovers
from distbp.checkpoint.reading import describe, load, verify
from distbp.checkpoint.snapshot import Snapshot, parameters_sha256, state_sha256
from distbp.checkpoint.writing import clean_up, save

__all__ = [
    "Snapshot",
    "clean_up",
    "describe",
    "list_checkpoints",
    "load",
    "newest_verified",
    "parameters_sha256",
    "remove_leftovers",
    "save",
    "state_sha256",
    "verify",
]
