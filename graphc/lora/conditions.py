"""When a branch beside a product can be folded into its weight, and why not otherwise."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphc.edit import attribute
from graphc.lora.branch import Path
from graphc.lora.products import Product
from graphc.rewrites.base import FLOATS, Refused, Rewriter


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


def checked(
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
        if path.rank >= min(product.channels) and not any(_drops(p) for p in path.products):
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
