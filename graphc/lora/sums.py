"""Products with adapters beside them, found in sums of sums."""

from __future__ import annotations

import onnx_ir as ir

from graphc import edit
from graphc.contract import PassResult
from graphc.edit import attribute, is_op
from graphc.lora.branch import Path, chains, parts
from graphc.lora.conditions import Adapter, Term, checked
from graphc.rewrites.base import Refused, Rewriter


def is_sum(node: ir.Node) -> bool:
    """Whether a node adds values, one of which may be an adapter."""
    return not node.domain and (
        node.op_type in ("Add", "Sub", "Sum")
        or (node.op_type == "Gemm" and len(node.inputs) > 2 and _computed(node.inputs[2]))
    )


def _computed(value: ir.Value | None) -> bool:
    node = value.producer() if value is not None else None
    return node is not None and node.op_type != "Constant"


def _terms(root: ir.Node, inner: set[ir.Node]) -> list[Term]:
    """The summands of a sum of sums; ``inner`` gets the nodes that add them."""
    found: list[Term] = []
    todo = [Term(root.outputs[0], 1.0)]
    while todo:
        term = todo.pop()
        node = term.value.producer()
        whole = node is root or (len(term.value.uses()) == 1 and not term.value.is_graph_output())
        if node is None or not whole or node.graph is not root.graph:
            found.append(term)
        elif is_op(node, "Identity") and node.inputs[0] is not None:
            todo.append(Term(node.inputs[0], term.scale))
        elif not is_sum(node):
            found.append(term)
        else:
            inner.add(node)
            if node.op_type == "Gemm":
                beta = attribute(node, "beta", 1.0)
                found.append(Term(term.value, term.scale, node))
                todo.append(Term(node.inputs[2], term.scale * beta))  # type: ignore[arg-type]
                continue
            for i, value in enumerate(node.inputs):
                if value is not None:
                    sign = -1.0 if node.op_type == "Sub" and i == 1 else 1.0
                    todo.append(Term(value, term.scale * sign))
    return found


def adapters_of(root: ir.Node, inner: set[ir.Node], rewriter: Rewriter, result: PassResult) -> list[Adapter]:
    """The adapters in a sum."""
    try:
        terms = [term for term in _terms(root, inner) if _computed(term.value)]
        if len(terms) < 2:
            return []
        read = [(term, _parts(term, rewriter)) for term in terms]
    except edit.BoundByCaller:
        return []
    bases = [(term, part[0][0]) for term, part in read if len(part) == 1 and part[0][0].width is None]
    found = []
    for term, part in read:
        if not part or any(len(ways) == 1 for ways in part):
            continue
        for base_term, base in bases:
            ways = [next((w for w in p[1:] if w.source is base.source and w.kind == base.kind), None) for p in part]
            paths = tuple(way for way in ways if way is not None)
            if base_term is term or len(paths) < len(part) or not all(_is_likely(way, base) for way in paths):
                continue
            try:
                found.append(checked(root, term, paths, base_term, base, rewriter))
            except Refused as refusal:
                result.refuse(term.value, refusal.reason)
            break
        else:
            if any(_is_stranger(part, base) for other, base in bases if other is not term):
                result.refuse(term.value, "the adapter reads something else than the product beside it")
    return found


def _parts(term: Term, rewriter: Rewriter) -> list[list[Path]]:
    if term.product is not None:
        found = chains(term.value)
        return [found] if found else []
    return parts(term.value, rewriter)


def _is_stranger(part: list[list[Path]], base: Path) -> bool:
    """Whether a branch has all marks of an adapter of a product, but for what it reads."""
    return all(
        any(
            way.kind == base.kind
            and way.channels == base.channels
            and way.products[-1].channels[0] == base.products[0].channels[0] != 0
            and not way.problem
            and way.rank < min(base.products[0].channels)
            for way in ways[1:]
        )
        for ways in part
    )


def _is_likely(path: Path, base: Path) -> bool:
    """Whether a branch is an adapter, hence worth a refusal; blocks of layers beside a shortcut look similar."""
    least = min(base.products[0].channels)
    return not path.problem or least == 0 or path.rank < least
