"""The weights that can be made sparse, each with all the operators that contract with it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import onnx_ir as ir

from graphc import contraction, edit
from graphc.axes import cut
from graphc.contract import PassResult
from graphc.contraction import Contraction
from graphc.edit import Array
from graphc.errors import BadInput, nearest

SCRATCH = 1 << 20
"""Bytes from which a new weight is kept in a scratch file and not in memory."""


@dataclass(frozen=True)
class Layer:
    """A constant weight.

    Attributes:
        value: The weight.
        uses: The contractions that read it; all read it alike.
        group: How many matrices it holds.
        shape: Outputs and columns of each.
    """

    value: ir.Value
    uses: tuple[Contraction, ...]
    group: int
    shape: tuple[int, int]

    @property
    def name(self) -> str:
        return self.value.name or ""

    @property
    def held(self) -> ir.TensorProtocol:
        held = edit.tensor(self.value)
        assert held is not None
        return held

    @property
    def size(self) -> int:
        return self.held.size

    @property
    def kernel(self) -> int:
        """Kernel elements of a convolution, else 1."""
        return self.uses[0].window

    def matrices(self) -> Array:
        """``(groups, outputs, columns)``, float32 or wider."""
        array = self.held.numpy()
        wide = array if array.dtype == np.float64 else array.astype(np.float32)
        del array
        edit.release(self.held)
        return self.uses[0].matrices(wide)

    def write(self, tensor: ir.TensorProtocol) -> None:
        """Let the weight hold another tensor."""
        cut.write(self.value, tensor)

    def tensor(self, matrices: Array) -> ir.TensorProtocol:
        """Matrices as a tensor in the weight's own shape and dtype; large ones lie in a scratch file."""
        held = self.held
        array = self.uses[0].restored(matrices).astype(held.dtype.numpy())
        if array.nbytes >= SCRATCH:
            with tempfile.TemporaryFile() as file:
                kept = np.memmap(file, dtype=array.dtype, mode="w+", shape=array.shape)
            kept[...] = array
            array = kept
        return ir.Tensor(array, dtype=held.dtype, name=held.name)


def find(
    model: ir.Model,
    kinds: Sequence[str],
    include: Sequence[str],
    exclude: Sequence[str],
    result: PassResult,
    where: str = "sparsify",
) -> list[Layer]:
    """The weights that options name, in the order in which they are first read.

    Args:
        model: The model.
        kinds: Operators.
        include: Patterns of weight or node names; all if empty.
        exclude: Patterns of those that stay.
        result: What cannot be read as a matrix, or is an embedding as well, is refused here.
        where: The pass whose options they are.

    Raises:
        BadInput: A pattern names nothing.
    """
    by_weight: dict[ir.Value, list[Contraction]] = {}
    for node in model.graph:
        if node.op_type not in kinds:
            continue
        found = contraction.of(node)
        if isinstance(found, str):
            if not found.startswith("neither operand") and any(edit.tensor(v) is not None for v in node.inputs):
                result.refuse(node, found)
            continue
        by_weight.setdefault(found.weight, []).append(found)
    known = {v.name or "" for v in by_weight} | {c.node.name or "" for uses in by_weight.values() for c in uses}
    chosen = chooser(include, exclude, known, where)
    layers = []
    for value, uses in by_weight.items():
        names = {value.name or "", *(use.node.name or "" for use in uses)}
        if not chosen(names):
            continue
        held = edit.tensor(value)
        assert held is not None
        why = _why_not(value, uses, held)
        if why:
            result.refuse(value.name or "", why)
        else:
            first = uses[0]
            groups, outputs, columns = first.matrices(np.broadcast_to(np.empty((), np.bool_), first.shape)).shape
            layers.append(Layer(value, tuple(uses), groups, (outputs, columns)))
    return layers


def chooser(
    include: Sequence[str], exclude: Sequence[str], known: Collection[str], where: str
) -> Callable[[Collection[str]], bool]:
    """Whether options want what goes by some names.

    Args:
        include: Patterns; all if empty.
        exclude: Patterns of what stays.
        known: All names there are.
        where: The pass whose options they are.

    Raises:
        BadInput: A pattern names nothing.
    """
    for which, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise BadInput(
                    f"no weight or node is called '{pattern}'",
                    where=f"{where}{{{which}}}",
                    hint=nearest(pattern.strip("*"), known),
                )

    def hit(names: Collection[str], patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)

    return lambda names: (not include or hit(names, include)) and not hit(names, exclude)


def _why_not(value: ir.Value, uses: Sequence[Contraction], held: ir.TensorProtocol) -> str:
    if not held.dtype.is_floating_point():
        return "it holds integers"
    readers = {use.node for use in value.uses()}
    own = {use.node for use in uses}
    picks = {use.node for use in value.uses() if use.node.op_type in ("Gather", "GatherND")}
    if value.is_graph_output() or (readers - own - picks):
        return "other operators read it, too"
    if picks and not all(use.rows.by for use in uses):
        return "it is an embedding as well"
    if len({(use.order, use.parts, use.grouped) for use in uses}) > 1:
        return "operators read it in different ways"
    return ""


def stages(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Layers in rows that read the same activations: what one run of the data can tell of."""
    rows: list[list[Layer]] = []
    for layer in layers:
        mine = {use.activation for use in layer.uses}
        if rows and mine == {use.activation for use in rows[-1][0].uses}:
            rows[-1].append(layer)
        else:
            rows.append([layer])
    return rows
