"""Losses: sums over the samples of each micro-batch, and the gradient of those sums.

A loss returns sums and the weight they stand for, not means: the mean over the global batch is taken once,
after the sums of all micro-batches have been added elsewhere.  Sums over samples are float64, so that the
reported loss does not depend on float32 rounding of long sums.

A mask (1 or 0 for each sample, shape (G, b)) silences the samples that fill up the last batch of an
evaluation; their loss, weight and count are 0.  Losses know neither the model nor how sums are added.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from distbp.errors import ConfigError, DataError
from distbp.nn.layer import Array, Buffered, Shape

__all__ = ["BinaryCrossEntropy", "Huber", "Loss", "MeanSquaredError", "SoftmaxCrossEntropy", "Sums"]

Kind: TypeAlias = Literal["classification", "regression"]


@dataclass
class Sums:
    """For each micro-batch, summed over its samples, each (G,).

    Weighted losses, weights, correct answers, and the predictive entropy -Σ_c p_c log p_c of the answers, in
    nats and not weighted; 0 where the loss is no classification, or a probability is not a number.  A loss
    that leaves it out has none.
    """

    loss: NDArray[np.float64]
    weight: NDArray[np.float64]
    correct: NDArray[np.float64]
    entropy: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))


class Loss(Buffered, ABC):
    """A number for each sample, from the model's output and the target.

    As with layers: arguments are not written to, results hold until the next call, and the values of
    micro-batch g do not depend on G.
    """

    @property
    @abstractmethod
    def kind(self) -> Kind:
        """What targets are: class numbers, or numbers."""

    _answers = 1

    @property
    def answers(self) -> int:
        """How many answers the built model gives for one sample: the positions of a sequence, else 1."""
        return self._answers

    @abstractmethod
    def build(self, output_shape: Shape) -> None:
        """Accept a model's output shape (without G, b), or raise ConfigError."""

    @abstractmethod
    def forward(self, output: Array, target: Array, mask: Array | None = None) -> Sums:
        """Return the sums for `output` of shape (G, b, *output_shape); DataError for an impossible target."""

    @abstractmethod
    def backward(self) -> Array:
        """Return the gradient of `Sums.loss` of the last forward for its output, in its shape and dtype."""


