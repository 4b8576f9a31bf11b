"""What goes wrong in a training, found from its history and said in words with a remedy.

Each rule is a pure function of the history (`history.py`) and returns a finding or None.  A rule speaks only
of what it can show: its evidence is part of the finding.  The limits are wide enough that healthy runs hear
nothing; `docs/LOG.md` has the runs that they were chosen by.

The rules that read ends of epochs stand in `epoch_rules.py`.  Rules later in `RULES` may stand for
consequences of earlier ones: a loss that does not fall because the gradient vanishes is not called
underfitting as well (`AFTER`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection

from distbp.metrics.epoch_rules import overfitting, settled, underfitting
from distbp.metrics.finding import STUCK, Finding
from distbp.metrics.history import History, Look
from distbp.metrics.words import share

__all__ = ["RULES", "Finding", "batch_advice", "diagnose"]

_LOOKS = 3
"""Looks in a row that must agree: one alone may be an odd batch."""

_FACTOR = 1000.0
"""How much the gradients of the first and the last weights may differ before it is no matter of shapes."""


def diagnose(history: History, said: Collection[str]) -> list[Finding]:
    """Return what is to be said now, given the names of what was said already."""
    found: list[Finding] = []
    for name, rule in RULES.items():
        known = {*said, *(one.name for one in found)}
        if name in known or known & AFTER.get(name, frozenset()):
            continue
        finding = rule(history)
        if finding is not None:
            found.append(finding)
    return found


def vanishing_gradient(history: History) -> Finding | None:
    """The gradient shrinks from the output to the input by `_FACTOR` or more, in three looks in a row."""
    ratios = _depth_ratios(history)
    if ratios is None or max(ratio[0] for ratio in ratios) > 1 / _FACTOR:
        return None
    weights = history.facts.weights
    typical = [_geometric_mean(column) for column in zip(*ratios, strict=True)]
    small = [name for name, part in zip(weights, typical, strict=True) if part < 1 / _FACTOR]
    factor = 1 / typical[0]
    squashing = history.facts.kinds & {"Sigmoid", "Tanh", "Softmax"}
    remedy = (
        "set model.activation=relu, whose slope is 1 and whose weights start as He et al. say, and with so "
        f"many layers optimizer.lr={_tenth(history.facts.peak_lr):g}; or take fewer layers (model.hidden)"
        if squashing
        else "take fewer layers (model.hidden), or a model with normalisation and shortcuts "
        "(model.name=resnet20 for images; nn.BatchNorm, nn.LayerNorm and nn.Residual in a script)"
    )
    return Finding(
        "vanishing_gradient",
        history.looks[-1].step,
        f"the gradient vanishes on its way to the input: at {weights[0]} it is {_times(factor)} smaller than "
        f"at {weights[-1]}, and too small to learn from in {_names(small)}",
        remedy,
        {"factor": factor, "layers": small, "gradient_norm": history.looks[-1].gradient_norm},
    )


def exploding_gradient(history: History) -> Finding | None:
    """The gradient grows towards the input, or far beyond what it began with, or is not finite."""
    looks, weights = history.looks, history.facts.weights
    remedy = "set optimizer.clip_norm=1.0, or a lower optimizer.lr"
    if history.skipped:
        step = history.skipped[0]
        message = f"the gradient of step {step} is not finite, and the step was skipped"
        return Finding("exploding_gradient", step, message, remedy, {"skipped": history.skipped[:10]})
    ratios = _depth_ratios(history)
    if ratios is not None and min(ratio[0] for ratio in ratios) > _FACTOR:
        factor = _geometric_mean([ratio[0] for ratio in ratios])
        return Finding(
            "exploding_gradient",
            looks[-1].step,
            f"the gradient explodes on its way to the input: at {weights[0]} it is {_times(factor)} larger "
            f"than at {weights[-1]}",
            "begin with smaller weights (nn.initial.he_normal for ReLU), put a norm between the layers, or "
            "set optimizer.clip_norm=1.0",
            {"factor": factor, "gradient_norm": looks[-1].gradient_norm},
        )
    norms = [math.hypot(*look.gradient_norm.values()) for look in looks if look.gradient_norm]
    if len(norms) > _LOOKS and norms[-1] > 100 * max(norms[:_LOOKS]):
        factor = norms[-1] / max(norms[:_LOOKS])
        message = (
            f"the norm of the gradient is {norms[-1]:.3g}, {_times(factor)} what it was at the beginning"
        )
        evidence = {"factor": factor, "norm": norms[-1], "before": max(norms[:_LOOKS])}
        return Finding("exploding_gradient", looks[-1].step, message, remedy, evidence)
    return None


def learning_rate_too_high(history: History) -> Finding | None:
    """Steps change the weights by several percent, and the loss rises, or does not fall, or they go on so."""
    looks, reference = history.looks, history.reference
    if not looks or not math.isfinite(reference):
        return None
    changes = [_median_change(look, history.facts.weights) for look in looks]
    shown = _shown_by_the_loss(history, changes)
    if shown is None:
        return None
    largest, lr = max(changes), max(look.lr for look in looks)
    # What the first step changes goes with the rate, and a tenth may be far too high as well.
    lower = float(f"{lr * 0.01 / changes[0]:.1g}") if changes[0] > 10 else _tenth(lr)
    by = f"{_times(largest)} their size" if largest >= 2 else f"{share(largest)} of their size"
    return Finding(
        "learning_rate_too_high",
        history.step,
        f"the learning rate of {lr:g} is too high: a step changed the weights by {by}, "
        f"where 0.1 % to 1 % is usual, and {shown}",
        f"begin anew with optimizer.lr={lower:g}; distbp lr-find measures which rate fits",
        {"lr": lr, "update_ratio": largest, "loss": looks[-1].loss, "first_loss": looks[0].loss},
    )


def _shown_by_the_loss(history: History, changes: list[float]) -> str | None:
    """Say how the loss shows that steps which change the weights by `changes` are too large, if it does."""
    looks, reference, largest = history.looks, history.reference, max(changes)
    first, last = looks[0].loss, looks[-1].loss
    if history.skipped:
        at = history.skipped[0]
        return f"the gradient of step {at} was not finite" if largest >= 0.03 else None
    if len(looks) < _LOOKS:
        return None
    worst = max(look.loss for look in looks[1:])
    best = min(look.loss for look in looks[1:])
    if largest >= 0.01 and worst > 2 * max(reference, first):
        return f"the loss rose to {worst:.3g}, from {first:.3g} in the first step"
    if largest >= 0.02 and best <= 0.9 * reference and last >= reference:
        return f"the loss, once {best:.3g}, is back at {last:.3g}, and knowing nothing gives {reference:.3g}"
    if largest >= 0.03 and len(looks) > _LOOKS and min(look.loss for look in looks[2:]) >= STUCK * reference:
        return f"the loss is {last:.3g}, and knowing nothing gives {reference:.3g}"
    # So large a first step throws units where they learn no more; the biases of the last ones still do.
    still = len(looks) > _LOOKS and abs(last - looks[-2].loss) <= 0.02 * last
    if (
        changes[0] >= 0.3
        and still
        and last > 0.5 * reference
        and looks[-2].lr >= 0.25 * history.facts.peak_lr
    ):
        return f"the loss stands still at {last:.3g}, {last / reference:.0%} of that of knowing nothing"
    # The one weight of a linear model may be small because that is right.
    if len(history.facts.weights) > 1 and min(changes[-_LOOKS:]) >= 0.03:
        return f"the loss is {last:.3g}"
    return None


def learning_rate_too_low(history: History) -> Finding | None:
    """Steps hardly change any weights at the full rate, and the loss is still near where it began."""
    facts, reference = history.facts, history.reference
    full = [look for look in history.looks[1:] if look.lr >= 0.5 * facts.peak_lr and look.update_ratio]
    if len(full) < _LOOKS or not full[-1].loss > 0.6 * reference:
        return None
    largest = max(look.update_ratio.get(name, 0.0) for look in full for name in facts.weights)
    if not 0 < largest < 0.001:
        return None
    higher = float(f"{facts.peak_lr * 10:.1g}")
    return Finding(
        "learning_rate_too_low",
        full[-1].step,
        f"the learning rate of {facts.peak_lr:g} is too low: no step changes any weights by more than "
        f"{share(largest)} of their size, where 0.1 % to 1 % is usual, and the loss of {full[-1].loss:.3g} "
        f"is still {full[-1].loss / reference:.0%} of that of knowing nothing",
        f"begin anew with optimizer.lr={higher:g}; distbp lr-find measures which rate fits",
        {"lr": facts.peak_lr, "update_ratio": largest, "loss": full[-1].loss},
    )


def dead_units(history: History) -> Finding | None:
    """Half of the rectified units of a layer give 0 whatever comes, so no gradient reaches their weights."""
    return _inactive(
        "dead_units",
        history,
        ("ReLU",),
        "units are dead, they give 0 for every sample and learn no more",
        "begin anew with a lower optimizer.lr, or with model.activation=leaky_relu",
    )


def saturated_units(history: History) -> Finding | None:
    """Half of the S-shaped units of a layer stay at an end of their range, where the slope is nearly 0."""
    return _inactive(
        "saturated_units",
        history,
        ("Sigmoid", "Tanh"),
        "units are saturated, they stay at an end of their range whatever comes, and hardly learn",
        "normalise the data (data.normalize=auto), begin with smaller weights or a lower optimizer.lr, "
        "or set model.activation=relu",
    )


def _inactive(
    name: str, history: History, kinds: tuple[str, ...], message: str, remedy: str
) -> Finding | None:
    """Return a finding if half of the units, or more, of a layer of these kinds are inactive."""
    shares = history.looks[-1].inactive if history.looks else {}
    idle = {layer: part for layer, part in shares.items() if layer.endswith(kinds) and part >= 0.5}
    if not idle:
        return None
    named = ", ".join(f"{part:.0%} of layer {layer}" for layer, part in idle.items())
    return Finding(name, history.looks[-1].step, f"{message}: {named}", remedy, {"inactive": idle})


def loss_spike(history: History) -> Finding | None:
    """The loss jumped to a multiple of what was usual."""
    spike = history.spike
    if spike is None:
        return None
    return Finding(
        "loss_spike",
        spike.step,
        f"the loss jumped from {spike.usual:.3g} to {spike.loss:.3g}",
        "if it comes again, set optimizer.clip_norm=1.0 or a lower optimizer.lr, and look for odd samples in "
        "the data (distbp evaluate --suspects)",
        {"loss": spike.loss, "usual": spike.usual},
    )


RULES: dict[str, Callable[[History], Finding | None]] = {
    "learning_rate_too_high": learning_rate_too_high,
    "exploding_gradient": exploding_gradient,
    "vanishing_gradient": vanishing_gradient,
    "dead_units": dead_units,
    "saturated_units": saturated_units,
    "learning_rate_too_low": learning_rate_too_low,
    "loss_spike": loss_spike,
    "overfitting": overfitting,
    "underfitting": underfitting,
    "settled": settled,
}
"""Name -> rule; causes before what follows from them."""

_CAUSES = frozenset({"learning_rate_too_high", "exploding_gradient", "vanishing_gradient", "dead_units"})
AFTER: dict[str, frozenset[str]] = {
    "exploding_gradient": frozenset({"learning_rate_too_high"}),
    "vanishing_gradient": frozenset({"learning_rate_too_high"}),
    "dead_units": frozenset({"learning_rate_too_high"}),
    "saturated_units": frozenset({"learning_rate_too_high"}),
    "loss_spike": frozenset({"learning_rate_too_high", "exploding_gradient"}),
    "learning_rate_too_low": frozenset({"vanishing_gradient", "dead_units"}),
    "overfitting": frozenset({"learning_rate_too_high", "exploding_gradient"}),
    "underfitting": _CAUSES | {"learning_rate_too_low", "saturated_units"},
    "settled": _CAUSES | {"underfitting", "overfitting"},
}
"""Rule -> those that explain it: where one of them has spoken, it keeps silent."""


def batch_advice(noise_scale: float | None, batch_size: int) -> str | None:
    """Say which batch size the gradient noise suggests, or None where the one that was taken is near."""
    if noise_scale is None or batch_size / 8 <= noise_scale <= batch_size * 8:
        return None
    near = 2 ** round(math.log2(max(noise_scale, 1)))
    if noise_scale > batch_size:
        return (
            f"the gradient noise scale is {noise_scale:.3g} samples: batches up to about {near} need hardly "
            f"more samples than batches of {batch_size}, in fewer steps (train.batch_size)"
        )
    return (
        f"the gradient noise scale is {noise_scale:.3g} samples: batches of about {near} learn in nearly as "
        f"few steps as batches of {batch_size}, from fewer samples (train.batch_size)"
    )


def _depth_ratios(history: History) -> list[list[float]] | None:
    """Return for the last looks the gradient of each weight against that of the last one; None: not known.

    A gradient of exactly 0 does not shrink on its way, it is cut off: that is for `dead_units`.
    """
    weights = history.facts.weights
    looks = history.looks[-_LOOKS:]
    if len(weights) < 3 or len(looks) < _LOOKS:
        return None
    rows = [[look.gradient_norm.get(name, 0.0) for name in weights] for look in looks]
    if any(min(row) <= 0 or not all(map(math.isfinite, row)) for row in rows):
        return None
    return [[norm / row[-1] for norm in row] for row in rows]


def _tenth(lr: float) -> float:
    """Return a tenth of a rate, with one digit."""
    return float(f"{lr / 10:.1g}")


def _median_change(look: Look, weights: tuple[str, ...]) -> float:
    """Return the median over the weights of the share that the step changed them by; 0: nothing is known."""
    changes = [look.update_ratio[name] for name in weights if name in look.update_ratio]
    return statistics.median(changes) if changes else 0.0


def _geometric_mean(values: list[float] | tuple[float, ...]) -> float:
    """Return the geometric mean of positive values."""
    return math.exp(statistics.fmean(map(math.log, values)))


def _times(factor: float) -> str:
    """Return '12,000 times'."""
    digits = 10 ** max(0, int(math.log10(factor)) - 1) if math.isfinite(factor) and factor >= 1 else 1
    return f"{round(factor / digits) * digits:,} times" if math.isfinite(factor) else "infinitely"


def _names(names: list[str]) -> str:
    """Return 'a', 'a and b' or 'a to z (9 tensors)'."""
    if len(names) <= 2:
        return " and ".join(names)
    return f"{names[0]} to {names[-1]} ({len(names)} layers)"
