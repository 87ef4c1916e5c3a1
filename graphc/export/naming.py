"""Names: parameters as the module calls them, nodes after the module they are in, outputs after the result's keys."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from graphc import edit, shapes
from graphc.errors import BadInput
from graphc.export import dims
from graphc.export.arguments import key_text, plain

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

MODULE = "graphc.module"
"""Metadata key of a node: the path of the module that it is in, as ``named_modules`` has it."""
CLASS = "graphc.class"
"""Metadata key of a node: the class of that module."""
ALIASES = "graphc.aliases"
"""Metadata key of an initializer: the other names of a tied parameter, separated by spaces."""

_DROPPED = ("pkg.torch.", "pkg.onnxscript.")


def aliases(module: torch.nn.Module | ExportedProgram) -> dict[str, list[str]]:
    """All names of every parameter and buffer that has several, by each of them, in the module's order."""
    import torch

    by_tensor: dict[Any, list[str]] = {}
    if isinstance(module, torch.nn.Module):
        named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        for name, held in named:
            by_tensor.setdefault(id(held), []).append(name)
    else:
        for name, held in module.state_dict.items():
            by_tensor.setdefault((held.data_ptr(), held.shape, held.stride(), held.dtype), []).append(name)
    return {name: names for names in by_tensor.values() if len(names) > 1 for name in names}


def initializers(model: ir.Model, tied: Mapping[str, list[str]]) -> None:
    """Call a tied parameter by its first name, and note the others."""
    graph = model.graph
    for name in list(graph.initializers):
        names = tied.get(name)
        if names is None:
            continue
        value = graph.initializers.pop(name)
        if names[0] in graph.initializers:  # traced as two: they are one
            value.replace_all_uses_with(graph.initializers[names[0]])
            continue
        value.name = names[0]
        if value.const_value is not None:
            value.const_value.name = names[0]
        value.metadata_props[ALIASES] = " ".join(names[1:])
        graph.initializers.add(value)


def nodes(model: ir.Model) -> None:
    """Name nodes and their outputs after the module they are in; note its path and class; drop torch's own notes."""
    values = edit.Names(model)
    taken: dict[str, int] = {}
    outputs = {id(v) for graph in edit.graphs(model) for v in graph.outputs}
    for node in edit.nodes(model):
        path, kind = _scope(node)
        stem = f"{path}/{node.op_type}" if path else node.op_type
        number = taken.get(stem, -1) + 1
        taken[stem] = number
        node.name = f"{stem}_{number}" if number else stem
        _clean(node.metadata_props)
        if path or kind:
            node.metadata_props[MODULE], node.metadata_props[CLASS] = path, kind
        for index, value in enumerate(node.outputs):
            _clean(value.metadata_props)
            if id(value) not in outputs and value.name:
                value.name = values.fresh(f"{node.name}:{index}" if index else f"{node.name}")
    for graph in edit.graphs(model):
        _clean(graph.metadata_props)
        for value in (*graph.inputs, *graph.initializers.values()):
            _clean(value.metadata_props)
    _clean(model.metadata_props)


