"""Unfolded low-rank adapters: ``y = x W + s (x A) B`` becomes ``y = x (W + s A B)``.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, equation 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.contract import PassResult
from graphc.edit import Array, attribute, is_op
from graphc.rewrites import regions
from graphc.rewrites.base import FLOATS, Refused, Rewriter, dims
from graphc.rewrites.branch import Path, chains, parts
from graphc.rewrites.products import Product
from graphc.rewrites.regions import Match
from graphc.rewrites.weights import LAZY, reading

_PIECE = 1 << 20
"""Elements of a weight that are in float64 at a time."""


@dataclass(frozen=True)
class Term:
    """One summand: the value, or the product of a Gemm without what it adds.

    Attributes:
        value: What is added.
        scale: The factor with which it is.
        product: The Gemm whose product this is.
    """

    value: ir.Value
    scale: float
    product: ir.Node | None = None


@dataclass(frozen=True)
class Adapter:
    """A branch that can be folded.

    Attributes:
        term: Its place in the sum.
        paths: What it is the sum of.
        base: The product into whose weight it goes.
        scales: For each path, its factor relative to the product of the base.
    """

    term: Term
    paths: tuple[Path, ...]
    base: Product
    scales: tuple[float, ...]

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for adapters that do the same to a weight."""
        base = self.base
        return (
            base.kind,
            base.weight.transposed,
            *(
                (
                    scale,
                    path.offset,
                    tuple((id(p.weight.value), p.weight.transposed) for p in path.products),
                    tuple(None if d is None else d.tobytes() for d in path.diagonals),
                )
                for path, scale in zip(self.paths, self.scales, strict=True)
            ),
        )


@dataclass(frozen=True)
class Update:
    """What is added to a weight, seen as a matrix of ``rows`` by the rest, as it is stored: ``scale left @ right``.

    Attributes:
        path: Where ``left`` and ``right`` come from; they are read when needed.
        scale: The factor.
        transposed: Whether the weight is stored as (channels out, channels in).
    """

    path: Path
    scale: float
    transposed: bool

    def factors(self) -> tuple[Array, Array]:
        """``left`` of shape (rows, rank) and ``right`` of shape (rank, columns), float64."""
        path = self.path
        if path.kind == "image":
            left, *rest = (p.weight.array() for p in path.products)
            left = left.reshape(left.shape[:2])
            if path.diagonals[0] is not None:
                left = path.diagonals[0][:, None] * left
            for more in rest[:-1]:
                left = left @ more.reshape(more.shape[:2])
            return left, rest[-1].reshape(len(rest[-1]), -1)
        arrays = [
            p.weight.array() if diagonal is None else p.weight.array() * diagonal
            for p, diagonal in zip(path.products, path.diagonals, strict=True)
        ]
        right, *rest = arrays
        left = rest.pop()
        while rest:
            left = left @ rest.pop()
        if path.width is not None:
            after = path.width - path.offset - right.shape[1]
            right = np.pad(right, ((0, 0), (path.offset, after)))
        return (right.T, left.T) if self.transposed else (left, right)


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
            if node not in inner and _is_sum(node):
                for adapter in _adapters(node, inner, rewriter, result):
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


def _is_sum(node: ir.Node) -> bool:
    return not node.domain and (
        node.op_type in ("Add", "Sub", "Sum")
        or (node.op_type == "Gemm" and len(node.inputs) > 2 and _computed(node.inputs[2]))
    )


def _computed(value: ir.Value | None) -> bool:
    node = value.producer() if value is not None else None
    return node is not None and node.op_type != "Constant"


def _terms(root: ir.Node, inner: set[ir.Node]) -> list[Term]:
    """The summands of a sum of sums; ``inner`` gets the nodes that add them."""
    found: list[Term] = []
    todo = [Term(root.outputs[0], 1.0)]
    while todo:
        term = todo.pop()
        node = term.value.producer()
        whole = node is root or (len(term.value.uses()) == 1 and not term.value.is_graph_output())
        if node is None or not whole or node.graph is not root.graph:
            found.append(term)
        elif is_op(node, "Identity") and node.inputs[0] is not None:
            todo.append(Term(node.inputs[0], term.scale))
        elif not _is_sum(node):
            found.append(term)
        else:
            inner.add(node)
            if node.op_type == "Gemm":
                beta = attribute(node, "beta", 1.0)
                found.append(Term(term.value, term.scale, node))
                todo.append(Term(node.inputs[2], term.scale * beta))  # type: ignore[arg-type]
                continue
            for i, value in enumerate(node.inputs):
                if value is not None:
                    sign = -1.0 if node.op_type == "Sub" and i == 1 else 1.0
                    todo.append(Term(value, term.scale * sign))
    return found


