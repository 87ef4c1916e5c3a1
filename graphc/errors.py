"""What a user is told when something cannot be done: what, where, why, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from enum import IntEnum


class ExitCode(IntEnum):
    """What the command line returns."""

    OK = 0
    CHECK_FAILED = 1
    BAD_INPUT = 2


class GraphcError(Exception):
    """An error that the user can act on; the command line prints it without a traceback.

    Args:
        what: What went wrong, as one sentence without a final period.
        where: The file, node, pass or option it concerns.
        why: The cause, if it is known.
        hint: What to do about it.
    """

    exit_code = ExitCode.BAD_INPUT

    def __init__(self, what: str, *, where: str = "", why: str = "", hint: str = "") -> None:
        self.what, self.where, self.why, self.hint = what, where, why, hint
        parts = [what]
        if where:
            parts.append(f"  where: {where}")
        if why:
            parts.append(f"  why:   {why}")
        if hint:
            parts.append(f"  try:   {hint}")
        super().__init__("\n".join(parts))


class BadInput(GraphcError):
    """The model, data, recipe or option given cannot be used."""


class NotHere(BadInput):
    """Something is right, but this machine lacks what it runs on."""


class CheckFailed(GraphcError):
    """A check, a gate or a comparison did not hold."""

    exit_code = ExitCode.CHECK_FAILED


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint that names what ``word`` was probably meant to be, or lists what there is."""
    choices = sorted(known)
    close = get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"there is: {', '.join(choices) or 'none'}"