def _scope(node: ir.Node) -> tuple[str, str]:
    """The path and the class of the module that a node is in, as the exporter notes them."""
    paths = _listed(node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
    kinds = _listed(node.metadata_props.get("pkg.torch.onnx.class_hierarchy", ""))
    if len(paths) < 2 or len(kinds) < 2 or paths[0].startswith("_empty_nn_module_stack"):
        return "", ""
    return plain(paths[-2]), kinds[-2]


def _listed(text: str) -> list[str]:
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return []
    return [str(each) for each in found] if isinstance(found, list) else []


def _clean(properties: dict[str, str]) -> None:
    for key in list(properties):
        if key.startswith(_DROPPED) or key == "namespace":
            del properties[key]


def sizes(model: ir.Model, by: Mapping[str, str], inputs: Sequence[Sequence[int | str]]) -> None:
    """Rename the symbols in all shapes; one that stands for a number becomes it.

    Args:
        model: With torch's symbols.
        by: The new names.
        inputs: The sizes of the inputs; where the model declares others, all else that it declares is found anew.
    """
    declared = [tuple(str(size) for size in value.shape or ()) for value in model.graph.inputs]
    if declared != [tuple(map(str, each)) for each in inputs]:
        for value, wanted in zip(model.graph.inputs, inputs, strict=True):
            value.shape = ir.Shape(list(wanted))
        for value in model.graph.outputs:
            value.shape = None
        shapes.infer(model)
    for graph in edit.graphs(model):
        for value in (*graph.inputs, *(v for node in graph for v in node.outputs)):
            if value.shape is None or value.shape.frozen:
                continue
            for axis, size in enumerate(value.shape):
                if isinstance(size, ir.SymbolicDim) and size.value is not None:
                    text = dims.renamed(size.value, by)
                    value.shape[axis] = int(text) if text.isdigit() else ir.SymbolicDim(text)


def interface(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Name the inputs and outputs; an output that is an input, a weight or another output gets an Identity.

    Raises:
        BadInput: The numbers differ, or a name is used twice.
    """
    graph = model.graph
    for kind, names, count in (("input", inputs, len(graph.inputs)), ("output", outputs, len(graph.outputs))):
        if len(names) != count:
            raise BadInput(f"{len(names)} {kind} names for {count} {kind}s", hint=f"name each of the {count}")
    twice = [name for name in (*inputs, *outputs) if [*inputs, *outputs].count(name) > 1]
    if twice:
        raise BadInput(f"the name '{twice[0]}' is given to two inputs or outputs", hint="choose another")
    seen: set[int] = set()
    for index, value in enumerate(graph.outputs):
        if id(value) in seen or value.producer() is None:
            node = ir.node("Identity", [value])
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
            graph.append(node)
            graph.outputs[index] = node.outputs[0]
        seen.add(id(value))
    public = {id(v) for v in (*graph.inputs, *graph.outputs)}
    wanted = set(inputs) | set(outputs)
    for value in (*graph.initializers.values(), *(v for node in edit.nodes(model) for v in node.outputs)):
        if value.name in wanted and id(value) not in public:
            _rename(graph, value, f"{value.name}.inner")
    for value, name in zip((*graph.inputs, *graph.outputs), (*inputs, *outputs), strict=True):
        value.name = name


def _rename(graph: ir.Graph, value: ir.Value, name: str) -> None:
    if value.is_initializer():
        del graph.initializers[value.name or ""]
        value.name = name
        graph.initializers.add(value)
    else:
        value.name = name


def results(tree: Any, kept: Sequence[int]) -> list[str]:
    """Names for what a module returns: keys of dicts, fields of dataclasses, or numbers.

    Args:
        tree: What it returns; its leaves may be anything.
        kept: The numbers of the leaves that became outputs.
    """
    from torch.utils import _pytree as pytree

    paths = [path for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    names: list[str] = []
    for index in kept:
        words = [plain(key_text(key)) for key in paths[index]]
        if any(not word.isdigit() for word in words):
            name = ".".join(words)
        else:
            name = "output" if len(kept) == 1 else "_".join(["output", *words])
        names.append(name if name not in names else f"{name}_{index}")
    return names


def result_of(program: ExportedProgram) -> tuple[Any, list[int]]:
    """The tree that a program returns, with numbers as leaves, and the leaves that are no constants."""
    from torch.utils import _pytree as pytree

    specs = [s for s in program.graph_signature.output_specs if s.kind.name == "USER_OUTPUT"]
    spec = program.call_spec.out_spec
    assert spec is not None
    tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    return tree, [index for index, each in enumerate(specs) if type(each.arg).__name__ != "ConstantArgument"]


def inputs(program: ExportedProgram) -> list[str]:
    """The names that torch gave the tensors of the arguments, in their order."""
    signature = program.graph_signature
    return [
        spec.arg.name
        for spec in signature.input_specs
        if spec.kind.name == "USER_INPUT" and type(spec.arg).__name__ != "ConstantArgument"
    ]
