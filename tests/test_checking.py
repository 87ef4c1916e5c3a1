"""The checker catches small wrong changes and lets rounding pass."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphc import edit, runtime
from graphc.checking import Checker, compare

pytest.importorskip("onnxruntime")

DATA = Path(__file__).parent / "data"
RESNET = DATA / "fmnist_resnet.onnx"
VIT = DATA / "fmnist_vit_tiny.onnx"
MIXTRAL = DATA / "tiny_mixtral_bytes.onnx"

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'


def build(text: str, **weights: np.ndarray) -> ir.Model:
    """A model from its text form, with the constants filled in; their declarations must be inputs."""
    model = ir.from_onnx_text(f"{HEAD} {text}")
    for name, array in weights.items():
        value = next(v for v in model.graph.inputs if v.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array)
        model.graph.register_initializer(value)
    return model


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def weight(model: ir.Model, name: str) -> np.ndarray:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy().copy()


def changed(path: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> ir.Model:
    """The model with one of its initializers changed."""
    model = ir.load(path)
    model.graph.initializers[name].const_value = ir.tensor(change(weight(model, name)))
    return model


@pytest.fixture(scope="module")
def resnet() -> Checker:
    return Checker(RESNET)


@pytest.fixture(scope="module")
def vit() -> Checker:
    return Checker(VIT)


def one_typical(array: np.ndarray) -> np.ndarray:
    """One weight of typical size changed by 1 %."""
    flat = array.reshape(-1)
    flat[np.abs(np.abs(flat) - np.sqrt(np.mean(flat**2))).argmin()] *= 1.01
    return array


class TestCatches:
    """Each change is one that a wrong rewrite could make, and that a loose tolerance would let pass."""

    @pytest.mark.parametrize("name", ["stem.weight", "layers.0.c2.weight", "layers.2.c2.weight", "fc.weight"])
    def test_one_weight_of_many_by_one_percent(self, resnet: Checker, name: str) -> None:
        assert not resnet.compare(changed(RESNET, name, one_typical)).ok

    @pytest.mark.parametrize("name", ["fc.bias", "layers.0.c1.weight_bias", "layers.2.c1.weight_bias"])
    def test_a_bias_by_a_thousandth(self, resnet: Checker, name: str) -> None:
        assert not resnet.compare(changed(RESNET, name, lambda b: b * np.float32(1.001))).ok

    def test_two_channels_swapped(self, resnet: Checker) -> None:
        def swap(array: np.ndarray) -> np.ndarray:
            array[[3, 4]] = array[[4, 3]]
            return array

        found = resnet.compare(changed(RESNET, "layers.1.c1.weight", swap))
        assert not found.ok
        assert "logits" in found.why

    def test_epsilon_of_batch_normalization(self) -> None:
        text = """g (float[N,3,H,W] x, float[8,3,3,3] w, float[8] s, float[8] b, float[8] m, float[8] v)
            => (float[N,8,H,W] y) {{
            c = Conv<pads=[1,1,1,1]>(x, w)  n = BatchNormalization<epsilon={}>(c, s, b, m, v)  y = Relu(n) }}"""
        weights = {
            "w": normal(8, 3, 3, 3),
            "s": normal(8, seed=1),
            "b": normal(8, seed=2),
            "m": normal(8, seed=3),
            "v": np.abs(normal(8, seed=4)) + 1,
        }
        checker = Checker(build(text.format("1e-5"), **weights))
        assert checker.compare(build(text.format("1e-5"), **weights)).ok
        assert not checker.compare(build(text.format("3e-5"), **weights)).ok
        assert not checker.compare(build(text.format("1e-3"), **weights)).ok

    def test_epsilon_of_layer_normalization(self, vit: Checker) -> None:
        model = ir.load(VIT)
        node = next(n for n in model.graph if n.op_type == "LayerNormalization")
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-5)
        assert not vit.compare(model).ok

    def test_approximate_gelu(self, vit: Checker) -> None:
        model = ir.load(VIT)
        node = next(n for n in model.graph if n.op_type in ("Gelu", "Erf"))
        if node.op_type == "Gelu":
            node.attributes["approximate"] = ir.AttrString("approximate", "tanh")
        else:
            _tanh_for_erf(node)
        assert not vit.compare(model).ok

    def test_pad_value_at_the_border(self) -> None:
        text = """g (float[N,4,H,W] x, float pad, float[4,4,3,3] w) => (float[N,4,H2,W2] y) {
            p = Pad(x, pads, pad)  y = Conv(p, w) }"""
        pads = np.array([0, 0, 1, 1, 0, 0, 1, 1], dtype=np.int64)
        text = text.replace("float pad,", "float pad, int64[8] pads,")

        def padded(value: float) -> ir.Model:
            return build(text, pad=np.float32(value), pads=pads, w=normal(4, 4, 3, 3))

        checker = Checker(padded(0))
        assert checker.compare(padded(0)).ok
        assert not checker.compare(padded(1e-4)).ok

    def test_one_channel_of_many_slightly_off(self) -> None:
        """The difference is lost in the whole, but not in its channel."""
        text = "g (float[N,64] x, float[64,512] w, float[512] b) => (float[N,512] y) { m = MatMul(x, w) y = Add(m, b) }"
        scale = np.logspace(2, -2, 512).astype(np.float32)
        w, b = normal(64, 512) * scale, normal(512, seed=1) * scale
        checker = Checker(build(text, w=w, b=b))
        wrong = b.copy()
        wrong[511] *= np.float32(1.001)
        found = checker.compare(build(text, w=w, b=wrong))
        assert not found.ok
        assert "index 511 of axis 1" in found.why

    def test_integers_must_be_equal(self) -> None:
        text = "g (int64[N] x, int64 c) => (int64[N] y) { y = Add(x, c) }"
        found = compare(build(text, c=np.int64(1)), build(text, c=np.int64(2)))
        assert not found.ok
        assert "must be equal" in found.why

    def test_nan_in_other_places(self) -> None:
        text = "g (float[N] x) => (float[N] y) { y = %s(x) }"
        found = compare(build(text % "Sqrt"), build("g (float[N] x) => (float[N] y) { a = Abs(x) y = Sqrt(a) }"))
        assert not found.ok
        assert "NaN" in found.why

    def test_nan_in_the_same_places_is_equal(self) -> None:
        text = "g (float[N] x) => (float[N] y) { y = Sqrt(x) }"
        assert compare(build(text), build(text)).ok

    def test_another_dtype_or_shape_at_run_time(self) -> None:
        """The declared interface is the same, what comes out is not."""
        text = "g (float[N,4] x) => (float[M,K] y) { y = %s(x) }"
        found = compare(build(text % "Identity"), build(text % "Transpose"))
        assert not found.ok
        assert "shape" in found.why


def _tanh_for_erf(node: ir.Node) -> None:
    graph, x = node.graph, node.inputs[0]
    assert graph is not None and x is not None
    inner = edit.initializer(graph, np.array(0.0895, np.float32), "tanh.inner")
    outer = edit.initializer(graph, np.array(1.1283792, np.float32), "tanh.outer")
    square = ir.node("Mul", [x, x])
    cube = ir.node("Mul", [square.outputs[0], x])
    bent = ir.node("Mul", [cube.outputs[0], inner])
    total = ir.node("Add", [x, bent.outputs[0]])
    scaled = ir.node("Mul", [total.outputs[0], outer])
    tanh = ir.node("Tanh", [scaled.outputs[0]])
    graph.insert_before(node, [square, cube, bent, total, scaled, tanh])
    edit.replace(node.outputs[0], tanh.outputs[0])


class TestLetsPass:
    """Legitimate rewrites, whose results differ by rounding."""

    @pytest.mark.parametrize("path", [RESNET, VIT, MIXTRAL], ids=lambda p: p.stem)
    def test_everything_the_runtime_optimises(self, path: Path) -> None:
        """The runtime's optimised form of a model against the form as it is, without allowing for it."""
        checker = Checker(path)
        optimised = runtime.session(path, optimise=True)
        found = checker.compare(optimised)
        assert found.ok, found.why
        assert found.checked

    @pytest.mark.parametrize("length", [64, 1024, 4096])
    def test_sums_in_another_order(self, length: int) -> None:
        text = f"g (float[N,{length}] x, int64[{length}] p, float[{length},32] w) => (float[N,32] y) {{ %s }}"
        w, order = normal(length, 32), np.random.default_rng(1).permutation(length)
        same = build(text % "y = MatMul(x, w)", w=w, p=order)
        other = build(text % "g = Gather<axis=1>(x, p) y = MatMul(g, w)", w=w[order], p=order)
        found = compare(same, other)
        assert found.ok, found.why
        assert found.worst is not None and found.worst.max_abs > 0

    def test_products_associated_otherwise(self) -> None:
        text = "g (float[N,256] x, float[256,16] a, float[16,256] b) => (float[N,256] y) { %s }"
        a, b = normal(256, 16), normal(16, 256, seed=1)
        first = build(text % "h = MatMul(x, a) y = MatMul(h, b)", a=a, b=b)
        second = build("g (float[N,256] x, float[256,256] w) => (float[N,256] y) { y = MatMul(x, w) }", w=a @ b)
        found = compare(first, second)
        assert found.ok, found.why
        assert found.worst is not None and found.worst.max_abs > 0

    def test_a_deep_network_with_folded_normalization(self) -> None:
        depth, width = 24, 32
        nodes, folded, weights, merged = [], [], {}, {}
        for i in range(depth):
            last = "x" if not i else f"r{i - 1}"
            nodes.append(
                f"c{i} = Conv<pads=[1,1,1,1]>({last}, w{i}) n{i} = BatchNormalization(c{i}, s{i}, b{i}, m{i}, v{i})"
            )
            folded.append(f"n{i} = Conv<pads=[1,1,1,1]>({last}, w{i}, b{i})")
            for text in (nodes, folded):
                text.append(f"a{i} = Add(n{i}, {last}) r{i} = Relu(a{i})")
            w = normal(width, width, 3, 3, seed=i, scale=0.06)
            s, b, m, v = (np.abs(normal(width, seed=100 * i + k)) + 0.1 for k in range(4))
            weights |= {f"w{i}": w, f"s{i}": s, f"b{i}": b, f"m{i}": m, f"v{i}": v}
            factor = s / np.sqrt(v + np.float32(1e-5))
            merged |= {f"w{i}": w * factor[:, None, None, None], f"b{i}": b - m * factor}
        declared = {4: f"float[{width},{width},3,3]", 1: f"float[{width}]"}

        def model(text: list[str], constants: dict[str, np.ndarray]) -> ir.Model:
            inputs = ", ".join(f"{declared[a.ndim]} {n}" for n, a in constants.items())
            body = " ".join(text) + f" y = Identity(r{depth - 1})"
            head = f"g (float[N,{width},8,8] x, {inputs}) => (float[N,{width},8,8] y)"
            return build(f"{head} {{ {body} }}", **constants)

        found = compare(model(nodes, weights), model(folded, merged))
        assert found.ok, found.why
        assert found.worst is not None and found.worst.max_abs > 0

    def test_a_scalar_output(self) -> None:
        text = "g (float[N,64] x, int64[64] p) => (float y) { g = Gather<axis=1>(x, p) y = ReduceSum<keepdims=0>(g) }"
        order = np.random.default_rng(0).permutation(64)
        first, second = build(text, p=np.arange(64)), build(text, p=order)
        assert compare(first, second).ok
        wrong = build(text.replace("y = ReduceSum", "s = ReduceSum").replace(") }", ") y = Ceil(s) }"), p=order)
        assert not compare(first, wrong).ok

    def test_half_precision(self) -> None:
        text = "g (float16[N,64] x, float16[64,64] a, float16[64,64] b) => (float16[N,64] y) { %s }"
        a, b = normal(64, 64, scale=0.1).astype(np.float16), normal(64, 64, seed=1, scale=0.1).astype(np.float16)
        reference = build(text % "h = MatMul(x, a) t = Tanh(h) y = MatMul(t, b)", a=a, b=b)
        halves = """h = MatMul(x, a) t = Tanh(h)
            t1, t2 = Split<axis=1, num_outputs=2>(t) b1, b2 = Split<axis=0, num_outputs=2>(b)
            y1 = MatMul(t1, b1) y2 = MatMul(t2, b2) y = Add(y1, y2)"""
        other = build(text % halves, a=a, b=b)
        checker = Checker(reference)
        assert checker.compare(other).ok
        wrong = b.copy()
        wrong[:, 5] *= np.float16(1.05)
        assert not checker.compare(build(text % "h = MatMul(x, a) t = Tanh(h) y = MatMul(t, b)", a=a, b=wrong)).ok

    def test_decisions_within_reach_of_rounding_are_left_out(self) -> None:
        """Two columns are the same but for rounding: which one wins says nothing."""
        text = "g (float[N,64] x, float[64,8] w, int64[1] k) => (int64[N,8] y, float[N,8] s) { %s }"
        w = normal(64, 8)
        w[:, 7] = w[:, 0]
        first = "s = MatMul(x, w) v, y = TopK(s, eight)"
        second = "p = Gather<axis=1>(x, order) q = Gather<axis=0>(w, order) s = MatMul(p, q) v, y = TopK(s, eight)"
        text = text.replace("int64[1] k", "int64[1] eight, int64[64] order")
        constants = {"w": w, "eight": np.array([8]), "order": np.random.default_rng(0).permutation(64)}
        found = Checker(build(text % first, **constants)).compare(build(text % second, **constants))
        assert found.ok, found.why
        assert {o.name: o.skipped > 0 for o in found.outputs} == {"y": True, "s": False}


