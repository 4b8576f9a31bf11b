"""A language model: the decoder-only transformer, normalised before each part (Radford et al., 2019).

    codes (T,) -> embedding + positions -> L x [attention, MLP of 4 x the width] -> norm -> scores (T, V)

Position t sees the codes up to t and scores what follows it, so one sample of T codes is T lessons.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from distbp.errors import ConfigError
from distbp.nn import initial
from distbp.nn.activations import GELU
from distbp.nn.attention import MultiHeadAttention
from distbp.nn.blocks import Residual, Sequential
from distbp.nn.embedding import Embedding, PositionalEmbedding
from distbp.nn.layer_norm import LayerNorm
from distbp.nn.linear import Linear

if TYPE_CHECKING:
    from distbp.nn.layer import Layer

__all__ = ["transformer"]


def transformer(*, outputs: int, layers: int = 4, heads: int = 4, width: int = 128) -> Layer:
    """Return a model for samples of T codes below `outputs`, with `outputs` scores at each position.

    What is added to the residual path starts smaller by √(2 layers), so that its variance does not grow with
    the depth (the same paper, section 2.3).
    """
    if layers < 1 or heads < 1 or width < 1 or width % heads:
        raise ConfigError(
            f"transformer: expected at least one layer and a width that is a multiple of the heads, got "
            f"{layers!r} layers, {heads!r} heads, width {width!r}"
        )
    into_path = initial.scaled(initial.lecun_normal, 1.0 / math.sqrt(2.0 * layers))
    blocks: list[Layer] = []
    for _ in range(layers):
        attention = MultiHeadAttention(heads, causal=True, initial_out=into_path)
        blocks += [
            Residual(Sequential(LayerNorm(), attention)),
            Residual(Sequential(LayerNorm(), Linear(4 * width), GELU(), Linear(width, initial=into_path))),
        ]
    return Sequential(
        Embedding(outputs, width),
        PositionalEmbedding(),
        *blocks,
        LayerNorm(),
        Linear(outputs),
    )
