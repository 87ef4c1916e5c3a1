"""Residual branches: the terms of a sum that are computed from another term of it, the stream.

Where one term of a sum, up to movements and constant factors, is an ancestor of another term of the same shape, the
other term is a branch: without it the sum is the stream. A term on which every other one depends is what dominators
would give, were it not for side inputs (masks, caches, an encoder's states) that reach into a branch from elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphc import edit
from graphc.depth.order import Order
from graphc.shapes import Facts

SUMS = ("Add", "Sum")

MOVES = frozenset(
    "Reshape Transpose Squeeze Unsqueeze Flatten Identity Cast CastLike Dropout Expand Slice Gather GatherND".split()
)
"""Operators that hand on their first input."""

SCALES = frozenset({"Mul", "Div"})

HEAVY = frozenset(
    """
    MatMul Gemm Conv ConvTranspose Einsum FusedMatMul FusedConv FusedGemm MatMulNBits MatMulInteger ConvInteger
    QLinearMatMul QLinearConv LSTM GRU RNN Attention MultiHeadAttention GroupQueryAttention MoE QMoE DeformConv
    If Loop Scan
    """.split()
)
"""Operators that compute with weights, or hold bodies that may: a stream does not go through them."""

MIXERS = frozenset("Attention MultiHeadAttention GroupQueryAttention LSTM GRU RNN Scan Loop CumSum".split())
"""Operators that let positions see each other."""

PRODUCTS = frozenset({"MatMul", "Einsum", "FusedMatMul"})


@dataclass(eq=False)
class Branch:
    """A term of a sum that is computed from another term, the stream.

    Attributes:
        name: Of its block, with its place in it.
        stream: The term that the sum would be without its branches.
        value: The branch's value.
        node: The operator of the sum that reads ``value``.
        total: The value of the whole sum.
        nodes: The nodes between the stream and ``value``.
        constants: The constants that only it reads.
        mixes: Whether positions see each other in it, as in attention and convolutions.
        exits: Outputs of the graph that its nodes compute besides, as the caches of attention.
        flops: Floating-point operations, every dynamic dimension 1.
    """

    name: str
    stream: ir.Value
    value: ir.Value
    node: ir.Node
    total: ir.Value
    nodes: tuple[ir.Node, ...]
    constants: tuple[ir.Value, ...]
    mixes: bool
    exits: tuple[ir.Value, ...]
    flops: int = 0

    @property
    def parameters(self) -> int:
        return count(self.constants)


def count(constants: Sequence[ir.Value]) -> int:
    """Elements of constants, without indices and shapes."""
    held = [tensor for value in constants if (tensor := edit.tensor(value)) is not None]
    return sum(t.size for t in held if t.dtype.is_floating_point() or t.size > edit.SMALL)


@dataclass(eq=False)
class Sum:
    """A sum with at least one residual branch.

    Attributes:
        stream: The term that is left without the branches.
        total: The value of the sum.
        branches: In the order in which they are computed.
        before: The sum that the stream comes from, through nothing but normalisations and activations.
    """

    stream: ir.Value
    total: ir.Value
    branches: list[Branch]
    before: Sum | None = None


def residual_sums(graph: ir.Graph, order: Order, facts: Facts, flops: dict[str, int]) -> list[Sum]:
    """All sums of a graph that have residual branches, in order.

    Args:
        graph: The graph.
        order: Who depends on whom in it.
        facts: The shapes of its values.
        flops: FLOPs by the name of a node's first output.
    """
    sums: list[Sum] = []
    for node in graph:
        if edit.is_op(node, *SUMS) and not _part_of_a_sum(node.outputs[0]):
            found = _sum(node, order, facts, flops, sums)
            if found is not None:
                sums.append(found)
    by_total = {each.total: each for each in sums}
    for each in sums:
        each.before = _before(each.stream, by_total)
    return sums


def _part_of_a_sum(value: ir.Value) -> bool:
    """Whether a sum is only a term of a larger one."""
    uses = list(value.uses())
    return not value.is_graph_output() and len(uses) == 1 and edit.is_op(uses[0].node, *SUMS)


@dataclass(frozen=True)
class _Term:
    """A term of a sum and the operator that adds it."""

    value: ir.Value
    node: ir.Node


def _terms(node: ir.Node) -> list[_Term]:
    """What a sum adds up, through sums that only it reads; constants left out."""
    found: list[_Term] = []
    for value in node.inputs:
        if value is None or edit.tensor(value) is not None:
            continue
        inner = value.producer()
        if edit.is_op(inner, *SUMS) and _part_of_a_sum(value) and not _is_biased(inner):
            assert inner is not None
            found += _terms(inner)
        else:
            found.append(_Term(value, node))
    return found


def _is_biased(node: ir.Node | None) -> bool:
    """Whether a sum adds a constant to one value: both are one term."""
    return node is not None and sum(edit.tensor(v) is None for v in node.inputs) <= 1


def _sum(node: ir.Node, order: Order, facts: Facts, flops: dict[str, int], earlier: Sequence[Sum]) -> Sum | None:
    """The residual sum that a node ends, if it is one; ``earlier`` are those of the nodes before it."""
    terms = _terms(node)
    total = node.outputs[0]
    if len(terms) < 2:
        return None
    shape = facts(total).shape
    for stream in terms:
        roots = _roots(stream.value)
        others = [t for t in terms if t is not stream and any(order.depends(t.value, root) for root in roots)]
        if not others or not _fits(facts(stream.value).shape, shape):
            continue
        branches = []
        for term in others:
            if not _fits(facts(term.value).shape, shape):
                continue
            root = next(root for root in roots if order.depends(term.value, root))
            branch = _branch(stream.value, root, term, total, order, flops)
            if branch is not None and not _joins(branch, root, earlier, order):
                branches.append(branch)
        branches = _merged(branches, node, order)
        if branches:
            return Sum(stream.value, total, branches)
    return None


def _fits(shape: Sequence[object] | None, wanted: Sequence[object] | None) -> bool:
    """Whether shapes may be the same: ranks are equal, and so are the numbers where both are known."""
    if shape is None or wanted is None:
        return True
    return len(shape) == len(wanted) and all(
        a == b for a, b in zip(shape, wanted, strict=True) if isinstance(a, int) and isinstance(b, int)
    )


def _roots(value: ir.Value) -> list[ir.Value]:
    """A value and what it is a view, or a constant multiple, of."""
    found = [value]
    while (node := value.producer()) is not None and len(found) < 16:
        if node.op_type in MOVES and node.inputs[0] is not None:
            value = node.inputs[0]
        elif node.op_type in SCALES and (rest := [v for v in node.inputs if v is not None and edit.tensor(v) is None]):
            if len(rest) != 1:
                break
            value = rest[0]
        else:
            break
        if edit.tensor(value) is not None:
            break
        found.append(value)
    return found


def _branch(
    stream: ir.Value, root: ir.Value, term: _Term, total: ir.Value, order: Order, flops: dict[str, int]
) -> Branch | None:
    """The branch of a term, if it computes with weights."""
    nodes = order.between(root, term.value)
    if not any(node.op_type in HEAVY for node in nodes):
        return None
    inside = set(nodes)
    own = own_constants([term.value], order)
    exits = [
        out
        for node in order.behind(root)
        for out in node.outputs
        if out.is_graph_output() and not order.depends(out, total) and out is not total and _from_inside(out, inside)
    ]
    count = sum(flops.get(node.outputs[0].name or "", 0) for node in nodes if node.outputs)
    return Branch(
        "", stream, term.value, term.node, total, tuple(nodes), own, _mixes(nodes, order), tuple(exits), count
    )


def _joins(branch: Branch, root: ir.Value, earlier: Sequence[Sum], order: Order) -> bool:
    """Whether a stream from elsewhere is joined on the way, as by a mask that every layer adds to its scores."""
    inside = set(branch.nodes)
    return any(
        each.total.producer() in inside and each.stream is not root and not order.depends(each.stream, root)
        for each in earlier
    )


def own_constants(values: Sequence[ir.Value], order: Order) -> tuple[ir.Value, ...]:
    """The constants that nothing reads but what computes these values, in the order in which they are met."""
    makers = [node for value in values if (node := value.producer()) is not None]
    closure, todo = set(makers), list(makers)
    constants: dict[ir.Value, None] = {}
    while todo:
        for value in order.inputs(todo.pop()):
            if edit.tensor(value) is not None:
                constants[value] = None
                continue
            maker = value.producer()
            if maker is None or maker in closure or any(out.is_graph_output() for out in maker.outputs):
                continue
            if all(reader in closure for out in maker.outputs for reader in order.readers(out)):
                closure.add(maker)
                todo.append(maker)
    return tuple(v for v in constants if all(reader in closure for reader in order.readers(v)))


def _from_inside(out: ir.Value, inside: set[ir.Node]) -> bool:
    """Whether an output of the graph is made by a branch's nodes, or by one that reads them and weighs nothing."""
    node = out.producer()
    while node is not None and node not in inside:
        if node.op_type not in MOVES and node.op_type != "Concat":
            return False
        node = next((p for v in node.inputs if v is not None and (p := v.producer()) is not None), None)
    return node is not None


