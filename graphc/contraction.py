"""Contractions with a constant weight, in one form: rows of channels times a matrix.

MatMul with the weight on either side, Gemm, convolutions, stacks of weights and weights that a router picks all compute
``y = x WT`` for rows ``x``; whoever compresses the weight or learns about its input need not know which one it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array, attribute
from graphc.stats import GradientGramOf, GramOf, GuidedGramOf, MomentsOf, Rows, Window


@dataclass(frozen=True)
class Contraction:
    """A node that contracts an activation with a constant weight.

    Attributes:
        node: The node.
        activation: What is read as rows.
        weight: The constant.
        rows: How the rows are read from the activation.
        order: The axes of the weight as (groups..., outputs..., channels..., kernel...).
        parts: How many axes of ``order`` are groups, outputs, channels and kernel elements.
        scale: What the product is multiplied with (Gemm's alpha).
        grouped: The number of groups that the axis of the outputs falls into (grouped convolution).
        output_axis: The axis of the node's output that the weight's outputs are.
        shape: The weight's.
        input_name: What the activation was called when this was found: where a graph's output is made anew, its name
            goes to another value.
        output_name: The same of the node's output.
    """

    node: ir.Node
    activation: ir.Value
    weight: ir.Value
    rows: Rows
    order: tuple[int, ...]
    parts: tuple[int, int, int, int]
    scale: float = 1.0
    grouped: int = 1
    output_axis: int = -1
    shape: tuple[int, ...] = ()
    input_name: str = field(init=False, compare=False)
    output_name: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_name", self.activation.name or "")
        object.__setattr__(self, "output_name", self.node.outputs[0].name or "")

    @property
    def axis(self) -> int:
        """The axis of the weight that is contracted."""
        return self.order[self.parts[0] + self.parts[1]]

    @property
    def moments(self) -> MomentsOf:
        """The request for moments of the channels; without the kernel's elements."""
        return MomentsOf(self.input_name, Rows(**{**vars(self.rows), "window": None}))

    @property
    def patches(self) -> MomentsOf:
        """The request for moments of the rows; of a convolution, of each kernel element of each channel."""
        return MomentsOf(self.input_name, self.rows)

    @property
    def gram(self) -> GramOf:
        """The request for the Gram matrix of the rows."""
        return GramOf(self.input_name, self.rows)

    @property
    def output_gradients(self) -> GradientGramOf:
        """The request for the Gram matrix of the loss's gradient by the output's channels."""
        rows = Rows(**{**vars(self.rows), "window": None, "axis": self.output_axis})
        return GradientGramOf(self.output_name, rows)

    @property
    def guided_gram(self) -> GuidedGramOf | None:
        """The request for the Gram matrix of the rows by what the loss makes of each; None but for plain matrices."""
        if self.rows.window is not None or self.rows.grouped:
            return None
        return GuidedGramOf(self.input_name, self.output_name, self.rows.axis, self.output_axis)

    @property
    def window(self) -> int:
        """Kernel elements of each channel."""
        return math.prod(self.shape[a] for a in self.order[sum(self.parts[:3]) :])

    def matrices(self, weight: Array) -> Array:
        """The weight as ``(groups, outputs, channels * kernel elements)``, in the dtype it has."""
        sizes = self._sizes()
        if self.grouped > 1:
            weight = weight.reshape(self.grouped, -1, *weight.shape[1:])
            return weight.reshape(sizes)
        return np.transpose(weight, self.order).reshape(sizes)

    def restored(self, matrices: Array) -> Array:
        """What :meth:`matrices` gave, in the weight's own shape."""
        if self.grouped > 1:
            return matrices.reshape(self.shape)
        ordered = matrices.reshape([self.shape[a] for a in self.order])
        return np.ascontiguousarray(np.transpose(ordered, np.argsort(self.order)))

    def as_output(self, vector: Array) -> Array:
        """A number for each output of each matrix, ``(groups, outputs)``, shaped to broadcast to the node's output.

        Not for picked weights, whose outputs depend on the pick.
        """
        if self.node.op_type == "Conv":
            return vector.reshape(-1, *(1,) * self.parts[3])
        if len(self.shape) > 2:
            return vector.reshape(*self.shape[:-2], 1, self.shape[-1])
        return vector.reshape(-1, 1) if self.output_axis in (0, -2) else vector.reshape(-1)

    def _sizes(self) -> tuple[int, int, int]:
        ends = np.cumsum(self.parts)
        sizes = [self.shape[a] for a in self.order]
        groups, outputs = math.prod(sizes[: ends[0]]), math.prod(sizes[ends[0] : ends[1]])
        return self.grouped * groups, outputs // self.grouped, math.prod(sizes[ends[1] :])


def of(node: ir.Node) -> Contraction | str:
    """The contraction that a node is, or why it is none that can be read so."""
    if node.domain not in ("", "ai.onnx"):
        return f"{node.op_type} is not a standard operator"
    match node.op_type:
        case "MatMul":
            return _matmul(node)
        case "Gemm":
            return _gemm(node)
        case "Conv":
            return _conv(node)
    return f"{node.op_type} is no contraction that can be read as rows times a matrix"


def _matmul(node: ir.Node) -> Contraction | str:
    left, right = node.inputs
    assert left is not None and right is not None
    held = edit.tensor(right)
    if held is not None and edit.tensor(left) is None:
        shape = _shape(held)
        if len(shape) < 2:
            return "the weight is a vector"
        if len(shape) == 2:
            return Contraction(node, left, right, Rows(), (1, 0), (0, 1, 1, 0), shape=shape)
        return _stack(node, left, right, shape)
    held = edit.tensor(left)
    if held is not None and edit.tensor(right) is None:
        shape = _shape(held)
        if len(shape) != 2:
            return "the weight on the left is no matrix"
        if right.shape is None or len(right.shape) < 2:
            return "the rank of the activation is not known"
        return Contraction(node, right, left, Rows(axis=-2), (0, 1), (0, 1, 1, 0), output_axis=-2, shape=shape)
    return _picked(node, left, right)


def _stack(node: ir.Node, left: ir.Value, right: ir.Value, shape: tuple[int, ...]) -> Contraction | str:
    """A stack of matrices, each with rows of its own, or all with the same."""
    if left.shape is None:
        return "the rank of the activation is not known"
    leading = len(shape) - 2
    sizes = list(left.shape)[:-2]
    first, n = tuple(range(leading)), leading
    if sizes == list(shape[:-2]):
        order, parts = (*first, n + 1, n), (leading, 1, 1, 0)
        return Contraction(node, left, right, Rows(batch=leading), order, parts, shape=shape)
    if all(size == 1 for size in sizes[-leading:]):
        order, parts = (*first, n + 1, n), (0, leading + 1, 1, 0)
        return Contraction(node, left, right, Rows(), order, parts, shape=shape)
    return "how the activation meets a stack of weights is not known"


def _picked(node: ir.Node, left: ir.Value, right: ir.Value) -> Contraction | str:
    """Rows whose weights are picked from a stack, by experts that a router chose."""
    for activation, picked, axis in ((left, right, -1), (right, left, -2)):
        gather, flipped = picked.producer(), False
        if edit.is_op(gather, "Transpose") and gather is not None and attribute(gather, "perm", ()) == (0, 2, 1):
            gather, flipped = gather.inputs[0].producer() if gather.inputs[0] is not None else None, True
        if gather is None or not edit.is_op(gather, "Gather", "GatherND"):
            continue
        stack, index = gather.inputs[0], gather.inputs[1]
        held = edit.tensor(stack)
        if held is None or stack is None or index is None or len(shape := _shape(held)) != 3:
            continue
        if gather.op_type == "Gather" and attribute(gather, "axis", 0) != 0:
            continue
        rows = Rows(axis=axis, by=index.name or "", size=shape[0])
        # x (k, n) reads the channels from axis 1, and x from the right of (m, k) from axis 2.
        order = (0, 2, 1) if (axis == -1) != flipped else (0, 1, 2)
        return Contraction(node, activation, stack, rows, order, (1, 1, 1, 0), output_axis=axis, shape=shape)
    return "neither operand is a constant"


def _gemm(node: ir.Node) -> Contraction | str:
    left, right = node.inputs[0], node.inputs[1]
    assert left is not None and right is not None
    scale = float(attribute(node, "alpha", 1.0))
    if (held := edit.tensor(right)) is not None and edit.tensor(left) is None:
        order = (0, 1) if attribute(node, "transB", 0) else (1, 0)
        axis = 0 if attribute(node, "transA", 0) else 1
        return Contraction(node, left, right, Rows(axis=axis), order, (0, 1, 1, 0), scale, shape=_shape(held))
    if (held := edit.tensor(left)) is not None and edit.tensor(right) is None:
        order = (1, 0) if attribute(node, "transA", 0) else (0, 1)
        axis = 1 if attribute(node, "transB", 0) else 0
        parts = (0, 1, 1, 0)
        return Contraction(node, right, left, Rows(axis=axis), order, parts, scale, output_axis=0, shape=_shape(held))
    return "neither operand is a constant"


def _conv(node: ir.Node) -> Contraction | str:
    activation, weight = node.inputs[0], node.inputs[1]
    held = edit.tensor(weight)
    if held is None or weight is None or activation is None:
        return "the weight is computed"
    shape = _shape(held)
    spatial = len(shape) - 2
    ones = (1,) * spatial
    auto = str(attribute(node, "auto_pad", "NOTSET"))
    window = Window(
        kernel=shape[2:],
        strides=tuple(attribute(node, "strides", ones)),
        dilations=tuple(attribute(node, "dilations", ones)),
        pads=(0,) * (2 * spatial) if auto == "VALID" else tuple(attribute(node, "pads", (0,) * (2 * spatial))),
        auto=auto if auto.startswith("SAME") else "",
    )
    groups = int(attribute(node, "group", 1))
    order = tuple(range(len(shape)))
    rows = Rows(axis=1, groups=groups, window=window)
    return Contraction(node, activation, weight, rows, order, (0, 1, 1, spatial), 1.0, groups, 1, shape)


def _shape(held: ir.TensorProtocol) -> tuple[int, ...]:
    return tuple(held.shape.numpy())
