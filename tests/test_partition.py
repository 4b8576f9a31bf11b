"""`distbp/partition.py`: everything is owned exactly once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from distbp.optim import blocks as norm_blocks
from distbp.partition import default_micro_batch, round_up, split_blocks, split_range


@given(st.integers(0, 10**6), st.integers(1, 300))
def test_ranges_cover_everything_once(total, parts):
    """Ranges follow each other from 0 to the end, and differ by at most one in length."""
    ranges = [split_range(total, parts, index) for index in range(parts)]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == total
    assert all(left[1] == right[0] for left, right in zip(ranges, ranges[1:], strict=False))  # noqa: RUF007
    lengths = {stop - start for start, stop in ranges}
    assert max(lengths) - min(lengths) <= 1


@given(st.lists(st.integers(1, 50_000), min_size=1, max_size=20), st.integers(1, 9))
def test_lanes_cover_the_vector_in_whole_blocks(lengths, parts):
    """Lanes follow each other over blocks and elements alike, and no block is cut."""
    borders, offset = [], 0
    for length in lengths:
        borders.append((offset, length))
        offset = round_up(offset + length, 16)
    blocks = norm_blocks(borders)
    lanes = [split_blocks(blocks, offset, parts, index) for index in range(parts)]
    assert (lanes[0][0], lanes[0][2]) == (0, 0)
    assert (lanes[-1][1], lanes[-1][3]) == (len(blocks), offset)
    for left, right in zip(lanes, lanes[1:], strict=False):  # noqa: RUF007
        assert (left[1], left[3]) == (right[0], right[2])
    for first, last, low, high in lanes:
        assert all(low <= start and stop <= high for start, stop in blocks[first:last])


@given(st.integers(1, 10**6))
def test_the_default_micro_batch_divides_the_batch(batch_size):
    """The default allows as many workers as possible, up to eight."""
    micro_batch = default_micro_batch(batch_size)
    assert batch_size % micro_batch == 0
    assert batch_size // micro_batch <= 8
    better = [k for k in range(1, 9) if batch_size % k == 0]
    assert batch_size // micro_batch == max(better)
