"""``graphc.fx``: what torch computes is what ONNX Runtime does, gradients flow, and trained values come back."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")

from graphc import runtime  # noqa: E402
from graphc.contract import Capabilities, Context  # noqa: E402
from graphc.errors import BadInput  # noqa: E402
from graphc.frontends.onnx import load  # noqa: E402
from graphc.fx import from_torch, to_torch  # noqa: E402
from graphc.fx.dtypes import to_tensor  # noqa: E402
from graphc.fx.operators import CONTROL, OPERATORS  # noqa: E402
from graphc.passes.fuse import Fuse  # noqa: E402
from graphc.passes.prune import Prune  # noqa: E402
from graphc.passes.shrink import Shrink  # noqa: E402
from graphc.passes.simplify import Simplify  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT = Context(Capabilities("portable", 10, {"": 21}))
DATA = Path(__file__).parent / "data"
CLS = Path(__file__).parent.parent / "examples" / "models" / "ppocr_cls.onnx"
SQUEEZENET = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / "light_squeezenet.onnx"

RNG = np.random.default_rng(0)
INPUTS: dict[str, tuple[Path, list[np.ndarray[Any, Any]]]] = {
    "resnet": (DATA / "fmnist_resnet.onnx", [RNG.standard_normal((3, 1, 28, 28), np.float32)]),
    "vit": (DATA / "fmnist_vit_tiny.onnx", [RNG.standard_normal((2, 1, 28, 28), np.float32)]),
    "mixtral": (DATA / "tiny_mixtral_bytes.onnx", [RNG.integers(0, 256, (2, 9)), np.ones((2, 9), np.int64)]),
    "det": (DATA / "ppocr_det.onnx", [RNG.standard_normal((1, 3, 64, 96), np.float32)]),
    "cls": (CLS, [RNG.standard_normal((1, 3, 48, 192), np.float32)]),
    "squeezenet": (SQUEEZENET, [RNG.standard_normal((1, 3, 224, 224), np.float32)]),
}


def close(model: ir.Model, module: Any, arrays: list[np.ndarray[Any, Any]]) -> None:
    """The module gives what ONNX Runtime does without optimisation.

    To 1e-5 of the largest entry, or two units in the last place of 1, which is what a sigmoid's zero is off by.
    """
    names = [str(v.name) for v in model.graph.inputs if not v.is_initializer()]
    arrays = arrays[: len(names)]
    wanted = runtime.session(model, optimise=False, threads=1).run(dict(zip(names, arrays, strict=True)))
    with torch.no_grad():
        got = module(*map(torch.from_numpy, arrays))
    assert list(got) == list(wanted)
    for name, array in wanted.items():
        np.testing.assert_allclose(got[name].numpy(), array, rtol=0, atol=max(1e-5 * np.abs(array).max(), 2.4e-7))


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("optimised", [False, True])
def test_real_models_agree_with_onnx_runtime_and_have_gradients(name: str, optimised: bool) -> None:
    path, arrays = INPUTS[name]
    model = load(path).model
    if optimised:
        Simplify().run(model, CONTEXT)
        Fuse().run(model, CONTEXT)
    module = to_torch(model)
    close(model, module, arrays)
    outputs = module(*map(torch.from_numpy, arrays[: len(module.meta["inputs"])]))
    sum(v.float().square().mean() for v in outputs.values()).backward()
    parameters = dict(module.named_parameters())
    assert parameters and not [key for key, value in parameters.items() if value.grad is None]
    # Nothing was trained: writing back changes no bit.
    again = from_torch(module, model)
    for key, value in model.graph.initializers.items():
        np.testing.assert_array_equal(again.graph.initializers[key].const_value.numpy(), value.const_value.numpy())


REASONS = {
    r"uint(16|32|64)|bitwise_not_3d": "torch computes little in wide unsigned integers",
    r"float8|e[45]m[23]": "torch does not saturate where it casts to 8-bit floats",
    r"e8m0|int[24]|float4": "torch has no such dtype",
    r"string|STRING": "torch has no strings",
    r"_seq|split_to_sequence|identity_opt": "inputs and outputs are tensors",
    r"window": "Attention windows (opset 25) are refused",
    r"training_dropout": "dropout is off",
    r"reduce_(min|max)_empty": "torch refuses the extremum of nothing",
    r"resize_.*(antialias|tf_crop|not_larger|not_smaller)": "these modes of Resize are refused",
    r"dft_inverse": "torch is off by 1e-6 of the largest entry where numpy is by 1e-7",
    r"(bf16|fp16).*": "half precision differs in its last bit",
}
"""Conformance cases that are known not to pass, by name, and why."""


def _array(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return to_tensor(ir.from_proto(value))
    return to_tensor(ir.tensor(np.asarray(value)))


def _passes(case: Any) -> bool:
    module = to_torch(ir.from_proto(case.model))
    for inputs, outputs in case.data_sets:
        got = module(*map(_array, inputs)).values()
        for mine, expected in zip(got, map(_array, outputs), strict=False):
            if mine.dtype != expected.dtype or mine.shape != expected.shape:
                return False
            a, b = mine.double(), expected.double()
            if not torch.allclose(a, b, rtol=case.rtol, atol=case.atol or 1e-7, equal_nan=True):
                return False
    return True


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from _nodes(attribute.g)


def test_the_conformance_suite_of_onnx() -> None:
    from onnx.backend.test.case.node import collect_testcases

    counts: Counter[str] = Counter()
    failed = []
    for case in collect_testcases(None):
        model = case.model
        known = {*OPERATORS, *CONTROL, "Constant"}
        if model is None:
            continue
        nodes = list(_nodes(model.graph))
        if {n.op_type for n in nodes} - known or any(n.domain for n in nodes):
            continue
        if next(o.version for o in model.opset_import if not o.domain) < 13:
            continue
        try:
            passed = _passes(case)
        except (BadInput, RuntimeError, TypeError, IndexError, AttributeError):
            passed = False
        counts["passed" if passed else "failed"] += 1
        if not passed and not any(re.search(pattern, case.name, re.IGNORECASE) for pattern in REASONS):
            failed.append(case.name)
    assert failed == []
    assert counts["passed"] >= 1490, counts


def test_a_pruned_model_is_healed_and_written_back() -> None:
    model = load(DATA / "fmnist_resnet.onnx").model
    for step in (Simplify(), Prune(ratio=0.3), Shrink()):
        step.run(model, CONTEXT)
    data = np.load(DATA / "fashion_mnist_2k.npz", allow_pickle=False)
    images = torch.from_numpy((data["calib_x"][:256, None] / 255).astype(np.float32))
    labels = torch.from_numpy(data["calib_y"][:256].astype(np.int64))
    module = to_torch(model)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)

    def loss() -> Any:
        return torch.nn.functional.cross_entropy(next(iter(module(images).values())), labels)

    before = loss().item()
    for _ in range(6):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
    assert loss().item() < 0.9 * before
    close(from_torch(module, model), module, [images[:8].numpy()])


TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[n, 4] x_1) => (float[n, 4] y, int64[2] size)
<float[4, 4] layer_weight = {1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1}, float[4] training = {1,2,3,4},
 float half = {0.5}, float[4] mean = {0,0,0,0}, float[4] var = {1,1,1,1}, float[4] scale = {1,1,1,1}>
{
  a = MatMul(x_1, layer_weight)
  b = MatMul(a, layer_weight)
  c = Add(b, training)
  d = Mul(c, half)
  y = BatchNormalization(d, scale, training, mean, var)
  size = Shape(y)
}"""


