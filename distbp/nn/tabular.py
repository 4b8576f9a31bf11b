"""A network for tables: rows for codes, products of features, fully connected layers.

    columns -> numbers, and a trained row for each code -> [these | the products of each two] -> mlp

The rows are those of collaborative filtering, the products let one depend on another, as a user's taste on a
film's kind (Rendle, "Factorization machines", ICDM 2010), and the layers behind them see all of it
(Cheng et al., "Wide & deep learning for recommender systems", 2016).
"""

from __future__ import annotations

from collections.abc import Sequence

from distbp.errors import ConfigError
from distbp.nn import initial
from distbp.nn.activations import ReLU
from distbp.nn.blocks import Parallel, Sequential
from distbp.nn.column_embedding import ColumnEmbedding
from distbp.nn.feature_cross import FeatureCross
from distbp.nn.layer import Layer
from distbp.nn.linear import Linear
from distbp.nn.shape import Flatten

__all__ = ["tabular"]


def tabular(
    *,
    outputs: int,
    codes: Sequence[tuple[int, int]] = (),
    hidden: Sequence[int] = (128, 64),
    width: int = 8,
    cross: int = 2,
) -> Layer:
    """Return a network for samples (F,), in which `codes` names columns of codes and their number of rows.

    A code has a row of `width` numbers; `cross` is how many features go into one product, 0 for no products.
    Raises ConfigError, when it is built, for more products than can be (`FeatureCross`).
    """
    if cross and cross < 2:
        raise ConfigError(f"model.cross: expected 0 for no products, or at least 2 features, got {cross!r}")
    layers: list[Layer] = [Flatten(), ColumnEmbedding(codes, width)]
    if cross:
        layers.append(Parallel(Sequential(), FeatureCross(cross)))
    for units in hidden:
        layers += [Linear(units, initial=initial.he_normal), ReLU()]
    return Sequential(*layers, Linear(outputs, initial=initial.lecun_normal))
