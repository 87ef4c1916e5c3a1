"""Adapters kept beside the model, to be switched when it runs: ONNX Runtime's ``.onnx_adapter`` files.

Each adapted layer gets a branch ``(x A) B`` whose A and B are inputs of the graph with defaults of rank 0. Without an
adapter the branch adds nothing; an adapter that is activated for a run gives those inputs their values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.adapters.changes import LowRank
from graphc.adapters.places import Placed, Wish, place
from graphc.adapters.sites import Use, uses
from graphc.adapters.targets import Target
from graphc.edit import Array, attribute
from graphc.environment import to_install
from graphc.errors import BadInput
from graphc.rewrites.base import Rewriter

VERSION = 1
"""Of adapters and models, as ONNX Runtime's format wants to have it."""


@dataclass
class Attached:
    """What was attached.

    Attributes:
        layers: How many layers of each operator have a branch.
        parameters: The values of the new inputs, by file (without its extension) and name.
    """

    layers: Counter[str] = field(default_factory=Counter)
    parameters: dict[str, dict[str, Array]] = field(default_factory=dict)

    def changes(self) -> list[str]:
        """For the report."""
        made = [f"{operator} made switchable (×{n})" for operator, n in self.layers.items()]
        return [*made, *(f"adapter {name}.onnx_adapter written" for name in self.parameters)]

    def files(self) -> dict[str, Callable[[Path], None]]:
        """Writers of the adapters, by file name."""
        return {f"{name}.onnx_adapter": partial(write, found) for name, found in self.parameters.items()}


def write(parameters: dict[str, Array], path: Path) -> None:
    """Write an adapter file.

    Args:
        parameters: Arrays by the names of the inputs that they are for.
        path: Where to.

    Raises:
        BadInput: ONNX Runtime is not installed, or too old.
    """
    try:
        import onnxruntime as ort

        adapter = ort.AdapterFormat()
    except (ImportError, AttributeError):
        raise BadInput(
            "only ONNX Runtime 1.20 and later write adapters", hint=f"{to_install('cpu')}, or fold the adapter"
        ) from None
    adapter.set_adapter_version(VERSION)
    adapter.set_model_version(VERSION)
    held = {name: np.ascontiguousarray(array) for name, array in sorted(parameters.items())}
    adapter.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in held.items()})
    adapter.export_adapter(str(path))


def attach(models: Mapping[str, ir.Model], targets: Sequence[Target]) -> Attached:
    """Give the graphs of a model, in place, a switchable branch for each layer that some adapter adapts.

    ONNX Runtime takes an adapter only if the graph has all of its inputs. Where graphs differ in their layers, each
    gets a file of its own of each adapter, ``ADAPTER.GRAPH.onnx_adapter``.

    Args:
        models: By the names of the graphs.
        targets: What the adapters want.

    Raises:
        BadInput: An adapter is more than a low-rank update, or does not fit; it names the module.
    """
    by_name: dict[str, list[Target]] = {}
    for target in targets:
        if not isinstance(target.change, LowRank) or target.kind not in ("linear", "table", "image"):
            raise target.folder.bad(
                "the adapter cannot be switched at run time",
                f"'{target.name}' has {target.change.what}",
                "fold it: --adapter-mode fold",
            )
        by_name.setdefault(target.name, []).append(target)
    names = _distinct(targets)
    wishes = [Wish(tuple(own), tuple((t.folder.weight, t.change) for t in own)) for own in by_name.values()]
    attached = Attached()
    found = place(list(models.values()), wishes)
    alike = len({frozenset(each.name for each in placed) for placed in found}) == 1
    for (part, model), placed in zip(models.items(), found, strict=True):
        files = names if alike else {key: f"{name}.{part}" for key, name in names.items()}
        rewriter = Rewriter(model, frozenset())
        for each in placed:
            _attach(each, files, rewriter, attached)
    return attached


def _distinct(targets: Sequence[Target]) -> dict[int, str]:
    """A name for each adapter, by the identity of its folder."""
    names: dict[int, str] = {}
    for target in targets:
        if id(target.folder) not in names:
            name, n = target.folder.name, 1
            while name in names.values():
                n += 1
                name = f"{target.folder.name}_{n}"
            names[id(target.folder)] = name
    return names