class TestUncheckable:
    def test_random_outputs_are_not_compared(self) -> None:
        text = "g (float[N,4] x) => (float[N,4] y, float[N,4] z) { n = RandomNormalLike(x) y = Add(x, n) z = Relu(x) }"
        found = compare(build(text), build(text))
        assert found.ok
        assert [o.name for o in found.outputs] == ["z"]
        assert "'y' is random" in found.notes[0]

    def test_only_random_outputs(self) -> None:
        text = "g (float[N,4] x) => (float[N,4] y) { y = RandomNormalLike(x) }"
        found = compare(build(text), build(text))
        assert not found.checked
        assert "random" in found.why

    def test_an_operator_that_the_runtime_lacks(self) -> None:
        head = HEAD.replace("]>", ', "my.ops" : 1]>')
        model = ir.from_onnx_text(f"{head} g (float[N] x) => (float[N] y) {{ y = my.ops.Magic(x) }}")
        found = compare(model, model)
        assert (found.ok, found.checked) == (True, False)
        assert "my.ops" in found.why and "Magic" in found.why

    def test_a_candidate_that_does_not_load_is_wrong(self, tmp_path: Path) -> None:
        broken = tmp_path / "broken.onnx"
        broken.write_text("no model")
        found = compare(RESNET, broken)
        assert not found.ok
        assert "load" in found.why

    def test_a_candidate_that_does_not_run_is_wrong(self) -> None:
        text = "g (float[N,4] x, float[4,4] w) => (float[N,4] y) { %s }"
        shape = "s = Constant<value = int64[2] {7, 11}>() r = Reshape(x, s) y = MatMul(x, w)"
        found = compare(build(text % "y = MatMul(x, w)", w=normal(4, 4)), build(text % shape, w=normal(4, 4)))
        assert not found.ok
        assert "does not run" in found.why

    def test_outputs_that_rounding_dominates_are_noted(self) -> None:
        text = """g (float[N,64] x, float[64,64] w, float c) => (float[N,64] y) {
            m = MatMul(x, w) z = Mul(m, c) y = Sin(z) }"""
        model = build(text, w=normal(64, 64), c=np.float32(1e6))
        found = compare(model, model)
        assert found.ok
        assert "ill-conditioned" in found.notes[0]


