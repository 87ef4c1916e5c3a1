"""The gate: limits on what a lossy pass may cost and on the size and latency of the result."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from graphc.contract import Arrays
from graphc.errors import BadInput

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphc.runtime import Session

_SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_TIMES = {"": 1.0, "S": 1.0, "MS": 1e-3, "US": 1e-6}
_QUANTITY = re.compile(r"\s*([0-9.]+(?:[eE][+-]?\d+)?)\s*([a-zA-Z]*)\s*$")


@dataclass(frozen=True)
class Gate:
    """One limit that the result must keep.

    Attributes:
        kind: ``"drop"`` (a metric of the outputs), ``"size"`` (bytes on disk) or ``"latency"`` (seconds).
        limit: The largest value allowed.
        relative: Whether ``limit`` is a ratio to the input model (``0.5x``) rather than bytes or seconds.
        metric: For a drop: the metric's name, see ``graphc.checking.metrics``.
    """

    kind: Literal["drop", "size", "latency"]
    limit: float
    relative: bool = False
    metric: str = ""

    def __str__(self) -> str:
        if self.kind == "drop":
            return f"max-drop {self.metric}={self.limit:g}"
        unit = "x" if self.relative else (" bytes" if self.kind == "size" else " s")
        return f"max-{self.kind} {self.limit:g}{unit}"

    @staticmethod
    def drop(text: str) -> Gate:
        """``METRIC=VALUE``, e.g. ``error=0.01``, ``top1=0.02``, ``check.py:loss=0.1``."""
        from graphc.checking.metrics import metric

        name, sign, value = text.rpartition("=")
        if not sign:
            raise BadInput("--max-drop takes METRIC=VALUE", where=repr(text), hint="e.g. --max-drop error=0.01")
        metric(name)
        try:
            return Gate("drop", float(value), metric=name)
        except ValueError:
            raise BadInput(f"--max-drop: '{value}' is not a number", hint="e.g. --max-drop error=0.01") from None

    @staticmethod
    def size(text: str) -> Gate:
        """Bytes with a unit, or a ratio: ``10MB``, ``0.5x``."""
        return Gate("size", *_quantity(text, _SIZES, "--max-size", "10MB or 0.5x"))

    @staticmethod
    def latency(text: str) -> Gate:
        """A time with a unit, or a ratio: ``5ms``, ``0.8x``."""
        return Gate("latency", *_quantity(text, _TIMES, "--max-latency", "5ms or 0.8x"))


HELD = 1 << 30
"""Bytes of the original's outputs that are held, to compare those of candidates with."""

_PART = "what lossy passes cost was read on the first {used} of {given} samples: their outputs are large"


class Judge:
    """Measures what a model's outputs differ by from those of the model as it came.

    Args:
        reference: The model as it came.
        samples: The user's data, as far as its outputs take no more than a gigabyte; inputs are made to fit when there
            is none.
        seed: Of the inputs made.
        progress: ``progress(what, done, total)``.

    Attributes:
        note: How much of the data was used, if not all.

    Raises:
        BadInput: The reference cannot run here.
    """

    def __init__(
        self,
        reference: ir.Model,
        samples: Sequence[Arrays],
        seed: int,
        progress: Callable[[str, int, int], None],
    ) -> None:
        from graphc import measure

        self._progress, self._reference = progress, reference
        self._inputs = list(samples) or measure.samples(reference, seed)
        session = self._session(reference)
        self._wanted = self._outputs(session, "running the original")
        used, given = len(self._wanted), len(self._inputs)
        self._inputs = self._inputs[:used]
        self.note = "" if used == given else _PART.format(used=used, given=given)

    @staticmethod
    def _session(model: ir.Model, *, optimise: bool = False) -> Session:
        from graphc import runtime

        big = runtime.constants_nbytes(model) > runtime.BIG
        return runtime.session(model, optimise=optimise and not big, frugal=big)

    def _outputs(self, session: Session, what: str, model: ir.Model | None = None) -> list[dict[str, Any]]:
        from graphc.checking.interface import fitting

        found, held = [], 0
        for i, arrays in enumerate(self._inputs):
            self._progress(what, i, len(self._inputs))
            found.append(session.run(arrays if model is None else fitting(model, arrays)))
            held += sum(array.nbytes for array in found[-1].values())
            if held > HELD and model is None:
                break
        session.close()
        return found

    def costs(self, candidate: ir.Model, metrics: Sequence[str]) -> Mapping[str, float]:
        """Each metric of the candidate's outputs against the reference's.

        Raises:
            BadInput: The candidate does not run, or a metric cannot be computed from these outputs.
        """
        from graphc.checking.interface import as_came, renames
        from graphc.checking.metrics import metric

        candidate = as_came(self._reference, candidate)
        # As its users run it: of integer weights, the runtime's kernels may round activations as well.
        found = self._outputs(self._session(candidate, optimise=True), "running the candidate", candidate)
        wanted: Sequence[Mapping[str, Any]] = self._wanted
        if (old := renames(candidate)) is not None:
            # What went with the user's leave is no loss.
            found = [{old.get(name, name): array for name, array in case.items()} for case in found]
            wanted = [{n: a for n, a in case.items() if n in got} for case, got in zip(wanted, found, strict=True)]
        return {name: metric(name)(wanted, found, self._inputs) for name in dict.fromkeys(metrics)}


def _quantity(text: str, units: dict[str, float] | dict[str, int], flag: str, example: str) -> tuple[float, bool]:
    match = _QUANTITY.match(text)
    if match:
        number, unit = match.groups()
        try:
            if unit in ("x", "X"):
                return float(number), True
            if unit.upper() in units:
                return float(number) * units[unit.upper()], False
        except ValueError:
            pass
    raise BadInput(f"{flag} cannot be {text!r}", hint=f"e.g. {flag} {example}")
