"""Data other than arrays of inputs: text, pictures, functions, labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphc.cli import main
from graphc.data import BATCH, Spec, load
from graphc.errors import BadInput

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
CLASSIFIER = "g (float[N,3] x) => (float[N,3] y) { y = Relu(x) }"
LANGUAGE = """
g (int64[B,S] input_ids, int64[B,T] attention_mask, int64[B,S] position_ids, float[B,2,P,4] past) => (float[B,S,4] y) {
    e = Gather(table, input_ids)
    m = Cast<to=9>(attention_mask)
    p = Gather(table, position_ids)
    y = Add(e, p)
}"""
PICTURE = "g (float[N,3,4,6] image) => (float[N,3,4,6] y) { y = Relu(image) }"


def parse(text: str) -> ir.Model:
    return ir.from_onnx_text(f"{HEAD} {text}")


def language() -> ir.Model:
    model = parse(LANGUAGE)
    table = ir.tensor(np.zeros((16, 4), np.float32), name="table")
    value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == "table")
    value.const_value, value.shape, value.type = table, ir.Shape((16, 4)), ir.TensorType(ir.DataType.FLOAT)
    model.graph.register_initializer(value)
    return model


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A folder with a tokenizer of ten words, one token each."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {f"w{i}": i for i in range(10)} | {"?": 10}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    return folder


def novel(folder: Path, count: int) -> Path:
    path = folder / "novel.txt"
    path.write_text(" ".join(f"w{i % 10}" for i in range(count)))
    return path


class TestText:
    def test_windows(self, tmp_path: Path, words: Path) -> None:
        found = load(Spec(str(novel(tmp_path, 23)), tokenizer=words, window=8), language())
        assert len(found) == 2, "what does not fill a window is left out"
        np.testing.assert_array_equal(found[1]["input_ids"], [[(8 + i) % 10 for i in range(8)]])
        np.testing.assert_array_equal(found[0]["attention_mask"], np.ones((1, 8), np.int64))
        np.testing.assert_array_equal(found[0]["position_ids"], [range(8)])
        assert found[0]["past"].shape == (1, 2, 0, 4) and found[0]["past"].dtype == np.float32

    def test_windows_may_overlap(self, tmp_path: Path, words: Path) -> None:
        found = load(Spec(str(novel(tmp_path, 16)), tokenizer=words, window=8, stride=4), language())
        assert [int(case["input_ids"][0, 0]) for case in found] == [0, 4, 8]

    def test_lines_are_padded(self, tmp_path: Path, words: Path) -> None:
        path = tmp_path / "lines.txt"
        path.write_text("w1 w2 w3\n\nw4\n")
        (case,) = load(Spec(str(path), tokenizer=words, lines=True), language())
        np.testing.assert_array_equal(case["input_ids"], [[1, 2, 3], [4, 0, 0]])
        np.testing.assert_array_equal(case["attention_mask"], [[1, 1, 1], [1, 0, 0]])
        np.testing.assert_array_equal(case["position_ids"], [[0, 1, 2], [0, 0, 0]])

    def test_samples_limits(self, tmp_path: Path, words: Path) -> None:
        assert len(load(Spec(str(novel(tmp_path, 80)), tokenizer=words, window=8, samples=3), language())) == 3

    def test_no_tokenizer(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match="text needs a tokenizer"):
            load(novel(tmp_path, 8), language())

    def test_a_tokenizer_of_another_model(self, tmp_path: Path, words: Path) -> None:
        model = language()
        table = model.graph.initializers["table"]
        table.const_value, table.shape = ir.tensor(np.zeros((5, 4), np.float32), name="table"), ir.Shape((5, 4))
        with pytest.raises(BadInput, match="another model's"):
            load(Spec(str(novel(tmp_path, 23)), tokenizer=words, window=8), model)

    def test_a_model_without_tokens(self, tmp_path: Path, words: Path) -> None:
        with pytest.raises(BadInput, match="the model takes no text"):
            load(Spec(str(novel(tmp_path, 23)), tokenizer=words), parse(CLASSIFIER))

    def test_the_command_line(self, tmp_path: Path, words: Path, capsys: pytest.CaptureFixture[str]) -> None:
        model = language()
        ir.save(model, tmp_path / "m.onnx")
        data = f"{novel(tmp_path, 40)}{{window=8 samples=2}}"
        code = main(["verify", *[str(tmp_path / "m.onnx")] * 2, "--data", data, "--tokenizer", str(words), "--json"])
        document = json.loads(capsys.readouterr().out)
        assert code == 0 and len(document["cases"]) == 2


class TestImages:
    def pictures(self, folder: Path, count: int = 3, classes: int = 1) -> Path:
        image = pytest.importorskip("PIL.Image")
        for c in range(classes):
            place = folder / f"class{c}" if classes > 1 else folder
            place.mkdir(exist_ok=True)
            for i in range(count):
                array = np.full((8, 12, 3), 10 * i + c, dtype=np.uint8)
                image.fromarray(array).save(place / f"{i}.png")
        return folder

    def test_a_folder(self, tmp_path: Path) -> None:
        found = load(Spec(str(self.pictures(tmp_path)), mean=(0.5,), std=(0.25,)), parse(PICTURE))
        assert len(found) == 1 and found[0]["image"].shape == (3, 3, 4, 6)
        np.testing.assert_allclose(found[0]["image"][1], (10 / 255 - 0.5) / 0.25, rtol=1e-5)
        assert not found.labels

    def test_folders_are_classes(self, tmp_path: Path) -> None:
        found = load(self.pictures(tmp_path, count=10, classes=2), parse(PICTURE))
        assert [len(case["image"]) for case in found] == [BATCH, 4]
        np.testing.assert_array_equal(np.concatenate(found.labels), [0] * 10 + [1] * 10)

    def test_a_preprocessor_configuration(self, tmp_path: Path) -> None:
        config = {"size": {"height": 4, "width": 6}, "image_mean": [0, 0, 0], "image_std": [0.5, 0.5, 0.5]}
        self.pictures(tmp_path)
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
        found = load(tmp_path, parse(PICTURE))
        np.testing.assert_allclose(found[0]["image"][2], 20 / 255 / 0.5, rtol=1e-5)

    def test_channels_last_and_bytes(self, tmp_path: Path) -> None:
        model = parse("g (uint8[1,A,B,3] image) => (uint8[1,A,B,3] y) { y = Identity(image) }")
        found = load(Spec(str(self.pictures(tmp_path)), size=4), model)
        assert [case["image"].shape for case in found] == [(1, 4, 4, 3)] * 3
        assert (found[2]["image"] == 20).all()

    def test_no_size(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match="size of pictures is not known"):
            load(self.pictures(tmp_path), parse(PICTURE.replace("4,6", "A,B")))

    def test_a_broken_picture(self, tmp_path: Path) -> None:
        self.pictures(tmp_path)
        (tmp_path / "1.png").write_bytes(b"no picture")
        with pytest.raises(BadInput, match="the picture cannot be read"):
            load(tmp_path, parse(PICTURE))[0]


class TestFunction:
    def write(self, folder: Path, body: str) -> str:
        path = folder / "mine.py"
        path.write_text(f"import numpy as np\ndef cases():\n{body}")
        return f"{path}:cases"

    def test_cases_and_labels(self, tmp_path: Path) -> None:
        name = self.write(tmp_path, "    for i in range(3):\n        yield {'x': np.full((2, 3), i)*1.0}, [i, i]\n")
        found = load(name, parse(CLASSIFIER))
        assert len(found) == 3 and found[2]["x"].dtype == np.float32 and (found[2]["x"] == 2).all()
        np.testing.assert_array_equal(found.labels[1], [1, 1])

    @pytest.mark.parametrize(
        ("body", "said"),
        [
            ("    raise KeyError('k')\n", "the function that gives the data failed"),
            ("    return [3]\n", "a case must be a mapping"),
            ("    return [{'z': np.zeros((2, 3))}]\n", "the model has no input 'z'"),
            ("    return [{'x': np.zeros((2, 4))}]\n", "size 4 in dimension 1, not 3"),
            ("    return [{'x': np.full((2, 3), np.nan)}]\n", "has NaN"),
            ("    return []\n", "the data holds no samples"),
        ],
    )
    def test_what_does_not_fit(self, tmp_path: Path, body: str, said: str) -> None:
        with pytest.raises(BadInput, match=said):
            load(self.write(tmp_path, body), parse(CLASSIFIER))

    def test_from_python(self) -> None:
        cases: list[Any] = [{"x": np.zeros((2, 3))}]
        assert len(load(cases, parse(CLASSIFIER))) == len(load(lambda: iter(cases), parse(CLASSIFIER))) == 1


class TestLabels:
    def test_they_go_with_the_rows(self, tmp_path: Path) -> None:
        path = tmp_path / "d.npz"
        np.savez(path, x=np.zeros((BATCH + 5, 3), np.float32), labels=np.arange(BATCH + 5))
        found = load(path, parse(CLASSIFIER))
        assert [len(part) for part in found.labels] == [BATCH, 5]
        np.testing.assert_array_equal(np.concatenate(found.labels), np.arange(BATCH + 5))

    def test_they_go_with_the_cases(self, tmp_path: Path) -> None:
        path = tmp_path / "d.npz"
        np.savez(path, x=np.zeros((4, 2, 3), np.float32), labels=np.arange(8).reshape(4, 2))
        np.testing.assert_array_equal(load(path, parse(CLASSIFIER)).labels[3], [6, 7])

    def test_an_input_of_that_name_is_an_input(self, tmp_path: Path) -> None:
        path = tmp_path / "d.npz"
        np.savez(path, labels=np.zeros((4, 3), np.float32))
        found = load(path, parse(CLASSIFIER.replace("x", "labels")))
        assert not found.labels and found[0]["labels"].shape == (4, 3)

    def test_they_do_not_fit(self, tmp_path: Path) -> None:
        path = tmp_path / "d.npz"
        np.savez(path, x=np.zeros((4, 3), np.float32), labels=np.arange(3))
        with pytest.raises(BadInput, match="the labels do not fit"):
            load(path, parse(CLASSIFIER))


class TestSpec:
    def test_options(self) -> None:
        assert Spec.parse("a/b c.txt{window=64 lines=true}") == Spec("a/b c.txt", window=64, lines=True)

    def test_a_misspelt_option(self) -> None:
        with pytest.raises(BadInput, match="did you mean 'window'"):
            Spec.parse("a.txt{windov=3}")
