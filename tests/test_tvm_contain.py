"""Compiling in a process of its own: crashes become errors, nothing stays behind, weights are not copied."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphc import cache, pipeline, runtime
from graphc import model as onnx_model
from graphc.contract import Progress, no_progress
from graphc.errors import BadInput
from graphc.recipe import parse_backend
from graphc.tvm import contain
from graphc.tvm.tune import Budget

DATA = Path(__file__).parent / "data"
SMALL = ir.from_onnx_text('<ir_version: 10, opset_import: ["" : 21]> g (float[2,8] x) => (float[2,8] y) {y = Relu(x)}')


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Put Python code in the place of the worker."""

    def plant(code: str) -> None:
        place = tmp_path / "planted"
        place.mkdir()
        (place / "planted_worker.py").write_text(f"import os, signal, sys\nfrom pathlib import Path\n{code}\n")
        monkeypatch.syspath_prepend(str(place))
        monkeypatch.setattr(contain, "WORKER", "planted_worker")

    return plant


def emit(folder: Path, progress: Progress = no_progress) -> Any:
    folder.mkdir(parents=True)
    return contain.emit(SMALL, folder, "x86-64-v3", 1, ["sm_80"], [], Budget(), progress)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "os.kill(os.getpid(), signal.SIGFPE)",
            r"(?s)crashed \(signal SIGFPE\) while compiling.*FoldConstant.*-t onnx",
        ),
        ("os.kill(os.getpid(), signal.SIGSEGV)", r"(?s)crashed \(signal SIGSEGV\) while compiling"),
        ("os.kill(os.getpid(), signal.SIGKILL)", r"(?s)was killed.*while compiling.*memory"),
        ("sys.exit('no space left')", r"(?s)failed.*no space left"),
    ],
)
def test_a_crash_is_an_error_that_says_where(code: str, message: str, planted: Any, tmp_path: Path) -> None:
    planted(f"Path(sys.argv[1], 'pass').write_text('FoldConstant')\nprint('[\"compiling\", 0, 1]', flush=True)\n{code}")
    with pytest.raises(BadInput, match=message):
        emit(tmp_path / "work" / "out")
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["out"], "temporary files are removed"


def test_a_crash_while_measuring_says_to_leave_tuning_out(planted: Any, tmp_path: Path) -> None:
    planted("print('[\"measuring loops\", 3, 9]', flush=True)\nos.kill(os.getpid(), signal.SIGSEGV)")
    seen: list[tuple[str, int, int]] = []
    with pytest.raises(BadInput, match=r"(?s)while measuring loops.*leave --tune"):
        emit(tmp_path / "work" / "out", lambda *said: seen.append(said))
    assert seen == [("measuring loops", 3, 9)]


def test_loops_that_crash_are_left_out_and_the_rest_goes_on(
    planted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPHC_CACHE_DIR", str(tmp_path / "cache"))
    planted(
        "from graphc import cache\njob = Path(sys.argv[1])\n"
        "if cache.Store().get('f' * 64) is None:\n"
        "    (job / 'measuring').write_text('f' * 64)\n"
        "    print('[\"measuring loops\", 3, 9]', flush=True)\n    os.kill(os.getpid(), signal.SIGSEGV)\n"
        "(job / 'result.json').write_text('{\"device\": \"cpu\"}')"
    )
    assert emit(tmp_path / "work" / "out") == {"device": "cpu"}
    entry = cache.Store().get("f" * 64)
    assert entry is not None and json.loads((entry / "seconds.json").read_text()) == float("inf")


def test_an_interrupt_ends_the_child(planted: Any, tmp_path: Path) -> None:
    planted(
        f"import time\nPath({str(tmp_path)!r}, 'pid').write_text(str(os.getpid()))\nprint('[\"a\", 0, 0]', flush=True)"
    )
    with (tmp_path / "planted" / "planted_worker.py").open("a") as file:
        file.write("time.sleep(600)\n")

    def interrupt(*said: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        emit(tmp_path / "work" / "out", interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["out"]


def test_weights_in_files_stay_there(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[2,64] x) => (float[2,64] y) '
        "{a = MatMul(x, v)\n y = MatMul(a, w)}"
    )
    for number, (name, data) in enumerate({"v": array, "w": array + 1}.items()):
        held = ir.Value(name=name, shape=ir.Shape((64, 64)), type=ir.TensorType(ir.DataType.FLOAT))
        held.const_value = ir.tensor(data, name=name)
        model.graph.initializers[name] = held
        model.graph.node(number).replace_input_with(1, held)
    onnx_model.save(model, tmp_path / "m.onnx", inline_limit=0)
    mapped = onnx_model.load(tmp_path / "m.onnx")
    value = mapped.graph.initializers["w"]
    value.const_value = ir.tensor(array + 2, name="w")
    contain.hand_over(mapped, tmp_path / "job.onnx")
    assert (tmp_path / "job.data").stat().st_size == array.nbytes, "only what is in memory is written"
    assert value.const_value.numpy()[0, 0] == array[0, 0] + 2, "the model is as it was"
    again = ir.from_proto(onnx.load(tmp_path / "job.onnx", load_external_data=False))
    feeds = {"x": array[:2]}
    wanted = feeds["x"] @ array @ (array + 2)
    np.testing.assert_allclose(runtime.session(again, optimise=False).run(feeds)["y"], wanted, rtol=1e-4, atol=1e-4)


# --- what needs TVM --------------------------------------------------------------------------------------------------


def test_what_the_child_refuses_is_what_is_said(tvm: None, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(BadInput, match=r"TVM knows no target 'x86-64-v9'(?s:.*)did you mean"):
        contain.emit(SMALL, tmp_path / "out", "x86-64-v9", 1, ["sm_80"], [], Budget(), no_progress)


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes(tvm: None, tmp_path: Path) -> None:
    """Twice by the default recipe, which writes nothing that the importer does not know."""
    found = []
    for name in ("one", "two"):
        target = parse_backend("tvm", {"shapes": ["batch=1"], "threads": 2, "runtime": False})
        report = pipeline.optimize(
            DATA / "fmnist_vit_tiny.onnx", tmp_path / name, target=target, cache=False, measure=False
        )
        assert not any(each.rolled_back for each in report.passes) and report.rewrite["checked"]
        (recognise,) = (each for each in report.passes if each.name == "recognise")
        assert any(re.search("tvm loads opsets up to 21", refusal.reason) for refusal in recognise.refusals)
        found.append(json.loads((tmp_path / name / "graphc.json").read_text()))
    assert set(found[0]["files"]) >= {"model.so", "weights.bin", "parity.bin", "run.py"}
    assert found[0] == found[1]
    for name in found[0]["files"]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
