"""The torch frontend: what a module computes, under the names that it has."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from torch import nn  # noqa: E402

import graphc  # noqa: E402
from graphc import edit, runtime  # noqa: E402
from graphc.errors import BadInput, CheckFailed  # noqa: E402
from graphc.frontends.torch import Exported, export  # noqa: E402
from graphc.simplification.constants import AXES  # noqa: E402


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 4)

    def forward(self, x: Any) -> Any:
        return self.down(torch.relu(self.up(x)))


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, image: Any) -> Any:
        return self.head(self.body(image).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value = nn.Linear(width, width, bias=False)

    def forward(self, x: Any, mask: Any) -> Any:
        batch, length, width = x.shape
        q, k, v = (
            each(x).view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for each in (self.query, self.key, self.value)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        return x + y.transpose(1, 2).reshape(batch, length, width)


class Tied(nn.Module):
    """A language model whose output matrix is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 32)
        self.layers = nn.ModuleList([Attention(32, 4), Attention(32, 4)])
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 300, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, attention_mask.bool())
        x = self.norm(x)
        return {"logits": self.head(x), "hidden": x, "cache": None}


def tokens(batch: int, length: int, seed: int = 0) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, length // 2 :] = 0
    mask[0, 0] = 1
    return torch.randint(0, 300, (batch, length), generator=generator), mask


def run(model: ir.Model, *tensors: Any) -> dict[str, np.ndarray[Any, Any]]:
    arrays = {str(v.name): t.numpy() for v, t in zip(model.graph.inputs, tensors, strict=True)}
    session = runtime.session(model, optimise=False)
    found = session.run(arrays)
    session.close()
    return found


def agrees(module: Any, model: ir.Model, *tensors: Any) -> None:
    with torch.no_grad():
        result = module(*tensors)
    if isinstance(result, Mapping):
        expected = [each for each in result.values() if each is not None]
    else:
        expected = list(result) if isinstance(result, tuple) else [result]
    found = run(model, *tensors)
    for wanted, got in zip(expected, found.values(), strict=True):
        np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-4, atol=1e-5)


def names(exported: Exported) -> set[str]:
    return set(exported.model.graph.initializers)


def test_names_dynamic_sizes_and_results() -> None:
    torch.manual_seed(0)
    module = Tied().train()
    exported = export(module, tokens(1, 6))
    assert module.training and module.norm.training
    module.eval()
    assert exported.how == "torch.export" and not exported.notes
    assert exported.axes == {
        "input_ids": {0: "batch", 1: "sequence"},
        "attention_mask": {0: "batch", 1: "sequence"},
    }
    assert [v.name for v in exported.model.graph.outputs] == ["logits", "hidden"]
    assert names(exported) == {name for name, _ in module.named_parameters()}
    assert exported.model.graph.initializers["embed.weight"].metadata_props["graphc.aliases"] == "head.weight"
    for sizes in ((1, 1), (3, 9)):
        agrees(module, exported.model, *tokens(*sizes))


def test_names_and_ties_after_the_default_recipe() -> None:
    torch.manual_seed(0)
    module = Tied().eval()
    exported = export(module, tokens(2, 6))
    graph = exported.model.graph
    nodes = {node.name for node in graph}
    assert "layers.0.query/MatMul" in nodes
    matmul = next(node for node in graph if node.name == "layers.0.query/MatMul")
    assert matmul.metadata_props["graphc.module"] == "layers.0.query"
    assert matmul.metadata_props["graphc.class"].endswith("Linear")
    assert not any("stack" in key or ".py" in text for n in graph for key, text in n.metadata_props.items())

    from graphc.contract import Context
    from graphc.passes.fuse import Fuse
    from graphc.passes.shrink import Shrink
    from graphc.passes.simplify import Simplify
    from graphc.recipe import parse_backend

    model = exported.model
    ctx = Context(parse_backend("onnxruntime").capabilities())
    for each in (Simplify(), Fuse(), Shrink(), Simplify()):
        each.run(model, ctx)
    kept = model.graph.initializers
    for name, parameter in module.named_parameters():
        held = kept[name]
        array = held.const_value.numpy()  # type: ignore[union-attr]
        axes = held.metadata_props.get(AXES)
        wanted = parameter.detach().numpy()
        if axes:
            wanted = wanted.transpose([int(axis) for axis in axes.split()])
        assert axes == ("1 0" if name.startswith("layers") and wanted.ndim == 2 else None), name
        np.testing.assert_array_equal(array, wanted)
    # The tied matrix is one initializer that two nodes read.
    assert {n.op_type for n, _ in kept["embed.weight"].uses()} == {"Gather", "Transpose"}
    agrees(module, model, *tokens(3, 7))


