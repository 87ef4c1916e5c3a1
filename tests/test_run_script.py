"""``run.py`` of decoders: caches bound from step to step, or appended to in place, give the tokens of a plain loop."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graphc import caches, runtime
from graphc.backends.onnxruntime import OnnxRuntime
from graphc.passes.lower import Lower
from graphc.runtime.scripts import script
from tests.recognised_models import always
from tests.small_models import build, numbers


def decoder(new: str, past: bool = True) -> ir.Model:
    """Token ids to logits by one attention of two heads on one; without a past it gives the first keys and values."""
    held = (
        "x = Gather(table, input_ids) k = MatMul(x, wk) v = MatMul(x, wv) m0 = Cast<to=1>(attention_mask) "
        "m1 = Unsqueeze(m0, at) m2 = Sub(m1, one) mask0 = Mul(m2, big) n = Shape<start=1,end=2>(input_ids) "
        "z = Concat<axis=0>(ones, n, ones1) mask = Expand(mask0, z) "
    )
    attend = "y, present_k, present_v = Attention<q_num_heads=2,kv_num_heads=1,scale=0.3>"
    body = f"{held} {attend}(x, k, v, mask{', past_k, past_v' if past else ''}) logits = MatMul(y, head)"
    x = f"int64[B,{new}] input_ids, int64[B,T] attention_mask"
    x += ", float[B,1,P,8] past_k, float[B,1,P,8] past_v" if past else ""
    known = {
        "table": numbers(20, 16),
        "wk": numbers(16, 8, seed=1),
        "wv": numbers(16, 8, seed=2),
        "head": numbers(16, 20, seed=3),
        "at": np.array([1, 2]),
        "one": np.float32(1),
        "big": np.float32(1e9),
        "ones": np.array([1, 1]),
        "ones1": np.array([1]),
    }
    arrays = {name: np.asarray(value) for name, value in known.items()}
    model = build(body, x=x, outputs="logits present_k present_v", opset=23, **arrays)
    for output, shape in zip(model.graph.outputs, (["B", new, 20], ["B", 1, "T", 8], ["B", 1, "T", 8]), strict=True):
        output.dtype, output.shape = ir.DataType.FLOAT, ir.Shape([int(n) if str(n).isdigit() else n for n in shape])
    if past:
        for value in model.graph.inputs:
            if value.name == "attention_mask":
                value.shape = ir.Shape(["B", f"P + {new}"])
    return model


def plain(ids: np.ndarray, mask: np.ndarray, tokens: int) -> np.ndarray:
    """The same tokens without any cache: the whole text again and again."""
    session = runtime.session(decoder("S"), optimise=False, threads=1)
    past = {name: np.zeros((len(ids), 1, 0, 8), np.float32) for name in ("past_k", "past_v")}
    made = []
    for _ in range(tokens):
        found = session.run({"input_ids": ids, "attention_mask": mask, **past})
        best = found["logits"][:, -1].argmax(-1)[:, None]
        made.append(best)
        ids, mask = np.concatenate([ids, best], 1), np.concatenate([mask, np.ones_like(best)], 1)
    return np.concatenate(made, 1)


def test_a_run_continues_a_padded_batch(tmp_path: Path) -> None:
    ids, mask = np.array([[3, 1, 4, 1], [0, 0, 5, 9]]), np.array([[1, 1, 1, 1], [0, 0, 1, 1]])
    wanted = plain(ids, mask, 6)
    np.savez(tmp_path / "inputs.npz", input_ids=ids, attention_mask=mask)
    decode = decoder("1")
    Lower(only=("group-query-attention",), in_place=True).run(decode, always(0.5))
    assert caches.in_place(decode) and not caches.in_place(decoder("1"))
    assert caches.pairs(decode) == {"past_k": "present_k", "past_v": "present_v"}
    target = OnnxRuntime(portable=False, threads=1)
    for name, models in (
        ("merged", {"model": decoder("S")}),
        ("split", {"prefill": decoder("S", False), "decode": decode}),
        ("one token", {"model": decode}),
    ):
        folder = tmp_path / name
        folder.mkdir()
        if "model" in models:
            manifest = {"runtime": target.emit(models["model"], folder)}
        else:
            needs = target.emit_parts(models, folder)
            manifest = {"parts": {part: {"runtime": each} for part, each in needs.items()}}
            assert needs["decode"]["in_place"]
        (folder / "graphc.json").write_text(json.dumps(manifest))
        command = [sys.executable, "-I", folder / "run.py", tmp_path / "inputs.npz", "6"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        found = np.array([line.split() for line in done.stdout.splitlines()], int)
        assert found.tolist() == wanted.tolist(), name


@pytest.mark.parametrize("several", [False, True])
def test_other_models_have_the_script_that_runs_them_once(several: bool) -> None:
    model = build("y = Relu(x)", x="float[2] x")
    text = script([model, model] if several else [model])
    assert ("Run the model beside this file" in text) != several
