"""``simplify`` and what exporters note: it goes, but for what adapters find their layers by."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from graphc import edit
from graphc.adapters.sites import Index
from graphc.contract import Capabilities, Context
from graphc.passes.simplify import Simplify

DATA = Path(__file__).parent / "data"
CONTEXT = Context(Capabilities("test", 10, {"": 21}))
SCOPES = "pkg.torch.onnx.name_scopes"


def noted() -> ir.Model:
    """A product with a folded weight, as torch's exporter leaves it, and an activation."""
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21]> g (float[N,2] x) => (float[N,2] y)
        <float[2,2] val_3 = {1, 2, 3, 4}> { a = MatMul(x, val_3)  y = Relu(a) }"""
    )
    product, relu = model.graph
    product.metadata_props[SCOPES] = "['', 'encoder', 'encoder.q', 'linear']"
    for node in (product, relu):
        node.metadata_props["namespace"] = ": Net/encoder.q: Linear/linear: aten.linear.default"
        node.metadata_props["pkg.torch.onnx.fx_node"] = "%linear : [num_users=1]"
        node.metadata_props["mine"] = "kept"
        node.doc_string = "net.py:3"
    relu.metadata_props[SCOPES] = "['', 'encoder', 'encoder.act', 'relu']"
    product.outputs[0].metadata_props["pkg.torch.onnx.original_node_name"] = "linear"
    product.outputs[0].doc_string = "what comes out"
    model.graph.metadata_props["pkg.torch.export.ExportedProgram.graph_signature"] = "..."
    model.graph.inputs[0].doc_string, model.doc_string = "pixels", "a net"
    model.metadata_props["alphabet"] = "abc"
    return model


def test_notes_go_and_what_is_said_of_the_model_stays() -> None:
    model = noted()
    result = Simplify().run(model, CONTEXT)
    product, relu = model.graph
    assert product.metadata_props == {"mine": "kept", SCOPES: "['encoder.q', '']"}
    assert relu.metadata_props == {"mine": "kept"}
    assert not product.doc_string
    assert not product.outputs[0].metadata_props and not product.outputs[0].doc_string
    assert not model.graph.metadata_props
    assert (model.doc_string, model.graph.inputs[0].doc_string) == ("a net", "pixels")
    assert model.metadata_props == {"alphabet": "abc"}
    # Stacks and nodes of two nodes, a module stack, docs of two nodes and a value, notes of a value and the graph.
    assert result.changes == ["exporter's note removed (×10)"]


def test_a_second_run_finds_none() -> None:
    model = noted()
    Simplify().run(model, CONTEXT)
    assert Simplify().run(model, CONTEXT).changes == []


def test_adapters_find_the_weight_by_its_module_as_before() -> None:
    model = noted()
    before = Index.of(model).names["encoder.q.weight"]
    Simplify().run(model, CONTEXT)
    assert Index.of(model).names["encoder.q.weight"] is before


def test_a_weight_that_has_the_name_of_its_module_needs_no_note() -> None:
    model = noted()
    model.graph.initializers["val_3"].name = "encoder.q.weight"
    Simplify().run(model, CONTEXT)
    assert model.graph[0].metadata_props == {"mine": "kept"}


def test_notes_can_be_kept() -> None:
    model = noted()
    before = [dict(node.metadata_props) for node in model.graph]
    assert Simplify(keep_notes=True).run(model, CONTEXT).changes == []
    assert [dict(node.metadata_props) for node in model.graph] == before


@pytest.mark.parametrize("name", ["fmnist_vit_tiny", "tiny_mixtral_bytes"])
def test_a_file_of_torch_gets_smaller_by_its_notes(name: str) -> None:
    model = ir.load(DATA / f"{name}.onnx")
    kept, without = model.clone(), model.clone()
    Simplify(keep_notes=True).run(kept, CONTEXT)
    Simplify().run(without, CONTEXT)
    assert [n.name for n in edit.nodes(kept)] == [n.name for n in edit.nodes(without)]
    notes = sum(len(key) + len(text) for n in edit.nodes(kept) for key, text in n.metadata_props.items())
    left = sum(len(key) + len(text) for n in edit.nodes(without) for key, text in n.metadata_props.items())
    assert left < notes / 10
    smaller = len(ir.to_proto(kept).SerializeToString()) - len(ir.to_proto(without).SerializeToString())
    assert smaller > notes - left
