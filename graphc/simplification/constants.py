"""Constants of a model: lifted out of nodes, computed, shared by content, and kept from making the file grow."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array
from graphc.moves import VIEWS
from graphc.shapes import Facts, fold
from graphc.shapes.kernels import CannotFold

LARGE = 16 << 20
"""Bytes from which a computed constant is not held in memory: it is computed when it is written."""
_VIEW = 256 << 10
"""Bytes from which another layout of a constant is no copy: all layers together may be large though no weight is."""
_RELAYOUT = frozenset({"Cast", "Transpose", *VIEWS})
"""Operators whose result is the same weight in another form, and keeps its name."""
_LAZY = frozenset({"Add", "Concat", "Mul", "Neg", "Sqrt", "Sub", "Tile", "Where"})
"""Operators that are certain to succeed on constants of fitting shapes, so that they can be left for later."""
AXES = "graphc.axes"
"""Metadata key of a weight that is stored in another layout than its source has it: for each of its axes, the axis that
it was there (``"1 0"`` for a transposed matrix); ``"?"`` where it was reshaped."""
_FEW_BYTES = 16 << 10
"""Bytes up to which it does not matter that a constant is stored in two forms."""
_CODES = 256
"""Elements up to which a matrix of integers of 8 bits is none of a weight's codes."""
_SAMPLE = 4096
"""Bytes of the begin and the end of a tensor by which it is first compared with others."""


