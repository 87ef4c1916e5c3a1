"""Models on disk: what is kept, where weights go, and how much memory it takes."""

from __future__ import annotations

import re
import shutil
import threading
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphc import model as models
from graphc.errors import BadInput
from graphc.storage import container, wire
from graphc.storage.tensors import constants

DATA = Path(__file__).parent / "data"
REAL = ["fmnist_resnet.onnx", "fmnist_vit_tiny.onnx", "tiny_mixtral_bytes.onnx"]

RICH = """
<ir_version: 10, opset_import: ["": 21, "own": 1, "com.microsoft": 1], producer_name: "me", model_version: 7,
 doc_string: "about", metadata_props: ["character": "abc"]>
main (float[batch, 4] x, bool flag, float[4] default) => (float[batch, 4] y, string[2] z)
<float[4] default = {1.0, 2.0, 3.0, 4.0}, float[4, 4] captured = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0,
 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0}, string[2] words = {"a", "b"}, float[batch, 4] hidden>
{
    scale = Constant <value = float[1] {2.0}> ()
    hidden = own.double (x, scale)
    gelu = com.microsoft.Gelu (hidden)
    shifted = Add (gelu, default)
    y = If (flag) <
        then_branch = yes () => (float[n, 4] a) { a = MatMul (shifted, captured) },
        else_branch = no () => (float[n, 4] b) <float[4] bias = {1.0, 1.0, 1.0, 1.0}> { b = Sub (shifted, bias) }
    >
    z = Identity (words)
}
<domain: "own", opset_import: ["": 21], doc_string: "twice">
double (a, b) => (c) { c = Mul (a, b) }
"""


@pytest.fixture
def rich(tmp_path) -> Path:
    path = tmp_path / "rich.onnx"
    path.write_bytes(onnx.parser.parse_model(RICH).SerializeToString())
    return path


