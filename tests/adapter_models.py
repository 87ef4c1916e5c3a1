"""A graph with a layer of each kind, small graphs, and adapters for them, for the tests of adapters."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import strategies as st

from graphc import runtime
from graphc.adapters import Adapters, adapted
from graphc.contract import PassResult
from graphc.frontends import Source

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

nn = torch.nn


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(3, 5, 8))
        self.up = nn.Parameter(torch.randn(3, 8, 4))


class Net(nn.Module):
    """A layer of each kind; nothing is ever run."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.emb = nn.Embedding(10, 8)
        self.q = nn.Linear(8, 6)
        self.v = nn.Linear(6, 6)
        self.qkv = nn.Linear(6, 18, bias=False)
        self.conv = nn.Conv2d(3, 4, 3)
        self.line = nn.Conv1d(3, 4, 1)
        self.c_attn = Conv1D(6, 6)
        self.head = nn.Linear(6, 2)
        self.mha = nn.MultiheadAttention(8, 2)
        self.experts = Experts()


GRAPH = """<ir_version: 10, opset_import: ["": 21]>
g (int64[N,4] ids, float[N,3,9,9] image, float[N,3,9] row, float[N,3,6,8] stack) => (
    float e, float a, float b, float c, float d, float f, float g, float h, float i, float j) {
    e = Gather (emb.weight, ids)
    q0 = MatMul (e, q.weight)
    a = Add (q0, q.bias)
    vt = Transpose <perm = [1, 0]> (v.weight)
    v0 = MatMul (a, vt)
    b = Add (v0, v.bias)
    d0 = ReduceSum <keepdims = 0> (b, one)
    qt = Transpose (qkv.weight)
    c = MatMul (b, qt)
    d = Conv (image, conv.weight, conv.bias)
    f = Conv (row, line.weight, line.bias)
    g = Gemm (d0, c_attn.weight, c_attn.bias)
    h = Gemm <transB = 1> (d0, head.weight, head.bias)
    mt = Transpose (mha.in_proj_weight)
    m0 = MatMul (e, mt)
    m1 = Add (m0, mha.in_proj_bias)
    m2 = Slice (m1, zero, eight, two)
    ot = Transpose (mha.out_proj.weight)
    m3 = MatMul (m2, ot)
    i = Add (m3, mha.out_proj.bias)
    gt = Transpose <perm = [0, 2, 1]> (experts.gate)
    k0 = MatMul (stack, gt)
    j0 = MatMul (k0, down)
    total = ReduceSum <keepdims = 0> (experts.up)
    j = Add (j0, total)
}"""

FLIPPED = ("q.weight",)
"""Weights that the graph has as (in, out)."""


def base(net: Any, prefix: str = "", half: bool = False) -> ir.Model:
    """The graph of a net."""
    proto = onnx.parser.parse_model(re.sub(r"(?<=\w)\.(?=[a-z])", "__", GRAPH))
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    held = {name: tensor.detach().numpy() for name, tensor in net.state_dict().items()}
    held |= {"one": np.array([1]), "zero": np.array([0]), "eight": np.array([8]), "two": np.array([2])}
    held["down"] = np.ones((3, 5, 2), np.float32)
    for name, array in held.items():
        stored = np.ascontiguousarray(array.T) if name in FLIPPED else array
        proto.graph.initializer.append(onnx.numpy_helper.from_array(stored, name.replace(".", "__")))
    model = ir.from_proto(proto)
    for name in held:
        model.graph.initializers[name.replace(".", "__")].name = prefix + name
    return model


def source(model: ir.Model) -> Source:
    return Source(model, model.clone(), Path("model.onnx"), (), PassResult())


def trained(net: Any, config: Any, folder: Path, seed: int = 0, **options: Any) -> Any:
    """A PEFT model with random adapters, saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = peft.get_peft_model(copy.deepcopy(net), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn_like(parameter) * 0.3
        model.save_pretrained(folder, **options)
    return model.eval()


def merged(model: Any) -> dict[str, np.ndarray]:
    """The weights that PEFT makes of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: t.detach().numpy() for name, t in model.merge_and_unload().state_dict().items()}


def weights(model: ir.Model) -> dict[str, np.ndarray]:
    """The weights of a graph as torch has them."""
    found = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    return {name: array.T if name in FLIPPED else array for name, array in found.items()}


def same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float = 3e-6) -> None:
    for name, array in wanted.items():
        if name in found:
            np.testing.assert_allclose(found[name], array, rtol=tolerance, atol=tolerance, err_msg=name)


def fold(model: ir.Model, *folders: Any, **how: Any) -> tuple[ir.Model, Source]:
    done = adapted(source(model), Adapters.of(folders, **how))
    return done.model, done


torch.manual_seed(0)


NET = Net()

L = peft.LoraConfig

FLOAT = st.floats(-2, 2).map(lambda x: round(x, 3))


def build(body: str, inputs: str, outputs: str = "y", **constants: np.ndarray) -> ir.Model:
    """A model from ONNX text; ``__`` in names of constants stands for a dot."""
    declared = ", ".join(f"float {name}" for name in outputs.split())
    text = f'<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]> g ({inputs}) => ({declared}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    for name, array in constants.items():
        if array.dtype.name in ("int4", "uint4"):
            kind = onnx.TensorProto.INT4 if array.dtype.name == "int4" else onnx.TensorProto.UINT4
            proto.graph.initializer.append(onnx.helper.make_tensor(name, kind, array.shape, array.astype(np.int8)))
        else:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = ir.from_proto(proto)
    for name in constants:
        model.graph.initializers[name].name = name.replace("__", ".")
    return model


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def lora(folder: Path, *, rank: int = 2, alpha: float = 4, seed: int = 1, config: Any = None, **layers: Any) -> Path:
    """A hand-made adapter: ``layer__name=(out, in)``."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    held = {}
    for i, (name, (rows, columns)) in enumerate(layers.items()):
        table = name.endswith("embed")
        path = f"base_model.model.{name.replace('__', '.')}"
        a, b = numbers(rank, columns, seed=seed + 2 * i), numbers(rows, rank, seed=seed + 2 * i + 1)
        if table:
            a, b = numbers(rank, rows, seed=seed + 2 * i), numbers(columns, rank, seed=seed + 2 * i + 1)
        held[path + (".lora_embedding_A" if table else ".lora_A.weight")] = a
        held[path + (".lora_embedding_B" if table else ".lora_B.weight")] = b
    save_file(held, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": alpha, **(config or {})})
    )
    return folder


def delta(folder: Path, name: str, scale: float = 2.0) -> np.ndarray:
    from safetensors.numpy import load_file

    held = load_file(folder / "adapter_model.safetensors")
    path = f"base_model.model.{name}"
    if f"{path}.lora_A.weight" in held:
        return scale * held[f"{path}.lora_B.weight"] @ held[f"{path}.lora_A.weight"]
    return scale * (held[f"{path}.lora_embedding_B"] @ held[f"{path}.lora_embedding_A"]).T


def run(model: ir.Model, **feeds: np.ndarray) -> list[np.ndarray]:
    return list(runtime.session(model, optimise=False).run(feeds).values())


ROW = "float[N,8] x"


def plain() -> ir.Model:
    return build(
        "h = MatMul(x, layer__q__weight) y = MatMul(h, layer__v__weight)",
        ROW,
        layer__q__weight=numbers(8, 6),
        layer__v__weight=numbers(6, 6),
    )
