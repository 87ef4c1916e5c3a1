"""The report of a run: one versioned JSON document; the terminal table and the HTML page are views of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphc.contract import Refusal

if TYPE_CHECKING:
    import onnx_ir as ir

SCHEMA = "graphc-report/1"


@dataclass
class PassReport:
    """What one pass of the recipe did.

    Attributes:
        name: The pass, e.g. ``"fuse"``; ``"load"`` is what the frontend changed.
        options: The pass as recipe text.
        effect: ``"exact"`` or ``"lossy"``.
        changes: What changed, each kind with its count.
        refusals: What was tried and did not apply.
        error: Why the pass had no effect: it failed, its result was wrong, or a gate did not hold.
        rolled_back: Whether the model was restored to what it was before the pass.
        seconds: Wall time of the pass alone, without checks.
        losses: What each layer alone would cost, where the pass measured that.
    """

    name: str
    options: str
    effect: str
    changes: list[str] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    error: str = ""
    rolled_back: bool = False
    seconds: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        refusals = [{"node": r.node, "reason": r.reason, "count": r.count} for r in self.refusals]
        return {**vars(self), "refusals": refusals}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> PassReport:
        return PassReport(**{**data, "refusals": [Refusal(**r) for r in data["refusals"]]})


@dataclass
class Report:
    """What was done to a model, what was proved, what was measured, and why anything was left alone.

    Attributes:
        input: Path, hash and size of what was read (``path, sha256, bytes, parameters, nodes, opset``).
        output: The same of what was written; empty for a dry run.
        target: The backend as text.
        recipe: The recipe as text.
        passes: One entry per pass that ran, in order.
        rewrite: The check of the exact passes: ``{checked, ok, why, cases, worst, outputs}``.
        approximation: What the lossy passes cost: metric -> value; empty if there were none.
        measurements: Whatever was timed: latency, ratio, spread.
        warnings: What the user should know.
        notes: How the input was made, where it was no ONNX model: how it was exported, what it was compared with.
        preset: What was chosen for a goal: ``{name, kind, why}``; empty where the user gave a recipe.
        timings: The hash of the measured times that decided between operators; "" if none did.
        model: The resulting model (not part of the JSON document).
        parts: Where the model is several graphs, the report of each, by name; ``input`` and ``output`` are then all of
            them together, and what passes did is said by part.
    """

    input: dict[str, Any]
    target: str
    recipe: str
    output: dict[str, Any] = field(default_factory=dict)
    passes: list[PassReport] = field(default_factory=list)
    rewrite: dict[str, Any] = field(default_factory=dict)
    approximation: dict[str, Any] = field(default_factory=dict)
    measurements: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    preset: dict[str, str] = field(default_factory=dict)
    timings: str = ""
    model: ir.Model | None = field(default=None, repr=False, compare=False)
    parts: dict[str, Report] = field(default_factory=dict)

    @staticmethod
    def together(parts: Mapping[str, Report]) -> Report:
        """One report of several graphs, without an output."""
        reports = list(parts.values())
        checks = [each.rewrite for each in reports if each.rewrite]
        rewrite: dict[str, Any] = {}
        if checks:
            # The first that is wrong or was not checked, else the one with the largest error.
            odd = next((c for c in checks if not c.get("ok", True) or not c.get("checked", True)), None)
            rewrite = dict(odd or max(checks, key=lambda c: c.get("worst", 0.0)))
        costs: dict[str, float] = {}
        for each in reports:
            for metric, value in each.approximation.items():
                costs[metric] = max(value, costs.get(metric, value))
        return Report(
            input=summed([each.input for each in reports]),
            target=reports[0].target,
            recipe=reports[0].recipe,
            rewrite=rewrite,
            approximation=costs,
            parts=dict(parts),
        )

    @property
    def ok(self) -> bool:
        """Whether every pass did what it should: none failed or was rolled back, and no check failed."""
        if self.parts:
            return all(part.ok for part in self.parts.values())
        return self.rewrite.get("ok", True) and not any(p.error for p in self.passes)

    def to_json(self) -> dict[str, Any]:
        """The document, as plain data."""
        document = {k: v for k, v in vars(self).items() if k not in ("model", "passes", "parts")}
        for key in ("timings", "preset"):
            if not document[key]:
                del document[key]
        parts = {"parts": {name: part.to_json() for name, part in self.parts.items()}} if self.parts else {}
        return {"schema": SCHEMA, **document, "passes": [p.to_json() for p in self.passes], **parts}

    def write(self, path: Path) -> None:
        """Write the document, or its HTML view if the path ends in ``.html``."""
        from graphc.storage.files import write

        if path.suffix == ".html":
            from graphc.views.html import page

            write(path, page(self.to_json()))
        else:
            write(path, json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n")


def summed(described: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a report says of several graphs together: sizes added up, the rest as of the first."""
    first = dict(described[0])
    return first | {key: sum(each[key] for each in described) for key in ("bytes", "parameters", "nodes")}
