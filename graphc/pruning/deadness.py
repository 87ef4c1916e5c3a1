"""Which units of which groups are dead: wherever their axis is summed away, they contribute nothing.

A unit of a group may be removed exactly when at every *site*, a place where the group's axis vanishes, its
term is zero: because the activation is zero there, or because the weight that meets it is. At a site that
divides by a count of the axis, or compares along it, the unit itself must hold the neutral element (0, or
minus infinity). Where a unit's term is a constant other than zero, it can be folded into a bias first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphc.axes.groups import Group
from graphc.edit import Array
from graphc.known import Knowledge
from graphc.pruning.folding import Fold
from graphc.pruning.silence import Mask, either, is_product
from graphc.pruning.silence import silent as silent_at
from graphc.pruning.sites import Site, Sites


@dataclass(frozen=True)
class Dead:
    """What is known of one group's units, boolean, ``(size,)`` or ``(*blocks, size)``.

    Attributes:
        silent: Units whose terms are all zero.
        constant: Units that are silent once constants were folded into biases; includes ``silent``.
    """

    silent: Array
    constant: Array


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
            mask = silent_at(node, site, known)
            proofs.append(_by_unit(mask, site, sites, group))
            if (fold := Fold.at(node, site.operand, known)) is not None:
                steady |= _by_unit(either(mask, fold.constant()), site, sites, group)
        quiet = np.logical_or.reduce(proofs) if is_product(node) else np.logical_and.reduce(proofs)
        silent &= quiet
        constant &= quiet | steady
        if not constant.any():
            break
    return Dead(silent & constant, constant)


def _by_unit(mask: Mask, site: Site, sites: Sites, group: Group) -> Array:
    """Which units hold only marked positions of an operand."""
    shape = (*group.blocks, group.size)
    digits_along = sites.indices(site, group.leaf, group.numbers)
    if site.axis < 0 or digits_along[site.axis] is None or mask.ndim != len(digits_along):
        return np.zeros(shape, dtype=bool)
    own = [digits if axis == site.axis else None for axis, digits in enumerate(digits_along)]
    located = [own, *(sites.indices(site, outer) for outer in group.outer)]
    used = {axis for each in located for axis, digits in enumerate(each) if digits is not None}
    mask = np.asarray(mask.all(axis=tuple(a for a in range(mask.ndim) if a not in used), keepdims=True))
    lengths = []
    for axis, length in enumerate(mask.shape):
        here = [len(digits) for each in located if (digits := each[axis]) is not None]
        lengths.append(here[0] if here else length)
    open_positions = np.nonzero(~np.broadcast_to(mask, lengths))
    alive = np.zeros(shape, dtype=bool)
    index: list[Array] = []
    valid = np.ones(len(open_positions[0]), dtype=bool)
    for each in (*located[1:], located[0]):
        chosen = None
        for axis, digits in enumerate(each):
            if digits is not None:
                part = digits[open_positions[axis]]
                chosen = part if chosen is None else np.maximum(chosen, part)
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
