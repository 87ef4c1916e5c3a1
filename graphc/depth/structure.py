"""Blocks: the periods in which residual branches repeat along a chain.

A *chain* is a row of sums, each reading the one before, with nothing but normalisations and activations between.
Branches repeat along it (attention, MLP, attention, MLP, ...); one period is a *block*. No name is looked at, but
that names are shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from graphc.depth.order import Order
from graphc.depth.residual import Branch, Sum, count, own_constants, residual_sums
from graphc.shapes import Facts


@dataclass(eq=False)
class Block:
    """One period of a chain: what a layer is.

    Attributes:
        name: The common part of its weights' names, for people.
        chain: The number of its chain.
        sums: The sums that it consists of.
        constants: The constants that only it reads: those of its branches, and what these share.
    """

    name: str
    chain: int
    sums: tuple[Sum, ...]
    constants: tuple[ir.Value, ...]

    @property
    def branches(self) -> list[Branch]:
        return [branch for each in self.sums for branch in each.branches]

    @property
    def start(self) -> ir.Value:
        """The stream that enters the block."""
        return self.sums[0].stream

    @property
    def end(self) -> ir.Value:
        """The stream that leaves it."""
        return self.sums[-1].total

    @property
    def parameters(self) -> int:
        return count(self.constants)

    @property
    def flops(self) -> int:
        return sum(branch.flops for branch in self.branches)


@dataclass
class Structure:
    """What was found.

    Attributes:
        chains: The blocks of each chain, in order.
        order: Who depends on whom.
        facts: Shapes and dtypes.
    """

    chains: list[list[Block]]
    order: Order = field(repr=False)
    facts: Facts = field(repr=False)

    @property
    def blocks(self) -> list[Block]:
        return [block for chain in self.chains for block in chain]

    @property
    def branches(self) -> list[Branch]:
        return [branch for block in self.blocks for branch in block.branches]


def find(model: ir.Model) -> Structure:
    """The residual branches and blocks of a model's main graph; it is not changed, and no weight is read."""
    order, facts = Order(model.graph), Facts(model)
    for node in model.graph:
        facts.visit(node)
    sums = residual_sums(model.graph, order, facts, _flops(model))
    chains = []
    for i, chain in enumerate(_chains(sums)):
        chains.append([_block(i, part, order) for part in _periods(chain)])
    structure = Structure(chains, order, facts)
    _name(structure)
    return structure


def _block(chain: int, sums: Sequence[Sum], order: Order) -> Block:
    values = [branch.value for each in sums for branch in each.branches]
    return Block("", chain, tuple(sums), own_constants(values, order))


def _flops(model: ir.Model) -> dict[str, int]:
    """FLOPs by the name of a node's first output."""
    from graphc import flops

    bound = flops.bind(model)
    return {node.outputs[0].name or "": flops.node_flops(node) for node in bound.graph if node.outputs}


def _chains(sums: Sequence[Sum]) -> list[list[Sum]]:
    """Rows of sums, each reading the one before."""
    after: dict[int, Sum] = {}
    for each in sums:
        if each.before is not None:
            after.setdefault(id(each.before), each)
    taken: set[int] = set()
    chains = []
    for each in sums:
        if id(each) in taken:
            continue
        chain = [each]
        taken.add(id(each))
        while (following := after.get(id(chain[-1]))) is not None and id(following) not in taken:
            chain.append(following)
            taken.add(id(following))
        chains.append(chain)
    return chains


def _periods(chain: Sequence[Sum]) -> list[list[Sum]]:
    """A chain cut into periods: of the operators in its branches, or else of whether these mix positions."""

    def operators(each: Sum) -> object:
        return sorted(tuple(sorted(Counter(n.op_type for n in b.nodes).items())) for b in each.branches)

    def mixing(each: Sum) -> object:
        return sorted(branch.mixes for branch in each.branches)

    for signature in (operators, mixing):
        marks = [signature(each) for each in chain]
        for period in range(1, len(chain) // 2 + 1):
            if all(marks[i] == marks[i - period] for i in range(period, len(chain))):
                return [list(chain[i : i + period]) for i in range(0, len(chain), period)]
    if [mixing(each) for each in chain] == [[True], [False]]:
        return [list(chain)]
    return [[each] for each in chain]


def _name(structure: Structure) -> None:
    """Blocks are called what their weights' names have in common, branches after their block and their place in it."""
    taken: Counter[str] = Counter()
    for i, block in enumerate(structure.blocks):
        block.name = _unique(_common(block.branches, f"block{i}"), taken)
        for k, branch in enumerate(block.branches):
            branch.name = f"{block.name}#{k}"


def _common(branches: Sequence[Branch], otherwise: str) -> str:
    """The longest common start, in dotted parts, of the dotted names of constants."""
    names = [
        parts
        for branch in branches
        for value in branch.constants
        if len(parts := (value.name or "").replace("/", ".").split(".")) > 2
    ]
    if not names:
        return otherwise
    first, last = min(names), max(names)
    same = 0
    limit = min(len(first), len(last)) - 1
    while same < limit and first[same] == last[same]:
        same += 1
    text = ".".join(first[:same])
    return text if any(part.isdigit() for part in first[:same]) else otherwise


def _unique(name: str, taken: Counter[str]) -> str:
    taken[name] += 1
    return name if taken[name] == 1 else f"{name}~{taken[name]}"
