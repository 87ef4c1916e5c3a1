"""What the tests of the TVM backend share: small models, compiled in this process or tried in another."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc.contract import no_progress
from graphc.recipe import parse_backend
from graphc.tvm import emit, targets, tune
from graphc.tvm.placing import OWN


def text(body: str, head: str = "(float[2,4,8,8] x) => (float y)", opset: int = 21) -> ir.Model:
    """A model from ONNX's text form; the shapes of outputs are left open."""
    return ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : {opset}]> g {head} {{ {body} }}')


def build(model: ir.Model, folder: Path, *shapes: str) -> Any:
    """Compile a model as it is, without passes before, in this process; load it."""
    target = parse_backend("tvm", {"shapes": shapes, "threads": 2, "runtime": False})
    folder.mkdir(exist_ok=True)
    needs = emit.emit(model, folder, targets.resolve("x86-64-v3", 2), shapes, tune.Budget(), no_progress)
    (folder / "graphc.json").write_text(json.dumps({"target": target.spec(), "runtime": dict(needs)}))
    return target.load(folder)


def weight(name: str, *shape: int, seed: int = 0) -> ir.Value:
    """An initializer of random numbers."""
    data = (np.random.default_rng(seed).standard_normal(shape) / np.sqrt(shape[-1] if shape else 1)).astype(np.float32)
    return ir.Value(
        name=name,
        shape=ir.Shape(shape),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.tensor(data, name=name),
    )


def own(model: ir.Model) -> list[str]:
    """The operators of graphc's own in the lowered model."""
    ((_, _, simple),) = emit.lowered(model.clone(), ())
    return [node.op_type for node in simple.graph if node.domain == OWN]


def in_child(outcome: Callable[[], str], folder: Path) -> str:
    """What comes of something in a child that is forked, which may crash: an import for each would take too long.

    ``folder`` is made, is there meanwhile, and goes.
    """
    folder.mkdir()
    said = folder / "said.json"
    child = os.fork()
    if not child:
        try:
            said.write_text(json.dumps(outcome()))
        except BaseException as error:
            said.write_text(json.dumps(f"raised: {error!r}"))
        finally:
            os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found: str = json.loads(said.read_text()) if not code else f"crashed: {signal.Signals(-code).name}"
    shutil.rmtree(folder)
    return found
