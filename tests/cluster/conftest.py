"""Make `cluster/` importable, which is not part of the installed package, and say where it cannot run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
if str(REPOSITORY) not in sys.path:
    sys.path.insert(0, str(REPOSITORY))


@pytest.fixture(autouse=True, scope="session")
def possible_here():
    """Skip where namespaces cannot be made, with the reason and the cure."""
    from cluster.requirements import what_is_missing

    if reason := what_is_missing():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, possible_here):
    """Three hosts for the tests of one file; tests that change them mend what they changed."""
    from cluster.emulated import EmulatedCluster

    with EmulatedCluster(3, shared=[tmp_path_factory.getbasetemp()]) as cluster:
        yield cluster
