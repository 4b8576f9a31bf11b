"""The contract of a transport (`distbp/transports/base.py`), run over every implementation.

A newcomer adds one entry to `NETWORKS`: a context manager that is called with the number of hosts and the
deadline, and yields one transport for each host.  Here a host is a thread of this process.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distbp.errors import TransportError
from distbp.transports.base import TransportAborted
from distbp.transports.threads import Hub
from tests.transports.lanes import open_lanes

PATIENCE_S = 60.0
"""No test waits this long; it only keeps a broken transport from hanging the suite."""

SHORT_S = 0.05


@contextmanager
def threads_network(size, deadline_s):
    """Connect hosts through mailboxes in memory."""
    hub = Hub(size, deadline_s)
    transports = [hub.connect(rank) for rank in range(size)]
    yield transports
    for transport in transports:
        transport.close()


@contextmanager
def tcp_network(size, deadline_s):
    """Connect hosts by real connections over the loopback interface."""
    transports = open_lanes(size, deadline_s)
    yield transports
    for transport in transports:
        transport.close()


NETWORKS = {"threads": threads_network, "tcp": tcp_network}

SIZES = (1, 2, 3, 4, 5)

DTYPES = ("f4", "f8", "i8", "u1")


@pytest.fixture(params=NETWORKS)
def network(request):
    """Return one implementation's way to connect hosts."""
    return NETWORKS[request.param]


