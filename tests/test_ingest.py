"""Recipes that take in what pruning during training leaves: zeros, gates, masks. The result computes what training did.

The references are numpy, written after the papers, in float64.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from graphc import pipeline, runtime
from graphc.recipe import Recipe
from graphc.report import Report
from tests.small_models import hold

Array = np.ndarray[Any, np.dtype[Any]]
HEADS, DIM, WIDTH, NEURONS, LAYERS = 4, 3, 12, 10, 2
EPSILON = 1e-5


def normal(seed: int, *shape: int) -> Array:
    return (np.random.default_rng((seed, *shape)).normal(size=shape) / math.sqrt(shape[0])).astype(np.float32)


def save(path: Path, body: str, inputs: str, outputs: str, constants: dict[str, Array]) -> Path:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 21]> g ({inputs}) => ({outputs}) {{ {body} }}')
    hold(model, **constants)
    for i, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{i}"
    ir.save(model, path)
    return path


def ingest(path: Path, name: str, mask: Path | None = None) -> Report:
    recipe = Recipe.named(name)
    if mask is not None:
        recipe = recipe.with_option("mask", str(mask))
    report = pipeline.optimize(path, recipe=recipe, measure=False, cache=False)
    assert report.ok, [(p.name, p.error) for p in report.passes if p.error]
    return report


def run(model: ir.Model | None, x: Array) -> Array:
    assert model is not None
    (y,) = runtime.session(model, optimise=False).run({"x": x}).values()
    return y


def close(got: Array, wanted: Array) -> None:
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def size(model: ir.Model | None, name: str) -> tuple[int, ...]:
    assert model is not None
    return tuple(model.graph.initializers[name].shape.numpy())  # type: ignore[union-attr]


def weights() -> dict[str, Array]:
    made: dict[str, Array] = {}
    for i in range(LAYERS):
        for j, (name, shape) in enumerate(
            {"q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH), "v": (WIDTH, WIDTH), "o": (WIDTH, WIDTH),
             "u": (WIDTH, NEURONS), "d": (NEURONS, WIDTH)}.items()
        ):  # fmt: skip
            made[f"{name}{i}"] = normal(10 * i + j, *shape)
            made[f"{name}{i}b"] = 0.3 * normal(100 + 10 * i + j, shape[1]) + 0.1
        for name in "ae":
            made[f"{name}{i}"] = 1 + 0.1 * normal(50 + i, WIDTH)
            made[f"{name}{i}b"] = 0.1 * normal(60 + i, WIDTH)
    made["head"], made["headb"] = normal(99, WIDTH, 5), normal(98, 5)
    return made


def gates() -> dict[str, Array]:
    """CoFi's z of each layer: heads, neurons, both sublayers."""
    found: dict[str, Array] = {}
    for i in range(LAYERS):
        found[f"zh{i}"] = np.ones((HEADS, 1, 1), np.float32)
        found[f"zi{i}"] = np.ones(NEURONS, np.float32)
        found[f"za{i}"] = found[f"zm{i}"] = np.ones((), np.float32)
    found["zh0"][:, 0, 0] = [0, 0.7, 1, 0]
    found["zi0"][:] = [1, 0, 0.4, 0, 0, 1, 0.9, 0, 1, 0]
    found["za1"] = np.zeros((), np.float32)
    found["zi1"][:4] = 0
    found["zm1"] = np.array(0.8, np.float32)
    return found


