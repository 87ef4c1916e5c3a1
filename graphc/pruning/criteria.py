"""Criteria: how much each unit of a group matters. One function each, in one table.

A criterion gives a score per unit, shaped ``(size,)`` or, where every block of a group chooses for itself,
``(*blocks, size)``. Higher is more important; only the order within a group and, after normalisation, between
groups counts. A criterion that needs statistics declares them in ``needs``; the runner collects them and they
arrive in ``Context.statistics``. Where a criterion has nothing to say of a group, it gives the reason instead.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.axes.groups import Group, Groups, Place
from graphc.contract import Context, Needs
from graphc.edit import Array
from graphc.errors import BadInput, nearest
from graphc.pruning import activations, curvature, experts, probe, routers, taylor
from graphc.pruning.projection import projection


@dataclass(frozen=True)
class Criterion:
    """A way to score units.

    Attributes:
        score: Scores of one group's units, float64, ``(size,)`` or ``(*blocks, size)``; or why it has none.
        about: What it is, for the documentation.
        needs: What must have been collected before, given the model's groups and those to score; None for nothing.
        scaled: Whether scores of different groups can be compared as they are.
    """

    score: Callable[[Groups, Group, Context], Array | str]
    about: str
    needs: Callable[[Groups, Sequence[Group]], Needs] | None = None
    scaled: bool = False


def criterion(name: str) -> Criterion:
    """The criterion of this name.

    Raises:
        BadInput: There is none; the message has the nearest name.
    """
    if name not in CRITERIA:
        raise BadInput(f"there is no criterion '{name}'", hint=nearest(name, CRITERIA))
    return CRITERIA[name]


def magnitude(order: int) -> Callable[[Groups, Group, Context], Array]:
    """The L1 or L2 norm of everything that a unit's weights hold, where they produce and where they consume it.

    Scales, variances, rotary tables and other constants that are only carried along do not count.
    """

    def score(groups: Groups, group: Group, context: Context) -> Array:
        total: Array | None = None
        for place in group.places:
            held = edit.tensor(place.value)
            array = None if place.role == "carries" or held is None else _numbers(place.value, held)
            if array is None or held is None:
                continue
            part = _norm(groups, group, place, array, order)
            del array
            edit.release(held)
            if not np.isfinite(part).all():
                raise BadInput(
                    "a weight holds NaN or infinity; its units cannot be ranked",
                    where=str(place.value.name),
                    hint="repair the weight, or exclude its groups",
                )
            total = part if total is None else total + part
        if total is None:
            return np.zeros((*group.blocks, group.size))
        return np.sqrt(total) if order == 2 else total

    return score


CHUNK = 1 << 22
"""Elements of a weight that are looked at together, so that no copy of a large weight is made."""


def _numbers(value: ir.Value, held: ir.TensorProtocol) -> Array | None:
    """What a constant stands for: its elements, or what a DequantizeLinear makes of them; None for other integers."""
    if held.dtype.is_floating_point():
        return held.numpy()
    node = next((use.node for use in value.uses() if edit.is_op(use.node, "DequantizeLinear") and use.idx == 0), None)
    scale = None if node is None else edit.constant(node.inputs[1])
    if node is None or scale is None:
        return None
    array = held.numpy().astype(np.float32)
    axis, block = edit.attribute(node, "axis", 1), edit.attribute(node, "block_size", 0)

    def spread(given: Array) -> Array:
        if given.ndim == array.ndim and block:
            return np.repeat(given, block, axis)
        return given.reshape([-1 if a == axis % array.ndim else 1 for a in range(array.ndim)]) if given.ndim else given

    zero = edit.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if zero is not None:
        array -= spread(zero.astype(np.float32))
    return np.asarray(array * spread(scale.astype(np.float32)))


def _norm(groups: Groups, group: Group, place: Place, array: Array, order: int) -> Array:
    """Sums of absolute values or squares of one weight, by unit."""
    if group.blocks:
        return np.asarray(groups.scores(group, place, _powers(array, order)), dtype=np.float64)
    along = np.zeros(array.shape[place.axis])
    others = tuple(axis for axis in range(array.ndim) if axis != place.axis)
    step = max(1, CHUNK // max(1, array.size // max(1, array.shape[0])))
    for start in range(0, array.shape[0], step):
        part = _powers(array[start : start + step], order).sum(axis=others, dtype=np.float64)
        if place.axis == 0:
            along[start : start + step] = part
        else:
            along += part
    used = place.units >= 0
    return np.bincount(place.units[used], weights=along[used], minlength=group.size)


def _powers(array: Array, order: int) -> Array:
    array = array.astype(np.float32, copy=False)
    return np.abs(array) if order == 1 else np.square(array)


def random(groups: Groups, group: Group, context: Context) -> Array:
    """Uniform in [0, 1), from the run's seed and the group's name: the baseline that every criterion must beat."""
    generator = np.random.default_rng((context.seed, zlib.crc32(group.name.encode())))
    return generator.random((*group.blocks, group.size))


def _samples(groups: Groups, chosen: Sequence[Group]) -> Needs:
    return Needs(calibration=True)


CRITERIA: dict[str, Criterion] = {
    "l1": Criterion(magnitude(1), "sum of the absolute weights of a unit"),
    "l2": Criterion(magnitude(2), "norm of the weights of a unit"),
    "random": Criterion(random, "nothing: the baseline"),
    "activation": Criterion(
        activations.scored(activations.activation), "norm of the unit's activation (CFSP)", activations.needs
    ),
    "mean-activation": Criterion(
        activations.scored(activations.mean_absolute),
        "mean absolute activation (AMP, for neurons)",
        activations.needs,
    ),
    "wanda": Criterion(
        activations.scored(activations.wanda), "weights times norm of the activation (Wanda)", activations.needs
    ),
    "fluctuation": Criterion(
        activations.scored(activations.fluctuation), "variance of what it adds (FLAP's metric)", activations.needs
    ),
    "flap": Criterion(activations.flap, "FLAP as published, z-scored by layer", activations.needs, scaled=True),
    "projection": Criterion(projection, "what it adds to the consumer's outputs (AMP, for heads)", curvature.needs),
    "obs": Criterion(
        curvature.obs,
        "what is lost when the rest makes up for it (group OBS: ZipLM, OSSCAR, DarwinLM)",
        curvature.needs,
        scaled=True,
    ),
    "surgeon": Criterion(
        curvature.surgeon,
        "what the loss rises by when the rest makes up for it (LLM Surgeon; needs torch)",
        curvature.surgeon_needs,
        scaled=True,
    ),
    "taylor": Criterion(
        taylor.scored(taylor.first), "|w g| (LLM-Pruner, param_first; needs torch)", taylor.needs, scaled=True
    ),
    "taylor-second": Criterion(
        taylor.scored(taylor.second), "w^2 E[g^2] (param_second; needs torch)", taylor.needs, scaled=True
    ),
    "taylor-mix": Criterion(
        taylor.scored(taylor.mixed), "|w g - w^2 E[g^2] / 2| (param_mix; needs torch)", taylor.needs, scaled=True
    ),
    "taylor-vector": Criterion(
        taylor.scored(taylor.signed, whole=True),
        "|sum of w g| (vectorize; needs torch)",
        taylor.needs,
        scaled=True,
    ),
    "heapr": Criterion(
        taylor.heapr,
        "E[x^2] wT G w with the gradients' Gram matrix G (HEAPr; needs torch)",
        taylor.heapr_needs,
        scaled=True,
    ),
    "loss": Criterion(probe.loss, "what the outputs lose without it, measured", _samples, scaled=True),
    "frequency": Criterion(routers.frequency, "how often a router chooses an expert", routers.needs),
    "mass": Criterion(routers.mass, "the weight that a router gives an expert (UNCURL)", routers.needs),
    "stun": Criterion(experts.stun, "when its cluster of router rows has another representative (STUN)"),
    "router-distance": Criterion(routers.distance, "how far the router's row is from the nearest other (STUN)"),
}
