"""Blocks and residual branches are found from the graph alone, and shown."""

from __future__ import annotations

import json

import onnx_ir as ir
import pytest

from graphc.checking import Checker
from graphc.cli import main
from graphc.depth.silence import Silencing
from graphc.depth.structure import Structure, find
from graphc.model import parameters
from graphc.passes.shrink import Shrink
from tests.block_models import (
    CONTEXT,
    DATA,
    TOPOLOGIES,
    WIDTH,
    pre_norm,
    shared,
)


def shape(structure: Structure) -> list[list[str]]:
    """For each chain and block, a letter for each branch: m mixes positions, p does not; "+" joins those of a sum."""
    return [
        [" ".join("+".join("pm"[b.mixes] for b in s.branches) for s in block.sums) for block in chain]
        for chain in structure.chains
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pre_norm", [["m p"] * 3]),
        ("masked", [["m p"] * 3]),
        ("cached", [["m p"] * 2]),
        ("post_norm", [["m p"] * 3]),
        ("sandwich", [["m p"] * 2]),
        ("parallel", [["m+p"] * 3]),
        ("parallel_in_a_row", [["m+p"] * 3]),
        ("encoder_decoder", [["m p"] * 2, ["m m p"] * 2]),
        ("convolutional", [["m", "m"], ["m"]]),
        ("shared", [["p"] * 3]),
    ],
)
def test_blocks_are_found_from_the_graph_alone(name: str, expected: list[list[str]]) -> None:
    structure = find(TOPOLOGIES[name]())
    assert shape(structure) == expected


def test_names_are_what_the_weights_have_in_common() -> None:
    assert [block.name for block in find(pre_norm()).blocks] == ["layers.0", "layers.1", "layers.2"]
    assert [branch.name for branch in find(pre_norm(1)).branches] == ["layers.0#0", "layers.0#1"]


def test_the_parameters_of_blocks_add_up() -> None:
    model = pre_norm()
    around = 2 * WIDTH + WIDTH * 5 + WIDTH * WIDTH + WIDTH
    floats = sum(v.const_value.size for v in model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT)
    assert sum(block.parameters for block in find(model).blocks) == floats - around
    # What several branches share is nobody's own.
    assert all(block.parameters == 2 * WIDTH for block in find(shared()).blocks)


def test_caches_are_reported_as_outputs_of_their_branch() -> None:
    attention, mlp = find(pre_norm(2, cache=True)).blocks[1].branches
    assert [value.name for value in attention.exits] == ["present.1.key", "present.1.value"]
    assert mlp.exits == ()


@pytest.mark.parametrize(("name", "blocks"), [("fmnist_resnet", 1), ("fmnist_vit_tiny", 4), ("tiny_mixtral_bytes", 3)])
def test_the_blocks_of_trained_models(name: str, blocks: int) -> None:
    model = ir.load(DATA / f"{name}.onnx")
    found = find(model).blocks
    assert len(found) == blocks
    middle = found[blocks // 2]
    zeroed = model.clone()
    for branch in find(zeroed).blocks[blocks // 2].branches:
        Silencing.of(branch.value, branch.node).write(zeroed)
    small = zeroed.clone()
    Shrink().run(small, CONTEXT)
    assert parameters(model) - parameters(small) >= middle.parameters > 0
    verdict = Checker(zeroed).compare(small)
    assert verdict.checked and verdict.ok, verdict.why


def test_blocks_are_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = str(DATA / "fmnist_vit_tiny.onnx")
    assert main(["inspect", path, "--blocks"]) == 0
    shown = capsys.readouterr().out
    assert "m.vit.layers.3" in shown
    assert "#0 mixes positions" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert main(["inspect", path, "--blocks", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "graphc-blocks/1"
    assert [branch["params"] for branch in found["blocks"][0]["branches"]] == [37440, 37344]
    assert main(["inspect", str(DATA / "silero_vad.onnx"), "--blocks"]) == 0
    assert "no residual branch was found" in capsys.readouterr().out