def encoder(gated: bool) -> str:
    """BERT's layers, norms after the sums; with CoFi's factors."""
    lines, x = [], "x"
    for i in range(LAYERS):
        for p in "qkv":
            lines.append(f"{p}m{i} = MatMul({x}, {p}{i}) {p}a{i} = Add({p}m{i}, {p}{i}b)")
            lines.append(f"{p}r{i} = Reshape({p}a{i}, split) {p}t{i} = Transpose<perm=[0,2,1,3]>({p}r{i})")
        lines.append(f"kk{i} = Transpose<perm=[0,1,3,2]>(kt{i})")
        lines.append(f"s{i} = MatMul(qt{i}, kk{i}) c{i} = Mul(s{i}, scale) w{i} = Softmax<axis=-1>(c{i})")
        lines.append(f"x{i} = MatMul(w{i}, vt{i})" + (f" xz{i} = Mul(x{i}, zh{i})" if gated else ""))
        context = f"xz{i}" if gated else f"x{i}"
        lines.append(f"xt{i} = Transpose<perm=[0,2,1,3]>({context}) xr{i} = Reshape(xt{i}, join)")
        lines.append(f"om{i} = MatMul(xr{i}, o{i}) oa{i} = Add(om{i}, o{i}b)")
        branch = f"oa{i}"
        if gated:
            lines.append(f"oz{i} = Mul(oa{i}, za{i})")
            branch = f"oz{i}"
        lines.append(f"h{i} = Add({x}, {branch}) n{i} = LayerNormalization<axis=-1>(h{i}, a{i}, a{i}b)")
        lines.append(f"um{i} = MatMul(n{i}, u{i}) ua{i} = Add(um{i}, u{i}b) g{i} = Gelu(ua{i})")
        hidden = f"g{i}"
        if gated:
            lines.append(f"gz{i} = Mul(g{i}, zi{i})")
            hidden = f"gz{i}"
        lines.append(f"dm{i} = MatMul({hidden}, d{i}) da{i} = Add(dm{i}, d{i}b)")
        branch = f"da{i}"
        if gated:
            lines.append(f"dz{i} = Mul(da{i}, zm{i})")
            branch = f"dz{i}"
        lines.append(f"j{i} = Add(n{i}, {branch}) y{i} = LayerNormalization<axis=-1>(j{i}, e{i}, e{i}b)")
        x = f"y{i}"
    return " ".join([*lines, f"ym = MatMul({x}, head) y = Add(ym, headb)"])


def saved(path: Path, held: dict[str, Array], gated: bool) -> Path:
    sizes = {
        "split": np.array([0, 0, -1, DIM]), "join": np.array([0, 0, -1]), "scale": np.array(DIM**-0.5, np.float32),
    }  # fmt: skip
    return save(path, encoder(gated), f"float[N,S,{WIDTH}] x", "float[N,S,5] y", {**held, **sizes})


def norm(x: Array, scale: Array, bias: Array, kept: Array | None = None) -> Array:
    """LayerNorm; over the kept units only, the others being left as they come, as CoFi's does."""
    kept = np.ones(x.shape[-1], bool) if kept is None else kept
    part = x[..., kept]
    part = (part - part.mean(-1, keepdims=True)) / np.sqrt(part.var(-1, keepdims=True) + EPSILON)
    y = x.copy()
    y[..., kept] = part * scale[kept] + bias[kept]
    return y


def reference(w: dict[str, Array], z: dict[str, Array], x: Array, hidden: Array | None = None) -> Array:
    w = {name: array.astype(np.float64) for name, array in w.items()}
    kept = hidden if hidden is not None else np.ones(WIDTH, bool)
    x = x.astype(np.float64) * kept
    for i in range(LAYERS):
        q, k, v = (
            (x @ w[f"{p}{i}"] + w[f"{p}{i}b"]).reshape(*x.shape[:2], HEADS, DIM).transpose(0, 2, 1, 3) for p in "qkv"
        )
        scores = np.exp(q @ k.transpose(0, 1, 3, 2) / math.sqrt(DIM))
        context = (scores / scores.sum(-1, keepdims=True)) @ v * z[f"zh{i}"]
        out = context.transpose(0, 2, 1, 3).reshape(x.shape) @ w[f"o{i}"] + w[f"o{i}b"]
        x = norm(x + out * z[f"za{i}"] * kept, w[f"a{i}"], w[f"a{i}b"], kept)
        up = x @ w[f"u{i}"] + w[f"u{i}b"]
        up = up * 0.5 * (1 + np.vectorize(math.erf)(up / math.sqrt(2))) * z[f"zi{i}"]
        x = norm(x + (up @ w[f"d{i}"] + w[f"d{i}b"]) * z[f"zm{i}"] * kept, w[f"e{i}"], w[f"e{i}b"], kept)
    return x @ w["head"] + w["headb"]


