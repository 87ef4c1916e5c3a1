"""Brings a model with fixed sizes to the operators that TVM's importer takes, and names what it cannot take.

What the importer lacks, or gets wrong in some form, is replaced by the function body that ONNX gives for it, or by one
of the few rewrites here. ``tests/test_tvm_node_tests.py`` runs ONNX's own operator tests through both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from graphc import edit, tiles
from graphc.contract import PassResult
from graphc.edit import attribute
from graphc.errors import BadInput
from graphc.opset.expand import expand
from graphc.simplification import whole
from graphc.tvm import integers, packed, recurrent, sparse
from graphc.tvm.importer import WEIGHT
from graphc.tvm.placing import OWN

_MOST_ROUNDS = 4
"""Rounds of expanding and simplifying; the body of one operator may hold others that have bodies."""

_KEPT = ("Range", tiles.OPERATOR)
"""Operators whose bodies do not take their place: a loop, which would be refused, and what is read as it is."""

_FEW = 3
"""Nodes of an operator that an error names."""


def lower(model: ir.Model) -> None:
    """Bring a model with static shapes to what the importer takes, in place.

    Raises:
        BadInput: Operators are left that it does not take; the message has each with its nodes.
    """
    supported = frozenset(_importable())
    for _ in range(_MOST_ROUNDS):
        whole.simplify(model, PassResult())
        names = edit.Names(model)
        rewritten = sum(_rewrite(node, names) for graph in list(edit.graphs(model)) for node in list(graph))
        expanded = expand(model, lambda node: node.op_type not in _KEPT and bool(_obstacle(node, supported)))
        if not rewritten and not expanded:
            break
    recurrent.write(model)
    sparse.write(model)
    model.meta["rounded"] = dict(integers.write(model))
    packed.write(model)
    _as_floats(model)
    missing: dict[str, list[ir.Node]] = {}
    for node in edit.nodes(model):
        if why := _obstacle(node, supported):
            name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            missing.setdefault(f"{name}: {why}", []).append(node)
    if missing:
        lines = [f"{what} ({_places(nodes)})" for what, nodes in missing.items()]
        raise BadInput(
            f"TVM cannot take {sum(map(len, missing.values()))} nodes of the model",
            where="\n         ".join(lines),
            hint="-t onnxruntime runs them; or leave out the pass that made them",
        )


def _as_floats(model: ir.Model) -> None:
    """Compute the constants whose codes nothing reads packed; ``model.meta["floats"]`` counts the large ones by why."""
    names, reasons = edit.Names(model), packed.refused(model)
    floats: Counter[str] = Counter()
    for node in [node for node in edit.nodes(model) if edit.is_op(node, "DequantizeLinear")]:
        held, codes = list(node.inputs), edit.tensor(node.inputs[0])
        if codes is not None and codes.size >= WEIGHT:
            floats[reasons.get(node, "it is no matrix")] += 1
        if _put(node, _blocked(node, names), names):
            for value in held:
                edit.drop_unused(value)
    model.meta["floats"] = dict(floats)


def _importable() -> Iterator[str]:
    """The operators of the standard domain for which TVM's importer has a converter."""
    from tvm.relax.frontend.onnx import onnx_frontend

    yield from onnx_frontend._get_convert_map()
    yield "If"


def _places(nodes: list[ir.Node]) -> str:
    names = ", ".join(node.name or node.op_type for node in nodes[:_FEW])
    return names if len(nodes) <= _FEW else f"{names} and {len(nodes) - _FEW} more"


def _obstacle(node: ir.Node, supported: frozenset[str]) -> str:
    """Why the importer cannot take a node, or ""."""
    if node.domain == OWN:
        return ""
    if node.domain not in ("", "ai.onnx"):
        return "only standard operators are known"
    if node.op_type in recurrent.KINDS:
        return recurrent.obstacle(node)
    if node.op_type not in supported:
        return "there is no converter"
    for value in (*node.inputs, *node.outputs):
        if value is not None and isinstance(value.type, ir.SequenceType | ir.OptionalType):
            return "sequences are not supported"
        if value is not None and value.dtype in _DTYPES:
            return f"{value.dtype.name.lower()} is not supported"
        if value is not None and value.shape is not None and 0 in value.shape:
            # TVM's kernels do not take them at run time, or compute something where there is nothing to reduce.
            return "tensors without elements are not supported"
    check = _CAVEATS.get(node.op_type)
    return check(node) if check else ""


