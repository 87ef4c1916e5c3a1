"""Torch modules named on the command line, and ``.pt2`` files, of which nothing is run."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from torch import nn  # noqa: E402

import graphc  # noqa: E402
from graphc.cli import main  # noqa: E402
from graphc.errors import BadInput  # noqa: E402
from graphc.export import examples, pt2  # noqa: E402

NET = """\
import torch
from torch import nn
from .blocks import Block


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x):
        return {"y": self.blocks(x)}


class Sized(Net):
    def __init__(self, width):
        super().__init__()


class Bad(Net):
    def forward(self, x):
        return x.tolist()[0]


def ready():
    torch.manual_seed(0)
    return Net(), torch.randn(2, 8)


def broken():
    raise RuntimeError("no such weights")


number = 3
"""
BLOCKS = """\
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(self.up(x).relu())
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"nets_{tmp_path.name}"
    (tmp_path / name).mkdir()
    for file, text in (("__init__", ""), ("net", NET), ("blocks", BLOCKS)):
        (tmp_path / name / f"{file}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRAPHC_CACHE_DIR", str(tmp_path / "cache"))
    return f"{name}.net"


def test_a_factory_is_optimised_with_its_files_as_dependencies(package: str, tmp_path: Path) -> None:
    folder = tmp_path / package.partition(".")[0]
    code = main(["optimize", f"{package}:ready", "--depfile", "d", "--report", "r.json", "-q", "--no-measure"])
    assert code == 0
    depends = (tmp_path / "d").read_text()
    assert depends.split() == ["ready.opt.onnx:", "\\"] + [
        word
        for i, f in enumerate(("__init__", "blocks", "net"))
        for word in ([str(folder / f"{f}.py")] + ["\\"] * (i < 2))
    ]
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["notes"][0] == "exported with torch.export; dynamic: batch"
    assert report["notes"][1].startswith("the same as the module on")
    assert len(report["input"]["sha256"]) == 64
    loaded = graphc.load(tmp_path / "ready.opt.onnx").original
    assert "blocks.1.down.weight" in loaded.graph.initializers
    assert [v.name for v in loaded.graph.outputs] == ["y"]
    # Other weights are another input, although the code is the same.
    assert main(["optimize", f"{package}:Net", "--inputs", "x=float32[1,8]", "--report", "n.json", "-q"]) == 0
    assert json.loads((tmp_path / "n.json").read_text())["input"]["sha256"] != report["input"]["sha256"]


@pytest.mark.parametrize(
    ("name", "more", "says"),
    [
        ("Net", [], "a module needs example inputs"),
        ("Nett", [], "did you mean 'Net'"),
        ("Sized", [], "needs arguments: width"),
        ("number", [], "gives no torch module but int"),
        ("broken", [], "RuntimeError: no such weights"),
        ("Net", ["--inputs", "x=float32[1,9]"], "blocks.0.up (Linear)"),
        ("Net", ["--inputs", "y=float32[1,8]"], "there is: x"),
        ("Net", ["--inputs", "x=float31[1,8]"], "did you mean 'float32'"),
        ("Net", ["--inputs", "none.npz"], "there is no such file"),
        ("Net", ["--inputs", "x"], "cannot read 'x' in --inputs"),
        ("ready", ["--dynamic", "x=0"], "cannot read 'x=0' in --dynamic"),
    ],
)
def test_what_cannot_be_used(package: str, name: str, more: list[str], says: str, capsys: Any) -> None:
    assert main(["optimize", f"{package}:{name}", *more]) == 2
    shown = capsys.readouterr().err
    assert says in shown and "Traceback" not in shown


def test_a_module_that_is_not_there(package: str, capsys: Any) -> None:
    assert main(["inspect", f"{package}s:Net"]) == 2
    assert f"did you mean '{package}'" in capsys.readouterr().err
    assert main(["inspect", "no_such_module:Net"]) == 2
    assert "there is no Python module 'no_such_module'" in capsys.readouterr().err


@pytest.mark.slow
def test_other_commands_take_modules(package: str, capsys: Any) -> None:
    assert main(["inspect", f"{package}:ready"]) == 0
    assert main(["inspect", f"{package}:ready", "--groups"]) == 0
    assert "blocks.0.up.weight:0" in capsys.readouterr().out
    assert main(["optimize", f"{package}:ready", "-o", "a.onnx", "-q"]) == 0
    assert main(["verify", f"{package}:ready", "a.onnx"]) == 0
    assert main(["bench", f"{package}:ready", "a.onnx", "--seconds", "0.2"]) == 0


