"""How long those who are in `fit` wait for those who are not.  Pure: times and ranks in, words out.

Somebody may never come: a script that waits for something before `fit`, an import from a file system that
hangs, a node that does not come back.  The missing are named every `name_after_s`, and given up after
`give_up_s`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

__all__ = ["Missing", "Patience"]


@dataclass(frozen=True)
class Missing:
    """Words about the workers that are waited for, and whether nobody waits any longer."""

    text: str
    over: bool


class Patience:
    """Watches who is missing in one job; call `look` now and then."""

    def __init__(self, name_after_s: float, give_up_s: float) -> None:
        self._name_after_s = name_after_s
        self._give_up_s = give_up_s
        self._complete_at = self._named_at = float("-inf")

    def nobody_is_missing(self, now: float) -> None:
        """Note that nobody waits for anybody."""
        self._complete_at = now

    def look(self, now: float, began: float, missing: Collection[int], doing: str) -> Missing | None:
        """Return what there is to say about the `missing`, who are waited for since `began` at the earliest.

        `doing` is what they are meant to do: "call fit", "be replaced".
        """
        waited = now - max(began, self._complete_at)
        if waited > self._give_up_s:
            text = (
                f"waited {waited:.0f} s for worker {sorted(missing)} to {doing}; look at RUN/logs and their "
                "hosts, or raise run.join_timeout_s; then run again: resuming is safe"
            )
            return Missing(text, True)
        if min(waited, now - self._named_at) > self._name_after_s:
            self._named_at = now
            text = f"W_WAITING for worker {sorted(missing)} to {doing}, {waited:.0f} s so far"
            return Missing(text, False)
        return None
