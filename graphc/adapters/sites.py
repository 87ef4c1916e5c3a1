"""Where the parameters of a torch module are in a graph: by name, by the module that a node came from, by use."""

from __future__ import annotations

import ast
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from graphc import edit
from graphc.adapters.changes import Kind
from graphc.edit import attribute, is_op
from graphc.rewrites.base import FLOATS, dims

SCOPES = "pkg.torch.onnx.name_scopes"
"""Torch's note of a node: the paths of the modules around it, as a list, and its own name."""
_MODULE, _ALIASES = "graphc.module", "graphc.aliases"
"""What the frontend for torch notes: the module of a node, the other names of a tied parameter."""
_AXES = "graphc.axes"
"""What ``simplify`` notes of a weight that it stores in another layout than its source, see ``AXES`` there."""
_QUANTIZED_SUFFIX = re.compile(r"(?P<name>.*\.(?:weight|in_proj_weight))_[A-Za-z0-9_]+$")
_TIED = ("table", "rows")


@dataclass(frozen=True)
class Use:
    """One place where a weight is read.

    Attributes:
        node: Who reads the stored constant.
        index: As which input.
        kind: What becomes of it: ``rows`` of a product, ``table``, ``image``; ``other`` if that cannot be seen.
        flipped: For ``rows``: whether the constant is stored as (in, out), the transpose of what torch has.
        product: The product or lookup in the end.
    """

    node: ir.Node
    index: int
    kind: str
    flipped: bool = False
    product: ir.Node | None = None


def uses(value: ir.Value) -> list[Use]:
    """Every place where a constant is read, seen through Transpose, Identity, Cast and DequantizeLinear."""
    found = []
    for use in value.uses():
        ends = list(_ends(use.node, use.idx, False))
        kinds = {(kind, flipped) for kind, flipped, _ in ends}
        if len(kinds) == 1 and not value.is_graph_output():
            kind, flipped, product = ends[0]
            found.append(Use(use.node, use.idx, kind, flipped, product))
        else:
            found.append(Use(use.node, use.idx, "other"))
    return found


def _ends(node: ir.Node, index: int, flipped: bool) -> Iterator[tuple[str, bool, ir.Node]]:
    """How one reader uses a weight; ``flipped``: whether it has been transposed on the way."""
    passing = is_op(node, "Transpose", "Identity", "Cast") or (is_op(node, "DequantizeLinear") and index == 0)
    if passing and not node.outputs[0].is_graph_output():
        if node.op_type == "Transpose":
            perm = attribute(node, "perm", (1, 0))
            if perm[:-2] != tuple(range(len(perm) - 2)) or perm[-2:] != (len(perm) - 1, len(perm) - 2):
                yield "other", False, node
                return
            flipped = not flipped
        for use in node.outputs[0].uses():
            yield from _ends(use.node, use.idx, flipped)
    elif is_op(node, "MatMul"):
        yield "rows", (index == 1) != flipped, node
    elif is_op(node, "Gemm") and index < 2:
        transposed = bool(attribute(node, "transB" if index == 1 else "transA", 0))
        yield "rows", ((index == 1) != transposed) != flipped, node
    elif is_op(node, "MatMulNBits", domain="com.microsoft") and index == 1:
        yield "rows", False, node
    elif is_op(node, "Gather") and index == 0 and attribute(node, "axis", 0) == 0 and not flipped:
        yield "table", False, node
    elif is_op(node, "Conv") and index == 1:
        yield "image", False, node
    else:
        yield "other", False, node


@dataclass(frozen=True)
class Site:
    """Where a parameter is.

    Attributes:
        value: The constant.
        uses: The places that belong to it; None for all.
        flipped: Whether it is stored as (in, out) where torch has (out, in).
        shape: Rows and columns of the canonical matrix.
        start: The first row of it, in a constant in which several are merged.
        stop: The row after its last.
        note: What the user should know of how it was found.
    """

    value: ir.Value
    uses: tuple[Use, ...] | None
    flipped: bool
    shape: tuple[int, int]
    start: int
    stop: int
    note: str = ""


