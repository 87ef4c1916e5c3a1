"""Optimise a model from Python, read the report, and check the result once more.

python optimize.py MODEL.onnx OUTPUT.onnx
"""

from __future__ import annotations

import sys
from pathlib import Path

import graphc


def main(source: Path, output: Path) -> int:
    report = graphc.optimize(source, output, recipe="simplify,fuse,simplify", measure=False)
    for each in report.passes:
        print(f"{each.name}: {each.error or '; '.join(each.changes) or 'nothing to do'}")
        for refusal in each.refusals:
            print(f"  left alone ({refusal.count}x): {refusal.reason}")
    print(f"nodes: {report.input['nodes']} -> {report.output['nodes']}")

    # The run has compared input and output already; this shows how to compare any two models.
    comparison = graphc.verify(source, output)
    print(f"outputs equal: {comparison.ok}")
    return 0 if report.ok and comparison.ok else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
