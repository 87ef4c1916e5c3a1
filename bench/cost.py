"""Count a model's parameters and FLOPs at the sizes of the catalog's first case.

    python bench/cost.py NAME MODEL

Prints JSON: ``parameters``, ``flops``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import catalog
import onnx_ir as ir

from graphc import edit, flops
from graphc.model import load, parameters


def main() -> None:
    name, path = sys.argv[1:]
    model = load(Path(path))
    sizes = catalog.entry(name).cases[0]
    for value in model.graph.inputs:
        if value.name in sizes:
            value.shape = ir.Shape(sizes[value.name].shape)
    bound = flops.bind(model)
    print(json.dumps({"parameters": parameters(model), "flops": sum(map(flops.node_flops, edit.nodes(bound)))}))


if __name__ == "__main__":
    main()
