"""Physical pruning, the exact half: every unit that contributes nothing is removed, everywhere it occurs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.axes import cut
from graphc.axes.groups import Groups, analyse
from graphc.contract import Context, Effect, Pass, PassResult, option
from graphc.edit import Array
from graphc.known import ConstantFacets, Knowledge
from graphc.pruning import branches, deadness, folding
from graphc.pruning.biases import add_bias, as_channels
from graphc.pruning.deadness import Dead
from graphc.pruning.folding import Fold
from graphc.pruning.sites import Sites

ROUNDS = 64
"""Each round removes units or branches; what only they read is dead in the next."""


@dataclass(frozen=True)
class Shrink(Pass):
    """Remove what carries only zeros or constants: channels, heads, hidden units, experts, residual branches."""

    effect: ClassVar[Effect] = Effect.EXACT

    allow_interface: bool = option(False, "Whether graph inputs and outputs (KV caches, embeddings) may get narrower.")

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        result = PassResult()
        constants = ConstantFacets()
        for done in range(ROUNDS):
            ctx.progress("remove dead units", done, ROUNDS)
            groups = analyse(model, interface=self.allow_interface)
            known = Knowledge(model, groups.trace, constants)
            if branches.remove(model, known, result):
                continue
            sites = Sites(groups)
            dead = deadness.find(sites, known)
            if not _fold(model, sites, dead, known, result) and not _cut(model, groups, dead, result):
                _refuse(groups, dead, result)
                return result
        result.refuse("shrink", f"stopped after {ROUNDS} rounds: run it again for what died in the last one")
        return result


def _cut(model: ir.Model, groups: Groups, dead: Mapping[str, Dead], result: PassResult) -> bool:
    """Remove the units that contribute nothing."""
    keep: dict[str, Array] = {}
    waiting: set[str] = set()
    for name, found in dead.items():
        group = groups[name]
        mask = deadness.keepable(group, found.silent) if group.exact and name not in waiting else None
        # Units in blocks, and blocks, go in different rounds: the mask of one speaks of all units of the other.
        if mask is not None and not any(block in keep for block in group.block_groups):
            keep[name] = mask
            waiting.update(group.block_groups)
    if not keep:
        return False
    cut.cut(model, groups, keep)
    for name, mask in keep.items():
        result.change(f"{groups[name].kind} removed", int(mask.size - np.count_nonzero(mask)))
    return True


def _refuse(groups: Groups, dead: Mapping[str, Dead], result: PassResult) -> None:
    """Say why the units that are still dead stay."""
    for name, found in dead.items():
        group = groups[name]
        if not found.silent.any():
            continue
        if not group.exact:
            nodes = ", ".join(sorted({n.node.op_type for n in group.normalisers}))
            result.refuse(
                name, f"{nodes} divides by the width: without its zeros it computes something else (narrow-norm)"
            )
        elif found.silent.all(axis=None):
            result.refuse(name, "all of its units are dead, and one must stay")
        elif group.blocks and not found.silent.any(axis=-1).all():
            result.refuse(name, "balanced: some blocks have no dead unit to give")
        else:
            result.refuse(name, f"a constraint keeps the rest: {'; '.join(group.constraints) or 'at least one stays'}")


def _fold(model: ir.Model, sites: Sites, dead: Mapping[str, Dead], known: Knowledge, result: PassResult) -> bool:
    """Move what units contribute as constants into the biases of their readers, and write the units dead.

    Returns:
        Whether there were such units; they are gone in the next round.
    """
    groups = sites.groups
    keep: dict[str, Array] = {}
    moved: dict[ir.Node, tuple[Fold, Array]] = {}
    for name, found in dead.items():
        group = groups[name]
        mask = deadness.keepable(group, found.constant) if group.exact and group.neutral == 0 else None
        if mask is None or found.silent[~mask].all():
            continue
        keep[name] = mask
        for fold, indices in folding.folds(sites, group, ~mask, known):
            # An index that goes with two groups is folded once.
            before = moved[fold.node][1] if fold.node in moved else np.zeros_like(indices)
            moved[fold.node] = (fold, before | indices)
        result.change("constant folded into a bias", int((~mask & ~found.silent).sum()))
    if not keep:
        return False
    biases = [(node, fold.bias(indices)) for node, (fold, indices) in moved.items()]
    cut.zero(model, groups, keep)
    names = edit.Names(model)
    for node, bias in biases:
        add_bias(node, as_channels(node, bias), names)
    return True
