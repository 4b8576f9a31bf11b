"""The networks for images: their sizes, the images that they take, and those that they refuse."""

from __future__ import annotations

import numpy as np
import pytest

from distbp import nn
from distbp.errors import ConfigError

from .layer_examples import TRAINING, random_stack, start

MODELS = ["cnn", "lenet", "resnet20", "resnet32", "resnet56"]


def network(name, shape, outputs=10):
    """Return the network called `name`."""
    return nn.Network(nn.build_model(name, outputs=outputs), shape, nn.SoftmaxCrossEntropy())


@pytest.mark.parametrize("shape", [(8, 8), (28, 28), (32, 32, 3), (9, 13, 2)], ids=str)
@pytest.mark.parametrize("name", ["cnn", "lenet", "resnet20"])
def test_any_size_from_8_up(name, shape):
    """Gray and coloured images of any size from 8 x 8 up give finite outputs in both modes."""
    made = network(name, shape)
    start(made)
    x = random_stack(1, 2, shape)
    for context in (TRAINING, nn.Context(training=False)):
        y = made.forward(x, context)
        assert y.shape == (1, 2, 10)
        assert np.isfinite(y).all()


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        # Worked out layer by layer: 5*5*1*32+32, 5*5*32*64+64, 7*7*64*1024+1024, 1024*10+10.
        ("cnn", (28, 28), 832 + 51_264 + 3_212_288 + 10_250),
        # 5*5*1*6+6, 5*5*6*16+16, 7*7*16*120+120, 120*84+84, 84*10+10.
        ("lenet", (28, 28), 156 + 2_416 + 94_200 + 10_164 + 850),
        # Stem, 3 stages of 2n convolutions with their norms, 2 shortcuts with norms, 64*10+10; n = 3, 5, 9.
        *(
            (
                f"resnet{6 * n + 2}",
                (32, 32, 3),
                (432 + 32)
                + 2 * n * (2304 + 32)
                + (4608 + 64 + 9216 + 64 + 512 + 64) + 2 * (n - 1) * (9216 + 64)
                + (18432 + 128 + 36864 + 128 + 2048 + 128) + 2 * (n - 1) * (36864 + 128)
                + 650,
            )
            for n in (3, 5, 9)
        ),
    ],
)  # fmt: skip
def test_number_of_parameters(name, shape, parameters):
    """The networks have the sizes of the literature; the original LeNet has smaller maps before its 120."""
    assert network(name, shape).num_parameters == parameters


def test_resnet20_is_the_known_one():
    """With projections as shortcuts resnet20 has 272,474 parameters, and 20 other layers with weights."""
    made = network("resnet20", (32, 32, 3))
    assert made.num_parameters == 272_474
    weights = [name for name in made.layout.names if name.endswith("weight") and "shortcut" not in name]
    assert len(weights) == 20
    # The paper counts 41 million multiply-adds; the projections add a little.
    assert 40e6 < made.multiply_adds < 42e6


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("shape", "words"),
    [((64,), "images"), ((7, 20), "8 x 8"), ((3, 32, 32), "channels last"), ((2, 8, 8, 3), "images")],
    ids=str,
)
def test_what_is_no_image_is_refused(name, shape, words):
    """Tables, small images and images with channels first are a ConfigError that says what was expected."""
    with pytest.raises(ConfigError, match=words):
        network(name, shape)


def test_options_of_another_model_are_refused():
    """An option that a model does not have is named, with those that it has."""
    assert network("lenet", (8, 8)).num_parameters > nn.Network(
        nn.build_model("lenet", outputs=10, hidden=(5,)), (8, 8), nn.SoftmaxCrossEntropy()
    ).num_parameters  # fmt: skip
    with pytest.raises(ConfigError, match=r"model\.hidden.*'resnet20'"):
        nn.build_model("resnet20", outputs=10, hidden=(5,))
    with pytest.raises(ConfigError, match=r"model\.activation.*it has hidden"):
        nn.build_model("lenet", outputs=10, activation="tanh")
