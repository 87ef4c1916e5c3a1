"""Values that are rounded to a grid inside a model: where rounding errors make a value jump, now and then."""

from __future__ import annotations

import onnx_ir as ir

from graphc import edit
from graphc.moves import MOVES

_GRIDS = frozenset({"Ceil", "DynamicQuantizeLinear", "Floor", "QuantizeLinear", "Round"})


def steps(model: ir.Model) -> bool:
    """Whether values are rounded to a grid inside the model.

    Then rounding errors do not make the outputs drift but jump, now and then: stronger errors make more jumps, not
    larger ones, so that the variance of the outputs grows with the size of the errors and not with its square.
    """
    return any(
        node.op_type in _GRIDS or node.op_type.startswith("QLinear") or _codes_cache(node) for node in edit.nodes(model)
    )


def codes(model: ir.Model) -> frozenset[str]:
    """The outputs that are codes of a grid, moved at most: those of equal models may be a step apart, now and then."""
    found = set()
    for output in model.graph.outputs:
        if output.dtype is None or not output.dtype.is_integer():
            continue
        queue, seen = [output], {output}
        while queue:
            node = queue.pop().producer()
            if node is None:
                continue
            if node.op_type in ("DynamicQuantizeLinear", "QuantizeLinear") or _codes_cache(node):
                found.add(output.name or "")
                break
            reads = node.inputs if node.op_type == "Concat" else node.inputs[:1] if node.op_type in MOVES else ()
            queue += [value for value in reads if value is not None and value not in seen]
            seen.update(queue)
    return frozenset(found)


def _codes_cache(node: ir.Node) -> bool:
    """Whether an operator of ONNX Runtime's own rounds what is new in its cache."""
    return node.op_type == "GroupQueryAttention" and edit.attribute(node, "k_quant_type", "NONE") != "NONE"