class TestSaturation:
    """Errors that the last operator hides show in what it reads."""

    HEAD = "g (float[N,16] x, float[16,8] w) => (float[N,8] y)"

    @pytest.mark.parametrize("end", ["Softmax", "Softmax<axis=0>", "LogSoftmax", "Sigmoid", "Tanh"], ids=lambda e: e)
    def test_behind_a_saturated_output(self, end: str) -> None:
        text = f"{self.HEAD} {{ m = MatMul(x, w) y = {end}(m) }}"
        w = normal(16, 8, scale=1e4)
        checker = Checker(build(text, w=w))
        assert checker.compare(build(text, w=w)).ok
        wrong = w.copy()
        wrong[:, 3] *= np.float32(1.001)
        assert not checker.compare(build(text, w=wrong)).ok

    def test_a_softmax_may_lose_a_constant(self) -> None:
        shifted = f"{self.HEAD} {{ k = Constant<value_float=7.0>() m = MatMul(x, w) s = Add(m, k) y = Softmax(s) }}"
        plain = f"{self.HEAD} {{ m = MatMul(x, w) y = Softmax(m) }}"
        w = normal(16, 8)
        found = compare(build(shifted, w=w), build(plain, w=w))
        assert found.ok, found.why
        assert [o.name for o in found.outputs] == ["y", "y before Softmax"]

    def test_a_candidate_may_end_otherwise(self) -> None:
        whole = f"{self.HEAD} {{ m = MatMul(x, w) y = Sigmoid(m) }}"
        parts = f"""{self.HEAD} {{
            m = MatMul(x, w) n = Neg(m) e = Exp(n) k = Constant<value_float=1.0>() d = Add(e, k) y = Reciprocal(d) }}"""
        w = normal(16, 8, scale=0.1)
        for a, b in ((whole, parts), (parts, whole)):
            found = compare(build(a, w=w), build(b, w=w))
            assert found.ok, found.why
            assert [o.name for o in found.outputs] == ["y"]

    def test_an_old_softmax_runs_over_all_axes(self) -> None:
        model = ir.from_onnx_text("""<ir_version: 6, opset_import: ["" : 11]>
            g (float[N,4,5] x) => (float[N,4,5] y) { r = Relu(x) y = Softmax(r) }""")
        assert compare(model, model).ok

    def test_an_output_that_never_changes_is_noted(self) -> None:
        text = f"{self.HEAD} {{ m = MatMul(x, w) k = Constant<value_float=%s>() y = %s }}"
        dead = build(text % ("-1e9", "Min(m, k)"), w=normal(16, 8))
        assert "same for all inputs" in compare(dead, dead).notes[0]
        alive = build(text % ("0.0", "Max(m, k)"), w=normal(16, 8))
        assert not compare(alive, alive).notes


