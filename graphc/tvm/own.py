"""What operators become in Relax that are graphc's own, as loop nests in :mod:`graphc.tvm.kernels`, or better so."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphc.errors import BadInput
from graphc.tvm import blocked, integers, packed, recurrent, sparse
from graphc.tvm.kernels import packed as packed_kernels
from graphc.tvm.kernels import recurrent as recurrent_kernels
from graphc.tvm.kernels import sparse as sparse_kernels
from graphc.tvm.nest import Machine

Converter = Callable[[Any, Sequence[Any], Mapping[str, Any], Any], Any]
"""Of the block builder, the inputs, the attributes and the target."""


@dataclass(frozen=True)
class _Known:
    """A converter as TVM's importer asks for one."""

    convert: Converter
    target: Any

    def get_converter(self, opset: int) -> Callable[..., Any]:
        return lambda builder, inputs, attributes, parameters: self.convert(builder, inputs, attributes, self.target)


@contextlib.contextmanager
def known(target: Any) -> Iterator[None]:
    """Let TVM's importer know graphc's own operators, for a target."""
    from tvm.relax.frontend.onnx import onnx_frontend

    theirs = onnx_frontend._get_convert_map
    ours = {name: _Known(convert, target) for name, convert in _CONVERTERS.items()}
    onnx_frontend._get_convert_map = lambda: {**theirs(), **ours}
    try:
        yield
    finally:
        onnx_frontend._get_convert_map = theirs


def _call(builder: Any, name: str, function: Any, arguments: Sequence[Any], shape: Sequence[int]) -> Any:
    """Call a loop nest; equal ones are kept once."""
    from tvm import relax

    own = builder.add_func(function, name)
    return builder.emit(relax.call_tir(own, list(arguments), out_ty=relax.TensorType(list(shape), "float32")))


def _sizes(value: Any) -> list[int]:
    return [int(size) for size in value.ty.shape]


