"""Who owns what: contiguous ranges of micro-batches for workers, of blocks for lanes, of a lane for hosts.

Everything here is arithmetic on integers; every process computes it for itself and gets the same answer,
so that no message ever carries a size.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

__all__ = ["default_micro_batch", "round_up", "split_blocks", "split_range"]


def split_range(total: int, parts: int, index: int) -> tuple[int, int]:
    """Return the half-open range `[start, stop)` of part `index` when `total` items go to `parts` owners.

    Ranges are contiguous, ordered, cover everything once, and their lengths differ by at most one.
    """
    assert parts > 0, f"cannot split among {parts} parts"
    assert 0 <= index < parts, f"part {index} of {parts} does not exist"
    return total * index // parts, total * (index + 1) // parts


def split_blocks(
    blocks: Sequence[tuple[int, int]], size: int, parts: int, index: int
) -> tuple[int, int, int, int]:
    """Return `(first, last, low, high)`: the blocks and the elements of part `index` of a vector.

    `blocks` are ordered element ranges of a vector of `size` elements; gaps between them (padding) go to the
    part on their left.  A part takes whole blocks, about `size / parts` elements; it may be empty.
    """
    starts = [start for start, _ in blocks]
    first, last = (bisect_left(starts, size * part / parts) for part in (index, index + 1))
    edges = [0, *starts[1:], size]
    return first, last, edges[first], edges[last]


def round_up(value: int, multiple: int) -> int:
    """Return the least multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def default_micro_batch(batch_size: int) -> int:
    """Return `batch_size / k` for the largest k in 8, 7, ..., 1 that divides it (DESIGN 2.2).

    So a run can be spread over up to k workers and gives the same bits for 1 to k of them.
    """
    largest = next(k for k in range(8, 0, -1) if batch_size % k == 0)
    return batch_size // largest
