"""Which versions of what are installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


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
