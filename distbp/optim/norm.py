"""The norm of a gradient from sums over fixed blocks, and the clip factor that follows from it.

A sum changes its bits when its range changes.  So the ranges are fixed by the layout of the parameters
alone: each tensor is cut into blocks from its own beginning.  Whoever owns a block computes its sum, and a
block has the same sum in every lane, at every worker count.  Gaps between tensors (padding for alignment)
are in no block.

The sum of squares of a block is a float32 dot product.  Where that is not finite it is done again in float64,
whose range holds every square of a float32 number: what is still not finite then is a gradient that is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["BLOCK", "blocks", "clip_factor", "global_norm", "is_finite", "measure"]

# Keeps a division by a gradient of zeros harmless; PyTorch's clip_grad_norm_ uses the same number.
_NORM_GUARD = 1e-6


BLOCK = 16_384
"""Elements of a block; a tensor's last one may be shorter."""


def blocks(layout_borders: Iterable[tuple[int, int]], block: int = BLOCK) -> list[tuple[int, int]]:
    """Return half-open ranges of at most `block` elements that cover each tensor, cut from its beginning.

    `layout_borders` holds the offset and the length of each tensor, in elements; the order is kept.
    """
    assert block > 0, f"a block of {block} elements covers nothing"
    return [
        (start, min(start + block, offset + length))
        for offset, length in layout_borders
        for start in range(offset, offset + length, block)
    ]


def measure(
    gradient: NDArray[np.float32],
    ranges: Sequence[tuple[int, int]],
    sums: NDArray[np.float64],
    *,
    offset: int = 0,
) -> None:
    """Write the sum of squares of `gradient` over each range into `sums`, not finite if the gradient is not.

    `gradient` is the slice of the whole vector that begins at element `offset`; ranges count from the whole's
    beginning and must lie inside the slice.  Shapes: (n,), (k,), (k,).
    """
    assert len(ranges) == len(sums), f"{len(ranges)} blocks, but room for {len(sums)} sums"
    with np.errstate(over="ignore", invalid="ignore"):
        for index, (start, stop) in enumerate(ranges):
            assert 0 <= start - offset <= stop - offset <= len(gradient), (
                f"block [{start}, {stop}) is outside the slice of {len(gradient)} elements at {offset}"
            )
            part = gradient[start - offset : stop - offset]
            square = float(np.dot(part, part))
            if not math.isfinite(square):
                wide = part.astype(np.float64)
                square = float(np.dot(wide, wide))
            sums[index] = square


def is_finite(sums: NDArray[np.float64]) -> bool:
    """Say whether the whole gradient is finite: the verdict that every worker reaches from the same sums."""
    return bool(np.isfinite(sums).all())


def global_norm(sums: NDArray[np.float64]) -> float:
    """Return the Euclidean norm of the summed gradient; the sums of all blocks, of all lanes, must be there.

    `math.fsum` rounds once, so the result does not depend on how NumPy's own sum is compiled.
    """
    return math.sqrt(math.fsum(sums)) if is_finite(sums) else math.inf


def clip_factor(sums: NDArray[np.float64], weight_sum: float, clip_norm: float | None) -> float:
    """Return the factor that shortens the mean gradient to `clip_norm` at most (Pascanu et al., ICML 2013).

    The caller skips a step whose gradient is not finite or whose samples weigh nothing; neither has a factor.
    """
    if clip_norm is None:
        return 1.0
    assert weight_sum > 0, f"a batch of weight {weight_sum} has no mean gradient"
    norm_of_mean = global_norm(sums) / weight_sum
    assert math.isfinite(norm_of_mean), "a gradient that is not finite must be skipped, not clipped"
    return min(1.0, clip_norm / (norm_of_mean + _NORM_GUARD))
