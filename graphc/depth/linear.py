"""Instead of plainly dropping a run of blocks: the best linear map in its place, folded into the projection before it.

ReplaceMe (2025): let ``M`` be what a branch of the block before the run adds to the stream, ``s`` the stream that
enters the run and ``L`` the one that leaves it. Without the run, ``L`` becomes ``s``. With ``M T`` for ``M`` it becomes
``s + M (T - I)``, so that ``D = T - I`` should make ``|M D - (L - s)|^2 + ridge |D|^2`` least. The penalty is centred
on plain dropping, ``D = 0``: the error on the calibration data is never above that of plain dropping.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.axes import cut
from graphc.contract import Context
from graphc.depth.structure import Block
from graphc.edit import Array


@dataclass(frozen=True)
class Projection:
    """The linear end of a branch, ``x W + b``.

    Attributes:
        node: MatMul or Gemm.
        weight: A constant of two axes.
        bias: A constant that is added, or None.
        adder: The operator that adds it: ``node`` itself, or an Add.
        value: The result, with the bias.
    """

    node: ir.Node
    weight: ir.Value
    bias: ir.Value | None
    adder: ir.Node
    value: ir.Value

    @property
    def transposed(self) -> bool:
        """Whether the weight is (outputs, inputs)."""
        return self.node.op_type == "Gemm" and bool(edit.attribute(self.node, "transB", 0))

    @staticmethod
    def of(value: ir.Value) -> Projection | None:
        """The projection that makes a value, if one does and nobody else reads it on the way."""
        node = value.producer()
        bias: ir.Value | None = None
        adder = node
        product = value
        if edit.is_op(node, "Add"):
            assert node is not None
            constants = [v for v in node.inputs if edit.tensor(v) is not None]
            others = [v for v in node.inputs if edit.tensor(v) is None]
            if len(constants) != 1 or len(others) != 1 or others[0] is None or not _one_reader(others[0], node):
                return None
            bias, product = constants[0], others[0]
            node = product.producer()
        if not edit.is_op(node, "MatMul", "Gemm"):
            return None
        assert node is not None and adder is not None
        weight = node.inputs[1]
        held = edit.tensor(weight)
        if weight is None or held is None or len(held.shape) != 2 or not held.dtype.is_floating_point():
            return None
        if node.op_type == "Gemm":
            plain = edit.attribute(node, "alpha", 1.0) == 1 and edit.attribute(node, "beta", 1.0) == 1
            own = node.inputs[2] if len(node.inputs) > 2 else None
            if not plain or edit.attribute(node, "transA", 0) or (own is not None and (bias or not edit.tensor(own))):
                return None
            bias = own if own is not None else bias
            adder = node if own is not None else adder
        if bias is not None and not _is_vector(bias, held):
            return None
        return Projection(node, weight, bias, adder, value)

    def fold(self, difference: Array, shift: Array, names: edit.Names) -> None:
        """Follow the projection by ``y -> y (I + difference) + shift``, in its own constants.

        Args:
            difference: ``(outputs, outputs)``, float64.
            shift: ``(outputs,)``, float64; without a bias it must be zero.
            names: For copies of constants that others read, too.
        """
        held = edit.tensor(self.weight)
        assert held is not None
        change = partial(_followed, held, difference, self.transposed)
        lazy = ir.LazyTensor(change, dtype=held.dtype, shape=ir.Shape(held.shape.numpy()), name=held.name, cache=True)
        cut.write(self.weight, lazy, reader=self.node, names=names)
        if self.bias is not None:
            old = edit.constant(self.bias)
            assert old is not None
            flat = old.astype(np.float64).reshape(-1)
            new = (flat + flat @ difference + shift).astype(old.dtype).reshape(old.shape)
            cut.write(self.bias, ir.tensor(new, name=self.bias.name), reader=self.adder, names=names)


def _one_reader(value: ir.Value, node: ir.Node) -> bool:
    return not value.is_graph_output() and all(use.node is node for use in value.uses())


def _is_vector(bias: ir.Value, weight: ir.TensorProtocol) -> bool:
    """Whether a bias has one element for each output."""
    held = edit.tensor(bias)
    return held is not None and held.size in set(weight.shape.numpy()) and held.size == held.shape.numpy()[-1]


def _followed(held: ir.TensorProtocol, difference: Array, transposed: bool) -> ir.TensorProtocol:
    array = held.numpy().astype(np.float64)
    array = array + (difference.T @ array if transposed else array @ difference)
    edit.release(held)
    return ir.Tensor(np.ascontiguousarray(array.astype(held.dtype.numpy())), dtype=held.dtype, name=held.name)


def before(block: Block) -> tuple[Projection | None, str]:
    """The projection that can stand in for what follows ``block``'s end; else None and why there is none.

    It is one of the last sum: what an earlier one adds is also read by the branches after it.
    """
    for branch in reversed(block.sums[-1].branches):
        found = Projection.of(branch.value)
        if found is not None:
            if not _one_reader(branch.value, branch.node):
                continue
            return found, ""
    return None, "the block before it does not end with a projection that a linear map can be folded into"


@dataclass(frozen=True)
class Fit:
    """A linear map in place of a run of blocks.

    Attributes:
        difference: ``D``, ``(channels, channels)``, float64.
        shift: ``(channels,)``, float64.
        plain: The squared error on the calibration data of plainly dropping the run, per element.
        left: The same with the map.
    """

    difference: Array
    shift: Array
    plain: float
    left: float


def fit(model: ir.Model, run: tuple[str, str], projection: Projection, ridge: float, ctx: Context) -> Fit:
    """The linear map that stands in best for a run of blocks on the calibration data.

    Args:
        model: The model, with the run still in it.
        run: The names of the streams that enter and leave the run.
        projection: What the map will be folded into.
        ridge: The penalty on ``D``, as a part of the mean square of ``M``'s channels.
        ctx: The context; its statistics are those of the model.
    """
    from graphc.stats import CrossOf, GramOf

    start, end = run
    m = projection.value.name or ""
    # |L - s|^2 needs the products of the streams with themselves as well: their sums along the diagonal suffice.
    requests = (GramOf(m), CrossOf(m, end), CrossOf(m, start), CrossOf(start, end), GramOf(start), GramOf(end))
    found = ctx.collect(model, requests)
    gram, out, into = found[requests[0]], found[requests[1]], found[requests[2]]
    both, starts, ends = found[requests[3]], found[requests[4]], found[requests[5]]
    count = max(float(gram.count), 1.0)
    cross = out.centred - into.centred
    aim = out.mean_b - into.mean_b
    spread = float(np.trace(starts.centred) + np.trace(ends.centred) - 2 * np.trace(both.centred))
    square = np.array(gram.centred)
    if projection.bias is None:
        # No intercept: what is fitted is not centred.
        square = square + count * np.outer(gram.mean, gram.mean)
        cross = cross + count * np.outer(gram.mean, aim)
    spread += count * float(aim @ aim)
    width = len(square)
    damped = square + np.eye(width) * max(ridge * float(np.trace(square)) / width, 1e-12)
    difference = np.linalg.solve(damped, cross)
    shift = aim - gram.mean @ difference if projection.bias is not None else np.zeros(width)
    gained = float(np.sum(difference * (2 * cross - square @ difference)))
    left = spread - gained - (count * float(aim @ aim) if projection.bias is not None else 0.0)
    return Fit(difference, shift, spread / count / width, max(left, 0.0) / count / width)
