"""Which units of which groups are dead: wherever their axis is summed away, they contribute nothing.

A unit of a group may be removed exactly when at every *site*, a place where the group's axis vanishes, its
term is zero: because the activation is zero there, or because the weight that meets it is. At a site that
divides by a count of the axis, or compares along it, the unit itself must hold the neutral element (0, or
minus infinity). Where a unit's term is a constant other than zero, it can be folded into a bias first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.axes.algebra import Axis, leaves
from graphc.axes.groups import Group, Groups, unit_map
from graphc.edit import Array, attribute
from graphc.known import Facets, Knowledge, collapse
from graphc.known_rules import bottom, matmul_letters, unpadded

PRODUCTS = frozenset("MatMul FusedMatMul Gemm Einsum Conv FusedConv ConvTranspose LSTM GRU RNN".split())
"""Operators whose sums are of products of two operands."""
RECURRENT = ("LSTM", "GRU", "RNN")

Mask = Array
"""Booleans, broadcastable to a value's shape with the same rank: an axis of length 1 speaks for all its indices."""


@dataclass(frozen=True)
class Dead:
    """What is known of one group's units, boolean, ``(size,)`` or ``(*blocks, size)``.

    Attributes:
        silent: Units whose terms are all zero.
        constant: Units that are silent once constants were folded into biases; includes ``silent``.
    """

    silent: Array
    constant: Array


@dataclass(frozen=True)
class Site:
    """A place where a group's axis vanishes.

    Attributes:
        node: The operator.
        operand: Its input that has the axis.
        axis: The operand's axis; -1 where the group runs through several and it is not clear which one is meant.
        what: ``"summed"``: contracted. ``"~"``: averaged. ``"^"``: compared along the axis.
    """

    node: ir.Node
    operand: ir.Value
    axis: int
    what: str


