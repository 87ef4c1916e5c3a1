"""Depth pruning, the lossy half: whole residual branches become zero. ``shrink`` removes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import onnx_ir as ir

from graphc import edit
from graphc.contract import Context, Effect, Needs, Pass, PassResult, option
from graphc.depth import collapse, linear, scores, slots
from graphc.depth.scores import Unit
from graphc.depth.silence import Silencing
from graphc.depth.structure import Block, find
from graphc.errors import BadInput, nearest


@dataclass(frozen=True)
class DropBlocks(Pass):
    """Take the least important blocks, or single residual branches, out of a model, or let one stand in for several.

    What a block is follows from the graph: 'graphc inspect MODEL --blocks' shows them. The branches of what goes are
    written to zero; 'shrink' after it removes all that computed them.
    """

    effect: ClassVar[Effect] = Effect.LOSSY

    count: int = option(0, "How many units go.", least=0)
    ratio: float = option(
        0.0, "The part of the units that goes, from 0 to below 1; instead of a count.", least=0, below=1
    )
    unit: Literal["block", "branch"] = option("block", "What goes as one: a block, or one of its residual branches.")
    criterion: Literal["influence", "angular", "probe", "taylor", "magnitude", "random", "depth"] = option(
        "influence",
        "How units are ranked: by 1 - cosine of what goes in and comes out, by the angle over that many consecutive "
        "blocks, by what the outputs lose without them, by sum |weight * gradient|, or by mean |weight|. 'depth' drops "
        "as many of the last blocks as costs the outputs least, without a count.",
    )
    half: Literal["large", "small"] = option("large", "For 'depth': up to half of the blocks go, or at least half.")
    metric: str = option(
        "auto",
        "What 'probe' and 'depth' measure, as --max-drop; auto: the loss of labels, perplexity, or the error.",
    )
    greedy: bool = option(False, "For 'probe': choose each unit given those that went before.")
    first: int = option(0, "Blocks at the start of each chain that stay.", least=0)
    last: int = option(0, "Blocks at the end of each chain that stay.", least=0)
    include: tuple[str, ...] = option(
        (), "Patterns of block, branch or weight names that may go; all if none is given."
    )
    exclude: tuple[str, ...] = option((), "Patterns of block, branch or weight names that stay.")
    allow_interface: bool = option(
        False,
        "Whether inputs and outputs of the model go with the blocks that they belong to, as caches of keys and values; "
        "those of later blocks are then counted anew.",
    )
    replace: Literal["none", "linear", "sum", "last"] = option(
        "none",
        "What stands in for the blocks that go: nothing; the best linear map, in the projection before them; or, for "
        "'sum' and 'last', the block before them, given their weights' differences or the last one's weights.",
    )
    ridge: float = option(0.01, "For replace=linear: how strongly the map is held at that of plain dropping.", least=0)
    merge: int = option(4, "For replace=sum and last: how many blocks become one.", least=2)
    threshold: float = option(
        0.9,
        "For replace=sum and last: how similar the end of the chain must stay, a cosine, for a merge to stand.",
        least=-1,
        most=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        where = "drop-blocks"
        if self.count and self.ratio:
            raise BadInput("a count leaves no ratio to choose", where=where, hint="give either count or ratio")
        if self.unit == "branch" and (self.criterion == "angular" or self.replace != "none"):
            what = "criterion=angular" if self.criterion == "angular" else f"replace={self.replace}"
            raise BadInput(f"{what} is for whole blocks", where=where, hint="leave unit=branch out")
        if self.criterion == "depth" and (self.count or self.ratio or self.unit == "branch" or self.replace != "none"):
            raise BadInput("criterion=depth counts the blocks itself", where=where, hint="leave count and the like out")
        if self.greedy and self.criterion != "probe":
            raise BadInput("greedy is for criterion=probe", where=where)

    def needs(self, model: ir.Model) -> Needs:
        free = self.criterion in ("magnitude", "random") and self.replace == "none"
        return Needs(calibration=not free)

    def levels(self, model: ir.Model) -> Sequence[Pass]:
        wanted = self._wanted(len(scores.units(find(model).blocks, self.unit)))
        return (self, *(dataclasses.replace(self, count=n, ratio=0.0) for n in range(wanted - 1, 0, -1)))

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        result = PassResult()
        structure = find(model)
        every = scores.units(structure.blocks, self.unit)
        wanted = self._wanted(len(every))
        if self.criterion == "depth" and every:
            longest = max(structure.chains, key=len)
            last = self._droppable_end(longest, self._candidates(structure.chains, every, result))
            wanted = scores.depth(model, last, self.metric, self.half, ctx) if len(last) > 1 else 0
            self._drop(model, structure.chains, last[len(last) - wanted :], ctx, result)
            return result
        if not every:
            result.refuse("", "no residual branch was found")
        elif not wanted:
            result.refuse("", "neither a count nor a ratio was given: nothing was asked for")
        if not every or not wanted:
            return result
        candidates = self._candidates(structure.chains, every, result)
        if self.replace in ("sum", "last"):
            self._merge(model, structure.chains, candidates, wanted, ctx, result)
            return result
        chosen = self._chosen(model, candidates, wanted, ctx)
        if len(chosen) < wanted:
            result.refuse("", f"only {len(chosen)} of {wanted} can go: the rest is kept by options or cannot be zero")
        self._drop(model, structure.chains, chosen, ctx, result)
        return result

    def _droppable_end(self, chain: Sequence[Block], candidates: Sequence[Unit]) -> list[Unit]:
        """The units at the end of a chain of which none must stay."""
        allowed = {id(unit.block): unit for unit in candidates}
        found: list[Unit] = []
        for block in reversed(chain):
            if id(block) not in allowed:
                break
            found.insert(0, allowed[id(block)])
        return found

    def _wanted(self, units: int) -> int:
        return min(self.count or round(self.ratio * units), units)

    def _candidates(self, chains: Sequence[Sequence[Block]], every: Sequence[Unit], result: PassResult) -> list[Unit]:
        """The units that may go, in order."""
        self._check_patterns(every)
        kept = {id(b) for c in chains for b in (*c[: self.first], *(c[-self.last :] if self.last else ()))}
        found = []
        for unit in every:
            if id(unit.block) in kept or (self.include and not _named(unit, self.include)):
                continue
            if _named(unit, self.exclude):
                continue
            why = next((w for b in unit.branches if (w := Silencing.of(b.value, b.node).why)), "")
            if why:
                result.refuse(unit.name, why)
            else:
                found.append(unit)
        return found

    def _check_patterns(self, every: Sequence[Unit]) -> None:
        names = {name for unit in every for name in _names(unit)}
        for which, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    shown = {unit.name for unit in every}
                    raise BadInput(
                        f"no block, branch or weight is called '{pattern}'",
                        where=f"drop-blocks{{{which}}}",
                        hint=nearest(pattern.strip("*"), shown),
                    )

    def _chosen(self, model: ir.Model, candidates: Sequence[Unit], wanted: int, ctx: Context) -> list[Unit]:
        """The least important candidates."""
        wanted = min(wanted, len(candidates))
        if not wanted:
            return []
        if self.criterion == "angular":
            rows = scores.runs(candidates, wanted)
            if not rows:
                raise BadInput(
                    f"there are no {wanted} consecutive blocks that may go",
                    where="drop-blocks{criterion=angular}",
                    hint="give a smaller count, or fewer options that keep blocks",
                )
            ends = [(candidates[row[0]].ends[0], candidates[row[-1]].ends[1]) for row in rows]
            angles = [each.angle for each in scores.turned(model, ends, ctx)]
            best = min(range(len(rows)), key=angles.__getitem__)
            return [candidates[i] for i in rows[best]]
        ranks = self._ranks(model, candidates, wanted, ctx)
        order = sorted(range(len(candidates)), key=lambda i: (ranks[i], -i))
        return [candidates[i] for i in sorted(order[:wanted])]

    def _ranks(self, model: ir.Model, candidates: Sequence[Unit], wanted: int, ctx: Context) -> list[float]:
        match self.criterion:
            case "probe":
                return scores.probed(model, candidates, wanted, self.metric, self.greedy, ctx)
            case "taylor":
                return scores.taylor(candidates, model, ctx)
            case "magnitude":
                return scores.magnitude(candidates, ctx)
            case "random":
                return scores.random(candidates, ctx)
        return scores.similarity(candidates, model, ctx)

    def _drop(
        self,
        model: ir.Model,
        chains: Sequence[Sequence[Block]],
        chosen: Sequence[Unit],
        ctx: Context,
        result: PassResult,
    ) -> None:
        """Write the branches of the chosen units to zero; with replace=linear, fold a map in before each run."""
        silencings = [Silencing.of(b.value, b.node) for unit in chosen for b in unit.branches]
        fits = self._fits(model, chains, chosen, ctx, result) if self.replace == "linear" else []
        names = edit.Names(model)
        for projection, fit in fits:
            projection.fold(fit.difference, fit.shift, names)
            part = fit.left / fit.plain if fit.plain else 0.0
            result.change(f"run of blocks replaced by a linear map ({part:.0%} of the plain error)")
        for silencing in silencings:
            silencing.write(model)
        for unit in chosen:
            result.change(f"{self.unit} {unit.name} written to zero")
        self._exits(model, chosen, result)

    def _exits(self, model: ir.Model, chosen: Sequence[Unit], result: PassResult) -> None:
        """Outputs of the model that belong to what goes leave with it, or stay, where that is not allowed."""
        branches = [branch for unit in chosen for branch in unit.branches]
        if self.allow_interface:
            result.change("input or output removed", len(slots.remove(model, branches)))
            return
        for out in {out.name or "": out for branch in branches for out in branch.exits}:
            result.refuse(
                out, "an output of the model: what computes it stays, though no block reads it (allow-interface)"
            )

    def _fits(
        self,
        model: ir.Model,
        chains: Sequence[Sequence[Block]],
        chosen: Sequence[Unit],
        ctx: Context,
        result: PassResult,
    ) -> list[tuple[linear.Projection, linear.Fit]]:
        gone = {id(unit.block) for unit in chosen}
        found = []
        for chain in chains:
            at = 0
            while at < len(chain):
                end = at
                while end < len(chain) and id(chain[end]) in gone:
                    end += 1
                if end > at:
                    row = chain[at:end]
                    why = _no_map(chain, at)
                    projection = None
                    if not why:
                        projection, why = linear.before(chain[at - 1])
                    if projection is None:
                        result.refuse(row[0].name, f"dropped without a linear map: {why}")
                    else:
                        ends = (row[0].start.name or "", row[-1].end.name or "")
                        found.append((projection, linear.fit(model, ends, projection, self.ridge, ctx)))
                at = end + 1
        return found

    def _merge(
        self,
        model: ir.Model,
        chains: Sequence[Sequence[Block]],
        candidates: Sequence[Unit],
        wanted: int,
        ctx: Context,
        result: PassResult,
    ) -> None:
        """LaCo: from the end of each chain on, merge blocks into the one before them while the end stays similar."""
        allowed = {id(unit.block) for unit in candidates}
        original = model.clone()
        merged: list[Unit] = []
        dropped = 0
        for number, chain in enumerate(chains):
            at = len(chain) - self.merge
            while at >= 0 and dropped < wanted:
                size = 1 + min(self.merge - 1, wanted - dropped)
                if not all(id(block) in allowed for block in chain[at + 1 : at + size]):
                    at -= 1
                    continue
                trial = model.clone()
                why = _collapsed(trial, find(trial).chains[number][at : at + size], self.replace)
                if not why and scores.alike(original, trial, chain[-1].end.name or "", ctx) < self.threshold:
                    why = f"the end of the chain would be less similar than {self.threshold:g}"
                if why:
                    result.refuse(chain[at].name, f"not merged: {why}")
                    at -= 1
                    continue
                _collapsed(model, chain[at : at + size], self.replace)
                merged += [unit for unit in candidates if any(unit.block is b for b in chain[at + 1 : at + size])]
                dropped += size - 1
                names = ", ".join(block.name for block in chain[at + 1 : at + size])
                result.change(f"{names} merged into {chain[at].name}")
                at -= self.merge
        self._exits(model, merged, result)
        if dropped < wanted:
            result.refuse("", f"only {dropped} of {wanted} blocks were merged: lower the threshold or the merge size")


def _collapsed(model: ir.Model, row: Sequence[Block], how: str) -> str:
    """Let the first of several blocks stand for all of them; why it cannot, or nothing."""
    silencings = [Silencing.of(branch.value, branch.node) for block in row[1:] for branch in block.branches]
    why = collapse.merge(model, row[0], row[1:], how)
    if not why:
        for silencing in silencings:
            silencing.write(model)
    return why


def _no_map(chain: Sequence[Block], at: int) -> str:
    """Why no linear map can stand in for blocks from ``at`` on, or nothing."""
    if at == 0:
        return "no block comes before it"
    if chain[at].start is not chain[at - 1].end:
        return "a normalisation or an activation stands between it and the block before"
    return ""


def _names(unit: Unit) -> set[str]:
    weights = {value.name or "" for value in unit.constants}
    return {unit.name, unit.block.name, *(branch.name for branch in unit.branches), *weights}


def _named(unit: Unit, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in _names(unit))