_DTYPES = (
    ir.DataType.STRING,
    ir.DataType.INT4,
    ir.DataType.UINT4,
    ir.DataType.COMPLEX64,
    ir.DataType.COMPLEX128,
    ir.DataType.BFLOAT16,
)
"""Dtypes that do not pass through the importer or the artifact."""


def _used(node: ir.Node, number: int) -> bool:
    """Whether anybody reads an output."""
    if len(node.outputs) <= number:
        return False
    value = node.outputs[number]
    return bool(value.uses()) or value.is_graph_output()


def _only_first_output(node: ir.Node) -> str:
    return "only its first output is supported" if any(_used(node, i) for i in range(1, len(node.outputs))) else ""


def _needs_constant(*numbers: int) -> Callable[[ir.Node], str]:
    def check(node: ir.Node) -> str:
        for number in numbers:
            value = node.inputs[number] if number < len(node.inputs) else None
            if value is not None and edit.tensor(value) is None:
                return f"its input {number} must be a constant"
        return ""

    return check


def _resize(node: ir.Node) -> str:
    if attribute(node, "antialias", 0):
        return "antialiasing is not supported"
    if attribute(node, "axes") is not None:
        return "the attribute axes is not supported"
    if attribute(node, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        return "tf_crop_and_resize is not supported"
    return _needs_constant(2, 3)(node)


def _rms(node: ir.Node) -> str:
    rank = len(node.inputs[0].shape) if node.inputs[0] is not None and node.inputs[0].shape is not None else None
    return "" if attribute(node, "axis", -1) in (-1, None if rank is None else rank - 1) else "its axis is not the last"


def _training(node: ir.Node) -> str:
    return "training mode is not supported" if attribute(node, "training_mode", 0) else _only_first_output(node)


def _no_booleans(node: ir.Node) -> str:
    value = node.inputs[0]
    return "booleans are not supported" if value is not None and value.dtype == ir.DataType.BOOL else ""


def _power(node: ir.Node) -> str:
    base = node.inputs[0]
    whole_numbers = base is not None and base.dtype is not None and base.dtype.is_integer()
    return "powers of integers are not supported" if whole_numbers else ""


def _quantized(node: ir.Node) -> str:
    return "blocks are not supported" if attribute(node, "block_size", 0) else ""


_CAVEATS: dict[str, Callable[[ir.Node], str]] = {
    "Attention": lambda node: "the importer means another operator of this name",
    "BatchNormalization": _training,
    "ConvTranspose": lambda node: "output_shape is not supported" if attribute(node, "output_shape") else "",
    "DequantizeLinear": _quantized,
    "Dropout": _only_first_output,
    "EyeLike": lambda node: "only constants are supported",
    "IsInf": lambda node: (
        "" if attribute(node, "detect_negative", 1) and attribute(node, "detect_positive", 1) else "one sign only"
    ),
    "LayerNormalization": _only_first_output,
    "MaxPool": _only_first_output,
    "MaxUnpool": lambda node: "output_shape is not supported" if len(node.inputs) > 2 else "",
    "Pad": _needs_constant(1, 2, 3),
    "Pow": _power,
    "QuantizeLinear": _quantized,
    "RMSNormalization": _rms,
    "Range": _needs_constant(0, 1, 2),
    "ReduceMax": _no_booleans,
    "ReduceMin": _no_booleans,
    "Resize": _resize,
}
"""What the importer gets wrong: why, by operator."""


def _rewrite(node: ir.Node, names: edit.Names) -> bool:
    """Rewrite one node that has no function body but an equal in simpler operators; whether it was."""
    if node.domain not in ("", "ai.onnx"):
        return False
    rewrite = _REWRITES.get(node.op_type)
    return _put(node, rewrite(node, names) if rewrite else None, names)


def _put(node: ir.Node, made: list[ir.Node] | None, names: edit.Names) -> bool:
    """Let new nodes, if any, take the place of one; whether they did."""
    if made is None:
        return False
    assert node.graph is not None
    node.graph.insert_before(node, made)
    new = made[-1].outputs[0]
    new.name = names.fresh(f"{node.outputs[0].name}_tvm")
    for each in made[:-1]:
        each.outputs[0].name = names.fresh(f"{node.outputs[0].name}_part")
    new.type, new.shape = node.outputs[0].type, node.outputs[0].shape
    edit.replace(node.outputs[0], new)
    node.graph.remove(node, safe=True)
    return True


def _sum(node: ir.Node, names: edit.Names) -> list[ir.Node] | None:
    """``Sum(a, b, c)`` -> ``Add(Add(a, b), c)``."""
    values = [value for value in node.inputs if value is not None]
    if len(values) == 1:
        return [ir.Node("", "Identity", values, num_outputs=1)]
    made: list[ir.Node] = []
    total = values[0]
    for value in values[1:]:
        made.append(ir.Node("", "Add", [total, value], num_outputs=1))
        total = made[-1].outputs[0]
        total.type = node.outputs[0].type
    return made


def _pow(node: ir.Node, names: edit.Names) -> list[ir.Node] | None:
    """An exponent of another dtype than the base is cast; a whole one to float, whose power is computed there."""
    base, exponent = node.inputs
    if base is None or exponent is None or base.dtype is None or exponent.dtype in (base.dtype, None):
        return None
    if not base.dtype.is_floating_point():
        return None
    cast = ir.Node("", "Cast", [exponent], [ir.AttrInt64("to", base.dtype)], num_outputs=1)
    cast.outputs[0].type = base.type
    return [cast, ir.Node("", "Pow", [base, cast.outputs[0]], num_outputs=1)]


def _blocked(node: ir.Node, names: edit.Names) -> list[ir.Node] | None:
    """A blocked or 4-bit ``DequantizeLinear`` of a constant is computed here, where nothing reads it packed."""
    if not (attribute(node, "block_size", 0) or (node.inputs[0] is not None and node.inputs[0].dtype in _DTYPES[1:3])):
        return None
    held = [edit.tensor(value) for value in node.inputs]
    out = node.outputs[0].dtype
    if any(tensor is None for tensor in held) or out is None or node.graph is None:
        return None
    codes, scale, *rest = [tensor.numpy().astype(np.float32) for tensor in held if tensor is not None]
    axis, block = attribute(node, "axis", 1), attribute(node, "block_size", 0)
    zero = rest[0] if rest else np.zeros_like(scale)
    if block:
        scale, zero = (np.repeat(a, block, axis)[tuple(slice(n) for n in codes.shape)] for a in (scale, zero))
    elif scale.ndim == 1:
        shape = [1] * codes.ndim
        shape[axis] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    data = ((codes - zero) * scale).astype(out.numpy())
    value = edit.initializer(node.graph, data, names.fresh(f"{node.outputs[0].name}_dequantized"))
    return [ir.Node("", "Identity", [value], num_outputs=1)]


def _is_inf(node: ir.Node, names: edit.Names) -> list[ir.Node] | None:
    """``IsInf`` of one sign only is a comparison with that infinity."""
    positive, negative = attribute(node, "detect_positive", 1), attribute(node, "detect_negative", 1)
    value = node.inputs[0]
    if bool(positive) == bool(negative) or value is None or value.dtype is None or node.graph is None:
        return None
    infinity = np.array(np.inf if positive else -np.inf, value.dtype.numpy())
    constant = edit.initializer(node.graph, infinity, names.fresh(f"{node.outputs[0].name}_infinity"))
    return [ir.Node("", "Equal", [value, constant], num_outputs=1)]


def _shape(node: ir.Node, names: edit.Names) -> list[ir.Node] | None:
    """The ``Shape`` of a value with known sizes is a constant; the importer would give a tuple for it."""
    value = node.inputs[0]
    if value is None or value.shape is None or not value.shape.is_static() or node.graph is None:
        return None
    sizes = value.shape.numpy()[attribute(node, "start", 0) : attribute(node, "end", None)]
    constant = edit.initializer(node.graph, np.array(sizes, np.int64), names.fresh(f"{node.outputs[0].name}_sizes"))
    return [ir.Node("", "Identity", [constant], num_outputs=1)]


_REWRITES: dict[str, Callable[[ir.Node, edit.Names], list[ir.Node] | None]] = {
    "IsInf": _is_inf,
    "Pow": _pow,
    "Shape": _shape,
    "Sum": _sum,
}