def _mixes(nodes: Sequence[ir.Node], order: Order) -> bool:
    """Whether positions see each other: attention, recurrence, convolution with a kernel, or a scan.

    Attention multiplies two computed values. So does a mixture of experts that picks its weights by an index, but there
    one of the two is a constant that was picked from.
    """
    for node in nodes:
        if node.op_type in MIXERS:
            return True
        if node.op_type in ("Conv", "ConvTranspose", "FusedConv"):
            kernel = node.inputs[1].shape if node.inputs[1] is not None else None
            if kernel is None or any(d != 1 for d in tuple(kernel)[2:]):
                return True
        elif node.op_type in PRODUCTS:
            operands = [v for v in node.inputs[:2] if v is not None]
            if all(order.fed(v) and not _picked(v) for v in operands):
                return True
    return False


def _picked(value: ir.Value) -> bool:
    """Whether a value is a view of a constant, or was picked from one."""
    while edit.tensor(value) is None:
        node = value.producer()
        if node is None or node.op_type not in MOVES or node.inputs[0] is None:
            return False
        value = node.inputs[0]
    return True


def _merged(branches: list[Branch], node: ir.Node, order: Order) -> list[Branch]:
    """Terms of one kind are one branch (experts that are added up); attention beside an MLP are two."""
    if len(branches) < 2 or len({branch.mixes for branch in branches}) == len(branches):
        return branches
    # Terms that one inner sum adds up can go together; others stay as they are.
    merged: list[Branch] = []
    for mixes in (True, False):
        alike = [branch for branch in branches if branch.mixes == mixes]
        inner = {branch.node for branch in alike}
        if len(alike) > 1 and len(inner) == 1 and (adder := next(iter(inner))) is not node:
            merged.append(_joined(alike, adder, order))
        else:
            merged += alike
    return merged


def _joined(branches: Sequence[Branch], adder: ir.Node, order: Order) -> Branch:
    first, value = branches[0], adder.outputs[0]
    reader = next(use.node for use in value.uses())
    nodes = list(dict.fromkeys([*(n for branch in branches for n in branch.nodes), adder]))
    return Branch(
        "",
        first.stream,
        value,
        reader,
        first.total,
        tuple(nodes),
        own_constants([value], order),
        first.mixes,
        tuple(dict.fromkeys(e for branch in branches for e in branch.exits)),
        sum(branch.flops for branch in branches),
    )


def _before(stream: ir.Value, sums: dict[ir.Value, Sum]) -> Sum | None:
    """The sum that a stream comes from, with nothing but normalisations and activations between."""
    found: Sum | None = None
    seen: set[ir.Value] = set()
    todo = [stream]
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        if value in sums:
            if found is not None and found is not sums[value]:
                return None
            found = sums[value]
            continue
        if edit.tensor(value) is not None:
            continue
        node = value.producer()
        if node is None or node.op_type in HEAVY or len(seen) > 64:
            return None
        todo += [v for v in (node.inputs[:1] if node.op_type in MOVES else node.inputs) if v is not None]
    return found
