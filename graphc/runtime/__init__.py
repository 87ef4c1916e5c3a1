"""ONNX Runtime: the sessions that check, calibrate and measure.

No other module makes sessions. ONNX Runtime is imported inside the functions; where it is missing, the error says
what to install.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc import environment
from graphc.contract import Arrays, Capabilities, Runnable
from graphc.errors import BadInput, nearest
from graphc.runtime.binding import InPlace
from graphc.runtime.complaints import CannotRun, explain
from graphc.runtime.mapping import constants_nbytes, mapped, serialised
from graphc.runtime.timing import Timing, measure

__all__ = [
    "BIG",
    "CPU",
    "CannotRun",
    "Session",
    "Timing",
    "capabilities",
    "constants_nbytes",
    "handle",
    "installed",
    "measure",
    "require",
    "session",
    "settings",
]

CPU = "CPUExecutionProvider"

BIG = 128 << 20
"""Bytes of constants from which a model is not serialised in memory but mapped."""

_WHEELS = ("onnxruntime", "onnxruntime-gpu")


@cache
def installed() -> Mapping[str, str]:
    """The version of each wheel of ONNX Runtime that is installed."""
    found = {}
    for name in _WHEELS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _repair() -> str:
    return f"pip uninstall -y onnxruntime onnxruntime-gpu && {environment.to_install('cpu')} (or [gpu] for CUDA)"


@cache
def require() -> None:
    """Make sure that ONNX Runtime can be used.

    Raises:
        BadInput: It is missing, or its two wheels have overwritten each other; the message has the remedy.
    """
    wheels = installed()
    if len(wheels) > 1:
        raise BadInput(
            "both onnxruntime and onnxruntime-gpu are installed",
            why="they share one folder, so that the last one installed has overwritten the other",
            hint=_repair(),
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise BadInput(
            "ONNX Runtime cannot be imported" if wheels else "ONNX Runtime is not installed",
            why=str(error),
            hint=f"{environment.to_install('cpu')} (or [gpu] for CUDA)",
        ) from None
    if not hasattr(onnxruntime, "InferenceSession"):
        raise BadInput(
            "the installation of ONNX Runtime is broken",
            why="its folder is what is left of a wheel that was removed",
            hint=_repair(),
        )


@cache
def capabilities() -> Capabilities:
    """What the installed ONNX Runtime loads and runs, found by asking it; some milliseconds, once.

    Raises:
        BadInput: ONNX Runtime is missing.
    """
    require()
    from graphc.runtime.probe import ask

    return ask(isolated="onnxruntime-gpu" in installed())


class Session(Runnable):
    """A model loaded in ONNX Runtime.

    Attributes:
        provider: The first of the execution providers that really started.
        providers: All of them.
        input_names: The inputs in order, those with a default left out.
        output_names: The outputs in order.
    """

    def __init__(self, handle: Any, where: str, keep: Sequence[Any] = ()) -> None:
        self._handle, self._where = handle, where
        # Memory that the runtime reads in place, and the folder of the files that it has mapped.
        self._keep = list(keep)
        inputs, outputs = handle.get_inputs(), handle.get_outputs()
        self.providers: tuple[str, ...] = tuple(handle.get_providers())
        self.provider = self.providers[0]
        self.input_names: tuple[str, ...] = tuple(v.name for v in inputs)
        self.output_names: tuple[str, ...] = tuple(v.name for v in outputs)
        self._odd = any(v.type in _BY_TYPE for v in (*inputs, *outputs))

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Compute all outputs.

        Args:
            inputs: Arrays by input name, in the dtypes of the interface; bfloat16 and 8-bit floats are those of
                ml_dtypes.

        Returns:
            Arrays by output name. A sequence gives one array an item, ``name[0]``, ``name[1]``, ...; a map gives
            ``name.keys`` and ``name.values``; an absent optional gives nothing.

        Raises:
            CannotRun: The inputs do not fit, or a node failed; the message names it.
        """
        try:
            if self._odd:
                feeds = {name: _to_ort_value(array) for name, array in inputs.items()}
                outputs = [_from_ort_value(v) for v in self._handle.run_with_ort_values(None, feeds)]
            else:
                outputs = self._handle.run(None, dict(inputs))
        except Exception as error:  # its exceptions share no other base
            raise explain(error, "ONNX Runtime cannot run the model", self._where) from None
        named = zip(self.output_names, outputs, strict=True)
        return {name: array for output, value in named for name, array in _flat(output, value)}

    def in_place(self, inputs: Arrays, shared: Mapping[str, str]) -> InPlace:
        """The same session with outputs written over inputs, see :mod:`graphc.runtime.binding`."""
        return InPlace(self._handle, self.provider, inputs, shared)

    def placement(self) -> dict[str, dict[str, int]]:
        """How many nodes of each operator every provider runs.

        Empty unless the session was made with the option ``session.record_ep_graph_assignment_info=1``.
        """
        counts: dict[str, dict[str, int]] = {}
        try:
            parts = self._handle.get_provider_graph_assignment_info()
        except Exception:  # it was not recorded
            return {}
        for part in parts:
            operators = counts.setdefault(part.ep_name, {})
            for node in part.get_nodes():
                operators[node.op_type] = operators.get(node.op_type, 0) + 1
        return counts

    def close(self) -> None:
        """Free the session, the memory it mapped and its temporary files."""
        self._handle = None
        self._keep.clear()


