"""Figures as people write them: durations, large and small numbers, shares."""

from __future__ import annotations

import math

__all__ = ["bytes_of", "compact", "duration", "figure", "precise", "share"]

_LARGE = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def duration(seconds: float) -> str:
    """Return a duration as people say it: '8 s', '3 min 20 s', '2 h 5 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def precise(seconds: float) -> str:
    """Return a duration, below a minute with a decimal: '1.9 s'."""
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)


def compact(number: float) -> str:
    """Return a number in few characters, as an axis wants it: '0', '0.25', '1.2k', '3e-5'."""
    size = abs(number)
    if number == 0:
        return "0"
    if size < 1e-4 or size >= 1e15:
        digits, power = f"{number:.6e}".split("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    for factor, suffix in _LARGE:
        if size >= factor:
            return f"{number / factor:.6g}{suffix}"
    return f"{number:.6g}"


def figure(number: float | str | None) -> str:
    """Return a measurement with four digits: '0.4312', '21,519', '3.2e-07'; what is none is a dash."""
    if number is None:
        return "-"
    try:
        value = float(number)
    except ValueError:
        return str(number)
    if not math.isfinite(value):
        return {math.inf: "infinite", -math.inf: "-infinite"}.get(value, "not a number")
    size = abs(value)
    if size >= 1e7:
        return f"{value:.2e}"
    if size >= 1000:
        return f"{value:,.0f}"
    if size and float(f"{size:.3g}") < 1e-3:  # A rate of nearly 0.001 is no 1.00e-03.
        return f"{value:.2e}"
    return f"{value:.4g}"


def share(part: float) -> str:
    """Return a share of 1 as a percentage: '98.89 %'."""
    return f"{part * 100:.4g} %"


def bytes_of(size: float) -> str:
    """Return a size in bytes: '12 kB', '3.4 MB'."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} bytes"