class SoftmaxCrossEntropy(Loss):
    """Cross entropy of softmax(output) against class numbers, with smoothing and class weights.

    For an answer with outputs z, class y, weights w_c, smoothing ε and nll_c = log Σ_j exp(z_j) - z_c,
    C classes:

        loss = (1-ε) w_y nll_y + ε/C Σ_c w_c nll_c,     weight = w_y,

    so loss sum / weight sum is what torch.nn.CrossEntropyLoss(weight, label_smoothing) returns.
    (Smoothing: Szegedy et al., "Rethinking the Inception architecture", CVPR 2016.)

    A model with outputs (*S, C) gives one answer at each place of S, as a language model does at each
    position; targets are then (*S,) for a sample, and loss and weight are summed over the places.
    """

    kind: Kind = "classification"

    def __init__(self, *, label_smoothing: float = 0.0, class_weights: Sequence[float] | None = None) -> None:
        if not 0.0 <= label_smoothing < 1.0:
            raise ConfigError(f"label_smoothing: expected a number in [0, 1), got {label_smoothing!r}")
        if class_weights is not None and not all(0.0 <= w < math.inf for w in class_weights):
            raise ConfigError(f"class_weights: expected finite numbers >= 0, got {class_weights!r}")
        self.label_smoothing = label_smoothing
        self.class_weights = None if class_weights is None else tuple(class_weights)

    def build(self, output_shape: Shape) -> None:
        """Accept (*S, C) with C >= 2, and class weights of that length."""
        if not output_shape or output_shape[-1] < 2 or math.prod(output_shape) < 1:
            raise ConfigError(
                f"SoftmaxCrossEntropy: expected a model with one output for each of at least two classes, "
                f"got output shape {output_shape!r}"
            )
        *places, num_classes = output_shape
        self._answers = math.prod(places)
        if self.class_weights is not None and len(self.class_weights) != num_classes:
            raise ConfigError(
                f"class_weights: expected one for each of {num_classes} classes, "
                f"got {len(self.class_weights)!r}"
            )

    def forward(self, output: Array, target: Array, mask: Array | None = None) -> Sums:
        """Return the sums for integer `target` of shape (G, b, *S) with values in 0..C-1.

        `correct` counts the answers whose largest output is the target's; of equal outputs the first counts.
        """
        num_classes = output.shape[-1]
        _check_classes(target, output.shape[:-1], num_classes)
        # z is shifted by its maximum, which leaves softmax and nll as they are and keeps exp in range.
        shifted = self.buffer("shifted", output.shape, output.dtype)
        row = self.buffer("row", (*output.shape[:-1], 1), output.dtype)
        np.subtract(output, np.maximum.reduce(output, axis=-1, keepdims=True, out=row), out=shifted)
        softmax = self._softmax = self.buffer("softmax", output.shape, output.dtype)
        np.exp(shifted, out=softmax)
        np.add.reduce(softmax, axis=-1, keepdims=True, out=row)
        np.divide(softmax, row, out=softmax)
        log_total = np.log(row[..., 0])
        # The places of the targets in the flattened outputs.
        self._places = np.arange(0, output.size, num_classes) + target.reshape(-1)

        weights = np.ones(num_classes) if self.class_weights is None else np.array(self.class_weights)
        weight = weights.astype(output.dtype)[target]
        self._at_target = (1.0 - self.label_smoothing) * weight
        loss = self._at_target * (log_total - shifted.reshape(-1).take(self._places).reshape(target.shape))
        if self.label_smoothing:
            self._spread = (weights * (self.label_smoothing / num_classes)).astype(output.dtype)
            loss += np.add.reduce(self._spread) * log_total - np.vecdot(shifted, self._spread)
        self._mask = mask
        correct = np.argmax(output, axis=-1) == target
        # -Σ p log p with log p = shifted - log_total and Σ p = 1.
        entropy = log_total - np.vecdot(softmax, shifted)
        sums = [_sum_samples(values, mask) for values in (loss, weight, correct, entropy)]
        return Sums(sums[0], sums[1], sums[2], _finite(sums[3]))

    def backward(self) -> Array:
        """Return ∂loss/∂z_c = (Σ_k q_k) softmax_c - q_c, with q_c = (1-ε) w_y [c = y] + ε/C w_c.

        Because loss = Σ_c q_c nll_c and ∂nll_c/∂z_k = softmax_k - [c = k].  Without weights and smoothing
        this is softmax - onehot(y).  The result takes the place of the softmax: call it once per forward.
        """
        gradient: Array = self._softmax
        total = self._at_target + np.add.reduce(self._spread) if self.label_smoothing else self._at_target
        np.multiply(gradient, total[..., np.newaxis], out=gradient)
        if self.label_smoothing:
            np.subtract(gradient, self._spread, out=gradient)
        gradient.reshape(-1)[self._places] -= self._at_target.reshape(-1)
        if self._mask is not None:
            np.multiply(gradient, _for_each_sample(self._mask, gradient), out=gradient)
        return gradient


