"""Weights rounded to a grid, a piece at a time: to the nearest codes, in the sweep of GPTQ, or by projected descent."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.contraction import Contraction
from graphc.edit import Array
from graphc.quantization import kronecker, refinement
from graphc.quantization.granularity import Granularity
from graphc.quantization.grid import Grid, fit
from graphc.sparsity.sweep import BLOCK, sweep

PIECE = 1 << 20
"""Elements that are rounded at once."""

SCRATCH = 1 << 20
"""Bytes from which codes are kept in a scratch file and not in memory."""


@dataclass(frozen=True)
class Codes:
    """A quantized weight.

    Attributes:
        codes: In the weight's shape.
        scale: In the dtype of the weight, in the shape that DequantizeLinear wants.
        zero: In the dtype of the codes; None if it is 0.
        granularity: Which elements share a scale.
        grid: The grid.
    """

    codes: ir.TensorProtocol
    scale: Array
    zero: Array | None
    granularity: Granularity
    grid: Grid

    @property
    def nbytes(self) -> int:
        zero = 0 if self.zero is None else -(-self.zero.size * self.grid.dtype.bitwidth // 8)
        return self.codes.nbytes + self.scale.nbytes + zero

    def values(self) -> Array:
        """What the codes stand for, float32, in the weight's shape."""
        codes = self.codes.numpy().astype(np.float32)
        scale = self.granularity.spread(self.scale.astype(np.float32), codes.shape)
        if self.zero is None:
            return np.asarray(codes * scale)
        return np.asarray((codes - self.granularity.spread(self.zero.astype(np.float32), codes.shape)) * scale)


def finite(held: ir.TensorProtocol) -> bool:
    """Whether a tensor has neither NaN nor infinity; read a piece at a time."""
    flat = held.numpy().reshape(-1)
    found = all(np.isfinite(flat[i : i + PIECE].astype(np.float32)).all() for i in range(0, flat.size, PIECE))
    del flat
    edit.release(held)
    return found


