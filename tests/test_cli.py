"""The command line as a user meets it: exit codes, messages, files written, nothing heavy imported for help."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graphc.cli import main
from graphc.model import load

DATA = Path(__file__).parent / "data"
RESNET = DATA / "fmnist_resnet.onnx"
FAST = ["--no-measure", "--no-cache", "-q"]


def graphc(*arguments: object, **more: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "graphc", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **more)  # type: ignore[call-overload,no-any-return]


def test_optimize_writes_beside_the_input_and_reports(tmp_path: Path) -> None:
    model = tmp_path / "m.onnx"
    model.write_bytes(RESNET.read_bytes())
    done = graphc("optimize", model, "--no-cache")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "m.opt.onnx").exists() and model.read_bytes() == RESNET.read_bytes()
    assert "checked" in done.stdout and "latency" in done.stdout and "m.opt.onnx" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines() if not line.startswith("written")) <= 80


def test_an_artifact_folder_runs_with_its_own_script(tmp_path: Path) -> None:
    assert main(["optimize", str(RESNET), "-o", str(tmp_path / "art"), *FAST]) == 0
    assert {p.name for p in (tmp_path / "art").iterdir()} == {"model.onnx", "graphc.json", "report.json", "run.py"}
    manifest = json.loads((tmp_path / "art/graphc.json").read_text())
    assert manifest["inputs"][0]["name"] == "image" and manifest["recipe"]
    ran = subprocess.run(
        [sys.executable, tmp_path / "art/run.py"], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0 and "logits float32 (1, 10)" in ran.stdout, ran.stderr
    assert main(["optimize", str(RESNET), "-o", str(tmp_path / "art"), *FAST]) == 0, "an artifact is replaced"
    assert main(["verify", str(RESNET), str(tmp_path / "art")]) == 0


def test_the_same_input_and_timing_table_give_the_same_bytes(tmp_path: Path) -> None:
    command = ["optimize", str(DATA / "fmnist_vit_tiny.onnx"), *FAST, "--timings", str(tmp_path / "timings.json"), "-o"]
    for name in ("a", "b"):
        assert main([*command, str(tmp_path / name / "m.onnx")]) == 2
        (tmp_path / name).mkdir()
        assert main([*command, str(tmp_path / name / "m.onnx")]) == 0
        assert main([*command, str(tmp_path / name / "art")]) == 0
    for file in ("m.onnx", "art/model.onnx", "art/graphc.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_json_is_the_report(tmp_path: Path) -> None:
    done = graphc("optimize", RESNET, "-o", tmp_path / "o.onnx", "--json", "--no-cache")
    report = json.loads(done.stdout)
    assert report["schema"] == "graphc-report/1" and report["rewrite"]["ok"]
    assert report["measurements"]["latency"]["ratio"] > 0


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    depfile = tmp_path / "o.d"
    done = graphc("optimize", RESNET, "-o", tmp_path / "o.onnx", "--dry-run", "--depfile", depfile, "--no-cache")
    assert done.returncode == 0 and "dry run" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_why_gives_reasons_and_the_depfile_names_every_input(tmp_path: Path) -> None:
    recipe = tmp_path / "my recipe.toml"
    recipe.write_text("[[pass]]\nname = 'simplify'\n[[pass]]\nname = 'fuse'\n")
    out, dep = tmp_path / "o.onnx", tmp_path / "o.d"
    done = graphc("optimize", DATA / "tiny_mixtral_bytes.onnx", "-o", out, "-r", recipe, "--depfile", dep, "--why")
    assert done.returncode == 0, done.stderr
    assert "why it did not apply" in done.stdout
    text = dep.read_text()
    assert text.startswith(f"{out}:") and "tiny_mixtral_bytes.onnx" in text and "my\\ recipe.toml" in text


def test_verify_tells_same_from_different(tmp_path: Path) -> None:
    model = load(RESNET)
    weight = next(v for v in model.graph.initializers.values() if v.const_value.size > 1000)
    array = np.array(weight.const_value.numpy())
    array.flat[7] += 0.1
    weight.const_value = ir.tensor(array, name=weight.name)
    from graphc.model import save

    save(model, tmp_path / "changed.onnx")
    same, different = graphc("verify", RESNET, RESNET), graphc("verify", RESNET, tmp_path / "changed.onnx", "--json")
    assert same.returncode == 0 and "same" in same.stdout
    assert different.returncode == 1 and not json.loads(different.stdout)["ok"]


def test_bench_compares_interleaved() -> None:
    done = graphc("bench", RESNET, RESNET, "--seconds", "0.2", "--json")
    rows = json.loads(done.stdout)["models"]
    assert len(rows) == 2 and rows[0]["ratio"] == 1.0 and 0.2 < rows[1]["ratio"] < 5
    assert all(r["memory"] > 10**7 for r in rows)
    assert "ratio" in graphc("bench", RESNET, "--seconds", "0.1").stdout


def test_inspect_shows_what_is_in_a_model() -> None:
    done = graphc("inspect", RESNET)
    assert done.returncode == 0 and max(map(len, done.stdout.splitlines())) <= 80
    for word in ("Conv", "batch", "logits", "FLOPs", "opset"):
        assert word in done.stdout
    found = json.loads(graphc("inspect", RESNET, "--json").stdout)
    conv = next(o for o in found["operators"] if o["operator"] == "Conv")
    # Counted by hand: outputs x kernel x channels of the stem and of the three stages, two per multiply-accumulate.
    macs = 196 * (9 * 32 + 2 * 9 * 32 * 32) + 49 * (9 * 32 * 64 + 9 * 64 * 64 + 32 * 64)
    macs += 16 * (9 * 64 * 128 + 9 * 128 * 128 + 64 * 128)
    assert conv["flops"] == 2 * macs


@pytest.mark.parametrize("name", ["", "passes", "rules", "backends", "recipes", "simplify", "onnxruntime", "default"])
def test_list_documents_everything(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    what = [name] if name else []
    assert main(["list", *what]) == 0
    assert main(["list", *what, "--json"]) == 0
    assert len(capsys.readouterr().out) > 100


def test_doctor_says_what_runs_here() -> None:
    done = graphc("doctor")
    assert done.returncode == 0 and "CPUExecutionProvider" in done.stdout and "onnx-ir" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["optimize", "missing.onnx"], "missing.onnx"),
        (["optimize", str(RESNET), "-p", "simplfy"], "did you mean 'simplify'?"),
        (["optimize", str(RESNET), "-p", "fuse{onyl=conv-bn}"], "did you mean 'only'?"),
        (["optimize", str(RESNET), "-r", "nothing.toml"], "nothing.toml"),
        (["optimize", str(RESNET), "-t", "onnxrt"], "did you mean 'onnxruntime'?"),
        (["optimize", str(RESNET), "--max-drop", "eror=1"], "did you mean 'error'?"),
        (["optimize", str(RESNET), "--max-size", "big"], "10MB or 0.5x"),
        (["optimize", str(RESNET), "--data", "none.npz"], "none.npz"),
        (["optimize", str(RESNET), "-o", str(RESNET)], "the output is the input"),
        (["optimize", str(RESNET), "-o", "no/such/folder/o.onnx"], "folder"),
        (["optimize", str(RESNET), "-o", "o.onnx", "--report", "no/r.json"], "no/r.json"),
        (["optimize", str(RESNET), "-o", "o.onnx", "--depfile", "no/o.d"], "no/o.d"),
        (["optimize", str(RESNET), "--stop-after", "prune"], "no pass 'prune'"),
        (["list", "simplyfi"], "did you mean 'simplify'?"),
        (["verify", str(RESNET), "missing.onnx"], "missing.onnx"),
        (["bench", "missing.onnx"], "missing.onnx"),
        (["inspect", "missing.onnx"], "missing.onnx"),
    ],
)
def test_bad_input_is_explained_and_exits_with_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = RESNET.read_bytes()
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("graphc: error: ") and says in message and "Traceback" not in message
    assert list(tmp_path.iterdir()) == [] and RESNET.read_bytes() == before


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    # Python itself ends with a traceback while it starts: the signal is sent once the command runs.
    code = "import sys; from graphc.cli import main; print('ready', flush=True); sys.exit(main())"
    command = [sys.executable, "-c", code, "optimize", DATA / "tiny_mixtral_bytes.onnx", "-o", tmp_path / "o.onnx"]
    child = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    time.sleep(1.2)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=120)
    assert child.returncode in (0, 2) and "Traceback" not in err
    if child.returncode == 2:
        assert "interrupted" in err and list(tmp_path.iterdir()) == []


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    code = "import sys; from graphc.cli import main\n"
    code += "try: main(['--help'])\nexcept SystemExit: pass\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    modules = set(done.stdout.rsplit("\n", 2)[-2].split())
    assert not modules & {"numpy", "onnx", "onnx_ir", "onnxruntime", "rich", "torch", "networkx"}


def test_a_mask_is_a_dependency_of_the_output_and_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.numpy import save_file

    monkeypatch.setenv("GRAPHC_CACHE_DIR", str(tmp_path / "cache"))
    mask, out, dep = tmp_path / "mask.safetensors", tmp_path / "o.onnx", tmp_path / "o.d"
    kept = []
    for dead in (8, 16):
        save_file({"layers.0.c1.weight:0": np.arange(32) >= dead}, mask)
        arguments = ["-p", f'prune{{mask="{mask}"}},shrink', "--depfile", str(dep), "--no-measure", "-q"]
        assert main(["optimize", str(RESNET), "-o", str(out), *arguments]) == 0
        kept.append(load(out).graph.initializers["layers.0.c1.weight"].const_value.shape[0])
    assert kept == [24, 16]
    assert str(mask) in dep.read_text()
