"""What a rule of `diagnosis.py` finds, and what the rules have in common.

Rules stand in two files: those that read looks in `diagnosis.py`, those that read ends of epochs in
`epoch_rules.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["STUCK", "Finding"]

STUCK = 0.95
"""A loss of this share of the reference, or more, has learned nothing."""


@dataclass(frozen=True)
class Finding:
    """A diagnosis: what is wrong since which step, how it shows, and what to do."""

    name: str
    step: int
    message: str
    remedy: str
    evidence: dict[str, Any] = field(default_factory=dict)
