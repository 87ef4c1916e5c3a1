"""From the product of queries and keys to the softmax: scale, soft cap and masks, whatever their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.moves import VIEWS
from graphc.recognition import products
from graphc.recognition.graph import Graph
from graphc.recognition.layout import Axes, moved, settled, sizes
from graphc.recognition.products import Product
from graphc.rewrites.base import Refused

PASSED = ("Mul", "Div", "Add", "Sub", "Where", "Tanh", "Cast", "Transpose", *VIEWS)
"""Operators that may stand between the product and the softmax."""

_DEEPEST = 12
"""Nodes between the product and the softmax at most."""


@dataclass(frozen=True)
class Mask:
    """One addend of the scores, or one condition that replaces them.

    Attributes:
        value: The number added, or the condition.
        axes: Its axes, those of the scores or without leaves where it is broadcast.
        fill: What takes the place of the scores; None for an addend.
        keeps: Whether the scores stay where the condition is true.
        factor: What the addend is multiplied by.
        node: Where it is applied.
        unsure: Whether it may also be one number for all keys.
    """

    value: ir.Value
    axes: Axes
    node: ir.Node
    fill: float | None = None
    keeps: bool = True
    factor: float = 1.0
    unsure: bool = False


@dataclass
class Scores:
    """What the softmax is taken of.

    Attributes:
        product: Of queries and keys.
        axes: Of the softmax's input.
        scale: What the product is multiplied by.
        cap: The soft cap, 0 for none.
        masks: In the order in which they are applied.
        upcast: The dtype that the softmax is computed in, where it is not that of the product.
    """

    product: Product
    axes: Axes = ()
    scale: float = 1.0
    cap: float = 0.0
    masks: list[Mask] = field(default_factory=list)
    upcast: ir.DataType | None = None


def find_product(value: ir.Value, depth: int = _DEEPEST) -> list[ir.Node] | None:
    """The nodes from a product of two variables to a value, the product first; None if there is none such."""
    node = value.producer()
    if node is None or depth == 0:
        return None
    if products.is_product(node):
        return [node]
    if not edit.is_op(node, *PASSED):
        return None
    sources = node.inputs[1:] if node.op_type == "Where" else node.inputs[:1]
    if node.op_type in ("Add", "Mul", "Sub"):
        sources = node.inputs
    for source in sources:
        if source is None or edit.tensor(source) is not None:
            continue
        found = find_product(source, depth - 1)
        if found is not None:
            return [*found, node]
    return None


def read(path: Sequence[ir.Node], graph: Graph) -> Scores:
    """What the nodes of a path compute of the product that it begins with.

    Raises:
        Refused: Something on the path is not part of an attention.
    """
    scores = Scores(products.read(path[0], graph))
    axes = scores.product.result
    value = path[0].outputs[0]
    divided = 0.0
    chosen: ir.Value | None = None
    for node in path[1:]:
        if chosen is not None:
            scores.masks.append(_selected(node, value, chosen, axes, graph))
            value, chosen = node.outputs[0], None
            continue
        match node.op_type:
            case "Mul" | "Div":
                number = _number(node, value)
                if number is None and node.op_type == "Mul":
                    chosen = _chooses(next(v for v in node.inputs if v is not value))
                    if chosen is not None:
                        value = node.outputs[0]
                        continue
                if number is None:
                    raise Refused("the scores are multiplied by something that is not one constant")
                if node.op_type == "Div":
                    number = 1 / number if number else 0.0
                if scores.cap:
                    # tanh(x / c) * c: the cap is what the tanh is multiplied by.
                    if not divided or scores.masks:
                        raise Refused("scores are scaled after a mask or a cap")
                    scores.cap, divided = number, 0.0
                else:
                    scores.scale *= number
                    scores.masks = [_scaled(mask, number) for mask in scores.masks]
            case "Tanh":
                if scores.masks or scores.cap:
                    raise Refused("the soft cap comes after a mask")
                scores.cap, divided = 1.0, 1.0
            case "Add" | "Sub":
                other = next(v for v in node.inputs if v is not value)
                if node.op_type == "Sub" and node.inputs[0] is not value:
                    raise Refused("the scores are subtracted from something")
                assert other is not None
                aligned, unsure = _aligned(other, axes, graph)
                factor = -1.0 if node.op_type == "Sub" else 1.0
                scores.masks.append(Mask(other, aligned, node, factor=factor, unsure=unsure))
            case "Where":
                keeps = node.inputs[1] is value
                fill = edit.scalar(node.inputs[2 if keeps else 1])
                condition = node.inputs[0]
                assert condition is not None
                if fill is None:
                    raise Refused("masked scores are replaced by something that is not one constant")
                aligned, unsure = _aligned(condition, axes, graph)
                scores.masks.append(Mask(condition, aligned, node, float(fill), keeps, unsure=unsure))
            case "Cast":
                to = ir.DataType(edit.attribute(node, "to"))
                if to not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
                    raise Refused(f"the scores are cast to {to.name.lower()}")
                scores.upcast = to
            case _:
                after = moved(node, axes, graph)
                if after is None:
                    raise Refused("how the scores are reshaped cannot be followed")
                axes = after
        if node.op_type in ("Add", "Sub", "Where", "Mul", "Div") and _grows(node, value, scores, graph):
            raise Refused("a mask is larger than the scores")
        value = node.outputs[0]
    if scores.cap and divided:
        # tanh without a factor caps at 1.
        scores.cap = 1.0
    if scores.cap:
        scores.scale *= scores.cap
    if scores.cap < 0 or not scores.scale > 0:
        raise Refused("the scale of the scores is not positive")
    if any(mask.unsure and settled(mask.axes[-1:]) != settled(axes[-1:]) for mask in scores.masks):
        raise Refused("the sizes of a mask and of the scores are not known to be equal")
    scores.axes = axes
    return scores


def _grows(node: ir.Node, value: ir.Value, scores: Scores, graph: Graph) -> bool:
    """Whether what is broadcast to the scores may make them larger along an axis of which nothing else says so."""
    after, before = graph.dims(node.outputs[0]), graph.dims(value)
    if any(mask.unsure for mask in scores.masks) and after is not None and before is not None:
        return after[:-1] != before[:-1]
    return after != before


def _chooses(value: ir.Value | None) -> ir.Value | None:
    """The boolean that a value is the 1 and 0 of."""
    node = value.producer() if value is not None else None
    if not edit.is_op(node, "Cast") or node is None or node.inputs[0] is None:
        return None
    return node.inputs[0] if node.inputs[0].dtype == ir.DataType.BOOL else None


def _selected(node: ir.Node, value: ir.Value, condition: ir.Value, axes: Axes, graph: Graph) -> Mask:
    """The mask of ``scores * cast(condition) + number * cast(not condition)``, for which others have Where."""
    masked = next((v for v in node.inputs if v is not value), None)
    product = masked.producer() if masked is not None else None
    if edit.is_op(node, "Add") and edit.is_op(product, "Mul") and product is not None:
        for number, other in (tuple(product.inputs), tuple(reversed(product.inputs))):
            fill, opposite = edit.scalar(number), _chooses(other)
            denied = opposite.producer() if opposite is not None else None
            same = edit.is_op(denied, "Not") and denied is not None and denied.inputs[0] is condition
            if fill is not None and same:
                if graph.dims(node.outputs[0]) != graph.dims(node.inputs[0]):
                    raise Refused("a mask is larger than the scores")
                aligned, unsure = _aligned(condition, axes, graph)
                return Mask(condition, aligned, node, float(fill), unsure=unsure)
    raise Refused("the scores are multiplied by something that is not one constant")


def _scaled(mask: Mask, number: float) -> Mask:
    from dataclasses import replace

    if mask.fill is not None:
        return replace(mask, fill=mask.fill * number)
    return replace(mask, factor=mask.factor * number)


def _number(node: ir.Node, value: ir.Value) -> float | None:
    """The constant that a value is multiplied or divided by."""
    first, second = node.inputs[0], node.inputs[1]
    other = second if first is value else first
    if node.op_type == "Div" and first is not value:
        return None
    held = edit.scalar(other)
    return None if held is None else float(held)


def _aligned(other: ir.Value, axes: Axes, graph: Graph) -> tuple[Axes, bool]:
    """The axes of what is broadcast to the scores, and whether the last is taken to be theirs without being known.

    A mask that were longer than the scores would make them longer than the values that they are multiplied with. So
    it has either as many keys, or one for all.
    """
    dims, own = graph.dims(other), sizes(axes)
    if dims is None or len(dims) > len(own):
        raise Refused("the shape of a mask is not known, or it has more axes than the scores")
    found, unsure = [], False
    for place, (dim, axis, full) in enumerate(zip(dims[::-1], axes[::-1], own[::-1], strict=False)):
        if dim == full or (place == 0 and not isinstance(dim, int) and axis):
            unsure = unsure or dim != full
            found.append(axis)
        elif dim == 1:
            found.append(())
        else:
            raise Refused("the sizes of a mask and of the scores are not known to be equal")
    return tuple(found[::-1]), unsure


def lowest(dtype: ir.DataType) -> float:
    """The lowest finite number of a dtype."""
    return float(ml_dtypes.finfo(dtype.numpy()).min)  # type: ignore[no-untyped-call]


def nearly_lowest(dtype: ir.DataType) -> float:
    """The lowest number but one.

    ONNX Runtime's Attention gives 0 for a row whose every score is the lowest number, as if it were -inf; a softmax
    gives equal weights, as it does for this number.
    """
    return float(np.nextafter(np.asarray(lowest(dtype), dtype.numpy()), np.asarray(0, dtype.numpy())))


def absorbs(fill: float, dtype: ir.DataType) -> bool:
    """Whether adding any sensible score to a number leaves it as it is, so that adding is replacing."""
    return fill <= lowest(dtype) / 4


def never_empty(condition: ir.Value, keeps: bool) -> bool:
    """Whether every row along the last axis of a condition certainly has an element that keeps its score."""
    held = edit.constant(condition, 1 << 22)
    if held is not None:
        kept = held.astype(bool) if keeps else ~held.astype(bool)
        return bool(kept.any(axis=-1).all())
    node = condition.producer()
    if edit.is_op(node, "Not") and node is not None and node.inputs[0] is not None:
        return never_empty(node.inputs[0], not keeps)
    if edit.is_op(node, "Cast", "Unsqueeze", "Identity") and node is not None and node.inputs[0] is not None:
        return never_empty(node.inputs[0], keeps)
    return _is_triangle(node, keeps)


def _is_triangle(node: ir.Node | None, keeps: bool) -> bool:
    """Whether positions are compared with positions, so that each keeps at least itself."""
    if node is None or node.op_type not in ("LessOrEqual", "GreaterOrEqual", "Less", "Greater"):
        return False
    sides = [_positions(value) for value in node.inputs]
    equal = node.op_type.endswith("OrEqual")
    return None not in sides and sides[0] == sides[1] and equal == keeps


def _positions(value: ir.Value | None) -> ir.Value | None:
    """The Range behind views."""
    while value is not None and (node := value.producer()) is not None:
        if edit.is_op(node, "Range"):
            return value
        if not edit.is_op(node, "Cast", "Transpose", *VIEWS):
            return None
        value = node.inputs[0]
    return None


def extremes(value: ir.Value, depth: int = 10) -> frozenset[float]:
    """Constants of -1e30 and less, -inf among them, that a value may be made of."""
    found: set[float] = set()
    seen: set[ir.Value] = set()
    queue = [(value, depth)]
    while queue:
        current, left = queue.pop()
        if current in seen:
            continue
        seen.add(current)
        held = edit.tensor(current)
        if held is not None:
            if held.dtype.is_floating_point() and held.size <= 1 << 22:
                array = held.numpy().astype(np.float64)
                low = array[array <= min(-1e30, lowest(held.dtype) / 4)] if held.size else array
                found.update(float(x) for x in np.unique(low)[:4])
            continue
        node = current.producer()
        if node is not None and left:
            attr = node.attributes.get("value")
            if node.op_type == "ConstantOfShape" and attr is not None:
                number = float(attr.as_tensor().numpy().reshape(-1)[0])
                found.update([number] if number <= -1e30 else [])
            queue.extend((v, left - 1) for v in node.inputs if v is not None)
    return frozenset(found)


def overflows(value: ir.Value, depth: int = 10) -> bool:
    """Whether two of the numbers that :func:`extremes` finds may have been added up, which gives -inf."""
    seen: set[ir.Value] = set()
    queue = [(value, depth)]
    while queue:
        current, left = queue.pop()
        node = current.producer()
        if current in seen or node is None or not left:
            continue
        seen.add(current)
        inputs = [v for v in node.inputs if v is not None]
        if edit.is_op(node, "Add", "Sum", "Sub") and sum(bool(extremes(v, left - 1)) for v in inputs) > 1:
            return True
        queue.extend((v, left - 1) for v in inputs)
    return False
