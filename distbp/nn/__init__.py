"""The mathematics of stacked micro-batches: layers, losses, initial values, models, the gradient check.

Knows neither rank nor optimizer nor how gradients are added; layer.py holds the contract.
"""

from __future__ import annotations

from distbp.nn.activations import GELU, LeakyReLU, ReLU, Sigmoid, Softmax, Tanh
from distbp.nn.attention import MultiHeadAttention
from distbp.nn.blocks import Parallel, Residual, Sequential
from distbp.nn.embedding import Embedding, PositionalEmbedding
from distbp.nn.gradient_check import Report, check_gradient
from distbp.nn.layer import Array, Context, Initial, Layer, Leaf, Parameter, Shape, Sink
from distbp.nn.layer_norm import LayerNorm, RMSNorm
from distbp.nn.layout import Layout, arrange
from distbp.nn.linear import Linear
from distbp.nn.losses import BinaryCrossEntropy, Huber, Loss, MeanSquaredError, SoftmaxCrossEntropy, Sums
from distbp.nn.models import ACTIVATIONS, LOSSES, MODELS, build_loss, build_model, linear, mlp
from distbp.nn.network import Network
from distbp.nn.recurrent import GRU, LSTM
from distbp.nn.sequences import gru, lstm
from distbp.nn.shape import Flatten
from distbp.nn.transformer import transformer

__all__ = [
    "ACTIVATIONS",
    "GELU",
    "GRU",
    "LOSSES",
    "LSTM",
    "MODELS",
    "Array",
    "BinaryCrossEntropy",
    "Context",
    "Embedding",
    "Flatten",
    "Huber",
    "Initial",
    "Layer",
    "LayerNorm",
    "Layout",
    "Leaf",
    "LeakyReLU",
    "Linear",
    "Loss",
    "MeanSquaredError",
    "MultiHeadAttention",
    "Network",
    "Parallel",
    "Parameter",
    "PositionalEmbedding",
    "RMSNorm",
    "ReLU",
    "Report",
    "Residual",
    "Sequential",
    "Shape",
    "Sigmoid",
    "Sink",
    "Softmax",
    "SoftmaxCrossEntropy",
    "Sums",
    "Tanh",
    "arrange",
    "build_loss",
    "build_model",
    "check_gradient",
    "gru",
    "linear",
    "lstm",
    "mlp",
    "transformer",
]