class Constants:
    """Makes the constants of one model.

    Args:
        model: The model that they are for.
        limit: Bytes by which folding may make the model grow, all in all.
    """

    def __init__(self, model: ir.Model, limit: int) -> None:
        self.names = edit.Names(model)
        self._version = model.opset_imports.get("", 0) or model.opset_imports.get("ai.onnx", 0)
        self._limit = limit
        self._grown = 0
        self._shared: dict[tuple[ir.Graph, Hashable], ir.Value] = {}
        self._facts: Facts | None = None

    def begin(self, facts: Facts) -> None:
        """Take the facts of a new sweep."""
        self._facts = facts
        self._shared.clear()

    def small(self, graph: ir.Graph, data: Array, hint: str) -> ir.Value:
        """A constant with this content in ``graph``, made only if there is none yet."""
        key = (graph, _content(data))
        known = self._shared.get(key)
        if known is not None and known.is_initializer():
            return known
        value = edit.initializer(graph, np.array(data, order="C"), self.names.fresh(hint))
        self._shared[key] = value
        return value

    def lift(self, node: ir.Node) -> bool:
        """Turn a Constant node into an initializer; False where it must stay one."""
        value = node.outputs[0]
        held = edit.tensor(value)
        if held is None or node.graph is None or value.is_graph_output() or held.dtype == ir.DataType.STRING:
            return False
        self._put(value, held)
        edit.remove(node)
        return True

    def replace(self, value: ir.Value, data: Array, node: ir.Node) -> None:
        """Let the readers of ``value``, an output of ``node``, read a constant instead."""
        assert node.graph is not None
        if data.size <= edit.SMALL:
            key = (node.graph, _content(data))
            known = self._shared.get(key)
            if known is not None and known.is_initializer():
                value.replace_all_uses_with(known)
                return
            self._shared[key] = self._put(value, ir.tensor(np.array(data, order="C")))
        else:
            # Views of what is on disk, and fills, stay views: they take no memory until they are written.
            self._put(value, ir.tensor(data if data.nbytes >= _VIEW or _is_fill(data) else np.array(data, order="C")))

    def fold(self, node: ir.Node) -> None:
        """Compute a node whose inputs are all constant, and let its readers read the result.

        Raises:
            CannotFold: It stays, for the reason given.
        """
        if not fold.deterministic(node):
            raise CannotFold("random operators are not computed ahead")
        if node.op_type in fold.KEPT:
            raise CannotFold("quantized constants stay quantized")
        if any(attr.is_ref() for attr in node.attributes.values()) or any(edit.subgraphs(node)):
            raise CannotFold("control flow on constants is not computed ahead")
        assert self._facts is not None
        tensors = [None if value is None else edit.tensor(value) for value in node.inputs]
        if any(t is not None and t.dtype == ir.DataType.STRING for t in tensors):
            raise CannotFold("strings are left alone")
        freed = sum(
            t.nbytes
            for value, t in zip(node.inputs, tensors, strict=True)
            if t is not None and value is not None and len(value.uses()) == 1 and not value.is_graph_output()
        )
        outputs = [value for value in node.outputs if value.uses()]
        if any(self._facts(value).dtype is None for value in outputs):
            raise CannotFold("the result is not a plain tensor")
        sizes = [_nbytes(self._facts, value) for value in outputs]
        if None not in sizes:
            size = sum(s for s in sizes if s is not None)
            self._admit(node, tensors[0], size, size - freed)
            if size >= LARGE and len(outputs) == 1 and node.op_type in _LAZY:
                self._grown += max(size - freed, 0)
                self._lazily(node, outputs[0], tensors)
                return
        arrays = fold.evaluate(node, [None if t is None else t.numpy() for t in tensors], self._version)
        made = [(value, array) for value, array in zip(node.outputs, arrays, strict=False) if value.uses()]
        growth = sum(array.nbytes for _, array in made) - freed
        self._admit(node, tensors[0], sum(array.nbytes for _, array in made), growth)
        self._grown += max(growth, 0)
        for value, array in made:
            fact = self._facts(value)
            if fact.dtype is not None and fact.dtype.numpy() != array.dtype:
                raise CannotFold("the computed constant has another dtype than inferred")
        for value, array in made:
            heir = self._heir(node)
            self.replace(value, array, node)
            if heir is not None and value.name:
                self._rename(node, value, heir)

    def _admit(self, node: ir.Node, source: ir.TensorProtocol | None, size: int, growth: int) -> None:
        """Raise CannotFold if a result of ``size`` bytes is not worth having ahead of time."""
        if growth <= 0 or size <= _CODES:
            return
        if node.op_type in ("Cast", "CastLike") and source is not None and source.size > _most(source):
            raise CannotFold("widening a stored weight would undo its compression")
        if size <= edit.SMALL:
            return
        if node.op_type in _RELAYOUT and size > _FEW_BYTES:
            raise CannotFold("another form of a weight that others read would store it twice")
        if self._grown + growth > self._limit:
            raise CannotFold(f"folding would grow the file by more than the {self._limit / 1e6:g} MB allowed")

    def _lazily(self, node: ir.Node, value: ir.Value, tensors: list[ir.TensorProtocol | None]) -> None:
        assert self._facts is not None
        fact = self._facts(value)
        assert fact.dtype is not None and fact.static is not None
        operator = ir.Node(
            "",
            node.op_type,
            [ir.Value() if t is not None else None for t in tensors],
            list(node.attributes.values()),
            outputs=[ir.Value(name="result", type=ir.TensorType(fact.dtype))],
        )
        version = self._version

        def compute() -> ir.TensorProtocol:
            inputs = [None if t is None else t.numpy() for t in tensors]
            return ir.tensor(np.array(fold.evaluate(operator, inputs, version)[0], order="C"))

        heir = self._heir(node)
        self._put(value, ir.LazyTensor(compute, dtype=fact.dtype, shape=ir.Shape(fact.static), cache=False))
        if heir is not None:
            self._rename(node, value, heir)

    def _put(self, value: ir.Value, held: ir.TensorProtocol) -> ir.Value:
        """Make an initializer that takes the name and the readers of ``value``."""
        producer = value.producer()
        assert producer is not None and producer.graph is not None and value.name
        name = value.name
        value.name = f"{name}.folded"
        made = ir.Value(
            name=name,
            type=ir.TensorType(held.dtype),
            shape=ir.Shape(held.shape.numpy()),
            const_value=held,
            metadata_props=dict(value.metadata_props),
        )
        held.name = name
        producer.graph.register_initializer(made)
        value.replace_all_uses_with(made)
        return made

    def _heir(self, node: ir.Node) -> ir.Value | None:
        """The weight that a node only lays out anew, if nothing else reads it: the result takes its name."""
        value = node.inputs[0] if node.inputs else None
        if (
            node.op_type not in _RELAYOUT
            or value is None
            or not value.is_initializer()
            or value.graph is not node.graph
        ):
            return None
        alone = len(value.uses()) == 1 and not value.is_graph_output() and not value.is_graph_input()
        return value if alone and value.const_value is not None and value.const_value.size > 1 else None

    def _rename(self, node: ir.Node, value: ir.Value, heir: ir.Value) -> None:
        graph = node.graph
        name = (value.name or "").removesuffix(".folded")
        made = None if graph is None else graph.initializers.get(name)
        if graph is None or made is None or heir.name is None:
            return
        weight = heir.name
        heir_tensor = heir.const_value
        node.replace_input_with(0, None)
        del graph.initializers[weight]
        # The old tensor keeps its own name: a lazy result may still read it.
        heir.const_value = None
        heir.name = f"{weight}.before"
        if heir_tensor is not None:
            heir_tensor.name = weight
        made.name = weight
        made.metadata_props.update(heir.metadata_props)
        layout = _layout(node, heir)
        if layout:
            made.metadata_props[AXES] = layout
        else:
            made.metadata_props.pop(AXES, None)