class TestInterface:
    BASE = "g (float[N,4] x, float[N,4] z) => (float[N,4] y) { y = Add(x, z) }"

    @pytest.mark.parametrize(
        ("other", "why"),
        [
            ("g (float[N,4] z, float[N,4] x) => (float[N,4] y) { y = Add(x, z) }", "inputs are z, x"),
            ("g (float[N,4] x, float[N,4] w) => (float[N,4] y) { y = Add(x, w) }", "inputs are x, w"),
            ("g (float[2,4] x, float[2,4] z) => (float[2,4] y) { y = Add(x, z) }", "[2, 4] instead of [N, 4]"),
            ("g (float[N,4] x, float[N,4] z) => (float[3,4] y) { y = Add(x, z) }", "[3, 4] instead of [N, 4]"),
            ("g (double[N,4] x, double[N,4] z) => (double[N,4] y) { y = Add(x, z) }", "instead of"),
            ("g (float[N,4] x, float[N,4] z) => (float[N,4] t) { t = Add(x, z) }", "outputs are t"),
        ],
    )
    def test_a_change_is_a_mismatch(self, other: str, why: str) -> None:
        found = compare(build(self.BASE), build(other))
        assert not found.ok
        assert why in found.why

    def test_an_output_may_become_known(self) -> None:
        text = "g (float[N,4] x) => (float[%s] y) { y = Relu(x) }"
        assert compare(build(text % "N,unknown"), build(text % "N,4")).ok