def test_images_keep_batch_norm() -> None:
    torch.manual_seed(0)
    module = Cnn().eval()
    exported = export(module, torch.randn(1, 3, 8, 8))
    assert exported.axes == {"image": {0: "batch"}}
    assert names(exported) >= {"body.0.weight", "body.1.running_mean", "head.weight"}
    assert any(node.op_type == "BatchNormalization" for node in edit.nodes(exported.model))
    agrees(module, exported.model, torch.randn(3, 3, 8, 8))


def test_static_and_named_axes() -> None:
    module = Mlp().eval()
    assert export(module, torch.randn(2, 8), dynamic_shapes=None).axes == {"x": {}}
    assert export(module, torch.randn(2, 8), dynamic_shapes={"x": {0: "rows"}}).axes == {"x": {0: "rows"}}
    renamed = export(module, torch.randn(2, 8), dynamic_shapes={"in": {-2: "rows"}}, input_names=["in"])
    assert renamed.axes == {"in": {0: "rows"}}
    with pytest.raises(BadInput, match="axis 1 of input 'x' cannot be dynamic"):
        export(module, torch.randn(2, 8), dynamic_shapes={"x": {1: "features"}})
    with pytest.raises(BadInput, match="did you mean 'x'"):
        export(module, torch.randn(2, 8), dynamic_shapes={"xx": {0: "rows"}})
    with pytest.raises(BadInput, match="has no axis 2"):
        export(module, torch.randn(2, 8), dynamic_shapes={"x": {2: "rows"}})


def test_meta_device_takes_weights() -> None:
    torch.manual_seed(0)
    real = Tied().eval()
    with torch.device("meta"):
        module = Tied().eval()
        module.head.weight = module.embed.weight
    state = {name: ir.tensor(held.detach().numpy()) for name, held in real.state_dict().items()}
    exported = export(module, tokens(2, 6), weights=state)
    assert exported.model.graph.initializers["embed.weight"].const_value is state["embed.weight"]
    assert all(p.is_meta for p in module.parameters())
    agrees(real, exported.model, *tokens(3, 5))
    with pytest.raises(BadInput, match="has no values, and"):
        export(module, tokens(2, 6))
    state["norm.bias"] = ir.tensor(np.zeros(3, np.float32))
    with pytest.raises(BadInput, match=r"it is float \[3\], the parameter is float \[32\]"):
        export(module, tokens(2, 6), weights=state)


def test_examples_that_do_not_fit() -> None:
    with pytest.raises(BadInput, match="missing a required argument: 'attention_mask'"):
        export(Tied(), tokens(2, 6)[0])
    with pytest.raises(BadInput, match="did you mean 'attention_mask'"):
        export(Tied(), {"input_ids": tokens(2, 6)[0], "attention_msk": tokens(2, 6)[1]})


@dataclasses.dataclass
class Pair:
    mean: Any
    parts: list[Any]


torch.export.register_dataclass(Pair)


