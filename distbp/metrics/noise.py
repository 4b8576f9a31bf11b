"""The gradient noise scale: how many samples a batch should have, told by the gradients themselves.

S. McCandlish, J. Kaplan, D. Amodei et al., 2018, "An empirical model of large-batch training", appendix A.1.
Let G be the true gradient and tr Σ the variance of that of one sample.  The mean gradient of b samples has

    E|G_b|² = |G|² + tr Σ / b,

so two batch sizes, here the micro-batch b and the global batch B that it is a part of, give estimators of
both without a bias:

    |G|²  ~ (B |G_B|² - b |G_b|²) / (B - b),        tr Σ ~ (|G_b|² - |G_B|²) / (1/b - 1/B).

Both are noisy and their ratio would have a bias, so each is averaged over the looks (`closer_look.py`), and
B_simple = tr Σ / |G|² is taken of the averages.  Far below it a larger batch costs little more steps' worth
of samples; far above it most samples of a batch are wasted.

It needs at least two micro-batches in a step.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["average", "estimate", "noise_scale"]

_KEEP = 0.9
"""Share of an average that the next look leaves: the last ten looks count."""

_LEAST_LOOKS = 5
"""Looks before an average says anything."""


def estimate(small: float, big: float, micro_batch: int, batch_size: int) -> tuple[float, float]:
    """Return the estimates of |G|² and tr Σ from |G_b|², the mean of the micro-batches, and |G_B|²."""
    b, B = micro_batch, batch_size
    return (B * big - b * small) / (B - b), (small - big) / (1 / b - 1 / B)


def average(old: float, new: float, looks: int) -> float:
    """Return the average that a look moves; the first `looks` weigh alike."""
    keep = min(_KEEP, looks / (looks + 1))
    return keep * old + (1 - keep) * new


def noise_scale(averages: Sequence[float], looks: float) -> float | None:
    """Return tr Σ / |G|² in samples, or None while too few looks, or noise alone, give no number."""
    signal, trace = averages
    if looks < _LEAST_LOOKS or signal <= 0 or trace <= 0:
        return None
    return trace / signal
