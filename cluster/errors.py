"""The one error of the emulated cluster."""

from __future__ import annotations

__all__ = ["ClusterError"]


class ClusterError(Exception):
    """The cluster cannot be emulated here, or a host is not in the state that was asked for."""