def dense(size: int, *, number: float = 0.0, copies: int = 1, dtype=ir.DataType.FLOAT) -> ir.Model:
    """A chain of additions of constants of ``size`` elements."""
    x = ir.Value(name="x", shape=ir.Shape([size]), type=ir.TensorType(dtype))
    value, nodes, weights = x, [], []
    for i in range(copies):
        array = np.arange(size, dtype=np.float64) % 7 + number + i
        tensor = ir.tensor(array.astype(dtype.numpy()), dtype=dtype, name=f"w{i}")
        weight = ir.Value(name=f"w{i}", shape=tensor.shape, type=ir.TensorType(dtype), const_value=tensor)
        nodes.append(ir.node("Add", [value, weight], name=f"add{i}"))
        value = nodes[-1].outputs[0]
        value.name, value.type, value.shape = f"y{i}", x.type, x.shape
        weights.append(weight)
    graph = ir.Graph([x], [value], nodes=nodes, initializers=weights, opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("inline_limit", [models.INLINE_LIMIT, 0])
def test_everything_is_kept(rich, tmp_path, inline_limit) -> None:
    loaded = models.load(rich)
    [out, *_] = models.save(loaded, tmp_path / "out.onnx", inline_limit=inline_limit)
    again = models.load(out)
    assert models.text(again) == models.text(loaded)
    assert models.content_hash(again) == models.content_hash(loaded)
    assert (again.producer_name, again.model_version, again.doc_string) == ("me", 7, "about")
    assert again.metadata_props == {"character": "abc"}
    assert again.opset_imports == {"": 21, "own": 1, "com.microsoft": 1}
    assert [v.name for v in again.graph.inputs] == ["x", "flag", "default"]
    assert str(again.graph.inputs[0].shape) == "[batch,4]"
    assert again.graph[1].outputs[0].shape is not None
    assert [f.doc_string for f in again.functions.values()] == ["twice"]
    onnx.checker.check_model(str(out))


@pytest.mark.parametrize("name", REAL)
def test_real_models_are_kept_byte_for_byte(name, tmp_path) -> None:
    loaded = models.load(DATA / name)
    [first] = models.save(loaded, tmp_path / "first.onnx")
    [second] = models.save(models.load(first), tmp_path / "second.onnx")
    assert first.read_bytes() == second.read_bytes()
    assert models.content_hash(models.load(second)) == models.content_hash(loaded)
    data = models.save(loaded, tmp_path / "beside.onnx", inline_limit=0)
    assert models.content_hash(models.load(data[0])) == models.content_hash(loaded)
    assert models.save(models.load(data[0]), tmp_path / "third.onnx") == [tmp_path / "third.onnx"]
    assert (tmp_path / "third.onnx").read_bytes() == first.read_bytes()


def test_the_data_file_is_named_by_its_content(tmp_path) -> None:
    one = models.save(dense(1000), tmp_path / "m.onnx", inline_limit=0)
    assert re.fullmatch(r"m\.[0-9a-f]{12}\.data", one[1].name)
    assert models.save(dense(1000), tmp_path / "m.onnx", inline_limit=0) == one
    assert models.save(dense(1000, number=1), tmp_path / "m.onnx", inline_limit=0)[1] != one[1]


def test_stale_data_is_removed_unless_another_model_uses_it(tmp_path) -> None:
    [path, first] = models.save(dense(1000), tmp_path / "m.onnx", inline_limit=0)
    shutil.copy(path, tmp_path / "copy.onnx")
    (tmp_path / "m.0123456789ab.data").write_bytes(b"left by a killed run")
    (tmp_path / "m.notes.data").write_bytes(b"not ours")
    [_, second] = models.save(dense(1000, number=1), path, inline_limit=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["m.onnx", "copy.onnx", "m.notes.data", first.name, second.name]
    )
    models.load(tmp_path / "copy.onnx")
    models.save(dense(10), path)
    assert not second.exists()


def test_equal_tensors_share_a_region_and_regions_are_aligned(tmp_path) -> None:
    model = dense(300_000, copies=3)
    values = list(model.graph.initializers.values())
    values[2].const_value = values[0].const_value
    values[1].const_value = ir.tensor(values[0].const_value.numpy().copy())
    [path, data] = models.save(model, tmp_path / "m.onnx", inline_limit=0)
    assert data.stat().st_size == 4 * 300_000
    assert models.nbytes(models.load(path)) == 3 * 4 * 300_000
    [path, data] = models.save(dense(300_001, copies=3), tmp_path / "m.onnx", inline_limit=0)
    offsets = [t.offset for t in constants(models.load(path))]
    assert [offset % 4096 for offset in offsets] == [0, 0, 0]


def test_onnxruntime_reads_what_is_written(tmp_path) -> None:
    ort = pytest.importorskip("onnxruntime")
    model = dense(2000, copies=2)
    # A weight in a Constant node goes to the data file, too.
    tensor = ir.tensor(np.full(2000, 3, np.float32), name="c")
    constant = ir.node("Constant", [], {"value": tensor}, name="constant")
    model.graph.insert_before(model.graph[0], constant)
    model.graph[1].replace_input_with(0, constant.outputs[0])
    expected = 3 + 2 * (np.arange(2000) % 7) + 1
    for limit in (0, models.INLINE_LIMIT):
        written = models.save(model, tmp_path / "m.onnx", inline_limit=limit)
        [y] = ort.InferenceSession(str(written[0])).run(None, {"x": np.zeros(2000, np.float32)})
        np.testing.assert_array_equal(y, expected)
    assert written[0].stat().st_size > 3 * 8000


PACKED = [ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.FLOAT4E2M1, ir.DataType.INT2, ir.DataType.UINT2]
PLAIN = [
    ir.DataType.FLOAT16,
    ir.DataType.BFLOAT16,
    ir.DataType.DOUBLE,
    ir.DataType.FLOAT8E4M3FN,
    ir.DataType.INT8,
    ir.DataType.UINT64,
    ir.DataType.BOOL,
    ir.DataType.COMPLEX64,
]


@pytest.mark.parametrize("inline_limit", [0, models.INLINE_LIMIT])
@pytest.mark.parametrize("dtype", PACKED + PLAIN)
def test_every_dtype(dtype, inline_limit, tmp_path) -> None:
    array = (np.arange(10_001) % 3 % 2).astype(dtype.numpy())
    tensors = {
        "plain": ir.tensor(array, dtype=dtype),
        "lazy": ir.LazyTensor(lambda: ir.tensor(array, dtype=dtype), dtype, ir.Shape([10_001])),
        "empty": ir.tensor(array[:0], dtype=dtype),
        "scalar": ir.tensor(array[0], dtype=dtype),
    }
    values = [
        ir.Value(name=name, shape=ir.Shape(t.shape.numpy()), type=ir.TensorType(dtype), const_value=t)
        for name, t in tensors.items()
    ]
    nodes = [ir.node("Identity", [v]) for v in values]
    graph = ir.Graph([], [n.outputs[0] for n in nodes], nodes=nodes, initializers=values, name="g")
    graph.opset_imports[""] = 25
    for node, value in zip(nodes, values, strict=True):
        node.outputs[0].name, node.outputs[0].type = f"{value.name}_out", value.type
    model = ir.Model(graph, ir_version=13)
    [path, *_] = models.save(model, tmp_path / "m.onnx", inline_limit=inline_limit)
    again = models.load(path)
    for name, tensor in tensors.items():
        back = again.graph.initializers[name].const_value
        assert (back.dtype, tuple(back.shape)) == (dtype, tuple(tensor.shape))
        np.testing.assert_array_equal(back.numpy(), tensor.numpy())
    assert models.content_hash(again) == models.content_hash(model)


def test_the_input_is_never_written_over(tmp_path) -> None:
    [path, data] = models.save(dense(10_000), tmp_path / "m.onnx", inline_limit=0)
    before = data.read_bytes()
    with pytest.raises(BadInput, match="the output is the input"):
        models.save(models.load(path), data)
    assert data.read_bytes() == before


def test_a_data_file_that_shrinks_while_in_use(tmp_path) -> None:
    [path, data] = models.save(dense(10_000), tmp_path / "m.onnx", inline_limit=0)
    model = models.load(path)
    with data.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(BadInput, match="cannot read the weights"):
        models.save(model, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_counts() -> None:
    resnet = models.load(DATA / "fmnist_resnet.onnx")
    assert models.parameters(resnet) == 307_402
    assert models.nbytes(resnet) == pytest.approx(4 * 307_402, rel=1e-3)
    model = dense(100, copies=2)
    assert (models.parameters(model), models.nbytes(model)) == (200, 800)
    first, second = model.graph.initializers.values()
    second.const_value = first.const_value
    assert (models.parameters(model), models.nbytes(model)) == (100, 400)
    assert models.parameters(dense(100, dtype=ir.DataType.INT64)) == 0
    assert models.parameters(dense(1)) == 0


def test_a_changed_weight_changes_the_hash() -> None:
    assert models.content_hash(dense(5000)) == models.content_hash(dense(5000))
    assert models.content_hash(dense(5000)) != models.content_hash(dense(5000, number=1e-6))


def test_the_text_form(rich) -> None:
    assert (
        models.text(models.load(rich))
        == """\
ir_version 10
opset ai.onnx 21
opset com.microsoft 1
opset own 1
metadata character = 'abc'

graph main {
  input x: float[batch,4]
  input flag: bool[]
  input default: float[4] = float[4] {1,2,3,4}
  constant captured = float[4,4] {{1,2,3,4},{5,6,7,8},{9,1,2,3},{4,5,6,7}}
  constant words = string[2] {'a','b'}
  scale = Constant<value=float[1] {2}>()
  hidden: float[batch,4] = own.double(x, scale)
  gelu = com.microsoft.Gelu(hidden)
  shifted = Add(gelu, default)
  y: float[batch,4] = If(flag)
    else_branch {
      constant bias = float[4] {1,1,1,1}
      b: float[n,4] = Sub(shifted, bias)
      output b: float[n,4]
    }
    then_branch {
      a: float[n,4] = MatMul(shifted, captured)
      output a: float[n,4]
    }
  z: string[2] = Identity(words)
  output y: float[batch,4]
  output z: string[2]
}

function own.double<>(a, b) -> c {
  opset ai.onnx 21
  c = Mul(a, b)
}
"""
    )


def test_large_constants_are_shown_by_their_hash() -> None:
    one, other = models.text(dense(100)), models.text(dense(100, number=1))
    assert re.search(r"constant w0 = float\[100\] sha256:[0-9a-f]{16}\n", one)
    assert one != other


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=6),
    threshold=st.integers(100, 4000),  # above what RICH itself holds
    typed=st.booleans(),
)
def test_stripping_and_splicing_are_inverse(sizes, threshold, typed) -> None:
    """Whatever is stripped lies in the file where it is said to, and filling it in again gives the same model."""
    proto = onnx.parser.parse_model(RICH)
    for i, size in enumerate(sizes):
        array = np.random.default_rng(i).standard_normal(size).astype(np.float32)
        tensor = proto.graph.initializer.add(name=f"w{i}", dims=[size], data_type=1)
        if typed:
            tensor.float_data.extend(array)
        else:
            tensor.raw_data = array.tobytes()
    data = proto.SerializeToString()
    light = onnx.ModelProto.FromString(wire.strip(data, "here", threshold))
    inline = {}
    for mark, (tensor, full) in enumerate(
        zip(light.graph.initializer, onnx.ModelProto.FromString(data).graph.initializer, strict=True)
    ):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            assert tensor == full
            continue
        place = {e.key: e.value for e in tensor.external_data}
        assert place["location"] == "here"
        content = data[int(place["offset"]) : int(place["offset"]) + int(place["length"])]
        assert content == onnx.numpy_helper.to_array(full).tobytes()
        assert len(content) >= threshold
        inline[str(mark)] = wire.Inline(len(content), lambda out, content=content: out.write(content))
        tensor.external_data[0].value = f"{wire.MARK}{mark};"
    pieces, length = wire.splice(light.SerializeToString(), inline)
    filled = b"".join(p if isinstance(p, bytes) else content_of(p) for p in pieces)
    assert length == len(filled)
    again = onnx.ModelProto.FromString(filled)
    for a, b in zip(again.graph.initializer, proto.graph.initializer, strict=True):
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(a), onnx.numpy_helper.to_array(b))
        a.CopyFrom(b)
    assert again == proto


