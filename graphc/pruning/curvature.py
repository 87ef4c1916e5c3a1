"""Optimal brain surgery for whole units: what is lost when the remaining channels make up for the removed ones.

For a consumer ``y = W x`` and the covariance ``C`` of ``x``, removing the channels ``P`` and refitting the rest with
an intercept costs ``tr(W_P ([C^-1]_PP)^-1 W_PT)`` per row; removing one after the other and downdating ``C^-1`` comes
to the same weights as least squares on what is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphc.axes.groups import Group, Groups
from graphc.contract import Context, Needs
from graphc.edit import Array
from graphc.pruning.consumers import Consumer, consumers, obstacle

ROUNDS = 24
"""In so many rounds all units of a group are removed; scores are found anew in each."""

DAMPING = 0.01
"""What is added to the diagonal of a Gram matrix, as a part of its mean."""


def needs(groups: Groups, chosen: Sequence[Group]) -> Needs:
    """The Gram matrices of what all consumers read."""
    return Needs(frozenset(each.contraction.gram for group in chosen for each in consumers(group)))


def damped(centred: Array, damping: float = DAMPING) -> Array:
    """A Gram matrix, with its diagonal raised; a channel that never varies gets the unit matrix."""
    diagonal = np.diagonal(centred)
    mean = float(diagonal.mean())
    return np.asarray(centred + np.eye(len(centred)) * (damping * mean if mean > 0 else 1.0))


def block_losses(weight: Array, inverse: Array, blocks: Sequence[Array]) -> Array:
    """``tr(W_P ([H^-1]_PP)^-1 W_PT)`` for each block ``P`` of columns of ``W (m, n)``."""
    if all(len(block) == 1 for block in blocks):
        columns = np.concatenate(blocks)
        return np.asarray(np.square(weight[:, columns]).sum(axis=0) / np.diagonal(inverse)[columns])
    found = []
    for block in blocks:
        part = weight[:, block]
        found.append(float((part * np.linalg.solve(inverse[np.ix_(block, block)], part.T).T).sum()))
    return np.array(found)


def remove(weight: Array, inverse: Array, gone: Array) -> None:
    """Remove columns in place: the others of ``W`` make up for them, and ``H^-1`` becomes that of the rest."""
    factor = np.linalg.solve(inverse[np.ix_(gone, gone)], inverse[gone])
    weight -= weight[:, gone] @ factor
    weight[:, gone] = 0
    inverse -= inverse[:, gone] @ factor


def obs(groups: Groups, group: Group, context: Context) -> Array | str:
    """What each unit costs at the moment when it is the cheapest to remove, never less than those before it.

    It is a part of the variance of all that its consumers give, so that layers of any scale can be compared.
    """
    found = consumers(group)
    if not found:
        return obstacle(group)
    problems = [problem for each in found for problem in _problems(groups, group, each, context)]
    whole = sum(_energy(each, context) for each in found) or 1.0
    shape = (*group.blocks, group.size)
    scores = np.zeros(int(np.prod(shape, dtype=np.int64)))
    left = np.arange(len(scores))
    step = max(1, -(-len(left) // ROUNDS))
    highest = 0.0
    while len(left):
        losses = np.zeros(len(left))
        for weight, inverse, blocks in problems:
            losses += block_losses(weight, inverse, [blocks[unit] for unit in left])
        order = np.argsort(losses, kind="stable")[:step]
        for at in order:
            highest = max(highest, float(losses[at]))
            scores[left[at]] = highest
        gone = left[order]
        left = np.delete(left, order)
        if len(left):
            for weight, inverse, blocks in problems:
                columns = np.concatenate([blocks[unit] for unit in gone])
                if len(columns):
                    remove(weight, inverse, columns)
    return scores.reshape(shape) / whole


def _energy(consumer: Consumer, context: Context) -> float:
    """The variance of what a consumer gives, summed over outputs and rows."""
    gram = context.statistics[consumer.contraction.gram]
    matrices = consumer.matrices
    centred = np.broadcast_to(gram.centred, (len(matrices), *gram.centred.shape[-2:]))
    return float(sum(((weight @ each) * weight).sum() for weight, each in zip(matrices, centred, strict=True)))


def _problems(
    groups: Groups, group: Group, consumer: Consumer, context: Context
) -> list[tuple[Array, Array, list[Array]]]:
    """For each matrix of a consumer: it, the inverse of its damped Gram matrix, and the columns of each unit."""
    gram = context.statistics[consumer.contraction.gram]
    matrices = consumer.matrices
    centred = gram.centred if gram.centred.ndim == 3 else gram.centred[None]
    blocks = unit_columns(groups, group, consumer)
    made = []
    for g, weight in enumerate(matrices):
        inverse = np.linalg.inv(damped(centred[g if len(centred) > 1 else 0]))
        made.append((weight.copy(), inverse, [columns[g] for columns in blocks]))
    return made


def unit_columns(groups: Groups, group: Group, consumer: Consumer) -> list[list[Array]]:
    """For each unit (over blocks, flat), and each matrix of a consumer, the unit's columns."""
    count = int(np.prod((*group.blocks, group.size), dtype=np.int64))
    contraction = consumer.contraction
    shape = contraction.matrices(np.zeros(contraction.shape, dtype=np.int8)).shape
    owner = groups.labels(group, consumer.place, contraction.shape)
    owners = contraction.matrices(np.broadcast_to(owner, contraction.shape))[:, 0, :]
    found: list[list[Array]] = [[np.zeros(0, dtype=np.int64)] * shape[0] for _ in range(count)]
    for g in range(shape[0]):
        order = np.argsort(owners[g], kind="stable")
        kinds, starts = np.unique(owners[g][order], return_index=True)
        for kind, columns in zip(kinds, np.split(order, starts[1:]), strict=True):
            if kind >= 0:
                found[kind][g] = np.sort(columns)
    return found
