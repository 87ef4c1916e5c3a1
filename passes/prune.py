"""Structured pruning, the lossy half: whole units become zeros. ``shrink`` removes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from graphc.axes import cut
from graphc.axes.groups import Group, Groups, analyse
from graphc.contract import Context, Effect, Needs, Pass, PassResult, option
from graphc.edit import Array
from graphc.errors import BadInput, nearest
from graphc.pruning import allocation, compensation, experts, masks
from graphc.pruning.allocation import Keep, Limits
from graphc.pruning.criteria import criterion
from graphc.pruning.density import Setting
from graphc.pruning.latency import Latency
from graphc.pruning.normalisation import NORMALISATIONS
from graphc.pruning.orders import ORDERS
from graphc.pruning.probe import Probe

KINDS = ("channel", "head", "neuron")
"""What is pruned unless ``kinds`` says otherwise: width and experts are rarely safe to lose without healing."""

LIKED = {"channel": 8, "neuron": 16, "width": 16, "head_dim": 8, "rank": 8}
"""Multiples that a CPU's kernels like, by kind: its vectors hold 8 floats, its matrix kernels step by 16."""
LIKED_CUDA = dict.fromkeys(LIKED, 64)
"""The same for tensor cores, whose tiles are 64 wide."""
STEPS = 4
"""A group has at least so many sizes to choose from: a liked multiple of more than a quarter of it is halved."""

BACKOFF = (0.75, 0.5, 0.35, 0.2, 0.1)
"""Parts of the ratio that the gate tries when the full one costs too much."""


