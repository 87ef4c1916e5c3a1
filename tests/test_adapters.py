"""Adapters: every kind that PEFT saves, folded into a graph of the same names and compared with PEFT's own merge."""

from __future__ import annotations

import copy
import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import graphc
from graphc import runtime
from graphc.adapters import Adapter, Adapters, adapted, merging
from graphc.contract import PassResult
from graphc.errors import BadInput
from graphc.frontends import Source
from graphc.frontends import load as load_source

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


@pytest.mark.parametrize(
    "config",
    [
        L(r=2, target_modules=["q", "v", "qkv", "head"]),
        L(r=3, lora_alpha=5, target_modules=["q", "v"], use_rslora=True),
        L(r=2, target_modules=["emb", "conv", "line", "q"]),
        L(r=2, target_modules=["emb", "conv", "line", "q", "v"], use_dora=True),
        L(r=2, target_modules=["c_attn"], fan_in_fan_out=True),
        L(r=2, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True),
        L(r=2, lora_alpha=3, target_modules=["q", "v", "qkv"], rank_pattern={"q": 4, "^v": 1}, alpha_pattern={"q": 7}),
        L(r=2, target_modules=["q", "conv"], bias="all", modules_to_save=["head"]),
        L(r=2, target_modules=["q", "v"], bias="lora_only"),
        L(r=2, target_modules=["q", "conv"], lora_bias=True),
        L(r=2, target_modules=["mha"]),
        L(r=2, target_modules=["q"], target_parameters=["experts.gate", "experts.up"]),
        L(r=2, target_modules=[], target_parameters=["experts.gate"]),
        L(r=2, target_modules=["q"], trainable_token_indices={"emb": [7, 2]}),
        L(r=2, target_modules=["q", "v"], init_lora_weights="gaussian"),
        peft.AdaLoraConfig(init_r=3, target_r=2, lora_alpha=5, target_modules=["q", "v"], total_step=10),
        peft.AdaLoraConfig(init_r=3, target_modules=["c_attn"], fan_in_fan_out=True, total_step=10),
        peft.IA3Config(target_modules=["q", "v", "conv", "qkv"], feedforward_modules=["v"]),
        peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True),
        peft.TrainableTokensConfig(target_modules=["emb"], token_indices=[1, 3]),
    ],
    ids=lambda config: f"{config.peft_type.value}",
)
def test_folded_equals_what_peft_merges(config: Any, tmp_path: Path) -> None:
    model = trained(NET, config, tmp_path / "a")
    found, done = fold(base(NET), tmp_path / "a")
    wanted = merged(model)
    before = weights(base(NET))
    assert any(not np.array_equal(wanted[name], before[name]) for name in wanted if name in before)
    same(weights(found), wanted)
    assert done.adapted is not None and done.adapted.changes and done.adapted.effect == "exact"


def test_names_may_have_another_front(tmp_path: Path) -> None:
    model = trained(NET, L(r=2, target_modules=["q", "v"]), tmp_path / "a")
    found, _ = fold(base(NET, prefix="wrapped.model."), tmp_path / "a")
    wanted = merged(model)
    got = found.graph.initializers["wrapped.model.v.weight"].const_value.numpy()
    same({"v.weight": got}, {"v.weight": wanted["v.weight"]})