class Sites:
    """All sites of a model's groups, by group."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        key = {leaf: group.name for group in groups for leaf in (group.leaf, *(group.numbers or ()))}
        self._by_group: dict[str, list[Site]] = {group.name: [] for group in groups}
        for fact in groups.trace.facts:
            if fact.what == "fixed" or fact.source is None or fact.operand is None:
                continue
            for name in {key[leaf] for leaf in leaves(fact.axis) if leaf in key}:
                at = self._position(fact.operand, fact.axis, groups[name])
                self._by_group[name].append(Site(fact.source, fact.operand, at, fact.what))
        for node in groups.model.graph:
            # The state is fed back: it meets the columns of R in every step.
            if edit.is_op(node, *RECURRENT) and node.inputs[2] is not None:
                axes = groups.trace.axes.get(node.inputs[2]) or ()
                for name in {key[leaf] for leaf in leaves(axes[-1]) if leaf in key} if axes else ():
                    self._by_group[name].append(Site(node, node.inputs[2], len(axes) - 1, "summed"))

    def _position(self, operand: ir.Value, wanted: Axis, group: Group) -> int:
        """Which axis of an operand a fact is about."""
        axes = self.groups.trace.axes.get(operand) or ()
        same = [i for i, axis in enumerate(axes) if axis is wanted]
        ties = group.numbers or {}
        through = [i for i, axis in enumerate(axes) if any(x is group.leaf or x in ties for x in leaves(axis))]
        if len(through) == 1:
            return through[0]
        return same[0] if len(same) == 1 else -1

    def of(self, group: Group) -> list[Site]:
        """Where the units of a group are read together."""
        return self._by_group[group.name]

    def indices(self, value: ir.Value, leaf: Axis, ties: Mapping[Axis, int] | None = None) -> list[Array | None]:
        """For each axis of a value, the index along ``leaf`` of every position, -1 for none; None for other axes.

        Args:
            value: Any value of the model.
            leaf: A group's leaf, or that of one of its blocks.
            ties: ``Group.numbers`` of a leaf with index ties.
        """
        result: list[Array | None] = []
        for axis in self.groups.trace.axes[value] or ():
            found = isinstance(axis.size, int) and any(x is leaf or x in (ties or {}) for x in leaves(axis))
            result.append(unit_map(axis, leaf, dict(ties) if ties else None) if found else None)
        return result


def find(sites: Sites, known: Knowledge) -> dict[str, Dead]:
    """The dead units of every group that has any."""
    found = {}
    for group in sites.groups:
        dead = units(sites, group, known)
        if dead.constant.any():
            found[group.name] = dead
    return found


def keepable(group: Group, dead: Array) -> Array | None:
    """The mask that removes as many of the dead units as the group's constraints allow; None if it removes none.

    Args:
        group: The group.
        dead: ``(size,)`` or ``(*blocks, size)``. Each block of a balanced group loses equally many.
    """
    fewest = int(dead.sum(axis=-1).min())
    kept = max(group.size - fewest, group.min_keep, 1)
    kept = -(-kept // group.multiple_of) * group.multiple_of
    count = group.size - kept
    if count <= 0:
        return None
    order = np.argsort(~dead, axis=-1, kind="stable")[..., :count]
    keep = np.ones(dead.shape, dtype=bool)
    np.put_along_axis(keep, order, False, axis=-1)
    return keep


def units(sites: Sites, group: Group, known: Knowledge) -> Dead:
    """The dead units of one group."""
    shape = (*group.blocks, group.size)
    silent, constant = np.ones(shape, dtype=bool), np.ones(shape, dtype=bool)
    by_node: dict[ir.Node, list[Site]] = {}
    for site in sites.of(group):
        by_node.setdefault(site.node, []).append(site)
    if not by_node:
        return Dead(np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool))
    for node, here in by_node.items():
        if any(site.what == "^" for site in here):
            here = [site for site in here if site.what == "^"]
        proofs, steady = [], np.zeros(shape, dtype=bool)
        for site in here:
            mask = _silent(node, site, known)
            proofs.append(_by_unit(mask, site, sites, group))
            if (fold := Fold.at(node, site.operand, known)) is not None:
                steady |= _by_unit(_either(mask, fold.constant()), site, sites, group)
        # Every operand of a sum of products shows the same terms: it is enough that one proves them zero.
        quiet = np.logical_or.reduce(proofs) if _is_product(node) else np.logical_and.reduce(proofs)
        silent &= quiet
        constant &= quiet | steady
        if not constant.any():
            break
    return Dead(silent & constant, constant)


def _is_product(node: ir.Node) -> bool:
    """Whether a node sums products of its operands along every axis that it sums."""
    if node.op_type == "Attention":
        return node.domain in ("", "ai.onnx")
    return node.op_type in PRODUCTS


def _by_unit(mask: Mask, site: Site, sites: Sites, group: Group) -> Array:
    """Which units hold only marked positions of an operand."""
    shape = (*group.blocks, group.size)
    digits_along = sites.indices(site.operand, group.leaf, group.numbers)
    if site.axis < 0 or digits_along[site.axis] is None or mask.ndim != len(digits_along):
        return np.zeros(shape, dtype=bool)
    own = [digits if axis == site.axis else None for axis, digits in enumerate(digits_along)]
    located = [own, *(sites.indices(site.operand, outer) for outer in group.outer)]
    used = {axis for each in located for axis, digits in enumerate(each) if digits is not None}
    mask = mask.all(axis=tuple(a for a in range(mask.ndim) if a not in used), keepdims=True)
    lengths = []
    for axis, length in enumerate(mask.shape):
        digits = [each[axis] for each in located if each[axis] is not None]
        lengths.append(len(digits[0]) if digits else length)  # type: ignore[arg-type]
    open_positions = np.nonzero(~np.broadcast_to(mask, lengths))
    alive = np.zeros(shape, dtype=bool)
    index: list[Array] = []
    valid = np.ones(len(open_positions[0]), dtype=bool)
    for each in (*located[1:], located[0]):
        chosen = None
        for axis, digits in enumerate(each):
            if digits is not None:
                here = np.asarray(digits)[open_positions[axis]]
                chosen = here if chosen is None else np.maximum(chosen, here)
        index.append(chosen if chosen is not None else np.full(len(valid), -2))
    valid &= index[-1] >= 0
    for i, block in enumerate(index[:-1]):
        if (block == -2).all():
            # The operand does not run through this block: what lives here lives in all its blocks.
            size = group.blocks[i]
            for j in range(len(index)):
                index[j] = np.tile(index[j], size) if j != i else np.repeat(np.arange(size), len(valid))
            valid = np.tile(valid, size)
        else:
            valid &= block >= 0
    alive[tuple(part[valid] for part in index)] = True
    return ~alive


def zeros(facets: Facets) -> Mask | None:
    """Where a value is known to be zero; None if nowhere."""
    result: Mask | None = None
    for facet in facets:
        here = facet == 0
        result = here if result is None else result | here
    return result


def _either(a: Mask, b: Mask | None) -> Mask:
    return a if b is None else a | b


def _nowhere(known: Knowledge, value: ir.Value) -> Mask:
    shape = known.shape(value)
    return np.zeros((1,) * len(shape or ()), dtype=bool)


def _silent(node: ir.Node, site: Site, known: Knowledge) -> Mask:
    """Where an operand's terms are neutral."""
    marked = bottom(site.operand, known) if site.what == "^" else zeros(known(site.operand))
    own = _either(_nowhere(known, site.operand), marked)
    if site.what != "summed":
        return own
    return _either(own, _silenced(node, site.operand, known))


