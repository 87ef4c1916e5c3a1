"""What operators of older opsets become in newer ones: one adapter for each change of meaning or form.

The changes are those of ``onnx/defs/*/old.cc``. An adapter changes its node in place, so that its outputs stay the
values that they are; what it adds is right in every later opset, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc import edit


class Unconvertible(Exception):
    """A node cannot be written in the newer opset.

    Attributes:
        node: The node.
        reason: Why, in plain words.
    """

    def __init__(self, node: ir.Node, reason: str) -> None:
        super().__init__(f"{node.op_type} '{node.name}': {reason}")
        self.node, self.reason = node, reason


class BoundByCaller(Unconvertible):
    """An attribute that must become an input is given by the caller of a function; inlining helps."""


class Tools:
    """Adds nodes and constants beside the node that is converted."""

    def __init__(self, names: edit.Names, in_function: bool) -> None:
        self._names, self._in_function = names, in_function

    def constant(self, node: ir.Node, data: Any, hint: str) -> ir.Value:
        """A constant for ``node``; bodies of functions have no initializers and get a Constant node."""
        name = self._names.fresh(f"{node.outputs[0].name}.{hint}")
        tensor = ir.tensor(np.asarray(data), name=name)
        if not self._in_function and node.graph is not None:
            return edit.initializer(_graph(node), tensor, name)
        value = self.node(node, "Constant", [], hint, value=tensor)
        value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
        return value

    def node(
        self, node: ir.Node, op_type: str, inputs: list[ir.Value | None], hint: str, **attributes: Any
    ) -> ir.Value:
        """The output of a new node before ``node``."""
        output = ir.Value(name=self._names.fresh(f"{node.outputs[0].name}.{hint}"))
        new = ir.node(op_type, inputs, attributes, outputs=[output], name=output.name)
        new.metadata_props.update(node.metadata_props)
        _graph(node).insert_before(node, new)
        return output


def _graph(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def _get(node: ir.Node, name: str, default: Any = None) -> Any:
    """An attribute's value, which must not be bound by the caller of a function."""
    attr = node.attributes.get(name)
    if attr is not None and attr.is_ref():
        raise BoundByCaller(node, f"the caller of the function gives its attribute '{name}'")
    return edit.attribute(node, name, default)


def _pop(node: ir.Node, name: str, default: Any = None) -> Any:
    value = _get(node, name, default)
    node.attributes.pop(name, None)
    return value


def _set_input(node: ir.Node, index: int, value: ir.Value | None) -> None:
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)


def _to_inputs(**attributes: int) -> Callable[[ir.Node, Tools], None]:
    """An adapter for integer attributes that became inputs: attribute name to input index."""

    def adapter(node: ir.Node, tools: Tools) -> None:
        for name, index in attributes.items():
            value = _pop(node, name)
            # An empty list means what an absent one does.
            if value is not None and value != ():
                _set_input(node, index, tools.constant(node, np.array(value, dtype=np.int64), name))

    return adapter


def _binary(node: ir.Node, tools: Tools) -> None:
    """Until opset 6 the second operand's axes were those of the first from ``axis`` on, by default the last ones."""
    axis = _pop(node, "axis")
    if not _pop(node, "broadcast", 0) or axis is None:
        return
    a, b = node.inputs
    if a is None or b is None or a.shape is None or b.shape is None:
        raise Unconvertible(node, "it broadcasts along an axis, and the ranks of its inputs are not known")
    _append_axes(node, tools, axis % len(a.shape), len(a.shape))


def _prelu(node: ir.Node, tools: Tools) -> None:
    """Until opset 6 a slope of rank 1 had one number for each channel."""
    x, slope = node.inputs
    if x is None or slope is None or x.shape is None or slope.shape is None:
        raise Unconvertible(node, "the ranks of its inputs are not known")
    if len(slope.shape) == 1 and slope.shape[0] != 1:
        _append_axes(node, tools, 1, len(x.shape))


def _append_axes(node: ir.Node, tools: Tools, first: int, rank: int) -> None:
    """Give the second input of ``node`` as many axes of size 1 as align its first one with axis ``first``."""
    b = node.inputs[1]
    assert b is not None and b.shape is not None
    missing = rank - first - len(b.shape)
    if missing > 0:
        axes = tools.constant(node, np.arange(missing) + len(b.shape), "axes")
        node.replace_input_with(1, tools.node(node, "Unsqueeze", [b, axes], "aligned"))


def _inference_only(node: ir.Node, tools: Tools) -> None:
    if not _pop(node, "is_test", 0):
        raise Unconvertible(node, "it is in training mode (is_test=0)")


def _without(name: str) -> Callable[[ir.Node, Tools], None]:
    """An adapter for an attribute that was removed since it meant nothing."""

    def adapter(node: ir.Node, tools: Tools) -> None:
        node.attributes.pop(name, None)

    return adapter


