"""What the parts say on stderr: one line at a time, and never at the cost of the run.

Whoever reads may be gone: `distbp train ... 2>&1 | head -1`, a launcher that was killed, a closed terminal.
"""

from __future__ import annotations

import contextlib
import sys

__all__ = ["say"]


def say(text: str) -> None:
    """Print `text` as one line on stderr; a stream that is closed or broken is passed over."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)
