"""The torch frontend: what a module computes, under the names that it has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from torch import nn  # noqa: E402

from graphc import edit, runtime  # noqa: E402
from graphc.errors import BadInput  # noqa: E402
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
