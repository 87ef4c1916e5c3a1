"""The weights that can become two, and how that is written."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.contract import PassResult
from graphc.contraction import Contraction
from graphc.edit import Array, attribute
from graphc.factorisation.spectrum import Spectrum
from graphc.sparsity import layers
from graphc.stats import CountsOf, GradientsOf, Request

CONTRACTIONS = ("MatMul", "Gemm", "Conv")
KINDS = (*CONTRACTIONS, "Gather")
"""The operators whose weights are looked at; Gather reads embeddings."""

_KERNEL = ("auto_pad", "dilations", "kernel_shape", "pads", "strides")

SCRATCH = 1 << 20
"""Bytes from which factors wait in a scratch file and not in memory."""


@dataclass(frozen=True)
class Site:
    """A weight ``W`` of shape ``(outputs, columns)`` that multiplies columns of inputs.

    A table of embeddings is one whose inputs are unit vectors: row ``i`` of the table is column ``i`` of ``W``.

    Attributes:
        value: The weight.
        uses: The contractions that read it; none for a table.
        picks: The Gathers that read it.
        shape: Outputs and columns.
    """

    value: ir.Value
    uses: tuple[Contraction, ...]
    picks: tuple[ir.Node, ...]
    shape: tuple[int, int]

    @property
    def name(self) -> str:
        return self.value.name or ""

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def matrix(self) -> Array:
        """``W``, float32 or wider."""
        held = edit.tensor(self.value)
        assert held is not None
        array = held.numpy()
        wide = array if array.dtype == np.float64 else array.astype(np.float32)
        del array
        edit.release(held)
        return self._read(wide)

    def requests(self, whitening: str) -> list[Request[Any]]:
        """The statistics that say which inputs it sees."""
        match whitening:
            case "fisher":
                return [GradientsOf(self.name)]
            case "inputs" | "gram":
                if self.picks:
                    return [CountsOf(_name(node.inputs[1]), self.shape[1]) for node in self.picks]
                return [use.gram if whitening == "gram" else use.patches for use in self.uses]
        return []

    def inputs(self, whitening: str, alpha: float, statistics: Mapping[Any, Any]) -> Array | None:
        """``H`` of :func:`graphc.factorisation.spectrum.spectrum`.

        - inputs: ``diag((E|x|)^(2 alpha))`` (ASVD, Yuan et al. 2023); of a table, how often each row is read;
        - fisher: the diagonal ``sum over outputs of E[g^2]`` (FWSVD, Hsu et al. 2022);
        - gram: ``E[x x^T]`` (SVD-LLM, Wang et al. 2024); of a table it is diagonal, and the same as for inputs.

        A row that was never read counts as one read half a time.
        """
        if whitening == "none":
            return None
        found = [statistics[request] for request in self.requests(whitening)]
        if whitening == "fisher":
            return np.asarray(self._read(found[0].squares).sum(axis=0), dtype=np.float64)
        if self.picks:
            return np.asarray(np.maximum(sum(each.rows for each in found), 0.5))
        if whitening == "gram":
            return np.asarray(sum(each.products for each in found))
        count = sum(float(each.count) for each in found)
        return np.asarray((sum(each.absolute for each in found) / max(count, 1.0)) ** (2 * alpha))

    def write(self, factors: Spectrum, rank: int, names: edit.Names) -> None:
        """Let two weights take the place of one."""
        graph = self.value.graph
        held = edit.tensor(self.value)
        assert graph is not None and held is not None
        dtype = held.dtype.numpy()
        # Each rank has its size half in one factor and half in the other: neither is hard to round.
        balance = (factors.energy[:rank] / max(factors.energy[0], np.finfo(np.float64).tiny)) ** 0.25
        first = (factors.right[:rank] / balance[:, None]).astype(dtype)
        second = (factors.left[:, :rank] * balance).astype(dtype)
        reads = self.uses[0] if self.uses else None
        if reads is None:
            first, second = first.T, second.T
        elif reads.node.op_type == "Conv":
            first = first.reshape(rank, *reads.shape[1:])
            second = second.reshape(*second.shape, *(1,) * reads.parts[3])
        else:
            first = first.T if _last(reads) else first
            second = second if reads.order == (0, 1) else second.T
        a, b = (
            edit.initializer(graph, np.ascontiguousarray(array), names.fresh(f"{self.name}.{which}"))
            for which, array in (("a", first), ("b", second))
        )
        for use in self.uses:
            _split(use, a, b, rank, names)
        for node in self.picks:
            _split_pick(node, a, b, rank, names)
        edit.drop_unused(self.value)

    def _read(self, array: Array) -> Array:
        return array.T if self.picks else self.uses[0].matrices(array)[0]


def find(
    model: ir.Model, kinds: Sequence[str], include: Sequence[str], exclude: Sequence[str], result: PassResult
) -> list[Site]:
    """The weights that options name, in the order in which they are first read.

    Args:
        model: The model.
        kinds: Operators, of :data:`KINDS`.
        include: Patterns of weight or node names; all if empty.
        exclude: Patterns of those that stay.
        result: What cannot become two is refused here.

    Raises:
        BadInput: A pattern names nothing.
    """
    found = _tables(model, result) if "Gather" in kinds else []
    for layer in layers.find(model, [k for k in kinds if k in CONTRACTIONS], (), (), result, "factorise"):
        found.append(Site(layer.value, layer.uses, (), layer.shape))
    place = {node: i for i, node in enumerate(model.graph)}
    found.sort(key=lambda site: min(place[node] for node in _nodes(site)))
    known = {name for site in found for name in _names(site)}
    chosen = layers.chooser(include, exclude, known, "factorise")
    kept = []
    for site in found:
        if not chosen(_names(site)):
            continue
        why = _why_not(site)
        if why:
            result.refuse(site.name, why)
        else:
            kept.append(site)
    return kept


def kept(factors: Spectrum) -> Spectrum:
    """Factors that wait in a scratch file if they are large."""
    return Spectrum(_scratch(factors.left), _scratch(factors.right), factors.energy, factors.total)


def _scratch(array: Array) -> Array:
    array = array.astype(np.float32)
    if array.nbytes < SCRATCH:
        return array
    with tempfile.TemporaryFile() as file:
        waiting = np.memmap(file, dtype=array.dtype, mode="w+", shape=array.shape)
    waiting[...] = array
    return waiting


def _tables(model: ir.Model, result: PassResult) -> list[Site]:
    """Large constants of two axes whose rows Gathers read, and nothing else."""
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph:
        value = node.inputs[0] if edit.is_op(node, "Gather") else None
        held = edit.tensor(value)
        if value is None or held is None or not held.dtype.is_floating_point():
            continue
        if len(held.shape) == 2 and held.size > edit.SMALL and attribute(node, "axis", 0) in (0, -2):
            readers.setdefault(value, []).append(node)
    tables = []
    for value, nodes in readers.items():
        if {use.node for use in value.uses()} != set(nodes) or value.is_graph_output():
            result.refuse(value.name or "", "a table of embeddings that other operators read, too")
            continue
        held = edit.tensor(value)
        assert held is not None
        rows, width = held.shape.numpy()
        tables.append(Site(value, (), tuple(nodes), (width, rows)))
    return tables


def _nodes(site: Site) -> list[ir.Node]:
    return [*(use.node for use in site.uses), *site.picks]


def _names(site: Site) -> set[str]:
    return {site.name, *(node.name or "" for node in _nodes(site))}


def _why_not(site: Site) -> str:
    if not site.value.is_initializer():
        return "the weight is a Constant node: run 'simplify' before"
    if min(site.shape) < 2:
        return "the weight is a vector"
    if not site.uses:
        return ""
    first = site.uses[0]
    if first.grouped > 1:
        return "the convolution is grouped"
    if sum(first.parts[:3]) != 2:
        return "the weight is a stack of matrices"
    if len({_last(use) for use in site.uses}) > 1:
        return "operators multiply with it from both sides"
    if any(list(use.node.inputs).count(site.value) > 1 for use in site.uses):
        return "an operator reads it twice"
    return ""


def _split(use: Contraction, a: ir.Value, b: ir.Value, rank: int, names: edit.Names) -> None:
    """Put the product with the first factor before a contraction, which then reads its result and the second."""
    node = use.node
    weight = next(i for i, value in enumerate(node.inputs) if value is use.weight)
    # Not what the contraction says: a table before it may have got a new output.
    old = node.inputs[1 - weight]
    assert node.graph is not None and old is not None
    sizes = None if old.shape is None else list(old.shape)
    if node.op_type == "Conv":
        # The kernel is the first factor's; what stays is a convolution of single positions.
        moved = [node.attributes.pop(name) for name in _KERNEL if name in node.attributes]
        node.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", [1] * use.parts[3])
        first = ir.Node("", "Conv", [old, a], attributes=moved)
        out = node.outputs[0].shape
        sizes = None if out is None else [out[0], rank, *out[2:]]
    else:
        first = ir.Node("", "MatMul", [old, a] if _last(use) else [a, old])
        if sizes is not None:
            sizes[use.rows.axis] = rank
    first.name = names.fresh(f"{node.name}.a")
    made = first.outputs[0]
    made.name, made.type = names.fresh(f"{node.outputs[0].name}.a"), old.type
    made.shape = None if sizes is None else ir.Shape(sizes)
    node.graph.insert_before(node, first)
    node.replace_input_with(1 - weight, made)
    node.replace_input_with(weight, b)


def _split_pick(node: ir.Node, a: ir.Value, b: ir.Value, rank: int, names: edit.Names) -> None:
    """Put the product with the second factor behind a Gather, which then reads the first."""
    output = node.outputs[0]
    assert node.graph is not None
    product = ir.Node("", "MatMul", [output, b], name=names.fresh(f"{node.name}.b"))
    made = product.outputs[0]
    made.name, made.type, made.shape = names.fresh(f"{output.name}.b"), output.type, output.shape
    node.graph.insert_after(node, product)
    edit.replace(output, made)
    product.replace_input_with(0, output)
    node.replace_input_with(0, a)
    output.shape = None if output.shape is None else ir.Shape([*list(output.shape)[:-1], rank])


def _last(use: Contraction) -> bool:
    """Whether the channels are the activation's last axis, which a matrix on the right of it contracts."""
    return use.rows.axis == -1 or (use.node.op_type == "Gemm" and use.rows.axis == 1)


def _name(value: ir.Value | None) -> str:
    assert value is not None
    return value.name or ""