def test_inputs_as_text_and_file(tmp_path: Path) -> None:
    made = examples.read("ids=int64[2,3]<7 x=float16[4] m=bool[3] n=3 f=-0.5 t=true z=none s=float32[]")
    assert made["ids"].shape == (2, 3) and made["ids"].dtype == torch.int64 and int(made["ids"].max()) < 7
    assert made["x"].dtype == torch.float16 and made["m"].dtype == torch.bool and made["s"].dim() == 0
    assert (made["n"], made["f"], made["t"], made["z"]) == (3, -0.5, True, None)
    again = examples.read("ids=int64[2,3]<7")
    assert torch.equal(again["ids"], made["ids"])
    np.savez(tmp_path / "i.npz", x=np.ones((2, 3)))
    assert examples.read(str(tmp_path / "i.npz"))["x"].shape == (2, 3)
    assert examples.axes("x:0=batch,-1 y:1=len") == {"x": {0: "batch", -1: ""}, "y": {1: "len"}}
    assert examples.axes("none") is None


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Any) -> Any:
        return self.head(self.body(self.embed(ids)).relu())


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "tied.pt2"
    auto = torch.export.Dim.AUTO
    example = (torch.zeros(2, 5, dtype=torch.int64),)
    program = torch.export.export(Tied().eval(), example, dynamic_shapes=({0: auto, 1: auto},))
    torch.export.save(program, path)
    return path


def test_a_program_is_read_with_names_ties_and_sizes(stored: Path) -> None:
    source = graphc.load(stored)
    graph = source.original.graph
    assert source.depends == (stored,)
    assert source.notes[-1].startswith("the same as the module on 5 inputs")
    assert set(graph.initializers) >= {"embed.weight", "body.weight", "body.bias"}
    assert "head.weight" not in graph.initializers
    assert [str(d) for d in graph.inputs[0].shape or ()] == ["batch", "sequence"]


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def _document(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    def changed(data: bytes) -> bytes:
        document = json.loads(data)
        change(document)
        return json.dumps(document).encode()

    return changed


def _call(document: dict[str, Any]) -> None:
    document["graph_module"]["graph"]["nodes"][0]["target"] = "torch.os.system"


def _factory(document: dict[str, Any]) -> None:
    signature = document["graph_module"]["module_call_graph"][0]["signature"]
    signature["in_spec"] = signature["in_spec"].replace("builtins.tuple", "collections.defaultdict")


def _enumeration(document: dict[str, Any]) -> None:
    signature = document["graph_module"]["module_call_graph"][0]["signature"]
    signature["in_spec"] = signature["in_spec"].replace('"null"', '"{\\"__enum__\\": true}"', 1) + " __enum__"


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("model.json", _document(_call), "'torch.os.system', which is no operator"),
        (
            "model.json",
            lambda d: d.replace(b"Symbol('s", b"__import__('os').system('touch ran')+Symbol('s"),
            "no expression",
        ),
        ("model.json", lambda d: d.replace(b"Symbol('s", b"Symbol.__class__('s"), "no expression"),
        ("model.json", _document(_factory), "of the type collections.defaultdict"),
        ("model.json", _document(_enumeration), "keyed by an enumeration"),
        ("sample_inputs/model.pt", None, "pickled objects that are no tensors"),
    ],
)
def test_nothing_in_a_program_is_run(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, change: Any, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / "bad.pt2"
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(bad, "w") as target:
        for item in source.infolist():
            data = source.read(item)
            if item.filename.endswith(part):
                before, data = data, change(data) if change else _pickled()
                assert data != before
            target.writestr(item, data)
    with pytest.raises(BadInput) as caught:
        pt2.load(bad)
    assert says in str(caught.value)
    assert not (tmp_path / "ran").exists()


def _pickled() -> bytes:
    buffer = io.BytesIO()
    torch.save((Evil("touch ran"),), buffer)
    return buffer.getvalue()


def test_guards_of_a_program_are_not_run(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / "guards.pt2"

    def change(document: dict[str, Any]) -> None:
        document["guards_code"] = ["__import__('os').system('touch ran') == 0"]

    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(bad, "w") as target:
        for item in source.infolist():
            data = source.read(item)
            target.writestr(item, _document(change)(data) if item.filename.endswith("model.json") else data)
    program = pt2.load(bad)
    program.module(check_guards=True)(torch.zeros(2, 3, dtype=torch.int64))
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_program(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "weights.pt2")
    with pytest.raises(BadInput, match="a checkpoint, not an exported program"):
        graphc.load(tmp_path / "weights.pt2")
    (tmp_path / "junk.pt2").write_bytes(b"junk")
    with pytest.raises(BadInput, match="cannot read the exported program"):
        graphc.load(tmp_path / "junk.pt2")
    with pytest.raises(BadInput, match="there is no such file"):
        graphc.load(tmp_path / "none.pt2")
