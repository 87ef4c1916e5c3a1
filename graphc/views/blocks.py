"""The blocks and residual branches of a model as plain data and as rows of a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graphc.depth.silence import Silencing
from graphc.views.units import count

if TYPE_CHECKING:
    from graphc.depth.residual import Branch
    from graphc.depth.structure import Structure


def document(structure: Structure) -> dict[str, Any]:
    """Everything as plain data, schema ``graphc-blocks/1``."""
    return {
        "schema": "graphc-blocks/1",
        "blocks": [
            {
                "name": block.name,
                "chain": block.chain,
                "from": block.start.name,
                "to": block.end.name,
                "params": block.parameters,
                "flops": block.flops,
                "branches": [_branch(branch) for branch in block.branches],
            }
            for block in structure.blocks
        ],
    }


def _branch(branch: Branch) -> dict[str, Any]:
    return {
        "name": branch.name,
        "first": branch.nodes[0].name,
        "last": branch.nodes[-1].name,
        "nodes": len(branch.nodes),
        "mixes": branch.mixes,
        "params": branch.parameters,
        "flops": branch.flops,
        "outputs": [value.name for value in branch.exits],
        "kept": Silencing.of(branch.value, branch.node).why,
    }


def rows(structure: Structure) -> list[tuple[str, ...]]:
    """A row for each block and, where it has several, for each of its branches."""
    found: list[tuple[str, ...]] = []
    for block in document(structure)["blocks"]:
        branches = block["branches"]
        ends = f"{branches[0]['first']} ... {branches[-1]['last']}"
        found.append((block["name"], ends, count(block["params"]), count(block["flops"]), _why(branches)))
        for branch in branches if len(branches) > 1 else ():
            kind = "mixes positions" if branch["mixes"] else "each position alone"
            place = branch["name"].removeprefix(block["name"])
            found.append((f"  {place} {kind}", branch["last"], count(branch["params"]), count(branch["flops"]), ""))
    return found


def _why(branches: list[dict[str, Any]]) -> str:
    why = next((branch["kept"] for branch in branches if branch["kept"]), "")
    return f"no: {why}" if why else "yes"