def _silenced(node: ir.Node, operand: ir.Value, known: Knowledge) -> Mask | None:
    """Where the terms of an operand are zero because of what it is multiplied with."""
    match node.op_type:
        case "MatMul" | "FusedMatMul" | "Gemm" | "Einsum":
            letters = product_letters(node, known)
            if letters is None or len(node.inputs) < 2:
                return None
            return _across(node.inputs, letters, operand, known)
        case "Conv" | "FusedConv":
            return _convolution(node, operand, known)
        case "ConvTranspose":
            return _transposed_convolution(node, operand, known)
        case operator if operator in RECURRENT:
            return _recurrent(node, operand, known)
    return None


def product_letters(node: ir.Node, known: Knowledge) -> tuple[str, str] | None:
    """A letter for each axis of both operands of a product of two tensors."""
    shapes = [known.shape(v) for v in node.inputs[:2]]
    if any(s is None for s in shapes):
        return None
    if node.op_type == "Gemm":
        left = "km" if attribute(node, "transA", 0) else "mk"
        return left, "nk" if attribute(node, "transB", 0) else "kn"
    if node.op_type == "Einsum":
        terms = str(attribute(node, "equation", "")).replace(" ", "").partition("->")[0].split(",")
        if len(terms) != 2 or "." in "".join(terms) or any(len(set(t)) != len(t) for t in terms):
            return None
        return terms[0], terms[1]
    letters = matmul_letters(len(shapes[0] or ()), len(shapes[1] or ()))
    if letters is None or attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0):
        return None
    left, right = letters[0], letters[1]
    if attribute(node, "transA", 0):
        left = left[:-2] + "km"
    if attribute(node, "transB", 0):
        right = right[:-2] + "nk"
    return left, right


def _across(
    inputs: Sequence[ir.Value | None], letters: tuple[str, str], operand: ir.Value, known: Knowledge
) -> Mask | None:
    """Zeros of the other operand, seen along the axes that both have."""
    result: Mask | None = None
    for i in (0, 1):
        if inputs[i] is not operand:
            continue
        other = zeros(known(inputs[1 - i]))
        if other is None:
            continue
        mine, theirs = letters[i], letters[1 - i]
        other = other.all(axis=tuple(a for a, c in enumerate(theirs) if c not in mine), keepdims=True)
        kept = [c for c in theirs if c in mine]
        other = other.reshape([n for n, c in zip(other.shape, theirs, strict=True) if c in mine])
        other = other.transpose([kept.index(c) for c in mine if c in kept])
        here = other.reshape([other.shape[[c for c in mine if c in kept].index(c)] if c in kept else 1 for c in mine])
        # A tensor multiplied with itself: both roles must be silent.
        result = here if result is None else result & here
    return result


