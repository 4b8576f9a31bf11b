"""The least time of a step: what is counted, and what it is made of."""

from __future__ import annotations

import numpy as np
import pytest

from distbp.bench.bound import Bandwidth, Demand, bound, demand
from distbp.bench.workloads import WORKLOADS, chosen, make_data, options
from distbp.errors import ConfigError


def test_products_of_an_mlp_are_those_of_backprop():
    """Each weight takes part in three products, of the first layer in two: its dx is not wanted."""
    for workers, micro_batch, share in ((1, 32, 64), (2, 32, 32), (2, 8, 32), (4, 8, 16)):
        needed = demand(WORKLOADS["mlp-s"], micro_batch, workers)
        expected = 2 * share * (2 * 784 * 128 + 3 * 128 * 10)
        # Sums of rows by a product with ones are counted, too: a few thousandths.
        assert expected <= needed.flops <= 1.01 * expected


def test_products_of_a_convolution_are_those_of_its_multiply_adds():
    """Forward, and twice that backwards but for the first layer's dx."""
    needed = demand(WORKLOADS["cnn"], 4, 1, batch=4)
    first, second, dense, last = 28 * 28 * 25 * 32, 14 * 14 * 25 * 32 * 64, 49 * 64 * 1024, 1024 * 10
    expected = 2 * 4 * (2 * first + 3 * (second + dense + last))
    assert expected <= needed.flops <= 1.02 * expected


def test_bytes_of_the_state_are_those_of_the_lanes():
    """A lane of two workers reads two slots, writes one, and makes an update of five vectors."""
    memory = {what: moved for what, moved, _ in demand(WORKLOADS["mlp-s"], 32, 2).memory}
    vector = 4 * 101_770
    assert memory["update"] == pytest.approx(5 * vector / 2, rel=0.01)
    assert memory["reduce"] == pytest.approx(3 * vector / 2, rel=0.01)
    assert memory["micro-batches"] == 0
    more = {what: moved for what, moved, _ in demand(WORKLOADS["mlp-s"], 8, 2).memory}
    assert more["micro-batches"] == pytest.approx(3 * 3 * vector, rel=0.01)


def test_bound_is_the_sum_of_what_is_needed_at_the_measured_rates():
    """Products count as often as they come, bytes at the bandwidth of the size that they lie in."""
    product = ((8, 4), (4, 2), (False, False))
    needed = Demand(memory=[("update", 3000, 1 << 20), ("update", 1000, 1 << 10), ("samples", 10, 1 << 30)])
    needed.products[product] = 5
    bandwidth = Bandwidth((1 << 10, 1 << 20), (1e6, 1e5))
    products, memory = bound(needed, {product: 0.002}, bandwidth)
    assert products == pytest.approx(10.0)
    assert memory == pytest.approx({"update": 31.0, "samples": 0.1})
    assert needed.flops == 5 * 2 * 8 * 4 * 2
    assert bandwidth.at(1 << 15) == pytest.approx(5.5e5)


def test_watching_leaves_numpy_as_it_was():
    """The product that is recorded is NumPy's own again afterwards."""
    matmul = np.matmul
    demand(WORKLOADS["mlp-s"], 32, 2)
    assert np.matmul is matmul


@pytest.mark.parametrize("name", ["charlm", "cnn"])
def test_data_are_the_same_wherever_they_are_made(name, tmp_path):
    """Two folders get the same bytes, and as many samples as the workload says."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    workload = WORKLOADS[name]
    first, second = (make_data(workload, tmp_path / folder) for folder in ("a", "b"))
    assert first.read_bytes()[-1000:] == second.read_bytes()[-1000:]
    if name == "charlm":
        assert len(set(first.read_text())) == 65
    else:
        with np.load(first) as file:
            assert file["x"].shape == (workload.samples, *workload.shape)


def test_an_unknown_workload_is_refused():
    """The message names those that there are."""
    with pytest.raises(ConfigError, match=r"mlp-s.*'mpl-s'"):
        chosen("cnn,mpl-s")


def test_options_leave_the_default_micro_batch_to_distbp():
    """Only a micro-batch that was asked for is set."""
    words = options(WORKLOADS["mlp-m"], 7, None)
    assert not any("micro_batch" in word for word in words)
    assert "train.micro_batch=128" in options(WORKLOADS["mlp-m"], 7, 128)
