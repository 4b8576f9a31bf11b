"""What is said about a corrupted state: the line on the terminal and the record, alike on every backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["CorruptionEvent", "describe_corruption"]


@dataclass(frozen=True)
class CorruptionEvent:
    """`text` for the terminal, `record` for `events.jsonl`."""

    text: str
    record: dict[str, Any]


def describe_corruption(finding: dict[str, Any], hosts: Sequence[str]) -> CorruptionEvent:
    """Put into words what `verify.Corruption.finding` says; `hosts[h]` is the name of host h.

    A host that nobody can name is "unknown": of two hosts that differ, either may be right.
    """
    number = finding["host"]
    odd = [hosts[host] for host in finding["odd_hosts"]]
    fields = {
        "step": finding["step"],
        "lane": finding["lane"],
        "host": "unknown" if number is None else ",".join(odd),
        "tensor": finding["tensor"] or "unknown",
        "cause": finding["cause"].replace(" ", "-"),
    }
    if number is None:
        fields["hosts"] = ",".join(hosts)
    text = " ".join(["E_CORRUPT_STATE", *(f"{key}={value}" for key, value in fields.items())])
    return CorruptionEvent(text, {"kind": "corrupt"} | fields)
