"""What is installed is whole, light to start, and says nothing of the machine it was built on."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ["numpy", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "networkx", "rich", "sympy", "torch"]
PLUGINS = sorted(
    f"graphc/{path.relative_to(ROOT).as_posix()}"
    for kind in ("passes", "backends")
    for path in (ROOT / kind).rglob("*.py")
)


def python(code: str, *, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist."""
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", folder], cwd=ROOT, check=True, capture_output=True
    )
    return folder


def test_wheel_has_passes_backends_and_recipes(distributions: Path) -> None:
    names = zipfile.ZipFile(next(distributions.glob("*.whl"))).namelist()
    assert [name for name in names if name.startswith(("graphc/passes/", "graphc/backends/"))] == PLUGINS
    assert {"graphc/py.typed", "graphc/recipes/default.toml", "graphc/axes/__init__.py"} <= set(names)
    assert {PurePosixPath(name).parts[0].partition("-")[0] for name in names} == {"graphc"}


def test_sdist_has_what_builds_and_tests_it(distributions: Path) -> None:
    with tarfile.open(next(distributions.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        *PLUGINS,
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "Makefile",
    }
    assert wanted <= names
    assert {name.partition("/")[0] for name in names} >= {"graphc", "tests", "bench", "examples", "docs"}


def test_the_wheel_alone_finds_its_passes_and_backends(distributions: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(next(distributions.glob("*.whl"))).extractall(tmp_path)
    code = (
        "import json, graphc; from graphc import registry\n"
        "found = {kind: registry.names(kind) for kind in ('passes', 'backends')}\n"
        "[registry.pass_class(name) for name in found['passes']]\n"
        "print(json.dumps([graphc.__file__, found]))"
    )
    where, found = json.loads(python(code, cwd=tmp_path, PYTHONPATH=str(tmp_path)))
    assert Path(where).is_relative_to(tmp_path)
    assert {"simplify", "fuse"} <= set(found["passes"])
    assert "onnxruntime" in found["backends"]


def test_help_is_instant_and_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import contextlib, io, sys; from graphc.cli import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "    main(['--help'])\n"
        f"assert 'optimize' in out.getvalue(); print([name for name in {HEAVY} if name in sys.modules])"
    )
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert python(code, cwd=tmp_path).strip() == "[]"
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.3


def test_folders_beside_the_package_are_never_imported_under_their_own_name() -> None:
    """From the checkout ``import passes`` would work, and make a second copy of every class."""
    code = (
        "import sys; from graphc import registry\n"
        "[registry.pass_class(name) for name in registry.names('passes')]\n"
        "[registry.backend_class(name) for name in registry.names('backends')]\n"
        "print([name for name in sys.modules if name.partition('.')[0] in ('passes', 'backends')])"
    )
    assert python(code, cwd=ROOT).strip() == "[]"


LOCAL = re.compile(r"(?<![\w.$:}>)/-])/(?:home|root|Users|work|workspaces?|tmp)/[\w.]")
TEXT = {".py", ".md", ".toml", ".json", ".txt", ".yml", ".cfg", ".html", ".svg", ".tsv", ""}


def test_committed_files_name_no_path_of_a_machine() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    hits = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in files
        if path.suffix in TEXT and path.is_file()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if str(ROOT) in line or (LOCAL.search(line) and "tests" not in path.relative_to(ROOT).parts)
    ]
    assert hits == []


def test_tables_are_what_the_committed_results_say() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "tables.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
