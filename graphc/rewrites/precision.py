"""Changes the floating-point type in which a model computes, operator by operator.

Every node is first decided: which of its inputs and outputs may have the new type, by the operator's schema and by
the constants that it reads. Then Casts are put where a value has another type than its reader wants. Subgraphs,
local functions and the interface keep their types at their borders.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.rewrites.base import FLOATS, dims
from graphc.rewrites.weights import LAZY, reading

_TYPED_BY_ATTRIBUTE = ("dtype", "output_dtype", "output_datatype")
"""Attributes that name the type of a result; such nodes are left."""

_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul")


@dataclass(frozen=True)
class Decision:
    """What happens to a node.

    Attributes:
        inputs: The inputs that get the new type.
        outputs: The outputs that get the new type.
        reason: Why nothing, or not everything, gets it; "" if nothing speaks against it.
    """

    inputs: frozenset[int] = frozenset()
    outputs: frozenset[int] = frozenset()
    reason: str = ""


def decide(node: ir.Node, to: ir.DataType, version: int) -> Decision:
    """Which inputs and outputs of a node can get the type ``to``.

    Args:
        node: A node whose values have known dtypes.
        to: A floating-point type.
        version: The opset of the standard domain.
    """
    if node.op_type == "Constant":
        return Decision()  # its readers decide
    floats = [_is_source(v, to) for v in node.inputs], [_is_source(v, to) for v in node.outputs]
    if not any(map(any, floats)):
        return Decision()
    name = to.name.lower()
    if node.domain:
        return Decision(reason=f"operators of domain {node.domain} keep their types")
    if any(edit.subgraphs(node)):
        return Decision(reason="what enters and leaves subgraphs keeps its type")
    if node.op_type in _QUANTIZED:
        return Decision(reason="quantization scales keep their type")
    if any(attribute in node.attributes for attribute in _TYPED_BY_ATTRIBUTE):
        return Decision(reason="an attribute fixes the type of the result")
    allowed = _allowed(node.op_type, version, name)
    if allowed is None:
        return Decision(reason="the operator is not known")
    inputs = frozenset(i for i, is_float in enumerate(floats[0]) if is_float and allowed(i, True))
    outputs = frozenset(i for i, is_float in enumerate(floats[1]) if is_float and allowed(i, False))
    if not inputs and not outputs:
        return Decision(reason=f"the operator is not defined for {name}")
    for i in inputs:
        problem = _out_of_range(node.inputs[i], to)
        if problem:
            return Decision(reason=problem)
    return Decision(inputs, outputs)


def _is_source(value: ir.Value | None, to: ir.DataType) -> bool:
    return (
        value is not None
        and value.dtype in FLOATS
        and value.dtype != to
        and (value.type is None or isinstance(value.type, ir.TensorType))
    )


@cache
def _allowed(operator: str, version: int, name: str) -> Callable[[int, bool], bool] | None:
    """Whether input or output ``i`` of an operator may have a type, as ``allowed(i, is_input)``."""
    import onnx.defs

    try:
        schema = onnx.defs.get_schema(operator, version, "")
    except onnx.defs.SchemaError:
        return None
    types = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
    wanted = f"tensor({name})"

    def allowed(i: int, is_input: bool) -> bool:
        formal = schema.inputs if is_input else schema.outputs
        if not formal:
            return False
        declared = formal[min(i, len(formal) - 1)].type_str
        return wanted in types.get(declared, {declared})

    return allowed


def _out_of_range(value: ir.Value | None, to: ir.DataType) -> str:
    """Why a constant cannot be held in the type; "" if it can, or the value is no constant."""
    held = edit.tensor(value)
    if held is None or held.size == 0:
        return ""
    info = ml_dtypes.finfo(to.numpy())  # type: ignore[no-untyped-call]
    name = to.name.lower()
    with reading(held) as array:
        greatest = max((_greatest(part) for part in _parts(array)), default=0.0)
        number = float(array.reshape(-1)[0]) if held.size == 1 else 0.0
        del array
    if greatest > float(info.max):
        return f"a constant is too large for {name}"
    if 0 < abs(number) < float(info.smallest_normal):
        return f"a constant is too small for {name}"
    return ""


def _parts(array: edit.Array) -> list[edit.Array]:
    """A tensor in pieces of some megabytes, so that no copy of the whole is made."""
    flat = array.reshape(-1)
    return [flat[i : i + (1 << 20)] for i in range(0, flat.size, 1 << 20)]


def _greatest(part: edit.Array) -> float:
    """The largest finite magnitude."""
    largest = max(float(part.max()), -float(part.min()))
    if math.isfinite(largest):
        return largest
    size = np.abs(part.astype(np.float64))
    return float(size[np.isfinite(size)].max(initial=0))


def converted(tensor: ir.TensorProtocol, to: ir.DataType, name: str) -> ir.TensorProtocol:
    """A constant in another floating-point type; a big one is computed when it is read."""

    def compute() -> ir.TensorProtocol:
        with reading(tensor) as array:
            result = array.astype(to.numpy())
            del array
        return ir.Tensor(result, dtype=to, name=name)

    if tensor.size < LAZY:
        return compute()
    return ir.LazyTensor(compute, dtype=to, shape=ir.Shape(dims(tensor)), cache=False, name=name)


class Retyper:
    """Carries out decisions on a model.

    Args:
        model: Changed in place.
        to: The new type.
        interface: Whether inputs and outputs of the model get it, too.
    """

    def __init__(self, model: ir.Model, to: ir.DataType, *, interface: bool) -> None:
        self.model, self.to, self.interface = model, to, interface
        self._names = edit.Names(model)
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self, decisions: dict[ir.Node, Decision]) -> None:
        """Give every node the types decided and put Casts between."""
        graphs = [self.model.graph, *self.model.graph.subgraphs()]
        wants: list[tuple[ir.Node, int, ir.DataType]] = []
        borders: list[tuple[ir.Graph, int, ir.DataType]] = []
        for graph in graphs:
            for node in graph:
                decision = decisions[node]
                for i, value in enumerate(node.inputs):
                    if value is not None and value.dtype in FLOATS:
                        wants.append((node, i, self.to if i in decision.inputs else value.dtype))
            for i, value in enumerate(graph.outputs):
                if value.dtype in FLOATS:
                    is_new = self.interface and graph is self.model.graph
                    borders.append((graph, i, self.to if is_new else value.dtype))
        # What readers want is noted by now; only from here on do types change.
        if self.interface:
            for value in self.model.graph.inputs:
                if _is_source(value, self.to) and not value.is_initializer():
                    value.type = ir.TensorType(self.to)
        for graph in graphs:
            for node in graph:
                self._retype(node, decisions[node])
        for node, i, dtype in wants:
            read = node.inputs[i]
            assert read is not None
            if read.dtype != dtype:
                node.replace_input_with(i, self._as(read, dtype))
        for graph, i, dtype in borders:
            if graph.outputs[i].dtype != dtype:
                self._cast_output(graph, i, dtype)

    def _retype(self, node: ir.Node, decision: Decision) -> None:
        for i in decision.outputs:
            node.outputs[i].type = ir.TensorType(self.to)
        if not decision.outputs:
            return
        if node.op_type == "Cast":
            node.attributes["to"] = ir.AttrInt64("to", self.to.value)
        elif node.op_type == "ConstantOfShape":
            held = edit.attribute(node, "value")
            number = 0.0 if held is None else float(held.numpy().reshape(-1)[0])
            data = ir.Tensor(np.array([number], dtype=self.to.numpy()), dtype=self.to)
            node.attributes["value"] = ir.AttrTensor("value", data)

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The value in a type: itself converted if it is a constant, else the result of a Cast."""
        known = self._casts.get((value, dtype))
        if known is not None:
            return known
        name = f"{value.name}.{dtype.name.lower()}"
        held = edit.tensor(value)
        graph = value.graph
        assert graph is not None
        if held is not None:
            new_name = self._names.fresh(name)
            made = edit.initializer(graph, converted(held, dtype, new_name), new_name)
        else:
            node = self._cast(value, dtype, name)
            made = node.outputs[0]
            producer = value.producer()
            if producer is not None:
                producer.append(node)
            else:
                _prepend(graph, node)
        self._casts[(value, dtype)] = made
        return made

    def _cast(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
        name = self._names.fresh(name)
        node = ir.node("Cast", [value], {"to": dtype.value}, name=name)
        node.outputs[0].name = name
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), value.shape
        return node

    def _cast_output(self, graph: ir.Graph, index: int, dtype: ir.DataType) -> None:
        """Give an output of a graph a type again, and its name."""
        value = graph.outputs[index]
        node = self._cast(value, dtype, f"{value.name}.{dtype.name.lower()}")
        graph.append(node)
        made = node.outputs[0]
        name, spare = value.name, made.name
        graph.outputs[index] = made
        value.name, made.name = spare, name


def _prepend(graph: ir.Graph, node: ir.Node) -> None:
    first = next(iter(graph), None)
    if first is None:
        graph.append(node)
    else:
        first.prepend(node)


def drop_originals(model: ir.Model) -> None:
    """Drop constants that nobody reads, and let a converted constant take the name of the one it replaces."""
    for graph in (model.graph, *model.graph.subgraphs()):
        for node in graph:
            if node.op_type == "Constant" and not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
                graph.remove(node, safe=True)
        for name, value in list(graph.initializers.items()):
            if value.uses() or value.is_graph_output() or value.is_graph_input():
                continue
            del graph.initializers[name]
            for suffix in FLOATS:
                heir = graph.initializers.get(f"{name}.{suffix.name.lower()}")
                if heir is not None:
                    heir.name = name
                    break
