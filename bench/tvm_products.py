"""Products with packed and with block-sparse weights, as TVM compiles them, against dense ones and ONNX Runtime.

    python bench/tvm_products.py [--again] [--threads N] [--seconds S] [ROWSxINPUTSxOUTPUTS...]

Each product is one MatMul with a weight of random numbers. All forms of one run in turns in one process; ratios are to
the dense float32 product of the same artifact format (``tvm``), and to ONNX Runtime's float32 (``onnxruntime``). A
weight is read again and again, so that caches hold what fits; the larger sizes do not. Results go to
``bench/results/tvm_products.json``, product by product; what is there is not measured again without ``--again``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

RESULTS = Path(__file__).parent / "results" / "tvm_products.json"
PRODUCTS = ("1x576x1536", "1x2048x8192", "128x384x1536", "128x768x3072")
FORMS = {
    "int8": "quantize{bits=8 least=0}",
    "static int8": "quantize{scheme=static least=0}",
    "int4/32": "quantize{bits=4 block=32 least=0}",
    **{
        f"{tile} {kept}%": f"sparsify{{ratio={1 - kept / 100:.2f} pattern={tile}}},pack{{tile={tile} always=true}}"
        for tile in ("16x1", "16x16", "4x4", "1x16")
        for kept in (50, 30, 10)
    },
}


def product(rows: int, inputs: int, outputs: int) -> ir.Model:
    """A MatMul with a constant of random numbers."""
    data = (np.random.default_rng(0).standard_normal((inputs, outputs)) / np.sqrt(inputs)).astype(np.float32)
    kind = ir.TensorType(ir.DataType.FLOAT)
    x, y = (ir.Value(name=n, type=kind, shape=ir.Shape((rows, k))) for n, k in (("x", inputs), ("y", outputs)))
    w = ir.Value(name="w", type=kind, shape=ir.Shape(data.shape), const_value=ir.tensor(data, name="w"))
    node = ir.node("MatMul", [x, w], outputs=[y], name="product")
    graph = ir.Graph([x], [y], nodes=[node], initializers=[w], opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


def measure(name: str, seconds: float, threads: int) -> dict[str, Any]:
    """All forms of one product."""
    from graphc import pipeline, runtime
    from graphc.recipe import parse_backend

    rows, inputs, outputs = map(int, name.split("x"))
    target = parse_backend("tvm", {"threads": threads, "runtime": False})
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.onnx")
        ir.save(product(rows, inputs, outputs), path)
        runnables: dict[str, Any] = {"onnxruntime": runtime.session(ir.load(path), optimise=True, threads=threads)}
        for form, recipe in {"tvm": "simplify", **FORMS}.items():
            out = Path(folder, form.replace("/", "-"))
            report = pipeline.optimize(path, out, recipe=recipe, target=target, measure=False, cache=False)
            runnables[form] = target.load(out)
            found[form] = {"weights_mb": round((out / "weights.bin").stat().st_size / 1e6, 3)}
            if "int" in form and report.model is not None:
                runnables[f"onnxruntime {form}"] = runtime.session(report.model, optimise=True, threads=threads)
        given = {"x": np.random.default_rng(1).standard_normal((rows, inputs)).astype(np.float32)}
        timings = runtime.measure(runnables, given, seconds=seconds, warmup=3)
    dense = timings["tvm"].median
    for form, timing in timings.items():
        found.setdefault(form, {})["ms"] = round(1e3 * timing.median, 4)
        found[form] |= {"to_tvm": round(timing.median / dense, 3), "to_onnxruntime": round(timing.ratio, 3)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", default=list(PRODUCTS), metavar="ROWSxINPUTSxOUTPUTS")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    # A script beside this one is called tvm, too.
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
    os.environ["TVM_NUM_THREADS"] = str(arguments.threads)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"products": {}}
    for name in arguments.names:
        if name in results["products"] and not arguments.again:
            continue
        row = measure(name, arguments.seconds, arguments.threads)
        results["products"][name] = {"forms": row, "load_average": round(os.getloadavg()[0], 1)}
        results |= {"date": datetime.now(UTC).date().isoformat(), "threads": arguments.threads}
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        for form, each in row.items():
            print(name, form, json.dumps(each), flush=True)


if __name__ == "__main__":
    main()
