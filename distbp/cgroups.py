"""How much processor time the control groups of a process grant: containers limit by quota, not by cores."""

from __future__ import annotations

from pathlib import Path

__all__ = ["cpu_quota"]


def cpu_quota(process: Path = Path("/proc/self")) -> float | None:
    """Return how many cores' time the cgroups (v1 or v2) of this process grant, None for no limit.

    Every ancestor may limit, so the least quota on the way to the root counts.  `process` is the directory in
    which the kernel describes a process: `cgroup` and `mountinfo` are read.  (cgroups(7), proc(5))
    """
    try:
        memberships = (process / "cgroup").read_text().splitlines()
        mounts = [line.split() for line in (process / "mountinfo").read_text().splitlines()]
    except OSError:
        return None
    quotas: list[float] = []
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        wanted = "cgroup" if "cpu" in controllers.split(",") else "cgroup2" if not controllers else None
        for mount in mounts:
            kind, options = mount[mount.index("-") + 1], mount[-1].split(",")
            if kind == wanted and (kind == "cgroup2" or "cpu" in options):
                quotas += _quotas_on_the_way(Path(mount[4]), mount[3], path)
    return min(quotas, default=None)


def _quotas_on_the_way(mount: Path, root: str, path: str) -> list[float]:
    """Return the quotas of the group `path` and its ancestors, below `mount`, which shows `root`."""
    inside = Path(path).is_relative_to(root)
    # In a container the group may lie outside of what is mounted; the mount is then the group's own.
    folder = mount / Path(path).relative_to(root) if inside else mount
    groups = [folder, *folder.parents]
    found = [_quota(group) for group in groups[: groups.index(mount) + 1]]
    return [quota for quota in found if quota is not None]


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