@dataclass
class Index:
    """The parameters of a model by name.

    Attributes:
        names: Constants by the name that they have, or that the module of their only reader suggests.
    """

    names: dict[str, ir.Value] = field(default_factory=dict)

    @staticmethod
    def of(model: ir.Model) -> Index:
        """Find every constant of a model that may be a parameter."""
        index = Index()
        suggested: dict[str, list[ir.Value]] = {}
        for graph in edit.graphs(model):
            for value in graph.initializers.values():
                for name in (value.name or "", *value.metadata_props.get(_ALIASES, "").split()):
                    index._add(name, value)
            for node in graph:
                if is_op(node, "Constant") and "." in (node.outputs[0].name or ""):
                    index._add(node.outputs[0].name or "", node.outputs[0])
        for node in edit.nodes(model):
            weight = weight_of(node)
            path = module(node) if weight is not None else ""
            if weight is not None and path:
                suggested.setdefault(f"{path}.weight", []).append(weight)
        for name, values in suggested.items():
            if len({id(value) for value in values}) == 1:
                index.names.setdefault(name, values[0])
        return index

    def _add(self, name: str, value: ir.Value) -> None:
        if edit.tensor(value) is None:
            return
        self.names.setdefault(name.replace(".base_layer.", "."), value)
        if match := _QUANTIZED_SUFFIX.match(name):
            held = edit.tensor(value)
            if held is not None and held.dtype not in FLOATS and len(held.shape) > 1:
                self.names.setdefault(match["name"], value)
        # A weight behind DequantizeLinear may carry the parameter's name after it.
        for use in value.uses():
            if is_op(use.node, "DequantizeLinear") and use.idx == 0 and use.node.outputs[0].name:
                self.names.setdefault(use.node.outputs[0].name, value)

    def votes(self, wanted: Iterable[str]) -> Counter[tuple[str, str]]:
        """What to take off the front of names, and what to put there: how many names are found with it."""
        ends: dict[str, list[str]] = {}
        for name in self.names:
            ends.setdefault(_end(name), []).append(name)
        found: Counter[tuple[str, str]] = Counter()
        for want in wanted:
            for name in ends.get(_end(want), ()):
                found[_difference(want, name)] += 1
        return found


def prefix(indices: Iterable[Index], wanted: Sequence[str]) -> tuple[str, str]:
    """What to take off the front of names, and what to put there, so that most of them are found; the shortest."""
    votes: Counter[tuple[str, str]] = Counter()
    for index in indices:
        votes += index.votes(wanted)
    return min(votes, key=lambda pair: (-votes[pair], len(pair[0]) + len(pair[1]), pair), default=("", ""))