class BinaryCrossEntropy(Loss):
    """Cross entropy of σ(output) against yes and no.

    For a sample with outputs z_o and targets t_o from 0 to 1, and weight 1:

        loss = 1/O Σ_o (max(z_o, 0) - z_o t_o + log(1 + exp(-|z_o|))),

    which is -t log σ(z) - (1 - t) log(1 - σ(z)) without overflow, and what
    torch.nn.BCEWithLogitsLoss returns.  A model with one output takes classes 0 and 1 (integers) as targets
    and is right where the output is on the right side of 0; one with several outputs takes a number for
    each, as for labels that may hold together.
    """

    def __init__(self) -> None:
        self._kind: Kind = "classification"

    @property
    def kind(self) -> Kind:
        """Classification with one output, regression with several."""
        return self._kind

    def build(self, output_shape: Shape) -> None:
        """Accept any output shape with at least one number."""
        _check_outputs("BinaryCrossEntropy", output_shape)
        self._kind = "classification" if output_shape == (1,) else "regression"

    def forward(self, output: Array, target: Array, mask: Array | None = None) -> Sums:
        """Return the sums for `target` (G, b) of classes 0 and 1, or of the output's shape from 0 to 1."""
        if self._kind == "classification":
            _check_classes(target, output.shape[:2], 2)
        wanted = _targets_like(output, target, "BinaryCrossEntropy")
        if target.size and not (target.min() >= 0 and target.max() <= 1):
            raise DataError(
                f"BinaryCrossEntropy: expected targets from 0 to 1, got {target.min()} to {target.max()}; "
                "numbers to predict are normalised unless data.normalize is 'none'"
            )
        # σ(z) = (1 + tanh(z/2)) / 2, as in Sigmoid; its difference to the target is the gradient.
        sigmoid = np.tanh(np.multiply(output, 0.5, out=self.buffer("sigmoid", output.shape, output.dtype)))
        self._difference = self.buffer("difference", output.shape, output.dtype)
        np.add(np.multiply(sigmoid, 0.5, out=sigmoid), 0.5, out=sigmoid)
        np.subtract(sigmoid, wanted, out=self._difference)
        self._mask = mask
        loss = np.log1p(np.exp(-np.abs(output))) + np.maximum(output, 0) - output * wanted
        loss /= math.prod(output.shape[2:])
        counted = np.ones(output.shape[:2])
        correct = (
            (output.reshape(target.shape) > 0) == target if self._kind == "classification" else 0 * counted
        )
        sums = [_sum_samples(values, mask) for values in (loss, counted, correct)]
        return Sums(sums[0], sums[1], sums[2], self._entropy(output, sigmoid, mask))

    def _entropy(self, output: Array, sigmoid: Array, mask: Array | None) -> NDArray[np.float64]:
        """Return the entropy log(1 + exp(-|z|)) + |z| (1 - σ(|z|)) of yes and no, summed."""
        if self._kind != "classification":
            return np.zeros(len(output))
        size = np.abs(output)
        entropy = np.log1p(np.exp(-size)) + size * np.minimum(sigmoid, 1 - sigmoid)
        return _finite(_sum_samples(entropy.reshape(output.shape[:2]), mask))

    def backward(self) -> Array:
        """Return ∂loss/∂z_o = (σ(z_o) - t_o) / O, because (log(1 + exp(z)))' = σ(z).  Once per forward."""
        return _scaled_for_samples(self._difference, 1.0, self._mask)


class MeanSquaredError(Loss):
    """loss = 1/O Σ_o (y_o - t_o)² for a sample with O outputs; the weight of a sample is 1."""

    kind: Kind = "regression"

    def build(self, output_shape: Shape) -> None:
        """Accept any output shape with at least one number."""
        _check_outputs("MeanSquaredError", output_shape)

    def forward(self, output: Array, target: Array, mask: Array | None = None) -> Sums:
        """Return the sums for `target` of the output's shape, or (G, b) where there is one output."""
        G, b = output.shape[:2]
        wanted = _targets_like(output, target, "MeanSquaredError")
        self._difference = self.buffer("difference", output.shape, output.dtype)
        np.subtract(output, wanted, out=self._difference, dtype=output.dtype)
        self._mask = mask
        rows = self._difference.reshape(G, b, -1)
        loss = np.vecdot(rows, rows) / rows.shape[2]
        return Sums(_sum_samples(loss, mask), _sum_samples(np.ones((G, b)), mask), np.zeros(G), np.zeros(G))

    def backward(self) -> Array:
        """Return ∂loss/∂y_o = 2/O (y_o - t_o).  Call it once per forward."""
        return _scaled_for_samples(self._difference, 2.0, self._mask)