def _layout(node: ir.Node, weight: ir.Value) -> str:
    """``AXES`` of what a node makes of a weight; empty where the axes are those of the source."""
    before = weight.metadata_props.get(AXES)
    rank = len(weight.shape) if weight.shape is not None else 0
    if node.op_type in ("Cast", "Identity"):
        return before or ""
    if node.op_type != "Transpose" or before == "?":
        return "?"
    axes = before.split() if before else [str(axis) for axis in range(rank)]
    moved = [axes[axis] for axis in edit.attribute(node, "perm", tuple(reversed(range(rank))))]
    return "" if moved == [str(axis) for axis in range(rank)] else " ".join(moved)


def _most(source: ir.TensorProtocol) -> int:
    """Elements up to which a constant may be widened: fewer of what may be the codes of a weight."""
    codes = source.dtype.is_integer() and source.dtype.bitwidth <= 8 and len(source.shape) > 1
    return _CODES if codes else edit.SMALL


def _nbytes(facts: Facts, value: ir.Value) -> int | None:
    fact = facts(value)
    if fact.static is None or fact.dtype is None:
        return None
    return int(np.prod(fact.static, dtype=np.float64) * fact.dtype.itemsize)


def _content(data: Array) -> Hashable:
    return (data.dtype.str, data.shape, data.tobytes())


def share(model: ir.Model) -> int:
    """Merge initializers of one graph that hold the same bytes; the first stays. Returns how many went.

    Tensors are told apart by dtype, shape, and their first and last bytes; only where those agree are they hashed
    whole, one at a time, and without being copied.
    """
    count = 0
    for graph in (model.graph, *edit.bodies(model.graph)):
        alike: dict[Hashable, list[ir.Value]] = {}
        for value in graph.initializers.values():
            held = value.const_value
            if held is None or value.is_graph_input() or value.is_graph_output() or isinstance(held, ir.LazyTensor):
                continue
            # Packed dtypes would have to be unpacked to be compared.
            if held.dtype != ir.DataType.STRING and held.dtype.bitwidth >= 8:
                alike.setdefault((held.dtype, tuple(held.shape.numpy()), _ends(held)), []).append(value)
        for values in alike.values():
            count += _merge_equal(graph, values) if len(values) > 1 else 0
    return count


def _merge_equal(graph: ir.Graph, values: list[ir.Value]) -> int:
    first: dict[bytes, ir.Value] = {}
    count = 0
    for value in values:
        assert value.const_value is not None and value.name is not None
        kept = first.setdefault(_digest(value.const_value), value)
        if kept is not value:
            value.replace_all_uses_with(kept)
            del graph.initializers[value.name]
            count += 1
    return count


def _is_fill(array: Array) -> bool:
    """Whether all elements of an array are one place in memory."""
    return not any(array.strides) and array.size > 1


def _ends(held: ir.TensorProtocol) -> bytes:
    array = held.numpy()
    if array.size == 0 or _is_fill(array):
        return array.reshape(-1)[:1].tobytes()
    count = max(_SAMPLE // array.itemsize, 1)
    # An iterator takes the elements in row-major order without laying out a transposed view.
    return bytes(array.flat[:count].tobytes()) + bytes(array.flat[-count:].tobytes())


def _digest(held: ir.TensorProtocol) -> bytes:
    array = held.numpy()
    if _is_fill(array):
        return b"fill" + array.reshape(-1)[:1].tobytes()
    digest = hashlib.blake2b(digest_size=16)
    for part in (array,) if array.flags.c_contiguous or array.ndim < 2 else array:
        digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    return digest.digest()
