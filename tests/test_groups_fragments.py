"""The groups that graphc finds in each fragment, against the proven truth: exact, coarser or fixed; never wrong."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
from fragments import ALL, Fragment
from fragments.core import Position

from graphc.axes.groups import Group, Groups, analyse

KNOWN_COARSER: dict[str, str] = {}
"""``fragment-group`` that the engine ties more than necessary, and why that is accepted."""
KNOWN_FIXED: dict[str, str] = {}
"""``fragment-group`` that the engine does not find, and why that is accepted."""

CLAIMS = [(name, group) for name, each in ALL.items() for group in each.groups]
IDS = [f"{name}-{group}" for name, group in CLAIMS]


def _with_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with its weights as Constant nodes."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    nodes = [
        onnx.helper.make_node("Constant", [], [held.name], name=f"holds {held.name}", value=held)
        for held in model.graph.initializer
    ]
    del model.graph.initializer[:]
    nodes += model.graph.node
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _groups(fragment: Fragment, *, constants: bool = False) -> Groups:
    proto = fragment.build()
    model = ir.from_proto(_with_constants(proto) if constants else proto)
    return analyse(model, interface=any(g.interface for g in fragment.groups.values()))


def _units(group: Group, fragment: Fragment) -> list[set[Position]]:
    """Each unit of a found group as places in the weights that the fragment declares."""
    return [
        {
            (place.value.name, place.axis, int(index))
            for place in group.places
            if place.value.name in fragment.tensors
            for index in place.indices(unit)
        }
        for unit in range(group.size)
    ]


def _is_union(unit: set[Position], parts: list[set[Position]]) -> bool:
    """Whether a found unit consists of whole true units of one group."""
    inside = [part for part in parts if part <= unit]
    return bool(inside) and set().union(*inside) == unit


def _explaining(group: Group, fragment: Fragment) -> str | None:
    units = [unit for unit in _units(group, fragment) if unit]
    for name in fragment.groups:
        parts = list(fragment.units(name).values())
        if units and all(_is_union(unit, parts) for unit in units):
            return name
    return None


@pytest.mark.parametrize("constants", [False, True], ids=["initializers", "constants"])
@pytest.mark.parametrize("name", ALL)
def test_no_group_is_wrong(name: str, constants: bool) -> None:
    fragment = ALL[name]
    for group in _groups(fragment, constants=constants).groups:
        if any(_units(group, fragment)):
            assert _explaining(group, fragment) is not None, f"{group.name}: {_units(group, fragment)[0]}"


@pytest.mark.parametrize(("name", "truth"), CLAIMS, ids=IDS)
def test_group_is_found(name: str, truth: str) -> None:
    fragment, spec = ALL[name], ALL[name].groups[truth]
    found = [g for g in _groups(fragment).groups if _explaining(g, fragment) == truth]
    label = f"{name}-{truth}"
    if not found:
        assert spec.optional or label in KNOWN_FIXED, "not found"
        return
    assert label not in KNOWN_FIXED, "found after all: update the table"
    # A balanced group may be found whole (its digit, with a choice in every block) or unit by unit.
    true = [set(unit) for unit in fragment.units(truth).values()]
    tied: dict[int, set[Position]] = {}
    for key, unit in fragment.units(truth).items():
        tied.setdefault(key[-1], set()).update(unit)
    units = sorted(sorted(unit) for group in found for unit in _units(group, fragment) if unit)
    exact = units == sorted(map(sorted, true)) or (
        units == sorted(map(sorted, tied.values())) and (not spec.balanced or all(g.blocks for g in found))
    )
    assert exact != (label in KNOWN_COARSER), f"{len(units)} units instead of {len(tied)}, blocks {found[0].blocks}"
    for group in found:
        assert group.kind == spec.kind or spec.optional
        assert spec.exact == "mean" or group.exact == (spec.exact != "norm")


REASONS = [(name, *place) for name, each in ALL.items() for place in each.fixed]


@pytest.mark.parametrize(("name", "weight", "axis"), REASONS, ids=[f"{n}-{w}:{a}" for n, w, a in REASONS])
def test_fixed_axis_has_a_reason(name: str, weight: str, axis: int) -> None:
    fragment = ALL[name]
    groups = _groups(fragment) if not any(g.interface for g in fragment.groups.values()) else None
    if groups is None:
        groups = analyse(ir.from_proto(fragment.build()))
    reasons = [each.reason for each in groups.fixed if each.value.name == weight and each.axis == axis]
    words = fragment.fixed[weight, axis].lower().split("|")
    if reasons or any(spec.optional for spec in fragment.groups.values()):
        assert all(any(word in reason.lower() for word in words) for reason in reasons), reasons
    else:
        pytest.fail(f"no reason is given; {groups.explain(weight)}")
