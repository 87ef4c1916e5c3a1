"""Who reads the units of a group through a weight: where their activations can be looked at, and made up for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphc import contraction, edit
from graphc.axes.groups import Group, Groups, Place
from graphc.contraction import Contraction
from graphc.edit import Array
from graphc.errors import BadInput


@dataclass(frozen=True)
class Consumer:
    """A contraction along the axis of a group.

    Attributes:
        place: Where the group goes through its weight.
        contraction: The node, read as rows times matrices.
    """

    place: Place
    contraction: Contraction

    @property
    def weight(self) -> Array:
        """The weight, as it is stored.

        Raises:
            BadInput: It holds NaN or infinity.
        """
        held = edit.tensor(self.place.value)
        assert held is not None
        array = held.numpy()
        if not np.isfinite(array).all():
            raise BadInput(
                "a weight holds NaN or infinity; its units cannot be ranked",
                where=str(self.place.value.name),
                hint="repair the weight, or exclude its groups",
            )
        return array

    @property
    def matrices(self) -> Array:
        """The weight as ``(groups, outputs, channels * kernel elements)``, float64."""
        return self.contraction.matrices(self.weight).astype(np.float64) * self.contraction.scale

    def units(self, groups: Groups, group: Group, elements: Array) -> Array:
        """Sum a value for every element of the matrices down to the units of the group, ``(*blocks, size)``."""
        return np.asarray(groups.scores(group, self.place, self.contraction.restored(elements)), dtype=np.float64)


def consumers(group: Group) -> list[Consumer]:
    """The contractions along the axis of a group."""
    return [found for found in _all(group) if isinstance(found, Consumer)]


def over(group: Group, part: Callable[[Consumer], Array]) -> Array | str:
    """What ``part`` gives for the units of a group, ``(*blocks, size)``, summed over consumers; why not, if none is."""
    found = consumers(group)
    return sum(map(part, found), np.zeros((*group.blocks, group.size))) if found else obstacle(group)


def obstacle(group: Group) -> str:
    """Why a group has no consumer."""
    reasons = [found for found in _all(group) if isinstance(found, str)]
    return reasons[0] if reasons else "no weight reads it: two activations meet"


def _all(group: Group) -> Iterator[Consumer | str]:
    for place in group.places:
        if place.role == "carries":
            continue
        for node in _readers(place):
            found = contraction.of(node)
            if isinstance(found, str):
                if place.role == "consumes":
                    yield found
            elif found.weight is place.value and found.axis == place.axis:
                held = edit.tensor(place.value)
                if found.rows.by and len(list(place.value.uses())) > 1:
                    yield "the weight that a router picks is read elsewhere, too"
                elif held is not None and held.dtype.is_floating_point():
                    yield Consumer(place, found)
                else:
                    yield "the weight is quantized"


def _readers(place: Place) -> Iterator[ir.Node]:
    """The nodes that a place's constant reaches, through a router's pick as well."""
    nodes = [place.reader] if place.reader is not None else [use.node for use in place.value.uses()]
    for node in dict.fromkeys(nodes):
        if edit.is_op(node, "Gather", "GatherND"):
            yield from (use.node for use in node.outputs[0].uses())
        else:
            yield node