def named() -> ir.Model:
    """A model with names that Python or torch do not allow as they are."""
    model = ir.from_onnx_text(TEXT)
    model.graph.inputs[0].name = "x.1"
    model.graph.initializers["layer_weight"].name = "layer.weight"
    return model


def test_names_roles_and_tied_weights() -> None:
    module = to_torch(named())
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    assert set(parameters) == {"layer.weight", "training_", "scale"}
    assert set(buffers) == {"half_", "mean", "var"}
    assert module.meta["initializers"]["training_"] == "training"
    x = torch.ones(3, 4)
    for outputs in (module(x), module(x_1=x)):
        assert outputs["size"].tolist() == [3, 4] and outputs["size"].dtype == torch.int64


def test_names_that_are_keywords_of_python() -> None:
    """``embed.in.weight``, as GPT-NeoX has it, is no expression."""
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,3] x) => (float[N,2] y)
        <float[3,4] a = {1,2,3,4,5,6,7,8,9,10,11,12}, float[4,2] b = {1,-1,2,-2,3,-3,4,-4}> {
            h = MatMul(x, a)
            y = MatMul(h, b)
        }
    """)
    for old, new in (("a", "embed.in.weight"), ("b", "class.0.lambda")):
        model.graph.initializers[old].name = new
    module = to_torch(model)
    assert set(module.meta["initializers"].values()) == {"embed.in.weight", "class.0.lambda"}
    close(model, module, [RNG.standard_normal((2, 3), np.float32)])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert all((v.const_value.numpy() == 0).all() for v in from_torch(module, model).graph.initializers.values())


def test_sizes_stay_symbolic_under_torch_export() -> None:
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 21]>
    g (float[n, 6] x) => (float[n, 2, 3] y)
    <int64 zero = {0}, int64[1] axis = {0}, int64[2] tail = {2, 3}>
    { s = Shape(x) b = Gather(s, zero) u = Unsqueeze(b, axis) t = Concat<axis=0>(u, tail) y = Reshape(x, t) }""")
    exported = torch.export.export(
        to_torch(model), (torch.ones(4, 6),), dynamic_shapes=({0: torch.export.Dim("n", min=2, max=64)},)
    )
    assert exported.module()(torch.ones(7, 6))["y"].shape == (7, 2, 3)


