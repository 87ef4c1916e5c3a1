"""New weights from old ones: computed in float64, rounded once, and big ones only when they are read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array
from graphc.rewrites.base import Refused, dims

LAZY = 1 << 18
"""Elements from which a new weight is computed when it is read (saved), not now."""

PIECE = 1 << 20
"""Elements of a weight that are in float64 at a time."""

_RANGE = (1e-18, 1e18)
"""Factors within which float32 weights of any sensible size neither overflow nor lose digits."""


@contextlib.contextmanager
def reading(tensor: ir.TensorProtocol) -> Iterator[Array]:
    """The values of a tensor; what was mapped for it is released afterwards."""
    yield tensor.numpy()
    edit.release(tensor)


def changed(held: ir.TensorProtocol, compute: Callable[[Array], Array], name: str) -> ir.TensorProtocol | None:
    """What a weight becomes, in its dtype and shape; a big one when it is read.

    Args:
        held: The weight.
        compute: Makes of its values the new ones, of the same dtype and shape.
        name: The name of the new tensor.

    Returns:
        None where values overflow, as far as that can be seen without reading a big float32 weight.
    """

    def make() -> ir.TensorProtocol:
        with reading(held) as array:
            new = compute(array)
            del array
        return ir.Tensor(new, dtype=held.dtype, name=name)

    small = held.size < LAZY
    if small or held.dtype == ir.DataType.FLOAT16:
        tensor = make()
        if not np.isfinite(tensor.numpy().astype(np.float64)).all():
            return None
        if small:
            return tensor
    return ir.LazyTensor(make, dtype=held.dtype, shape=ir.Shape(dims(held)), cache=False, name=name)


def scaled(source: ir.TensorProtocol, factor: Array, name: str) -> ir.TensorProtocol:
    """``source * factor`` rounded to the dtype of ``source``.

    Args:
        source: A floating-point tensor.
        factor: float64, of a shape that broadcasts to that of ``source``.
        name: The name of the new tensor.
    """

    def compute() -> ir.TensorProtocol:
        with reading(source) as array:
            product = np.empty(array.shape, array.dtype)
            if array.dtype.kind == "f":  # buffered: no float64 copy of the whole
                np.multiply(array, factor, out=product, dtype=np.float64, casting="same_kind")
            else:
                product[...] = (array.astype(np.float64) * factor).astype(array.dtype)
            del array
        return ir.Tensor(product, dtype=source.dtype, name=name)

    if source.size < LAZY:
        return compute()
    return ir.LazyTensor(compute, dtype=source.dtype, shape=ir.Shape(dims(source)), cache=False, name=name)


def check_scaled(source: ir.TensorProtocol, factor: Array) -> None:
    """See that ``scaled`` keeps the precision of its dtype; big float32 tensors are not read for it.

    Raises:
        Refused: Values overflow, or become so small that digits are lost.
    """
    size = np.abs(factor[factor != 0])
    if source.dtype != ir.DataType.FLOAT16 and (size.size == 0 or (size.min() > _RANGE[0] and size.max() < _RANGE[1])):
        return
    with reading(source) as array:
        check_rounded(array.astype(np.float64) * factor, source.dtype, factor.shape)
        del array


def rounded(exact: Array, dtype: ir.DataType, name: str) -> ir.TensorProtocol:
    """``exact``, float64, in the dtype.

    Raises:
        Refused: Values overflow.
    """
    with np.errstate(over="ignore"):
        array = exact.astype(dtype.numpy())
    if not np.isfinite(array.astype(np.float64)).all():
        raise Refused(f"the folded values do not fit in {dtype.name.lower()}")
    return ir.Tensor(np.ascontiguousarray(array), dtype=dtype, name=name)


def check_rounded(exact: Array, dtype: ir.DataType, kept: tuple[int, ...] = ()) -> None:
    """See that rounding loses no more than the dtype's precision, relative to a channel's largest value.

    Args:
        exact: float64.
        dtype: What it is rounded to.
        kept: A shape that broadcasts to that of ``exact``; its axes other than 1 tell channels apart.

    Raises:
        Refused: It loses more.
    """
    kept = (1,) * (exact.ndim - len(kept)) + kept
    others = tuple(i for i, dim in enumerate(kept) if dim == 1)
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.abs(exact.astype(dtype.numpy()).astype(np.float64) - exact)
        allowed = np.abs(exact).max(axis=others, keepdims=True, initial=0) * _eps(dtype)
    if not (error <= allowed).all():
        raise Refused(f"the folded weights lose precision in {dtype.name.lower()}")


def _eps(dtype: ir.DataType) -> float:
    """The distance from 1 to the next number."""
    return float(ml_dtypes.finfo(dtype.numpy()).eps)  # type: ignore[no-untyped-call]
