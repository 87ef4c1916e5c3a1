"""Lays constant weights out as the loops read them: blocks of as many columns as a vector has lanes.

A weight ``[K, N]`` becomes ``[N / lanes, K, lanes]`` and a kernel ``[R, S, I, O]`` becomes
``[O / lanes, R, S, I, lanes]``, filled up with zeros. A tile of columns then reads some streams of memory from their
beginning to their end, whatever its width; rows of ``[K, N]`` would be pages apart, which neither the prefetcher nor
the address cache likes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from graphc.tvm import tied
from graphc.tvm.kernels import integers as kernels
from graphc.tvm.nest import Machine

Array = np.ndarray[Any, np.dtype[Any]]

SMALLEST = 4
"""Columns up to which a vector of them would be mostly zeros."""


def blocked(module: Any, machine: Machine) -> Any:
    """Make products and convolutions by constants functions of packed weights.

    Args:
        module: Relax operators before they are legalized, convolutions with channels last; not changed.
        machine: What it shall run on.
    """
    from tvm import relax
    from tvm.ir import GenericConst, Op
    from tvm.relax.expr_functor import PyExprMutator, mutator

    matmul, conv2d = Op.get("relax.matmul"), Op.get("relax.nn.conv2d")
    blocks: dict[Any, Any] = {}

    @mutator
    class Pack(PyExprMutator):  # type: ignore[misc]
        def visit_call_(self, call: Any) -> Any:
            call = self.visit_expr_post_order(call)
            compute: Callable[[Any, Any, int], Any]
            if call.op.same_as(matmul):
                compute, rank = _product, 2
            elif call.op.same_as(conv2d) and _is_plain(call):
                compute, rank = _convolution(call.attrs), 4
            else:
                return call
            given, held = call.args
            held = self.lookup_binding(held) if isinstance(held, relax.Var) else held
            if not isinstance(held, GenericConst) or len(held.ty.shape) != rank or len(given.ty.shape) < 2:
                return call
            columns, dtypes = int(held.ty.shape[-1]), (str(given.ty.dtype), str(held.ty.dtype))
            if dtypes == ("int16", "int8"):
                return _integers(self.builder_, call, given, held, machine)
            if columns <= SMALLEST or dtypes != ("float32", "float32"):
                return call
            if (weight := blocks.get(held)) is None:
                weight = blocks[held] = relax.const(in_blocks(held.value.numpy(), machine.lanes))
            return self.builder_.call_te(compute, given, weight, columns)

    function = module["main"]
    pack = Pack(module)
    body = pack.visit_expr(function.body)
    module = pack.builder_.get()
    module["main"] = relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)
    return tied.shared(relax.transform.Normalize()(module), blocks)


def in_blocks(weight: Array, lanes: int) -> Array:
    """``[..., N]`` -> ``[N / lanes, ..., lanes]``, with zeros after the last column."""
    columns = weight.shape[-1]
    filled = np.pad(weight, [(0, 0)] * (weight.ndim - 1) + [(0, -columns % lanes)])
    split = filled.reshape(*weight.shape[:-1], -1, lanes)
    return np.ascontiguousarray(np.moveaxis(split, -2, 0))


def multiplies_integers(target: Any) -> bool:
    """Whether a target has the instruction of :mod:`graphc.tvm.kernels.integers`."""
    from tvm.target import codegen

    if target.kind.name != "llvm":
        return False
    with target:
        return bool(codegen.llvm_cpu_has_features("sse2", target))


def _integers(builder: Any, call: Any, given: Any, held: Any, machine: Machine) -> Any:
    """A product or convolution of integers, by a kernel of our own."""
    from tvm import relax

    weight = held.value.numpy()
    shape = [int(size) for size in call.ty.shape]
    strides = dilations = (1, 1)
    if weight.ndim == 2:
        *outer, depth = (int(size) for size in given.ty.shape)
        rows = [1, 1, math.prod(outer), depth]
        given, weight = builder.emit(relax.op.reshape(given, rows)), weight[None, None]
    else:
        top, left, bottom, right = (int(size) for size in call.attrs.padding)
        if top or left or bottom or right:
            given = builder.emit(relax.op.nn.pad(given, [0, 0, top, bottom, left, right, 0, 0]))
        strides, dilations = ((int(n[0]), int(n[1])) for n in (call.attrs.strides, call.attrs.dilation))
    if weight.shape[2] % 2:
        given = builder.emit(relax.op.nn.pad(given, [0, 0, 0, 0, 0, 0, 0, 1]))
    batch, height, width, channels = (int(size) for size in given.ty.shape)
    high, wide, _, outputs = weight.shape
    if (high, wide, *strides) == (1, 1, 1, 1) and batch * height > 1:
        # One long line, so that tiles of neighbours leave little over.
        batch, height, width = 1, 1, batch * height * width
        given = builder.emit(relax.op.reshape(given, [batch, height, width, channels]))
    window = kernels.Window((batch, height, width, channels), (high, wide), strides, dilations, outputs)
    name = builder.add_func(kernels.product(window, machine), "integer_product")
    packed = relax.const(kernels.in_pairs(weight, machine.lanes))
    made = relax.call_tir(
        name, [given, packed], out_ty=relax.TensorType([math.prod(shape[:-1]), window.outputs], "int32")
    )
    return relax.op.reshape(builder.emit(made), shape)


def _is_plain(call: Any) -> bool:
    attrs = call.attrs
    return (attrs.data_layout, attrs.kernel_layout, int(attrs.groups)) == ("NHWC", "HWIO", 1)


def _product(x: Any, weight: Any, columns: int) -> Any:
    """``[..., M, K]`` times packed ``[K, N]``."""
    from tvm import te

    *rows, depth = x.shape
    lanes = weight.shape[-1]
    k = te.reduce_axis((0, depth), "k")

    def at(*index: Any) -> Any:
        column = index[-1]
        return te.sum(x[(*index[:-1], k)] * weight[column // lanes, k, column % lanes], axis=k)

    return _cropped(te.compute((*rows, weight.shape[0] * lanes), at, name="product"), columns)


def _convolution(attrs: Any) -> Callable[[Any, Any, int], Any]:
    top, left, bottom, right = (int(size) for size in attrs.padding)
    down, across = (int(size) for size in attrs.strides)
    dilation_y, dilation_x = (int(size) for size in attrs.dilation)

    def compute(x: Any, weight: Any, columns: int) -> Any:
        """``[B, H, W, I]`` with packed ``[R, S, I, O]``."""
        from tvm import te, topi

        if top or left or bottom or right:
            x = topi.nn.pad(x, [0, top, left, 0], [0, bottom, right, 0], name="padded")
        batch, height, width, channels = x.shape
        count, rows, steps, _, lanes = weight.shape
        r, s, i = (te.reduce_axis((0, size), name) for size, name in ((rows, "r"), (steps, "s"), (channels, "i")))
        high = (int(height) - (int(rows) - 1) * dilation_y - 1) // down + 1
        wide = (int(width) - (int(steps) - 1) * dilation_x - 1) // across + 1

        def at(b: Any, y: Any, z: Any, o: Any) -> Any:
            value = x[b, y * down + r * dilation_y, z * across + s * dilation_x, i]
            return te.sum(value * weight[o // lanes, r, s, i, o % lanes], axis=[r, s, i])

        return _cropped(te.compute((batch, high, wide, count * lanes), at, name="convolution"), columns)

    return compute


def _cropped(result: Any, columns: int) -> Any:
    """The first columns, if there are more."""
    from tvm import te

    if int(result.shape[-1]) == columns:
        return result
    return te.compute((*result.shape[:-1], columns), lambda *index: result[index], name="cropped")
