"""A member of a lane as a process of its own, for tests: `python lane_member.py RANK SIZE ADDRESS WHAT`.

It says where it listens, is told the key and where all members listen, does `WHAT`, and says what came of it;
all of that in lines of JSON on standard input and output.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time

import numpy as np

from distbp.transports import wire
from distbp.transports.base import Transport
from distbp.transports.tcp import open_lane

DEADLINE_S = 60.0


def say(**what: object) -> None:
    """Write one line of JSON."""
    print(json.dumps(what), flush=True)


def exchange(transport: Transport) -> str:
    """Swap and gather random bytes many times; return the hash of all that came."""
    rng = np.random.default_rng(transport.rank)
    seen = hashlib.sha256()
    for count in (0, 1, 1000, 1_000_000, 7):
        shared = np.random.default_rng(count).integers(0, 256, count, np.uint8)
        receive = [np.zeros(count, np.uint8) for _ in range(transport.size)]
        transport.alltoall([shared ^ np.uint8(transport.rank)] * transport.size, receive)
        for host, array in enumerate(receive):
            assert np.array_equal(array, shared ^ np.uint8(host))
        transport.allgather(rng.integers(0, 256, count, np.uint8), receive)
        for array in receive:
            seen.update(array.tobytes())
        transport.barrier()
    return seen.hexdigest()


def swap_for_ever(transport: Transport) -> str:
    """Keep data on their way in both directions."""
    arrays = [np.zeros(1_000_000, np.uint8) for _ in range(transport.size)]
    while True:
        transport.alltoall(arrays, [array.copy() for array in arrays])


def wait_for_the_others(transport: Transport) -> str:
    """Wait in a barrier that member 1 never comes to; it is well, and idle."""
    if transport.rank == 1:
        time.sleep(DEADLINE_S)
    transport.barrier()
    return "nobody was missing"


WORK = {"exchange": exchange, "swap": swap_for_ever, "wait": wait_for_the_others}


def listen_for_ever(listener: wire.Listener, addresses: list[tuple[str, int]], rank: int, key: bytes) -> str:
    """Hold a connection between members 0 and 1 over which nothing is said."""
    if rank == 0:
        connection = listener.accept(DEADLINE_S)
        assert connection is not None
    else:
        connection = wire.connect(addresses[0], key, {}, DEADLINE_S)
    say(ready=True)
    return f"heard {connection.receive(DEADLINE_S)}"


def main() -> None:
    """Be a member."""
    rank, size, address, what = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    told = json.loads(sys.stdin.readline())
    key = bytes.fromhex(told["key"])
    listener = wire.Listener(address, key)
    say(address=listener.address)
    addresses = [(host, port) for host, port in json.loads(sys.stdin.readline())]
    try:
        if what == "listen":
            result = listen_for_ever(listener, addresses, rank, key)
        else:
            names = [f"host{host}" for host in range(size)]
            transport = open_lane(
                listener, addresses, rank, key, label={"lane": 0}, names=names, deadline_s=DEADLINE_S
            )
            say(ready=True)
            result = WORK[what](transport)
        say(result=result)
    except (EOFError, OSError, wire.TransportError) as error:
        say(error=type(error).__name__, text=str(error), at=time.monotonic())


if __name__ == "__main__":
    main()
