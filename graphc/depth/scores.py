"""How much each unit of depth, a block or a branch, matters: one function for each criterion.

A unit is a list of branches that go together. Scores are in the order of the units; the lowest goes first.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.contract import Context
from graphc.depth.probe import Probe
from graphc.depth.residual import HEAVY, Branch
from graphc.depth.structure import Block
from graphc.errors import BadInput

if TYPE_CHECKING:
    from graphc.stats import Similarity

CHUNK = 1 << 22
"""Elements of a weight that are looked at together."""


@dataclass(frozen=True, eq=False)
class Unit:
    """What is dropped together.

    Attributes:
        name: Its name, for people and patterns.
        block: The block that it is, or is in.
        branches: Its branches.
        whole: Whether it is all of its block.
    """

    name: str
    block: Block
    branches: tuple[Branch, ...]
    whole: bool

    @property
    def ends(self) -> tuple[ir.Value, ir.Value]:
        """The stream with and without the unit's own contribution: what goes in, and what comes out."""
        if self.whole:
            return self.block.start, self.block.end
        return self.branches[0].stream, self.branches[0].total

    @property
    def constants(self) -> list[ir.Value]:
        """The floating-point constants that belong to it alone."""
        own = self.block.constants if self.whole else self.branches[0].constants
        return [
            value
            for value in own
            if (held := edit.tensor(value)) is not None and held.dtype.is_floating_point() and held.size > 1
        ]


def units(blocks: Sequence[Block], kind: str) -> list[Unit]:
    """Blocks, or the branches of blocks, as units."""
    if kind == "block":
        return [Unit(block.name, block, tuple(block.branches), True) for block in blocks]
    return [Unit(b.name, block, (b,), len(block.branches) == 1) for block in blocks for b in block.branches]


def random(found: Sequence[Unit], ctx: Context) -> list[float]:
    """Uniform in [0, 1), from the run's seed and the unit's name: what every criterion must beat."""
    return [float(np.random.default_rng((ctx.seed, zlib.crc32(u.name.encode()))).random()) for u in found]


def magnitude(found: Sequence[Unit], ctx: Context) -> list[float]:
    """Mean absolute value of the unit's weights: units of all sizes can be compared."""
    scores = []
    for i, unit in enumerate(found):
        ctx.progress("rank blocks", i, len(found))
        total, count = 0.0, 0
        for value in unit.constants:
            held = edit.tensor(value)
            assert held is not None
            array = held.numpy().reshape(-1)
            for start in range(0, array.size, CHUNK):
                total += float(np.abs(array[start : start + CHUNK].astype(np.float32)).sum(dtype=np.float64))
            count += array.size
            del array
            edit.release(held)
        if not np.isfinite(total):
            raise BadInput(f"a weight of '{unit.name}' holds NaN or infinity", where="drop-blocks")
        scores.append(total / max(count, 1))
    return scores


def probed(model: ir.Model, found: Sequence[Unit], count: int, metric: str, greedy: bool, ctx: Context) -> list[float]:
    """What the outputs lose without each unit.

    Args:
        model: The model.
        found: The units.
        count: How many will go.
        metric: What is measured, see :class:`Probe`.
        greedy: Whether each of the ``count`` that go is chosen given those before, which takes a sweep each. Their
            scores are then below all others, in the order in which they go.
        ctx: The context.
    """
    branches = [branch for unit in found for branch in unit.branches]
    probe = Probe(model, branches, ctx.calibration, metric, ctx.progress, ctx.labels)
    gone: list[Unit] = []
    scores: dict[str, float] = {}
    while True:
        off = [branch for unit in gone for branch in unit.branches]
        left = [unit for unit in found if unit not in gone]
        scores |= {unit.name: probe([*off, *unit.branches]) for unit in left}
        if not greedy or len(gone) + 1 >= min(count, len(found)):
            break
        gone.append(min(left, key=lambda unit: scores[unit.name]))
    probe.close()
    ranks = {unit.name: -np.inf if unit in gone else scores[unit.name] for unit in found}
    return [ranks[unit.name] for unit in found]


