"""Numbers as people read them."""

from __future__ import annotations


def size(n: float) -> str:
    """Bytes: ``1.3 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 1000 or unit == "GB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.3g} {unit}" if n < 100 else f"{n:.0f} {unit}"
        n /= 1000
    raise AssertionError("unreachable")


def count(n: float) -> str:
    """Large counts: ``308 k``, ``1.2 G``."""
    for unit in ("", " k", " M", " G"):
        if abs(n) < 1000 or unit == " G":
            return f"{n:.0f}{unit}" if not unit or n >= 100 else f"{n:.3g}{unit}"
        n /= 1000
    raise AssertionError("unreachable")


def seconds(t: float) -> str:
    """A duration: ``3.2 ms``."""
    if t >= 1:
        return f"{t:.3g} s"
    return f"{t * 1e3:.3g} ms" if t >= 1e-3 else f"{t * 1e6:.3g} µs"


def percent(before: float, after: float) -> str:
    """A change: ``-12 %``; empty when there is nothing to compare with."""
    if not before:
        return ""
    change = 100 * (after / before - 1)
    return "0 %" if abs(change) < 0.05 else f"{change:+.1f} %" if abs(change) < 10 else f"{change:+.0f} %"