def _like(node: ir.Node, tools: Tools, number: float, hint: str) -> ir.Value:
    """A scalar in the dtype of the first input of ``node``."""
    x = node.inputs[0]
    if x is not None and x.dtype is not None:
        return tools.constant(node, np.array(number).astype(x.dtype.numpy()), hint)
    plain = tools.constant(node, np.array(number, dtype=np.float32), f"{hint}_float")
    return tools.node(node, "CastLike", [plain, x], hint)


def _clip(node: ir.Node, tools: Tools) -> None:
    for index, name in ((1, "min"), (2, "max")):
        value = _pop(node, name)
        if value is not None:
            _set_input(node, index, _like(node, tools, value, name))


def _pad(node: ir.Node, tools: Tools) -> None:
    number = _pop(node, "value", 0.0)
    _set_input(node, 1, tools.constant(node, np.array(_pop(node, "pads"), dtype=np.int64), "pads"))
    if number:
        _set_input(node, 2, _like(node, tools, number, "value"))


def _topk(node: ir.Node, tools: Tools) -> None:
    _set_input(node, 1, tools.constant(node, np.array([_pop(node, "k")], dtype=np.int64), "k"))


def _slice(node: ir.Node, tools: Tools) -> None:
    if _get(node, "axes") == ():
        del node.attributes["axes"]
    for index, name in enumerate(("starts", "ends", "axes"), start=1):
        value = _pop(node, name)
        if value is not None:
            _set_input(node, index, tools.constant(node, np.array(value, dtype=np.int64), name))


def _batch_normalization_9(node: ir.Node, tools: Tools) -> None:
    if _pop(node, "spatial", 1) != 1:
        raise Unconvertible(node, "it normalises each activation on its own (spatial=0)")


def _batch_normalization_14(node: ir.Node, tools: Tools) -> None:
    """Further outputs meant training, read or not."""
    if any(v.name for v in node.outputs[1:]):
        raise Unconvertible(node, "it is in training mode")
    node.resize_outputs(1)


def _dropout(node: ir.Node, tools: Tools) -> None:
    """In inference the ratio means nothing; what the mask holds then was not defined."""
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        raise Unconvertible(node, "its mask is used")
    ratio = _pop(node, "ratio", 0.5)
    if ratio != 0.5:
        _set_input(node, 1, tools.constant(node, np.array(ratio, dtype=np.float32), "ratio"))


def _upsample_9(node: ir.Node, tools: Tools) -> None:
    scales = _pop(node, "scales")
    if scales is None:
        raise Unconvertible(node, "it is the Upsample of before opset 7")
    scales = np.array(scales, dtype=np.float32)
    _set_input(node, 1, tools.constant(node, scales, "scales"))


def _upsample_10(node: ir.Node, tools: Tools) -> None:
    """Upsample became Resize; it rounds down since its scales are at least 1."""
    node.op_type = "Resize"
    _resize_attributes(node, "floor")


def _resize_11(node: ir.Node, tools: Tools) -> None:
    if "coordinate_transformation_mode" in node.attributes:
        return  # it was an Upsample
    rounding = "floor"
    if _get(node, "mode", "nearest") == "nearest":
        # ONNX Runtime and the specification's examples round up where an axis shrinks.
        scales = edit.constant(node.inputs[1], limit=edit.SMALL)
        if scales is None:
            raise Unconvertible(node, "its scales are not constant, so that its rounding is not known")
        if (scales < 1).any():
            if (scales > 1).any():
                raise Unconvertible(node, "it enlarges one axis and shrinks another")
            rounding = "ceil"
    _resize_attributes(node, rounding)


def _resize_attributes(node: ir.Node, rounding: str) -> None:
    """Opset 10: outputs are at ``index / scale``, without a region of interest."""
    scales = node.inputs[1]
    node.resize_inputs(3)
    node.replace_input_with(1, None)
    node.replace_input_with(2, scales)
    node.attributes["coordinate_transformation_mode"] = ir.AttrString("coordinate_transformation_mode", "asymmetric")
    node.attributes["nearest_mode"] = ir.AttrString("nearest_mode", rounding)


def _resize_13(node: ir.Node, tools: Tools) -> None:
    """Inputs that do not apply were empty tensors and became absent."""
    mode = _get(node, "coordinate_transformation_mode", "half_pixel")
    if mode == "tf_half_pixel_for_nn":
        raise Unconvertible(node, "later opsets have no coordinate mode tf_half_pixel_for_nn")
    if mode != "tf_crop_and_resize" and len(node.inputs) > 1:
        node.replace_input_with(1, None)
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        node.replace_input_with(2, None)


def _scatter(node: ir.Node, tools: Tools) -> None:
    node.op_type = "ScatterElements"


def _split_18(node: ir.Node, tools: Tools) -> None:
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))


