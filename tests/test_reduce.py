"""`distbp/reduce.py`: one tree of additions, whoever holds the leaves."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distbp import reduce
from distbp.leaf import LeafInPieces
from distbp.partition import split_range
from distbp.reduce import LaneReduction, MicroBatchSum, TreeSum, aligned_blocks, tree_total
from distbp.transports.threads import Hub


def reference(leaves):
    """The tree by its recursive definition: the left part is the largest power of two below the count."""
    if len(leaves) == 1:
        return leaves[0]
    left = 1 << ((len(leaves) - 1).bit_length() - 1)
    return reference(leaves[:left]) + reference(leaves[left:])


def make_leaves(count, size, dtype=np.float32, seed=0):
    """Numbers of very different size, so that every change of order shows."""
    rng = np.random.default_rng(seed + count)
    return [
        (rng.standard_normal(size) * 10.0 ** rng.integers(-6, 6, size)).astype(dtype) for _ in range(count)
    ]


def same_bits(left, right):
    """Compare two arrays byte by byte."""
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


def worker_blocks(leaves, start, stop, size):
    """What one worker publishes for its micro-batches."""
    vectors = [np.full(size, np.nan, np.float32) for _ in aligned_blocks(start, stop)]
    adder = MicroBatchSum(start, stop, vectors)

    def leaf(low, high, out):
        for row, local in enumerate(range(low, high)):
            out[row] = leaves[start + local]

    adder.collect(0, (size,), leaf)
    return vectors


class InPieces(LeafInPieces):
    """Leaves of a matrix in pieces of two rows and three columns; `told` notes what was asked for."""

    def __init__(self, leaves, start):
        self.leaves, self.start, self.told = leaves, start, []

    def __call__(self, low, high, out):
        """Write whole leaves."""
        self.write((slice(None), slice(None)), low, high, out)

    def pieces(self, most):
        """Cut the matrix, whatever the cache holds."""
        rows, columns = self.leaves[0].shape
        cuts = (
            [slice(row, row + 2) for row in range(0, rows, 2)],
            [slice(c, c + 3) for c in range(0, columns, 3)],
        )
        return list(itertools.product(*cuts))

    def square(self, number):
        """Return the sum of squares of a leaf."""
        return float(np.square(self.leaves[self.start + number]).sum())

    def write(self, piece, low, high, out):
        """Write one piece of some leaves."""
        self.told.append((piece, low, high))
        for row, local in enumerate(range(low, high)):
            out[row] = self.leaves[self.start + local][piece]


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 4), (0, 64), (3, 20), (5, 8)])
def test_a_sum_in_pieces_has_the_bits_of_the_whole_sum(monkeypatch, start, stop):
    """Blocks of more than one leaf are made piece by piece, several leaves in a call, by the same tree."""
    monkeypatch.setattr(reduce, "SMALL_ELEMENTS", 0)
    monkeypatch.setattr(reduce, "PIECE_BYTES", 200)
    leaves = [leaf.reshape(5, 7) for leaf in make_leaves(stop, 35)]
    leaf = InPieces(leaves, start)
    vectors = [np.full(40, np.nan, np.float32) for _ in aligned_blocks(start, stop)]
    MicroBatchSum(start, stop, vectors).collect(3, (5, 7), leaf)
    for (first, count), vector in zip(aligned_blocks(start, stop), vectors, strict=True):
        assert same_bits(vector[3:38].reshape(5, 7), tree_total(np.array(leaves[first : first + count])))
        assert np.isnan(vector[:3]).all()
        assert np.isnan(vector[38:]).all()
    in_pieces = [high - low for piece, low, high in leaf.told if piece != (slice(None), slice(None))]
    assert max(in_pieces, default=1) <= reduce.MOST_STACKED
    assert bool(in_pieces) == any(count > 1 for _, count in aligned_blocks(start, stop))


@given(st.integers(0, 200), st.integers(0, 200))
def test_aligned_blocks_cover_the_range(start, length):
    """Blocks are powers of two at multiples of their size, side by side, and cover exactly the range."""
    position = start
    for block, count in aligned_blocks(start, start + length):
        assert block == position
        assert count & (count - 1) == 0
        assert block % count == 0
        position += count
    assert position == start + length


@given(st.integers(1, 300), st.integers(1, 300))
def test_aligned_blocks_are_few(start, length):
    """A worker publishes at most 2 log2 of its range, and siblings never both."""
    blocks = aligned_blocks(start, start + length)
    assert len(blocks) <= 2 * max(1, length.bit_length())
    for (left, count), (_, right_count) in itertools.pairwise(blocks):
        assert count != right_count or left % (2 * count) != 0


@pytest.mark.parametrize("size", [1, 37, 70_000])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 12, 13, 16, 31])
def test_one_host_any_workers_gives_the_bits_of_one(count, size):
    """For every worker count up to M the lanes' totals equal the recursive tree, bit for bit."""
    leaves = make_leaves(count, size)
    want = reference(leaves)
    for workers in sorted({1, 2, 3, count // 2 or 1, count - 1 or 1, count}):
        if workers > count:
            continue
        ranges = [split_range(count, workers, worker) for worker in range(workers)]
        slots = [worker_blocks(leaves, *ranges[worker], size) for worker in range(workers)]
        for lane in range(workers):
            low, high = split_range(size, workers, lane)
            views = [[vector[low:high] for vector in blocks] for blocks in slots]
            LaneReduction(views, ranges, [(0, count)], None).run()
        assert same_bits(slots[0][0], want), f"{workers} workers differ"


@pytest.mark.parametrize("workers_of_hosts", [(1, 1), (2, 1), (1, 3), (1, 1, 1), (3, 1, 2), (2, 2, 2, 1)])
@pytest.mark.parametrize("count", [7, 8, 12, 13])
def test_hosts_exchange_and_get_the_same_bits(count, workers_of_hosts):
    """With 2 to 4 hosts of unequal size every host holds the recursive tree's bits, in every lane."""
    size, total_workers, hosts = 101, sum(workers_of_hosts), len(workers_of_hosts)
    leaves = make_leaves(count, size)
    ranges = [split_range(count, total_workers, worker) for worker in range(total_workers)]
    firsts = [sum(workers_of_hosts[:host]) for host in range(hosts)]
    host_ranges = [
        (ranges[first][0], ranges[first + number - 1][1])
        for first, number in zip(firsts, workers_of_hosts, strict=True)
    ]
    slots = [worker_blocks(leaves, *worker_range, size) for worker_range in ranges]
    lanes = min(workers_of_hosts)

    def owner(host, lane, hub):
        mine = range(firsts[host], firsts[host] + workers_of_hosts[host])
        low, high = split_range(size, lanes, lane)
        views = [[vector[low:high] for vector in slots[worker]] for worker in mine]
        LaneReduction(views, [ranges[worker] for worker in mine], host_ranges, hub.connect(host)).run()

    for lane in range(lanes):
        hub = Hub(hosts, deadline_s=20)
        threads = [threading.Thread(target=owner, args=(host, lane, hub)) for host in range(hosts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    want = reference(leaves)
    for host in range(hosts):
        assert same_bits(slots[firsts[host]][0], want), f"host {host} differs"


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 64), st.integers(1, 12), st.integers(0, 1000))
def test_any_split_of_the_leaves_gives_the_same_total(count, workers, seed):
    """TreeSum over blocks that any contiguous split publishes equals TreeSum over single leaves."""
    leaves = make_leaves(count, 3, seed=seed)
    single = TreeSum()
    for index, leaf in enumerate(leaves):
        single.push(index, 1, leaf.copy())
    tree = TreeSum()
    for worker in range(min(workers, count)):
        start, stop = split_range(count, min(workers, count), worker)
        for (block, number), vector in zip(
            aligned_blocks(start, stop), worker_blocks(leaves, start, stop, 3), strict=True
        ):
            tree.push(block, number, vector)
    assert same_bits(tree.total(), single.total())
    assert same_bits(single.total(), reference(leaves))


@given(st.integers(1, 70))
def test_tree_total_is_the_same_tree(count):
    """Rows added level by level give the bits of the recursive definition, and stay as they were."""
    rows = np.array(make_leaves(count, 4, np.float64))
    before = rows.copy()
    assert same_bits(tree_total(rows), reference(list(rows)))
    assert same_bits(rows, before)


def test_leaves_are_added_alike_in_one_go_and_one_by_one():
    """A tensor above the row-wise limit and one below it are added in the same order."""
    count, size = 6, 20_000
    leaves = make_leaves(count, size)
    big = worker_blocks(leaves, 0, count, size)
    small = worker_blocks([leaf[:100] for leaf in leaves], 0, count, 100)
    for left, right in zip(big, small, strict=True):
        assert same_bits(left[:100].copy(), right)


def test_rank_order_would_differ():
    """The check can fail: adding rank by rank changes bits for these numbers."""
    leaves = make_leaves(8, 1000)
    wrong = sum((sum(leaves[i : i + 2]) for i in range(2, 8, 2)), start=sum(leaves[0:2]))
    assert not same_bits(np.asarray(wrong, np.float32), reference(leaves))


def test_a_gap_between_blocks_is_refused():
    """Blocks that are not neighbours cannot be added silently."""
    tree = TreeSum()
    tree.push(0, 1, np.zeros(1, np.float32))
    with pytest.raises(AssertionError, match="does not follow"):
        tree.push(2, 1, np.zeros(1, np.float32))
