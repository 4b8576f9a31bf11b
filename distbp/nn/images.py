"""Networks for images: LeNet, a plain convolutional network, and residual networks.

All take samples (H, W), gray, or (H, W, channels), of any size from 8 x 8 up: convolutions keep the size and
pooling halves it.  Weights before a rectifier start as He says, the last ones as LeCun says (initial.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from distbp.nn import initial
from distbp.nn.activations import ReLU
from distbp.nn.batch_norm import BatchNorm
from distbp.nn.blocks import Residual, Sequential
from distbp.nn.convolution import Conv2d
from distbp.nn.dropout import Dropout
from distbp.nn.layer import Layer
from distbp.nn.linear import Linear
from distbp.nn.pooling import GlobalAvgPool, MaxPool2d
from distbp.nn.shape import AsImage, Flatten

__all__ = ["cnn", "lenet", "resnet", "resnet20", "resnet32", "resnet56"]

LEAST_SIDE = 8
"""Pixels; a smaller image is hardly one, and three halvings leave nothing of it."""


def lenet(*, outputs: int, hidden: Sequence[int] = (120, 84), dropout: float = 0.5) -> Layer:
    """Return LeNet-5 with rectifiers, maximum pooling and dropout, and `hidden` fully connected layers.

    Y. LeCun, L. Bottou, Y. Bengio and P. Haffner, "Gradient-based learning applied to document recognition",
    Proc. IEEE 86, 1998: 5 x 5 convolutions with 6 and 16 channels, each with a pool, then 120 and 84 units.
    `dropout` is the share of what the convolutions found that is withheld from the layers behind them: they
    hold 9 of 10 parameters, and learn some thousand images by heart without it.
    """
    convolutions = [*_convolution_and_pool(6), *_convolution_and_pool(16)]
    return Sequential(AsImage(LEAST_SIDE), *convolutions, *_head(hidden, outputs, dropout))


def cnn(*, outputs: int, hidden: Sequence[int] = (1024,), dropout: float = 0.0) -> Layer:
    """Return 5 x 5 convolutions with 32 and 64 channels, each with a pool, and `hidden` connected layers."""
    convolutions = [*_convolution_and_pool(32), *_convolution_and_pool(64)]
    return Sequential(AsImage(LEAST_SIDE), *convolutions, *_head(hidden, outputs, dropout))


def resnet(*, outputs: int, blocks: int, widths: Sequence[int] = (16, 32, 64)) -> Layer:
    """Return the network of K. He et al., "Deep residual learning", CVPR 2016, section 4.2.

    A 3 x 3 convolution, then a stage of `blocks` blocks for each of `widths`, the numbers of channels, each
    stage after the first at half the size, then the mean over the image: with three stages 6 * blocks + 2
    layers with weights.  Where the shape changes, the shortcut is a 1 x 1 convolution (the paper's option B).
    """
    channels = widths[0]
    layers: list[Layer] = [AsImage(LEAST_SIDE), *_convolution_and_norm(channels, 3), ReLU()]
    for width in widths:
        for _ in range(blocks):
            layers += [_block(width, changes=width != channels), ReLU()]
            channels = width
    return Sequential(*layers, GlobalAvgPool(), Linear(outputs, initial=initial.lecun_normal))


def resnet20(*, outputs: int) -> Layer:
    """Return the residual network with 3 blocks in each stage."""
    return resnet(outputs=outputs, blocks=3)


def resnet32(*, outputs: int) -> Layer:
    """Return the residual network with 5 blocks in each stage."""
    return resnet(outputs=outputs, blocks=5)


def resnet56(*, outputs: int) -> Layer:
    """Return the residual network with 9 blocks in each stage."""
    return resnet(outputs=outputs, blocks=9)


def _convolution_and_pool(channels: int) -> list[Layer]:
    """Return a 5 x 5 convolution, the rectifier, and a pool that halves the image.

    The rectifier stands behind the pool: it is monotone, so the result is the same at a quarter of the cost.
    """
    return [Conv2d(channels, 5, padding="same"), MaxPool2d(2), ReLU()]


def _head(hidden: Sequence[int], outputs: int, dropout: float) -> list[Layer]:
    """Return the fully connected layers."""
    layers: list[Layer] = [Flatten()]
    if dropout:
        layers.append(Dropout(dropout))
    for width in hidden:
        layers += [Linear(width, initial=initial.he_normal), ReLU()]
    return [*layers, Linear(outputs, initial=initial.lecun_normal)]


def _block(width: int, *, changes: bool) -> Layer:
    """Return two 3 x 3 convolutions beside a shortcut; with `changes` the first one halves the image."""
    stride = 2 if changes else 1
    inner = Sequential(*_convolution_and_norm(width, 3, stride), ReLU(), *_convolution_and_norm(width, 3))
    shortcut = Sequential(*_convolution_and_norm(width, 1, stride)) if changes else None
    return Residual(inner, shortcut)


def _convolution_and_norm(channels: int, size: int, stride: int = 1) -> list[Layer]:
    """Return a convolution that keeps or halves the size, without a bias: the norm would take it off."""
    return [Conv2d(channels, size, stride=stride, padding="same", bias=False), BatchNorm()]
