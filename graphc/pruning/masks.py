"""Masks and scores from outside, keyed by group name or by ``weight:axis``, turned into one array per group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from graphc.axes.groups import Group, Groups, Place
from graphc.edit import Array
from graphc.errors import BadInput, nearest


def read(path: Path) -> dict[str, Array]:
    """The arrays of a safetensors file.

    Raises:
        BadInput: The file cannot be read, is no safetensors file, is truncated, or has no entry.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        found: dict[str, Array] = load_file(path)
    except OSError as error:
        raise BadInput("cannot read the file", where=str(path), why=error.strerror or str(error)) from None
    except (SafetensorError, KeyError) as error:
        hint = "write it with safetensors.numpy.save_file"
        raise BadInput(
            "this is not a safetensors file of NumPy arrays", where=str(path), why=str(error), hint=hint
        ) from None
    if not found:
        raise BadInput("the file has no entries", where=str(path), hint="give one array per group or weight:axis")
    return found


def keep(given: Mapping[str, Array], groups: Groups, *, where: str) -> dict[str, Array]:
    """Which units stay, by group.

    Args:
        given: Booleans, true = keep: ``(size,)`` or ``(*blocks, size)`` by group name, or one element for each
            index of the axis by ``weight:axis``.
        groups: The model's groups.
        where: What to name in errors.

    Raises:
        BadInput: Unknown name, wrong dtype or shape, an axis that is fixed, a mask that empties a group or cuts
            a unit in two, or two that disagree.
    """
    result: dict[str, Array] = {}
    for name, array in given.items():
        if array.dtype != np.bool_:
            raise BadInput(f"the mask '{name}' is {array.dtype}, not boolean", where=where)
        for group, mask in _by_group(name, array, groups, where):
            if group.name in result and not np.array_equal(result[group.name], mask):
                raise BadInput(f"two masks disagree about the group '{group.name}'", where=where)
            if not mask.any():
                raise BadInput(f"the mask '{name}' keeps nothing of '{group.name}'", where=where)
            result[group.name] = mask
    return {name: mask for name, mask in result.items() if not mask.all()}


def scores(given: Mapping[str, Array], groups: Groups, chosen: Sequence[Group], *, where: str) -> dict[str, Array]:
    """A score per unit for each chosen group, from arrays keyed like masks; several of one group are added.

    Raises:
        BadInput: As for ``keep``; NaN; or a chosen group has no score.
    """
    result: dict[str, Array] = {}
    for name, array in given.items():
        if not np.issubdtype(array.dtype, np.number) or not np.isfinite(array).all():
            raise BadInput(f"the scores '{name}' are not all finite numbers", where=where)
        for group, values in _by_group(name, array.astype(np.float64), groups, where):
            result[group.name] = result.get(group.name, 0) + values
    for group in chosen:
        if group.name not in result:
            raise BadInput(
                f"there is no score for the group '{group.name}'",
                where=where,
                hint=f"{nearest(group.name, given)}; or exclude the group",
            )
    return result


def _by_group(name: str, array: Array, groups: Groups, where: str) -> list[tuple[Group, Array]]:
    """The group or groups that a key names, each with its part of the array."""
    named = {g.name: g for g in groups.groups}
    if name in named:
        group = named[name]
        if array.shape not in ((group.size,), (*group.blocks, group.size)):
            also = f" or {(*group.blocks, group.size)}" if group.blocks else ""
            raise BadInput(
                f"'{name}' has shape {array.shape}", where=where, why=f"the group's is {(group.size,)}{also}"
            )
        return [(group, array)]
    weight, _, axis = name.rpartition(":")
    places = [
        (group, place)
        for group in groups.groups
        for place in group.places
        if place.value.name == weight and str(place.axis) == axis
    ]
    if not places:
        fixed = [f for f in groups.fixed if f.value.name == weight and str(f.axis) == axis]
        if fixed:
            raise BadInput(f"'{name}' cannot be cut", where=where, why=fixed[0].reason)
        known = {*named, *(f"{p.value.name}:{p.axis}" for g in groups.groups for p in g.places)}
        raise BadInput(f"no group or weight axis is called '{name}'", where=where, hint=nearest(name, known))
    length = len(places[0][1].units)
    if array.shape != (length,):
        raise BadInput(f"'{name}' has shape {array.shape}", where=where, why=f"the axis has {length} indices")
    if array.dtype != np.bool_:
        return [(group, _total(array, group, place)) for group, place in places]
    return _split(name, array, places, where)


def _total(array: Array, group: Group, place: Place) -> Array:
    used = place.units >= 0
    return np.bincount(place.units[used], weights=array[used], minlength=group.size)


def _split(name: str, array: Array, places: list[tuple[Group, Place]], where: str) -> list[tuple[Group, Array]]:
    """The units whose removal makes exactly this mask of an axis that several groups may run through."""
    result = []
    rest = array.copy()
    for group, place in places:
        used = place.units >= 0
        kept = np.bincount(place.units[used], weights=array[used], minlength=group.size) > 0
        result.append((group, kept))
        rest[used] |= ~kept[place.units[used]]
    if not rest.all():
        index = int(np.flatnonzero(~rest)[0])
        raise BadInput(
            f"'{name}' drops index {index} but keeps others that belong to the same unit",
            where=where,
            hint=f"groups along this axis: {', '.join(group.name for group, _ in places)}",
        )
    return result