def on_every_host(transports, work):
    """Run `work(transport)` on every host at once; return the results, or raise what the first one raised."""
    results, failures = [None] * len(transports), []

    def run(transport):
        try:
            results[transport.rank] = work(transport)
        except BaseException as error:
            failures.append(error)
            for other in transports:
                other.abort()

    threads = [threading.Thread(target=run, args=(transport,)) for transport in transports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results


def connect_and_run(network, size, work):
    """Connect `size` hosts and run `work(transport)` on each."""
    with network(size, PATIENCE_S) as transports:
        return on_every_host(transports, work)


def message(sender, receiver, count, dtype, salt=0):
    """Return what `sender` has for `receiver`: any bits but those of any other pair."""
    rng = np.random.default_rng((sender, receiver, count, salt))
    return np.frombuffer(rng.bytes(count * np.dtype(dtype).itemsize), dtype).copy()


def same_bits(left, right):
    """Compare two arrays byte by byte, so that NaN equals itself."""
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


@pytest.mark.parametrize("size", SIZES)
def test_ranks_and_sizes(network, size):
    """Every end knows which host it is and how many there are."""
    with network(size, PATIENCE_S) as transports:
        assert [(transport.rank, transport.size) for transport in transports] == [
            (rank, size) for rank in range(size)
        ]


@pytest.mark.parametrize("count", [0, 1, 1000, 300_000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_alltoall(network, size, dtype, count):
    """Host r gets from host s the bits that s had for r; buffers have a size for each pair, 0 among them."""

    def work(transport):
        me = transport.rank
        counts = [[count * ((a + 2 * b) % 3) for b in range(size)] for a in range(size)]
        send = [message(me, host, counts[me][host], dtype) for host in range(size)]
        receive = [np.zeros(counts[host][me], dtype) for host in range(size)]
        transport.alltoall(send, receive)
        return all(
            same_bits(receive[host], message(host, me, counts[host][me], dtype)) for host in range(size)
        )

    assert all(connect_and_run(network, size, work))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_allgather(network, size, dtype):
    """Everybody gets everybody's buffer, of a length of its own, into views of one vector."""
    edges = np.cumsum([0, *(7 * (host % 3) for host in range(size))])

    def work(transport):
        whole = np.zeros(edges[-1], dtype)
        views = [whole[edges[host] : edges[host + 1]] for host in range(size)]
        transport.allgather(message(transport.rank, 0, len(views[transport.rank]), dtype), views)
        return whole

    expected = np.concatenate(
        [message(host, 0, edges[host + 1] - edges[host], dtype) for host in range(size)]
    )
    assert all(same_bits(whole, expected) for whole in connect_and_run(network, size, work))


@pytest.mark.parametrize("count", [0, 1, 300_000])
@pytest.mark.parametrize("size", SIZES)
def test_broadcast_from_every_root(network, size, count):
    """Everybody ends with the root's bits, whichever host is the root."""

    def work(transport):
        arrays = []
        for root in range(size):
            arrays.append(message(transport.rank, root, count, "f4"))
            transport.broadcast(arrays[-1], root)
        return arrays

    for arrays in connect_and_run(network, size, work):
        for root, array in enumerate(arrays):
            assert same_bits(array, message(root, root, count, "f4"))


def test_matrices_travel_whole(network):
    """Buffers may have any shape, as long as both sides have the same."""

    def work(transport):
        send = [message(transport.rank, host, 6, "f8").reshape(2, 3) for host in range(2)]
        receive = [np.zeros((2, 3)) for _ in range(2)]
        transport.alltoall(send, receive)
        return all(
            same_bits(receive[host], message(host, transport.rank, 6, "f8").reshape(2, 3))
            for host in range(2)
        )

    assert all(connect_and_run(network, 2, work))


@pytest.mark.parametrize("size", SIZES)
def test_the_barrier_lets_nobody_pass_early(network, size):
    """After the n-th barrier everybody has come to it n times."""
    arrived = [0] * size

    def work(transport):
        for number in range(1, 101):
            arrived[transport.rank] = number
            transport.barrier()
            assert min(arrived) >= number
            assert max(arrived) <= number + 1

    connect_and_run(network, size, work)


@settings(max_examples=25, deadline=None)
@given(
    size=st.sampled_from(SIZES),
    operations=st.lists(st.tuples(st.sampled_from("agbB"), st.integers(0, 50)), max_size=12),
)
@pytest.mark.parametrize("name", NETWORKS)
def test_any_order_of_operations(name, size, operations):
    """Operations that all hosts call in the same order never take each other's messages."""

    def work(transport):
        me = transport.rank
        for salt, (kind, count) in enumerate(operations):
            receive = [np.zeros(count, "f4") for _ in range(size)]
            if kind == "a":
                transport.alltoall([message(me, host, count, "f4", salt) for host in range(size)], receive)
                expected = [message(host, me, count, "f4", salt) for host in range(size)]
            elif kind == "g":
                transport.allgather(message(me, 0, count, "f4", salt), receive)
                expected = [message(host, 0, count, "f4", salt) for host in range(size)]
            elif kind == "b":
                root = salt % size
                receive = [message(me, 0, count, "f4", salt)]
                transport.broadcast(receive[0], root)
                expected = [message(root, 0, count, "f4", salt)]
            else:
                transport.barrier()
                expected = receive
            assert all(same_bits(one, other) for one, other in zip(receive, expected, strict=True))

    connect_and_run(NETWORKS[name], size, work)


@pytest.mark.parametrize("size", SIZES[1:])
def test_the_caller_owns_its_buffers_again(network, size):
    """A buffer that is overwritten as soon as the call returns changes nothing for anybody."""

    def work(transport):
        me = transport.rank
        send = [np.empty(10_000, np.float32) for _ in range(size)]
        receive = [np.empty(10_000, np.float32) for _ in range(size)]
        for number in range(20):
            for host in range(size):
                send[host][:] = 1000 * number + 10 * me + host
            transport.alltoall(send, receive)
            for host in range(size):
                send[host][:] = np.nan
                assert np.all(receive[host] == 1000 * number + 10 * host + me)
            send[0][:] = number + me
            transport.allgather(send[0], receive)
            send[0][:] = np.nan
            assert all(np.all(receive[host] == number + host) for host in range(size))
            root = number % size
            send[0][:] = number + me
            transport.broadcast(send[0], root)
            assert np.all(send[0] == number + root)

    connect_and_run(network, size, work)


OPERATIONS = {
    "alltoall": lambda transport, array: transport.alltoall(
        [array] * transport.size, [array.copy() for _ in range(transport.size)]
    ),
    "allgather": lambda transport, array: transport.allgather(
        array, [array.copy() for _ in range(transport.size)]
    ),
    "broadcast": lambda transport, array: transport.broadcast(array, transport.size - 1),
    "barrier": lambda transport, array: transport.barrier(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_deadline_names_operation_and_host(network, name):
    """A wait that nobody ends says what was waited for, for whom, how long, and what to do."""
    with network(2, SHORT_S) as transports, pytest.raises(TransportError) as raised:
        OPERATIONS[name](transports[0], np.ones(4, np.float32))
    text = str(raised.value)
    assert not isinstance(raised.value, TransportAborted)
    for part in (name, "host 1", "0.05 s", "resuming is safe"):
        assert part in text


@pytest.mark.parametrize("name", OPERATIONS)
def test_abort_ends_a_wait(network, name):
    """A thread that waits for a host that never comes gets `TransportAborted` and not the deadline."""
    with network(2, PATIENCE_S) as transports:
        raised = []
        begun = threading.Event()

        def wait():
            begun.set()
            try:
                OPERATIONS[name](transports[0], np.ones(4, np.float32))
            except TransportError as error:
                raised.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        begun.wait()
        transports[0].abort()
        thread.join(PATIENCE_S / 2)
        assert not thread.is_alive()
        assert [type(error) for error in raised] == [TransportAborted]


def test_abort_before_the_wait_counts(network):
    """An abort that comes a moment too early ends the next wait: no loss is missed between two operations."""
    with network(2, PATIENCE_S) as transports:
        transports[0].abort()
        transports[0].abort()
        with pytest.raises(TransportAborted):
            transports[0].barrier()


def test_close_is_idempotent(network):
    """Closing twice is closing once, also after an abort."""
    with network(2, PATIENCE_S) as transports:
        on_every_host(transports, lambda transport: transport.barrier())
        transports[0].abort()
        for transport in (*transports, *transports):
            transport.close()
