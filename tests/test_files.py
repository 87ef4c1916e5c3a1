"""Output appears at once or not at all."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graphc import model as models
from graphc.errors import BadInput
from graphc.storage import files

NO_TMPFILE = "file systems without unnamed files"


@pytest.fixture(params=["unnamed", "named"])
def temporary_kind(request, monkeypatch) -> str:
    """Both ways to write a file: without a name, and, on old or foreign file systems, under a hidden one."""
    if request.param == "named":
        opened = os.open

        def without_tmpfile(path, flags, *args, **kwargs):
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, NO_TMPFILE)
            return opened(path, flags, *args, **kwargs)

        monkeypatch.setattr(os, "open", without_tmpfile)
    return request.param


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def artifact(folder: Path, *written: str) -> None:
    folder.mkdir()
    for name in written:
        (folder / name).write_text("old")
    (folder / files.MANIFEST).write_text(json.dumps({"files": dict.fromkeys(written, "")}))


def test_a_file_appears_when_it_is_complete(tmp_path, temporary_kind) -> None:
    path = tmp_path / "out"
    with files.file(path) as out:
        out.write(b"new")
        out.flush()
        assert not path.exists()
    assert path.read_bytes() == b"new"
    with files.file(path) as out:
        out.write(b"newer")
        assert path.read_bytes() == b"new"
    assert path.read_bytes() == b"newer"
    assert names(tmp_path) == ["out"]


def test_an_error_leaves_what_was_there(tmp_path, temporary_kind) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), files.file(path) as out:
            out.write(b"new")
            raise error
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["out"]


def test_permissions_follow_the_umask(tmp_path, temporary_kind) -> None:
    before = os.umask(0o027)
    try:
        files.write(tmp_path / "out", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_read_only_disk(tmp_path, monkeypatch, number) -> None:
    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(number, os.strerror(number))

    with pytest.raises(BadInput, match="cannot write the output") as caught, files.file(tmp_path / "out"):
        Full().write(b"x")
    assert os.strerror(number) in caught.value.why
    assert names(tmp_path) == []


def test_an_error_in_staging_names_the_destination(tmp_path) -> None:
    with pytest.raises(BadInput) as caught, files.folder(tmp_path / "out") as staging:
        files.write(staging / "missing" / "file", "x")
    assert caught.value.where == str(tmp_path / "out")
    with pytest.raises(BadInput) as caught, files.folder(tmp_path / "out"):
        raise BadInput("something else", where="node 'a'")
    assert caught.value.where == "node 'a'"


def test_a_limit_on_the_file_size(tmp_path) -> None:
    """The kernel itself refuses the write, in the middle of a large file."""
    code = """
import resource, sys
from pathlib import Path
from graphc.storage import files
from graphc.errors import BadInput
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    files.write(Path(sys.argv[1]), bytes(2 << 20))
except BadInput as error:
    print(error.why)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == os.strerror(errno.EFBIG)
    assert names(tmp_path) == []


def test_destinations_that_cannot_be(tmp_path) -> None:
    source = tmp_path / "in.onnx"
    source.write_text("model")
    (tmp_path / "link.onnx").symlink_to(source)
    cases = {
        tmp_path / "missing" / "out.onnx": "does not exist",
        tmp_path: "is a folder",
        Path("/dev/null"): "device",
        source: "output is the input",
        tmp_path / "link.onnx": "output is the input",
    }
    for destination, message in cases.items():
        with pytest.raises(BadInput, match=message):
            files.check_destination(destination, (source,))
    assert source.read_text() == "model"


def test_a_folder_appears_when_it_is_complete(tmp_path) -> None:
    destination = tmp_path / "out"
    with files.folder(destination) as staging:
        (staging / "model.onnx").write_text("1")
        (staging / files.MANIFEST).write_text('{"files": {"model.onnx": ""}}')
        assert not destination.exists()
    assert names(destination) == [files.MANIFEST, "model.onnx"]
    with files.folder(destination) as staging:
        (staging / "other").write_text("2")
        assert (destination / "model.onnx").read_text() == "1"
    assert names(destination) == ["other"]
    assert names(tmp_path) == ["out"]


