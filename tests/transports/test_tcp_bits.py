"""The tcp transport moves any arrays, of any size, bit for bit; what else it promises is the contract's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distbp.transports.frames import CHUNK_BYTES
from tests.transports.lanes import at_once, open_lanes

FRAME_BYTES = 20 + 4
"""What a frame costs besides its bytes."""


@pytest.fixture(scope="module")
def three():
    """Three members of a lane, for tests after which they are still good."""
    members = open_lanes(3)
    yield members
    for transport in members:
        transport.close()


DTYPES = ["?", "i1", "u2", "f2", ">f4", "f8", "c8", "M8[s]", "S5", "i4,f8"]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_arrays_arrive(three, data):
    """Arrays of any type, shape and size, other ones for each pair, arrive bit for bit, and in step."""
    shapes = st.lists(st.integers(0, 12), min_size=0, max_size=4).map(tuple)
    kinds = {
        (sender, receiver): (np.dtype(data.draw(st.sampled_from(DTYPES))), data.draw(shapes))
        for sender in range(3)
        for receiver in range(3)
    }
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    sent = {
        pair: np.frombuffer(rng.bytes(dtype.itemsize * int(np.prod(shape))), dtype).reshape(shape)
        for pair, (dtype, shape) in kinds.items()
    }

    def exchange(transport):
        me = transport.rank
        receive = [np.zeros(kinds[host, me][1], kinds[host, me][0]) for host in range(3)]
        transport.alltoall([sent[me, host] for host in range(3)], receive)
        transport.barrier()
        return receive

    for me, received in enumerate(at_once(*(lambda member=member: exchange(member) for member in three))):
        for host, array in enumerate(received):
            assert array.tobytes() == sent[host, me].tobytes()


@pytest.mark.parametrize("extra", [-FRAME_BYTES, -20, -4, -1, 0, 1])
@pytest.mark.parametrize("chunks", [1, 2])
def test_sizes_around_a_chunk(lane, chunks, extra):
    """Nothing is lost or doubled where a frame is cut into chunks."""
    count = chunks * CHUNK_BYTES + extra
    bits = np.random.default_rng(count).integers(0, 256, count, np.uint8)
    copies = [np.zeros(count, np.uint8) for _ in range(2)]
    at_once(
        lambda: lane[0].alltoall([bits[:0], bits], [bits[:0], copies[0]]),
        lambda: lane[1].alltoall([bits, bits[:0]], [copies[1], bits[:0]]),
    )
    assert np.array_equal(copies[0], bits)
    assert np.array_equal(copies[1], bits)


def test_both_may_send_more_than_any_buffer_holds(lane):
    """Two hosts that send 100 MB to each other at the same time both get them."""
    count = 100_000_000

    def exchange(transport):
        mine = np.full(count, 1 + transport.rank, np.uint8)
        theirs = np.zeros(count, np.uint8)
        arrays = [mine[:0], mine[:0]]
        receive = list(arrays)
        arrays[1 - transport.rank], receive[1 - transport.rank] = mine, theirs
        transport.alltoall(arrays, receive)
        return bool(np.all(theirs == 2 - transport.rank))

    assert at_once(*(lambda transport=transport: exchange(transport) for transport in lane)) == [True, True]