def nearest(
    held: ir.TensorProtocol,
    grid: Grid,
    granularity: Granularity,
    *,
    clip: bool = False,
    importance: Array | None = None,
    least: Array | None = None,
) -> Codes:
    """The nearest codes of a weight.

    Args:
        held: The weight, finite.
        grid: Its grid.
        granularity: Which elements share a scale.
        clip: Whether ranges are narrowed for the least squared error.
        importance: The weight of each element's squared error, of the weight's rank; it broadcasts.
        least: Scales are no smaller than these, ``(channels,)``; for scales of one axis.
    """
    array = held.numpy()
    dtype = held.dtype.numpy()
    codes = _room(array.shape, grid)
    axis = granularity.sliced(array.ndim)
    if axis is None:
        pieces = [slice(None)]
    else:
        step = max(1, PIECE * array.shape[axis] // max(array.size, 1))
        pieces = [slice(i, i + step) for i in range(0, array.shape[axis], step)]
    found = []
    for piece in pieces:
        at = (slice(None),) * (axis or 0) + (piece,)
        part = np.asarray(array[at if axis is not None else ...], dtype=np.float32)
        weight = importance
        if weight is not None and axis is not None and weight.shape[axis] > 1:
            weight = weight[at]
        scale, zero = fit(part, grid, granularity, dtype, clip=clip, importance=weight)
        if least is not None:
            scale = _at_least(scale, least[piece], part, granularity)
        spread = [granularity.spread(each, part.shape) for each in (scale, zero)]
        codes[at if axis is not None else ...] = grid.codes(part, *spread).astype(codes.dtype)
        found.append((scale, zero))
    del array
    edit.release(held)
    joined = [found[0][i] if axis is None else _joined([f[i] for f in found], axis, granularity) for i in (0, 1)]
    return _made(codes, joined[0], joined[1], held, grid, granularity)


def _at_least(scale: Array, least: Array, values: Array, granularity: Granularity) -> Array:
    """Scales no smaller than some; those of groups of zeros are these, where there are some."""
    empty = granularity.reduced(np.abs(values), np.max) == 0
    return np.where(empty & (least > 0), least, np.maximum(scale, least))


def _joined(parts: list[Array], axis: int, granularity: Granularity) -> Array:
    return np.concatenate(parts, axis=axis if granularity.block else 0)


def gptq(
    held: ir.TensorProtocol,
    use: Contraction,
    gram: Array,
    grid: Grid,
    granularity: Granularity,
    *,
    clip: bool = False,
    order: bool = True,
    damp: float = 0.01,
    least: Array | None = None,
    steps: int = 0,
    rounds: int = 0,
    slopes: Array | None = None,
) -> Codes:
    """Codes of a weight with which a layer's outputs change least.

    By GPTQ (2023): columns one after the other, the later ones making up for the earlier; or by projected descent
    (AWP, 2025): steps along the gradient of the outputs' squared error, each rounded to the grid. Scales are those of
    the weight as it came, so that columns may be done in any order and blocks stay where they are. Zeros stay, so that
    what was made sparse remains so. A row that ends up worse than the nearest codes gets these.

    Args:
        held: The weight, finite.
        use: How it is read as matrices.
        gram: ``(groups or 1, columns, columns)``, of its inputs.
        grid: Its grid, of integers.
        granularity: Which elements share a scale.
        clip: Whether ranges are narrowed for the least squared error, weighted with the inputs' squares.
        order: Whether columns with the largest inputs come first.
        damp: See :func:`graphc.sparsity.sweep.sweep`.
        least: Scales are no smaller than these, ``(channels,)``; for scales of one axis.
        steps: Steps of projected descent instead of the sweep; 0 for the sweep.
        rounds: How often scales and codes are then refined in turn, see :mod:`graphc.quantization.refinement`; scales
            only where ``least`` leaves them free.
        slopes: The Gram matrix of the loss's gradient by the outputs, ``(outputs, outputs)``; with it errors of outputs
            make up for each other, see :mod:`graphc.quantization.kronecker`.
    """
    array = held.numpy().astype(np.float32)
    edit.release(held)
    # A power of four changes nothing, roots included, but keeps huge and tiny numbers in float32.
    gram = gram / 4.0 ** (np.frexp(float(gram.max(initial=0)))[1] // 2)
    importance = use.restored(
        np.broadcast_to(np.diagonal(gram, axis1=1, axis2=2)[:, None], use.matrices(array).shape).astype(np.float32)
    )
    scale, zero = fit(array, grid, granularity, held.dtype.numpy(), clip=clip, importance=importance)
    if least is not None:
        scale = _at_least(scale, least, array, granularity)
    spread = [
        np.broadcast_to(granularity.spread(each.astype(np.float32), array.shape), array.shape) for each in (scale, zero)
    ]
    weights, scales, zeros = (use.matrices(each) for each in (array, *spread))
    new = np.empty_like(weights)
    step = max(1, PIECE // gram.shape[-1] ** 2)
    for at in range(0, len(weights), step):
        piece = slice(at, at + step)
        products = gram[piece] if len(gram) > 1 else gram
        given = (weights[piece], products, grid, scales[piece], zeros[piece])
        new[piece] = _better(_descended(*given, steps) if steps else _swept(*given, order, damp), *given)
    if rounds or slopes is not None:
        numbers = granularity.spread(np.arange(scale.size).reshape(scale.shape), array.shape)
        groups = use.matrices(np.broadcast_to(numbers, array.shape))
        scales = scales.copy()
        for i, each in enumerate(weights):
            products = gram[i if len(gram) > 1 else 0]
            damped = products + damp * np.diagonal(products).mean() * np.eye(len(products))
            labels = refinement.labels(groups[i]) if rounds and least is None else None
            new[i], scales[i] = refinement.refined(each, damped, grid, new[i], scales[i], zeros[i], labels, rounds)
            if slopes is not None:
                new[i], scales[i] = kronecker.refined(
                    each, damped, slopes, grid, new[i], scales[i], zeros[i], labels, max(rounds, 1), order=order
                )
        scale = granularity.reduced(use.restored(scales), np.max)
    codes = _room(array.shape, grid)
    codes[...] = use.restored(new).astype(codes.dtype)
    return _made(codes, scale, zero, held, grid, granularity)


def _swept(weights: Array, products: Array, grid: Grid, scales: Array, zeros: Array, order: bool, damp: float) -> Array:
    """Weights on their grid after a sweep, ``(groups, outputs, columns)``; with a Gram matrix each, or one for all."""
    # A column whose input was always zero is rounded for itself: other data may have one.
    diagonal = np.diagonal(products, axis1=1, axis2=2)
    mean = diagonal.mean(axis=1, keepdims=True)
    unseen = np.where(diagonal == 0, np.where(mean > 0, mean, 1.0), 0.0)
    products = products + unseen[..., None] * np.eye(products.shape[-1])
    diagonal = diagonal + unseen
    columns = np.argsort(-diagonal, axis=1, kind="stable") if order else np.arange(diagonal.shape[1])[None]
    turned = np.take_along_axis(np.take_along_axis(products, columns[:, None], 2), columns[..., None], 1)
    w, s, z = (np.take_along_axis(each, columns[:, None], 2) for each in (weights, scales, zeros))
    swept = sweep(w, turned, Rounded(grid, s, z, w != 0), damp=damp, block=BLOCK)
    return np.take_along_axis(swept, np.argsort(columns, axis=1)[:, None], 2)


def _descended(weights: Array, products: Array, grid: Grid, scales: Array, zeros: Array, steps: int) -> Array:
    """Weights on their grid after projected descent, the best of all steps for each row.

    The step is ``1.5 / |H|`` (Frobenius) as AWP has it. What is not yet a code's distance is kept for the next step:
    rounded each time, small steps would never get anywhere.
    """
    rate = 1.5 / np.maximum(np.linalg.norm(products, axis=(1, 2)), 1e-300)[:, None, None]
    moving = weights.astype(np.float64)
    best = rounded = np.where(weights != 0, grid.rounded(weights, scales, zeros), 0)
    least = _losses(weights - best, products)
    for _ in range(steps):
        moving += rate * ((weights - rounded) @ products)
        rounded = np.where(weights != 0, grid.rounded(moving.astype(np.float32), scales, zeros), 0)
        loss = _losses(weights - rounded, products)
        best = np.where((loss < least)[..., None], rounded, best)
        least = np.minimum(loss, least)
    return best


def _better(found: Array, weights: Array, products: Array, grid: Grid, scales: Array, zeros: Array) -> Array:
    """Codes of weights on the grid, or the nearest codes in rows where these lose less."""
    codes, plain = (grid.codes(each, scales, zeros) for each in (found, weights))
    losses = [_losses(weights - (each - zeros) * scales, products) for each in (codes, plain)]
    return np.where((losses[1] < losses[0])[..., None], plain, codes)


def _losses(error: Array, products: Array) -> Array:
    """The squared error of each output."""
    return np.asarray(((error @ products) * error).sum(axis=-1))


class Rounded:
    """Columns go to the nearest codes of scales that are given; a projector of the sweep.

    Args:
        grid: The grid.
        scale: ``(..., outputs, columns)``.
        zero: ``(..., outputs, columns)``.
        keep: Which weights are not zero, in the same shape; the others stay zero.
    """

    def __init__(self, grid: Grid, scale: Array, zero: Array, keep: Array) -> None:
        self._grid, self._scale, self._zero, self._keep = grid, scale, zero, keep

    def begin(self, start: int, weights: Array, diagonal: Array) -> None:
        """Nothing is chosen."""

    def column(self, index: int, weights: Array, diagonal: Array) -> Array:
        rounded = self._grid.rounded(weights[..., 0], self._scale[..., index], self._zero[..., index])
        return np.where(self._keep[..., index], rounded, 0)


def _room(shape: tuple[int, ...], grid: Grid) -> Array:
    """Room for codes, in a scratch file where they are many."""
    dtype = np.dtype(grid.dtype.numpy())
    if dtype.itemsize * int(np.prod(shape)) < SCRATCH:
        return np.empty(shape, dtype=dtype)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, dtype=dtype, mode="w+", shape=shape)


def _made(
    codes: Array, scale: Array, zero: Array, held: ir.TensorProtocol, grid: Grid, granularity: Granularity
) -> Codes:
    tensor = ir.Tensor(codes, dtype=grid.dtype, name=held.name)
    offset = None if grid.symmetric or grid.form != "int" else zero.astype(grid.dtype.numpy())
    return Codes(tensor, scale.astype(held.dtype.numpy()), offset, granularity, grid)
