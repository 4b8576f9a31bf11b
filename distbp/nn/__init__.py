"""The mathematics of stacked micro-batches: layers, losses, initial values, models, the gradient check.

Knows neither rank nor optimizer nor how gradients are added; layer.py holds the contract.
"""

from __future__ import annotations

from distbp.leaf import Leaf
from distbp.nn.activations import GELU, LeakyReLU, ReLU, Sigmoid, SiLU, Softmax, Tanh
from distbp.nn.attention import MultiHeadAttention
from distbp.nn.audio import audio
from distbp.nn.batch_norm import BatchNorm
from distbp.nn.blocks import Parallel, Residual, Sequential
from distbp.nn.column_embedding import ColumnEmbedding
from distbp.nn.convolution import Conv1d, Conv2d
from distbp.nn.dropout import Dropout
from distbp.nn.embedding import Embedding, PositionalEmbedding
from distbp.nn.feature_cross import FeatureCross
from distbp.nn.gradient_check import Report, check_gradient
from distbp.nn.images import cnn, lenet, resnet, resnet20, resnet32, resnet56
from distbp.nn.layer import Array, Context, Initial, Layer, Parameter, Shape, Sink, Statistic
from distbp.nn.layer_norm import LayerNorm, RMSNorm
from distbp.nn.layout import Layout, arrange
from distbp.nn.linear import Linear
from distbp.nn.losses import BinaryCrossEntropy, Huber, Loss, MeanSquaredError, SoftmaxCrossEntropy, Sums
from distbp.nn.models import ACTIVATIONS, LOSSES, MODELS, build_loss, build_model, linear, mlp
from distbp.nn.network import Network
from distbp.nn.pooling import AvgPool1d, AvgPool2d, GlobalAvgPool, MaxPool1d, MaxPool2d
from distbp.nn.recurrent import GRU, LSTM
from distbp.nn.sequences import gru, lstm
from distbp.nn.shape import AsImage, Flatten, Reshape, Transpose
from distbp.nn.spectrogram import LogSpectrogram
from distbp.nn.tabular import tabular
from distbp.nn.transformer import transformer

__all__ = [
    "ACTIVATIONS",
    "GELU",
    "GRU",
    "LOSSES",
    "LSTM",
    "MODELS",
    "Array",
    "AsImage",
    "AvgPool1d",
    "AvgPool2d",
    "BatchNorm",
    "BinaryCrossEntropy",
    "ColumnEmbedding",
    "Context",
    "Conv1d",
    "Conv2d",
    "Dropout",
    "Embedding",
    "FeatureCross",
    "Flatten",
    "GlobalAvgPool",
    "Huber",
    "Initial",
    "Layer",
    "LayerNorm",
    "Layout",
    "Leaf",
    "LeakyReLU",
    "Linear",
    "LogSpectrogram",
    "Loss",
    "MaxPool1d",
    "MaxPool2d",
    "MeanSquaredError",
    "MultiHeadAttention",
    "Network",
    "Parallel",
    "Parameter",
    "PositionalEmbedding",
    "RMSNorm",
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
    "audio",
    "build_loss",
    "build_model",
    "check_gradient",
    "cnn",
    "gru",
    "lenet",
    "linear",
    "lstm",
    "mlp",
    "resnet",
    "resnet20",
    "resnet32",
    "resnet56",
    "tabular",
    "transformer",
]
