"""The built-in data set: 1,797 real handwritten digits, so that training works without a download.

E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998
(doi:10.24432/C50P49), the test part, licence CC BY 4.0.  DIGITS.md beside this file tells how `digits.npz`
was made.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from distbp.data.arrays import read
from distbp.data.base import Request, Sources

__all__ = ["read_digits"]

FILE = Path(__file__).with_name("digits.npz")


def read_digits(request: Request) -> Sources:
    """Return the digits: x uint8 (1797, 8, 8), 0 to 16, y the digit shown; the path is ignored."""
    source = read(replace(request, path=FILE)).train
    return Sources(replace(source, name="digits", schema={**source.schema, "format": "digits"}))
