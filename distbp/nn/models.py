"""Models, activations and losses by the names that the command line knows them by.

A new one is a function or class and one line in a dict below.  The start of the weights follows the
activation behind them, because each keeps the variance of the signal only with its own (initial.py).
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from distbp.errors import ConfigError
from distbp.nn import initial
from distbp.nn.activations import GELU, LeakyReLU, ReLU, Sigmoid, SiLU, Softmax, Tanh
from distbp.nn.audio import audio
from distbp.nn.blocks import Sequential
from distbp.nn.images import cnn, lenet, resnet20, resnet32, resnet56
from distbp.nn.layer import Initial, Layer
from distbp.nn.linear import Linear
from distbp.nn.losses import BinaryCrossEntropy, Huber, Loss, MeanSquaredError, SoftmaxCrossEntropy
from distbp.nn.sequences import gru, lstm
from distbp.nn.shape import Flatten
from distbp.nn.tabular import tabular
from distbp.nn.transformer import transformer

__all__ = ["ACTIVATIONS", "LOSSES", "MODELS", "build_loss", "build_model", "linear", "mlp"]

ACTIVATIONS: dict[str, tuple[Callable[[], Layer], Initial]] = {
    "gelu": (GELU, initial.he_normal),
    "leaky_relu": (LeakyReLU, initial.he_normal),
    "relu": (ReLU, initial.he_normal),
    "sigmoid": (Sigmoid, initial.glorot_uniform),
    "silu": (SiLU, initial.he_normal),
    "softmax": (Softmax, initial.glorot_uniform),
    "tanh": (Tanh, initial.glorot_uniform),
}
"""Name -> how to make it, and how the weights before it start."""

LOSSES: dict[str, Callable[..., Loss]] = {
    "binary_cross_entropy": BinaryCrossEntropy,
    "cross_entropy": SoftmaxCrossEntropy,
    "huber": Huber,
    "mean_squared_error": MeanSquaredError,
}


def mlp(*, outputs: int, hidden: Sequence[int] = (256, 128), activation: str = "relu") -> Layer:
    """Return a multilayer perceptron: for each width in `hidden` Linear and activation, then Linear."""
    make, weights = ACTIVATIONS[_known("activation", activation, ACTIVATIONS)]
    layers: list[Layer] = [Flatten()]
    for width in hidden:
        layers += [Linear(width, initial=weights), make()]
    return Sequential(*layers, Linear(outputs, initial=initial.lecun_normal))


def linear(*, outputs: int, hidden: Sequence[int] = (), activation: str = "relu") -> Layer:
    """Return linear or softmax regression, by the loss; `hidden` and `activation` mean nothing to it."""
    return Sequential(Flatten(), Linear(outputs, initial=initial.lecun_normal))


MODELS: dict[str, Callable[..., Layer]] = {
    "audio": audio,
    "cnn": cnn,
    "gru": gru,
    "lenet": lenet,
    "linear": linear,
    "lstm": lstm,
    "mlp": mlp,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet56": resnet56,
    "tabular": tabular,
    "transformer": transformer,
}
"""Name -> function of the keyword `outputs` and of the options that mean something to the model."""


def build_model(name: str, *, outputs: int, **options: Any) -> Layer:
    """Return the model called `name` with `outputs` outputs; an option that is None is the model's own.

    Raises ConfigError for a name or an option that is not known, with the nearest known name.
    """
    make = MODELS[_known("model", name, MODELS)]
    known = [option for option in inspect.signature(make).parameters if option != "outputs"]
    given = {option: value for option, value in options.items() if value is not None}
    for option, value in given.items():
        if option not in known:
            raise ConfigError(
                f"model.{option}: the model {name!r} has no such option, got {value!r}; "
                f"it has {', '.join(known) or 'none'}"
            )
    return make(outputs=outputs, **given)


def build_loss(
    name: str,
    *,
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | None = None,
    delta: float | None = None,
) -> Loss:
    """Return the loss called `name`; ConfigError for an unknown name or an option that it does not have."""
    make = LOSSES[_known("loss", name, LOSSES)]
    options = {"label_smoothing": label_smoothing, "class_weights": class_weights, "delta": delta}
    given = {option: value for option, value in options.items() if value is not None and value != 0.0}
    known = inspect.signature(make).parameters
    for option, value in given.items():
        if option not in known:
            owners = [other for other, loss in LOSSES.items() if option in inspect.signature(loss).parameters]
            raise ConfigError(
                f"loss {name!r}: it has no option {option}, got {value!r}; it belongs to {owners[0]!r}"
            )
    return make(**given)


def _known(what: str, name: str, names: Iterable[str]) -> str:
    """Return `name` if it is one of `names`, else raise ConfigError with the nearest one."""
    known = sorted(names)
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{what}: expected one of {', '.join(known)}, got {name!r}{hint}")
