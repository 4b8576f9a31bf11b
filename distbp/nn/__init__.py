"""The mathematics of stacked micro-batches: layers, losses, initial values, models, the gradient check.

Knows neither rank nor optimizer nor how gradients are added; layer.py holds the contract.
"""

from __future__ import annotations

from distbp.nn.activations import GELU, LeakyReLU, ReLU, Sigmoid, SiLU, Softmax, Tanh
from distbp.nn.batch_norm import BatchNorm
from distbp.nn.blocks import Parallel, Residual, Sequential
from distbp.nn.convolution import Conv1d, Conv2d
from distbp.nn.dropout import Dropout
from distbp.nn.gradient_check import Report, check_gradient
from distbp.nn.images import cnn, lenet, resnet, resnet20, resnet32, resnet56
from distbp.nn.layer import Array, Context, Initial, Layer, Leaf, Parameter, Shape, Sink, Statistic
from distbp.nn.layout import Layout, arrange
from distbp.nn.linear import Linear
from distbp.nn.losses import Loss, MeanSquaredError, SoftmaxCrossEntropy, Sums
from distbp.nn.models import ACTIVATIONS, LOSSES, MODELS, build_loss, build_model, linear, mlp
from distbp.nn.network import Network
from distbp.nn.pooling import AvgPool1d, AvgPool2d, GlobalAvgPool, MaxPool1d, MaxPool2d
from distbp.nn.shape import AsImage, Flatten, Reshape, Transpose

__all__ = [
    "ACTIVATIONS",
    "GELU",
    "LOSSES",
    "MODELS",
    "Array",
    "AsImage",
    "AvgPool1d",
    "AvgPool2d",
    "BatchNorm",
    "Context",
    "Conv1d",
    "Conv2d",
    "Dropout",
    "Flatten",
    "GlobalAvgPool",
    "Initial",
    "Layer",
    "Layout",
    "Leaf",
    "LeakyReLU",
    "Linear",
    "Loss",
    "MaxPool1d",
    "MaxPool2d",
    "MeanSquaredError",
    "Network",
    "Parallel",
    "Parameter",
    "ReLU",
    "Report",
    "Reshape",
    "Residual",
    "Sequential",
    "Shape",
    "SiLU",
    "Sigmoid",
    "Sink",
    "Softmax",
    "SoftmaxCrossEntropy",
    "Statistic",
    "Sums",
    "Tanh",
    "Transpose",
    "arrange",
    "build_loss",
    "build_model",
    "check_gradient",
    "cnn",
    "lenet",
    "linear",
    "mlp",
    "resnet",
    "resnet20",
    "resnet32",
    "resnet56",
]
