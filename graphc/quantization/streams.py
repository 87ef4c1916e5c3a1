"""Channels that may be scaled: between the products that make them and those that read them, nothing mixes them.

A positive factor for each channel goes through Relu, pooling, sums and the like unchanged, so that it can be put on the
rows of the weights that make the channels and taken from the columns of those that read them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.axes import cut
from graphc.contraction import Contraction
from graphc.edit import Array, is_op
from graphc.quantization.sites import Site
from graphc.quantization.store import plain_gemm
from graphc.sparsity.layers import Layer

LINEAR = ("Add", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Identity", "MaxPool", "Sub", "Sum")
"""Operators that a positive factor goes through."""

HALVES = ("LeakyRelu", "Relu")
"""Those that treat the two signs apart."""

SUMS = ("Add", "Sub", "Sum")


@dataclass
class Stream:
    """Values whose channels can only be scaled together.

    Attributes:
        channels: How many there are.
        image: Whether they are the second axis, as of convolutions; else the last.
        values: The values.
        makers: Products whose outputs the channels are.
        readers: Products whose inputs they are.
        vectors: Constants, one number a channel, that are added on the way, each with the node that adds it.
    """

    channels: int
    image: bool
    values: list[ir.Value] = field(default_factory=list)
    makers: list[Contraction] = field(default_factory=list)
    readers: list[Contraction] = field(default_factory=list)
    vectors: list[tuple[ir.Node, ir.Value]] = field(default_factory=list)


def find(sites: Sequence[Site]) -> list[Stream]:
    """The streams between some products; shapes must have been inferred.

    Args:
        sites: The weights of the products; those that are read twice make and read no stream.
    """
    products: dict[ir.Node, Contraction] = {}
    for site in sites:
        if site.calibrated and len(site.value.uses()) == 1 and _plain(site.uses[0], site.value):
            products[site.uses[0].node] = site.uses[0]
    found, seen = [], set[ir.Value]()
    for node, use in products.items():
        out = node.outputs[0]
        if out in seen:
            continue
        image = is_op(node, "Conv")
        outputs = use.shape[0] if image else math.prod(use.shape) // use.shape[use.axis]
        stream = Stream(outputs, image)
        if _grow(stream, out, products) and stream.readers:
            found.append(stream)
        seen.update(stream.values)
    return found


def _plain(use: Contraction, weight: ir.Value) -> bool:
    node = use.node
    if node.inputs[1] is not weight:
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    held = edit.tensor(bias)
    if bias is not None and (held is None or len(held.shape) != 1):
        return False
    return is_op(node, "Conv") or (len(use.shape) == 2 and (is_op(node, "MatMul") or plain_gemm(node)))


def _grow(stream: Stream, start: ir.Value, products: dict[ir.Node, Contraction]) -> bool:
    """Follow a stream to its ends; false if something takes part that does not let a factor through."""
    waiting, nodes = [start], set[ir.Node]()
    while waiting:
        value = waiting.pop()
        if value in stream.values:
            continue
        stream.values.append(value)
        maker = value.producer()
        if maker is None or value.is_graph_output() or not _fits(stream, value):
            return False
        if maker in products:
            if is_op(maker, "Conv") != stream.image:
                return False
            stream.makers.append(products[maker])
        elif not _through(maker, stream, nodes):
            return False
        else:
            waiting += _data(maker)
        for use in value.uses():
            if use.node in products and use.idx == 0 and is_op(use.node, "Conv") == stream.image:
                stream.readers.append(products[use.node])
            elif use.node in products or not _through(use.node, stream, nodes):
                return False
            else:
                waiting += [*use.node.outputs, *_data(use.node)]
    return True


def _fits(stream: Stream, value: ir.Value) -> bool:
    """Whether a value has the stream's channels; one that is broadcast does not."""
    shape = value.shape
    if shape is None or len(shape) < 2:
        return False
    return shape[1 if stream.image else -1] == stream.channels


def _data(node: ir.Node) -> list[ir.Value]:
    """The operands of a node that are in the stream."""
    operands = node.inputs if is_op(node, *SUMS) else node.inputs[:1]
    return [v for v in operands if v is not None and edit.tensor(v) is None]


def _through(node: ir.Node, stream: Stream, nodes: set[ir.Node]) -> bool:
    """Whether a factor goes through a node; what has to be scaled with it is noted."""
    if node in nodes:
        return True
    if len(node.outputs) != 1 or not is_op(node, *LINEAR, *HALVES, "Clip"):
        return False
    nodes.add(node)
    if is_op(node, "Clip"):
        # What a factor made of a channel could meet a limit from above that the channel itself does not.
        low = edit.scalar(node.inputs[1]) if len(node.inputs) > 1 else None
        if low != 0 or (len(node.inputs) > 2 and node.inputs[2] is not None):
            return False
    if is_op(node, *SUMS):
        rank = len(node.outputs[0].shape or ())
        for value in node.inputs:
            held = edit.tensor(value)
            if held is None or value is None:
                continue
            # The axis of the channels, counted from the end; constants are aligned there.
            axis = rank - 1 if stream.image else 1
            sizes = list(held.shape.numpy())
            if len(sizes) < axis or sizes[-axis] != stream.channels or held.size != stream.channels:
                return False
            stream.vectors.append((node, value))
    return True


def scale(stream: Stream, factors: Array, names: edit.Names) -> None:
    """Multiply each channel of a stream by a factor, ``(channels,)``; what its readers make stays the same."""
    for use in stream.makers:
        _rows(use, factors, names)
    for node, value in stream.vectors:
        held = edit.tensor(value)
        assert held is not None
        array = (held.numpy().astype(np.float64) * factors.reshape(held.shape.numpy())).astype(held.dtype.numpy())
        cut.write(value, ir.Tensor(array, dtype=held.dtype, name=held.name), reader=node, names=names)
    for use in stream.readers:
        held = edit.tensor(use.weight)
        assert held is not None
        matrices = use.matrices(np.asarray(held.numpy(), dtype=np.float64))
        groups, outputs, columns = matrices.shape
        divided = matrices.reshape(groups, outputs, -1, use.window) / factors.reshape(groups, 1, -1, 1)
        _write(use, divided.reshape(groups, outputs, columns))


def _rows(use: Contraction, factors: Array, names: edit.Names) -> None:
    held = edit.tensor(use.weight)
    assert held is not None
    matrices = use.matrices(np.asarray(held.numpy(), dtype=np.float64))
    _write(use, matrices * factors.reshape(matrices.shape[0], matrices.shape[1], 1))
    bias = use.node.inputs[2] if len(use.node.inputs) > 2 else None
    held = edit.tensor(bias)
    if bias is not None and held is not None:
        array = (held.numpy().astype(np.float64) * factors).astype(held.dtype.numpy())
        cut.write(bias, ir.Tensor(array, dtype=held.dtype, name=held.name), reader=use.node, names=names)


def _write(use: Contraction, matrices: Array) -> None:
    layer = Layer(use.weight, (use,), matrices.shape[0], (matrices.shape[1], matrices.shape[2]))
    cut.write(use.weight, layer.tensor(matrices.astype(np.float32)))