def test_what_is_made_of_sizes_goes_where_the_module_is() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 21]>
    g (float[n, 6] x) => (float[n, 6] y)
    <int64 zero = {0}, int64 one = {1}, float[6] w = {1, 2, 3, 4, 5, 6}>
    {
      s = Shape(x) n = Gather(s, one) r = Range(zero, n, one) f = Cast<to = 1>(r) a = Mul(x, f)
      z = ConstantOfShape(s) b = Add(a, z) y = Mul(b, w)
    }""")
    module = to_torch(model)
    with torch.no_grad(), FakeTensorMode():  # which refuses operands on two devices, without having any
        for name, held in [*module.named_parameters(), *module.named_buffers()]:
            kind = type(held) if isinstance(held, torch.nn.Parameter) else lambda made: made
            setattr(module, name, kind(torch.empty(held.shape, dtype=held.dtype, device="cuda")))
        assert module(torch.empty(3, 6, device="cuda"))["y"].device.type == "cuda"


def test_missing_operators_are_named_at_once() -> None:
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 21, "my" : 1]>
    g (float[2] x) => (float[2] y) { [one] a = my.Thing(x) [two] b = RoiAlign(a, a, a) y = my.Thing(b) }""")
    with pytest.raises(BadInput, match=r"my::Thing \(node 'one'\), RoiAlign \(node 'two'\)"):
        to_torch(model)


def test_another_models_module_is_refused() -> None:
    module = to_torch(named())
    with pytest.raises(BadInput, match="no constant"):
        from_torch(module, load(DATA / "fmnist_resnet.onnx").model)


def test_importing_graphc_imports_no_torch() -> None:
    code = "import graphc, graphc.fx, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
