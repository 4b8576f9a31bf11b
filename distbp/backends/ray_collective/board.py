"""Ray's internal key-value store as the board on which the ranks of a group find each other.

The store lies in the head node's control service.  Our notes have a namespace of their own there, and keys
that begin with the Ray namespace of the job, so that groups of one name in two jobs do not meet.
"""

from __future__ import annotations

__all__ = ["RayBoard", "own_address"]

_STORE = b"distbp-collective"


class RayBoard:
    """The notes of one group; the contract stands in `meeting.py`."""

    def __init__(self, group_name: str) -> None:
        import ray
        from ray.experimental import internal_kv

        self._store = internal_kv
        self._prefix = f"{ray.get_runtime_context().namespace}/{group_name}/"

    def put(self, name: str, value: bytes) -> None:
        """Write a note, over an older one of that name."""
        self._store._internal_kv_put(self._key(name), value, overwrite=True, namespace=_STORE)

    def get(self, name: str) -> bytes | None:
        """Return a note, or None."""
        note: bytes | None = self._store._internal_kv_get(self._key(name), namespace=_STORE)
        return note

    def remove(self, name: str) -> None:
        """Remove a note, if it is there."""
        self._store._internal_kv_del(self._key(name), namespace=_STORE)

    def _key(self, name: str) -> bytes:
        """Return the key of a note."""
        return f"{self._prefix}{name}".encode()


def own_address() -> str:
    """Return the address of this node, as Ray's other nodes know it."""
    import ray

    address: str = ray.util.get_node_ip_address()
    return address