def content_of(piece: wire.Inline) -> bytes:
    import io

    out = io.BytesIO()
    piece.write(out)
    return out.getvalue()


@settings(max_examples=100, deadline=None)
@given(cut=st.integers(0, 2000), flips=st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 255)), max_size=3))
def test_damaged_bytes_are_malformed_or_parse(cut, flips) -> None:
    """No damage leads to anything but ``Malformed``, or a message that protobuf judges."""
    data = bytearray(onnx.parser.parse_model(RICH).SerializeToString())
    for at, bits in flips:
        data[at % len(data)] ^= bits
    damaged = bytes(data[: len(data) - cut % len(data)])
    for threshold in (1, 64):
        try:
            wire.strip(damaged, "here", threshold)
        except wire.Malformed:
            return


def anonymous() -> int:
    """The process's anonymous memory in bytes (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) << 10


@pytest.mark.parametrize("inline_limit", [0, models.INLINE_LIMIT])
def test_weights_are_never_in_memory(tmp_path, monkeypatch, inline_limit) -> None:
    """Load, hash and save with weights of 192 MB take less than a quarter of that."""
    size = 4 << 20
    zeros = np.zeros(size, np.float32)
    x = ir.Value(name="x", shape=ir.Shape([size]), type=ir.TensorType(ir.DataType.FLOAT))
    value, nodes, weights = x, [], []
    for i in range(12):
        lazy = ir.LazyTensor(lambda i=i: ir.tensor(zeros + i), ir.DataType.FLOAT, ir.Shape([size]), name=f"w{i}")
        weights.append(ir.Value(name=f"w{i}", shape=lazy.shape, type=x.type, const_value=lazy))
        nodes.append(ir.node("Add", [value, weights[-1]]))
        value = nodes[-1].outputs[0]
        value.name, value.type = f"y{i}", x.type
    graph = ir.Graph([x], [value], nodes=nodes, initializers=weights, opset_imports={"": 21}, name="g")
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())

    before = anonymous()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        [path, *_] = models.save(ir.Model(graph, ir_version=10), tmp_path / "a.onnx", inline_limit=inline_limit)
        loaded = models.load(path)
        assert all(isinstance(t, ir.ExternalTensor) for t in constants(loaded))
        models.save(loaded, tmp_path / "b.onnx", inline_limit=inline_limit)
        models.content_hash(models.load(tmp_path / "b.onnx"))
    finally:
        done.set()
        thread.join()
    assert models.nbytes(loaded) == 12 * 4 * size
    assert peak - before < 48 << 20


def test_many_large_tensors_may_be_open_at_once(tmp_path) -> None:
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, limit[1]), limit[1]))
    try:
        [path, _] = models.save(dense(2000, copies=600), tmp_path / "m.onnx", inline_limit=0)
        arrays = [t.numpy() for t in constants(models.load(path))]
        assert len(arrays) == 600
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def test_small_external_tensors_are_read_at_once(tmp_path) -> None:
    """Shapes that stand in a data file are known to shape inference, and hold no file."""
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> g (float[2,6] x) => (float[n,m] y) '
        "<int64[2] shape = {3, 4}> { y = Reshape(x, shape) }"
    )
    (tmp_path / "d").write_bytes(b"...." + np.array([3, 4], np.int64).tobytes())
    tensor = proto.graph.initializer[0]
    tensor.ClearField("int64_data")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "d"), ("offset", "4"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    found = container.read(tmp_path / "m.onnx")
    held = found.proto.graph.initializer[0]
    assert onnx.numpy_helper.to_array(held).tolist() == [3, 4]
    assert found.files == (tmp_path / "m.onnx", tmp_path / "d")