def _end(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _difference(want: str, name: str) -> tuple[str, str]:
    """What two names have in front of their longest common end."""
    a, b = want.split("."), name.split(".")
    common = 0
    while common < min(len(a), len(b)) and a[-1 - common] == b[-1 - common]:
        common += 1
    return "".join(f"{part}." for part in a[:-common]), "".join(f"{part}." for part in b[:-common])


def module(node: ir.Node) -> str:
    """The path of the torch module that a node came from, as exporters write it down; empty if they did not."""
    if _MODULE in node.metadata_props:
        return node.metadata_props[_MODULE]
    scopes = node.metadata_props.get(SCOPES)
    if scopes:
        try:
            names = [name for name in ast.literal_eval(scopes) if isinstance(name, str)]
        except (ValueError, SyntaxError):
            return ""
        return names[-2] if len(names) > 1 else ""
    name = node.name or ""
    return ".".join(name.split("/")[1:-1]) if name.startswith("/") else ""


def by_module(value: ir.Value, path: str) -> tuple[Use, ...] | None:
    """The uses of a tied parameter that are in one of its modules.

    Returns:
        None where the parameter is not noted to be tied, or the modules of its readers are not known; no uses where the
        module is not in the graph.
    """
    if _ALIASES not in value.metadata_props:
        return None
    found = uses(value)
    if any(use.product is None or _MODULE not in use.product.metadata_props for use in found):
        return None
    return tuple(use for use in found if use.product is not None and module(use.product) == path)


def weight_of(node: ir.Node) -> ir.Value | None:
    """The constant that a product or a lookup reads as its weight, behind Transpose and the like."""
    if is_op(node, "MatMul", "Gemm", "Conv"):
        value = node.inputs[1]
    elif is_op(node, "Gather") and attribute(node, "axis", 0) == 0:
        value = node.inputs[0]
    else:
        return None
    while value is not None and is_op(value.producer(), "Transpose", "Identity", "Cast", "DequantizeLinear"):
        value = value.producer().inputs[0]  # type: ignore[union-attr]
    held = edit.tensor(value)
    return value if held is not None and len(held.shape) > 1 else None


def stored_shape(value: ir.Value) -> tuple[int, ...]:
    """The shape of what a constant stands for; of packed 4-bit weights, the one of the matrix."""
    for use in value.uses():
        if is_op(use.node, "MatMulNBits", domain="com.microsoft") and use.idx == 1:
            return attribute(use.node, "N"), attribute(use.node, "K")
    held = edit.tensor(value)
    return dims(held) if held is not None else ()


def locate(
    value: ir.Value,
    kind: Kind,
    shape: tuple[int, ...] | None,
    readers: Mapping[str, list[Use]],
    *,
    columns_first: bool = False,
) -> tuple[bool, tuple[int, int], tuple[Use, ...] | None] | str:
    """How a constant is stored as the weight of a kind of layer.

    Args:
        value: The constant.
        kind: What the adapter takes it for.
        shape: What the adapter expects, canonical; None if it does not say.
        readers: The uses of the constant by kind.
        columns_first: Whether the torch module has its weight as (in, out). It matters where only the notes of the
            frontend tell rows from columns.

    Returns:
        Whether it is flipped, its canonical shape, the uses that are meant (None: all); or why it does not fit.
    """
    stored = stored_shape(value)
    if not stored:
        return False, (1, 1), None
    flat = (stored[0], math.prod(stored[1:]))
    if kind == "stack":
        return False, (math.prod(stored[:-1]), stored[-1]), None
    if len(stored) != 2 or kind == "image":
        if kind == "linear" and stored[2:] != (1,) * (len(stored) - 2):
            return f"the weight has shape {list(stored)}, the adapter is one of a linear layer"
        return _fitting(False, flat, shape, stored, None)
    if kind == "table" or (kind == "plain" and not readers.get("rows")):
        own = readers.get("table") or readers.get("other")
        return _fitting(False, flat, shape, stored, _part(own, readers))
    own = readers.get("rows")
    if own:
        ways = {use.flipped for use in own}
        if len(ways) == 1:
            flipped = ways.pop()
            canonical = flat[::-1] if flipped else flat
            return _fitting(flipped, canonical, shape, stored, _part(own, readers))
    noted = _as_in_source(value)
    if noted is not None:
        flipped = noted is columns_first
        return _fitting(flipped, flat[::-1] if flipped else flat, shape, stored, None)
    if shape is None or flat[0] == flat[1]:
        return "the weight is square, and how it is used does not tell its rows from its columns"
    if flat[1] == shape[1] or flat[0] == shape[0]:
        return _fitting(False, flat, shape, stored, None)
    return _fitting(True, flat[::-1], shape, stored, None)


def _as_in_source(value: ir.Value) -> bool | None:
    """Whether a matrix is stored as the torch module has it, not transposed; None where nobody noted it."""
    layout = value.metadata_props.get(_AXES)
    if layout is not None:
        return {"0 1": True, "1 0": False}.get(layout)
    readers = value.uses()
    return True if readers and all(_MODULE in use.node.metadata_props for use in readers) else None


def _part(own: list[Use] | None, readers: Mapping[str, list[Use]]) -> tuple[Use, ...] | None:
    """These uses, or None if they are all."""
    if own is None or sum(map(len, readers.values())) == len(own):
        return None
    return tuple(own)


def _fitting(
    flipped: bool,
    canonical: tuple[int, int],
    shape: tuple[int, ...] | None,
    stored: tuple[int, ...],
    part: tuple[Use, ...] | None,
) -> tuple[bool, tuple[int, int], tuple[Use, ...] | None] | str:
    if shape is not None and canonical != tuple(shape):
        seen = list(canonical) if len(stored) <= 2 else list(stored)
        return f"the weight has shape {seen}, the adapter is for {list(shape)}"
    return flipped, canonical, part
