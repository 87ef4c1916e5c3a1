"""ONNX files, and folders that hold one, as sources."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from graphc import edit
from graphc.contract import PassResult
from graphc.errors import BadInput
from graphc.frontends import Source
from graphc.model import from_proto
from graphc.opset import WORKING
from graphc.opset.adapters import BoundByCaller, Unconvertible
from graphc.opset.lower import lower
from graphc.opset.upgrade import OLDEST, upgrade
from graphc.storage import container, dtypes, files, wellformed


def load(path: Path) -> Source:
    """Load an ONNX model and bring it to the working opset.

    Args:
        path: An ``.onnx`` file, an artifact folder, or a folder with exactly one ``.onnx`` file.

    Raises:
        BadInput: The model cannot be used; the message says what, where, why and what to do.
    """
    found = locate(path)
    contents = container.read(found)
    proto = contents.proto
    wellformed.check(proto, found)
    inferred = dtypes.infer(proto, found)
    original = from_proto(proto, found)
    result = PassResult()
    _repair(original, result)
    model = _at_working_opset(original, inferred, result)
    return Source(model, original, path, contents.files, result)


def locate(path: Path) -> Path:
    """The ONNX file that a path means.

    Raises:
        BadInput: It is a folder that is neither an artifact nor holds exactly one model.
    """
    if not path.is_dir():
        return path
    if files.is_artifact(path):
        parts = sorted(path.glob("*.onnx"))
        if not (path / "model.onnx").is_file() and parts:
            raise BadInput(
                "the artifact has several graphs",
                where=str(path),
                why=", ".join(p.name for p in parts),
                hint=f"name one: {parts[0]}",
            )
        if not (path / "model.onnx").is_file() and list(path.glob("*.so")):
            raise BadInput(
                "the artifact is compiled: there is no graph in it",
                where=str(path),
                hint="give the model that it was made from",
            )
        if not (path / "model.onnx").is_file():
            raise BadInput(
                "the artifact is incomplete",
                where=str(path),
                why="it has no model.onnx",
                hint="make it again",
            )
        return path / "model.onnx"
    found = sorted(path.glob("*.onnx"))
    if len(found) == 1:
        return found[0]
    if found:
        raise BadInput(
            "the folder holds several models",
            where=str(path),
            why=", ".join(p.name for p in found[:5]),
            hint="name the file",
        )
    raise BadInput(
        "the folder is neither an artifact nor a model folder",
        where=str(path),
        why=f"it has neither {files.MANIFEST} nor an .onnx file",
        hint="give an .onnx file",
    )


def _repair(model: ir.Model, result: PassResult) -> None:
    """What does not change what the model says: node names become unique, constants are no inputs, a lower opset."""
    result.change("node renamed: its name was taken", edit.rename_duplicate_nodes(model))
    if model.ir_version < 4:
        # Before IR version 4 every initializer had to be listed as an input.
        inputs = model.graph.inputs
        listed = [value for value in inputs if value.name in model.graph.initializers]
        for value in listed:
            inputs.remove(value)
        result.change("initializer no longer listed as an input (IR version 3 required it)", len(listed))
    before = model.opset_imports.get("", 1)
    after = lower(model)
    if after != before:
        result.change(f"opset {before} -> {after}: all operators are the same in both")


def _at_working_opset(original: ir.Model, inferred: onnx.ModelProto, result: PassResult) -> ir.Model:
    """A copy of the model at the working opset, or as it was where ``result`` says why."""
    now = original.opset_imports.get("", WORKING)
    if now >= WORKING:
        return original.clone()
    if now < OLDEST:
        result.refuse(original.graph.name or "", f"stays at opset {now}: only opset {OLDEST} and later are converted")
        return original.clone()
    try:
        model = _upgraded(original, inferred)
    except Unconvertible as error:
        result.refuse(error.node, f"stays at opset {now}: {error.node.op_type}: {error.reason}")
        return original.clone()
    result.change(f"opset {now} -> {WORKING}")
    if len(model.functions) < len(original.functions):
        result.change("function inlined", len(original.functions))
    return model


def _upgraded(original: ir.Model, inferred: onnx.ModelProto) -> ir.Model:
    """A copy at the working opset, with functions inlined if the conversion needs it."""
    model = original.clone()
    before = list(_annotate(model.graph, inferred.graph))
    try:
        upgrade(model, WORKING)
    except BoundByCaller:
        from onnx_ir.passes.common import InlinePass

        if any(f.opset_imports.get("") != original.opset_imports.get("") for f in original.functions.values()):
            raise
        model = original.clone()
        InlinePass()(model)
        before = []
        upgrade(model, WORKING)
    for value, dtype, shape in before:
        value.type, value.shape = dtype, shape
    return model


def _annotate(
    graph: ir.Graph, inferred: onnx.GraphProto
) -> Iterator[tuple[ir.Value, ir.TypeProtocol | None, ir.Shape | None]]:
    """Give values the dtypes and shapes that were inferred for them; yield each with what it had before."""
    known = {value.name: value for value in inferred.value_info}
    for node, proto in zip(graph, inferred.node, strict=True):
        for value in node.outputs:
            info = known.get(value.name or "")
            if info is None or (value.type is not None and value.shape is not None):
                continue
            yield value, value.type, value.shape
            if value.type is None:
                value.type = ir.serde.deserialize_type_proto_for_type(info.type)
            if value.shape is None:
                value.shape = ir.serde.deserialize_type_proto_for_shape(info.type)
        bodies = {attr.name: attr.g for attr in proto.attribute if attr.type == onnx.AttributeProto.GRAPH}
        for attr in node.attributes.values():
            if attr.name in bodies:
                yield from _annotate(attr.as_graph(), bodies[attr.name])
