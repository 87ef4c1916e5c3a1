"""Small models, their data, and plain numpy references, for the tests of ``quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc import runtime
from graphc.collection import Collector
from graphc.contract import Capabilities, Context, PassResult
from graphc.opset.portable import portable
from graphc.passes.quantize import Quantize
from tests.small_models import hold

CONTEXT = Context(Capabilities("portable", 13, {"": 26}))
DATA = Path(__file__).parent / "data"


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def build(body: str, inputs: str, outputs: str, opset: int = 21, **constants: np.ndarray) -> ir.Model:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}')
    hold(model, **constants)
    for i, node in enumerate(model.graph):
        node.name = node.name or f"{node.op_type}_{i}"
    return model


def mlp(**options: Any) -> ir.Model:
    weights = {"w": normal(64, 48), "b": normal(48), "v": normal(32, 48, seed=1), "c": normal(32, seed=1)} | options
    return build(
        "h = MatMul(x, w) a = Add(h, b) r = Relu(a) y = Gemm<transB=1>(r, v, c)",
        "float[N,64] x",
        "float[N,32] y",
        **weights,
    )


def images(groups: int = 1) -> ir.Model:
    return build(
        f"a = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(a) s = Conv<pads=[1,1,1,1],group={groups}>(r, v, c) "
        "t = Add(s, r) u = Relu(t) g = GlobalAveragePool(u) f = Flatten(g) y = Gemm<transB=1>(f, h, d)",
        "float[N,3,8,8] x",
        "float[N,10] y",
        w=normal(16, 3, 3, 3),
        b=normal(16),
        v=normal(16, 16 // groups, 3, 3, seed=2),
        c=normal(16, seed=2),
        h=normal(10, 16),
        d=normal(10),
    )


def run(model: ir.Model, optimise: bool = False, **feeds: np.ndarray) -> dict[str, np.ndarray]:
    return runtime.session(portable(model, CONTEXT.target), optimise=optimise, threads=1).run(feeds)


def context(samples: list[dict[str, np.ndarray]]) -> Context:
    return Context(CONTEXT.target, collect=Collector(samples, []).collect, calibration=samples)


def rows(count: int = 4, size: int = 20, width: int = 64) -> list[dict[str, np.ndarray]]:
    mix = normal(width, width, seed=9)
    return [{"x": (normal(size, width, seed=i) @ mix).astype(np.float32)} for i in range(count)]


def pictures(count: int = 4) -> list[dict[str, np.ndarray]]:
    return [{"x": normal(4, 3, 8, 8, seed=i)} for i in range(count)]


def quantized(model: ir.Model, ctx: Context = CONTEXT, **options: Any) -> PassResult:
    return Quantize(**{"least": 0, **options}).run(model, ctx)


def held(model: ir.Model, name: str) -> np.ndarray:
    value = model.graph.initializers[name].const_value
    assert value is not None
    return value.numpy()


def reasons(result: PassResult) -> set[str]:
    return {refusal.reason for refusal in result.refusals}


def reference(w: np.ndarray, bits: int, symmetric: bool, axis: int | None, block: int) -> np.ndarray:
    """What a weight becomes, one group at a time."""
    out = np.empty_like(w)
    moved, target = (w, out) if axis is None else (np.moveaxis(w, axis, -1), np.moveaxis(out, axis, -1))
    if axis is None:
        groups = [(..., slice(None))]
    elif not block:
        groups = [(..., i) for i in range(moved.shape[-1])]
    else:
        groups = [
            (*index, slice(i, i + block))
            for index in np.ndindex(moved.shape[:-1])
            for i in range(0, moved.shape[-1], block)
        ]
    for group in groups:
        part = moved[group].astype(np.float64)
        low, high, half = min(part.min(), 0), max(part.max(), 0), 1 << (bits - 1)
        if symmetric:
            scale, zero, least, most = max(high / (half - 1), -low / half), 0, -half, half - 1
        else:
            scale, least, most = (high - low) / (2 * half - 1), 0, 2 * half - 1
        scale = np.float32(scale) if scale else np.float32(1)
        if not symmetric:
            zero = np.clip(np.rint(-low / np.float64(scale)), least, most)
        tried = [scale]
        if symmetric and bits <= 4 and scale != 1:  # or the largest value at the code that only one side has
            turned = np.float32(max(high, -low) / half)
            tried.append(-turned if high > -low else turned)
        losses = []
        for each in tried:
            codes = np.clip(np.rint(moved[group] / each) + zero, least, most)
            losses.append((np.square((codes - zero) * each - moved[group]).sum(), (codes - zero) * each))
        target[group] = min(losses, key=lambda loss: loss[0])[1]
    return out