class Nested(nn.Module):
    """Inputs and outputs of every form: a dict, a list, a dataclass, an input handed through, a weight, a number."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0, 3.0]))
        self.register_buffer("offset", torch.ones(2), persistent=False)

    def forward(self, state: dict[str, Any], flag: Any, gain: float = 1.0, other: Any = None) -> Any:
        x = state["x"] * self.scale * gain + self.offset
        y = torch.where(flag, x, state["list"][0])
        return Pair(y.mean(0), [y, state["x"], y, self.scale.clone(), None])


def test_nested_inputs_and_results() -> None:
    module = Nested().eval()
    state = {"x": torch.randn(3, 2), "list": [torch.randn(3, 2)]}
    exported = export(module, {"state": state, "flag": torch.tensor([True, False]), "gain": 0.5})
    graph = exported.model.graph
    assert [v.name for v in graph.inputs] == ["state_x", "state_list_0", "flag"]
    assert [v.name for v in graph.outputs] == ["mean", "parts.0", "parts.1", "parts.2", "parts.3"]
    assert exported.axes["state_x"] == {0: "batch"} == exported.axes["state_list_0"]
    assert exported.notes[-1] == "no tensors, hence fixed in the model: gain = 0.5"
    assert {"scale", "offset"} <= set(graph.initializers)
    x, y, flag = torch.randn(5, 2), torch.randn(5, 2), torch.tensor([False, True])
    with torch.no_grad():
        wanted = module({"x": x, "list": [y]}, flag, 0.5)
    found = run(exported.model, x, y, flag)
    for got, want in zip(found.values(), [wanted.mean, *wanted.parts[:4]], strict=True):
        np.testing.assert_allclose(got, want.detach().numpy(), rtol=1e-5)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell = kind(6, 8, batch_first=True, bidirectional=True)

    def forward(self, x: Any) -> Any:
        return self.cell(x)[0]


@pytest.mark.parametrize("kind", [nn.LSTM, pytest.param(nn.GRU, marks=pytest.mark.slow)])
def test_recurrent(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    source = graphc.load(Recurrent(kind).eval(), torch.randn(1, 5, 6))
    assert source.notes[0] == "exported with torch.export; dynamic: batch, sequence"
    assert source.notes[-1].startswith("the same as the module on 5 inputs")
    assert "cell.weight_ih_l0" in source.original.graph.initializers
    assert any(n.op_type == kind.__name__ for n in edit.nodes(source.original))
    # What an export leaves behind in torch does not spoil the next one.
    assert export(Recurrent(kind), torch.randn(2, 5, 6)).axes == {"x": {0: "batch", 1: "sequence"}}


class Branch(nn.Module):
    def forward(self, x: Any) -> Any:
        if x.sum() > 0:
            return x
        return -x


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), Branch())

    def forward(self, x: Any) -> Any:
        return self.body(x)


def test_control_flow_on_values_names_module_and_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadInput) as caught:
        export(Branching(), torch.randn(2, 4))
    assert "body.1 (Branch)" in caught.value.where
    assert "if x.sum() > 0:" in caught.value.where and "test_frontend_torch.py:" in caught.value.where
    assert "depends on the values of a tensor" in caught.value.why and "torch.where" in caught.value.hint
    assert capfd.readouterr() == ("", "")


class ByNumber(nn.Module):
    """A size as a key: only byte code can be traced, which takes the size for a constant."""

    def forward(self, x: Any) -> Any:
        return x * {2: 3.0, 3: 4.0}[x.shape[0]]


@torch._dynamo.disable
def _factor(x: Any) -> float:
    return {2: 3.0, 3: 4.0}[x.shape[0]]


class ByHiddenNumber(nn.Module):
    """The same where byte code cannot be followed."""

    def forward(self, x: Any) -> Any:
        return x * _factor(x)


class Distances(nn.Module):
    """An operator that only the TorchScript exporter has."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Any) -> Any:
        return torch.cdist(x, self.table)