def _attach(placed: Placed, files: Mapping[int, str], rewriter: Rewriter, attached: Attached) -> None:
    site = placed.site
    own = site.uses if site.uses is not None else tuple(uses(site.value))
    ends = [use for use in own if use.product is not None and use.kind != "other"]
    folder = placed.targets[0].folder
    if not ends or len(ends) < len(own):
        raise folder.bad(
            f"the adapter of '{placed.name}' cannot be switched at run time",
            "its weight is read by something else than a product",
            "fold it: --adapter-mode fold",
        )
    kind = placed.targets[0].kind
    stem = placed.name.removesuffix(".weight").removesuffix(".in_proj_weight")
    arrays = {id(t.folder): _factors(t, site.start, site.stop, site.shape, ends[0]) for t in placed.targets}
    a, b = next(iter(arrays.values()))
    dtype = _dtype(ends[0], rewriter)
    rank = 1 if kind == "image" else 0  # a convolution to no channels does not run
    rank_axis = {"table": (1, 0), "linear": (1, 0), "image": (0, 1)}[kind]
    inputs = [
        _input(rewriter.model.graph, rewriter.fresh(f"{stem}.lora_{letter}"), array.shape, axis, rank, dtype)
        for letter, array, axis in (("A", a, rank_axis[0]), ("B", b, rank_axis[1]))
    ]
    for target in placed.targets:
        made = attached.parameters.setdefault(files[id(target.folder)], {})
        for value, array in zip(inputs, arrays[id(target.folder)], strict=True):
            assert value.name is not None
            made[value.name] = array.astype(dtype.numpy())
    for use in ends:
        assert use.product is not None
        if use.product.graph is not rewriter.model.graph:
            raise folder.bad(
                f"the adapter of '{placed.name}' cannot be switched at run time", "its layer is inside a subgraph"
            )
        _branch(use.product, inputs, rewriter)
        attached.layers[use.product.op_type] += 1


def _dtype(use: Use, rewriter: Rewriter) -> ir.DataType:
    """What the layer computes in."""
    assert use.product is not None
    dtype = rewriter.dtype(use.product.outputs[0])
    return dtype if dtype is not None else ir.DataType.FLOAT


def _factors(target: Target, start: int, stop: int, shape: tuple[int, int], use: Use) -> tuple[Array, Array]:
    """A and B as the branch multiplies with them; the scale and the adapter's weight are in B."""
    change = target.change
    assert isinstance(change, LowRank)
    scale = change.scale * target.folder.weight
    left = scale * change.left.astype(np.float64)
    if target.kind == "table":
        return left, np.asarray(change.right)
    if (start, stop) != (0, shape[0]):  # a part of a merged weight
        left = np.pad(left, ((start, shape[0] - stop), (0, 0)))
    if target.kind == "linear":
        return change.right.T, left.T
    assert use.product is not None
    weight = edit.tensor(use.product.inputs[1])
    kernel = tuple(weight.shape)[2:] if weight is not None else ()
    return change.right.reshape(change.rank, -1, *kernel), left.reshape(*left.shape, *(1,) * len(kernel))


def _input(graph: ir.Graph, name: str, shape: tuple[int, ...], axis: int, rank: int, dtype: ir.DataType) -> ir.Value:
    """A new input with zeros of rank ``rank`` as its default."""
    held = list(shape)
    held[axis] = rank
    default = ir.tensor(np.zeros(held, dtype.numpy()), name=name)
    dims: list[int | str] = list(shape)
    dims[axis] = f"{name.rpartition('.lora_')[0]}.rank"
    value = edit.initializer(graph, default, name)
    value.shape = ir.Shape(dims)
    graph.inputs.append(value)
    return value


def _branch(node: ir.Node, inputs: Sequence[ir.Value], rewriter: Rewriter) -> None:
    """Add ``(x A) B`` to what a layer computes."""
    a, b = inputs
    result = node.outputs[0]
    stem = rewriter.fresh(f"{result.name}.lora")
    readers = [(use.node, use.idx) for use in result.uses()]

    def made(op_type: str, values: Sequence[ir.Value], attributes: dict[str, object] | None = None) -> ir.Node:
        new = ir.node(op_type, list(values), attributes or {}, name=rewriter.fresh(stem))
        new.outputs[0].name = rewriter.fresh(f"{stem}.{op_type.lower()}")
        return new

    match node.op_type:
        case "Gather":
            first = made("Gather", (a, node.inputs[1]))  # type: ignore[arg-type]
            second = made("MatMul", (first.outputs[0], b))
        case "Conv":
            window = {k: v.value for k, v in node.attributes.items() if k not in ("kernel_shape", "group")}
            first = made("Conv", (node.inputs[0], a), window)  # type: ignore[arg-type]
            second = made("Conv", (first.outputs[0], b))
        case _:
            data = node.inputs[0]
            assert data is not None
            before: list[ir.Node] = []
            if node.op_type == "Gemm" and attribute(node, "transA", 0):
                before = [made("Transpose", (data,), {"perm": [1, 0]})]
                data = before[0].outputs[0]
            first = made("MatMul", (data, a))
            second = made("MatMul", (first.outputs[0], b))
            node.append([*before, first, second])
    if node.op_type in ("Gather", "Conv"):
        node.append([first, second])
    total = made("Add", (result, second.outputs[0]))
    second.append(total)
    for new in (first, second):
        new.outputs[0].type = result.type
    total.outputs[0].type, total.outputs[0].shape = result.type, result.shape
    if result.is_graph_output():
        name = result.name
        edit.replace(result, total.outputs[0])
        total.replace_input_with(0, result)
        result.name = rewriter.fresh(f"{name}.base")
        total.outputs[0].name = name
    else:
        for reader, index in readers:
            reader.replace_input_with(index, total.outputs[0])