def test_a_folder_without_exchange(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *a, **k: object())
    artifact(tmp_path / "out", "a")
    with files.folder(tmp_path / "out") as staging:
        (staging / "b").write_text("new")
    assert names(tmp_path / "out") == ["b"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_folder(tmp_path, error) -> None:
    artifact(tmp_path / "out", "a")
    with pytest.raises(error), files.folder(tmp_path / "out") as staging:
        (staging / "b").write_text("new")
        raise error
    assert names(tmp_path / "out") == ["a", files.MANIFEST]
    assert names(tmp_path) == ["out"]


def test_folders_that_hold_something_else_are_not_replaced(tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    artifact(tmp_path / "mixed", "model.onnx")
    (tmp_path / "mixed" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    for name, message in (("mine", "thesis.tex"), ("mixed", "notes.txt"), ("file", "a file or a link")):
        with pytest.raises(BadInput, match=message), files.folder(tmp_path / name):
            pass
    assert names(tmp_path / "mine") == ["thesis.tex"]
    with files.folder(tmp_path / "mine" / "new"):  # an empty folder beside foreign files is fine
        pass


def test_what_killed_processes_left_is_removed_and_what_is_in_use_is_not(tmp_path) -> None:
    dead = tmp_path / f".out.0123{files._SUFFIX}"
    dead.mkdir()
    (dead / "part").write_text("x")
    (tmp_path / f".out.4567{files._SUFFIX}").write_text("x")
    with files.staging(tmp_path / "out") as ours:
        (ours / "part").write_text("in use")
        with files.staging(tmp_path / "other"):
            assert ours.is_dir()
        assert (ours / "part").read_text() == "in use"
        assert not dead.exists()
    assert names(tmp_path) == []


def test_writers_of_one_folder_take_turns(tmp_path) -> None:
    order: list[str] = []

    def other() -> None:
        with files.exclusive(tmp_path):
            order.append("other")

    with files.exclusive(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "other"]


def build(number: int) -> ir.Model:
    weight = ir.tensor(np.full((300, 400), number, np.float32), name="w")
    value = ir.Value(name="w", shape=weight.shape, type=ir.TensorType(ir.DataType.FLOAT), const_value=weight)
    x = ir.Value(name="x", shape=ir.Shape([300, 400]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Add", [x, value])
    node.outputs[0].name, node.outputs[0].type = "y", x.type
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[value], opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


def write_forever(kind: str, folder: Path) -> None:
    """Replace one output by another one, again and again."""
    both = [build(1), build(2)]
    while True:
        for each in both:
            if kind == "folder":
                with files.folder(folder / "out") as staging:
                    models.save(each, staging / "model.onnx", inline_limit=1000)
                    written = {p.name: "" for p in staging.iterdir()}
                    (staging / files.MANIFEST).write_text(json.dumps({"files": written}))
            else:
                limit = 1000 if kind == "data" else models.INLINE_LIMIT
                models.save(each, folder / "out.onnx", inline_limit=limit)


@pytest.mark.parametrize("kind", ["inline", "data", "folder"])
def test_kill_at_any_moment_leaves_a_whole_output(tmp_path, kind) -> None:
    rng = random.Random(0)
    allowed = {models.content_hash(build(1)), models.content_hash(build(2))}
    found = set()
    target = tmp_path / "out" / "model.onnx" if kind == "folder" else tmp_path / "out.onnx"
    for _ in range(25):
        writer = os.fork()
        if not writer:
            write_forever(kind, tmp_path)
        time.sleep(rng.uniform(0.0, 0.05))
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        if target.exists():
            found.add(models.content_hash(models.load(target)))
    assert found <= allowed
    assert found

    # The next run removes whatever the killed ones left.
    if kind == "folder":
        with files.folder(tmp_path / "out"):
            pass
        assert names(tmp_path) == ["out"]
    else:
        models.save(build(3), target)
        assert names(tmp_path) == ["out.onnx"]


def test_parallel_writers_of_one_output(tmp_path) -> None:
    """Whoever comes last wins; nobody removes the data of the other's model."""
    writers = []
    for _ in range(3):
        writer = os.fork()
        if not writer:
            write_forever("data", tmp_path)
        writers.append(writer)
    allowed = {models.content_hash(build(1)), models.content_hash(build(2))}
    while not (tmp_path / "out.onnx").exists():
        time.sleep(0.01)
    time.sleep(0.5)
    for writer in writers:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
    assert models.content_hash(models.load(tmp_path / "out.onnx")) in allowed
