"""Exported models, run by the reference evaluator of the onnx package, against distbp's own outputs.

Both compute in float32 and add in different orders: sums of up to 2,000 terms of size 1 agree to 1e-4 of the
largest output.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distbp import nn
from distbp.errors import ConfigError
from distbp.nn import Context
from distbp.onnx_export import export_onnx
from distbp.onnx_layers import LAYERS as KNOWN
from tests.cli.command_line import refuse, succeed
from tests.nn.layer_examples import LAYERS, network_of, samples_for, start

reference = pytest.importorskip("onnx.reference", reason="needs onnx: pip install 'distbp[onnx]'")

TOLERANCE = 1e-4


def outputs_of(content: bytes, samples: np.ndarray) -> np.ndarray:
    """Return what the reference evaluator makes of an exported model."""
    import onnx

    (found,) = reference.ReferenceEvaluator(onnx.load_from_string(content)).run(None, {"samples": samples})
    assert found.dtype == np.float32
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer(name: str) -> None:
    """Each example of the layers' contract gives, exported, the outputs that it gives in evaluation."""
    network = network_of(name)
    start(network)
    averages = 0.5 + np.random.default_rng(4).random(network.statistics_layout.size)
    network.use_statistics(averages)
    x = samples_for(network, 1, 3)
    expected = network.forward(x, Context(training=False))[0].copy()
    found = outputs_of(export_onnx(network), x[0])
    assert found.shape == expected.shape
    limit = TOLERANCE * max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=limit)


def test_every_layer_of_the_package_is_known() -> None:
    """A new layer is exported too, or this test says that it is not."""
    public = {v for v in vars(nn).values() if isinstance(v, type) and issubclass(v, nn.Layer)} - {nn.Layer}
    assert set(KNOWN) == public


def test_a_layer_of_a_script_is_refused() -> None:
    """What ONNX is not told of is named."""

    class Mine(nn.Tanh):
        """A layer of one's own."""

    network = nn.Network(nn.Sequential(nn.Linear(2), Mine()), (3,), nn.MeanSquaredError())
    start(network)
    with pytest.raises(ConfigError, match=r"Mine: expected a layer of distbp\.nn"):
        export_onnx(network)


def test_the_command_exports_what_predict_uses(tmp_path: Path) -> None:
    """A table's model takes the numbers of the file, and gives predictions in the targets' unit."""
    generator = np.random.default_rng(0)
    x = (generator.normal(size=(80, 3)) * [1, 50, 0.1] + [0, 900, 3]).astype(np.float32)
    y = (1000 + 30 * x[:, 0] - x[:, 1]).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    succeed("train", "data.npz", "--epochs", 2, "--nproc", 1, "--out", "run", cwd=tmp_path)
    succeed("predict", "run", "data.npz", "-o", "p.npy", cwd=tmp_path)
    printed = succeed("export", "run", "-o", "model.onnx", cwd=tmp_path)
    assert "bytes in model.onnx" in printed
    found = outputs_of((tmp_path / "model.onnx").read_bytes(), x)
    expected = np.load(tmp_path / "p.npy")
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-4)
    assert "ends in .onnx" in refuse(2, "export", "run", "-o", "model.txt", cwd=tmp_path)
