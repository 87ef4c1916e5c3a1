"""What a fragment is: a small graph in symbolic sizes, and the truth about which indices must be cut together.

A fragment declares each weight's shape in named sizes, in the notation of axis trees: ``wqkv: (3 h d) m`` is a
matrix whose first axis is the row-major product of 3, ``h`` and ``d``; ``w: (a + b) 5`` has an axis that joins two
parts, ``~c`` runs backwards. The sizes listed in ``groups`` are those that may be cut: the places of a group are
then exactly the axes in whose tree its name occurs. Everything else is fixed.

The claim is proved without graphc (``Fragment.check``): zero the unit everywhere, build the smaller graph from
the same text with a smaller size, slice the weights by the declared trees, and compare both in ONNX Runtime.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx import helper, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]
Digits = dict[str, int]
Position = tuple[str, int, int]
"""A weight, an axis of it, and an index along that axis."""


@dataclass(frozen=True)
class Group:
    """What is true of the cuttable size of this name.

    Attributes:
        kind: The kind of unit: channel, head, head_dim, neuron, width, expert, rank.
        balanced: Names of outer sizes: each of their blocks must lose equally many, which ones is free.
        exact: ``"zero"``: cutting zeroed units changes nothing. ``"rms"``: nothing, once gamma and epsilon are
            rescaled. ``"norm"``: the mean or variance of a LayerNorm or GroupNorm changes. ``"mean"``: a plain mean
            changes, unless it is written as a sum over the old size.
        gammas: Weights to multiply by ``sqrt(old / new size)`` when ``exact`` is ``"rms"``.
        interface: Whether the cut changes the shape of a graph input or output.
        optional: An engine may see this as fixed without losing anything that matters.
    """

    kind: str = "channel"
    balanced: tuple[str, ...] = ()
    exact: str = "zero"
    gammas: tuple[str, ...] = ()
    interface: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Tensor:
    """A weight's axes as trees, its dtype, and how it is filled."""

    axes: tuple[Any, ...]
    dtype: str = "float"
    fill: str = "normal"


DEAD = {"router": -np.inf, "centred": 128, "nibbles": 0x88}
"""What a dead unit holds in a tensor with this fill, where that is not zero."""


