"""What is known beforehand about a way of quantizing on a target: whether it is any faster there."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from graphc.contract import Capabilities
from graphc.quantization.grid import Grid
from graphc.quantization.options import Options

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def notes(options: Options, model: ir.Model, target: Capabilities) -> Iterator[str]:
    """Sentences that the user should read before time is spent.

    Args:
        options: The options of the pass.
        model: The model, before it is changed.
        target: What it is for.
    """
    cpu = not target.providers or target.providers[0] == CPU
    cuda = bool(target.providers) and target.providers[0] == CUDA
    kinds = {node.op_type for node in model.graph}
    grid, version = Grid(options.bits, options.symmetric, options.form), model.graph.opset_imports.get("", 0)
    if options.scheme == "weights" and not options.limits and version < grid.opset:
        yield (
            f"codes of {grid.dtype.name.lower()} are in ONNX from opset {grid.opset} on, and the model has {version}: "
            f"weights stay as they are; {'bits=3 needs' if grid.form == 'int' else 'integers need'} opset 21"
        )
        return
    if options.form != "int" and cpu:
        yield "8-bit floats have no products on a CPU: the model is smaller and slower; scheme=dynamic is fast there"
    if options.scheme == "weights" and options.form == "int" and cpu:
        if "Conv" in kinds and not {"MatMul", "Gemm"} & kinds:
            yield (
                "a CPU dequantizes weights of convolutions whenever they are used: the model is smaller and slower; "
                "scheme=static is faster"
            )
        if options.bits == 2 or (options.block > 0 and options.block & (options.block - 1)):
            yield "ONNX Runtime multiplies with 4- and 8-bit weights in blocks of a power of two; others are slower"
        elif {"MatMul", "Gemm"} & kinds:
            yield (
                "ONNX Runtime's CPU kernels for such weights round activations to 8 bits, too; that is part of the "
                "measured error, but for models above 128 MB"
            )
    if options.scheme != "weights" and cuda:
        yield "the CUDA provider has no products in 8-bit integers: Q/DQ is computed in float there, and is slower"
    if options.full_range and options.scheme != "weights" and cpu:
        yield (
            "8-bit weights times 8-bit activations overflow on CPUs without VNNI unless the session has "
            "session.x64quantprecision=1, which an artifact (-o FOLDER/) sets and a bare .onnx file cannot"
        )
