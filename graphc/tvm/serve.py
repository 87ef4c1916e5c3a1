"""Run the model beside this file: python run.py [INPUTS.npz | --check]. It needs numpy and apache-tvm-ffi only.

From Python: ``Model(folder)(input_name=array, ...)`` gives the outputs by name.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

tvm_ffi: Any = importlib.import_module("tvm_ffi")
Array = np.ndarray[Any, np.dtype[Any]]

CPU, CUDA = 1, 2
POOLED = 2


class Model:
    """A compiled model.

    Args:
        folder: Where ``graphc.json`` is.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        buckets: What is compiled, for each combination of sizes: ``{inputs: [{name, shape, dtype}], outputs: [name]}``.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        settings = json.loads((self.folder / "graphc.json").read_text(encoding="utf-8"))["runtime"]
        self.device, self.buckets, self._data = settings["device"], settings["buckets"], settings["data"]
        _load_runtime(self.folder, self.device)
        self._weights: list[Any] = []
        self._loaded: dict[str, tuple[Any, list[Any]]] = {}

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        return self.run(inputs)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name, for arrays by name."""
        bucket = self._bucket(inputs)
        main, weights = self._load(bucket)
        given = [np.ascontiguousarray(inputs[v["name"]], v["dtype"]).reshape(v["shape"]) for v in bucket["inputs"]]
        arguments = [self._to_device(_aligned(array)) for array in given]
        found = main(*arguments, *weights)
        found = [found] if isinstance(found, tvm_ffi.Tensor) else list(found)
        return {name: self._to_host(value) for name, value in zip(bucket["outputs"], found, strict=True)}

    def tensors(self, file: str) -> list[Array]:
        """The arrays in one of the data files, mapped into memory."""
        memory = np.memmap(self.folder / file, mode="c")
        found = []
        for entry in self._data[file]:
            dtype, start = np.dtype(entry["dtype"]), entry["offset"]
            size = dtype.itemsize * int(np.prod(entry["shape"], dtype=np.int64))
            found.append(memory[start : start + size].view(dtype).reshape(entry["shape"]))
        return found

    def _bucket(self, inputs: Mapping[str, Array]) -> dict[str, Any]:
        wanted = {name: tuple(np.shape(array)) for name, array in inputs.items()}
        for bucket in self.buckets:
            if all(wanted.get(v["name"]) == tuple(v["shape"]) for v in bucket["inputs"]):
                return dict(bucket)
        known = [{v["name"]: tuple(v["shape"]) for v in bucket["inputs"]} for bucket in self.buckets]
        if missing := sorted(set(known[0]) - set(wanted)):
            raise ValueError(f"input '{missing[0]}' is missing")
        raise ValueError(f"not compiled for the shapes {wanted}, but for {'; or '.join(map(str, known))}")

    def _load(self, bucket: Mapping[str, Any]) -> tuple[Any, list[Any]]:
        name = bucket["library"]
        if name not in self._loaded:
            module = tvm_ffi.load_module(str(self.folder / name))["vm_load_executable"]()
            devices = [CUDA, 0, POOLED, CPU, 0, POOLED] if self.device == "cuda" else [CPU, 0, POOLED]
            module["vm_initialization"](*devices)
            if not self._weights:
                self._weights = [self._to_device(array) for array in self.tensors("weights.bin")]
            self._loaded[name] = module["main"], [self._weights[i] for i in bucket["weights"]]
        return self._loaded[name]

    def _to_device(self, array: Array) -> Any:
        tensor = tvm_ffi.from_dlpack(array)
        return tensor if self.device == "cpu" else self._copied(tensor, self.device)

    def _to_host(self, tensor: Any) -> Array:
        tensor = tensor if self.device == "cpu" else self._copied(tensor, "cpu")
        return np.from_dlpack(tensor).copy()

    def _copied(self, tensor: Any, device: str) -> Any:
        """A tensor on another device."""
        empty = tvm_ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        made = empty(tvm_ffi.Shape(tensor.shape), tensor.dtype, tvm_ffi.device(device, 0), None)
        tvm_ffi.get_global_func("runtime.TVMTensorCopyFromTo")(tensor, made)
        return made


def _aligned(array: Array) -> Array:
    """The array, at an address that TVM's vector code can load from."""
    if array.ctypes.data % 64 == 0:
        return array
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    place = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    place[...] = array
    return place


def _load_runtime(folder: Path, device: str) -> None:
    """Load TVM's runtime library: the installed one, or the one in the artifact."""
    names = ["libtvm_runtime.so", *(["libtvm_runtime_cuda.so"] if device == "cuda" else [])]
    if "tvm" in sys.modules:
        names = names[1:]
    spec = importlib.util.find_spec("tvm")
    places = [Path(p) / "lib" for p in (spec.submodule_search_locations or ())] if spec else []
    for name in names:
        for place in (*places, folder):
            if (place / name).is_file():
                ctypes.CDLL(str(place / name), ctypes.RTLD_GLOBAL)
                break
        else:
            raise OSError(f"{name} is neither in {folder} nor installed: pip install apache-tvm")


def _check(model: Model) -> bool:
    """Compare with the results of ONNX Runtime that came with the model; returns whether all are close."""
    expected, worst = model.tensors("parity.bin"), 0.0
    for bucket in model.buckets:
        if "parity" not in bucket:
            continue
        inputs, outputs = ({k: expected[i] for k, i in part.items()} for part in bucket["parity"])
        for name, found in model.run(inputs).items():
            wanted = outputs[name].astype(np.float64)
            error = float(np.max(np.abs(found - wanted), initial=0) / max(np.max(np.abs(wanted), initial=0), 1e-30))
            print(f"{name} {list(found.shape)}: relative error {error:.2g}")
            worst = max(worst, error)
    return worst <= 1e-4


def main(arguments: list[str]) -> int:
    start = perf_counter()
    model = Model(Path(__file__).resolve().parent)
    if arguments == ["--check"]:
        return 0 if _check(model) else 1
    given = dict(np.load(arguments[0], allow_pickle=False)) if arguments else {}
    bucket = model.buckets[0]
    zeros = {v["name"]: np.zeros(v["shape"], v["dtype"]) for v in bucket["inputs"]}
    model.run(given or zeros)
    print(f"loaded and run in {perf_counter() - start:.3f} s")
    start = perf_counter()
    for name, value in model.run(given or zeros).items():
        print(name, value.dtype, list(value.shape))
    print(f"run in {1e3 * (perf_counter() - start):.2f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
