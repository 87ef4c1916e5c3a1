"""Unfolded low-rank adapters: ``y = x W + s (x A) B`` becomes ``y = x (W + s A B)``.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, equation 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.contract import PassResult
from graphc.edit import attribute, is_op
from graphc.lora import regions
from graphc.lora.conditions import Adapter
from graphc.lora.regions import Match
from graphc.lora.sums import adapters_of, is_sum
from graphc.lora.update import Update, updated
from graphc.rewrites.base import Refused, Rewriter


def fold(model: ir.Model, result: PassResult) -> None:
    """Fold every adapter of a model.

    Args:
        model: Changed in place.
        result: Told what was folded, and what looks like an adapter but was not, and why.
    """
    rewriter = Rewriter(model, frozenset())
    _fold_regions(model, rewriter, result)
    found: dict[ir.Value, list[Adapter]] = {}
    for graph in edit.graphs(model):
        inner: set[ir.Node] = set()
        for node in reversed(graph):
            if node not in inner and is_sum(node):
                for adapter in adapters_of(node, inner, rewriter, result):
                    found.setdefault(adapter.base.weight.value, []).append(adapter)
    for value, adapters in found.items():
        try:
            new = _folded(value, adapters)
        except Refused as refusal:
            for adapter in adapters:
                result.refuse(adapter.base.node, refusal.reason)
            continue
        _set(value, new)
        for adapter in adapters:
            _remove(adapter, rewriter)
            result.change(f"adapter folded into {adapter.base.node.op_type}")


def _fold_regions(model: ir.Model, rewriter: Rewriter, result: PassResult) -> None:
    """Fold what is scaled by channel, or has constants and Reshapes in between."""
    for graph in edit.graphs(model):
        reader = regions.Reader(rewriter)
        for node in list(regions.candidates(graph)):
            if node.graph is None:
                continue
            try:
                match = regions.matched(node, reader)
                if match is None:
                    continue
                new = _region_weight(match)
            except edit.BoundByCaller:
                continue
            except Refused as refusal:
                result.refuse(node, refusal.reason)
                continue
            _set(match.base.weight.value, new)
            _replace(node, match, rewriter)
            reader.known.clear()
            result.change(f"adapter folded into {match.base.node.op_type}", len(match.paths))


def _region_weight(match: Match) -> ir.TensorProtocol:
    """The weight of a product with its adapters and its channels' factors."""
    weight = match.base.weight
    assert weight.held is not None
    if weight.value.is_graph_output() or _readers(weight.value) - match.region.computing != {match.base.node}:
        raise Refused("the weight has other readers, which have no such adapter")
    updates = [Update(path, scale, weight.transposed) for path, scale in zip(match.paths, match.scales, strict=True)]
    factor = np.asarray(match.factor, np.float64)
    if factor.ndim:
        factor = factor[:, None] if weight.transposed or match.base.kind == "image" else factor[None]
    return updated(weight.held, updates, weight.value.name or "", factor)


def _replace(root: ir.Node, match: Match, rewriter: Rewriter) -> None:
    """Let the product, with its new weight, take the place of a region."""
    node = match.base.node
    result = node.outputs[0]
    inputs = [value for value in root.inputs if value is not None]
    dtype = match.base.weight.held.dtype.numpy() if match.base.weight.held is not None else np.dtype(np.float32)
    constant = np.broadcast_to(np.asarray(match.constant, np.float64), (match.base.channels[1],)).astype(dtype)
    if node.op_type in ("Gemm", "Conv"):
        bias = rewriter.constant(node, constant, f"{result.name}.bias") if constant.any() else None
        old = node.inputs[2] if len(node.inputs) > 2 else None
        node.resize_inputs(3 if bias is not None else 2)
        if bias is not None:
            node.replace_input_with(2, bias)
        node.attributes.pop("beta", None)
        if old is not None:
            _sweep(old, rewriter)
    last = result
    if match.region.reshapes:
        shape = match.region.reshapes[-1].inputs[1]
        last = rewriter.insert(root, "Reshape", [last, shape], name=rewriter.fresh(f"{result.name}.rows"))
        last.type, last.shape = root.outputs[0].type, root.outputs[0].shape
    if constant.any() and node.op_type not in ("Gemm", "Conv"):
        added = rewriter.constant(root, constant, f"{result.name}.bias")
        rewriter.supersede(root, "Add", [last, added])
    else:
        rewriter.bypass(root, last)
    for value in inputs:
        _sweep(value, rewriter)
    for each in match.region.computing:
        for value in each.outputs:
            _sweep(value, rewriter)


