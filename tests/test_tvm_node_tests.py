"""ONNX's own operator tests through the TVM backend: each compiles and agrees, or is refused with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from graphc import compiled, runtime
from graphc.errors import BadInput
from tests.test_onnx_backend_nodes import Arrays, models
from tests.tvm_models import build, in_child

STRIDE = 5
"""One case in so many is compiled; all take half an hour."""

REFUSALS = (
    "Attention: the importer means",
    "BatchNormalization: training mode",
    "ConvTranspose: output_shape",
    "Dropout: only its first output",
    "EyeLike: only constants",
    "GRU: its weights are no constants",
    "LSTM: its weights are no constants",
    "LayerNormalization: only its first output",
    "MaxPool: only its first output",
    "MaxUnpool: output_shape",
    "Pad: its input",
    "Pow: powers of integers",
    "RNN: its weights are no constants",
    "Range: its input",
    "ReduceMax: booleans",
    "ReduceMin: booleans",
    "Resize: ",
    "sequences are not supported",
    "is not supported (",
    "only standard operators are known",
    "tensors without elements",
    "there is no converter",
    "blocks are not supported",
)
"""What may be said of an operator that is not taken."""

WRONG = "fullymasked"
"""In the names of cases that TVM gets wrong: NaN that are tested for stay. The comparison of every build finds it."""


def fixed(model: ir.Model, feeds: Arrays) -> Arrays:
    """Give the inputs their shapes, and make constants of indices and the like; returns what is left to feed."""
    for value in list(model.graph.inputs)[1:]:
        array = feeds[value.name or ""]
        if array.ndim <= 1 and array.dtype.kind in "iub":
            value.const_value = ir.tensor(array, name=value.name)
            model.graph.inputs.remove(value)
            model.graph.initializers[value.name or ""] = value
    for value in model.graph.inputs:
        value.shape = ir.Shape(feeds[value.name or ""].shape)
    return {v.name or "": feeds[v.name or ""] for v in model.graph.inputs}


def tried(model: ir.Model, given: Arrays, folder: Path) -> str:
    """What comes of a case: ``agrees``, or why not."""
    try:
        runtime.session(model, optimise=False).run(given)
    except BadInput:
        return "agrees"  # with fixed sizes it is no model that ONNX Runtime runs
    try:
        verdict = compiled.compare(model, build(model.clone(), folder), data=[given])
    except BadInput as error:
        return f"refused: {error.what} {error.where} {error.why}"
    return "agrees" if verdict.ok else f"wrong: {verdict.why}"


def isolated(model: ir.Model, given: Arrays, folder: Path) -> str:
    """The same in another process."""
    return in_child(lambda: tried(model, given, folder / "out"), folder)


@pytest.mark.slow
@pytest.mark.parametrize("letters", ["ab", "c", "defghi", "lmn", "opqrs", "tuwx"])
def test_each_agrees_or_is_refused_with_a_reason(letters: str, tvm: Any, tmp_path: Path) -> None:
    outcomes = {}
    for letter in letters:
        for name, model, feeds, _ in list(models(letter))[::STRIDE]:
            outcomes[name] = isolated(model, fixed(model, feeds), tmp_path / name)
    bad = {
        name: said
        for name, said in outcomes.items()
        if said != "agrees"
        and WRONG not in name
        and not (said.startswith("refused: TVM cannot take") and any(reason in said for reason in REFUSALS))
    }
    assert not bad, bad
    assert sum(said == "agrees" for said in outcomes.values()) > len(outcomes) / 2


def test_a_scalar_minimum_does_not_end_the_process(tvm: Any, tmp_path: Path) -> None:
    """What crashed: the layouts of stacked scalars, in the definition of DynamicQuantizeLinear."""
    found = {name: (model, feeds) for name, model, feeds, _ in models("c") if "dynamicquantizelinear" in name}
    model, feeds = found["test_dynamicquantizelinear_expanded"]
    assert isolated(model, fixed(model, feeds), tmp_path / "case") == "agrees"