def _panels(builder: Any, value: Any, lanes: int) -> Any:
    """``(outputs, n)`` -> ``(outputs / lanes, n, lanes)``."""
    from tvm import relax

    outputs, count = _sizes(value)
    cut = builder.emit(relax.op.reshape(value, (outputs // lanes, lanes, count)))
    return builder.emit(relax.op.permute_dims(cut, [0, 2, 1]))


def _layout(attributes: Mapping[str, Any], lanes: int) -> packed_kernels.Layout:
    depth = -(-attributes["depth"] // attributes["block"]) * attributes["block"]
    signed, zeros = bool(attributes["signed"]), bool(attributes["zeros"])
    return packed_kernels.Layout(
        attributes["outputs"], depth, attributes["bits"], attributes["block"], signed, zeros, lanes
    )


def _product(builder: Any, inputs: Sequence[Any], attributes: Mapping[str, Any], target: Any) -> Any:
    from tvm import relax

    x, dtype = inputs[0], str(inputs[0].ty.dtype)
    *outer, depth = _sizes(x)
    rows = math.prod(outer)
    layout = _layout(attributes, _lanes(target))
    x = builder.emit(relax.op.reshape(x, (rows, depth)))
    if layout.depth > depth:
        x = builder.emit(relax.op.nn.pad(x, [0, 0, 0, layout.depth - depth]))
    bias, relu = bool(attributes["bias"]), bool(attributes["relu"])
    weight = [_panels(builder, value, layout.lanes) for value in inputs[1:]]
    if target.kind.name == "llvm":
        x = x if dtype == "float32" else builder.emit(relax.op.astype(x, "float32"))
        function = packed_kernels.product(rows, layout, Machine.of(target), bias=bias, relu=relu)
        y = _call(builder, "packed_product", function, [x, *weight], (rows, layout.outputs))
        y = y if dtype == "float32" else builder.emit(relax.op.astype(y, dtype))
    else:
        weight = weight[: 2 + layout.zeros]
        if rows == 1:
            y = builder.emit_te(packed_kernels.computed_row(layout), x, *weight, primfunc_name_hint="packed_row")
        else:
            numbers = packed_kernels.computed_numbers(layout)
            dense = builder.emit_te(numbers, x, *weight, primfunc_name_hint="packed_numbers")
            y = builder.emit_te(packed_kernels.computed_product, x, dense, primfunc_name_hint="dense_product")
        if bias:
            added = relax.op.strided_slice(inputs[-1], [0], [0], [layout.outputs])
            added = builder.emit(relax.op.reshape(builder.emit(added), (layout.outputs,)))
            y = builder.emit(relax.op.add(y, builder.emit(relax.op.astype(added, dtype))))
        y = builder.emit(relax.op.nn.relu(y)) if relu else y
    return builder.emit(relax.op.reshape(y, (*outer, layout.outputs)))


def _lookup(builder: Any, inputs: Sequence[Any], attributes: Mapping[str, Any], target: Any) -> Any:
    from tvm import relax

    outer, dtype = _sizes(inputs[0]), "float16" if attributes["half"] else "float32"
    count, layout = math.prod(outer), _layout(attributes, _lanes(target))
    index = builder.emit(relax.op.reshape(inputs[0], (count,)))
    weight = [_panels(builder, value, layout.lanes) for value in inputs[1:]]
    if target.kind.name == "llvm":
        function = packed_kernels.lookup(count, str(index.ty.dtype), layout)
        y = _call(builder, "packed_lookup", function, [index, *weight], (count, layout.depth))
    else:
        y = builder.emit_te(packed_kernels.computed_lookup(layout), index, *weight, primfunc_name_hint="packed_lookup")
    y = y if dtype == "float32" else builder.emit(relax.op.astype(y, dtype))
    return builder.emit(relax.op.reshape(y, (*outer, layout.depth)))


def _sparse(builder: Any, inputs: Sequence[Any], attributes: Mapping[str, Any], target: Any) -> Any:
    from tvm import relax

    if target.kind.name != "llvm":
        raise BadInput("there is no kernel for block-sparse weights on this target", hint="leave the pass 'pack' out")
    tiles = sparse_kernels.Tiles(**{name: attributes[name] for name in ("outputs", "depth", "high", "deep", "count")})
    x, starts, places, values = inputs
    *outer, depth = _sizes(x)
    rows = math.prod(outer)
    x = builder.emit(relax.op.reshape(x, (rows, depth)))
    values = builder.emit(relax.op.permute_dims(values, [0, 2, 1])) if tiles.tall else values
    function = sparse_kernels.product(rows, tiles, Machine.of(target))
    y = _call(builder, "sparse_product", function, [x, starts, places, values], (rows, tiles.outputs))
    return builder.emit(relax.op.reshape(y, (*outer, tiles.outputs)))


def _integers(builder: Any, inputs: Sequence[Any], attributes: Mapping[str, Any], target: Any) -> Any:
    """Sums of integers where there is a kernel, else of floats that are whole numbers; then one scale by output."""
    from tvm import relax

    x, weight, factor, *bias = inputs
    wide, total = ("int16", "int32") if blocked.multiplies_integers(target) else ("float32", "float32")
    x = builder.emit(relax.op.astype(x, wide))
    if attributes["zero"]:
        x = builder.emit(relax.op.subtract(x, relax.const(attributes["zero"], wide)))
    weight = weight if total == "int32" else builder.emit(relax.op.astype(weight, "float32"))
    if "pads" in attributes:
        shapes = {name: list(attributes[name]) for name in ("strides", "pads", "dilations")}
        sums = relax.op.nn.conv2d(x, weight, shapes["strides"], shapes["pads"], shapes["dilations"], out_dtype=total)
        factor = builder.emit(relax.op.reshape(factor, (-1, 1, 1)))
        bias = [builder.emit(relax.op.reshape(each, (-1, 1, 1))) for each in bias]
    else:
        sums = relax.op.matmul(x, weight, out_dtype=total)
    y = builder.emit(sums)
    y = y if total == "float32" else builder.emit(relax.op.astype(y, "float32"))
    y = builder.emit(relax.op.multiply(y, factor))
    return builder.emit(relax.op.add(y, bias[0])) if bias else y


def _steps(builder: Any, inputs: Sequence[Any], attributes: Mapping[str, Any], target: Any) -> Any:
    from tvm import relax

    if target.kind.name != "llvm":
        raise BadInput("there is no kernel for recurrent layers on this target", hint="-t onnxruntime runs them")
    length, batch, _ = _sizes(inputs[0])
    kind, hidden = recurrent.KINDS[attributes["kind"]], _sizes(inputs[2])[1]
    layer = recurrent_kernels.Layer(kind, length, batch, hidden, bool(attributes["backward"]), bool(attributes["late"]))
    name = builder.add_func(recurrent_kernels.steps(layer, Machine.of(target)), f"{kind.lower()}_steps")
    shapes = [[length, batch, hidden], [batch, hidden]][: 2 if kind == "LSTM" else 1]
    types = [relax.TensorType(shape, "float32") for shape in shapes]
    return builder.emit(relax.call_tir(name, list(inputs), out_ty=types if len(types) > 1 else types[0]))


def _lanes(target: Any) -> int:
    """Outputs beside each other: those of a vector register, one on a GPU."""
    return Machine.of(target).lanes if target.kind.name == "llvm" else 1


def _clip(builder: Any, inputs: Sequence[Any], attributes: Mapping[str, Any], target: Any) -> Any:
    """Clip with constant bounds is one operator of Relax, whose layout TVM can convert; its importer makes loops."""
    from tvm import relax, topi
    from tvm.ir import GenericConst

    x, bounds = inputs[0], [inputs[i] if len(inputs) > i else None for i in (1, 2)]
    floating = str(x.ty.dtype).startswith("float")
    if floating and all(bound is None or isinstance(bound, GenericConst) for bound in bounds):
        # A bound that is NaN is none.
        given = [math.nan if bound is None else float(bound.value.numpy()) for bound in bounds]
        low = -math.inf if math.isnan(given[0]) else given[0]
        high = math.inf if math.isnan(given[1]) else given[1]
        return builder.emit(relax.op.clip(x, low, high))
    # The bound first: of 'a > b ? a : b', b is what stays when something is NaN.
    for bound, operator in zip(bounds, (topi.maximum, topi.minimum), strict=True):
        x = x if bound is None else builder.emit_te(operator, bound, x)
    return x


_CONVERTERS: dict[str, Converter] = {
    "Clip": _clip,
    integers.PRODUCT: _integers,
    packed.PRODUCT: _product,
    packed.LOOKUP: _lookup,
    sparse.PRODUCT: _sparse,
    recurrent.STEPS: _steps,
}