def _readers(value: ir.Value) -> set[ir.Node]:
    """Who reads a constant, through Transpose, Identity and Cast."""
    found = set()
    for use in value.uses():
        seen_through = is_op(use.node, "Transpose", "Identity", "Cast")
        if seen_through and not use.node.outputs[0].is_graph_output():
            found |= _readers(use.node.outputs[0])
        else:
            found.add(use.node)
    return found


def _folded(value: ir.Value, adapters: Sequence[Adapter]) -> ir.TensorProtocol:
    """The tensor of a weight with its adapters.

    Raises:
        Refused: Others read the weight without them, or it overflows.
    """
    by_node: dict[ir.Node, list[Adapter]] = {}
    for adapter in adapters:
        by_node.setdefault(adapter.base.node, []).append(adapter)
    if value.is_graph_output() or _readers(value) != set(by_node):
        raise Refused("the weight has other readers, which have no such adapter")
    keys = {tuple(sorted(map(repr, (a.key for a in group)))) for group in by_node.values()}
    if len(keys) > 1:
        raise Refused("the weight has other readers, which have another adapter")
    first = next(iter(by_node.values()))
    updates = [
        Update(path, scale, adapter.base.weight.transposed)
        for adapter in first
        for path, scale in zip(adapter.paths, adapter.scales, strict=True)
    ]
    held = first[0].base.weight.held
    assert held is not None
    return updated(held, updates, value.name or "")


def _set(value: ir.Value, new: ir.TensorProtocol) -> None:
    """Let a constant hold another tensor."""
    if value.is_initializer():
        value.const_value = new
        return
    node = value.producer()
    assert node is not None
    node.attributes.clear()
    node.attributes["value"] = ir.AttrTensor("value", new)


def _remove(adapter: Adapter, rewriter: Rewriter) -> None:
    """Take a branch out of its sum."""
    term = adapter.term
    gemm = term.product
    if gemm is not None and is_sum(gemm):
        data = gemm.inputs[0]
        assert data is not None
        _keep(gemm, gemm.inputs[2], attribute(gemm, "beta", 1.0), rewriter)
        _sweep(data, rewriter)
        return
    value = term.value
    (node,) = {use.node for use in value.uses()}
    while is_op(node, "Identity"):
        value = node.outputs[0]
        (node,) = {use.node for use in value.uses()}
    index = next(i for i, read in enumerate(node.inputs) if read is value)
    if node.op_type == "Gemm":
        node.replace_input_with(2, None)
        node.resize_inputs(2)
        node.attributes.pop("beta", None)
    elif len(node.inputs) > 2:
        rest = [read for i, read in enumerate(node.inputs) if i != index]
        rewriter.supersede(node, "Sum", rest)
    else:
        _keep(node, node.inputs[1 - index], -1.0 if node.op_type == "Sub" and index == 0 else 1.0, rewriter)
    _sweep(value, rewriter)


def _keep(node: ir.Node, value: ir.Value | None, scale: float, rewriter: Rewriter) -> None:
    """Let a node give ``scale * value`` alone."""
    assert value is not None
    if scale == 1:
        rewriter.bypass(node, value)
    elif scale == -1:
        rewriter.supersede(node, "Neg", [value])
    else:
        dtype = rewriter.dtype(value) or ir.DataType.FLOAT
        factor = rewriter.constant(node, np.asarray(scale, dtype.numpy()), "scale")
        rewriter.supersede(node, "Mul", [value, factor])


def _sweep(value: ir.Value, rewriter: Rewriter) -> None:
    """Remove what computes a value that nobody reads."""
    if value.uses() or value.is_graph_output():
        return
    node = value.producer()
    if node is None or node.op_type == "Constant":
        rewriter.drop_unread(value)
        return
    if node.graph is None or any(v.uses() or v.is_graph_output() for v in node.outputs):
        return
    inputs = {v for v in node.inputs if v is not None}
    edit.remove(node)
    for read in inputs:
        _sweep(read, rewriter)
