"""Old opsets against the same model at the working opset, both run by ONNX Runtime without optimisation.

ONNX Runtime has kernels for opset 7 on, so that the old model itself says what it computes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphc import model as models
from graphc.frontends import Source, load

ort = pytest.importorskip("onnxruntime")


def run(data: bytes, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def source(tmp_path: Path, opset: int, text: str, ir_version: int = 8, imports: str = "") -> Source:
    header = f'<ir_version: {ir_version}, opset_import: ["": {opset}{imports}]>'
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx.parser.parse_model(header + text).SerializeToString())
    return load(path)


def feeds_of(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Normal floats, small non-negative integers, mixed booleans."""
    rng = np.random.default_rng(0)
    feeds = {}
    for value in proto.graph.input:
        kind = value.type.tensor_type
        shape = [d.dim_value or 2 for d in kind.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        normal = rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 2, shape)
        feeds[value.name] = normal.astype(dtype)
    return feeds


def agree(loaded: Source) -> None:
    """Both compute the same, up to the rounding of another kernel version (some ulp of single precision)."""
    old = onnx.ModelProto.FromString(models.serialize(loaded.original))
    new = onnx.ModelProto.FromString(models.serialize(loaded.model))
    assert not loaded.result.refusals
    assert new.opset_import[0].version == 21
    onnx.checker.check_model(new, full_check=True)
    assert [v.name for v in old.graph.output] == [v.name for v in new.graph.output]
    feeds = feeds_of(old)
    before, after = run(old.SerializeToString(), feeds), run(new.SerializeToString(), feeds)
    for a, b in zip(before, after, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_allclose(a, b, rtol=4 * np.finfo(np.float32).eps, atol=1e-7)


CASES = {
    "upsample-7-nearest": (7, "g (float[1,2,3,4] x) => (float[1,2,6,12] y) "
                              "{ y = Upsample<mode=\"nearest\", scales=[1.0,1.0,2.0,3.0]>(x) }"),
    "upsample-7-linear": (8, "g (float[1,2,3,4] x) => (float[1,2,6,10] y) "
                             "{ y = Upsample<mode=\"linear\", scales=[1.0,1.0,2.0,2.5]>(x) }"),
    "upsample-9": (9, "g (float[1,2,3,4] x) => (float[1,2,6,10] y) "
                      "<float[4] s = {1.0,1.0,2.0,2.5}> { y = Upsample<mode=\"linear\">(x, s) }"),
    "upsample-9-dynamic": (9, "g (float[1,2,3,4] x) => (float[a,b,c,d] y) <float[4] s = {1.0,1.0,2.0,3.0}> "
                              "{ t = Identity(s) y = Upsample(x, t) }"),
    "resize-10-up": (10, "g (float[1,2,3,4] x) => (float[1,2,7,9] y) "
                         "<float[4] s = {1.0,1.0,2.4,2.3}> { y = Resize(x, s) }"),
    "resize-10-down": (10, "g (float[1,2,6,8] x) => (float[1,2,3,4] y) "
                           "<float[4] s = {1.0,1.0,0.6,0.6}> { y = Resize(x, s) }"),
    "resize-10-linear": (10, "g (float[1,2,6,8] x) => (float[1,2,3,10] y) "
                             "<float[4] s = {1.0,1.0,0.6,1.3}> { y = Resize<mode=\"linear\">(x, s) }"),
    "resize-11-scales": (11, "g (float[1,2,6,8] x) => (float[1,2,9,12] y) "
                             "<float[0] r = {}, float[4] s = {1.0,1.0,1.5,1.5}> "
                             "{ y = Resize<mode=\"cubic\", cubic_coeff_a=-0.5>(x, r, s) }"),
    "resize-11-sizes": (11, "g (float[1,2,6,8] x) => (float[1,2,9,5] y) "
                            "<float[0] r = {}, float[0] s = {}, int64[4] z = {1,2,9,5}> "
                            "{ y = Resize<mode=\"linear\", coordinate_transformation_mode=\"align_corners\">"
                            "(x, r, s, z) }"),
    "resize-11-crop": (11, "g (float[1,1,6,8] x) => (float[1,1,3,4] y) "
                           "<float[8] r = {0.0,0.0,0.2,0.3,1.0,1.0,0.7,0.9}, float[0] s = {}, int64[4] z = {1,1,3,4}> "
                           "{ y = Resize<mode=\"linear\", coordinate_transformation_mode=\"tf_crop_and_resize\">"
                           "(x, r, s, z) }"),
    "slice": (9, "g (float[3,4,5] x) => (float[1,4,4] y) "
                 "{ y = Slice<axes=[0,2], starts=[1,-5], ends=[2,-1]>(x) }"),
    "slice-no-axes": (7, "g (float[3,4,5] x) => (float[2,3,5] y) "
                         "{ y = Slice<starts=[1,0], ends=[9223372036854775807,3]>(x) }"),
    "topk": (9, "g (float[3,6] x) => (float[3,2] y, int64[3,2] i) { y, i = TopK<k=2>(x) }"),
    "topk-10": (10, "g (float[3,6] x) => (float[2,6] y, int64[2,6] i) <int64[1] k = {2}> "
                    "{ y, i = TopK<axis=0>(x, k) }"),
    "pad": (10, "g (float[2,3] x) => (float[4,5] y) { y = Pad<pads=[1,0,1,2], value=1.5>(x) }"),
    "pad-zero": (8, "g (float[2,3] x) => (float[2,5] y) { y = Pad<pads=[0,0,0,2]>(x) }"),
    "pad-double": (8, "g (double[2,3] x) => (double[2,5] y) { z = Abs(x) y = Pad<pads=[0,0,0,2], value=2.5>(z) }"),
    "pad-reflect": (8, "g (float[2,3] x) => (float[2,5] y) { y = Pad<mode=\"reflect\", pads=[0,1,0,1]>(x) }"),
    "clip": (10, "g (float[2,30] x) => (float[2,30] y) { y = Clip<min=-0.5, max=0.25>(x) }"),
    "clip-min": (7, "g (float[2,30] x) => (float[2,30] y) { z = Neg(x) y = Clip<min=0.0>(z) }"),
    "clip-none": (7, "g (float[2,30] x) => (float[2,30] y) { y = Clip(x) }"),
    "scatter": (10, "g (float[3,3] x, float[1,3] u) => (float[3,3] y) <int64[1,3] i = {1,0,2}> "
                    "{ y = Scatter<axis=0>(x, i, u) }"),
    "split": (12, "g (float[2,7] x) => (float[2,3] a, float[2,4] b) { a, b = Split<axis=1, split=[3,4]>(x) }"),
    "split-equal": (9, "g (float[2,6] x) => (float[2,3] a, float[2,3] b) { a, b = Split<axis=1>(x) }"),
    "split-13": (13, "g (float[6] x) => (float[2] a, float[2] b, float[2] c) { a, b, c = Split(x) }"),
    "softmax-default": (11, "g (float[2,3,4] x) => (float[2,3,4] y) { y = Softmax(x) }"),
    "softmax-0": (11, "g (float[2,3,4] x) => (float[2,3,4] y) { y = Softmax<axis=0>(x) }"),
    "softmax-last": (11, "g (float[2,3,4] x) => (float[2,3,4] y) { y = Softmax<axis=-1>(x) }"),
    "softmax-negative": (11, "g (float[2,3,4] x) => (float[2,3,4] y) { y = Softmax<axis=-2>(x) }"),
    "softmax-ones": (9, "g (float[2,5,1,1] x) => (float[2,5,1,1] y) { y = Softmax(x) }"),
    "softmax-dynamic": (11, "g (float[n,3,m] x) => (float[n,3,m] y) { y = Softmax<axis=1>(x) }"),
    "log-softmax": (12, "g (float[2,3,4] x) => (float[2,3,4] y) { y = LogSoftmax<axis=1>(x) }"),
    "hardmax": (12, "g (float[2,3,4] x) => (float[2,3,4] y) { y = Hardmax<axis=1>(x) }"),
    "squeeze": (12, "g (float[2,1,4,1] x) => (float[2,4,1] y) { y = Squeeze<axes=[1]>(x) }"),
    "squeeze-all": (12, "g (float[2,1,4,1] x) => (float[2,4] y) { y = Squeeze(x) }"),
    "unsqueeze": (12, "g (float[2,4] x) => (float[1,2,4,1] y) { y = Unsqueeze<axes=[0,-1]>(x) }"),
    "batch-normalization": (8, "g (float[2,3,4] x, float[3] s, float[3] b, float[3] m) => (float[2,3,4] y) "
                               "{ v = Abs(m) y = BatchNormalization<spatial=1, epsilon=0.1>"
                               "(x, s, b, m, v) }"),
    "dropout": (7, "g (float[2,3] x) => (float[2,3] y) { y, mask = Dropout<ratio=0.3>(x) }"),
    "dropout-10": (10, "g (float[2,3] x) => (float[2,3] y) { y = Dropout(x) }"),
    "roi-align": (10, "g (float[1,1,8,8] x) => (float[1,1,2,2] y) <float[1,4] r = {1.0,1.0,6.0,5.0}, int64[1] i = {0}> "
                      "{ y = RoiAlign<output_height=2, output_width=2, sampling_ratio=2>(x, r, i) }"),
    "grid-sample": (16, "g (float[1,1,4,4] x, float[1,3,3,2] q) => (float[1,1,3,3] y) "
                        "{ y = GridSample<mode=\"bicubic\">(x, q) }"),
    "grid-sample-default": (16, "g (float[1,1,4,4] x, float[1,3,3,2] q) => (float[1,1,3,3] y) "
                                "{ y = GridSample(x, q) }"),
    "dft": (17, "g (float[1,8,3,1] x) => (float[1,8,3,2] y) { y = DFT(x) }"),
    "dft-axis": (17, "g (float[1,8,4,1] x) => (float[1,8,4,2] y) { y = DFT<axis=2>(x) }"),
    "group-normalization": (18, "g (float[2,6,4] x, float[3] s, float[3] b) => (float[2,6,4] y) "
                                "{ y = GroupNormalization<num_groups=3>(x, s, b) }"),
    "in-branches": (11, "g (float[2,1,4] x, bool c) => (float[2,n] y) { y = If(c)<"
                        "then_branch = t () => (float[2,4] q) { r = Squeeze<axes=[1]>(x) q = Softmax<axis=0>(r) }, "
                        "else_branch = e () => (float[2,1] q) { q = ReduceSum<axes=[1], keepdims=0>(x2) "
                        "x2 = Slice(x, b0, b1, b2) b0 = Constant<value=int64[1] {0}>() "
                        "b1 = Constant<value=int64[1] {1}>() b2 = Constant<value=int64[1] {2}>() }> }"),
    "in-loop": (12, "g (float[2,3] x) => (float[2,3] y) <int64 n = {3}, bool t = {1}> { y = Loop(n, t, x)<"
                    "body = b (int64 i, bool p, float[2,3] u) => (bool q, float[2,3] w) "
                    "{ q = Identity(p) s = ReduceSum<axes=[1]>(u) w = Sub(u, s) }> }"),
}  # fmt: skip

for _op in ("L1", "L2", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare", "Sum"):
    _text = f"g (float[2,3,4] x) => (float[2,1,4] y) {{ y = Reduce{_op}<axes=[1]>(x) }}"
    CASES[f"reduce-{_op}"] = (17 if _op != "Sum" else 12, _text)
    _text = f"g (float[2,3,4] x) => (float y) {{ y = Reduce{_op}<keepdims=0>(x) }}"
    CASES[f"reduce-{_op}-all"] = (12, _text)


@pytest.mark.parametrize("name", CASES)
def test_computes_the_same(name: str, tmp_path: Path) -> None:
    agree(source(tmp_path, *CASES[name]))


REFUSED = {
    "resize-mixed": (10, "g (float[1,1,6,8] x) => (float[1,1,3,10] y) <float[4] s = {1.0,1.0,0.6,1.3}> "
                         "{ y = Resize(x, s) }", "enlarges one axis and shrinks another"),
    "resize-dynamic": (10, "g (float[1,1,6,8] x, float[4] s) => (float[a,b,c,d] y) { y = Resize(x, s) }",
                       "scales are not constant"),
    "tf-half-pixel": (11, "g (float[1,1,6,8] x) => (float[1,1,3,4] y) "
                      "<float[0] r = {}, float[4] s = {1.0,1.0,0.5,0.5}> "
                          "{ y = Resize<coordinate_transformation_mode=\"tf_half_pixel_for_nn\">(x, r, s) }",
                      "tf_half_pixel_for_nn"),
    "spatial": (8, "g (float[2,3] x, float[3] s) => (float[2,3] y) "
                   "{ y = BatchNormalization<spatial=0>(x, s, s, s, s) }", "spatial=0"),
    "training": (13, "g (float[2,3] x, float[3] s) => (float[2,3] y, float[3] m) "
                     "{ y, m = BatchNormalization(x, s, s, s, s) }", "training mode"),
    "training-unread": (8, "g (float[2,3] x, float[3] s) => (float[2,3] y) "
                           "{ y, m, v = BatchNormalization(x, s, s, s, s) }", "training mode"),
    "mask": (10, "g (float[2,3] x) => (float[2,3] y, bool[2,3] m) { y, m = Dropout(x) }", "mask is used"),
    "is-test": (6, "g (float[2,3] x) => (float[2,3] y) { y = Dropout(x) }", "is_test=0"),
    "channels": (18, "g (float[n,c,4] x, float[2] s) => (float[n,c,4] y) "
                     "{ y = GroupNormalization<num_groups=2>(x, s, s) }", "number of channels"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_stays_as_it_is(name: str, tmp_path: Path) -> None:
    opset, text, reason = REFUSED[name]
    loaded = source(tmp_path, opset, text)
    assert loaded.model.opset_imports[""] == opset
    assert models.text(loaded.model) == models.text(loaded.original)
    [refusal] = loaded.result.refusals
    assert reason in refusal.reason
    assert f"stays at opset {opset}" in refusal.reason


def test_names_metadata_and_weights_survive(tmp_path: Path) -> None:
    text = """g (float[n, 4] tokens) => (float[n, 8] logits)
        <float[4, 8] weight = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0,
         1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0}>
        { hidden = MatMul(tokens, weight) logits = Softmax<axis=-1>(hidden) }"""
    path = tmp_path / "m.onnx"
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 11, "own": 3]>' + text)
    proto.graph.node[0].name = "project"
    proto.graph.node[0].doc_string = "why"
    proto.metadata_props.add(key="character", value="abc")
    path.write_bytes(proto.SerializeToString())
    loaded = load(path).model
    assert loaded.graph[0].name == "project"
    assert loaded.graph[0].doc_string == "why"
    assert loaded.metadata_props == {"character": "abc"}
    assert loaded.opset_imports == {"": 21, "own": 3}
    assert [v.name for v in (*loaded.graph.inputs, *loaded.graph.outputs)] == ["tokens", "logits"]
    assert str(loaded.graph.inputs[0].shape) == "[n,4]"
    assert list(loaded.graph.initializers) == ["weight"]
    assert loaded.graph[1].attributes["axis"].value == -1


def test_functions_are_converted_with_their_own_imports(tmp_path: Path) -> None:
    text = """g (float[2,3] x) => (float[2,1] y) { y = own.total(x) }
        <domain: "own", opset_import: ["": 11]> total (a) => (b)
        { c = ReduceSum<axes=[1]>(a) b = Softmax<axis=0>(c) }"""
    loaded = source(tmp_path, 11, text, imports=', "own": 1')
    agree(loaded)
    [function] = loaded.model.functions.values()
    assert function.opset_imports[""] == 21


def test_an_attribute_bound_by_the_caller_is_converted_by_inlining(tmp_path: Path) -> None:
    text = """g (float[2,3] x) => (float[2,1] y) { y = own.total<axes=[1]>(x) }
        <domain: "own", opset_import: ["": 11]> total <axes> (a) => (b) { b = ReduceSum<axes: ints = @axes>(a) }"""
    agree(source(tmp_path, 11, text, imports=', "own": 1'))


def test_initializers_listed_as_inputs_are_dropped_only_where_they_had_to_be(tmp_path: Path) -> None:
    text = "g (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1.0, 2.0}> { y = Add(x, w) }"
    old = source(tmp_path, 9, text, ir_version=3)
    assert [v.name for v in old.model.graph.inputs] == ["x"]
    assert any("IR version 3" in change for change in old.result.changes)
    new = source(tmp_path, 9, text, ir_version=4)
    assert [v.name for v in new.model.graph.inputs] == ["x", "w"]
    assert "w" in new.model.graph.initializers


PYTORCH = Path(onnx.__file__).parent / "backend" / "test" / "data"
OPSET_6 = sorted(path.parent for kind in ("operator", "converted") for path in PYTORCH.glob(f"pytorch-{kind}/*/*.onnx"))


@pytest.mark.parametrize("folder", OPSET_6, ids=lambda folder: folder.name)
def test_models_of_pytorch_in_2017(folder: Path) -> None:
    """Opset 6, for which ONNX Runtime has no kernels; ONNX ships the outputs that PyTorch computed."""
    loaded = load(folder / "model.onnx")
    assert not loaded.result.refusals
    assert loaded.model.opset_imports[""] == 21
    arrays = {}
    for kind in ("input", "output"):
        for path in sorted((folder / "test_data_set_0").glob(f"{kind}_*.pb")):
            tensor = onnx.TensorProto.FromString(path.read_bytes())
            arrays[path.stem] = onnx.numpy_helper.to_array(tensor)
    feeds = {v.name: arrays[f"input_{i}"] for i, v in enumerate(loaded.model.graph.inputs)}
    for i, found in enumerate(run(models.serialize(loaded.model), feeds)):
        np.testing.assert_allclose(found, arrays[f"output_{i}"], rtol=1e-3, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    data=st.data(),
    operator=st.sampled_from(["Softmax", "LogSoftmax"]),
    static=st.booleans(),
)
def test_softmax_of_any_shape(tmp_path_factory, shape, data, operator, static) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    dims = ",".join(str(d) if static else f"d{i}" for i, d in enumerate(shape))
    text = f"g (float[{dims}] x) => (float[{dims}] y) {{ y = {operator}<axis={axis}>(x) }}"
    loaded = source(tmp_path_factory.mktemp("m"), 12, text)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    [a] = run(models.serialize(loaded.original), {"x": x})
    [b] = run(models.serialize(loaded.model), {"x": x})
    np.testing.assert_allclose(a, b, rtol=4 * np.finfo(np.float32).eps, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 9), scale=st.integers(3, 40), mode=st.sampled_from(["nearest", "linear"]))
def test_resize_by_any_scale(tmp_path_factory, height, scale, mode) -> None:
    scale = scale / 10
    size = int(np.floor(np.float32(height) * np.float32(scale)))
    if size < 1:
        return
    text = f"""g (float[1,1,{height},2] x) => (float[1,1,n,2] y) <float[4] s = {{1.0, 1.0, {scale}, 1.0}}>
        {{ y = Resize<mode="{mode}">(x, s) }}"""
    loaded = source(tmp_path_factory.mktemp("m"), 10, text)
    x = np.arange(height * 2, dtype=np.float32).reshape(1, 1, height, 2)
    [a] = run(models.serialize(loaded.original), {"x": x})
    [b] = run(models.serialize(loaded.model), {"x": x})
    np.testing.assert_allclose(a, b, rtol=1e-6)