def _convolution(node: ir.Node, operand: ir.Value, known: Knowledge) -> Mask | None:
    x, w = node.inputs[0], node.inputs[1]
    group = attribute(node, "group", 1)
    if operand is x:
        taps = zeros(known(w))
        if taps is None:
            return None
        taps = taps.all(axis=tuple(range(2, taps.ndim)))
        rows = taps.reshape(group if taps.shape[0] > 1 else 1, -1, taps.shape[1]).all(axis=1)
        if rows.shape[1] > 1:
            rows = np.broadcast_to(rows, (group, rows.shape[1]))
        elif rows.shape[0] > 1:
            channels = known.shape(x)
            count = channels[1] if channels else None
            if not isinstance(count, int):
                return None
            rows = np.repeat(rows, count // group, axis=1)
        return rows.reshape(1, -1, *(1,) * (len(known.shape(x) or ()) - 2))
    dead = zeros(known(x))
    if dead is None:
        return None
    flat = collapse_mask(dead, keep=1)
    if flat.size > 1:
        flat = flat.reshape(group, -1).all(axis=0)
    return flat.reshape(1, -1, *(1,) * (len(known.shape(w) or ()) - 2))


def _transposed_convolution(node: ir.Node, operand: ir.Value, known: Knowledge) -> Mask | None:
    """Input channels are the weight's first axis."""
    x, w = node.inputs[0], node.inputs[1]
    source, target = (w, x) if operand is x else (x, w)
    dead = zeros(known(source))
    if dead is None:
        return None
    flat = collapse_mask(dead, keep=0 if source is w else 1)
    rank = len(known.shape(target) or ())
    return flat.reshape([-1 if a == (1 if target is x else 0) else 1 for a in range(rank)])


def collapse_mask(mask: Mask, keep: int) -> Array:
    """What holds along one axis for all indices of the others."""
    return mask.all(axis=tuple(a for a in range(mask.ndim) if a != keep)).reshape(-1)


def _recurrent(node: ir.Node, operand: ir.Value, known: Knowledge) -> Mask | None:
    """Inputs meet the columns of W, the state those of R."""
    x, w, r = node.inputs[:3]
    if operand is x and (dead := zeros(known(w))) is not None:
        return collapse_mask(dead, keep=2).reshape(1, 1, -1)
    if operand is w and (dead := zeros(known(x))) is not None:
        return collapse_mask(dead, keep=2).reshape(1, 1, -1)
    if operand is r and (dead := zeros(known(node.outputs[0]))) is not None and dead.ndim == 4:
        return dead.all(axis=(0, 2)).reshape(dead.shape[1], 1, dead.shape[3])
    return None


@dataclass(frozen=True)
class Fold:
    """A site whose constant terms can move into a bias: an activation meets a constant weight, and nothing is padded.

    Attributes:
        node: MatMul, Gemm or Conv.
        activation: The operand that is no constant.
        facets: What is known of it.
        rank: Its rank.
        axis: Its summed axis.
    """

    node: ir.Node
    activation: ir.Value
    facets: Facets
    rank: int
    axis: int

    @staticmethod
    def at(node: ir.Node, operand: ir.Value, known: Knowledge) -> Fold | None:
        """The fold of a node's constant terms, if it has one and ``operand`` is its activation."""
        if edit.tensor(operand) is not None or operand is not node.inputs[0] or len(node.inputs) < 2:
            return None
        held, shape = edit.tensor(node.inputs[1]), known.shape(operand)
        if held is None or shape is None or not held.dtype.is_floating_point() or operand is node.inputs[1]:
            return None
        rank = len(shape)
        match node.op_type:
            case "MatMul" if len(held.shape) == 2 and rank >= 2:
                axis = rank - 1
            case "Gemm" if not attribute(node, "transA", 0):
                axis = 1
            case "Conv" if unpadded(node):
                axis = 1
            case _:
                return None
        return Fold(node, operand, known(operand), rank, axis)

    def values(self) -> Array:
        """The constant of each index along the summed axis, NaN where it is none; length 1 if nothing is known."""
        result = np.full(1, np.nan)
        for facet in self.facets:
            flat = collapse(facet, [a for a in range(self.rank) if a != self.axis]).reshape(-1)
            result = np.where(np.isnan(result), flat, result)
        return np.where(np.isfinite(result), result, np.nan)

    def constant(self) -> Mask | None:
        flat = ~np.isnan(self.values())
        return flat.reshape([-1 if a == self.axis else 1 for a in range(self.rank)]) if flat.any() else None

    def bias(self, gone: Array) -> Array:
        """What the terms of the marked indices add to every output channel, float64."""
        values = np.where(gone, np.nan_to_num(self.values()), 0.0)
        weight = edit.constant(self.node.inputs[1])
        assert weight is not None
        if self.node.op_type == "MatMul":
            return values @ weight.astype(np.float64)
        if self.node.op_type == "Gemm":
            matrix = weight.T if attribute(self.node, "transB", 0) else weight
            return float(attribute(self.node, "alpha", 1.0)) * (values @ matrix.astype(np.float64))
        group = attribute(self.node, "group", 1)
        taps = weight.reshape(*weight.shape[:2], -1).sum(axis=2, dtype=np.float64)
        rows = taps.reshape(group, -1, taps.shape[1])
        return np.einsum("goi,gi->go", rows, values.reshape(group, -1)).reshape(-1)


def folds(sites: Sites, group: Group, gone: Array, known: Knowledge) -> Iterator[tuple[Fold, Array]]:
    """The sites where units that go are constants other than zero, each with the indices of the summed axis.

    Args:
        sites: The sites of the model.
        group: The group.
        gone: The units that go, ``(size,)`` or ``(*blocks, size)``.
        known: What is known of the model's values.
    """
    for site in sites.of(group):
        fold = Fold.at(site.node, site.operand, known)
        if fold is None or site.axis != fold.axis:
            continue
        digits = sites.indices(site.operand, group.leaf, group.numbers)[fold.axis]
        if digits is None:
            continue
        block = [sites.indices(site.operand, outer)[fold.axis] for outer in group.outer]
        if any(b is None for b in block):
            everywhere = gone.all(axis=tuple(range(gone.ndim - 1)))
            marked = (digits >= 0) & everywhere[digits]
        else:
            marked = (digits >= 0) & gone[(*block, digits)]  # type: ignore[misc]
        values = np.broadcast_to(fold.values(), digits.shape)
        marked &= ~np.isnan(values) & (values != 0)
        if marked.any():
            yield fold, marked
