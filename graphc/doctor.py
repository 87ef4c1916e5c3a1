"""What is installed, what runs where, and what to install for the rest."""

from __future__ import annotations

from typing import Any

from graphc.environment import installed, to_install
from graphc.errors import GraphcError

PURPOSE = {
    "graphc": "this compiler",
    "onnx": "schemas and opset conversion",
    "onnx-ir": "the graph in memory",
    "numpy": "tensors",
    "onnxruntime": "checks and measures [cpu]",
    "onnxruntime-gpu": "the same with CUDA [gpu]",
    "torch": "PyTorch models [torch]",
    "onnxscript": "export of PyTorch models [torch]",
    "transformers": "Hugging Face folders [hf]",
    "apache-tvm": "TVM artifacts [tvm]",
    "apache-tvm-ffi": "runs TVM artifacts [tvm]",
}
"""What each package is for, in the order shown; in brackets, the extra of graphc that brings it."""


def examine() -> dict[str, Any]:
    """Everything ``graphc doctor`` shows, as plain data."""
    packages = [{"name": n, "version": installed(n), "purpose": purpose} for n, purpose in PURPOSE.items()]
    providers: list[dict[str, Any]] = []
    limits: dict[str, int] = {}
    advice = []
    try:
        from graphc import runtime

        runtime.require()
        found = runtime.capabilities()
        limits = {"ir": found.max_ir, "opset": found.max_opset[""]}
        providers = _providers(found.providers)
    except GraphcError as error:
        advice.append(f"{error.hint} ({error.what})")
    if installed("apache-tvm"):
        from graphc.tvm import install

        try:
            install.versions()
            install.compiler()
        except GraphcError as error:
            advice.append(f"{error.hint} ({error.what})")
    return {
        "schema": "graphc-doctor/1",
        "packages": packages,
        "extras": to_install("EXTRA"),
        "providers": providers,
        "limits": limits,
        "advice": advice,
    }


def _providers(started: tuple[str, ...]) -> list[dict[str, Any]]:
    import onnxruntime

    return [
        {
            "name": name,
            "runs": name in started,
            "why": "" if name in started else "offered by the wheel, but its libraries or its device are missing",
        }
        for name in onnxruntime.get_available_providers()
    ]
