"""``graphc.fx`` on control flow: the branches, steps and weights are those of ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")

from graphc import runtime  # noqa: E402
from graphc.frontends.onnx import load  # noqa: E402
from graphc.fx import from_torch, to_torch  # noqa: E402

SILERO = Path(__file__).parent / "data" / "silero_vad.onnx"

BRANCHES = """<ir_version: 10, opset_import: ["" : 21]>
g (float[n, 2] x, bool c) => (float[n, 2] y)
<float[2, 2] w = {1, 2, 3, 4}>
{
  y = If (c) <
    then_branch = a () => (float[n, 2] p) { v = Constant<value = float[2] {5, 6}>() t = MatMul(x, w) p = Add(t, v) },
    else_branch = b () => (float[n, 2] q) { v = Constant<value = float[2] {7, 8}>() q = Mul(x, v) }
  >
}"""

LOOP = """<ir_version: 10, opset_import: ["" : 21]>
g (float[2] x, int64 trips) => (float[2] y, float[s, 2] all, int64 last)
<float[2] w = {0.5, 2}, int64 none = {0}>
{
  yes = Constant<value = bool {1}>()
  y, last, all = Loop (trips, yes, x, none) <
    body = b (int64 i, bool k, float[2] h, int64 n) => (bool more, float[2] next, int64 step, float[2] row) {
      scaled = Mul(h, w)
      f = Cast<to = 1>(i)
      next = Add(scaled, f)
      row = Identity(next)
      step = Identity(i)
      three = Constant<value = int64 {3}>()
      more = Less(i, three)
    }
  >
}"""

SCAN = """<ir_version: 10, opset_import: ["" : 21]>
g (float[2] h, float[t, 2] x) => (float[2] y, float[t, 2] all)
<float[2] w = {0.5, 2}>
{
  y, all = Scan <num_scan_inputs = 1, scan_input_directions = [1], scan_output_directions = [0],
    body = b (float[2] s, float[2] e) => (float[2] next, float[2] row) {
      scaled = Mul(s, w)
      next = Add(scaled, e)
      row = Neg(next)
    }
  > (h, x)
}"""


def agree(model: ir.Model, feeds: dict[str, Any]) -> Any:
    module = to_torch(model)
    wanted = runtime.session(model, optimise=False, threads=1).run(feeds)
    got = module(*(torch.from_numpy(np.asarray(feeds[name])) for name in module.meta["inputs"].values()))
    for name, array in wanted.items():
        assert got[name].shape == array.shape
        np.testing.assert_allclose(got[name].detach().numpy(), array, rtol=1e-6, atol=1e-6)
    return module, got


@pytest.mark.parametrize("condition", [True, False])
def test_if_runs_one_branch_and_its_weights_keep_their_names(condition: bool) -> None:
    model = ir.from_onnx_text(BRANCHES)
    module, got = agree(model, {"x": np.ones((3, 2), np.float32), "c": np.array(condition)})
    assert module.meta["initializers"] == {"w": "w", "v": "v", "v#2": "v#2"}
    got["y"].sum().backward()
    trained = {name for name, p in module.named_parameters() if p.grad is not None}
    assert trained == ({"w", "v"} if condition else {"v#2"})


def test_trained_weights_go_back_into_their_own_branch() -> None:
    model = ir.from_onnx_text(BRANCHES)
    module = to_torch(model)
    with torch.no_grad():
        module.v.fill_(50)
        module.get_parameter("v#2").fill_(70)
    changed = from_torch(module, model)
    feeds = {"x": np.ones((1, 2), np.float32)}
    session = runtime.session(changed, optimise=False, threads=1)
    np.testing.assert_array_equal(session.run({**feeds, "c": np.array(True)})["y"], [[54, 56]])
    np.testing.assert_array_equal(session.run({**feeds, "c": np.array(False)})["y"], [[70, 70]])


@pytest.mark.parametrize("trips", [0, 1, 2, 9])
def test_loop_stops_by_count_or_condition(trips: int) -> None:
    model = ir.from_onnx_text(LOOP)
    module, got = agree(model, {"x": np.array([1, 2], np.float32), "trips": np.array(trips)})
    if trips:
        got["all"].sum().backward()
        assert module.w.grad is not None and bool((module.w.grad != 0).all())


def test_scan_runs_backwards_over_its_input() -> None:
    rng = np.random.default_rng(0)
    h, x = rng.standard_normal(2, np.float32), rng.standard_normal((5, 2), np.float32)
    agree(ir.from_onnx_text(SCAN), {"h": h, "x": x})


@pytest.mark.parametrize(("samples", "rate"), [(576, 16000), (288, 8000)])
def test_a_model_of_nested_branches_with_its_weights_in_them(samples: int, rate: int) -> None:
    model = load(SILERO).model
    rng = np.random.default_rng(0)
    speech = rng.standard_normal((1, samples), np.float32)
    feeds = {"input": speech, "state": np.zeros((2, 1, 128), np.float32), "sr": np.array(rate)}
    module = to_torch(model)
    wanted = runtime.session(model, optimise=False, threads=1).run(feeds)
    got = module(*(torch.from_numpy(feeds[name]) for name in module.meta["inputs"].values()))
    for name, array in wanted.items():
        np.testing.assert_allclose(got[name].detach().numpy(), array, rtol=0, atol=1e-5)
    sum(value.square().sum() for value in got.values()).backward()
    reached = [p for p in module.parameters() if p.grad is not None]
    assert 0 < len(reached) < len(list(module.parameters()))
    again = from_torch(module, model)
    same = runtime.session(again, optimise=False, threads=1).run(feeds)
    for name, array in wanted.items():
        np.testing.assert_array_equal(same[name], array)
