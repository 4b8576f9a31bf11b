"""The log spectrogram against sums written out in complex numbers, and against scipy's transform."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.signal import get_window

from distbp import nn
from distbp.errors import ConfigError

from .layer_examples import TRAINING, random_stack


def test_against_complex_sums():
    """Every value is log |Σ w x e^{-2πift}|² + floor, within 1e-5: float32 sums of some hundred terms."""
    layer = nn.LogSpectrogram(64, 20, 12, lowest=0.03, highest=0.4, cycles=8)
    assert layer.build((150,)) == (5, 12, 1)
    x = random_stack(2, 3, (150,))
    y = layer.forward(x, TRAINING)
    for k, tone in enumerate(np.geomspace(0.03, 0.4, 12)):
        length = min(64, 8 / tone)
        n = np.arange(64) - 31.5
        bell = np.where(abs(n) < length / 2, np.cos(np.pi * n / length) ** 2, 0)
        for place in range(5):
            frames = x[..., 20 * place : 20 * place + 64].astype(np.float64)
            amplitude = 2 * (frames * bell * np.exp(-2j * np.pi * tone * n)).sum(axis=-1) / bell.sum()
            expected = np.log(abs(amplitude) ** 2 + layer.floor)
            # The logarithm of a small power magnifies what rounding does to it.
            np.testing.assert_allclose(np.exp(y[..., place, k, 0]), np.exp(expected), rtol=0, atol=1e-5)


def test_tones_of_a_fourier_transform():
    """With one window for all tones, the tones of scipy's discrete transform have its magnitudes."""
    from scipy.fft import rfft

    window = 32
    # Two tones of the transform, and a bell that spans the window: cycles beyond the window are cut to it.
    layer = nn.LogSpectrogram(
        window, window, 2, lowest=4 / window, highest=8 / window, cycles=1e9, floor=1e-12
    )
    layer.build((window,))
    x = random_stack(1, 1, (window,)).astype(np.float64)
    # The middle of the bell lies between two numbers, where scipy's periodic one has it on a number.
    bell = np.cos(np.pi * (np.arange(window) - (window - 1) / 2) / window) ** 2
    assert abs(get_window("hann", window).sum() - bell.sum()) < 1e-9
    expected = 2 * abs(rfft(x[0, 0] * bell)[[4, 8]]) / bell.sum()
    found = np.sqrt(np.exp(layer.forward(x, TRAINING)[0, 0, 0, :, 0]))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_a_sine_of_height_1_is_0():
    """The scale is that of the sound: log 1 = 0 at the sine's tone."""
    layer = nn.LogSpectrogram(512, 512, 3, lowest=0.1, highest=0.4, cycles=32)
    layer.build((512,))
    sine = np.sin(2 * np.pi * 0.2 * np.arange(512)).reshape(1, 1, -1)
    assert abs(layer.forward(sine, TRAINING)[0, 0, 0, 1, 0]) < 0.01


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LogSpectrogram(1),
        lambda: nn.LogSpectrogram(lowest=0.5, highest=0.4),
        lambda: nn.LogSpectrogram(highest=0.6),
        lambda: nn.LogSpectrogram(64).build((63,)),
        lambda: nn.LogSpectrogram(64).build((64, 2)),
    ],
)
def test_what_cannot_be_is_refused(make):
    """Tones that do not exist, and samples that are no sounds, are configuration mistakes."""
    with pytest.raises(ConfigError, match="LogSpectrogram"):
        make()
