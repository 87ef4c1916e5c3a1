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
    """Ask for the highest versions, the providers that start and the kernels; it takes some milliseconds.

    Args:
        isolated: Ask in a process of its own: without its CUDA libraries the gpu wheel crashes when it is asked for
            its kernels, which then stay unknown.
    """
    # What every supported version loads, should nothing be answered.
    answers: dict[str, Any] = {"max_ir": 10, "max_opset": {"": 21}, "providers": [runtime.CPU], "kernels": []}
    if isolated:
        answers |= _in_child()
    else:
        answers |= {name: question() for name, question in _QUESTIONS.items()}
    return Capabilities(
        name="onnxruntime",
        max_ir=answers["max_ir"],
        max_opset=answers["max_opset"],
        kernels=frozenset((domain, name, provider) for domain, name, provider in answers["kernels"]),
        providers=tuple(answers["providers"]),
    )


def _in_child() -> dict[str, Any]:
    code = "from graphc.runtime import probe; probe.answer()"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    found: dict[str, Any] = {}
    for line in child.stdout.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    return found


def answer() -> None:
    """Print one JSON object for each question, at once, in case that the next one crashes."""
    for name, question in _QUESTIONS.items():
        print(json.dumps({name: question()}), flush=True)


def _max_ir() -> int:
    import onnx

    return _highest(lambda version: _loads(_identity(version, {"": 1})), int(onnx.IR_VERSION) + 2)


def _max_opset() -> dict[str, int]:
    import onnx
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    newest: dict[str, int] = {"": int(onnx.defs.onnx_opset_version())}
    for schema in state.get_all_operator_schema():
        newest[schema.domain] = max(newest.get(schema.domain, 0), schema.since_version)
    # Schemas of unfinished opsets exist but do not load, and a version without new schemas does.
    return {
        domain: _highest(_accepts_opset(domain), version + 2)
        for domain, version in sorted(newest.items())
        if not domain.startswith(_INTERNAL)
    }


def _providers() -> list[str]:
    import onnxruntime as ort

    return [provider for provider in ort.get_available_providers() if _starts(provider)]


def _kernels() -> list[tuple[str, str, str]]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kernels = state.get_all_opkernel_def()
    return sorted({("" if k.domain == "ai.onnx" else k.domain, k.op_name, k.provider) for k in kernels})


_QUESTIONS: Mapping[str, Callable[[], Any]] = {
    "max_ir": _max_ir,
    "max_opset": _max_opset,
    "providers": _providers,
    "kernels": _kernels,
}


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
