"""The options that optimizers share, checked once: those that come from Python pass no configuration."""

from __future__ import annotations

import math

from distbp.errors import ConfigError

__all__ = ["check_decay", "check_epsilon", "check_share"]


def check_share(name: str, value: float) -> float:
    """Return a factor by which old values are kept, or raise ConfigError unless it is >= 0 and < 1."""
    if not 0 <= value < 1:
        raise ConfigError(f"expected a {name} >= 0 and < 1, got {value!r}")
    return float(value)


def check_decay(value: float) -> float:
    """Return the weight decay, or raise ConfigError unless it is finite and >= 0."""
    if not 0 <= value < math.inf:
        raise ConfigError(f"expected a finite weight_decay >= 0, got {value!r}")
    return float(value)


def check_epsilon(name: str, value: float) -> float:
    """Return a number to divide by, or raise ConfigError unless it is finite and > 0."""
    if not 0 < value < math.inf:
        raise ConfigError(f"expected a finite {name} > 0, got {value!r}")
    return float(value)
