"""A listener and a lane, for tests of one file or the other."""

from __future__ import annotations

import pytest

from distbp.transports import wire
from tests.transports.lanes import HERE, KEY, open_lanes


@pytest.fixture
def listener():
    """A listener at a free port of the loopback interface."""
    listening = wire.Listener(HERE, KEY)
    yield listening
    listening.close()


@pytest.fixture
def lane():
    """Two members of a lane."""
    both = open_lanes(2)
    yield both
    for transport in both:
        transport.close()
