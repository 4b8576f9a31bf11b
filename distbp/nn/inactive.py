"""Which units of a network do nothing: rectified units that stay at 0, S-shaped ones that stay at an end.

A unit is one output of an activation; behind a convolution it is a channel, at all of its places.  It is
inactive for some samples if none of them makes it pass a gradient back: a ReLU whose outputs are all 0, a
Sigmoid whose outputs are all within `_END` of 0 or 1, a Tanh likewise.  Few samples say little, because many
units answer to few inputs; who asks, asks about several micro-batches and joins the answers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from distbp.nn.activations import ReLU, Sigmoid, Tanh
from distbp.nn.network import Network, walk

__all__ = ["inactive_units"]

_END = 0.02
"""How near the end of its range an output is saturated: the slope there is 8 % of the steepest or less."""


def inactive_units(network: Network) -> dict[str, NDArray[np.bool_]]:
    """Return for each such layer, as "PLACE KIND", which units the first micro-batch left inactive: (units,).

    It reads what the last forward pass left in the layers and changes nothing.
    """
    found: dict[str, NDArray[np.bool_]] = {}
    for path, layer in walk(network.layer):
        if not isinstance(layer, ReLU | Sigmoid | Tanh):
            continue
        outputs = layer.outputs[0].reshape(-1, layer.outputs.shape[-1])
        if isinstance(layer, ReLU):
            idle = np.logical_not((outputs > 0).any(axis=0))
        else:
            low = -1.0 if isinstance(layer, Tanh) else 0.0
            room = (1.0 - low) * _END
            idle = np.logical_or(outputs < low + room, outputs > 1.0 - room).all(axis=0)
        found[f"{path} {type(layer).__name__}".strip()] = idle
    return found
