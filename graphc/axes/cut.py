"""Cuts units out of a graph, everywhere they occur; or writes them dead instead. The law: both compute the same.

Constants are sliced lazily, one at a time, when they are next read. Sizes that nodes are told (shapes, slices,
``group``, head counts) follow from the axis trees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.axes.algebra import Axis, find, leaves
from graphc.axes.apply import Application
from graphc.axes.collect import NORMALISERS
from graphc.axes.groups import Group, Groups
from graphc.axes.operands import Operands
from graphc.axes.selection import Masks, Selection, problems
from graphc.axes.size import Size, product
from graphc.axes.trace import Trace
from graphc.axes.words import words
from graphc.contract import PassResult
from graphc.errors import BadInput

Array = np.ndarray[Any, np.dtype[Any]]

COUNTS: Mapping[str, Mapping[str, str]] = {
    "Conv": {"group": "g"},
    "ConvTranspose": {"group": "g"},
    "ConvInteger": {"group": "g"},
    "QLinearConv": {"group": "g"},
    "DeformConv": {"group": "g"},
    "com.microsoft.FusedConv": {"group": "g"},
    "com.microsoft.NhwcConv": {"group": "g"},
    "com.microsoft.NhwcFusedConv": {"group": "g"},
    "LSTM": {"hidden_size": "h"},
    "GRU": {"hidden_size": "h"},
    "RNN": {"hidden_size": "h"},
    "GroupNormalization": {"num_groups": "g"},
    "com.microsoft.GroupNorm": {"groups": "g"},
    "com.microsoft.SkipGroupNorm": {"groups": "g"},
    "Attention": {"q_num_heads": "h r", "kv_num_heads": "h"},
    "RotaryEmbedding": {"num_heads": "h", "rotary_embedding_dim": "2 e"},
    "com.microsoft.Attention": {"num_heads": "h"},
    "com.microsoft.MultiHeadAttention": {"num_heads": "h"},
    "com.microsoft.DecoderMaskedMultiHeadAttention": {"num_heads": "h"},
    "com.microsoft.GroupQueryAttention": {"num_heads": "h r", "kv_num_heads": "h"},
    "com.microsoft.RotaryEmbedding": {"num_heads": "h", "rotary_embedding_dim": "2 e"},
    "com.microsoft.MatMulNBits": {"K": "k q", "N": "n"},
}
"""Attributes that count units, by operator: the product of the sizes of names in its rule."""

SCALED = words("Attention MultiHeadAttention GroupQueryAttention DecoderMaskedMultiHeadAttention")
"""Operators whose ``scale`` is 1/sqrt(head size) unless it is given."""


def check(groups: Groups, keep: Masks) -> list[str]:
    """Why a cut is not allowed, in words: unknown names, wrong shapes, unequal blocks, too few units; [] if it is.

    Args:
        groups: The analysis of the model.
        keep: By group name: true for the units that stay. Shape ``(size,)``, or ``(*blocks, size)``.
    """
    return problems(groups, keep)


def _selection(model: ir.Model, groups: Groups, keep: Masks) -> tuple[Selection, list[Group]]:
    if groups.model is not model:
        raise ValueError("the groups belong to another model")
    found = problems(groups, keep)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise BadInput(f"the units cannot be cut: {found[0]}{more}")
    return Selection.of(groups, keep), [groups[name] for name, mask in keep.items() if not np.asarray(mask).all()]


def cut(model: ir.Model, groups: Groups, keep: Masks, *, compensate: bool = True) -> PassResult:
    """Remove units from a model, in place. Analyse again before the next cut.

    Args:
        model: The model that was analysed.
        groups: Its analysis; with ``interface=True`` graph inputs and outputs may change their shapes.
        keep: By group name: true for the units that stay. Groups that are not named stay whole.
        compensate: Divide means and RMS norms by the old count, which is exact for units that were zero. Layer
            and group normalisations always divide by the new one.

    Returns:
        What was changed.

    Raises:
        BadInput: ``check`` has something against it. Nothing is changed then.
    """
    selection, chosen = _selection(model, groups, keep)
    result = PassResult()
    if not chosen:
        return result
    operate(groups.trace, selection, result, compensate=compensate)
    for group in chosen:
        result.change(f"{group.kind} units removed", group.size - _kept(keep[group.name]))
    return result


def operate(trace: Trace, selection: Selection, result: PassResult, *, compensate: bool = True) -> None:
    """Remove what a selection does not keep from the traced graph; see ``cut``."""
    surgery = _Surgery(trace, selection)
    surgery.operands.decide()
    result.change("constant sliced", surgery.constants())
    surgery.attributes()
    if compensate:
        surgery.normalisers()
    result.change("operand rewritten", surgery.operands.apply())
    surgery.shapes()


def zero(model: ir.Model, groups: Groups, keep: Masks) -> PassResult:
    """Write units dead, in place: zeros where they are produced and consumed, -inf where they compete.

    Args:
        model: The model that was analysed.
        groups: Its analysis.
        keep: By group name: true for the units that stay alive.

    Raises:
        BadInput: ``check`` has something against it. Nothing is changed then.
    """
    selection, chosen = _selection(model, groups, keep)
    result = PassResult()
    trace = groups.trace
    zeroed: dict[tuple[ir.Value, ir.Node | None], list[Axis]] = {}
    for group in chosen:
        if group.neutral != 0.0:
            _bar(trace, selection, {group.leaf, *(group.numbers or ())})
        for place in group.places:
            if place.role != "carries":
                zeroed.setdefault((place.value, place.reader), []).append(place.tree)
    names = edit.Names(model)
    for (value, reader), trees in zeroed.items():
        axes = (trace.axes[value] if reader is None else trace.copies[value, reader]) or ()
        old = edit.tensor(value)
        if old is not None:
            changed = _lazy(old, tuple(old.shape.numpy()), partial(_dead, selection, axes, trees))
            write(value, changed, reader=reader, names=names)
    for group in chosen:
        result.change(f"{group.kind} units zeroed", group.size - _kept(keep[group.name]))
    return result


def _dead(selection: Selection, axes: Sequence[Axis], only: Sequence[Axis], array: Array) -> Array:
    return selection.dead(axes, array, only)


def _kept(mask: Array) -> int:
    return int(np.asarray(mask).sum(axis=-1).max())


def _bar(trace: Trace, selection: Selection, units: set[Axis]) -> None:
    """Add -inf to dead units wherever they compete."""
    names = edit.Names(trace.model)
    for fact in list(trace.facts):
        if fact.what != "^" or fact.operand is None or fact.source is None:
            continue
        if units.isdisjoint(leaves(fact.axis)):
            continue
        operand, node = fact.operand, fact.source
        axes = trace.axes[operand] or ()
        at = fact.at
        mask = np.where(selection.mask(axes[at]), 0.0, -math.inf)
        shape = [-1 if i == at else 1 for i in range(at, len(axes))]
        bar = mask.reshape(shape).astype(np.float32)
        bias, casts = typed(trace.graph, names, bar, operand, f"{operand.name}.barred")
        out = ir.Value(name=names.fresh(f"{operand.name}.masked"), shape=operand.shape, type=operand.type)
        assert node.graph is not None
        add = ir.Node("", "Add", [operand, bias], outputs=[out], name=out.name)
        node.graph.insert_before(node, [*casts, add])
        for i, value in enumerate(node.inputs):
            if value is operand:
                node.replace_input_with(i, out)


def _lazy(old: ir.TensorProtocol, shape: tuple[int, ...], change: Callable[[Array], Array]) -> ir.TensorProtocol:
    """A tensor that is read and changed when it is next needed, and not held."""

    def read() -> ir.TensorProtocol:
        array = change(old.numpy())
        if isinstance(old, ir.ExternalTensor):
            array = np.array(array)
            edit.release(old)
        return ir.Tensor(np.ascontiguousarray(array), dtype=old.dtype, name=old.name)

    if old.size <= edit.SMALL:
        return read()
    return ir.LazyTensor(read, dtype=old.dtype, shape=ir.Shape(shape), name=old.name, cache=False)


def write(
    value: ir.Value,
    tensor: ir.TensorProtocol,
    *,
    reader: ir.Node | None = None,
    names: edit.Names | None = None,
) -> None:
    """Let a constant (an initializer or the output of a Constant node) hold another tensor.

    Args:
        value: The constant.
        tensor: What it holds from now on.
        reader: Change it for this node only; the others keep what they read.
        names: For the copy of a constant that others keep reading; needed with ``reader``.
    """
    if reader is not None and any(use.node is not reader for use in value.uses()):
        assert names is not None and reader.graph is not None
        copy = edit.initializer(reader.graph, tensor, names.fresh(value.name or "copy"))
        for use in list(value.uses()):
            if use.node is reader:
                reader.replace_input_with(use.idx, copy)
        return
    if value.is_initializer():
        value.const_value = tensor
    else:
        node = value.producer()
        assert node is not None
        node.attributes.clear()
        node.attributes["value"] = ir.AttrTensor("value", tensor)
    value.shape = ir.Shape(tensor.shape.numpy())


def typed(
    graph: ir.Graph, names: edit.Names, array: Array, like: ir.Value, hint: str
) -> tuple[ir.Value, list[ir.Node]]:
    """A constant in the type of another value; the node that casts it where that type is not declared."""
    if like.dtype is not None:
        return edit.initializer(graph, array.astype(like.dtype.numpy()), names.fresh(hint)), []
    held = edit.initializer(graph, array, names.fresh(hint))
    out = ir.Value(name=names.fresh(f"{hint}.cast"))
    return out, [ir.Node("", "CastLike", [held, like], outputs=[out], name=out.name)]


class _Surgery:
    """The steps of one cut."""

    def __init__(self, trace: Trace, selection: Selection) -> None:
        self.trace, self.selection = trace, selection
        self.names = edit.Names(trace.model)
        self.operands = Operands(self.trace, selection, self.names)

    def constants(self) -> int:
        """Slice all constants; returns how many."""
        count = 0
        for value, reader, axes in list(self.trace.constants()):
            old = edit.tensor(value)
            if old is None or not any(self.selection.touches(axis) for axis in axes):
                continue
            shape = tuple(int(self.selection.size(axis)) for axis in axes)  # type: ignore[arg-type]
            write(value, _lazy(old, shape, partial(self.selection.take, axes)), reader=reader, names=self.names)
            count += 1
        return count

    def _size(self, application: Application, names: str) -> Size:
        total: Size = 1
        for name in names.split():
            if name.isdigit():
                total = total * int(name)
            elif name in application.names:
                total = total * self.selection.size(application.names[name])
        return total

    def attributes(self) -> None:
        for node, application in self.trace.bound.items():
            operator = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
            for attribute, names in COUNTS.get(operator, {}).items():
                if attribute not in node.attributes or not edit.attribute(node, attribute):
                    continue
                size = self._size(application, names)
                if isinstance(size, int):
                    node.attributes[attribute] = ir.AttrInt64(attribute, size)
            v = "h v" if "v" in application.names else "h d"
            widths = [self._size(application, names) for names in ("h d", "h d", v)]
            if operator == "com.microsoft.Attention" and (
                widths[0] != widths[2] or "qkv_hidden_sizes" in node.attributes
            ):
                node.attributes["qkv_hidden_sizes"] = ir.AttrInt64s("qkv_hidden_sizes", widths)  # type: ignore[arg-type]
            if node.op_type in SCALED:
                self._scale(node, application)

    def _scale(self, node: ir.Node, application: Application) -> None:
        """Write the scale out before the head size that it follows from changes."""
        names = application.names
        if edit.attribute(node, "scale", 0.0) or not any(
            self.selection.touches(names[n]) for n in ("d", "e") if n in names
        ):
            return
        size = 1
        if "d" in names and "e" in names:
            size = int(names["d"].size) + 2 * int(names["e"].size)  # type: ignore[arg-type]
        else:
            size = int(names["d"].size) if "d" in names else 2 * int(names["e"].size)  # type: ignore[arg-type]
        node.attributes["scale"] = ir.AttrFloat32("scale", 1 / math.sqrt(size))

    def normalisers(self) -> None:
        nodes: dict[ir.Node, list[Axis]] = {}
        for fact in self.trace.facts:
            if fact.what == "~" and fact.source is not None and self.selection.touches(fact.axis):
                nodes.setdefault(fact.source, []).append(fact.axis)
        for node, axes in nodes.items():
            kind = NORMALISERS.get(node.op_type)
            old = product(find(axis).size for axis in axes)
            new = product(self.selection.size(axis) for axis in axes)
            assert isinstance(old, int) and isinstance(new, int), "dynamic axes are never cut"
            if kind == "mean":
                self._scaled_output(node, new / old)
            elif kind == "rms":
                self._rms(node, new / old)

    def _scaled_output(self, node: ir.Node, factor: float) -> None:
        """``mean over the old count = mean * new / old``."""
        out = node.outputs[0]
        assert node.graph is not None
        scaled = ir.Value(name=self.names.fresh(f"{out.name}.mean"), shape=out.shape, type=out.type)
        held, casts = typed(self.trace.graph, self.names, np.array(factor, np.float32), out, f"{out.name}.count")
        mul = ir.Node("", "Mul", [out, held], outputs=[scaled], name=scaled.name)
        if out.is_graph_output():
            name = out.name
            out.replace_all_uses_with(scaled, replace_graph_outputs=True)
            out.name, scaled.name = scaled.name, name
        else:
            out.replace_all_uses_with(scaled)
        mul.replace_input_with(0, out)
        for cast in casts:
            cast.replace_input_with(1, out)
        node.graph.insert_after(node, [*casts, mul])

    def _rms(self, node: ir.Node, ratio: float) -> None:
        """``x / sqrt(S/old + eps) * g = x / sqrt(S/new + eps/ratio) * g / sqrt(ratio)`` with ``ratio = new/old``."""
        at = 2 if node.op_type.startswith("Skip") else 1
        epsilon = float(edit.attribute(node, "epsilon", 1e-5))
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon / ratio)
        gamma = node.inputs[at]
        factor = 1 / math.sqrt(ratio)
        assert gamma is not None
        tensor = edit.tensor(gamma)
        name = self.names.fresh(f"{gamma.name}.rescaled")
        if tensor is not None:
            changed = _lazy(tensor, tuple(tensor.shape.numpy()), lambda a: (a * factor).astype(a.dtype))
            if len(gamma.uses()) == 1:
                write(gamma, changed)
            else:
                node.replace_input_with(at, edit.initializer(self.trace.graph, changed, name))
            return
        held, casts = typed(self.trace.graph, self.names, np.array(factor, np.float32), gamma, f"{name}.factor")
        out = ir.Value(name=name, type=gamma.type)
        assert node.graph is not None
        node.graph.insert_before(node, [*casts, ir.Node("", "Mul", [gamma, held], outputs=[out], name=name)])
        node.replace_input_with(at, out)

    def shapes(self) -> None:
        """What the model declares about values whose axes were cut."""
        for value, axes in self.trace.axes.items():
            if not axes or value in self.trace.order or value.shape is None or len(value.shape) != len(axes):
                continue
            if not any(self.selection.touches(axis) for axis in axes):
                continue
            dims: list[int | ir.SymbolicDim] = []
            for dim, axis in zip(value.shape, axes, strict=True):
                size = self.selection.size(axis)
                if not self.selection.touches(axis):
                    dims.append(dim)
                else:
                    dims.append(size if isinstance(size, int) else ir.SymbolicDim(None))
            value.shape = ir.Shape(dims)


__all__ = ["BadInput", "check", "cut", "write", "zero"]