@dataclass(frozen=True)
class Fragment:
    name: str
    text: Callable[[Any], str]
    sizes: Mapping[str, int]
    groups: Mapping[str, Group]
    tensors: Mapping[str, Tensor]
    interface: Mapping[str, Tensor] = field(default_factory=dict)
    fixed: Mapping[tuple[str, int], str] = field(default_factory=dict)
    ids_below: int = 3
    opset: int = 21
    seed: int = 0

    def build(
        self, sizes: Mapping[str, int] | None = None, arrays: Mapping[str, Array] | None = None
    ) -> onnx.ModelProto:
        """The graph in these sizes (default: the fragment's own) with these weights (default: seeded)."""
        sizes = dict(self.sizes) if sizes is None else dict(sizes)
        arrays = self.arrays(sizes) if arrays is None else arrays
        space = SimpleNamespace(**sizes, full=SimpleNamespace(**self.sizes))
        return _model(self.text(space), arrays, self.opset)

    def arrays(self, sizes: Mapping[str, int] | None = None) -> dict[str, Array]:
        sizes = self.sizes if sizes is None else sizes
        return {
            name: _fill(f"{self.name}/{name}/{self.seed}", tuple(_length(axis, sizes) for axis in t.axes), t)
            for name, t in self.tensors.items()
        }

    def units(self, group: str, tensors: Mapping[str, Tensor] | None = None) -> dict[tuple[int, ...], set[Position]]:
        """Each unit of a group (its index, after those of the balanced blocks) with all its places in weights."""
        found: dict[tuple[int, ...], set[Position]] = {}
        for name, t in (self.tensors if tensors is None else tensors).items():
            for axis, tree in enumerate(t.axes):
                for index, digits in enumerate(_digits(tree, self.sizes)):
                    if group in digits:
                        key = (*(digits[b] for b in self.groups[group].balanced), digits[group])
                        found.setdefault(key, set()).add((name, axis, index))
        return found

    def removals(self, group: str) -> Iterator[set[tuple[int, ...]]]:
        """Some sets of units whose removal must be exact: one alone, and two that are apart."""
        size, blocks = self.sizes[group], [range(self.sizes[b]) for b in self.groups[group].balanced]
        for count in {1, min(2, size - 1)} - {0}:
            gone = set()
            for i, block in enumerate(itertools.product(*blocks)):
                # A different index in each balanced block: they need not agree.
                gone |= {(*block, (i + j * (size - 1) + (count == 1)) % size) for j in range(count)}
            yield gone

    def check(self, group: str, gone: set[tuple[int, ...]]) -> float:
        """The largest relative difference between the zeroed and the physically smaller graph, in ONNX Runtime."""
        spec = self.groups[group]
        blocks = int(np.prod([self.sizes[b] for b in spec.balanced], initial=1))
        small = {**self.sizes, group: self.sizes[group] - len(gone) // blocks}
        affine = spec.exact in ("norm", "mean")
        full = self.arrays()
        sliced = dict(full)
        for name, t in self.tensors.items():
            for axis, tree in enumerate(t.axes):
                dead = self._dead(group, tree, gone)
                if len(dead):
                    index = (slice(None),) * axis + (dead,)
                    full[name] = full[name].copy()
                    full[name][index] = DEAD.get(t.fill, 0)
        for name, t in self.tensors.items():
            sliced[name] = full[name]
            for axis, tree in enumerate(t.axes):
                sliced[name] = np.delete(sliced[name], self._dead(group, tree, gone), axis)
            if name in spec.gammas:
                sliced[name] = (sliced[name] * np.sqrt(self.sizes[group] / small[group])).astype(sliced[name].dtype)
        before, after = self.build(self.sizes, full), self.build(small, sliced)
        inputs = feeds(before, self.ids_below)
        fewer = {name: self._cut(array, self.interface.get(name), group, gone) for name, array in inputs.items()}
        expected = run(_affine_norms(before) if affine else before, inputs)
        got = run(_affine_norms(after) if affine else after, fewer)
        worst = 0.0
        for name, array in expected.items():
            array = self._cut(array, self.interface.get(name), group, gone)
            assert array.shape == got[name].shape, (name, array.shape, got[name].shape)
            if not array.size:
                continue
            worst = max(worst, float(np.abs(array - got[name]).max() / (np.abs(array).max() + 1e-12)))
            assert np.isfinite(array).all() and np.ptp(array) > 0, f"{name} is trivial"
        return worst

    def _dead(self, group: str, tree: Any, gone: set[tuple[int, ...]]) -> list[int]:
        keys = (*self.groups[group].balanced, group)
        return [
            index
            for index, digits in enumerate(_digits(tree, self.sizes))
            if group in digits and tuple(digits[k] for k in keys) in gone
        ]

    def _cut(self, array: Array, t: Tensor | None, group: str, gone: set[tuple[int, ...]]) -> Array:
        for axis, tree in enumerate(t.axes if t else ()):
            array = np.delete(array, self._dead(group, tree, gone), axis)
        return array


ALL: dict[str, Fragment] = {}


def fragment(
    sizes: str,
    groups: Mapping[str, Group | str],
    weights: str,
    *,
    interface: str = "",
    fixed: Mapping[str, str] | None = None,
    ids_below: int = 3,
    opset: int = 21,
) -> Callable[[Callable[[Any], str]], Callable[[Any], str]]:
    """Register a function that writes a graph's text from its sizes.

    Args:
        sizes: ``"c=6 m=4"``.
        groups: The sizes that may be cut; a string stands for a Group of that kind.
        weights: ``"w: c 3 3 3; b: c"``; a name may carry a dtype, ``w[int8]``, and a fill after ``=``.
        interface: Graph inputs and outputs in the same notation, where a group reaches them.
        fixed: Why an axis cannot be cut, for axes that one may wonder about: ``{"w:1": "graph input"}``, one or more
            words that the reason must contain, separated by ``|``.
        ids_below: The bound of integer inputs.
        opset: The version of the standard operators.
    """

    def register(text: Callable[[Any], str]) -> Callable[[Any], str]:
        name = text.__name__
        assert name not in ALL, name
        numbers = {k: int(v) for k, v in (pair.split("=") for pair in sizes.split())}
        specs = {k: Group(v) if isinstance(v, str) else v for k, v in groups.items()}
        reasons = {(k.rpartition(":")[0], int(k.rpartition(":")[2])): v for k, v in (fixed or {}).items()}
        ALL[name] = Fragment(
            name, text, numbers, specs, _declared(weights), _declared(interface), reasons, ids_below, opset
        )
        return text

    return register


# --- the notation -----------------------------------------------------------------------------------------------------


def _declared(text: str) -> dict[str, Tensor]:
    tensors = {}
    for line in re.split(r"[;\n]", text):
        if not line.strip():
            continue
        name, _, rest = line.partition(":")
        axes, _, fill = rest.partition("=")
        match = re.fullmatch(r"\s*([\w.]+)(?:\[(\w+)\])?\s*", name)
        assert match, line
        tokens = re.findall(r"~?\w+|[()+]", axes)
        tensors[match[1]] = Tensor(tuple(_axes(tokens)), match[2] or "float", fill.strip() or "normal")
    return tensors


def _axes(tokens: list[str]) -> Iterator[Any]:
    while tokens:
        yield _atom(tokens)


def _atom(tokens: list[str]) -> Any:
    token = tokens.pop(0)
    if token != "(":
        return int(token) if token.isdigit() else token
    parts: list[list[Any]] = [[]]
    while tokens[0] != ")":
        if tokens[0] == "+":
            tokens.pop(0)
            parts.append([])
        else:
            parts[-1].append(_atom(tokens))
    tokens.pop(0)
    return ("sum", *(("prod", *part) for part in parts))


def _length(tree: Any, sizes: Mapping[str, int]) -> int:
    return len(_digits(tree, sizes))


def _digits(tree: Any, sizes: Mapping[str, int]) -> list[Digits]:
    """For each index along the axis, its digit in every named size that it runs through."""
    if isinstance(tree, int):
        return [{} for _ in range(tree)]
    if isinstance(tree, str):
        name = tree.removeprefix("~")
        table = [{name: i} for i in range(sizes[name])]
        return table if tree == name else table[::-1]
    if tree[0] == "sum":
        return [digits for part in tree[1:] for digits in _digits(part, sizes)]
    table = [{}]
    for factor in tree[1:]:
        table = [{**outer, **inner} for outer in table for inner in _digits(factor, sizes)]
    return table


# --- graphs and running them ------------------------------------------------------------------------------------------

_LIST = re.compile(r"(?<=[(,\s])\[([-\d,\s]*)\](?=\s*[,)])")
_FLOAT = re.compile(r"(?<=[(,\s])(-?\d+\.\d*(?:e-?\d+)?)(?=\s*[,)])")
_OPSETS = '["" : %d, "com.microsoft" : 1, "local" : 1]'


def _model(text: str, arrays: Mapping[str, Array], opset: int) -> onnx.ModelProto:
    """Parse ``(inputs) => (outputs)`` and one node a line; ``[1, -1]`` and ``0.5`` as operands become constants."""
    header, arrow, rest = text.strip().partition("=>")
    outputs, _, body = rest.partition("\n")
    signature = header + arrow + outputs
    lines: list[str] = []
    count = itertools.count()

    def lift(kind: str) -> Callable[[re.Match[str]], str]:
        def one(match: re.Match[str]) -> str:
            name = f"const_{next(count)}"
            value = f"value_ints=[{match[1]}]" if kind == "ints" else f"value_float={match[1]}"
            lines.append(f"{name} = Constant<{value}>()")
            return name

        return one

    body, _, functions = body.partition("---")
    for line in body.splitlines():
        if line.strip():
            # Operands stand in parentheses, after the attributes in angle brackets: lift constants there only.
            head, mark, tail = (line, "", "") if "{" in line else line.rpartition("(")
            tail = _FLOAT.sub(lift("float"), _LIST.sub(lift("ints"), mark + tail))
            lines.append(head + tail)
    nodes = "\n".join(lines)
    model = onnx.parser.parse_model(
        f"<ir_version: 10, opset_import: {_OPSETS % opset}>\nfragment {signature} {{\n{nodes}\n}}\n{functions}"
    )
    used = {i for node in _nodes(model.graph) for i in node.input}
    for name, array in arrays.items():
        assert name in used, f"{name} is declared, not used"
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    model = _without_unused_opsets(model)
    for i, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{i}"
    return model


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attr in node.attribute:
            if attr.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attr.g)