OPEN = {f"{z}{i}": np.ones(()) for z in ("zh", "za", "zi", "zm") for i in range(LAYERS)}
X = np.random.default_rng(7).normal(size=(2, 6, WIDTH)).astype(np.float32)


def test_cofi_gates_of_heads_neurons_and_layers(tmp_path: Path) -> None:
    w, z = weights(), gates()
    report = ingest(saved(tmp_path / "m.onnx", {**w, **z}, True), "cofi-ingest")
    close(run(report.model, X), reference(w, z, X))
    assert size(report.model, "v0") == (WIDTH, 2 * DIM)
    assert size(report.model, "u0") == (WIDTH, 5)
    assert size(report.model, "u1") == (WIDTH, NEURONS - 4)
    assert report.model is not None and "q1" not in report.model.graph.initializers


def test_cofi_masks_from_a_file(tmp_path: Path) -> None:
    """Heads, neurons and hidden units by a file; norms average over the hidden units that are left."""
    w = weights()
    w["embed"] = normal(5, 7, WIDTH)
    z = dict(OPEN) | {"zh1": np.array([1, 0, 1, 1.0])[:, None, None], "zi0": np.arange(NEURONS) % 3 != 0}
    hidden = np.arange(WIDTH) % 4 != 1
    body = encoder(False).replace("(x, ", "(ex, ")
    body = f"ex = MatMul(x, embed) {body}"
    sizes = {
        "split": np.array([0, 0, -1, DIM]), "join": np.array([0, 0, -1]), "scale": np.array(DIM**-0.5, np.float32),
    }  # fmt: skip
    path = save(tmp_path / "m.onnx", body, "float[N,S,7] x", "float[N,S,5] y", {**w, **sizes})
    save_file(
        {"v1:1": np.repeat(z["zh1"][:, 0, 0] > 0, DIM), "u0:1": z["zi0"], "embed:1": hidden}, tmp_path / "m.safetensors"
    )
    report = ingest(path, "cofi-ingest", tmp_path / "m.safetensors")
    x = np.random.default_rng(7).normal(size=(2, 6, 7)).astype(np.float32)
    embedded = x.astype(np.float64) @ w["embed"].astype(np.float64)
    masked = {n: a * hidden[:, None] if n[0] in "quk" and a.ndim == 2 and len(a) == WIDTH else a for n, a in w.items()}
    masked["head"] = w["head"] * hidden[:, None]
    for i in range(LAYERS):
        masked[f"v{i}"] = w[f"v{i}"] * hidden[:, None]
    close(run(report.model, x), reference(masked, z, embedded, hidden))
    assert size(report.model, "head") == (int(hidden.sum()), 5)
    assert size(report.model, "q1") == (int(hidden.sum()), 3 * DIM)


def test_movements_zero_tiles(tmp_path: Path) -> None:
    """Neurons whose columns or rows are zero, a head without values, and a tile inside of what stays."""
    w = weights()
    w["u0"][:, [1, 4]] = 0  # what is left of them is the activation of their bias
    w["d0"][[2, 4, 7]] = 0  # nobody reads them, whatever they are
    w["v0"][:, DIM : 2 * DIM] = 0
    w["v0b"][DIM : 2 * DIM] = 0
    w["o1"][:DIM] = 0
    w["q1"][:4, :4] = 0
    report = ingest(saved(tmp_path / "m.onnx", w, False), "movement-ingest")
    close(run(report.model, X), reference(w, OPEN, X))
    assert size(report.model, "u0") == (WIDTH, NEURONS - 4)
    assert size(report.model, "d0") == (NEURONS - 4, WIDTH)
    assert size(report.model, "o0") == ((HEADS - 1) * DIM, WIDTH)
    assert size(report.model, "q1") == (WIDTH, (HEADS - 1) * DIM)


