"""The memory that quantizing a model of 2.4 GB takes, weights only: the command as a whole, checks included.

    python bench/quantize_large.py [VARIANT...]

Results are kept in ``bench/results/quantize_large.json``, a row for each variant; ``quantize_large.md`` is made of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cache
import process

RESULTS = Path(__file__).parents[1] / "bench" / "results" / "quantize_large.json"
LIMIT_MB = 500
"""Peak anonymous memory that is not to be exceeded."""

VARIANTS = {
    "int8": "quantize",
    "int4, blocks of 128": "quantize{bits=4 block=128}",
    "int4, blocks of 32, clipped": "quantize{bits=4 block=32 clip=mse}",
    "int4 asymmetric, blocks of 32": "quantize{bits=4 block=32 symmetric=false}",
    "all exact passes, int4, blocks of 128": "simplify,fuse,shrink,recognise,simplify,quantize{bits=4 block=128},lower",
}


def page(document: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Quantizing 2.4 GB",
        "",
        f"Written by `bench/quantize_large.py` from `quantize_large.json`; do not edit. {document['machine']}. "
        f"Peak anonymous memory is to stay below {LIMIT_MB} MB.",
        "",
        "| weights | anonymous MB | | wall seconds | CPU seconds | output GB |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for name, row in document["rows"].items():
        met = "met" if row["anon_mb"] < LIMIT_MB else "**missed**"
        lines.append(
            f"| {name} | {row['anon_mb']:.0f} | {met} | {row['wall_s']:.0f} | {row['cpu_s']:.0f} "
            f"| {row['bytes'] / 1e9:.2f} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--out", type=Path, default=RESULTS)
    a = parser.parse_args()
    for name in a.variants or VARIANTS:
        with tempfile.TemporaryDirectory(dir=cache.root()) as folder:
            out = Path(folder) / "out.onnx"
            command: list[str | Path] = [sys.executable, "-m", "graphc", "optimize", cache.model("synthetic-2.4gb")]
            command += ["-p", VARIANTS[name], "-o", out, "--no-cache", "--no-measure"]
            used = process.run(command, timeout_s=3600)
            if used.failure:
                print(f"{name}: failed: {used.failure}")
                continue
            size = sum(file.stat().st_size for file in Path(folder).iterdir())
        document = json.loads(a.out.read_text()) if a.out.exists() else {"schema": 1, "rows": {}}
        document["machine"] = process.machine()
        row = {"anon_mb": used.anon_mb, "rss_mb": used.rss_mb, "wall_s": used.wall_s, "cpu_s": used.cpu_s}
        document["rows"][name] = {**row, "bytes": size}
        document["rows"] = {each: document["rows"][each] for each in VARIANTS if each in document["rows"]}
        a.out.write_text(json.dumps(document, indent=1) + "\n")
        a.out.with_suffix(".md").write_text(page(document))
        print(f"{name}: {document['rows'][name]}", flush=True)


if __name__ == "__main__":
    main()
