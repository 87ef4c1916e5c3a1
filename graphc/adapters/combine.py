"""Several adapters made into one change of each weight."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from graphc.adapters import merging
from graphc.adapters.changes import Change, Dense, LowRank
from graphc.adapters.targets import Target
from graphc.contract import option, spec_text
from graphc.edit import Array
from graphc.errors import BadInput, nearest

Parts = Sequence[tuple[float, LowRank]]
"""Weights of adapters and their low-rank changes."""


@dataclass(frozen=True)
class Combine:
    """How adapters are combined. ``cat`` adds them up exactly; the others are the methods of these names.

    ``linear``, ``ties``, ``dare_linear``, ``dare_ties`` and ``magnitude_prune`` work on the factors A and B, as PEFT
    does, or with ``of=delta`` on their products; with ``_svd`` behind the name, and for ``svd``, the product is brought
    to a low rank again. ``della`` and ``star`` work on products.
    """

    density: float = option(0.5, "the share of elements that is kept (ties, dare, magnitude_prune, della)")
    sign: Literal["total", "frequency"] = option("total", "how a sign is elected (ties, dare_ties, della)")
    of: Literal["factors", "delta"] = option("factors", "work on 'factors' or on their product, the 'delta'")
    rank: int = option(0, "rank of the result of svd; 0 is the largest of the adapters'")
    epsilon: float = option(0.1, "della: how far probabilities go from the density, up and down")
    scale: float = option(1.0, "della: factor of the result")
    eta: float = option(0.4, "star: the share of the nuclear norm that is kept")
    method: str = "cat"

    def spec(self) -> str:
        """As text."""
        return spec_text(self.method, dataclasses.replace(self, method="cat"))


_ON_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
_PROJECTED = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
METHODS = ("cat", *_ON_FACTORS, *_PROJECTED, "della", "star")


def parse(text: str) -> Combine:
    """Read ``method{option=value ...}``.

    Raises:
        BadInput: There is no such method or option, or a value does not fit.
    """
    from graphc.recipe import build, specs

    parsed = specs(text)
    if len(parsed) != 1:
        raise BadInput("--adapter-combine takes one method", where=repr(text), hint="e.g. ties{density=0.5}")
    name, options = parsed[0]
    name = name.replace("-", "_")
    if name not in METHODS or "method" in options:
        raise BadInput(f"there is no way to combine adapters called '{name}'", hint=nearest(name, METHODS))
    found = dataclasses.replace(build(Combine, name, options, "--adapter-combine"), method=name)
    if not (0 < found.density <= 1 and 0 < found.eta <= 1 and found.rank >= 0 and found.epsilon >= 0):
        raise BadInput(f"'{found.spec()}' is out of range", why="0 < density, eta <= 1; rank, epsilon >= 0")
    if name == "della" and not 0 <= found.density - found.epsilon <= found.density + found.epsilon <= 1:
        raise BadInput(f"'{found.spec()}' is out of range", why="density ± epsilon must be within 0 and 1")
    return found


def combined(targets: Sequence[Target], how: Combine, seed: int, rank: int) -> tuple[tuple[float, Change], ...]:
    """The changes of one parameter by several adapters, made into what is added to it.

    Args:
        targets: What each adapter wants, in the order in which they were given.
        how: The method.
        seed: Of what is random; each parameter and adapter has its own numbers.
        rank: The largest rank of the adapters.

    Raises:
        BadInput: The method does not know what to do with such changes.
    """
    if how.method == "cat":
        return tuple((target.folder.weight, target.change) for target in targets)
    parts = []
    for target in targets:
        change = target.change
        if not isinstance(change, LowRank):
            raise target.folder.bad(
                f"'{how.method}' combines plain LoRA only", f"'{target.name}' has {change.what}", "use cat"
            )
        parts.append((target.folder.weight, change))
    if len({part.shape for _, part in parts}) > 1:
        shapes = " and ".join(str(list(part.shape)) for _, part in parts)
        raise targets[1].folder.bad(f"the adapters of '{targets[0].name}' differ in shape", shapes)
    rngs = [np.random.default_rng((seed, zlib.crc32(targets[0].name.encode()), i)) for i in range(len(parts))]
    return ((1.0, _merged(parts, how, rngs, how.rank or rank, targets[0])),)


def _merged(parts: Parts, how: Combine, rngs: list[np.random.Generator], rank: int, target: Target) -> Change:
    name = f"LoRA combined by {how.method}"
    if how.method in _ON_FACTORS and how.of == "factors":
        if len({part.rank for _, part in parts}) > 1:
            ranks = " and ".join(str(part.rank) for _, part in parts)
            hint = "use cat, svd or of=delta"
            raise target.folder.bad(f"'{how.method}' needs adapters of one rank", f"'{target.name}': {ranks}", hint)
        return _on_factors(parts, how, rngs, name, signed_left=target.kind == "table")
    if how.method == "star":
        made = [merging.truncated(part.scale * _f64(part.left), _f64(part.right), how.eta) for _, part in parts]
        left = np.concatenate([weight * left for (weight, _), (left, _) in zip(parts, made, strict=True)], axis=1)
        return LowRank(left, np.concatenate([right for _, right in made]), 1.0, name)
    if how.method == "svd":
        left = np.concatenate([weight * part.scale * _f64(part.left) for weight, part in parts], axis=1)
        u, values, v = merging.svd(left, np.concatenate([_f64(part.right) for _, part in parts]))
        return LowRank(u[:, :rank] * values[:rank], v[:rank], 1.0, name)
    weights = np.array([weight for weight, _ in parts])
    states = [rng.bit_generator.state for rng in rngs]

    def dense() -> Array:
        for rng, state in zip(rngs, states, strict=True):  # the same numbers whenever it is computed
            rng.bit_generator.state = state
        return _merge(merging.stacked([part.dense() for _, part in parts]), weights, how, rngs)

    if how.method in _PROJECTED:
        left, right = merging.projected(dense(), rank)
        return LowRank(left, right, 1.0, name)
    return Dense(dense, name, parts[0][1].shape)


def _on_factors(
    parts: Parts, how: Combine, rngs: list[np.random.Generator], name: str, *, signed_left: bool
) -> LowRank:
    """A and B combined each for itself, with the roots of the weights in either and their signs in A."""
    factors = np.array([weight * part.scale for weight, part in parts])
    roots = np.sqrt(np.abs(factors))
    signed = roots * np.where(factors < 0, -1, 1)
    left_weights, right_weights = (signed, roots) if signed_left else (roots, signed)
    right = _merge(merging.stacked([part.right for _, part in parts]), right_weights, how, rngs)
    left = _merge(merging.stacked([part.left for _, part in parts]), left_weights, how, rngs)
    return LowRank(left, right, 1.0, name)


def _merge(tasks: Array, weights: Array, how: Combine, rngs: list[np.random.Generator]) -> Array:
    def each(prune: Callable[[Array, np.random.Generator], Array]) -> Array:
        return np.stack([prune(task, rng) for task, rng in zip(tasks, rngs, strict=True)])

    match how.method.removesuffix("_svd"):
        case "magnitude_prune":
            return merging.weighted(each(lambda task, _: merging.largest(task, how.density)), weights)
        case "ties":
            kept = each(lambda task, _: merging.largest(task, how.density))
            return merging.elected(kept, weights, how.sign)
        case "dare_linear":
            return merging.weighted(each(lambda task, rng: merging.dropped(task, how.density, rng)), weights)
        case "dare_ties":
            kept = each(lambda task, rng: merging.dropped(task, how.density, rng))
            return merging.elected(kept, weights, how.sign)
        case "della":
            kept = each(lambda task, rng: merging.sampled(task, how.density, how.epsilon, rng))
            return how.scale * merging.elected(kept, weights, how.sign)
    return merging.weighted(tasks, weights)


def _f64(array: Array) -> Array:
    return array.astype(np.float64)
