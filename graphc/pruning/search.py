"""Searched allocations: how many units each group loses is chosen by measured losses.

Both give levels like any other order (see :mod:`graphc.pruning.density`): a group's units go at even steps up to the
number found for it, and the rest after that, so that the budget is met to one unit whatever was found.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphc.axes.groups import Group
from graphc.edit import Array
from graphc.pruning import allocation
from graphc.pruning.density import Levels, Setting, uniform

CURVE = 8
"""Points of each group's curve of measured losses."""

BUCKETS = 1 << 16
"""Steps of cost in the knapsack."""

STEPS = (1 / 8, 1 / 16, 1 / 32)
"""Parts of a group that a mutation moves: from coarse to fine."""

GENERATIONS, OFFSPRING, PARENTS = 6, 8, 2
"""Of each step of the evolution."""


def towards(counts: Sequence[int], chosen: Sequence[Group]) -> Levels:
    """Levels that reach these numbers of lost units all at the same time."""
    found = []
    for group, count in zip(chosen, counts, strict=True):
        steps = np.arange(group.size) + 0.5
        before = steps / max(count, 1)
        after = 1 + (steps - count) / max(group.size - count, 1)
        found.append(np.where(steps < count, before, after))
    return found


def knapsack(setting: Setting) -> Levels:
    """The numbers whose measured losses, group by group, add up to the least at the wanted cost."""
    assert setting.probe is not None
    whole = setting.cost({})
    options: list[list[tuple[int, float, float]]] = []
    for i, group in enumerate(setting.chosen):
        setting.context.progress("measuring losses of groups", i, len(setting.chosen))
        limit = setting.limits[group.name]
        counts = sorted(
            {group.size - limit.kept(group.size, group.size - group.size * k // CURVE) for k in range(CURVE)}
        )
        curve = []
        for count in counts:
            mask = allocation.lowest_removed(setting.scores[group.name], count)
            loss = setting.probe.loss({group.name: mask}) if count else 0.0
            curve.append((count, whole - setting.cost({group.name: count}), loss))
        options.append(curve)
    return towards(solve(options, whole * setting.ratio), setting.chosen)


def solve(options: Sequence[Sequence[tuple[int, float, float]]], saving: float) -> list[int]:
    """A multiple-choice knapsack by dynamic programming: one option each, enough saved, the least loss.

    Args:
        options: For each item, ``(what, what it saves, what it loses)``.
        saving: What must be saved; as much as can be, where that is less. What an option saves is rounded down to a
            step of it, of which there are ``BUCKETS``; what is then left over buys the largest gains that fit.

    Returns:
        What was chosen for each item.
    """
    saving = min(saving, sum(max(s for _, s, _ in curve) for curve in options))
    if saving <= 0:
        return [min(curve, key=lambda option: option[2])[0] for curve in options]
    best = np.full(BUCKETS + 1, np.inf)
    best[0] = 0.0
    picks = []
    for curve in options:
        after, pick = np.full(BUCKETS + 1, np.inf), np.zeros(BUCKETS + 1, dtype=np.int16)
        sources = []
        for index, (_, saved, loss) in enumerate(curve):
            step = int(max(0.0, min(saved / saving, 1.0)) * BUCKETS)
            total = np.full(BUCKETS + 1, np.inf)
            total[step:] = best[: BUCKETS + 1 - step] + loss
            # The last bucket holds all that saves at least what is asked for.
            last = BUCKETS - step + int(np.argmin(best[BUCKETS - step :]))
            total[-1] = best[last] + loss
            sources.append((step, last))
            better = total < after
            after[better], pick[better] = total[better], index
        best = after
        picks.append((pick, sources))
    at = int(np.flatnonzero(np.isfinite(best))[-1])
    chosen: list[int] = []
    for pick, sources in reversed(picks):
        index = int(pick[at])
        chosen.append(index)
        step, last = sources[index]
        at = last if at == BUCKETS else at - step
    chosen = _spent(options, chosen[::-1], saving)
    return [curve[index][0] for curve, index in zip(options, chosen, strict=True)]


def _spent(options: Sequence[Sequence[tuple[int, float, float]]], chosen: list[int], saving: float) -> list[int]:
    """The options chosen, each time the one exchanged by which most is gained of those that leave enough saved."""
    curves = [np.array([(saved, loss) for _, saved, loss in curve]) for curve in options]
    spare = sum(curve[index, 0] for curve, index in zip(curves, chosen, strict=True)) - saving
    while True:
        gains = []
        for i, (curve, index) in enumerate(zip(curves, chosen, strict=True)):
            fits = curve[index, 0] - curve[:, 0] <= spare + 1e-9 * saving
            losses = np.where(fits, curve[:, 1], np.inf)
            k = int(np.argmin(losses))
            gains.append((curve[index, 1] - losses[k], i, k))
        gain, i, k = max(gains)
        if not gain > 0:
            return chosen
        spare -= curves[i][chosen[i], 0] - curves[i][k, 0]
        chosen[i] = k


def evolution(setting: Setting) -> Levels:
    """Numbers found by evolution: units move from one group to another, and what loses least survives.

    As in Týr and DarwinLM: mutations move cost between two groups of one kind, in steps that get finer.
    """
    assert setting.probe is not None
    random = np.random.default_rng((setting.context.seed, 7))
    start = _counts(setting, uniform(setting))
    pool = [(_loss(setting, start), start)]
    total = len(STEPS) * GENERATIONS
    for number, part in enumerate(np.repeat(STEPS, GENERATIONS)):
        setting.context.progress("searching an allocation", number, total)
        children = []
        for _ in range(OFFSPRING):
            parent = pool[int(random.integers(len(pool)))][1]
            child = _counts(setting, towards(_mutated(setting, parent, float(part), random), setting.chosen))
            children.append((_loss(setting, child), child))
        unique = {tuple(counts): (value, counts) for value, counts in [*pool, *children]}
        pool = sorted(unique.values(), key=lambda each: each[0])[:PARENTS]
    return towards(pool[0][1], setting.chosen)


def _counts(setting: Setting, levels: Levels) -> list[int]:
    """The numbers of lost units that meet the budget along some levels."""
    removed = allocation.allocate(setting.chosen, levels, setting.ratio, setting.cost, setting.limits)
    return [removed.get(group.name, 0) for group in setting.chosen]


def _loss(setting: Setting, counts: Sequence[int]) -> float:
    assert setting.probe is not None
    removed = {group.name: count for group, count in zip(setting.chosen, counts, strict=True)}
    return setting.probe.loss(allocation.masks(setting.chosen, setting.scores, removed))


def _mutated(setting: Setting, counts: Sequence[int], part: float, random: np.random.Generator) -> list[int]:
    """Some numbers, with a part of one group's units moved to another of its kind."""
    result = list(counts)
    kinds: dict[str, list[int]] = {}
    for i, group in enumerate(setting.chosen):
        kinds.setdefault(group.kind, []).append(i)
    pairs: list[list[int]] = [members for members in kinds.values() if len(members) > 1] or [list(range(len(result)))]
    for _ in range(1 + int(random.integers(3))):
        members: Array = np.array(pairs[int(random.integers(len(pairs)))])
        if len(members) < 2:
            break
        more, less = random.choice(members, 2, replace=False)
        a, b = setting.chosen[more], setting.chosen[less]
        cost_a, cost_b = setting.unit_costs[a.name], setting.unit_costs[b.name]
        step_b = min(max(1, round(part * b.size)), result[less])
        step_a = max(1, round(step_b * cost_b / cost_a)) if cost_a > 0 else step_b
        room = a.size - setting.limits[a.name].kept(a.size, 0) - result[more]
        if step_b and step_a <= room:
            result[less] -= step_b
            result[more] += step_a
    return result
