"""AMP's criterion: how much a unit adds to what its consumer gives."""

from __future__ import annotations

import numpy as np

from graphc.axes.groups import Group, Groups
from graphc.contract import Context
from graphc.edit import Array
from graphc.pruning.consumers import consumers, obstacle
from graphc.pruning.curvature import unit_columns


def projection(groups: Groups, group: Group, context: Context) -> Array | str:
    """``sum over outputs i of sqrt(E[(W_iP x_P)^2])``.

    AMP takes the mean of absolute contributions over tokens, of which this is the root mean square: it follows from
    the Gram matrix, in which the channels of a head vary together.
    """
    found = consumers(group)
    if not found:
        return obstacle(group)
    scores = np.zeros(int(np.prod((*group.blocks, group.size), dtype=np.int64)))
    for each in found:
        gram = context.statistics[each.contraction.gram]
        products = gram.products if gram.products.ndim == 3 else gram.products[None]
        count = np.maximum(np.atleast_1d(gram.count), 1)
        matrices = each.matrices
        for unit, columns in enumerate(unit_columns(groups, group, each)):
            for g, at in enumerate(columns):
                if len(at):
                    h = g if len(products) > 1 else 0
                    part = matrices[g][:, at]
                    energy = np.einsum("mi,ij,mj->m", part, products[h][np.ix_(at, at)], part) / count[h]
                    scores[unit] += np.sqrt(np.maximum(energy, 0)).sum()
    return scores.reshape((*group.blocks, group.size))