def depth(model: ir.Model, found: Sequence[Unit], metric: str, half: str, ctx: Context) -> int:
    """How many of the last units to drop, where the loss without them is least (L3Prune, 2024).

    Args:
        model: The model.
        found: The units of one chain, in order, of which any number may be taken from the end.
        metric: What is measured, see :class:`Probe`.
        half: "large" drops up to half of them, "small" at least half.
        ctx: The context.
    """
    probe = Probe(
        model, [b for unit in found for b in unit.branches], ctx.calibration, metric, ctx.progress, ctx.labels
    )
    middle = len(found) // 2
    counts = range(1, middle + 1) if half == "large" else range(max(middle, 1), len(found))
    losses = {n: probe([b for unit in found[len(found) - n :] for b in unit.branches]) for n in counts}
    probe.close()
    return min(losses, key=lambda n: (losses[n], -n)) if losses else 0


def taylor(found: Sequence[Unit], model: ir.Model, ctx: Context) -> list[float]:
    """``sum |w * dL/dw|`` over the unit's weights (Shortened LLaMA), with the gradient of the mean loss."""
    from graphc.stats import GradientsOf

    requests = {value.name or "": GradientsOf(value.name or "") for unit in found for value in unit.constants}
    collected = ctx.collect(model, requests.values())
    scores = []
    for unit in found:
        total = 0.0
        for value in unit.constants:
            held = edit.tensor(value)
            assert held is not None
            gradient = collected[requests[value.name or ""]].total
            total += float(np.abs(held.numpy().astype(np.float32) * gradient).sum(dtype=np.float64))
            edit.release(held)
        scores.append(total)
    return scores


def similarity(found: Sequence[Unit], model: ir.Model, ctx: Context) -> list[float]:
    """Block influence of ShortGPT: ``1 - cos`` of what goes in and what comes out."""
    return [1.0 - each.cosine for each in turned(model, [unit.ends for unit in found], ctx)]


def turned(model: ir.Model, pairs: Sequence[tuple[ir.Value, ir.Value]], ctx: Context) -> list[Similarity]:
    """How far, for each pair of values, the first turns into the second."""
    from graphc.stats import SimilarityOf

    requests = [SimilarityOf(a.name or "", b.name or "", _channels(b)) for a, b in pairs]
    collected = ctx.collect(model, requests)
    return [collected[request] for request in requests]


def _channels(value: ir.Value) -> int:
    """The axis of a stream's channels: the second one behind a convolution, else the last."""
    seen = 0
    todo = [value]
    while todo and seen < 64:
        node = todo.pop(0).producer()
        seen += 1
        if node is None:
            continue
        if node.op_type in ("Conv", "ConvTranspose", "FusedConv"):
            return 1
        if node.op_type in HEAVY or node.op_type in ("Transpose", "Reshape", "Flatten"):
            return -1
        todo += [v for v in node.inputs if v is not None]
    return -1


def runs(found: Sequence[Unit], length: int) -> list[tuple[int, ...]]:
    """Every row of ``length`` consecutive blocks of one chain, as indices of units that are whole blocks."""
    result = []
    for start in range(len(found) - length + 1):
        row = found[start : start + length]
        if all(a.block.end is b.block.start or _next(a, b) for a, b in pairwise(row)):
            result.append(tuple(range(start, start + length)))
    return result


def _next(a: Unit, b: Unit) -> bool:
    """Whether one block follows another, perhaps through a normalisation."""
    before = b.block.sums[0].before
    return before is not None and before is a.block.sums[-1]


def alike(a: ir.Model, b: ir.Model, name: str, ctx: Context) -> float:
    """Mean cosine between a value of one model and that of the same name in another, each sample flat."""
    from graphc import runtime
    from graphc.collection import with_outputs

    sessions = []
    for model in (a, b):
        tapped = with_outputs(model, [name])
        big = runtime.constants_nbytes(tapped) > runtime.BIG
        sessions.append(runtime.session(tapped, optimise=not big, frugal=big))
    total = 0.0
    for i, sample in enumerate(ctx.calibration):
        ctx.progress("comparing the end of the chain", i, len(ctx.calibration))
        x, y = (
            s.run({n: v for n, v in sample.items() if n in s.input_names})[name].astype(np.float64).reshape(-1)
            for s in sessions
        )
        norms = float(np.linalg.norm(x) * np.linalg.norm(y))
        total += float(x @ y) / norms if norms else 0.0
    for session in sessions:
        session.close()
    return total / max(len(ctx.calibration), 1)