def _adapters(root: ir.Node, inner: set[ir.Node], rewriter: Rewriter, result: PassResult) -> list[Adapter]:
    """The adapters in a sum."""
    try:
        terms = [term for term in _terms(root, inner) if _computed(term.value)]
        if len(terms) < 2:
            return []
        read = [(term, _parts(term, rewriter)) for term in terms]
    except edit.BoundByCaller:
        return []
    bases = [(term, part[0][0]) for term, part in read if len(part) == 1 and part[0][0].width is None]
    found = []
    for term, part in read:
        if not part or any(len(ways) == 1 for ways in part):
            continue
        for base_term, base in bases:
            ways = [next((w for w in p[1:] if w.source is base.source and w.kind == base.kind), None) for p in part]
            paths = tuple(way for way in ways if way is not None)
            if base_term is term or len(paths) < len(part) or not all(_is_likely(way, base) for way in paths):
                continue
            try:
                found.append(_checked(root, term, paths, base_term, base, rewriter))
            except Refused as refusal:
                result.refuse(term.value, refusal.reason)
            break
        else:
            if any(_is_stranger(part, base) for other, base in bases if other is not term):
                result.refuse(term.value, "the adapter reads something else than the product beside it")
    return found


def _parts(term: Term, rewriter: Rewriter) -> list[list[Path]]:
    if term.product is not None:
        found = chains(term.value)
        return [found] if found else []
    return parts(term.value, rewriter)


def _is_stranger(part: list[list[Path]], base: Path) -> bool:
    """Whether a branch has all marks of an adapter of a product, but for what it reads."""
    return all(
        any(
            way.kind == base.kind
            and way.channels == base.channels
            and way.products[-1].channels[0] == base.products[0].channels[0] != 0
            and not way.problem
            and _rank(way) < min(base.products[0].channels)
            for way in ways[1:]
        )
        for ways in part
    )


def _is_likely(path: Path, base: Path) -> bool:
    """Whether a branch is an adapter, hence worth a refusal; blocks of layers beside a shortcut look similar."""
    least = min(base.products[0].channels)
    return not path.problem or least == 0 or _rank(path) < least


def _rank(path: Path) -> int:
    return min(p.channels[1] for p in path.products[1:])


def _checked(
    root: ir.Node, term: Term, paths: tuple[Path, ...], base_term: Term, base: Path, rewriter: Rewriter
) -> Adapter:
    """The adapter, if it can be folded.

    Raises:
        Refused: It cannot.
    """
    problem = next((path.problem for path in (base, *paths) if path.problem), "")
    if problem:
        raise Refused(problem)
    product = base.products[0]
    held = product.weight.held
    assert held is not None
    if product.weight.casts:
        raise Refused("the weight is stored in another dtype than it is used in")
    if any(diagonal is not None for diagonal in base.diagonals):
        raise Refused("the product is scaled by channel before the adapter is added")
    if any(path.channels != product.channels[1] for path in paths):
        raise Refused("the adapter has another number of channels than the product")
    if any(path.products[-1].channels[0] != product.channels[0] for path in paths):
        raise Refused("the adapter reads another number of channels than the product")
    if any(p.node.graph is not root.graph for path in (base, *paths) for p in path.products):
        raise Refused("the adapter is in another graph than the product")
    for path in (base, *paths):
        _check_dtypes(path, held.dtype, rewriter)
        if any((rewriter.rank(value) or 0) < rank for value, rank in path.ranks):
            raise Refused("the scale has more axes than what it scales")
    for path in paths:
        if any(p.bias is not None and p.node is not term.product for p in path.products):
            raise Refused("the adapter has a bias of its own")
        if product.kind == "image":
            _check_image(product, path)
        for value in path.values[:-1] if term.product is not None else path.values:
            _check_sole(value, "the branch has an intermediate result that is read elsewhere")
        if _rank(path) >= min(product.channels) and not any(_drops(p) for p in path.products):
            raise Refused("the rank is as large as the weight's, and the adapter's weights are read elsewhere")
    for value in base.values[:-1] if base_term.product is not None else base.values:
        _check_sole(value, "the result without the adapter is read elsewhere")
    scale = base.scale * base_term.scale
    scales = tuple(path.scale * term.scale / scale if scale else np.inf for path in paths)
    if not np.isfinite(scales).all():
        raise Refused("the scales are not finite")
    return Adapter(term, paths, product, scales)


