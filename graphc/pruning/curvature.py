"""Optimal brain surgery for whole units: what is lost when the remaining channels make up for the removed ones.

For a consumer ``y = W x`` and the covariance ``C`` of ``x``, removing the channels ``P`` and refitting the rest with
an intercept costs ``tr(W_P ([C^-1]_PP)^-1 W_PT)`` per row; removing one after the other and downdating ``C^-1`` comes
to the same weights as least squares on what is kept.

With the Gram matrix ``G`` of the loss's gradient by ``y``, ``tr(G W_P ([C^-1]_PP)^-1 W_PT)`` is what the loss itself
rises by, to second order, with the Kronecker-factored curvature ``C x G`` (EigenDamage, Wang et al. 2019; LLM Surgeon,
van der Ouderaa et al. 2023). It can be compared between layers. ``G`` changes nothing about the best refit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphc.axes.groups import Group, Groups
from graphc.contract import Context, Needs
from graphc.edit import Array
from graphc.pruning.consumers import Consumer, consumers, obstacle

ROUNDS = 24
"""In so many rounds all units of a group are removed; scores are found anew in each."""

DAMPING = 0.01
"""What is added to the diagonal of a Gram matrix, as a part of it."""

FLOOR = 1e-4
"""The variance, as a part of the mean one, below which a channel is taken to vary by so much."""


def needs(groups: Groups, chosen: Sequence[Group]) -> Needs:
    """The Gram matrices of what all consumers read."""
    return Needs(frozenset(each.contraction.gram for group in chosen for each in consumers(group)))


def surgeon_needs(groups: Groups, chosen: Sequence[Group]) -> Needs:
    """The same, and those of the gradients by what they give."""
    found = (each.contraction.output_gradients for group in chosen for each in consumers(group))
    return Needs(needs(groups, chosen).statistics | frozenset(found))


def damped(centred: Array, damping: float = DAMPING) -> Array:
    """A Gram matrix, with its diagonal raised; where no channel varies it becomes the unit matrix.

    Each channel is raised by a part of its own variance, so that scales do not matter. Language models have channels
    of 10^5 times the variance of the others ("massive activations", Sun et al. 2024): a part of the mean, which is
    usual, would drown those others.
    """
    result = centred.copy()
    diagonal = np.diagonal(result)
    mean = float(diagonal.mean())
    ridge = damping * np.maximum(diagonal, FLOOR * mean) if mean > 0 else 1.0
    np.fill_diagonal(result, diagonal + ridge)
    return result


def remove(weight: Array, inverse: Array, gone: Array) -> None:
    """Remove columns in place: the others of ``W`` make up for them, and ``H^-1`` becomes that of the rest."""
    factor = np.linalg.solve(inverse[np.ix_(gone, gone)], inverse[gone])
    weight -= weight[:, gone] @ factor
    weight[:, gone] = 0
    inverse -= inverse[:, gone] @ factor


@dataclass
class Problem:
    """One matrix of a consumer while units are removed from it; only the columns that are left are held.

    Attributes:
        weight: ``(outputs, columns)``, with all that was removed made up for.
        inverse: Of the damped Gram matrix of these columns.
        owner: The unit of each column, -1 for none.
    """

    weight: Array
    inverse: Array
    owner: Array

    def losses(self, units: Array) -> Array:
        """``tr(W_P ([H^-1]_PP)^-1 W_PT)`` for the columns ``P`` of each unit."""
        order = np.argsort(self.owner, kind="stable")
        starts = np.searchsorted(self.owner[order], units)
        sizes = np.searchsorted(self.owner[order], units, side="right") - starts
        found = np.zeros(len(units))
        for size in np.unique(sizes[sizes > 0]):
            which = np.flatnonzero(sizes == size)
            columns = order[starts[which][:, None] + np.arange(size)]
            if size == 1:
                alone = columns[:, 0]
                found[which] = np.square(self.weight[:, alone]).sum(axis=0) / np.diagonal(self.inverse)[alone]
                continue
            blocks = self.inverse[columns[:, :, None], columns[:, None, :]]
            parts = self.weight.T[columns]
            found[which] = (parts * np.linalg.solve(blocks, parts)).sum(axis=(1, 2))
        return found

    def remove(self, units: Array) -> None:
        """Remove the columns of units: the others make up for them, and the inverse becomes that of the rest."""
        gone = np.isin(self.owner, units)
        if not gone.any():
            return
        left = ~gone
        factor = np.linalg.solve(self.inverse[np.ix_(gone, gone)], self.inverse[np.ix_(gone, left)])
        weight = self.weight[:, left]
        weight -= self.weight[:, gone] @ factor
        inverse = self.inverse[np.ix_(left, left)]
        inverse -= self.inverse[np.ix_(left, gone)] @ factor
        self.weight, self.inverse, self.owner = weight, inverse, self.owner[left]


def obs(groups: Groups, group: Group, context: Context) -> Array | str:
    """What each unit costs at the moment when it is the cheapest to remove, never less than those before it.

    It is a part of the variance of all that its consumers give, so that layers of any scale can be compared.
    """
    found = consumers(group)
    if not found:
        return obstacle(group)
    problems = [problem for each in found for problem in _problems(groups, group, each, context)]
    return _sweep(group, problems) / (sum(_energy(each, context) for each in found) or 1.0)


def surgeon(groups: Groups, group: Group, context: Context) -> Array | str:
    """The same, but what the loss is expected to rise by; see the module."""
    found = consumers(group)
    if not found:
        return obstacle(group)
    problems = []
    for each in found:
        roots = _sensitivities(each, context)
        for g, problem in enumerate(_problems(groups, group, each, context)):
            # W meets x and G apart: with G = R RT, the cost of RT W is that of W under G.
            problem.weight = roots[g if len(roots) > 1 else 0].T @ problem.weight
            problems.append(problem)
    return _sweep(group, problems)


def _sweep(group: Group, problems: Sequence[Problem]) -> Array:
    """Remove all units, the cheapest first: what each costs when it goes, ``(*blocks, size)``."""
    shape = (*group.blocks, group.size)
    scores = np.zeros(int(np.prod(shape, dtype=np.int64)))
    left = np.arange(len(scores))
    step = max(1, -(-len(left) // ROUNDS))
    highest = 0.0
    while len(left):
        losses = np.zeros(len(left))
        for problem in problems:
            losses += problem.losses(left)
        order = np.argsort(losses, kind="stable")[:step]
        for at in order:
            highest = max(highest, float(losses[at]))
            scores[left[at]] = highest
        gone = left[order]
        left = np.delete(left, order)
        if len(left):
            for problem in problems:
                problem.remove(gone)
    return scores.reshape(shape)


def _energy(consumer: Consumer, context: Context) -> float:
    """The variance of what a consumer gives, summed over outputs and rows."""
    gram = context.statistics[consumer.contraction.gram]
    matrices = consumer.matrices
    centred = np.broadcast_to(gram.centred, (len(matrices), *gram.centred.shape[-2:]))
    return float(sum(((weight @ each) * weight).sum() for weight, each in zip(matrices, centred, strict=True)))


def _sensitivities(consumer: Consumer, context: Context) -> list[Array]:
    """Of each matrix, a root ``R`` of the mean Gram matrix ``R RT`` of the gradient by its outputs."""
    found = context.statistics[consumer.contraction.output_gradients]
    products = found.products if found.products.ndim == 3 else found.products[None]
    roots = []
    for each, count in zip(products, np.maximum(np.atleast_1d(found.count), 1), strict=True):
        values, vectors = np.linalg.eigh(each / count)
        roots.append(vectors * np.sqrt(np.maximum(values, 0)))
    return roots


def _problems(groups: Groups, group: Group, consumer: Consumer, context: Context) -> list[Problem]:
    """One for each matrix of a consumer."""
    gram = context.statistics[consumer.contraction.gram]
    matrices = consumer.matrices
    centred = gram.centred if gram.centred.ndim == 3 else gram.centred[None]
    owners = column_owners(groups, group, consumer)
    inverses = [np.linalg.inv(damped(each)) for each in centred]
    return [Problem(weight, inverses[g if len(inverses) > 1 else 0], owners[g]) for g, weight in enumerate(matrices)]


def column_owners(groups: Groups, group: Group, consumer: Consumer) -> Array:
    """For each matrix of a consumer, the unit (over blocks, flat) of each column, -1 for none."""
    contraction = consumer.contraction
    owner = groups.labels(group, consumer.place, contraction.shape)
    return contraction.matrices(np.broadcast_to(owner, contraction.shape))[:, 0, :]


def unit_columns(groups: Groups, group: Group, consumer: Consumer) -> list[list[Array]]:
    """For each unit (over blocks, flat), and each matrix of a consumer, the unit's columns."""
    count = int(np.prod((*group.blocks, group.size), dtype=np.int64))
    owners = column_owners(groups, group, consumer)
    found: list[list[Array]] = [[np.zeros(0, dtype=np.int64)] * len(owners) for _ in range(count)]
    for g in range(len(owners)):
        order = np.argsort(owners[g], kind="stable")
        kinds, starts = np.unique(owners[g][order], return_index=True)
        for kind, columns in zip(kinds, np.split(order, starts[1:]), strict=True):
            if kind >= 0:
                found[kind][g] = np.sort(columns)
    return found
