"""Products of stacked rows: the bits of single micro-batches, however they are computed."""

import numpy as np
import pytest

from distbp.leaf import LeafInPieces
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
    product.forget_probes()
    yield
    product.forget_probes()


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


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("micro_batches", "b", "width", "outputs"), [(4, 16, 784, 512), (8, 8, 500, 333), (16, 12, 257, 512)]
)
def test_gradients_made_in_pieces_have_the_bits_of_whole_ones(micro_batches, b, width, outputs, dtype):
    """On whatever kernel BLAS has here, and for all micro-batches at once or some."""
    random = np.random.default_rng(2)
    x = random.standard_normal((micro_batches, b, width)).astype(dtype)
    dy = random.standard_normal((micro_batches, b, outputs)).astype(dtype)
    leaf = product.TransposeTimesRows(x, dy)
    whole = np.empty((micro_batches, width, outputs), dtype)
    leaf(0, micro_batches, whole)
    for most in (1 << 13, 1 << 15, 1 << 20):
        covered = np.zeros((width, outputs), int)
        for rows, columns in leaf.pieces(most):
            part = np.empty_like(whole[2:, rows, columns])
            assert part[0].size <= most
            leaf.write((rows, columns), 2, micro_batches, part)
            assert part.tobytes() == whole[2:, rows, columns].tobytes()
            covered[rows, columns] += 1
        assert covered.min() == covered.max()  # All once, or no pieces at all.


def test_a_single_bit_is_enough_to_leave_a_gradient_whole(monkeypatch):
    """Pieces of which one has one other bit are not taken: rows by the dozen come next, then none."""
    wrong = set()

    def matmul(a, b):
        result = (a.astype(np.float64) @ b).astype(np.float32)
        if result.shape in wrong:
            result[-1, -1] = np.nextafter(result[-1, -1], np.float32(np.inf))
        return result

    def first_piece():
        product.forget_probes()
        pieces = product.cut_product(8, 512, 1024, "f", 1 << 15)
        return [(part.stop - part.start) for part in pieces[0]] if pieces else None

    monkeypatch.setattr(np, "matmul", matmul)
    assert first_piece() == [64, 512]
    wrong.add((64, 512))
    assert first_piece() == [24, 1024]
    wrong.add((512 % 24, 1024))
    assert first_piece() is None


def test_small_gradients_and_many_rows_stay_whole():
    """One piece is no cut, and with many rows the product itself is what takes the time."""
    assert product.cut_product(8, 64, 64, "f", 1 << 16) == ()
    for rows in (product.FEW_ROWS, product.FEW_ROWS + 1):
        leaf = product.gradient_of_weights(np.ones((2, rows, 4)), np.ones((2, rows, 3)))
        assert isinstance(leaf, LeafInPieces) == (rows <= product.FEW_ROWS)
        gradients = np.empty((2, 4, 3))
        leaf(0, 2, gradients)
        assert (gradients == rows).all()


def test_the_square_of_a_gradient_is_known_without_it():
    """The sum of squares by products of rows is that of the gradient itself."""
    random = np.random.default_rng(3)
    x, dy = (random.standard_normal((3, 16, width)).astype(np.float32) for width in (300, 200))
    leaf = product.TransposeTimesRows(x, dy)
    whole = np.empty((3, 300, 200), np.float32)
    leaf(0, 3, whole)
    for number in range(3):
        assert leaf.square(number) == pytest.approx(
            np.square(whole[number], dtype=np.float64).sum(), rel=1e-5
        )
