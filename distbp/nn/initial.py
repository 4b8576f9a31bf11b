"""How parameters start: each function fills one tensor from the stream keyed by (seed, "init:" + name).

A tensor's start depends on its name, its shape and the seed alone, so that adding a layer elsewhere, or
making the values on another worker, changes nothing.  Values are drawn in float64 and rounded once, by the
Network.  With fan_in (fan_out) the number of inputs (outputs) that a weight connects, the variances are

    he       2 / fan_in               He et al., "Delving deep into rectifiers", ICCV 2015: ReLU and its kin
    glorot   2 / (fan_in + fan_out)   Glorot and Bengio, AISTATS 2010: tanh, sigmoid
    lecun    1 / fan_in               LeCun et al., "Efficient BackProp", 1998: linear outputs

The uniform forms draw from (-a, a) with a = sqrt(3 variance).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from distbp import random
from distbp.nn.layer import Initial, Parameter

__all__ = [
    "glorot_normal",
    "glorot_uniform",
    "he_normal",
    "he_uniform",
    "lecun_normal",
    "lecun_uniform",
    "ones",
    "scaled",
    "small_normal",
    "zeros",
]


def he_normal(parameter: Parameter, seed: int) -> NDArray[np.float64]:
    """Return normal values of variance 2 / fan_in."""
    return _normal(parameter, seed, 2.0 / parameter.fan_in)


def he_uniform(parameter: Parameter, seed: int) -> NDArray[np.float64]:
    """Return uniform values of variance 2 / fan_in."""
    return _uniform(parameter, seed, 2.0 / parameter.fan_in)


def glorot_normal(parameter: Parameter, seed: int) -> NDArray[np.float64]:
    """Return normal values of variance 2 / (fan_in + fan_out)."""
    return _normal(parameter, seed, 2.0 / (parameter.fan_in + parameter.fan_out))


def glorot_uniform(parameter: Parameter, seed: int) -> NDArray[np.float64]:
    """Return uniform values of variance 2 / (fan_in + fan_out)."""
    return _uniform(parameter, seed, 2.0 / (parameter.fan_in + parameter.fan_out))


def lecun_normal(parameter: Parameter, seed: int) -> NDArray[np.float64]:
    """Return normal values of variance 1 / fan_in."""
    return _normal(parameter, seed, 1.0 / parameter.fan_in)


def lecun_uniform(parameter: Parameter, seed: int) -> NDArray[np.float64]:
    """Return uniform values of variance 1 / fan_in."""
    return _uniform(parameter, seed, 1.0 / parameter.fan_in)


def small_normal(parameter: Parameter, seed: int) -> NDArray[np.float64]:
    """Return normal values of deviation 0.02, as GPT-2 starts its embeddings (Radford et al., 2019)."""
    return _normal(parameter, seed, 0.02**2)


def scaled(initial: Initial, factor: float) -> Initial:
    """Return a start whose values are `factor` times those of `initial`."""

    def start(parameter: Parameter, seed: int) -> NDArray[np.float64]:
        return initial(parameter, seed) * factor

    return start


def zeros(parameter: Parameter, seed: int) -> NDArray[np.float64]:
    """Return zeros, whatever the seed: the start of a bias."""
    return np.zeros(parameter.shape)


def ones(parameter: Parameter, seed: int) -> NDArray[np.float64]:
    """Return ones, whatever the seed: the start of a gain."""
    return np.ones(parameter.shape)


def _normal(parameter: Parameter, seed: int, variance: float) -> NDArray[np.float64]:
    values = random.normal(parameter.size, seed, f"init:{parameter.name}")
    values *= math.sqrt(variance)
    return values.reshape(parameter.shape)


def _uniform(parameter: Parameter, seed: int, variance: float) -> NDArray[np.float64]:
    values = random.uniform(parameter.size, seed, f"init:{parameter.name}")
    values -= 0.5
    values *= 2.0 * math.sqrt(3.0 * variance)
    return values.reshape(parameter.shape)
