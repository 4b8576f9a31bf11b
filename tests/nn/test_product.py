"""Products of stacked rows: the bits of single micro-batches, however they are computed."""

import numpy as np
import pytest

from distbp.nn import product

SHAPES = [
    (2, 8, 784, 128),
    (4, 32, 256, 512),
    (8, 12, 100, 30),
    (3, 16, 64, 1024),
    (5, 1, 33, 7),
    (2, 3, 5, 2),
]


@pytest.fixture(autouse=True)
def forget():
    """Probe anew."""
    product.keeps_bits.cache_clear()
    yield
    product.keeps_bits.cache_clear()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("G", "b", "K", "N"), SHAPES)
def test_a_stack_has_the_bits_of_its_micro_batches(G, b, K, N, dtype):
    """Whether rows are joined or not, in both directions, on whatever kernel BLAS has here."""
    random = np.random.default_rng(1)
    x = random.standard_normal((G, b, K)).astype(dtype)
    w = random.standard_normal((K, N)).astype(dtype)
    y, dx = np.empty((G, b, N), dtype), np.empty((G, b, K), dtype)
    product.rows_times_matrix(x, w, y)
    product.rows_times_transpose(y, w, dx)
    for g in range(G):
        one = np.empty((1, b, N), dtype)
        assert product.rows_times_matrix(x[g : g + 1], w, one).tobytes() == y[g].tobytes()
        back = np.empty((1, b, K), dtype)
        assert product.rows_times_transpose(y[g : g + 1], w, back).tobytes() == dx[g].tobytes()


@pytest.mark.parametrize("transposed", [False, True])
def test_a_single_bit_is_enough_to_keep_micro_batches_apart(monkeypatch, transposed):
    """A BLAS whose product of all rows differs in the last bit of one number is not trusted with them."""
    matmul, calls = np.matmul, []

    def odd(a, b, out=None):
        result = matmul(a, b, out=out)
        if a.ndim == 2:
            calls.append(a.shape)
            result[-1, -1] = np.nextafter(result[-1, -1], np.float32(np.inf))
        return result

    monkeypatch.setattr(np, "matmul", odd)
    assert not product.keeps_bits(4, 8, 16, 4, "f", transposed)
    assert calls == [(32, 16)]
    monkeypatch.setattr(
        np, "matmul", lambda a, b, out=None: matmul(a, b, out=out) if a.ndim > 2 else stacked(a, b)
    )

    def stacked(a, b):
        return matmul(a.reshape(4, 8, 16), b).reshape(32, 4)

    product.keeps_bits.cache_clear()
    assert product.keeps_bits(4, 8, 16, 4, "f", transposed)


def test_rows_are_joined_where_that_keeps_the_bits(monkeypatch):
    """One call of BLAS does the work of all micro-batches, and only then."""
    shapes = []
    matmul = np.matmul

    def note(a, b, out=None):
        shapes.append(a.shape)
        return matmul(a, b, out=out)

    x, w, y = np.ones((4, 8, 16), np.float32), np.ones((16, 4), np.float32), np.empty((4, 8, 4), np.float32)
    for answer, expected in ((True, (32, 16)), (False, (4, 8, 16))):
        with monkeypatch.context() as patch:
            patch.setattr(product, "keeps_bits", lambda *shape, answer=answer: answer)
            patch.setattr(np, "matmul", note)
            product.rows_times_matrix(x, w, y)
        assert shapes.pop() == expected
