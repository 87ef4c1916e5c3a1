"""The examples and every command in the documentation work as they stand."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from graphc import cli

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "Makefile",
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with external data, so that the depfile has something to say that the build file does not."""
    path = tmp_path / "source" / "model.onnx"
    path.parent.mkdir()
    proto = onnx.load(ROOT / "tests" / "data" / "fmnist_resnet.onnx")
    onnx.save(proto, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    return path


def run(*command: str | Path, **env: str) -> str:
    done = subprocess.run(
        list(map(str, command)),
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_rebuilds(build: list[str | Path], output: Path, model: Path) -> None:
    """``build`` makes ``output``, then does nothing, then makes it again when a file of the model changes."""
    run(*build)
    assert onnx.load(output).graph.node
    for source in (None, model, model.with_name("model.onnx.data")):
        before = output.stat().st_mtime_ns
        if source is not None:
            source.touch()
        run(*build)
        assert (output.stat().st_mtime_ns != before) == (source is not None), f"after touching {source}"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_example_builds_once_and_again_when_the_model_changes(tmp_path: Path, model: Path) -> None:
    example = shutil.copytree(EXAMPLES / "make", tmp_path / "make")
    build = ["make", "-C", example, f"MODEL={model}", f"GRAPHC={shlex.quote(sys.executable)} -m graphc"]
    check_rebuilds(build, example / "build" / "model.opt.onnx", model)
    run(*build, "--question")


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
@pytest.mark.parametrize(("generator", "tool"), [("Ninja", "ninja"), ("Unix Makefiles", "make")])
def test_cmake_example_builds_once_and_again_when_the_model_changes(
    tmp_path: Path, model: Path, generator: str, tool: str
) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    build = tmp_path / "build"
    run(
        *("cmake", "-S", EXAMPLES / "cmake", "-B", build, "-G", generator),
        *(f"-DMODEL={model}", f"-DPython3_EXECUTABLE={sys.executable}"),
    )
    check_rebuilds(["cmake", "--build", build], build / "model.opt.onnx", model)


def test_python_example_optimises_and_verifies(tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    shown = run(sys.executable, EXAMPLES / "python" / "optimize.py", EXAMPLES / "models" / "ppocr_cls.onnx", output)
    assert "outputs equal: True" in shown
    assert len(onnx.load(output).graph.node) < len(onnx.load(EXAMPLES / "models" / "ppocr_cls.onnx").graph.node)


def commands() -> list[tuple[str, str]]:
    """Every ``graphc`` command line in documentation, examples and the Makefile, with its file."""
    found = []
    files = [*PAGES, *(path for path in EXAMPLES.rglob("*") if path.suffix in (".yml", ".txt", ".md"))]
    for path in files:
        if path.exists():
            lines = re.findall(
                r"(?:^|`|\s|/)graphc ((?:optimize|inspect|verify|bench|list|doctor)\b[^`#\n]*)",
                path.read_text(),
            )
            found += [(path.relative_to(ROOT).as_posix(), line.strip()) for line in lines]
    return sorted(set(found))


@pytest.mark.parametrize(("page", "command"), commands())
def test_commands_shown_are_accepted(page: str, command: str) -> None:
    """Flags and subcommands that the documentation shows exist; the files they name need not."""
    arguments = [word for word in shlex.split(command.replace("...", "")) if word not in ("|", "&&")]
    if "--help" not in arguments:
        cli._parser().parse_args(arguments)


@pytest.mark.parametrize("page", [p.relative_to(ROOT).as_posix() for p in PAGES if p.suffix == ".md"])
def test_links_between_pages_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text())
    missing = [target for target in targets if not ((ROOT / page).parent / target).exists()]
    assert missing == []