class Huber(Loss):
    """loss = 1/O Σ_o h(y_o - t_o), h(r) = r²/2 where |r| <= δ, else δ (|r| - δ/2); the weight is 1.

    P. Huber, 1964, "Robust estimation of a location parameter": outliers pull with a force of δ, not with
    one that grows.  It is torch.nn.HuberLoss(delta=δ).
    """

    kind: Kind = "regression"

    def __init__(self, *, delta: float = 1.0) -> None:
        if not 0.0 < delta < math.inf:
            raise ConfigError(f"Huber: expected a finite delta > 0, got {delta!r}")
        self.delta = float(delta)

    def build(self, output_shape: Shape) -> None:
        """Accept any output shape with at least one number."""
        _check_outputs("Huber", output_shape)

    def forward(self, output: Array, target: Array, mask: Array | None = None) -> Sums:
        """Return the sums for `target` of the output's shape, or (G, b) where there is one output.

        With c = r limited to ±δ both branches are c (r - c/2).
        """
        G, b = output.shape[:2]
        wanted = _targets_like(output, target, "Huber")
        difference = self.buffer("difference", output.shape, output.dtype)
        np.subtract(output, wanted, out=difference, dtype=output.dtype)
        limited = self._limited = self.buffer("limited", output.shape, output.dtype)
        np.clip(difference, -self.delta, self.delta, out=limited)
        np.subtract(difference, np.multiply(limited, 0.5), out=difference)
        self._mask = mask
        rows = limited.reshape(G, b, -1)
        loss = np.vecdot(rows, difference.reshape(rows.shape)) / rows.shape[2]
        return Sums(_sum_samples(loss, mask), _sum_samples(np.ones((G, b)), mask), np.zeros(G), np.zeros(G))

    def backward(self) -> Array:
        """Return ∂loss/∂y_o = c/O with c = r limited to ±δ.  Call it once per forward."""
        return _scaled_for_samples(self._limited, 1.0, self._mask)


def _check_outputs(name: str, output_shape: Shape) -> None:
    """Raise ConfigError for a model that puts nothing out."""
    if math.prod(output_shape) < 1:
        raise ConfigError(f"{name}: expected at least one output, got shape {output_shape!r}")


def _targets_like(output: Array, target: Array, name: str) -> Array:
    """Return `target` in the shape of `output`, or raise DataError if there is not one for each output."""
    if target.shape[:2] != output.shape[:2] or target.size != output.size:
        raise DataError(
            f"{name}: expected targets of shape {output.shape!r}, one for each output of the "
            f"model, got {target.shape!r}; set the model's outputs to the number of target columns"
        )
    return target.reshape(output.shape)


def _scaled_for_samples(gradient: Array, factor: float, mask: Array | None) -> Array:
    """Multiply `gradient` in place by factor / number of outputs, and by the mask; return it."""
    np.multiply(gradient, factor / math.prod(gradient.shape[2:]), out=gradient)
    if mask is not None:
        np.multiply(gradient, _for_each_sample(mask, gradient), out=gradient)
    return gradient


def _check_classes(target: Array, shape: Shape, num_classes: int) -> None:
    """Raise DataError unless `target` holds class numbers in 0..num_classes-1 and has `shape`."""
    if target.shape != shape or target.dtype.kind not in "iu":
        raise DataError(
            f"SoftmaxCrossEntropy: expected integer class numbers of shape {shape!r}, "
            f"got {target.dtype} of shape {target.shape!r}; for numbers use the loss 'mean_squared_error', "
            "for one class a sample let the model end with one axis (Flatten)"
        )
    # Seen without a sign, a negative number is a large one: one look finds both.
    if target.size and np.maximum.reduce(target.view(f"u{target.itemsize}"), axis=None) >= num_classes:
        wrong = target[(target < 0) | (target >= num_classes)].flat[0].item()
        raise DataError(
            f"SoftmaxCrossEntropy: expected class numbers 0..{num_classes - 1} for a model with "
            f"{num_classes} outputs, got {wrong!r}; set the model's outputs to the number of classes"
        )


def _for_each_sample(values_Gb: Array, like: Array) -> Array:
    """Return (G, b) as (G, b, 1, ...) with as many axes as `like`."""
    return values_Gb.reshape(*values_Gb.shape, *[1] * (like.ndim - 2))


def _finite(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return `sums`, 0 where they are not finite: what is only watched must not decide about a step."""
    return np.where(np.isfinite(sums), sums, 0.0)


def _sum_samples(values: Array, mask_Gb: Array | None) -> NDArray[np.float64]:
    """Return the float64 sum of (G, b, *S) for each micro-batch, over the samples that count.

    The conversion comes first: `add.reduce(dtype=...)` converts in pieces of a buffer of its own, and NumPy
    does not promise that the pieces end where rows end.  No bit differed in 150 cases with NumPy 2.4; the
    conversion costs a microsecond and leaves nothing to promise.
    """
    wide = values.astype(np.float64)
    if mask_Gb is not None:
        wide *= _for_each_sample(mask_Gb, wide)
    total: NDArray[np.float64] = np.add.reduce(wide.reshape(len(wide), -1), axis=1)
    return total
