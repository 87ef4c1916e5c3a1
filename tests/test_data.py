"""The user's data: what is read, and what is refused with a reason."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from graphc.data import BATCH, load
from graphc.errors import BadInput

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
IMAGE = "g (float[N,3] x) => (float[N,3] y) { y = Relu(x) }"
PAIR = "g (int64[B,S] ids, int64[B,S] mask) => (int64[B,S] y) { y = Add(ids, mask) }"
AUDIO = "g (float[B,T] wave, float[2,B,4] state, int64 rate) => (float[B,T] y) { y = Relu(wave) }"
FIXED = "g (float[4,3] x) => (float[4,3] y) { y = Relu(x) }"


def parse(text: str) -> ir.Model:
    return ir.from_onnx_text(f"{HEAD} {text}")


def npz(folder: Path, **arrays: Any) -> Path:
    path = folder / "data.npz"
    np.savez(path, **arrays)
    return path


def rows(count: int, width: int = 3) -> np.ndarray:
    return np.arange(count * width, dtype=np.float32).reshape(count, width)


def shapes(cases: list[Mapping[str, np.ndarray]]) -> list[dict[str, tuple[int, ...]]]:
    return [{name: a.shape for name, a in case.items()} for case in cases]


class TestRead:
    def test_rows_are_fed_in_batches(self, tmp_path: Path) -> None:
        cases = load(npz(tmp_path, x=rows(BATCH + 5)), parse(IMAGE))
        assert shapes(cases) == [{"x": (BATCH, 3)}, {"x": (5, 3)}]
        np.testing.assert_array_equal(np.concatenate([c["x"] for c in cases]), rows(BATCH + 5))

    def test_an_axis_more_counts_cases(self, tmp_path: Path) -> None:
        cases = load(npz(tmp_path, x=np.stack([rows(2)] * 5)), parse(IMAGE))
        assert shapes(cases) == [{"x": (2, 3)}] * 5

    def test_a_static_batch(self, tmp_path: Path) -> None:
        assert shapes(load(npz(tmp_path, x=rows(9)), parse(FIXED))) == [{"x": (4, 3)}] * 2

    def test_what_has_no_samples_is_shared(self, tmp_path: Path) -> None:
        path = npz(tmp_path, wave=np.zeros((3, 2, 64), np.float32), state=np.zeros((2, 2, 4), np.float32), rate=16000)
        cases = load(path, parse(AUDIO))
        assert shapes(cases) == [{"wave": (2, 64), "state": (2, 2, 4), "rate": ()}] * 3

    def test_one_file_an_input(self, tmp_path: Path) -> None:
        for name in ("ids", "mask"):
            np.save(tmp_path / f"{name}.npy", np.ones((2, 5), np.int64))
        assert shapes(load(tmp_path, parse(PAIR))) == [{"ids": (2, 5), "mask": (2, 5)}]

    def test_one_file_a_case(self, tmp_path: Path) -> None:
        for i, length in enumerate((5, 7)):
            np.savez(tmp_path / f"{i}.npz", ids=np.ones((1, length), int), mask=np.ones((1, length), int))
        assert [case["ids"].shape for case in load(tmp_path, parse(PAIR))] == [(1, 5), (1, 7)]

    def test_files_of_a_single_input_may_have_any_name(self, tmp_path: Path) -> None:
        for i in range(3):
            np.save(tmp_path / f"picture{i}.npy", rows(1))
        assert len(load(tmp_path, parse(IMAGE))) == 3
        assert len(load(tmp_path / "picture0.npy", parse(IMAGE))) == 1
        assert len(load(npz(tmp_path, whatever=rows(2)), parse(IMAGE))) == 1

    def test_precision_is_converted(self, tmp_path: Path) -> None:
        assert load(npz(tmp_path, x=rows(2).astype(np.float64)), parse(IMAGE))[0]["x"].dtype == np.float32
        path = npz(tmp_path, ids=np.ones((1, 2), np.uint8), mask=np.ones((1, 2), np.int32))
        assert load(path, parse(PAIR))[0]["ids"].dtype == np.int64

    def test_dtypes_that_numpy_files_do_not_know(self, tmp_path: Path) -> None:
        model = parse("g (bfloat16[N] x) => (bfloat16[N] y) { y = Identity(x) }")
        array = np.array([1, 2.5], ml_dtypes.bfloat16)
        found = load(npz(tmp_path, x=array), model)[0]["x"]
        assert found.dtype == array.dtype and (found == array).all()

    def test_strings(self, tmp_path: Path) -> None:
        model = parse("g (string[N] x) => (string[N] y) { y = Identity(x) }")
        assert load(npz(tmp_path, x=np.array(["a", "bc"])), model)[0]["x"].tolist() == ["a", "bc"]

    def test_defaults_may_be_given_or_not(self, tmp_path: Path) -> None:
        model = parse("g (float[N,3] x, float[3] b) => (float[N,3] y) { y = Add(x, b) }")
        bias = model.graph.inputs[1]
        bias.const_value = ir.tensor(np.ones(3, np.float32))
        model.graph.register_initializer(bias)
        assert list(load(npz(tmp_path, x=rows(2)), model)[0]) == ["x"]
        assert list(load(npz(tmp_path, x=rows(2), b=np.zeros((1, 3), np.float32)), model)[0]) == ["x", "b"]


class TestRefused:
    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"idz": np.ones((1, 2), int), "mask": np.ones((1, 2), int)}, "did you mean 'ids'"),
            ({"ids": np.ones((1, 2), int)}, "no array for input 'mask'"),
            ({"ids": np.ones((1, 2)), "mask": np.ones((1, 2), int)}, "float64, not int64"),
            ({"ids": np.ones(2, int), "mask": np.ones(2, int)}, "has 1 dimensions, not 2"),
            ({"ids": np.ones((1, 2), int), "mask": np.ones((1, 3), int)}, "disagrees on the dimension 'S'"),
            ({"ids": np.ones((2, 1, 2), int), "mask": np.ones((3, 1, 2), int)}, "different numbers of samples"),
            ({"ids": np.ones((0, 2), int), "mask": np.ones((0, 2), int)}, "no samples"),
        ],
    )
    def test_what_does_not_fit(self, tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
        with pytest.raises(BadInput, match=message):
            load(npz(tmp_path, **arrays), parse(PAIR))

    def test_static_dimensions(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match="size 4 in dimension 1, not 3"):
            load(npz(tmp_path, x=rows(2, 4)), parse(IMAGE))
        with pytest.raises(BadInput, match="too few samples"):
            load(npz(tmp_path, x=rows(3)), parse(FIXED))

    def test_nan(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match="NaN"):
            load(npz(tmp_path, x=np.full((1, 3), np.nan, np.float32)), parse(IMAGE))

    def test_integers_that_do_not_fit(self, tmp_path: Path) -> None:
        model = parse("g (int8[N] x) => (int8[N] y) { y = Identity(x) }")
        with pytest.raises(BadInput, match="does not fit into int8"):
            load(npz(tmp_path, x=np.array([200])), model)

    def test_pixels_are_not_silently_scaled(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match="uint8, not float"):
            load(npz(tmp_path, x=np.ones((1, 3), np.uint8)), parse(IMAGE))

    @pytest.mark.parametrize("suffix", [".npy", ".npz"])
    def test_pickles_are_never_read(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"data{suffix}"
        objects = np.array([{"a": 1}, None], dtype=object)
        if suffix == ".npy":
            np.save(path, objects, allow_pickle=True)
        else:
            np.savez(path, x=objects)
        with pytest.raises(BadInput, match="pickled"):
            load(path, parse(IMAGE))

    @pytest.mark.parametrize("name", ["data.npz", "data.npy", "data.txt"])
    def test_other_files(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        path.write_text("no arrays")
        with pytest.raises(BadInput) as caught:
            load(path, parse(IMAGE))
        assert name in str(caught.value)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match="no such data"):
            load(tmp_path / "none", parse(IMAGE))
        with pytest.raises(BadInput, match=r"no \.npy or \.npz"):
            load(tmp_path, parse(IMAGE))

    def test_one_array_for_two_inputs(self, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", np.ones((1, 2), int))
        with pytest.raises(BadInput, match="one array is not enough"):
            load(tmp_path / "a.npy", parse(PAIR))