def _without_unused_opsets(model: onnx.ModelProto) -> onnx.ModelProto:
    domains = {node.domain for node in _nodes(model.graph)} | {n.domain for f in model.functions for n in f.node}
    kept = [o for o in model.opset_import if not o.domain or o.domain in domains]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    return model


_DTYPES = {
    "float": np.float32, "double": np.float64, "half": np.float16, "int8": np.int8, "uint8": np.uint8,
    "int32": np.int32, "int64": np.int64, "bool": np.bool_,
}  # fmt: skip


def _fill(key: str, shape: tuple[int, ...], t: Tensor) -> Array:
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    dtype = _DTYPES[t.dtype]
    match t.fill:
        case "positive":
            return rng.uniform(0.5, 1.5, shape).astype(dtype)
        case "zero":
            return np.zeros(shape, dtype)
        case "one":
            return np.ones(shape, dtype)
        case "centre":
            return np.full(shape, 128, dtype)
        case "centred" | "nibbles":
            return rng.integers(0, 256, shape).astype(dtype)
        case "scale":
            return rng.uniform(0.01, 0.03, shape).astype(dtype)
    if np.issubdtype(dtype, np.integer):
        return rng.integers(0 if dtype == np.uint8 else -60, 120, shape).astype(dtype)
    return (rng.normal(size=shape) * 0.5).astype(dtype)


