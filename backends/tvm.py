"""TVM: machine code in a shared library, with the weights beside it and no runtime but a small library."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files as resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from graphc.contract import Arrays, Backend, Capabilities, Progress, Runnable, Timer, no_progress, option
from graphc.errors import BadInput, NotHere

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

OPSET = 21
"""The working opset; what is newer is brought back to it, or replaced by simpler operators."""


@dataclass(frozen=True)
class Tvm(Backend):
    """Machine code that needs no ONNX runtime, compiled by Apache TVM for a processor or for CUDA.

    Sizes are fixed: each combination given with --shapes is compiled. The artifact runs with numpy and apache-tvm-ffi,
    or from C++. The report has the speed against ONNX Runtime.

    Weights of 2, 4 and 8 bits stay packed. Where activations are 8-bit codes, too (quantize{scheme=static}), products
    and convolutions of one group sum integers, exactly, by vpmaddwd; depthwise convolutions use floats. --tune is a
    search of our own over tiles: TVM's meta-schedule takes a minute of a core to start each of its processes, and needs
    xgboost with 470 MB of NCCL.

    To measure loops on other machines: pip install 'apache-tvm[rpc]==0.27.0.post1' there and where the tracker is, run
    python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port 9190 on one machine,
    python -m tvm.exec.rpc_server --tracker HOST:9190 --key NAME on each that measures, and compile with
    -t 'tvm{tracker="HOST:9190" key=NAME target=PROCESSOR threads=CORES}' --tune MINUTES; target and threads are those
    of the workers. Only in a network that is trusted: workers run whatever they are sent.
    """

    main: ClassVar[str] = "model.so"
    when_slower: ClassVar[str] = "measure faster loops with --tune MINUTES, or use -t onnxruntime"

    target: str = option("x86-64-v3", "the processor: x86-64-v3, native, another one as LLVM names it, or cuda")
    shapes: tuple[str, ...] = option((), "sizes of dynamic dimensions: batch=1,8; all combinations are compiled")
    threads: int = option(0, "cores that the code is laid out for; 0 means those of this machine")
    arch: tuple[str, ...] = option(("sm_80", "sm_90"), "for cuda: the architectures to compile for")
    tune: float = option(0.0, "minutes to spend on measuring loops; what was found is remembered")
    trials: int = option(0, "loops to measure at most")
    tracker: str = option("", "HOST:PORT of TVM's RPC tracker, to measure on its workers instead of here")
    key: str = option("", "the name of the workers that measure; what they found is remembered under it")
    runtime: bool = option(True, "put TVM's runtime library into the artifact")

    def __post_init__(self) -> None:
        if self.threads < 0 or self.tune < 0 or self.trials < 0:
            raise ValueError("threads, tune and trials cannot be negative")
        if bool(self.tracker) != bool(self.key):
            raise ValueError("tracker and key go together")
        host, _, port = self.tracker.rpartition(":")
        if self.tracker and not (host and port.isdecimal() and int(port) < 1 << 16):
            raise ValueError(f"tracker is HOST:PORT, not '{self.tracker}'")
        if self.tracker and not (self.tune or self.trials):
            raise ValueError("tracker has no effect without --tune or --trials")

    def capabilities(self) -> Capabilities:
        return Capabilities("tvm", max_ir=10, max_opset={"": OPSET})

    def check(self, model: ir.Model) -> None:
        from graphc.tvm import emit, targets

        targets.resolve(self.target, self.threads, self.arch)
        if self.tracker:
            from graphc.tvm import remote

            remote.Tracker(self.tracker, self.key).workers()
        emit.lowered(model, self.shapes)

    def emit(self, model: ir.Model, folder: Path, *, progress: Progress = no_progress) -> Mapping[str, Any]:
        from graphc.tvm import contain, cuda, install, tune

        budget = tune.Budget(60 * self.tune, self.trials, tracker=self.tracker, key=self.key)
        needs = contain.emit(model, folder, self.target, self.threads, self.arch, self.shapes, budget, progress)
        names = ["libtvm_runtime.so", *([cuda.RUNTIME] if needs["device"] == "cuda" else [])]
        for library in map(install.library, names if self.runtime else []):
            if library is not None:
                shutil.copyfile(library, folder / library.name)
        parts = {"run.py": "serve.py", "main.cc": "cpp/main.cc", "CMakeLists.txt": "cpp/CMakeLists.txt"}
        for name, source in parts.items():
            (folder / name).write_text((resources("graphc.tvm") / source).read_text(encoding="utf-8"), "utf-8")
        return needs

    def load(self, path: Path, *, frugal: bool = False) -> Runnable:
        from graphc.tvm import cuda, install

        install.versions()
        from graphc.tvm import serve

        if self.target == "cuda" and not cuda.driver():
            raise NotHere("there is no CUDA driver", where=str(path), hint="run it on a machine with a GPU")
        try:
            return Loaded(serve.Model(path))
        except (OSError, ValueError, KeyError) as error:
            raise BadInput("cannot load the artifact", where=str(path), why=str(error), hint="make it again") from None

    def timer(self) -> Timer | None:
        from graphc.tvm import install, timing

        if self.target == "cuda" or self.target.startswith("{"):
            return None
        try:
            install.require()
        except BadInput:
            return None
        return partial(timing.timer, target=self.target, threads=self.threads)

    def unrealised(self, path: Path) -> Sequence[str]:
        manifest = json.loads((path / "graphc.json").read_text(encoding="utf-8"))
        floats: dict[str, int] = manifest["runtime"]["floats"]
        rounded: dict[str, int] = manifest["runtime"]["rounded"]
        plain: dict[str, tuple[int, str]] = manifest["runtime"]["plain"]
        return [
            *(
                f"weights stored as floats instead of the codes that the model has: {n} ({w})"
                for w, n in floats.items()
            ),
            *(f"products of 8-bit activations that are computed in floats: {n} ({why})" for why, n in rounded.items()),
            *(f"loops that TVM makes, one number at a time: {n} of {name} ({w})" for name, (n, w) in plain.items()),
        ]


class Loaded(Runnable):
    """A compiled artifact that runs in this process."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.provider = f"TVM ({model.device})"
        self.shapes = tuple({v["name"]: tuple(v["shape"]) for v in bucket["inputs"]} for bucket in model.buckets)

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        try:
            outputs: dict[str, np.ndarray[Any, Any]] = self._model.run(inputs)
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise BadInput(
                "the compiled model does not run with these inputs", where=str(self._model.folder), why=str(error)
            ) from None
        return outputs
