"""What the installed ONNX Runtime can do, found by asking it and by loading tiny models."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from graphc import runtime
from graphc.contract import Capabilities

_INTERNAL = ("com.microsoft.nchwc", "com.ms.internal")


def ask(*, isolated: bool) -> Capabilities:
    """Ask for the highest versions, the kernels and the providers that start; it takes some milliseconds.

    Args:
        isolated: Ask in a process of its own: without its CUDA libraries the gpu wheel can crash on these questions.
    """
    answer = _in_child() if isolated else _answer()
    return Capabilities(
        name="onnxruntime",
        max_ir=answer["max_ir"],
        max_opset=answer["max_opset"],
        kernels=frozenset((domain, name, provider) for domain, name, provider in answer["kernels"]),
        providers=tuple(answer["providers"]),
    )


def _answer() -> dict[str, Any]:
    import onnx
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    schemas: dict[str, int] = {}
    for schema in state.get_all_operator_schema():
        schemas[schema.domain] = max(schemas.get(schema.domain, 0), schema.since_version)
    # Schemas of unfinished opsets exist but do not load, and domains count on without new schemas.
    above = int(onnx.defs.onnx_opset_version()) + 2
    opsets = {
        domain: _highest(_accepts_opset(domain), max(version, above if not domain else version + 2))
        for domain, version in sorted(schemas.items())
        if not domain.startswith(_INTERNAL)
    }
    kernels = {("" if k.domain == "ai.onnx" else k.domain, k.op_name, k.provider) for k in state.get_all_opkernel_def()}
    return {
        "max_ir": _highest(lambda version: _loads(_identity(version, {"": 1})), int(onnx.IR_VERSION) + 2),
        "max_opset": opsets,
        "kernels": sorted(kernels),
        "providers": [provider for provider in ort.get_available_providers() if _starts(provider)],
    }


def _in_child() -> dict[str, Any]:
    code = "import json; from graphc import probe; print(json.dumps(probe._answer()))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if child.returncode == 0:
        answer: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
        return answer
    # It crashed: what every supported version loads, and nothing is known of kernels.
    return {"max_ir": 10, "max_opset": {"": 21}, "kernels": [], "providers": [runtime.CPU]}


def _highest(accepted: Callable[[int], bool], start: int) -> int:
    """The highest number from ``start`` downwards that is accepted; 1 if none."""
    return next((n for n in range(start, 1, -1) if accepted(n)), 1)


def _accepts_opset(domain: str) -> Callable[[int], bool]:
    return lambda version: _loads(_identity(3, {"": 1, domain: version}))


def _identity(ir_version: int, opsets: Mapping[str, int]) -> bytes:
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", [x], [y])
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    return bytes(helper.make_model(graph, ir_version=ir_version, opset_imports=imports).SerializeToString())


def _loads(model: bytes) -> bool:
    try:
        runtime.handle(model, runtime.settings(optimise=False, threads=1), runtime.CPU)
    except runtime.CannotRun:
        return False
    return True


def _starts(provider: str) -> bool:
    """Whether a provider runs a node here: the list of available ones only says what was compiled in."""
    if provider == runtime.CPU:
        return True
    settings = runtime.settings(optimise=False, options={"session.disable_cpu_ep_fallback": "1"}, threads=1)
    try:
        started = runtime.handle(_identity(8, {"": 13}), settings, provider, fallback=False)
    except runtime.CannotRun:
        return False
    return bool(started.get_providers()[0] == provider)
