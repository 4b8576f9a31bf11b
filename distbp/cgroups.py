"""How much processor time and memory the control groups of a process grant: containers limit by these.

And whether the kernel has taken processes away because memory ran out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["cpu_quota", "memory_bytes", "oom_kills"]


def cpu_quota(process: Path = Path("/proc/self")) -> float | None:
    """Return how many cores' time the cgroups (v1 or v2) of this process grant, None for no limit."""
    return min(_limits("cpu", _quota, process), default=None)


def memory_bytes(process: Path = Path("/proc/self")) -> int:
    """Return how much memory this process may use: that of the machine, or what its cgroups grant."""
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(min([present, *_limits("memory", _memory, process)]))


def oom_kills() -> int:
    """Return how many processes of this machine the kernel has killed for want of memory (proc(5), vmstat).

    It counts those of all control groups, and does not say which processes they were.
    """
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _limits(
    controller: str, read: Callable[[Path], float | None], process: Path = Path("/proc/self")
) -> list[float]:
    """Return the limits of this process's groups under a controller.

    Every ancestor may limit, so the least one on the way to the root counts.  `process` is the directory in
    which the kernel describes a process: `cgroup` and `mountinfo` are read.  (cgroups(7), proc(5))
    """
    try:
        memberships = (process / "cgroup").read_text().splitlines()
        mounts = [line.split() for line in (process / "mountinfo").read_text().splitlines()]
    except OSError:
        return []
    limits: list[float] = []
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        listed = controllers.split(",")
        wanted = "cgroup" if controller in listed else "cgroup2" if not controllers else None
        for mount in mounts:
            kind, options = mount[mount.index("-") + 1], mount[-1].split(",")
            if kind == wanted and (kind == "cgroup2" or controller in options):
                limits += _limits_on_the_way(Path(mount[4]), mount[3], path, read)
    return limits


def _limits_on_the_way(
    mount: Path, root: str, path: str, read: Callable[[Path], float | None]
) -> list[float]:
    """Return the limits of the group `path` and its ancestors, below `mount`, which shows `root`."""
    inside = Path(path).is_relative_to(root)
    # In a container the group may lie outside of what is mounted; the mount is then the group's own.
    folder = mount / Path(path).relative_to(root) if inside else mount
    groups = [folder, *folder.parents]
    found = [read(group) for group in groups[: groups.index(mount) + 1]]
    return [limit for limit in found if limit is not None]


def _memory(group: Path) -> float | None:
    """Return the bytes that one cgroup grants: `memory.max` of v2, `memory.limit_in_bytes` of v1."""
    for name in ("memory.max", "memory.limit_in_bytes"):
        try:
            limit = (group / name).read_text().strip()
        except OSError:
            continue
        return None if limit == "max" else float(limit)
    return None


def _quota(group: Path) -> float | None:
    """Return the cores' time that one cgroup grants: `cpu.max` of v2, `cpu.cfs_*` of v1."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text().strip()
    except OSError:
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)