@dataclass(frozen=True)
class Prune(Pass):
    """Write the least important channels, heads and neurons dead, each with everything that belongs to it.

    What is least important is a choice of four, freely combined. Criteria, by what they need to know:

    - weights: ``l1``, ``l2``; ``random``; for experts ``stun`` (clusters of router rows) and ``router-distance``;
    - activations of the calibration data: ``activation`` (CFSP), ``mean-activation`` (AMP, neurons), ``wanda``,
      ``fluctuation`` and ``flap`` (FLAP); for experts ``frequency`` and ``mass`` (UNCURL);
    - how activations vary together: ``projection`` (AMP, heads), ``obs`` (what is lost when the rest makes up for it:
      ZipLM, OSSCAR, DarwinLM);
    - gradients, for which torch is needed: ``taylor``, ``taylor-second``, ``taylor-mix``, ``taylor-vector``
      (LLM-Pruner), ``heapr`` (HEAPr), ``surgeon`` (LLM Surgeon: ``obs`` in units of the loss);
    - the loss of the outputs, measured without each unit in turn (slow): ``loss``;
    - a file: ``scores``.

    Allocations: ``uniform`` takes the same part of each group, ``global`` the lowest scores of all groups,
    ``per-cost`` the lowest by what a unit costs, ``erk`` what layers' sizes call for, ``owl`` less where activations
    have outliers, ``influence`` less where a layer turns the residual stream (CFSP); ``knapsack`` measures the loss of
    the outputs along each group and solves for the least sum, ``evolution`` searches by the loss of the whole.

    Compensation, in the weights that read the units: ``mean`` (FLAP's bias), ``ls`` (least squares with an intercept,
    never worse than the bias on the calibration data), ``obs`` (the same by optimal brain surgery), ``merge`` (similar
    units; of experts, the mean of those whose router rows are near).
    """

    effect: ClassVar[Effect] = Effect.LOSSY

    ratio: float = option(0.0, "The part to remove, from 0 to below 1, of what 'of' counts.", least=0, below=1)
    of: Literal["units", "params", "bytes", "flops", "latency"] = option(
        "units", "What the ratio is a part of: the chosen groups' units, or the model's cost; latency is measured."
    )
    kinds: tuple[str, ...] = option(KINDS, "Kinds of groups to prune; 'all' for every kind.")
    include: tuple[str, ...] = option((), "Patterns of group or weight names to prune; all if none is given.")
    exclude: tuple[str, ...] = option((), "Patterns of group or weight names to leave alone.")
    allocate: Literal["uniform", "global", "per-cost", "erk", "owl", "influence", "knapsack", "evolution"] = option(
        "uniform", "How the budget is spread over groups, see below; 'global' compares the units of all groups."
    )
    criterion: str = option("l2", "How units are ranked within a group, see below; 'scores' takes a file's.")
    normalise: Literal["auto", "none", "mean", "zscore", "l2", "minmax", "rank", "lamp"] = option(
        "auto", "How scores of different groups are made comparable; 'auto' divides by the mean where they are not."
    )
    compensate: Literal["none", "mean", "ls", "obs", "merge"] = option(
        "none", "How the rest makes up for what goes: by a bias (mean), least squares (ls, obs), or similar units."
    )
    sequential: bool = option(
        False, "Whether later layers are refitted on what earlier ones have become; costs a run of the data each."
    )
    scores: Path | None = option(  # noqa: RUF009
        None, "A safetensors file with a score per unit, for criterion=scores."
    )
    mask: Path | None = option(  # noqa: RUF009
        None, "A safetensors file of booleans, true = keep, by group name or weight:axis; instead of a ratio."
    )
    min_keep: int = option(1, "Units that every group keeps at least.", least=1)
    allow_interface: bool = option(False, "Whether graph inputs and outputs (KV caches, embeddings) may get narrower.")
    multiple_of: int | Literal["auto"] = option(
        "auto",
        "Groups keep a multiple of this many units; 'auto' is what the target's kernels like, less where groups are "
        "small: odd sizes can be slower than whole ones.",
        least=1,
    )
    norms: bool = option(
        False, "Also width that a LayerNorm or GroupNorm averages over; only narrow-norm can cut it then."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        where = "prune"
        if (self.criterion == "scores") != (self.scores is not None):
            raise BadInput("criterion=scores and scores=FILE go together", where=where)
        if self.mask is not None and self.ratio:
            raise BadInput("a mask leaves no ratio to choose", where=where, hint="give either mask or ratio")
        if self.criterion != "scores":
            criterion(self.criterion)
        if self.sequential and self.compensate == "none":
            raise BadInput("sequential refits, and compensate=none does not", where=where, hint="compensate=ls")

    def needs(self, model: ir.Model) -> Needs:
        groups = analyse(model, interface=self.allow_interface)
        if self.mask is not None:
            named = masks.keep(masks.read(self.mask), groups, where=str(self.mask))
            chosen = [groups[name] for name in named]
            wanted = []
        elif not self.ratio:
            return Needs()
        else:
            chosen = self._chosen(groups, PassResult())
            asking = [] if self.criterion == "scores" else [criterion(self.criterion).needs]
            asking.append(ORDERS[self.allocate].needs)
            wanted = [ask(groups, chosen) for ask in asking if ask is not None]
        if self.sequential or self.of == "latency":
            wanted.append(Needs(calibration=True))
        if not self.sequential:
            wanted.append(compensation.needs(groups, chosen, self.compensate))
        return Needs(frozenset().union(*(each.statistics for each in wanted)), any(each.calibration for each in wanted))

    def levels(self, model: ir.Model) -> Sequence[Pass]:
        if self.mask is not None:
            return (self,)
        milder = (dataclasses.replace(self, ratio=round(self.ratio * part, 6)) for part in BACKOFF)
        return (self, *milder)

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        groups = analyse(model, interface=self.allow_interface)
        result = PassResult()
        if self.mask is not None:
            keep = masks.keep(masks.read(self.mask), groups, where=str(self.mask))
        else:
            chosen = self._chosen(groups, result)
            if not self.ratio:
                result.refuse("", "the ratio is 0: nothing was asked for")
            keep = self._allocated(model, groups, chosen, ctx, result) if self.ratio else {}
        if problems := cut.check(groups, keep):
            raise BadInput("the mask cannot be applied", where="prune", why="; ".join(problems[:3]))
        if keep:
            self._write(model, groups, keep, ctx, result)
        for name, mask in keep.items():
            result.change(f"{groups[name].kind} written dead", int(np.size(mask) - np.count_nonzero(mask)))
        return result

    def _write(self, model: ir.Model, groups: Groups, keep: Keep, ctx: Context, result: PassResult) -> None:
        """Write units dead, and let the rest make up for them."""
        self._experts(groups, keep, result)
        if not self.sequential:
            # Experts are merged as they are, not through what reads them.
            read = {n: m for n, m in keep.items() if self.compensate != "merge" or groups[n].kind != "expert"}
            repairs = compensation.repairs(groups, read, self.compensate, ctx.statistics, result)
            cut.zero(model, groups, keep)
            compensation.apply(model, repairs, result)
            return
        for i, names in enumerate(rows := compensation.in_order(model, groups, keep)):
            ctx.progress("refitting layer by layer", i, len(rows))
            part = {name: keep[name] for name in names}
            wanted = compensation.needs(groups, (groups[name] for name in names), self.compensate)
            statistics = ctx.collect(model, wanted.statistics)
            repairs = compensation.repairs(groups, part, self.compensate, statistics, result)
            cut.zero(model, groups, part)
            compensation.apply(model, repairs, result)

    def _experts(self, groups: Groups, keep: Keep, result: PassResult) -> None:
        """Merge experts where asked, and say where a router gives the weights of removed ones to all others."""
        for name, mask in keep.items():
            group = groups[name]
            if group.kind != "expert":
                continue
            if self.compensate == "merge":
                why = experts.merged(groups, group, mask)
                if why:
                    result.refuse(name, why)
                else:
                    result.change("experts merged into those that stay", int(np.count_nonzero(~mask)))
            if not experts.shares_out(groups, group):
                result.note(
                    "a router does not bring the weights of the chosen experts to a sum of 1: without some experts, "
                    "those of the others change for every token"
                )

    def _chosen(self, groups: Groups, result: PassResult) -> list[Group]:
        """The groups that the options name."""
        every = {g.kind for g in groups.groups}
        kinds = every if "all" in self.kinds else set(self.kinds)
        known = {"channel", "head", "head_dim", "neuron", "width", "expert", "rank"}
        for kind in kinds - known:
            raise BadInput(f"there is no kind '{kind}'", where="prune{kinds}", hint=nearest(kind, known))
        names = {g.name for g in groups.groups}
        weights = {_weight(p.value) for g in groups.groups for p in g.places}
        for which, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names | weights):
                    raise BadInput(
                        f"no group or weight is called '{pattern}'",
                        where=f"prune{{{which}}}",
                        hint=nearest(pattern.strip("*"), names | weights),
                    )
        chosen = []
        for group in groups.groups:
            if group.kind not in kinds or (self.include and not _named(group, self.include)):
                continue
            if _named(group, self.exclude):
                continue
            if not group.exact and not self.norms:
                result.refuse(
                    group.name, f"{_averagers(group)} averages over it: shrink could not cut it (norms, narrow-norm)"
                )
            elif codes := _in_integers(group):
                result.refuse(
                    group.name, f"{codes} computes with it in integers: shrink could not cut it (prune, then quantize)"
                )
            else:
                chosen.append(group)
        return chosen

    def _allocated(
        self, model: ir.Model, groups: Groups, chosen: list[Group], ctx: Context, result: PassResult
    ) -> Keep:
        scores = self._scores(groups, chosen, ctx, result)
        chosen = [group for group in chosen if group.name in scores]
        limits = {g.name: Limits(max(self.min_keep, g.min_keep), self._multiple(g, ctx)) for g in chosen}
        cost: Callable[[Mapping[str, int]], float]
        if self.of == "latency":
            cost = Latency(model, chosen, ctx, interface=self.allow_interface)
        else:
            cost = allocation.Cost(model, groups, chosen, self.of)
        order, unit_costs = ORDERS[self.allocate], allocation.unit_costs(chosen, cost)
        probe = Probe(model, ctx, self._trial(ctx), interface=self.allow_interface) if order.probes else None
        setting = Setting(groups, chosen, scores, unit_costs, ctx, self.ratio, cost, limits, probe)
        removed = allocation.allocate(chosen, order.levels(setting), self.ratio, cost, limits)
        keep = allocation.masks(chosen, scores, removed)
        reached, possible = (
            1 - cost(counts) / cost({}) if cost({}) else 0.0
            for counts in (removed, {g.name: g.size - limits[g.name].kept(g.size, 0) for g in chosen})
        )
        if possible < self.ratio - 0.01:
            result.refuse(
                "prune",
                f"only {reached:.1%} of the {self.of} can go: what is left is fixed, excluded, or kept by limits",
            )
        elif abs(reached - self.ratio) > 0.01:
            result.refuse(
                "prune",
                f"{reached:.1%} of the {self.of} went: groups keep multiples of units (multiple-of=1 comes nearer)",
            )
        for group in chosen:
            if limits[group.name].least > 1 and group.size - removed.get(group.name, 0) == limits[group.name].least:
                result.refuse(group.name, f"keeps the least it may: {limits[group.name].least} units")
        return keep

    def _trial(self, ctx: Context) -> Callable[[ir.Model, Groups, Mapping[str, Array]], None]:
        """What is done to units that go when an allocation is tried out: as in the end, but in one go."""
        once = dataclasses.replace(self, compensate="none" if self.sequential else self.compensate, sequential=False)
        return lambda model, groups, keep: once._write(model, groups, dict(keep), ctx, PassResult())

    def _scores(self, groups: Groups, chosen: list[Group], ctx: Context, result: PassResult) -> dict[str, Array]:
        """Normalised scores of all groups that have some."""
        if self.scores is not None:
            raw = masks.scores(masks.read(self.scores), groups, chosen, where=str(self.scores))
            scaled = False
        else:
            rank, raw = criterion(self.criterion), {}
            scaled = rank.scaled
            for i, group in enumerate(chosen):
                ctx.progress("ranking units", i, len(chosen))
                found = rank.score(groups, group, ctx)
                if isinstance(found, str):
                    result.refuse(group.name, f"criterion {self.criterion} cannot rank it: {found}")
                else:
                    raw[group.name] = np.asarray(found, dtype=np.float64)
        how = self.normalise if self.normalise != "auto" else "none" if scaled else "mean"
        return {name: NORMALISATIONS[how](scores) for name, scores in raw.items()}

    def _multiple(self, group: Group, ctx: Context) -> int:
        if self.multiple_of == "auto":
            liked = LIKED_CUDA if "CUDAExecutionProvider" in ctx.target.providers else LIKED
            wanted = liked.get(group.kind, 1)
            while wanted * STEPS > group.size and wanted > 1:
                wanted //= 2
        else:
            wanted = self.multiple_of
        return int(np.lcm(wanted, max(group.multiple_of, 1)))


_INTEGERS = (
    "ConvInteger DynamicQuantizeLSTM DynamicQuantizeMatMul MatMulInteger MatMulIntegerToFloat QAttention QGemm "
    "QLinearConv QLinearMatMul"
).split()
"""Operators that read codes: what is zero is not known to be so behind them."""


def _in_integers(group: Group) -> str:
    """An operator on integers that reads one of the group's weights, if there is one."""
    readers = (use.node.op_type for place in group.places for use in place.value.uses())
    return next((name for name in readers if name in _INTEGERS), "")


def _weight(value: ir.Value) -> str:
    return value.name or ""


def _named(group: Group, patterns: tuple[str, ...]) -> bool:
    names = {group.name, *(_weight(p.value) for p in group.places)}
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


def _averagers(group: Group) -> str:
    return ", ".join(sorted({n.node.op_type for n in group.normalisers})) or "an operator"
