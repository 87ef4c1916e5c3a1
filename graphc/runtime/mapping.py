"""Handing a model with large constants to ONNX Runtime without copying them into memory.

What was measured with 2.4 GB of weights: constants in mapped files cost no anonymous memory, arrays lent with
``SessionOptions.add_initializer`` neither, ``add_external_initializers`` copies them all.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.runtime.complaints import CannotRun

INLINE = 4096
"""Bytes up to which a constant stays in the protobuf."""

_PAGE = 4096
_PROTOBUF_LIMIT = 2**31 - 1
_FOLDER = "session.model_external_initializers_file_folder_path"


def constants(model: ir.Model) -> Iterator[tuple[ir.Value | ir.Node, ir.TensorProtocol]]:
    """Every stored tensor of the model, with the initializer or the Constant node that holds it."""
    for graph in edit.graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value, value.const_value
        for node in graph:
            if (tensor := _held(node)) is not None:
                yield node, tensor


def constants_nbytes(model: ir.Model) -> int:
    """Bytes of all stored tensors of the model, subgraphs and functions included."""
    return sum(edit.nbytes(tensor) for _, tensor in constants(model))


def serialised(model: ir.Model) -> bytes:
    """The model as a protobuf that holds all its constants, those in files included."""
    model = _copy(model)
    for holder, tensor in list(constants(model)):
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        inside = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
        if isinstance(holder, ir.Value):
            holder.const_value = inside
        else:
            holder.attributes["value"] = ir.AttrTensor("value", inside)
    return bytes(ir.to_proto(model).SerializeToString())


def mapped(model: ir.Model, settings: Any, *, lend: bool) -> tuple[bytes, list[Any]]:
    """Serialise a model with its constants outside of the protobuf.

    Arrays that are in memory or mapped from files already are lent to the runtime, which reads them in place; what
    is computed on demand is streamed into a temporary file that the runtime maps.

    Args:
        model: Any model; it stays as it is.
        settings: The session options; the places of the constants are added.
        lend: Whether anything may be lent. That is right only while the runtime's optimiser is off: the optimiser
            reads constants through their declared file, not what was lent.

    Returns:
        The serialised model, and what must live as long as the session.

    Raises:
        CannotRun: More than 2 GiB must stay in the protobuf.
    """
    import onnxruntime as ort

    folder = tempfile.TemporaryDirectory(prefix="graphc-")
    keep: list[Any] = [folder]
    settings.add_session_config_entry(_FOLDER, folder.name)
    streamed, lent = Path(folder.name, "streamed"), Path(folder.name, "lent")
    # The file that lent constants declare must exist; it is empty, so that reading it would fail, not mislead.
    lent.touch()
    model = _copy(model)
    _hoist_constant_nodes(model)
    _transpose_constants(model)
    # What is lent is known by name only, in all graphs: two branches may use one name for different tensors.
    names = Counter(name for graph in edit.graphs(model) for name in graph.initializers)
    with streamed.open("wb") as file:
        for holder, tensor in constants(model):
            if tensor.dtype == ir.DataType.STRING or not isinstance(holder, ir.Value) or not holder.name:
                continue
            if tensor.nbytes <= INLINE:
                if isinstance(tensor, ir.ExternalTensor):  # the runtime reads no files elsewhere
                    holder.const_value = ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=holder.name)
                continue
            if lend and _lendable(tensor) and names[holder.name] == 1:
                array = tensor.numpy()
                value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, int(tensor.dtype))
                settings.add_initializer(holder.name, value)
                keep += [array, value]
                path, offset = lent, 0
            else:
                file.write(b"\0" * (-file.tell() % _PAGE))  # what is not aligned is read, not mapped
                path, offset = streamed, file.tell()
                _write(tensor, file)
            holder.const_value = ir.ExternalTensor(
                path.name,
                offset,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=holder.name,
                base_dir=folder.name,
            )
    proto = ir.to_proto(model)
    if proto.ByteSize() > _PROTOBUF_LIMIT:
        raise CannotRun(
            "the model is too large for ONNX Runtime",
            message="it has more than 2 GiB of constants where they cannot lie in files",
            hint="inline its local functions first",
        )
    return bytes(proto.SerializeToString()), keep


def _copy(model: ir.Model) -> ir.Model:
    """A clone that shares the tensors. Constants need not be inputs in it, as they had to before IR version 4."""
    copy = model.clone()
    copy.ir_version = max(copy.ir_version, 4)
    return copy


def _held(node: ir.Node) -> ir.TensorProtocol | None:
    """The tensor in a Constant node, not those in its short forms."""
    attr = node.attributes.get("value")
    if attr is None or attr.is_ref() or not edit.is_op(node, "Constant"):
        return None
    return attr.as_tensor()


def _hoist_constant_nodes(model: ir.Model) -> None:
    """Make initializers, which can lie in files, of large Constant nodes. Functions have no initializers."""
    for graph in (model.graph, *model.graph.subgraphs()):
        for node in list(graph):
            tensor, output = _held(node), node.outputs[0]
            if tensor is None or edit.nbytes(tensor) <= INLINE or output.is_graph_output() or not output.name:
                continue
            name = output.name
            output.name = f"{name}.hoisted"
            output.replace_all_uses_with(edit.initializer(graph, tensor, name))
            edit.remove(node)


def _transpose_constants(model: ir.Model) -> None:
    """Store large weights as they are read: transposed, which changes no number.

    A runtime whose optimiser is off would transpose them in memory, all of them before the first product.
    """
    for graph in (model.graph, *model.graph.subgraphs()):
        for node in list(graph):
            if not edit.is_op(node, "Transpose"):
                continue
            held, output = edit.tensor(node.inputs[0]), node.outputs[0]
            if held is None or held.nbytes <= INLINE or held.dtype.bitwidth < 8 or held.dtype == ir.DataType.STRING:
                continue
            if output.is_graph_output() or not output.name:
                continue
            name, source = output.name, node.inputs[0]
            output.name = f"{name}.transposed"
            output.replace_all_uses_with(edit.initializer(graph, _transposed(held, node), name))
            edit.remove(node)
            assert source is not None
            if source.graph is not None and source.name and not source.uses() and not source.is_graph_output():
                source.graph.initializers.pop(source.name, None)


def _transposed(held: ir.TensorProtocol, node: ir.Node) -> ir.LazyTensor:
    rank = len(held.shape)
    perm = edit.attribute(node, "perm", tuple(reversed(range(rank))))
    shape = held.shape.numpy()

    def view() -> ir.TensorProtocol:
        return ir.Tensor(held.numpy().transpose(perm), dtype=held.dtype)

    return ir.LazyTensor(view, dtype=held.dtype, shape=ir.Shape([shape[axis] for axis in perm]), cache=False)


def _lendable(tensor: ir.TensorProtocol) -> bool:
    """Whether the bytes exist already, in the layout that the runtime reads; types below a byte are packed there."""
    if not isinstance(tensor, ir.ExternalTensor | ir.Tensor) or tensor.dtype.bitwidth < 8:
        return False
    # The runtime takes the memory of an array as it is: a transposed view would be read in the wrong order.
    return isinstance(tensor, ir.ExternalTensor) or bool(tensor.numpy().flags.c_contiguous)


def _write(tensor: ir.TensorProtocol, file: Any) -> None:
    from graphc.storage.tensors import write_tensor

    write_tensor(tensor, file)
    edit.release(tensor)