def _softmax(default: int) -> Callable[[ir.Node, Tools], None]:
    """Until opset 12 all axes from ``axis`` on were normalised together, as if flattened."""

    def adapter(node: ir.Node, tools: Tools) -> None:
        axis = _pop(node, "axis", default)
        x = node.inputs[0]
        assert x is not None
        shape = x.shape
        if shape is not None:
            first = axis % max(len(shape), 1)
            if all(dim == 1 for dim in shape[first + 1 :]):
                node.attributes["axis"] = ir.AttrInt64("axis", axis)
                return
        elif axis == -1:
            node.attributes["axis"] = ir.AttrInt64("axis", -1)
            return
        flat = tools.node(node, "Flatten", [x], "flat", axis=axis)
        result = tools.node(node, node.op_type, [flat], "normalised", axis=-1)
        whole = tools.node(node, "Shape", [x], "shape")
        # The node itself becomes the last of them, so that its output stays the value that it was.
        node.op_type = "Reshape"
        node.attributes.clear()
        node.replace_input_with(0, result)
        _set_input(node, 1, whole)

    return adapter


def _roi_align(node: ir.Node, tools: Tools) -> None:
    name = "coordinate_transformation_mode"
    node.attributes[name] = ir.AttrString(name, "output_half_pixel")


def _grid_sample(node: ir.Node, tools: Tools) -> None:
    mode = _get(node, "mode", "bilinear")
    names: Mapping[str, str] = {"bilinear": "linear", "bicubic": "cubic"}
    node.attributes["mode"] = ir.AttrString("mode", names.get(mode, mode))


def _dft(node: ir.Node, tools: Tools) -> None:
    axis = np.array(_pop(node, "axis", 1), dtype=np.int64)
    _set_input(node, 2, tools.constant(node, axis, "axis"))


def _group_normalization(node: ir.Node, tools: Tools) -> None:
    """Scale and bias, one for each group, became one for each channel."""
    x, groups = node.inputs[0], _get(node, "num_groups")
    channels = x.shape[1] if x is not None and x.shape is not None else None
    if not isinstance(channels, int):
        raise Unconvertible(node, "its number of channels is not known")
    for index, name in ((1, "scale"), (2, "bias")):
        old = node.inputs[index]
        column = tools.node(node, "Reshape", [old, tools.constant(node, [groups, 1], "column")], f"{name}_column")
        spread = tools.constant(node, [groups, channels // groups], "spread")
        wide = tools.node(node, "Expand", [column, spread], f"{name}_wide")
        flat = tools.node(node, "Reshape", [wide, tools.constant(node, [-1], "flat")], name)
        node.replace_input_with(index, flat)


def _refuse(reason: str) -> Callable[[ir.Node, Tools], None]:
    def adapter(node: ir.Node, tools: Tools) -> None:
        raise Unconvertible(node, reason)

    return adapter


ADAPTERS: dict[tuple[str, int], Callable[[ir.Node, Tools], None]] = {
    ("BatchNormalization", 7): _inference_only,
    ("Dropout", 7): _inference_only,
    ("Gemm", 7): _without("broadcast"),
    ("GRU", 7): _without("output_sequence"),
    ("LSTM", 7): _without("output_sequence"),
    ("PRelu", 7): _prelu,
    ("RNN", 7): _without("output_sequence"),
    ("BatchNormalization", 9): _batch_normalization_9,
    ("Scan", 9): _refuse("until opset 8 it scanned each item of a batch on its own"),
    ("Upsample", 9): _upsample_9,
    ("Slice", 10): _slice,
    ("TopK", 10): _topk,
    ("Upsample", 10): _upsample_10,
    ("Clip", 11): _clip,
    ("Pad", 11): _pad,
    ("Resize", 11): _resize_11,
    ("Scatter", 11): _scatter,
    ("Dropout", 12): _dropout,
    ("Hardmax", 13): _softmax(1),
    ("LogSoftmax", 13): _softmax(1),
    ("ReduceSum", 13): _to_inputs(axes=1),
    ("Resize", 13): _resize_13,
    ("Softmax", 13): _softmax(1),
    ("Split", 13): _to_inputs(split=1),
    ("Squeeze", 13): _to_inputs(axes=1),
    ("Unsqueeze", 13): _to_inputs(axes=1),
    ("BatchNormalization", 14): _batch_normalization_14,
    ("RoiAlign", 16): _roi_align,
    ("Split", 18): _split_18,
    ("DFT", 20): _dft,
    ("GridSample", 20): _grid_sample,
    ("GroupNormalization", 21): _group_normalization,
}
"""What to do to an operator when it comes to the opset that changed it."""

for _name in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare"):
    ADAPTERS[f"Reduce{_name}", 18] = _to_inputs(axes=1)

for _name in ("Add", "And", "Div", "Equal", "Greater", "Less", "Mul", "Or", "Pow", "Sub", "Xor"):
    ADAPTERS[_name, 7] = _binary

ADAPTED = frozenset(operator for operator, _ in ADAPTERS)
"""The operators that have adapters."""
