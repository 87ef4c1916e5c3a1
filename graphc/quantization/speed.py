"""How fast a way of quantizing is on this machine: a model's own largest product and convolution, timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphc import edit, shapes
from graphc.contract import Context, Pass, Probe
from graphc.errors import BadInput
from graphc.quantization.allocation import Way
from graphc.quantization.sites import Site

ROWS = (1, 64)
"""Rows that products are timed with: a token, and a prompt."""

SAME = 1.0
"""The ratio of times above which there is nothing to be won."""

SMALL = 1 << 18
"""Multiplications below which an operator is too short to matter, and to be timed."""

LARGEST = 1 << 22
"""Elements of a weight up to which it is timed; a part of a larger one says as much and takes less memory."""


def caveats(model: ir.Model, each: Pass, ctx: Context) -> Iterator[str]:
    """Sentences on products and convolutions that a way of quantizing does not make faster.

    Args:
        model: The model; of its largest product and its largest convolution, the sizes are timed.
        each: The pass that quantizes, without what does not change the speed.
        ctx: What times probes, and the target.
    """
    probes = {}
    for label, before, sample in (*_products(model), *_convolutions(model)):
        made = before.clone()
        if not each.run(made, _calibrated(ctx, sample)).changed:
            continue
        probes[label] = _probe(each, label, before, made, sample, ctx)
    assert ctx.time is not None
    ratios = ctx.time(list(probes.values()))
    slow = {label: ratio for label, probe in probes.items() if (ratio := ratios.get(probe.signature, 0)) > SAME}
    if slow:
        times = " and ".join(f"{label} takes {ratio:.2f}x of float32's time" for label, ratio in slow.items())
        yield f"{times}, as measured here: smaller, but not faster"


def costs(
    found: Sequence[Site],
    choices: Sequence[Sequence[Way | None]],
    quantize: Callable[[int], Pass],
    rows: int,
    ctx: Context,
) -> list[list[float]]:
    """What each way to quantize each layer takes of float32's time, by the elements of the layer.

    Args:
        found: The layers, matrices.
        choices: The ways of each; None is float32.
        quantize: The pass that quantizes with some bits.
        rows: Rows of the activation.
        ctx: What times probes, and the target.

    Raises:
        BadInput: Nothing can be timed here.
    """
    if ctx.time is None:
        raise BadInput("nothing can be timed here", where="quantize{time}", hint="budget, or megabytes")
    probes: dict[tuple[int, int, int], Probe] = {}
    for site, row in zip(found, choices, strict=True):
        for way in row:
            key = (site.depth, site.held.size // site.depth, way[0].bits if way else 0)
            if way is None or key in probes:
                continue
            label, before, sample = _product(*key[:2], rows)
            made, each = before.clone(), quantize(way[0].bits)
            if each.run(made, _calibrated(ctx, sample)).changed:
                probes[key] = _probe(each, label, before, made, sample, ctx)
    ratios = ctx.time(list(probes.values()))
    # One that could not be timed is taken to win nothing.
    known = {key: ratios.get(probe.signature, 1.0) for key, probe in probes.items()}
    return [
        [
            site.held.size * (known.get((site.depth, site.held.size // site.depth, way[0].bits), 1.0) if way else 1.0)
            for way in row
        ]
        for site, row in zip(found, choices, strict=True)
    ]


def _probe(
    each: Pass, label: str, before: ir.Model, after: ir.Model, sample: dict[str, edit.Array], ctx: Context
) -> Probe:
    provider = ctx.target.providers[0] if ctx.target.providers else "CPUExecutionProvider"
    return Probe(f"{each.spec()}: {label} {provider}", before, after, sample)


def _calibrated(ctx: Context, sample: dict[str, edit.Array]) -> Context:
    from graphc.collection import Collector

    return dataclasses.replace(ctx, collect=Collector([sample], []).collect, calibration=[sample], time=None)


_Case = tuple[str, ir.Model, dict[str, edit.Array]]
"""What it is in words, a model of one operator, its inputs."""


def _products(model: ir.Model) -> Iterator[_Case]:
    found = []
    for node in edit.nodes(model):
        held = edit.tensor(node.inputs[1]) if edit.is_op(node, "MatMul", "Gemm") else None
        if held is not None and len(held.shape) == 2 and held.dtype == ir.DataType.FLOAT:
            turned = edit.is_op(node, "Gemm") and edit.attribute(node, "transB", 0)
            found.append(tuple(held.shape.numpy())[:: -1 if turned else 1])
    if not found:
        return
    # Of the sizes that most weights have: an unusual one says little.
    depth, width = max(sorted(set(found)), key=lambda size: found.count(size) * size[0] * size[1])
    while depth * width > LARGEST:
        depth, width = (depth // 2, width) if depth > width else (depth, width // 2)
    for rows in ROWS:
        if rows * depth * width < SMALL:
            continue
        yield _product(depth, width, rows)


def _product(depth: int, width: int, rows: int) -> _Case:
    weight = np.random.default_rng(0).standard_normal((depth, width), np.float32)
    label = f"a product of {rows} row{'s' * (rows > 1)} with {depth} x {width}"
    return _case(label, "MatMul", (1, rows, depth), weight, {})


def _convolutions(model: ir.Model) -> Iterator[_Case]:
    found: list[tuple[float, ir.Node, tuple[int, ...]]] = []
    facts = shapes.Facts(model)
    facts.visit_graph(model.graph)
    for node in model.graph:
        held = edit.tensor(node.inputs[1]) if edit.is_op(node, "Conv") else None
        dims = facts(node.inputs[0]).shape if held is not None else None
        if held is None or not dims or len(dims) != 4 or held.dtype != ir.DataType.FLOAT or held.size > LARGEST:
            continue
        sizes = tuple(dim if isinstance(dim, int) else 0 for dim in dims)
        if held.size * sizes[2] * sizes[3] >= SMALL:
            found.append((held.size * sizes[2] * sizes[3], node, (1, *sizes[1:])))
    if not found:
        return
    _, node, sizes = max(found, key=lambda entry: entry[0])
    held = edit.tensor(node.inputs[1])
    assert held is not None
    kernel = tuple(held.shape.numpy())
    weight = np.random.default_rng(0).standard_normal(kernel, np.float32)
    label = f"a convolution of {' x '.join(map(str, sizes[1:]))} with {' x '.join(map(str, kernel))}"
    yield _case(label, "Conv", sizes, weight, node.attributes)


def _case(
    label: str,
    operator: str,
    sizes: Sequence[int],
    weight: edit.Array,
    attributes: Mapping[str, ir.Attr],
) -> _Case:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(sizes))
    w = ir.Value(
        name="w",
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape(weight.shape),
        const_value=ir.tensor(weight, name="w"),
    )
    node = ir.node(operator, [x, w], dict(attributes), name="product")
    y = node.outputs[0]
    y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [y], nodes=[node], initializers=[w], opset_imports={"": 21}, name="probe")
    sample = np.random.default_rng(1).standard_normal(tuple(sizes), np.float32)
    return label, ir.Model(graph, ir_version=10), {"x": sample}
