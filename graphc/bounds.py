"""What numbers an option may be: declared with it, checked when a pass is made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from graphc.errors import BadInput


@dataclass(frozen=True)
class Bounds:
    """The numbers from ``least`` (or above ``above``) to ``most`` (or below ``below``); None is no bound.

    NaN is within no bounds.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def hold(self, value: float) -> bool:
        """Whether a number is within."""
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        low = "" if self.above is None else f"above {self.above:g}"
        low = low if self.least is None else f"from {self.least:g}"
        high = "" if self.below is None else f"to below {self.below:g}"
        high = high if self.most is None else f"up to {self.most:g}"
        if low and not high and self.least is not None:
            return f"{self.least:g} or more"
        return " ".join(filter(None, ("a number", low, high)))


def check(instance: Any, where: str) -> None:
    """Check every option of a dataclass that was declared with bounds.

    Raises:
        BadInput: A number is out of them; the message has both.
    """
    for field in dataclasses.fields(instance):
        bounds, value = field.metadata.get("bounds"), getattr(instance, field.name)
        if bounds is not None and isinstance(value, int | float) and not bounds.hold(value):
            raise BadInput(f"{field.name.replace('_', '-')} cannot be {value:g}", where=where, hint=f"give {bounds}")
