"""`distbp bench gemm`, `memory`, `barrier`, `allreduce`: parts of a step beside what the machine can do."""

from __future__ import annotations

from typing import Any

from distbp.bench.together import together
from distbp.environment import available_cores

__all__ = ["measure_allreduce", "measure_barrier", "measure_gemm", "measure_memory"]

ROWS = (8, 16, 32, 64, 128, 256)
INNER, OUTER = 1024, 1024
ALLREDUCE_BYTES = (1 << 12, 1 << 17, 1 << 20, 10 << 20, 100 << 20)
ROUNDS = 2000


def measure_gemm(quick: bool) -> list[dict[str, Any]]:
    """Return the rate of products of some rows with a 1,024 x 1,024 matrix, as `Linear` makes them.

    The machine's best is the fastest product of them and of a large square one; both with one process, and
    with one on each core.
    """
    size = 512 if quick else 2048
    square = ((size, size), (size, size), (False, False))
    items = [square, *[((rows, INNER), (INNER, OUTER), (False, False)) for rows in ROWS]]
    found = []
    for processes in sorted({1, min(2, available_cores())}):
        rates = []
        for item, seconds in zip(items, together("product", items, processes), strict=True):
            (rows, inner), (_, outer), _ = item
            rates.append(2e-9 * rows * inner * outer / max(seconds))
        best = max(rates)
        found += [
            {"processes": processes, "rows": rows, "gflops": rate, "best_gflops": best, "ratio": rate / best}
            for rows, rate in zip(ROWS, rates[1:], strict=True)
        ]
    return found


def measure_memory(quick: bool) -> list[dict[str, Any]]:
    """Return the bandwidth of a copy and of an update, in GB/s of one core, read and written bytes together.

    The machine's best is the copy; the update is what SGD with momentum does, in cache-sized pieces.
    """
    sizes = [1 << power for power in ((16, 20) if quick else (16, 19, 22, 25, 28))]
    found = []
    for processes in sorted({1, min(2, available_cores())}):
        copies, updates = (together(what, sizes, processes) for what in ("copy", "update"))
        for size, copied, updated in zip(sizes, copies, updates, strict=True):
            best, own = size / max(copied) / 1e9, size / max(updated) / 1e9
            entry = {"processes": processes, "bytes": size, "copy_gb_s": best, "update_gb_s": own}
            found.append(entry | {"ratio": own / best})
    return found


def measure_barrier(quick: bool) -> list[dict[str, Any]]:
    """Return the microseconds of distbp's barrier; the best is a word that two processes pass to and fro.

    A passed word is the least that two interpreters can do: one store that the other one sees.
    """
    rounds = 200 if quick else ROUNDS
    best = 1e6 * seconds_of_word(rounds)
    found = []
    for workers in (2, 4, 8):
        spent = 1e6 * max(together("wait", [rounds], workers)[0])
        entry = {"workers": workers, "oversubscribed": workers > available_cores()}
        found.append(entry | {"barrier_us": spent, "word_us": best, "ratio": best / spent})
    return found


def seconds_of_word(rounds: int) -> float:
    """Return the seconds in which a word goes from one process to another."""
    return float(min(together("word", [rounds], 2, 4096)[0]))


def measure_allreduce(quick: bool) -> list[dict[str, Any]]:
    """Return the ms in which two workers add their gradients in shared memory, two barriers included.

    The bound is the traffic, a read of each gradient and a write of one, at the bandwidth of a copy, and a
    word that is passed for each barrier.
    """
    workers = min(2, available_cores())
    sizes = ALLREDUCE_BYTES[: 3 if quick else None]
    items = [(size, max(10, min(500, (200 << 20) // size))) for size in sizes]
    spent = together("reduce", items, workers, workers * max(sizes))
    copied = [max(256, 2 * size // workers) for size in sizes]
    copies = together("copy", copied, workers)
    barriers = 2e3 * seconds_of_word(200 if quick else ROUNDS) if workers > 1 else 0.0
    found = []
    for size, times, walked, seconds in zip(sizes, spent, copied, copies, strict=True):
        moved = (workers + 1) * size / workers if workers > 1 else 0
        reached, least = 1e3 * max(times), barriers + 1e3 * max(seconds) * moved / walked
        entry = {"workers": workers, "bytes": size, "ms": reached, "bound_ms": least}
        found.append(entry | {"ratio": least / reached})
    return found