def test_user_data_is_used(resnet: Checker) -> None:
    image = np.zeros((1, 1, 28, 28), np.float32)
    checker = Checker(RESNET, data=[{"image": image}, {"image": image + 1}])
    found = checker.compare(RESNET)
    assert found.ok
    assert found.cases == ("data[0]", "data[1]")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is asked of Linux")
def test_large_weights_are_not_held_in_memory(tmp_path: Path) -> None:
    """Reference, noise and candidate of a model with 640 MB of weights; all of them are mapped."""
    size, count = 4000, 10
    with (tmp_path / "weights").open("wb") as file:
        for seed in range(count):
            file.write(normal(size, size, seed=seed, scale=size**-0.5).tobytes())
    layers = " ".join(f"h{i + 1} = MatMul(h{i}, w{i})" for i in range(count))
    declared = ", ".join(f"float[{size},{size}] w{i}" for i in range(count))
    text = f"g (float[N,{size}] h0, {declared}) => (float[N,{size}] h{count}) {{ {layers} }}"
    model = ir.from_onnx_text(f"{HEAD} {text}")
    for i, value in enumerate([v for v in model.graph.inputs if v.name != "h0"]):
        model.graph.inputs.remove(value)
        value.const_value = ir.ExternalTensor(
            "weights", i * size * size * 4, size * size * 4, ir.DataType.FLOAT, shape=ir.Shape((size, size)),
            name=value.name or "", base_dir=tmp_path,
        )  # fmt: skip
        model.graph.register_initializer(value)
    path = tmp_path / "model.onnx"
    onnx.save(ir.to_proto(model), path)
    code = f"""if True:
        import threading, time
        from pathlib import Path
        from graphc import checking
        from graphc import memory
        peak = base = memory._status("RssAnon")
        def watch():
            global peak
            while True:
                peak = max(peak, memory._status("RssAnon"))
                time.sleep(0.005)
        threading.Thread(target=watch, daemon=True).start()
        found = checking.compare(Path({str(path)!r}), Path({str(path)!r}))
        assert found.ok and found.checked
        print(peak)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 150e6


def test_json(resnet: Checker) -> None:
    found = resnet.compare(changed(RESNET, "fc.bias", lambda b: b + 1))
    document = json.loads(json.dumps(found.to_json()))
    assert document["ok"] is False and document["checked"] is True
    assert document["outputs"][0]["name"] == "logits"
    assert document["outputs"][0]["max_abs"] == pytest.approx(1, rel=1e-3)
    assert len(document["cases"]) >= 5


@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 1000),
    relative=st.sampled_from([1e-3, 1e-2]),
    channel=st.integers(0, 15),
    output=st.sampled_from([1, 16]),
)
def test_a_scaled_channel_is_never_missed(seed: int, relative: float, channel: int, output: int) -> None:
    text = f"""g (float[N,32] x, float[32,16] a, float[16,{output}] b) => (float[N,{output}] y) {{
        h = MatMul(x, a) y = MatMul(h, b) }}"""
    a, b = normal(32, 16, seed=seed), normal(16, output, seed=seed + 1)
    checker = Checker(build(text, a=a, b=b), seed=seed)
    assert checker.compare(build(text, a=a, b=b)).ok
    scaled = a.copy()
    scaled[:, channel] *= np.float32(1 + relative)
    assert not checker.compare(build(text, a=scaled, b=b)).ok