FREE_SIZES = {"N": 2, "S": 5, "T": 4, "P": 3, "H": 8, "W": 8, "batch": 2, "seq": 7}
"""What the symbolic dimensions of inputs are when a fragment is run."""


def feeds(model: onnx.ModelProto, ids_below: int = 3, seed: int = 1) -> dict[str, Array]:
    """Inputs for a fragment: normal floats, small integers, true."""
    rng = np.random.default_rng(seed)
    inputs: dict[str, Array] = {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        shape = tuple(d.dim_value or _free(d.dim_param) for d in tensor.shape.dim)
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if dtype == np.bool_:
            inputs[value.name] = np.ones(shape, dtype)
        elif np.issubdtype(dtype, np.integer):
            inputs[value.name] = rng.integers(0, ids_below, shape).astype(dtype)
        else:
            inputs[value.name] = rng.normal(size=shape).astype(dtype)
    return inputs


def _free(name: str) -> int:
    return sum(FREE_SIZES[part.strip()] for part in name.split("+"))


def run(model: onnx.ModelProto, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """All outputs, from ONNX Runtime without its optimisations."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def _affine_norms(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with each LayerNorm and GroupNorm as a product by a vector and a sum, and each mean as 0.

    This has the same coupling, and zeros are neutral in it.
    """
    model = onnx.ModelProto.FromString(model.SerializeToString())
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type in ("LayerNormalization", "GroupNormalization"):
            operands = list(node.input[1:])
            if node.op_type == "GroupNormalization":
                axes = f"{node.output[0]}.axes"
                nodes.append(helper.make_node("Constant", [], [axes], value_ints=[1, 2]))
                for i, operand in enumerate(operands):
                    nodes.append(helper.make_node("Unsqueeze", [operand, axes], [f"{node.output[0]}.{i}"]))
                    operands[i] = f"{node.output[0]}.{i}"
            product = f"{node.output[0]}.scaled"
            nodes.append(helper.make_node("Mul", [node.input[0], operands[0]], [product]))
            nodes.append(helper.make_node("Add", [product, operands[1]], [node.output[0]]))
        elif node.op_type == "ReduceMean":
            total, (mean,) = f"{node.output[0]}.sum", node.output
            nodes += [
                helper.make_node("ReduceSum", node.input, [total]),
                helper.make_node("Constant", [], [f"{mean}.zero"], value_float=0.0),
                helper.make_node("Mul", [total, f"{mean}.zero"], [mean]),
            ]
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def places(units: Mapping[tuple[int, ...], set[Position]]) -> Sequence[tuple[str, int]]:
    """The (weight, axis) pairs that occur in the units of a group."""
    return sorted({(weight, axis) for unit in units.values() for weight, axis, _ in unit})
