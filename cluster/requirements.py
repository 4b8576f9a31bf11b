"""What an emulated cluster needs of the machine, and what to do where it is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

__all__ = ["COMMANDS", "what_is_missing"]

COMMANDS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux"}
"""Program -> the Debian package that brings it."""

NAMESPACES = ("--net", "--uts", "--mount", "--ipc", "--pid")


def what_is_missing() -> str | None:
    """Return why no cluster can be emulated here and the cure, or None when one can.

    Being root is not enough in a container, so namespaces are really made, once, for a program that ends.
    """
    if not sys.platform.startswith("linux"):
        return f"an emulated cluster is made of Linux namespaces, and this is {sys.platform!r}: use Linux"
    if os.geteuid() != 0:
        return f"an emulated cluster needs root for its namespaces, and this is user {os.geteuid()}: use sudo"
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    for command, package in COMMANDS.items():
        if shutil.which(command, path=path) is None:
            return (
                f"an emulated cluster needs {command!r}, which is not on PATH: apt-get install -y {package}"
            )
    probe = subprocess.run(
        ["unshare", *NAMESPACES, "--fork", "--mount-proc", "ip", "link", "add", "probe", "type", "bridge"],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    )
    if probe.returncode != 0:
        return (
            f"root may not make namespaces or bridges here ({probe.stderr.strip()!r}): "
            "in a container, start it with --privileged"
        )
    return None
