"""A backend for `ray.util.collective`: collectives on NumPy arrays between any Ray actors, without torch.

    from distbp.backends.ray_collective import register
    from ray.util import collective

    register()                                        # in the driver, and in every actor
    collective.init_collective_group(4, rank, backend="distbp", group_name="g")
    collective.allreduce(array, group_name="g")       # array holds the sum of all four

Ranks on one node meet in shared memory, nodes exchange messages over TCP (`flow.py`, `moves.py`, `sums.py`);
`send` and `recv` do the same for two of them (`pairs.py`).  Sums have one order, a tree over ranks: the bits
are the same on every rank, in every repetition, and however ranks are spread over nodes.

How a group comes to be (`group.py`): ranks leave notes in Ray's internal key-value store (`board.py`) until
all have read rank 0's plan (`meeting.py`), map their node's memory (`memory.py`), and connect their lanes.

What goes wrong ends a group and not the actor: the call raises, and names the rank that has died, has left,
is late or does something else.  On the node of that rank this takes milliseconds; other nodes see the broken
connection and name the node's ranks.  Every later call on the group says so again; destroy the group, in
every actor that is left, and make a new one.

Limits: NumPy arrays only, of numbers for what is joined and of anything but objects for what is moved.  All
ranks call the same operations in the same order (this is checked), from one thread at a time; `send` and
`recv` may each have a thread of their own.
"""

from __future__ import annotations

from functools import cache

from distbp.backends.ray_collective.group import NAME, CollectiveGroup
from distbp.errors import ConfigError, EnvironmentMismatch

__all__ = ["NAME", "register"]


def register(*, deadline_s: float = 30.0, meeting_s: float = 60.0) -> None:
    """Make "distbp" a backend of `ray.util.collective` in this process; may be called again.

    Operations of groups that are made afterwards wait at most `deadline_s` for other ranks, and groups
    `meeting_s` for all ranks to appear.  Raises `EnvironmentMismatch` without Ray, or with one too old.
    """
    try:
        from ray.util.collective import backend_registry
    except ImportError as error:
        raise EnvironmentMismatch(
            "backend 'distbp' needs a Ray whose ray.util.collective takes other backends, and it cannot be "
            f"imported ({error}): pip install -U 'ray[default]>=2.54'"
        ) from error
    for name, seconds in (("deadline_s", deadline_s), ("meeting_s", meeting_s)):
        if not seconds > 0:
            raise ConfigError(f"{name}: expected a positive number of seconds, got {seconds!r}")
    CollectiveGroup.deadline_s, CollectiveGroup.meeting_s = deadline_s, meeting_s
    if not backend_registry._global_registry.is_registered(NAME):
        backend_registry.register_collective_backend(NAME, group_class())


@cache
def group_class() -> type:
    """Return the class that Ray makes groups of: ours, as a subclass of Ray's."""
    from ray.util.collective.collective_group.base_collective_group import BaseGroup

    return type("DistbpGroup", (CollectiveGroup, BaseGroup), {"__module__": __name__})