def test_only_train_onces_zero_groups(tmp_path: Path) -> None:
    """A channel's filter, bias and norm are zero; consumers keep what they had. Two layers share a residual stream."""
    held = {
        "a": normal(1, 8, 3, 3, 3), "b": normal(2, 6, 8, 3, 3), "c": normal(3, 8, 6, 3, 3), "f": normal(4, 8, 5),
        "fb": normal(5, 5),
    }  # fmt: skip
    channels = {"a": 8, "b": 6, "c": 8}
    for i, (name, count) in enumerate(channels.items()):
        held |= {
            f"{name}g": 1 + normal(10 + i, count), f"{name}h": normal(20 + i, count), f"{name}m": normal(30 + i, count),
            f"{name}v": 1 + np.abs(normal(40 + i, count)),
        }  # fmt: skip
    for name, gone in {"a": [0, 5], "c": [0, 5], "b": [1, 2, 3]}.items():
        for part in ("", "g", "h"):
            held[name + part][gone] = 0
    bn = "BatchNormalization"
    path = save(
        tmp_path / "m.onnx",
        f"p = Conv<pads=[1,1,1,1]>(x, a) q = {bn}(p, ag, ah, am, av) r = Relu(q) "
        f"s = Conv<pads=[1,1,1,1]>(r, b) t = {bn}(s, bg, bh, bm, bv) u = Relu(t) "
        f"v = Conv<pads=[1,1,1,1]>(u, c) w = {bn}(v, cg, ch, cm, cv) z = Add(w, r) k = Relu(z) "
        "l = GlobalAveragePool(k) n = Flatten(l) y = Gemm(n, f, fb)",
        "float[N,3,6,6] x",
        "float[N,5] y",
        held,
    )
    x = np.random.default_rng(3).normal(size=(2, 3, 6, 6)).astype(np.float32)
    wanted = run(ir.load(path), x)
    report = ingest(path, "oto-ingest")
    close(run(report.model, x), wanted)
    assert size(report.model, "f") == (6, 5)
    assert size(report.model, "b") == (3, 6, 3, 3)


def test_lora_prunes_masks_after_its_adapters(tmp_path: Path) -> None:
    held = {
        "u": normal(1, 6, 8), "ua": normal(2, 6, 2), "ub": normal(3, 2, 8),
        "d": normal(4, 8, 6), "da": normal(5, 8, 2), "db": normal(6, 2, 6), "s": np.array(2, np.float32),
    }  # fmt: skip
    path = save(
        tmp_path / "m.onnx",
        "a = MatMul(x, u) b = MatMul(x, ua) c = MatMul(b, ub) e = Mul(c, s) f = Add(a, e) g = Relu(f) "
        "h = MatMul(g, d) i = MatMul(g, da) j = MatMul(i, db) k = Mul(j, s) y = Add(h, k)",
        "float[N,6] x",
        "float[N,6] y",
        held,
    )
    mask = np.array([1, 0, 1, 1, 0, 0, 1, 1], bool)
    save_file({"u:1": mask}, tmp_path / "mask.safetensors")
    report = ingest(path, "loraprune-ingest", tmp_path / "mask.safetensors")
    x = np.random.default_rng(3).normal(size=(9, 6)).astype(np.float32)
    w = {name: array.astype(np.float64) for name, array in held.items()}
    hidden = np.maximum(x @ (w["u"] + 2 * w["ua"] @ w["ub"]), 0) * mask
    close(run(report.model, x), hidden @ (w["d"] + 2 * w["da"] @ w["db"]))
    assert size(report.model, "u") == (6, 5) and size(report.model, "d") == (5, 6)


def test_without_a_mask_only_what_is_zero_goes(tmp_path: Path) -> None:
    w = weights()
    report = ingest(saved(tmp_path / "m.onnx", w, False), "loraprune-ingest")
    close(run(report.model, X), reference(w, OPEN, X))
    assert size(report.model, "u0") == (WIDTH, NEURONS)


@pytest.mark.parametrize("name", ["oto-ingest", "movement-ingest", "cofi-ingest", "loraprune-ingest", "adapt-pruner"])
def test_recipes_name_their_paper(name: str) -> None:
    assert "(20" in Recipe.named(name).description
