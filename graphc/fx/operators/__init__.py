"""What each ONNX operator is in torch: one table, filled by theme."""

from __future__ import annotations

from graphc.fx.host import Operator
from graphc.fx.operators import algebra, attention, elementwise, indexing, movement, quantisation, recurrent, windows
from graphc.fx.operators import resize as resizing

OPERATORS: dict[str, Operator] = {
    **algebra.OPERATORS,
    **attention.OPERATORS,
    **elementwise.OPERATORS,
    **indexing.OPERATORS,
    **movement.OPERATORS,
    **quantisation.OPERATORS,
    **recurrent.OPERATORS,
    **resizing.OPERATORS,
    **windows.OPERATORS,
}
"""By name in the standard domain."""
