"""What each ONNX operator is in torch: one table a domain, filled by theme."""

from __future__ import annotations

import onnx_ir as ir

from graphc.fx.host import Operator
from graphc.fx.operators import (
    algebra,
    attention,
    contrib,
    contrib_attention,
    contrib_quantisation,
    detection,
    elementwise,
    grids,
    indexing,
    losses,
    movement,
    quantisation,
    recurrent,
    sequences,
    signal,
    windows,
)
from graphc.fx.operators import resize as resizing

OPERATORS: dict[str, Operator] = {
    **algebra.OPERATORS,
    **attention.OPERATORS,
    **detection.OPERATORS,
    **elementwise.OPERATORS,
    **grids.OPERATORS,
    **indexing.OPERATORS,
    **losses.OPERATORS,
    **movement.OPERATORS,
    **quantisation.OPERATORS,
    **recurrent.OPERATORS,
    **resizing.OPERATORS,
    **sequences.OPERATORS,
    **signal.OPERATORS,
    **windows.OPERATORS,
}
"""By name in the standard domain."""

CONTRIB: dict[str, Operator] = {
    **contrib.OPERATORS,
    **contrib_attention.OPERATORS,
    **contrib_quantisation.OPERATORS,
}
"""By name in ``com.microsoft``."""

UNREGISTERED: dict[str, Operator] = {"SimplifiedLayerNormalization": contrib.OPERATORS["SimplifiedLayerNormalization"]}
"""What ONNX Runtime writes into the standard domain although no standard has it."""

for _table in (OPERATORS, CONTRIB):
    for _name, _operator in _table.items():
        if _operator.run.__name__ == "<lambda>":  # the name that torch.fx prints
            _operator.run.__name__ = _operator.run.__qualname__ = _name

CONTROL = ("If", "Loop", "Scan")
"""What runs bodies; see :mod:`graphc.fx.control`."""


def find(node: ir.Node) -> Operator | None:
    """How a node runs; None for control flow and for what has no torch form."""
    if node.domain in ("", "ai.onnx"):
        return OPERATORS.get(node.op_type) or UNREGISTERED.get(node.op_type)
    return CONTRIB.get(node.op_type) if node.domain == "com.microsoft" else None
