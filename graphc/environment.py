"""Which versions of what are installed, and how the rest is."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path


def installed(package: str) -> str:
    """The version of a distribution, or "" if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def versions() -> dict[str, str]:
    """Versions of everything that can change what is emitted."""
    packages = ("graphc", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu")
    return {package: found for package in packages if (found := installed(package))}


def to_install(extra: str) -> str:
    """The command that installs an extra of graphc from where graphc came from; its name on PyPI is another project's.

    Installers write where that was to ``direct_url.json`` (PEP 610), unless it was an index.
    """
    try:
        told = distribution("graphc").read_text("direct_url.json")
    except PackageNotFoundError:
        return f"pip install --editable '{Path(__file__).parents[1]}[{extra}]'"  # it runs from a checkout
    if told is None:
        return f"pip install 'graphc[{extra}]'"
    origin = json.loads(told)
    if origin.get("dir_info", {}).get("editable"):
        return f"pip install --editable '{origin['url'].removeprefix('file://')}[{extra}]'"
    if (control := origin.get("vcs_info")) is not None:
        return f"pip install 'graphc[{extra}] @ {control['vcs']}+{origin['url']}@{control['commit_id']}'"
    return f"pip install 'graphc[{extra}] @ {origin['url']}'"
