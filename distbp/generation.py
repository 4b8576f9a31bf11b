"""Continue a sequence with a language model: draw one token after the other from what the model expects.

The model sees a window of fixed length.  A shorter sequence is filled up behind its end: a position sees only
what is before it, so the filling changes nothing before it.  A longer one is cut at its beginning.

The numbers drawn are keyed by (seed, position), so the same model, prompt and seed give the same text on
every machine that computes the same bits.  Each token costs a pass over a whole window; nothing is remembered
from one to the next, which is fine for some thousand tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from distbp import random
from distbp.nn import Context, Network

__all__ = ["generate"]


def generate(
    network: Network, prompt: NDArray[np.int64], length: int, *, temperature: float, seed: int
) -> NDArray[np.int64]:
    """Return `prompt` (n,) and `length` tokens after it, n >= 1; `network` has its parameters.

    Probabilities are those of the scores divided by `temperature`; 0 takes the most likely token each time.
    """
    assert len(prompt) > 0, "the model needs a token to begin with"
    (window,) = network.input_shape
    tokens = np.concatenate([prompt, np.zeros(length, np.int64)])
    context = Context(training=False)
    x = np.zeros((1, 1, window), np.int64)
    for position in range(len(prompt), len(tokens)):
        seen = tokens[max(0, position - window) : position]
        x[0, 0, : len(seen)] = seen
        scores = network.forward(x, context)[0, 0, len(seen) - 1].astype(np.float64)
        tokens[position] = _draw(scores, temperature, seed, position)
    return tokens


def _draw(scores: NDArray[np.float64], temperature: float, seed: int, position: int) -> int:
    """Return a token drawn by the softmax of `scores / temperature`."""
    if temperature == 0:
        return int(np.argmax(scores))
    likely = np.cumsum(np.exp((scores - scores.max()) / temperature))
    drawn = random.uniform(1, seed, "generate", step=position)[0] * likely[-1]
    # Rounding could take a draw of almost 1 to the end of the sums, behind the last token.
    return min(int(np.searchsorted(likely, drawn, side="right")), len(scores) - 1)
