"""``graphc.fx`` on operators of ONNX Runtime: what torch computes is what its kernels do."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")

from graphc import runtime  # noqa: E402
from graphc.fx import to_torch  # noqa: E402

Array = np.ndarray[Any, Any]

RNG = np.random.default_rng(0)


def f(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def i32(values: Any) -> Array:
    return np.array(values, np.int32)


def byte(*shape: int) -> Array:
    return RNG.integers(0, 256, shape).astype(np.uint8)


def one(value: float) -> Array:
    return np.array(value, np.float32)


X, C, MID = f(2, 5, 16), f(16), np.array(128, np.uint8)
IMAGE, KERNEL = f(1, 4, 8, 8), f(6, 4, 3, 3)
COS, SIN = np.cos(f(32, 8)), np.sin(f(32, 8))
PAST = i32([4, 4]), i32(5)
Q, K, V = f(2, 5, 64), f(2, 5, 32), f(2, 5, 32)
STEP = f(2, 1, 64), f(2, 1, 32), f(2, 1, 32)
GROUPED = {"num_heads": 4, "kv_num_heads": 2}
SUM = {"outputs": ("y", "", "", "sum")}
MASKS = (i32([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]), i32([5, 3]), i32([5, 3, 0, 1]), np.tril(np.ones((2, 5, 5), np.int32)))

CASES: list[tuple[str, list[Any], dict[str, Any]]] = [
    ("FusedConv", [IMAGE, KERNEL, f(6), f(1, 6, 8, 8)], {"activation": "Relu", "pads": [1, 1, 1, 1]}),
    ("FusedConv", [IMAGE, KERNEL, f(6)], {"activation": "LeakyRelu", "activation_params": [0.2]}),
    ("FusedConv", [IMAGE, KERNEL], {"activation": "Clip", "activation_params": [-0.2, 0.3]}),
    ("FusedGemm", [f(3, 4), f(4, 5), f(5)], {"activation": "LeakyRelu", "activation_alpha": 0.3, "alpha": 0.5}),
    ("FusedMatMul", [f(2, 3, 4), f(2, 5, 4)], {"alpha": 0.3, "transB": 1}),
    ("FusedMatMul", [f(4, 2, 3), f(3, 2, 6)], {"transBatchA": 1, "transBatchB": 1}),
    ("FusedMatMul", [f(4, 2, 3), f(4, 2, 6)], {"transBatchA": 1, "transBatchB": 1, "transA": 1}),
    ("BiasGelu", [X, C], {}),
    ("FastGelu", [X, C], {}),
    ("QuickGelu", [X], {"alpha": 1.2}),
    ("Gelu", [X], {}),
    ("SkipLayerNormalization", [X, f(2, 5, 16), C, f(16), f(16)], SUM),
    ("SkipLayerNormalization", [X, f(1, 5, 16), C], {"epsilon": 1e-5}),
    ("SkipSimplifiedLayerNormalization", [X, f(2, 5, 16), C, f(16)], SUM),
    ("SimplifiedLayerNormalization", [X, C], {"domain": "", "axis": -1}),
    (
        "EmbedLayerNormalization",
        [i32([[1, 2], [8, 0]]), i32([[0, 1], [1, 0]]), f(9, 16), f(7, 16), f(2, 16), C, f(16), i32([[1, 1], [1, 0]])],
        {"outputs": ("y", "lengths"), "mask_index_type": 1},
    ),
    *(("Attention", [X, f(16, 48), f(48), mask], {"num_heads": 4}) for mask in (None, *MASKS)),
    (
        "Attention",
        [X, f(16, 48), f(48), None, f(2, 2, 4, 3, 4)],
        {"num_heads": 4, "unidirectional": 1, "outputs": ("y", "present")},
    ),
    ("Attention", [X, f(16, 48), f(48), None, None, f(2, 4, 5, 5)], {"num_heads": 4, "scale": 0.3}),
    ("Attention", [X, f(16, 40), f(40)], {"num_heads": 4, "qkv_hidden_sizes": [16, 16, 8]}),
    (
        "MultiHeadAttention",
        [X, f(2, 7, 16), f(2, 7, 16), f(48), i32([[1] * 7, [1, 1, 1, 1, 0, 0, 0]])],
        {"num_heads": 4},
    ),
    ("MultiHeadAttention", [X, f(2, 7, 16), f(2, 7, 16), None, i32([7, 3])], {"num_heads": 4}),
    ("MultiHeadAttention", [X, X, X, None, None, f(1, 4, 5, 5)], {"num_heads": 4, "unidirectional": 1}),
    (
        "MultiHeadAttention",
        [X, X, X, None, None, None, f(2, 4, 3, 4), f(2, 4, 3, 4)],
        {"num_heads": 4, "outputs": ("y", "key", "value")},
    ),
    ("MultiHeadAttention", [X, f(2, 4, 6, 4), f(2, 4, 6, 4)], {"num_heads": 4}),
    *(
        ("GroupQueryAttention", [Q, K, V, None, None, *PAST], {**GROUPED, **more})
        for more in ({}, {"local_window_size": 3}, {"softcap": 2.0}, {"scale": 0.2}, {"smooth_softmax": 1})
    ),
    *(
        (
            "GroupQueryAttention",
            [Q, K, V, None, None, *PAST, COS, SIN],
            {**GROUPED, "do_rotary": 1, "rotary_interleaved": n},
        )
        for n in (0, 1)
    ),
    ("GroupQueryAttention", [f(2, 5, 128), None, None, None, None, *PAST, COS, SIN], {**GROUPED, "do_rotary": 1}),
    (
        "GroupQueryAttention",
        [*STEP, f(2, 2, 6, 16), f(2, 2, 6, 16), i32([6, 6]), i32(7), COS, SIN],
        {**GROUPED, "do_rotary": 1, "outputs": ("y", "key", "value")},
    ),
    *(
        ("RotaryEmbedding", [Q, np.array([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]]), COS, SIN], {"interleaved": n})
        for n in (0, 1)
    ),
    ("RotaryEmbedding", [f(2, 4, 5, 16), np.array([3]), COS, SIN], {}),
    ("RotaryEmbedding", [f(2, 5, 128), np.array([2]), COS, SIN], {"num_heads": 4, "rotary_embedding_dim": 16}),
    *(
        (
            "MatMulNBits",
            [f(3, 40), byte(6, 2, 4 * bits), np.abs(f(6, 2)), zeros, None, f(6)],
            {"K": 40, "N": 6, "bits": bits, "block_size": 32},
        )
        for bits in (2, 4, 8)
        for zeros in (None, byte(6, max(1, 2 * bits // 8)))
    ),
    (
        "MatMulNBits",
        [f(3, 40), byte(6, 2, 16), np.abs(f(6, 2)), f(6, 2)],
        {"K": 40, "N": 6, "bits": 4, "block_size": 32},
    ),
    (
        "GatherBlockQuantized",
        [byte(8, 64), np.array([[1, 3]]), np.abs(f(8, 4)), byte(8, 2)],
        {"bits": 4, "block_size": 32, "gather_axis": 0, "quantize_axis": 1},
    ),
    ("DynamicQuantizeMatMul", [f(3, 8), byte(8, 4), one(0.02), MID, f(4)], {}),
    ("MatMulIntegerToFloat", [byte(3, 8), byte(8, 4), one(0.02), one(0.03), MID, MID, f(4)], {}),
    ("QLinearAdd", [byte(2, 4), one(0.02), MID, byte(2, 4), one(0.03), MID, one(0.05), MID], {}),
    ("QLinearMul", [byte(2, 4), one(0.02), MID, byte(2, 4), one(0.03), MID, one(0.05), MID], {}),
    ("QLinearSigmoid", [byte(2, 4), one(0.02), MID, one(0.004), np.array(0, np.uint8)], {}),
    ("QLinearLeakyRelu", [byte(2, 4), one(0.02), MID, one(0.02), MID], {"alpha": 0.1}),
    ("QLinearGlobalAveragePool", [byte(1, 4, 3, 3), one(0.02), MID, one(0.02), MID], {"channels_last": 0}),
    ("QLinearConcat", [one(0.02), MID, byte(2, 4), one(0.02), MID, byte(2, 3), one(0.03), MID], {"axis": 1}),
    ("ExpandDims", [X, i32(1)], {}),
    ("Inverse", [f(2, 3, 3)], {}),
    ("QLinearMatMul", [byte(3, 4), one(0.02), MID, byte(4, 5), one(0.03), MID, one(0.05), MID], {"domain": ""}),
    (
        "QLinearConv",
        [
            *(byte(1, 3, 5, 5), one(0.02), MID, byte(4, 3, 3, 3), np.abs(f(4)) / 50, np.full(4, 128, np.uint8)),
            *(one(0.1), MID, RNG.integers(-99, 99, 4).astype(np.int32)),
        ],
        {"domain": ""},
    ),
    *(
        (
            "NonMaxSuppression",
            [RNG.random((2, 30, 4), np.float32), RNG.random((2, 3, 30), np.float32), np.array(5), one(0.2), least],
            {"domain": "", "center_point_box": centred},
        )
        for centred, least in ((0, one(0.3)), (1, None))
    ),
    ("ConvInteger", [byte(1, 3, 5, 5), byte(4, 3, 3, 3), MID, MID], {"domain": ""}),
]


def model_of(
    op: str, arrays: list[Any], domain: str = "com.microsoft", outputs: tuple[str, ...] = ("y",), **attributes: Any
) -> tuple[ir.Model, dict[str, Array]]:
    """A model of one node, whose inputs are the arrays that are given."""
    feeds = {f"i{n}": array for n, array in enumerate(arrays) if array is not None}
    values: dict[str, ir.Value] = {
        name: ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype)))
        for name, array in feeds.items()
    }
    node = ir.node(
        op, [values.get(f"i{n}") for n in range(len(arrays))], attributes, domain=domain, num_outputs=len(outputs)
    )
    for value, name in zip(node.outputs, outputs, strict=True):
        value.name = name
    graph = ir.Graph(
        list(values.values()),
        [v for v in node.outputs if v.name],
        nodes=[node],
        opset_imports={"": 21, "com.microsoft": 1},
    )
    return ir.Model(graph, ir_version=10), feeds


@pytest.mark.parametrize(("op", "arrays", "options"), CASES, ids=[f"{op}-{n}" for n, (op, *_) in enumerate(CASES)])
def test_operators_of_onnx_runtime(op: str, arrays: list[Any], options: dict[str, Any]) -> None:
    model, feeds = model_of(op, arrays, **options)
    wanted = runtime.session(model, optimise=False, threads=1).run(feeds)
    got = to_torch(model)(*(torch.from_numpy(array.copy()) for array in feeds.values()))
    for name, array in wanted.items():
        assert got[name].numpy().dtype == array.dtype
        # Integers must be equal; a sum of 64 products in float32 is off by a few roundings of its largest entry.
        tolerance = 2e-6 * np.abs(array).max() if array.dtype.kind == "f" else 0
        np.testing.assert_allclose(got[name].numpy(), array, rtol=0, atol=tolerance)


def test_caches_of_different_lengths_get_their_new_entries_each_in_its_place() -> None:
    arrays = [*STEP, f(2, 2, 10, 16), f(2, 2, 10, 16), i32([6, 3]), i32(7), COS, SIN]
    model, feeds = model_of("GroupQueryAttention", arrays, outputs=("y", "key", "value"), do_rotary=1, **GROUPED)
    wanted = runtime.session(model, optimise=False, threads=1).run(feeds)
    got = to_torch(model)(*(torch.from_numpy(array.copy()) for array in feeds.values()))
    np.testing.assert_allclose(got["y"].numpy(), wanted["y"], rtol=0, atol=1e-5)
    for name in ("key", "value"):
        # Beyond the valid entries the runtime leaves anything.
        np.testing.assert_allclose(got[name].numpy()[0, :, :7], wanted[name][0, :, :7], rtol=0, atol=1e-5)
        np.testing.assert_allclose(got[name].numpy()[1, :, :4], wanted[name][1, :, :4], rtol=0, atol=1e-5)


def test_sequences_inside_of_a_model() -> None:
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 21]>
    g (float[6, 2] x) => (float[m, 2] y, int64 n)
    <int64[3] sizes = {1, 2, 3}, int64 last = {-1}>
    {
      s = SplitToSequence<axis = 0>(x, sizes) n = SequenceLength(s) a = SequenceAt(s, last)
      t = SequenceInsert(s, a) u = SequenceErase(t, last) v = SequenceConstruct(a, a)
      p = ConcatFromSequence<axis = 0>(u) q = ConcatFromSequence<axis = 0>(v) y = Concat<axis = 0>(p, q)
    }""")
    x = f(6, 2)
    wanted = runtime.session(model, optimise=False, threads=1).run({"x": x})
    got = to_torch(model)(torch.from_numpy(x))
    for name, array in wanted.items():
        np.testing.assert_array_equal(got[name].numpy(), array)


def test_group_norm_of_channels_last_images() -> None:
    image, scale, shift = f(2, 3, 3, 8), f(8), f(8)
    model, _ = model_of("GroupNorm", [image, scale, shift], groups=2, activation=1)
    got = to_torch(model)(*map(torch.from_numpy, (image, scale, shift)))["y"].numpy()
    split = image.reshape(2, 9, 2, 4).astype(np.float64)
    normal = (split - split.mean((1, 3), keepdims=True)) / np.sqrt(split.var((1, 3), keepdims=True) + 1e-5)
    y = normal.reshape(image.shape) * scale + shift
    np.testing.assert_allclose(got, y / (1 + np.exp(-y)), rtol=1e-4, atol=1e-5)
