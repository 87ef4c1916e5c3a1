"""Writes ``tvm.md`` from what ``bench/tvm.py`` has measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

PAGE = """\
# Compiled by TVM

Written by `bench/tables.py` from `tvm.json`, which `bench/tvm.py` measured on {date} with {versions} and {threads}
threads. *Speed* is ONNX Runtime's time for the source model over the artifact's, run in turns: 1.00 is as fast, more is
faster. Its interval is in brackets. *Error* is the largest difference from ONNX Runtime without its optimisation,
relative to the largest value of the output. *To run* is all that has to be shipped: code, weights and two libraries.
Variants: `untuned` by the rules for x86-64-v3, `native` for the processor itself, `tuned-N` after N minutes of
measuring loops. The processor is an AMD EPYC with AVX-512, which ONNX Runtime uses, and x86-64-v3 does not.

{rows}
{notes}"""


def page(results: dict[str, Any], table: Callable[[Iterable[str], Iterable[Iterable[object]]], str]) -> str:
    """The page; ``table`` lays a table out."""
    rows, notes = [], []
    for name, variants in results["rows"].items():
        for variant, row in variants.items():
            notes += [f"- {name}, {variant}: {note}\n" for note in row.get("notes", ())]
            if "ratio" not in row:
                rows.append([name, variant, *"-------", row["failure"]])
                continue
            speed = f"{1 / row['ratio']:.2f} ({1 / row['ratio_high']:.2f} to {1 / row['ratio_low']:.2f})"
            error = "-" if row["error"] is None else f"{row['error']:.1e}"
            costs = [f"{row['wall_s']:.0f}", f"{row['library_mb']:.1f}", f"{row['needed_mb']:.1f}"]
            rest = [f"{row['load_s']:.2f}", error, f"{row['load_average']:.1f}"]
            rows.append([name, variant, speed, f"{row['onnxruntime_ms']:.2f}", f"{row['tvm_ms']:.2f}", *costs, *rest])
    header = ["model", "variant", "speed", "ONNX Runtime, ms", "TVM, ms", "compile, s", "code, MB", "to run, MB"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return PAGE.format(
        rows=table([*header, "load, s", "error", "load average"], rows),
        notes="".join(["\nWhere single precision alone moves an output:\n\n", *notes] if notes else []),
        date=results["date"],
        threads=results["threads"],
        versions=versions,
    )