def test_fallbacks_in_their_order() -> None:
    torch.manual_seed(0)
    strict = graphc.load(ByNumber(), torch.randn(2, 4))
    assert strict.notes[0] == "exported with torch.export (strict); dynamic: sequence"
    assert "unhashable" in strict.notes[1]
    assert strict.notes[2] == "axis 0 of input 'x' stays at 2: the module takes only that size"

    static = graphc.load(ByHiddenNumber(), torch.randn(2, 4))
    assert static.notes[0] == "exported with torch.export, static sizes; all sizes static"
    assert len(static.notes) == 6

    recorded = graphc.load(Distances(), torch.randn(2, 4))
    assert "TorchScript" in recorded.notes[0]
    assert "no form for the operator aten._cdist_forward" in recorded.notes[1]
    assert "torch.cdist(x, self.table)" in recorded.notes[1]
    assert "table" in recorded.original.graph.initializers
    assert recorded.original.opset_imports[""] == 21


class Unknown(nn.Module):
    def forward(self, x: Any) -> Any:
        return torch.special.bessel_j0(x)


def test_an_operator_without_onnx_form() -> None:
    with pytest.raises(BadInput) as caught:
        export(Unknown(), torch.randn(2, 4))
    assert "bessel_j0" in caught.value.why and "torch.special.bessel_j0(x)" in caught.value.where


class Writes(nn.Module):
    """Counts its runs in a buffer, and writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros(1))

    def forward(self, x: Any) -> Any:
        self.runs.add_(1)
        x.mul_(2)
        return x + 1


def test_what_a_module_writes_into_is_noted() -> None:
    example = torch.ones(2, 3)
    exported = export(Writes(), example)
    assert any("writes into its buffer 'runs'" in note for note in exported.notes)
    assert any("writes into its input 'x'" in note for note in exported.notes)
    assert len(exported.model.graph.outputs) == 1
    assert example.sum() == 6
    np.testing.assert_array_equal(run(exported.model, torch.ones(2, 3))["output"], np.full((2, 3), 3))


class Lying(nn.Module):
    """Computes something else while it is traced."""

    def forward(self, x: Any) -> Any:
        return x * 1.1 if torch.compiler.is_exporting() else x


def test_a_model_that_differs_from_its_module_is_refused() -> None:
    with pytest.raises(CheckFailed, match="computes something else than the module"):
        graphc.load(Lying(), torch.randn(2, 3))
    assert "checks are off" in graphc.load(Lying(), torch.randn(2, 3), verify=False).notes[-1]


class Unsized(nn.Module):
    """Right at the example's length alone."""

    def forward(self, x: Any) -> Any:
        return x * (1.0 if torch.compiler.is_exporting() or x.shape[1] == 4 else 2.0)


def test_sizes_at_which_the_model_is_wrong_become_static() -> None:
    source = graphc.load(Unsized(), torch.randn(2, 4))
    assert "dynamic: batch, sequence it computes something else" in source.notes[0]
    assert source.notes[1] == "exported with torch.export; dynamic: batch"


def test_pruned_model_agrees_with_the_pruned_module() -> None:
    torch.manual_seed(0)
    module = Mlp().eval()
    report = graphc.optimize(
        graphc.load(module, torch.randn(2, 8)), recipe="simplify,prune{ratio=0.5},shrink", cache=False
    )
    assert report.model is not None and report.ok
    kept = report.model.graph.initializers
    up, down = kept["up.weight"].const_value, kept["down.weight"].const_value
    assert up is not None and down is not None
    assert sorted(up.shape.numpy()) == [8, 8]
    # What is left are rows of the module's own weights.
    rows = up.numpy() if AXES not in kept["up.weight"].metadata_props else up.numpy().T
    own = module.up.weight.detach().numpy()
    index = [int(np.flatnonzero((own == row).all(axis=1))[0]) for row in rows]
    x = torch.randn(3, 8)
    with torch.no_grad():
        wanted = torch.relu(module.up(x))[:, index] @ module.down.weight[:, index].T
        wanted = wanted + torch.from_numpy(kept["down.bias"].const_value.numpy().copy())  # type: ignore[union-attr]
    np.testing.assert_allclose(run(report.model, x)["output"], wanted.numpy(), rtol=1e-4, atol=1e-5)