@pytest.mark.parametrize(
    "method", ["cat", "linear", "svd", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd"]
)
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_combined_as_peft_does(method: str, sign: str, tmp_path: Path) -> None:
    if sign == "frequency" and "ties" not in method:
        pytest.skip("it elects no signs")
    names, factors = ["a", "b", "c"], [0.7, -0.4, 1.2]
    configs = [L(r=3, lora_alpha=4, target_modules=["q", "v", "conv", "emb"]) for _ in names]
    model = trained(NET, configs[0], tmp_path / "a")
    for name, config in zip(names[1:], configs[1:], strict=True):
        trained(NET, config, tmp_path / name, seed=ord(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names[1:]:
            model.load_adapter(tmp_path / name, name)
        options = {"density": 0.4, "majority_sign_method": sign} if method not in ("cat", "linear", "svd") else {}
        model.add_weighted_adapter(["default", *names[1:]], factors, "all", combination_type=method, **options)
        model.set_adapter("all")
    wanted = merged(model)
    given = [f"{tmp_path / name}={factor}" for name, factor in zip(names, factors, strict=True)]
    text = f"{method}{{density=0.4 sign={sign}}}" if options else method
    found, _ = fold(base(NET), *given, combine=text)
    same(weights(found), wanted, 1e-5)


def test_dare_with_the_same_mask_as_peft() -> None:
    task = np.random.default_rng(0).standard_normal((40, 50))
    kept = merging.dropped(task, 0.3, np.random.default_rng(1))
    from peft.utils import merge_utils

    mask = torch.tensor((kept != 0).astype(np.float64))
    torch.bernoulli, original = lambda *_, **__: mask, torch.bernoulli
    try:
        wanted = merge_utils.random_pruning(torch.tensor(task), 0.3, rescale=True).numpy()
    finally:
        torch.bernoulli = original
    np.testing.assert_allclose(kept, wanted, rtol=1e-12)
    assert abs((kept != 0).mean() - 0.3) < 0.05


@pytest.mark.parametrize(
    "method", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd", "della", "ties{of=delta}", "star"]
)
def test_other_combinations_are_seeded_and_do_something(method: str, tmp_path: Path) -> None:
    for name in "ab":
        trained(NET, L(r=2, target_modules=["q", "v"]), tmp_path / name, seed=ord(name))
    folders = [tmp_path / "a", tmp_path / "b"]
    how = Adapters.of(folders, combine=method)
    first, again, other = (weights(adapted(source(base(NET)), how, seed).model) for seed in (0, 0, 1))
    plain = weights(fold(base(NET), *folders)[0])
    assert np.array_equal(first["q.weight"], again["q.weight"])
    random = method.startswith(("dare", "della"))
    assert np.array_equal(first["q.weight"], other["q.weight"]) != random
    assert not np.allclose(first["q.weight"], plain["q.weight"])


def test_star_keeps_the_nuclear_norm() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((9, 4)), rng.standard_normal((4, 7))
    u, v = merging.truncated(left, right, 0.4)
    before, after = (np.linalg.svd(m, compute_uv=False) for m in (left @ right, u @ v))
    assert after.sum() == pytest.approx(before.sum())
    kept = int((after > 1e-9).sum())
    assert before[: kept - 1].sum() < 0.4 * before.sum() <= before[:kept].sum() + before[kept - 1]
    np.testing.assert_allclose(after[:kept] / after[0], before[:kept] / before[0])


def test_della_keeps_large_values_more_often() -> None:
    task = np.tile(np.arange(1.0, 101.0), (2000, 1))
    kept = merging.sampled(task, 0.5, 0.2, np.random.default_rng(0))
    rate = (kept != 0).mean(axis=0)
    np.testing.assert_allclose(rate, 0.3 + 0.4 * np.arange(100) / 99, atol=0.06)
    np.testing.assert_allclose(kept.mean(axis=0), task[0], rtol=0.2)  # unbiased


FLOAT = st.floats(-2, 2).map(lambda x: round(x, 3))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(weight=FLOAT, config=st.sampled_from(["plain", "rslora", "embedding"]))
def test_what_is_folded_and_then_taken_away_leaves_the_base(
    weight: float, config: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / f"law-{config}"
    if not folder.exists():
        options = {"plain": {"target_modules": ["q", "conv"]}, "rslora": {"target_modules": ["v"], "use_rslora": True}}
        trained(NET, L(r=2, **options.get(config, {"target_modules": ["emb"]})), folder)
    there, _ = fold(base(NET), f"{folder}={weight}")
    back, _ = fold(there, f"{folder}={-weight}")
    before = weights(base(NET))
    same(weights(back), {name: array for name, array in before.items() if array.dtype == np.float32}, 2e-6)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    order=st.permutations([0, 1, 2]), factors=st.tuples(FLOAT, FLOAT, FLOAT), method=st.sampled_from(["cat", "linear"])
)
def test_the_order_of_adapters_does_not_matter(
    order: list[int], factors: tuple[float, ...], method: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folders = [tmp_path_factory.getbasetemp() / f"order-{i}" for i in range(3)]
    for i, folder in enumerate(folders):
        if not folder.exists():
            trained(NET, L(r=2, target_modules=["q", "v"]), folder, seed=i)
    given_ = [f"{folder}={factor}" for folder, factor in zip(folders, factors, strict=True)]
    first, _ = fold(base(NET), *given_, combine=method)
    other, _ = fold(base(NET), *(given_[i] for i in order), combine=method)
    same(weights(other), weights(first), 1e-5)


def test_dora_by_halves_lies_between(tmp_path: Path) -> None:
    trained(NET, L(r=2, target_modules=["q"], use_dora=True), tmp_path / "a")
    none, half, whole = (weights(fold(base(NET), f"{tmp_path / 'a'}={w}")[0])["q.weight"] for w in (0, 0.5, 1))
    assert np.array_equal(none, weights(base(NET))["q.weight"])
    np.testing.assert_allclose(half, (none + whole) / 2, rtol=1e-5, atol=1e-6)


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


TIED = "e = Gather(embed__weight, i) h = MatMul(e, w) t = Transpose<perm=[1,0]>(embed__weight) y = MatMul(h, t)"


@pytest.mark.parametrize("layers", [("embed",), ("head",), ("embed", "head")])
def test_tied_weights_get_each_what_its_adapter_says(layers: tuple[str, ...], tmp_path: Path) -> None:
    table, mid, ids = numbers(11, 6), numbers(6, 6, seed=5), np.array([[1, 3, 7]])
    folder = lora(tmp_path / "a", **dict.fromkeys(layers, (11, 6)))
    model = build(TIED, "int64[N,S] i", embed__weight=table, w=mid)
    found, done = fold(model, folder)
    first = table + (delta(folder, "embed") if "embed" in layers else 0)
    last = table + (delta(folder, "head") if "head" in layers else 0)
    np.testing.assert_allclose(run(found, i=ids)[0], first[ids] @ mid @ last.T, rtol=1e-4, atol=1e-5)
    assert done.adapted is not None and done.adapted.refusals


def test_weights_that_peft_keeps_tied_stay_one(tmp_path: Path) -> None:
    table, mid = numbers(11, 6), numbers(6, 6, seed=5)
    folder = lora(tmp_path / "a", config={"ensure_weight_tying": True}, embed=(11, 6))
    found, _ = fold(build(TIED, "int64[N,S] i", embed__weight=table, w=mid), folder)
    assert sorted(found.graph.initializers) == ["embed.weight", "w"]
    np.testing.assert_allclose(weights(found)["embed.weight"], table + delta(folder, "embed"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("targets", [("q", "k", "v"), ("q", "v"), ("k",)])
@pytest.mark.parametrize("stored", ["in_out", "out_in"])
def test_parts_of_merged_weights(targets: tuple[str, ...], stored: str, tmp_path: Path) -> None:
    sizes = {"q": 6, "k": 3, "v": 3}
    whole = numbers(12, 8)
    folder = lora(tmp_path / "a", **{f"layer__{name}_proj": (sizes[name], 8) for name in targets})
    body = {
        "in_out": "y = MatMul(x, layer__qkv_proj__weight)",
        "out_in": "y = Gemm<transB=1>(x, layer__qkv_proj__weight)",
    }
    held = whole.T.copy() if stored == "in_out" else whole
    model = build(body[stored], "float[N,8] x", layer__qkv_proj__weight=held)
    if targets == ("k",):
        with pytest.raises(BadInput, match=r"not found: layer\.k_proj\.weight"):
            fold(model, folder)
        return
    found, _ = fold(model, folder)
    new = weights(found)["layer.qkv_proj.weight"]
    new = new.T if stored == "in_out" else new
    start = 0
    for name, size in sizes.items():
        change = delta(folder, f"layer.{name}_proj") if name in targets else 0
        np.testing.assert_allclose(
            new[start : start + size], whole[start : start + size] + change, rtol=1e-4, atol=1e-6
        )
        start += size


def test_a_weight_without_a_name_is_found_by_the_module_of_its_node(tmp_path: Path) -> None:
    folder = lora(tmp_path / "a", layers__0__q=(6, 6))
    model = build("y = MatMul(x, val_3)", "float[N,6] x", val_3=numbers(6, 6))
    node = next(iter(model.graph))
    node.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'layers.0', 'layers.0.q', 'linear']"
    new = weights(fold(model, folder)[0])["val_3"]
    np.testing.assert_allclose(new, numbers(6, 6) + delta(folder, "layers.0.q").T, rtol=1e-5, atol=1e-6)
    node.metadata_props.clear()
    node.name = "/layers.0/q/MatMul"
    new = weights(fold(model, folder)[0])["val_3"]
    np.testing.assert_allclose(new, numbers(6, 6) + delta(folder, "layers.0.q").T, rtol=1e-5, atol=1e-6)


def test_tied_parameters_that_the_torch_frontend_notes(tmp_path: Path) -> None:
    table, mid, ids = numbers(11, 6), numbers(6, 6, seed=5), np.array([[1, 3, 7]])
    folder = lora(tmp_path / "a", head=(11, 6))
    model = build(TIED, "int64[N,S] i", embed__weight=table, w=mid)
    model.graph.initializers["embed.weight"].metadata_props["graphc.aliases"] = "head.weight"
    found, _ = fold(model, folder)
    last = table + delta(folder, "head")
    np.testing.assert_allclose(run(found, i=ids)[0], table[ids] @ mid @ last.T, rtol=1e-4, atol=1e-5)


def test_tied_tables_of_two_modules_get_each_their_own(tmp_path: Path) -> None:
    table, ids = numbers(11, 6), np.array([[1, 3, 7]])
    body = "y = Gather(enc__embed__weight, i) z = Gather(enc__embed__weight, i)"
    model = build(body, "int64[N,S] i", "y z", enc__embed__weight=table)
    model.graph.initializers["enc.embed.weight"].metadata_props["graphc.aliases"] = "dec.embed.weight"
    for node, path in zip(model.graph, ("enc.embed", "dec.embed"), strict=True):
        node.metadata_props["graphc.module"] = path
    folder = lora(tmp_path / "a", enc__embed=(11, 6), dec__embed=(11, 6))
    first, second = run(fold(model, folder)[0], i=ids)
    np.testing.assert_allclose(first, (table + delta(folder, "enc.embed"))[ids], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(second, (table + delta(folder, "dec.embed"))[ids], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_hugging_face_folder_with_its_adapter(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.LlamaConfig(**sizes, vocab_size=99, num_key_value_heads=2, tie_word_embeddings=True)
    torch.manual_seed(0)
    net = transformers.LlamaForCausalLM(config).eval()
    net.save_pretrained(tmp_path / "base")
    model = trained(net, L(r=2, target_modules=["q_proj", "down_proj", "embed_tokens"]), tmp_path / "a")
    options = {"measure": False, "cache": False, "verify": False, "kv_cache": "none"}
    graphc.optimize(tmp_path / "base", tmp_path / "out", adapters=[tmp_path / "a"], **options)
    ids = torch.tensor([[3, 7, 11, 50, 98]])
    session = runtime.session(tmp_path / "out" / "model.onnx", optimise=True)
    given_ = {"input_ids": ids.numpy(), "attention_mask": np.ones((1, 5), np.int64), "position_ids": np.arange(5)[None]}
    named = {value.name for value in ir.load(tmp_path / "out" / "model.onnx").graph.inputs}
    logits = next(iter(session.run({name: given_[name] for name in named}).values()))
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits.numpy()
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-5)


def test_a_source_of_several_graphs(tmp_path: Path) -> None:
    folder = lora(tmp_path / "a", encoder__q=(6, 8), decoder__q=(6, 8))
    held = {"encoder": numbers(8, 6), "decoder": numbers(8, 6, seed=2)}
    parts = [
        replace(source(build(f"y = MatMul(x, {n}__q__weight)", ROW, **{f"{n}__q__weight": a})), name=n)
        for n, a in held.items()
    ]
    whole = parts[0].with_others(parts[1:])
    done = adapted(whole, Adapters.of([folder]))
    for part, (name, array) in zip(done.parts, held.items(), strict=True):
        np.testing.assert_allclose(
            weights(part.model)[f"{name}.q.weight"], array + delta(folder, f"{name}.q").T, rtol=1e-5, atol=1e-6
        )
    switched = adapted(whole, Adapters.of([folder], "dynamic"))
    assert set(switched.beside) == {"a.encoder.onnx_adapter", "a.decoder.onnx_adapter"}
    for part, name in zip(switched.parts, held, strict=True):
        assert [v.name for v in part.model.graph.inputs] == ["x", f"{name}.q.lora_A", f"{name}.q.lora_B"]
    with pytest.raises(BadInput, match=r"not found: other\.q"):
        adapted(whole, Adapters.of([lora(tmp_path / "b", encoder__q=(6, 8), other__q=(6, 8))]))


def test_a_shared_table_that_only_tied_modules_read(tmp_path: Path) -> None:
    """T5's ``shared``: the encoder and the decoder read it as their own; PEFT's merge changes it for both."""
    table, ids = numbers(11, 6), np.array([[1, 3, 7]])
    folder = lora(tmp_path / "a", shared=(11, 6))
    parts = []
    for name in ("encoder", "decoder"):
        model = build("y = Gather(shared__weight, i)", "int64[N,S] i", shared__weight=table)
        model.graph.initializers["shared.weight"].metadata_props["graphc.aliases"] = f"{name}.embed.weight"
        model.graph[0].metadata_props["graphc.module"] = f"{name}.embed"
        parts.append(replace(source(model), name=name))
    done = adapted(parts[0].with_others(parts[1:]), Adapters.of([folder]))
    for part in done.parts:
        np.testing.assert_allclose(
            run(part.model, i=ids)[0], (table + delta(folder, "shared"))[ids], rtol=1e-5, atol=1e-6
        )
    assert done.adapted is not None
    assert any("tied to it" in refusal.reason for refusal in done.adapted.refusals)


@pytest.mark.slow
@pytest.mark.parametrize("targets", [["q", "v", "wi"], ["q", "shared"]])
def test_an_encoder_decoder_with_its_adapter(targets: list[str], tmp_path: Path) -> None:
    """The table that the head is tied to is refused: which of its readers follow the adapter cannot be told."""
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
    torch.manual_seed(0)
    net = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, decoder_start_token_id=0, initializer_factor=2.0)
    ).eval()
    net.save_pretrained(tmp_path / "base")
    model = trained(net, L(r=2, target_modules=targets), tmp_path / "a").merge_and_unload()
    options = {"measure": False, "cache": False, "verify": False, "kv_cache": "none"}
    if "shared" in targets:
        with pytest.raises(BadInput, match="tied to its weight"):
            graphc.optimize(tmp_path / "base", tmp_path / "out", adapters=[tmp_path / "a"], **options)
        return
    graphc.optimize(tmp_path / "base", tmp_path / "out", adapters=[tmp_path / "a"], **options)
    ids, start = np.array([[3, 7, 11, 50, 98]]), np.array([[0, 5, 8]])
    ones, first = np.ones_like(ids), np.ones_like(start)
    given_ = {"input_ids": ids, "attention_mask": ones}
    encoded = runtime.session(tmp_path / "out" / "encoder.onnx", optimise=True).run(given_)
    decoder = runtime.session(tmp_path / "out" / "decoder.onnx", optimise=True)
    all_ = {f"past_key_values{k.removeprefix('present')}": v for k, v in encoded.items() if k.startswith("present")}
    all_ |= {"encoder_hidden_states": encoded["last_hidden_state"], "encoder_attention_mask": ones}
    all_ |= {"input_ids": start, "attention_mask": first, "decoder_input_ids": start, "decoder_attention_mask": first}
    logits = decoder.run({name: all_[name] for name in decoder.input_names})["logits"]
    with torch.no_grad():
        wanted = model(input_ids=torch.from_numpy(ids), decoder_input_ids=torch.from_numpy(start)).logits.numpy()
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("axes", "columns_first"), [("", False), ("1 0", False), ("", True), ("1 0", True)])
def test_notes_tell_rows_from_columns_of_a_square_weight(axes: str, columns_first: bool, tmp_path: Path) -> None:
    weight = numbers(8, 8)
    folder = lora(tmp_path / "a", config={"fan_in_fan_out": columns_first}, layer__q=(8, 8))
    model = build('y = Einsum<equation="ni,io->no">(x, layer__q__weight)', ROW, layer__q__weight=weight)
    with pytest.raises(BadInput, match="square"):
        fold(model.clone(), folder)
    model.graph[0].metadata_props["graphc.module"] = "layer.q"
    if axes:
        model.graph.initializers["layer.q.weight"].metadata_props["graphc.axes"] = axes
    change = delta(folder, "layer.q")  # (out, in)
    stored = change.T if bool(axes) != columns_first else change
    np.testing.assert_allclose(weights(fold(model, folder)[0])["layer.q.weight"], weight + stored, rtol=1e-5, atol=1e-6)


def test_big_weights_are_computed_when_they_are_read(tmp_path: Path) -> None:
    folder = lora(tmp_path / "a", q=(600, 500))
    model = build("y = MatMul(x, q__weight)", "float[N,500] x", q__weight=numbers(500, 600))
    done = adapted(source(model), Adapters.of([folder]))
    tensor = done.model.graph.initializers["q.weight"].const_value
    assert isinstance(tensor, ir.LazyTensor) and tensor is done.original.graph.initializers["q.weight"].const_value
    np.testing.assert_allclose(tensor.numpy(), numbers(500, 600) + delta(folder, "q").T, rtol=1e-5, atol=1e-6)


def quantized(kind: str, weight: np.ndarray) -> tuple[ir.Model, Any]:
    """A model with a quantized weight (in, out), and what reads the weight out of it."""
    import ml_dtypes

    inputs, outputs = weight.shape
    if kind == "packed":
        blocks = weight.T.reshape(outputs, inputs // 16, 16)
        scale = np.abs(blocks).max(-1) / 7
        codes = np.clip(np.rint(blocks / scale[..., None]) + 8, 0, 15).astype(np.uint8)
        sizes = f"K={inputs}, N={outputs}, bits=4, block_size=16"
        body = f"y = com.microsoft.MatMulNBits<{sizes}>(x, q__weight_Q4, q__weight_scales)"
        packed = codes[..., 0::2] | codes[..., 1::2] << 4
        return build(body, f"float[N,{inputs}] x", q__weight_Q4=packed, q__weight_scales=scale.astype(np.float32))
    if kind == "int8 per channel":
        scale = (np.abs(weight).max(0) / 127).astype(np.float32)
        codes = np.rint(weight / scale).astype(np.int8)
        body, zero = "d = DequantizeLinear<axis=1>(q__weight_quantized, s)", {}
    elif kind == "uint8 per tensor":
        low, high = weight.min(), weight.max()
        scale = np.float32((high - low) / 255)
        point = np.uint8(np.rint(-low / scale))
        codes = np.clip(np.rint(weight / scale) + point, 0, 255).astype(np.uint8)
        body, zero = "d = DequantizeLinear(q__weight, s, z)", {"z": np.asarray(point)}
        scale = np.asarray(scale)
    else:
        blocks = weight.reshape(inputs // 16, 16, outputs)
        scale = (np.abs(blocks).max(1) / 7).astype(np.float32)
        codes = np.rint(blocks / scale[:, None]).reshape(weight.shape).astype(ml_dtypes.int4)
        body, zero = "d = DequantizeLinear<axis=0, block_size=16>(q__weight, s)", {}
    name = "q__weight_quantized" if "per channel" in kind else "q__weight"
    return build(f"{body} y = MatMul(x, d)", f"float[N,{inputs}] x", s=scale, **{name: codes}, **zero)


@pytest.mark.parametrize(
    "kind, bound", [("int8 per channel", 0.01), ("uint8 per tensor", 0.02), ("int4", 0.12), ("packed", 0.12)]
)
def test_quantized_bases_are_rounded_again(kind: str, bound: float, tmp_path: Path) -> None:
    weight, eye = numbers(32, 24), np.eye(32, dtype=np.float32)
    model = quantized(kind, weight)
    (stands,) = run(model, x=eye)
    folder = lora(tmp_path / "a", q=(24, 32))
    found, done = fold(model, folder)
    assert done.adapted is not None and done.adapted.effect == "lossy"
    wanted = stands + delta(folder, "q").T
    (got,) = run(found, x=eye)
    error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
    assert 0 < error < bound
    assert done.measurements["requantized"]["q.weight"] == pytest.approx(error, rel=1e-2)
    assert "rounded again" in done.warnings[0]
    same_dtype = {n: v.const_value.dtype for n, v in model.graph.initializers.items()}
    assert same_dtype == {n: v.const_value.dtype for n, v in found.graph.initializers.items()}


def test_no_adapter_leaves_a_quantized_weight_on_its_grid(tmp_path: Path) -> None:
    model = quantized("int8 per channel", numbers(32, 24))
    folder = lora(tmp_path / "a", q=(24, 32))
    found, _ = fold(model, f"{folder}=0")
    eye = np.eye(32, dtype=np.float32)
    np.testing.assert_allclose(run(found, x=eye)[0], run(model, x=eye)[0], rtol=1e-5, atol=1e-6)


ROW = "float[N,8] x"


def plain() -> ir.Model:
    return build(
        "h = MatMul(x, layer__q__weight) y = MatMul(h, layer__v__weight)",
        ROW,
        layer__q__weight=numbers(8, 6),
        layer__v__weight=numbers(6, 6),
    )


@pytest.mark.parametrize(
    "layers, config, message",
    [
        ({"layer__q": (7, 8)}, {}, r"does not fit 'layer\.q\.weight'(.|\n)*\[6, 8\], the adapter is for \[7, 8\]"),
        ({"layer__k": (6, 8)}, {}, r"fits nothing(.|\n)*not found: layer\.k\.weight(.|\n)*layer\.[qv]\.weight"),
        ({"layer__q": (6, 8), "layer__k": (6, 8)}, {}, r"the model lacks(.|\n)*layer\.k\.weight"),
        ({"layer__q": (6, 8)}, {"r": 3}, r"rank of 'layer\.q' is wrong(.|\n)*rank 2, the configuration says 3"),
        ({"layer__q": (6, 8)}, {"peft_type": "LOHA"}, r"type LOHA cannot be folded"),
        ({"layer__q": (6, 8)}, {"peft_type": "PROMPT_TUNING"}, r"type PROMPT_TUNING"),
        ({"layer__q": (6, 8)}, {"layer_replication": [[0, 1]]}, r"layer replication"),
        ({"layer__q": (6, 8)}, {"use_qalora": True}, r"QALoRA"),
        ({"layer__q": (6, 8)}, {"init_lora_weights": "pissa_niter_4"}, r"base that was changed(.|\n)*pissa_niter_4"),
        ({"layer__q": (6, 8)}, {"use_dora": True}, r"'layer\.q' is incomplete(.|\n)*lora_magnitude_vector"),
        ({"layer__q": (6, 8)}, {"alpha_pattern": {"q(": 3}}, r"no regular expression"),
    ],
)
def test_adapters_that_do_not_fit(layers: dict[str, Any], config: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = lora(tmp_path / "a", config=config, **layers)
    with pytest.raises(BadInput, match=message) as caught:
        fold(plain(), folder)
    assert str(folder) in str(caught.value)


def damaged(folder: Path, what: str) -> None:
    from safetensors.numpy import load_file, save_file

    path = folder / "adapter_model.safetensors"
    held = load_file(path)
    first, second = sorted(held)
    match what:
        case "NaN":
            held[first] = np.full_like(held[first], np.nan)
        case "half":
            del held[second]
        case "ranks":
            held[first] = held[first][:1]
        case "empty":
            held = {}
        case "integers":
            held[first] = held[first].astype(np.int32)
    save_file(held, path)
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    if what == "missing":
        path.unlink()
    if what == "config":
        (folder / "adapter_config.json").write_text("[1")
    if what == "no config":
        (folder / "adapter_config.json").unlink()


@pytest.mark.parametrize(
    "what, message",
    [
        ("NaN", r"layer\.q\.lora_A\.weight' has NaN"),
        ("half", r"'layer\.q' is incomplete(.|\n)*no lora_B"),
        ("ranks", r"ranks of 'layer\.q' differ(.|\n)*\[1, 8\](.|\n)*\[6, 2\]"),
        ("empty", r"is empty"),
        ("integers", r"int32, not floating"),
        ("truncated", r"no safetensors file"),
        ("missing", r"has no weights"),
        ("config", r"cannot read the adapter's configuration"),
        ("no config", r"no adapter folder"),
    ],
)
def test_damaged_adapters(what: str, message: str, tmp_path: Path) -> None:
    folder = lora(tmp_path / "a", layer__q=(6, 8))
    damaged(folder, what)
    with pytest.raises(BadInput, match=message):
        fold(plain(), folder)


def test_a_pickled_adapter_is_read_without_unpickling(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    folder = lora(tmp_path / "a", layer__q=(6, 8))
    wanted = weights(fold(plain(), folder)[0])
    held = {name: torch.tensor(array) for name, array in load_file(folder / "adapter_model.safetensors").items()}
    (folder / "adapter_model.safetensors").unlink()
    torch.save(held, folder / "adapter_model.bin")
    same(weights(fold(plain(), folder)[0]), wanted)
    torch.save({"a": Experts}, folder / "adapter_model.bin")
    with pytest.raises(BadInput, match="cannot read the adapter"):
        fold(plain(), folder)


@pytest.mark.parametrize(
    "how, message",
    [
        ({"combine": "tise"}, "did you mean 'ties'"),
        ({"combine": "ties{densty=1}"}, "did you mean 'density'"),
        ({"combine": "ties{density=2}"}, "out of range"),
        ({"combine": "della{density=0.95}"}, "within 0 and 1"),
        ({"combine": "cat,ties"}, "takes one method"),
        ({"mode": "folded"}, "did you mean 'fold'"),
        ({"mode": "dynamic", "combine": "ties"}, "not combined"),
    ],
)
def test_flags_that_cannot_be_used(how: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        Adapters.of([tmp_path], **how)


def test_weights_of_adapters(tmp_path: Path) -> None:
    assert Adapter.parse("a/b=0.5") == Adapter(Path("a/b"), 0.5)
    assert Adapter.parse("a=-1e-1").text() == "a=-0.1"
    (tmp_path / "x=2").mkdir()
    assert Adapter.parse(str(tmp_path / "x=2")).weight == 1
    with pytest.raises(BadInput, match="is a number"):
        Adapter.parse("a=half")
    with pytest.raises(BadInput, match="no adapter to combine"):
        Adapters.of([], combine="ties")


def test_methods_on_factors_need_equal_ranks(tmp_path: Path) -> None:
    folders = [lora(tmp_path / "a", layer__q=(6, 8)), lora(tmp_path / "b", rank=3, layer__q=(6, 8))]
    with pytest.raises(BadInput, match=r"needs adapters of one rank(.|\n)*2 and 3"):
        fold(plain(), *folders, combine="linear")
    for method in ("cat", "svd", "ties{of=delta}", "della", "star"):
        assert fold(plain(), *folders, combine=method)[1].adapted is not None


def test_switchable_adapters(tmp_path: Path) -> None:
    import onnxruntime as ort

    model = build(
        "e = Gather(embed__weight, i) h = MatMul(e, q__weight) t = Transpose<perm=[1,0]>(v__weight) y = MatMul(h, t) "
        "c = Conv<pads=[1,1,1,1]>(image, conv__weight)",
        "int64[N,S] i, float[N,3,5,5] image",
        "y c",
        embed__weight=numbers(11, 6),
        q__weight=numbers(6, 7),
        v__weight=numbers(7, 7, seed=3),
        conv__weight=numbers(4, 3, 3, 3),
    )
    onnx.save(ir.to_proto(model), tmp_path / "m.onnx")
    config = L(r=2, target_modules=["embed", "q", "v", "conv"])

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.q, self.v = nn.Embedding(11, 6), nn.Linear(6, 7), nn.Linear(7, 7)
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

    trained(Small(), config, tmp_path / "first")
    trained(Small(), L(r=3, target_modules=["q"]), tmp_path / "second", seed=4)
    report = graphc.optimize(
        tmp_path / "m.onnx",
        tmp_path / "out",
        adapters=[tmp_path / "first", f"{tmp_path / 'second'}=0.5"],
        adapter_mode="dynamic",
        cache=False,
        measure=False,
    )
    assert report.rewrite["checked"] and report.ok
    assert {"first.onnx_adapter", "second.onnx_adapter"} <= {p.name for p in (tmp_path / "out").iterdir()}
    feeds = {"i": np.array([[1, 3, 7]]), "image": numbers(1, 3, 5, 5)}
    for level in (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        options.log_severity_level = 3
        session = ort.InferenceSession(tmp_path / "out" / "model.onnx", options)
        plain_ = run(load_source(tmp_path / "m.onnx").model, **feeds)
        for got, wanted in zip(session.run(None, feeds), plain_, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
        for name, weight in (("first", 1), ("second", 0.5)):
            adapter = ort.LoraAdapter()
            adapter.Load(str(tmp_path / "out" / f"{name}.onnx_adapter"))
            chosen = ort.RunOptions()
            chosen.add_active_adapter(adapter)
            folded, _ = fold(ir.load(tmp_path / "m.onnx"), f"{tmp_path / name}={weight}")
            for got, wanted in zip(session.run(None, feeds, chosen), run(folded, **feeds), strict=True):
                np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_only_low_rank_updates_can_be_switched(tmp_path: Path) -> None:
    folder = lora(tmp_path / "a", config={"peft_type": "IA3"}, layer__q=(6, 8))
    from safetensors.numpy import save_file

    save_file({"base_model.model.layer.q.ia3_l": numbers(6, 1)}, folder / "adapter_model.safetensors")
    with pytest.raises(BadInput, match=r"cannot be switched(.|\n)*'layer\.q\.weight' has IA3"):
        fold(plain(), folder, mode="dynamic")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from graphc.cli import main

    monkeypatch.setenv("GRAPHC_CACHE_DIR", str(tmp_path / "cache"))
    onnx.save(ir.to_proto(plain()), tmp_path / "m.onnx")
    folder = lora(tmp_path / "a", layer__q=(6, 8))
    command = ["optimize", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "o.onnx"), "--no-measure"]
    command += ["--depfile", str(tmp_path / "o.d"), "--report", str(tmp_path / "o.json")]

    def written(*more: str) -> np.ndarray:
        assert main([*command, *more]) == 0
        return weights(ir.load(tmp_path / "o.onnx"))["layer.q.weight"]

    before = numbers(8, 6)
    change = delta(folder, "layer.q").T
    np.testing.assert_allclose(written("--adapter", str(folder)), before + change, rtol=1e-5, atol=1e-6)
    assert "adapter" in capsys.readouterr().out
    depends = (tmp_path / "o.d").read_text()
    assert "adapter_config.json" in depends and "adapter_model.safetensors" in depends
    entry = json.loads((tmp_path / "o.json").read_text())["passes"][0]
    assert entry["name"] == "adapter" and entry["changes"] == ["LoRA of rank 2 folded"]
    # The cache tells weights and contents of adapters apart.
    np.testing.assert_allclose(written("--adapter", f"{folder}=0.5"), before + change / 2, rtol=1e-5, atol=1e-6)
    lora(folder, seed=7, layer__q=(6, 8))
    other = delta(folder, "layer.q").T
    np.testing.assert_allclose(written("--adapter", str(folder)), before + other, rtol=1e-5, atol=1e-6)
    assert main([*command, "--adapter", str(folder), "--stop-after", "simplify"]) == 0
    capsys.readouterr()
    resumed = ["optimize", str(tmp_path / "o.onnx"), "-o", str(tmp_path / "p.onnx"), "--resume"]
    assert main([*resumed, "--adapter", str(folder)]) == 2
    assert "leave --adapter out" in capsys.readouterr().err
    assert main([*resumed, "--no-measure"]) == 0
    assert main([*command, "--adapter", str(tmp_path / "none")]) == 2
    assert "there is no such adapter" in capsys.readouterr().err
