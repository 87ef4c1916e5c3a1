"""A layer's sparse weight: scores by criterion, places by pattern, and the sweep."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array
from graphc.errors import BadInput
from graphc.sparsity import sweep
from graphc.sparsity.layers import Layer
from graphc.sparsity.pattern import Pattern
from graphc.stats import GradientsOf, Request


@dataclass(frozen=True)
class How:
    """How weights are made sparse.

    Attributes:
        pattern: Where zeros may be.
        criterion: magnitude, wanda, sparsegpt, gblm or random.
        update: Whether what stays makes up for what goes.
        by_row: Whether each output's row loses the same part.
        alpha: The weight of the gradients in gblm.
        damp: What the sweep adds to the diagonal.
        seed: Of random scores.
    """

    pattern: Pattern
    criterion: str
    update: bool = False
    by_row: bool = False
    alpha: float = 1.0
    damp: float = 0.01
    seed: int = 0


def requests(layers: Iterable[Layer], how: How) -> list[Request[Any]]:
    """The statistics that these layers need."""
    found: dict[Request[Any], None] = {}
    for layer in layers:
        for use in layer.uses:
            if how.criterion in ("wanda", "gblm"):
                found[use.moments] = None
            if how.update:
                found[use.gram] = None
        if how.criterion == "gblm":
            found[GradientsOf(layer.name)] = None
    return list(found)


def scores(layer: Layer, matrices: Array, how: How, statistics: Mapping[Any, Any]) -> Array:
    """What each weight of a layer is worth, ``(groups, outputs, columns)``, none negative.

    - magnitude: ``|w|``;
    - wanda (2023): ``|w| * |x|``, with the norm of the weight's input over all rows;
    - gblm (2023): ``|w| * (|x| + alpha * c * |g|)``, with the norm of the weight's gradient over all samples, and ``c``
      that makes the two norms equal in the mean: the paper's factor of 100 only fits its own models.
    """
    size: Array = np.abs(matrices)
    match how.criterion:
        case "random":
            key = zlib.crc32(layer.name.encode())
            return np.asarray(np.random.default_rng((how.seed, key)).random(matrices.shape, dtype=np.float32))
        case "wanda":
            return np.asarray(size * _norms(layer, statistics)[:, None, :], dtype=np.float32)
        case "gblm":
            norms = _norms(layer, statistics)[:, None, :]
            squares = statistics[GradientsOf(layer.name)].squares
            gradients = np.sqrt(layer.uses[0].matrices(squares))
            mean = float(gradients.mean())
            factor = how.alpha * float(norms.mean()) / mean if mean > 0 else 0.0
            return np.asarray(size * (norms + factor * gradients), dtype=np.float32)
    return size


def _norms(layer: Layer, statistics: Mapping[Any, Any]) -> Array:
    """The norm of each column's input over all rows, ``(groups or 1, columns)``."""
    total: Array | None = None
    for use in layer.uses:
        squares = np.atleast_2d(statistics[use.moments].squares)
        total = squares if total is None else total + squares
    assert total is not None
    return np.repeat(np.sqrt(total), layer.kernel, axis=1)


def _gram(layer: Layer, statistics: Mapping[Any, Any]) -> Array:
    """The Gram matrices of the columns' inputs, ``(groups or 1, columns, columns)``."""
    total: Array | None = None
    for use in layer.uses:
        products = statistics[use.gram].products
        products = products.reshape(-1, *products.shape[-2:])
        total = products if total is None else total + products
    assert total is not None
    return total


def sparse(layer: Layer, ratio: float, how: How, statistics: Mapping[Any, Any]) -> tuple[ir.TensorProtocol, int]:
    """A layer's sparse weight, and how many of its elements became zero that were not.

    Args:
        layer: The layer.
        ratio: The part that it loses.
        how: How.
        statistics: What :func:`requests` asked for.

    Raises:
        BadInput: The weight has NaN or infinity.
    """
    matrices = layer.matrices()
    if not np.isfinite(matrices).all():
        raise BadInput("a weight holds NaN or infinity; it cannot be ranked", where=layer.name, hint="exclude it")
    before = int(np.count_nonzero(matrices))
    ordered = _Columns(layer, how.pattern)
    keep: Array | None = None
    if how.criterion != "sparsegpt":
        ranked = ordered(scores(layer, matrices, how, statistics))
        keep = np.stack([how.pattern.keep(each, ratio, by_row=how.by_row) for each in ranked])
        del ranked
    if not how.update:
        assert keep is not None
        places = ordered.back(keep)
        gone = before - int(np.count_nonzero(matrices[places]))
        return _masked(layer, np.packbits(layer.uses[0].restored(places))), gone
    grams = _gram(layer, statistics)
    new = np.empty(matrices.shape, dtype=matrices.dtype)
    inner = ordered(matrices)
    group = how.pattern.group
    for i in range(layer.group):
        gram = ordered.square(grams[min(i, len(grams) - 1)])
        projector: sweep.Projector = (
            sweep.Masked(keep[i]) if keep is not None else sweep.Saliency(how.pattern, ratio, by_row=how.by_row)
        )
        block = sweep.BLOCK // group * group if group else sweep.BLOCK
        swept = sweep.sweep(inner[i], gram, projector, damp=how.damp, block=max(block, group))
        new[i] = sweep.no_worse(inner[i], swept, gram)
    return layer.tensor(ordered.back(new)), before - int(np.count_nonzero(new))


class _Columns:
    """The order of columns in which a pattern is looked for: consecutive ones are channels, not kernel elements."""

    def __init__(self, layer: Layer, pattern: Pattern) -> None:
        self._order: Array | None = None
        if layer.kernel > 1 and (pattern.group or pattern.tile[1] > 1):
            self._order = np.arange(layer.shape[1]).reshape(-1, layer.kernel).T.reshape(-1)
            self._inverse = np.argsort(self._order)

    def __call__(self, matrices: Array) -> Array:
        return matrices if self._order is None else matrices[..., self._order]

    def back(self, matrices: Array) -> Array:
        return matrices if self._order is None else matrices[..., self._inverse]

    def square(self, gram: Array) -> Array:
        return gram if self._order is None else gram[np.ix_(self._order, self._order)]


def _masked(layer: Layer, bits: Array) -> ir.TensorProtocol:
    """The weight with zeros where the mask has none, made from the old one whenever it is read."""
    held = layer.held
    lazy = partial(_read, held, bits)
    if held.size <= edit.SMALL:
        return lazy()
    return ir.LazyTensor(lazy, dtype=held.dtype, shape=ir.Shape(held.shape.numpy()), name=held.name, cache=False)


def _read(held: ir.TensorProtocol, bits: Array) -> ir.TensorProtocol:
    array = held.numpy()
    keep = np.unpackbits(bits, count=array.size).astype(bool).reshape(array.shape)
    made = np.where(keep, array, np.zeros((), dtype=array.dtype))
    del array
    edit.release(held)
    return ir.Tensor(made, dtype=held.dtype, name=held.name)
