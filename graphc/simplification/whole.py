"""Simplification as a whole: sweeps until nothing changes, with what goes before and after them."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from graphc import edit, shapes
from graphc.contract import PassResult, no_progress
from graphc.simplification import chains, constants, dead, inlining, noops, recurrent, scopes, sizes
from graphc.simplification.sweep import Sweep

_MOST_SWEEPS = 10


def simplify(
    model: ir.Model,
    result: PassResult,
    *,
    compute: bool = True,
    growth: int = 16_000_000,
    progress: Callable[[str, int, int], None] = no_progress,
) -> None:
    """Compute what is constant, share what is equal, remove what does nothing, and infer shapes, in place.

    Args:
        model: Any model.
        result: Gets the changes and the refusals.
        compute: Whether anything may be computed or inlined; otherwise dead code and identities go, and equal
            subexpressions are shared.
        growth: Bytes by which folded constants may make the model larger.
        progress: ``progress(what, done, total)``.
    """
    scopes.prepare(model)
    if compute:
        functions = inlining.inline_functions(model)
        if functions:
            # The bodies bring names along.
            scopes.prepare(model)
        result.change("function inlined", functions)
        result.change("duplicate initializer merged", constants.share(model))
    made = constants.Constants(model, growth)
    rules = [noops.RULES, chains.RULES, sizes.RULES, recurrent.RULES] if compute else [noops.RULES]
    for done in range(_MOST_SWEEPS):
        progress("simplify", done, _MOST_SWEEPS)
        sweep = Sweep(model, result, rules, compute=compute, constants=made)
        changed = sweep.run()
        if not dead.remove(model, result) and not changed:
            break
    if compute:
        result.change("duplicate initializer merged", constants.share(model))
    shapes.annotate(model, sweep.facts)
    # Bodies that took the place of their node may have brought names that were taken outside.
    edit.rename_duplicate_nodes(model)
    for node, reason in sweep.refusals:
        result.refuse(node, reason)