def session(
    model: ir.Model | Path,
    *,
    optimise: bool,
    provider: str = CPU,
    options: Mapping[str, str] | None = None,
    threads: int = 0,
    frugal: bool = False,
) -> Session:
    """Load a model in a fresh session.

    Large constants of a model in memory are not copied, see :mod:`graphc.runtime.mapping`.

    Args:
        model: An ONNX file, or a model in memory.
        optimise: Whether the runtime may optimise the graph; references are run without.
        provider: The execution provider wanted; ``Session.provider`` is the one that runs.
        options: Configuration entries, e.g. ``{"session.x64quantprecision": "1"}``.
        threads: Threads within an operator; 0 lets the runtime choose.
        frugal: Whether to save memory at the cost of time: weights are not repacked and buffers not pooled, so that
            anonymous memory is about that of the activations. Not for measuring latency.

    Raises:
        BadInput: ONNX Runtime is missing, or it has no such provider, or there is no such file.
        CannotRun: The runtime rejects the model; the message names the node or the operator.
    """
    require()
    import onnxruntime as ort

    if provider not in (known := ort.get_available_providers()):
        raise BadInput(f"ONNX Runtime has no provider '{provider}'", hint=nearest(provider, known))
    entries = settings(optimise=optimise, options=options or {}, threads=threads, frugal=frugal)
    keep: list[Any] = []
    source: str | bytes
    if isinstance(model, Path):
        if not model.is_file():
            raise BadInput("there is no such model file", where=str(model))
        source, where = str(model), str(model)
    else:
        where = model.graph.name or ""
        if constants_nbytes(model) <= BIG:
            source = serialised(model)
        else:
            source, keep = mapped(model, entries, lend=not optimise)
    fallback = (options or {}).get("session.disable_cpu_ep_fallback") != "1"
    left_out = COPYING if frugal else ()
    return Session(handle(source, entries, provider, where=where, fallback=fallback, left_out=left_out), where, keep)


COPYING = ("QDQSelectorActionTransformer",)
"""Parts of the optimiser that copy weights: codes into the layout of products with codes."""


def settings(
    *, optimise: bool, options: Mapping[str, str] | None = None, threads: int = 0, frugal: bool = False
) -> Any:
    """``onnxruntime.SessionOptions``, see :func:`session`. Threads wait without spinning, and nothing is logged."""
    import onnxruntime as ort

    ort.set_default_logger_severity(4)
    found = ort.SessionOptions()
    found.log_severity_level = 4
    found.intra_op_num_threads = threads
    level = ort.GraphOptimizationLevel
    found.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    entries = {"session.intra_op.allow_spinning": "0"}
    if frugal:
        found.enable_cpu_mem_arena = False
        found.enable_mem_pattern = False
        entries["session.disable_prepacking"] = "1"
    for key, value in {**entries, **(options or {})}.items():
        found.add_session_config_entry(key, value)
    return found


def handle(
    source: str | bytes,
    options: Any,
    provider: str,
    *,
    where: str = "",
    fallback: bool = True,
    left_out: Sequence[str] = (),
) -> Any:
    """An ``onnxruntime.InferenceSession`` from a path or a serialised model.

    Args:
        source: The path, or the model.
        options: See :func:`settings`.
        provider: The execution provider wanted.
        where: What to call the model in errors.
        fallback: Whether the CPU may run what the provider cannot.
        left_out: Parts of the optimiser that do not run.

    Raises:
        CannotRun: The runtime rejects the model.
    """
    import onnxruntime as ort

    providers = [provider, CPU] if fallback and provider != CPU else [provider]
    try:
        # Its own fallback prints and retries; what really started is asked afterwards.
        return ort.InferenceSession(
            source, options, providers=providers, enable_fallback=0, disabled_optimizers=list(left_out)
        )
    except Exception as error:  # its exceptions share no other base
        raise explain(error, "ONNX Runtime cannot load the model", where) from None


# The runtime's Python layer knows no NumPy type for these; they travel as the bytes of an OrtValue.
_ODD = (
    ir.DataType.BFLOAT16,
    ir.DataType.FLOAT8E4M3FN,
    ir.DataType.FLOAT8E4M3FNUZ,
    ir.DataType.FLOAT8E5M2,
    ir.DataType.FLOAT8E5M2FNUZ,
)
_BY_TYPE = {f"tensor({dtype.name.lower()})": dtype for dtype in _ODD}
_BY_NUMPY = {dtype.numpy(): dtype for dtype in _ODD}
_BY_NUMBER = {int(dtype): dtype.numpy() for dtype in _ODD}


def _to_ort_value(array: np.ndarray[Any, Any]) -> Any:
    import onnxruntime as ort

    array = np.ascontiguousarray(array)
    if (dtype := _BY_NUMPY.get(array.dtype)) is not None:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, int(dtype))
    return ort.OrtValue.ortvalue_from_numpy(array)


def _from_ort_value(value: Any) -> Any:
    dtype = _BY_NUMBER.get(value.element_type()) if value.is_tensor() else None
    if dtype is None:
        return value.numpy()
    data = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    return np.frombuffer(data, dtype=dtype).reshape(value.shape())


def _flat(name: str, value: Any) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Name every array in an output, which is a tensor, a sequence, a map or nothing."""
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from _flat(f"{name}[{i}]", item)
    elif isinstance(value, dict):
        keys = sorted(value)
        yield f"{name}.keys", np.array(keys)
        yield f"{name}.values", np.array([value[key] for key in keys])
    elif value is not None:
        yield name, np.asarray(value)