def _check_image(base: Product, path: Path) -> None:
    """See that only the first convolution of a branch looks at neighbours, and as its base does."""
    if any(attribute(p.node, "group", 1) != 1 for p in (base, *path.products)):
        raise Refused("the convolution has groups")
    if _window(base) != _window(path.products[-1]):
        raise Refused("the adapter's convolution has another window")
    for p in path.products[:-1]:
        kernel, strides, _, pads, auto = _window(p)
        if max(*kernel, *strides) > 1 or any(pads) or auto not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
            raise Refused("the adapter's last convolution is not pointwise")


def _window(product: Product) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], str]:
    """Kernel, strides, dilations, pads and auto_pad of a convolution."""
    kernel = product.weight.shape[2:]
    ones = (1,) * len(kernel)
    node = product.node
    return (
        kernel,
        attribute(node, "strides", ones),
        attribute(node, "dilations", ones),
        attribute(node, "pads", (0, 0) * len(kernel)),
        attribute(node, "auto_pad", "NOTSET"),
    )


def _check_dtypes(path: Path, dtype: ir.DataType, rewriter: Rewriter) -> None:
    """See that the branch is computed in floats no less precise than the base."""
    used = {rewriter.dtype(value) for node in path.casts for value in (node.inputs[0], node.outputs[0])}
    used |= {cast for p in path.products for cast in p.weight.casts}
    if not used <= FLOATS or any(_eps(other) > _eps(dtype) for other in used if other is not None):
        raise Refused("the branch is computed in another dtype")


def _eps(dtype: ir.DataType) -> float:
    return float(ml_dtypes.finfo(dtype.numpy()).eps)  # type: ignore[no-untyped-call]


def _check_sole(value: ir.Value, reason: str) -> None:
    if len(value.uses()) != 1 or value.is_graph_output():
        raise Refused(reason)


def _drops(product: Product) -> bool:
    """Whether a product is the only reader of its weight."""
    value = product.weight.value
    return len(value.uses()) == 1 and not value.is_graph_output()


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


def updated(
    held: ir.TensorProtocol, updates: Sequence[Update], name: str, factor: Array | None = None
) -> ir.TensorProtocol:
    """A weight plus its updates, computed in float64 and rounded once; a big one when it is read.

    Args:
        held: The weight.
        updates: What is added.
        name: The name of the new tensor.
        factor: What the weight is multiplied by first: it broadcasts to the weight seen as rows by the rest.

    Raises:
        Refused: Values overflow, as far as that can be seen without reading a big float32 weight.
    """

    def compute() -> ir.TensorProtocol:
        factors = [update.factors() for update in updates]
        with reading(held) as array:
            new = np.empty(array.shape, array.dtype)
            old, made = array.reshape(len(array), -1), new.reshape(len(array), -1)
            rows = max(1, _PIECE // old.shape[1])
            for i in range(0, len(old), rows):
                piece = old[i : i + rows].astype(np.float64)
                if factor is not None:
                    piece *= factor[i : i + rows] if factor.ndim and len(factor) > 1 else factor
                for update, (left, right) in zip(updates, factors, strict=True):
                    piece += (update.scale * left[i : i + rows]) @ right
                with np.errstate(over="ignore"):
                    made[i : i + rows] = piece.astype(array.dtype)
            del array, old
        return ir.Tensor(new, dtype=held.dtype, name=name)

    small = held.size < LAZY
    if small or held.dtype == ir.DataType.FLOAT16:
        tensor = compute()
        if not np.isfinite(tensor.numpy().astype(np.float64)).all():
            raise Refused(f"the folded weight does not fit in {held.dtype.name.lower()}")
        if small:
            return tensor
    return ir.LazyTensor(compute, dtype=held.dtype, shape=ir.Shape(dims(held)), cache=False, name=name)


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
    if gemm is not None and _is_sum(gemm):
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
