"""The pass ``pack``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphc import edit, tiles
from graphc.contract import Context, Effect, Needs, Pass, PassResult, Probe, option
from graphc.edit import Array
from graphc.sparsity import layers
from graphc.sparsity.layers import Layer
from graphc.sparsity.pattern import Pattern
from graphc.tiles import Tiled
from graphc.timings import FASTER

KINDS = ("MatMul", "Gemm")
"""The operators whose weights are looked at."""

TARGET = "tvm"
"""The target that has kernels for tiles."""

SHAPES = ((16, 16), (16, 4), (16, 1), (32, 1), (8, 8), (8, 4), (8, 1), (4, 4), (4, 1), (1, 16), (1, 8))
"""Outputs and inputs of the tiles that are tried; of equally good ones, the first."""

LEAST = 0.1
"""The part of a weight that must be in tiles of zeros."""

ELSEWHERE = (
    "ONNX Runtime has no kernel for block-sparse weights, and would put the dense weight together at every start: "
    "-t tvm has one"
)


@dataclass(frozen=True)
class Pack(Pass):
    """Store weights of which whole tiles are zero as the tiles that are left, for a target that multiplies with them.

    The graph then has a function, ``graphc.TiledWeight``, whose body puts the dense weight together from standard
    operators: any ONNX runtime still computes the same. ``-t tvm`` computes with the tiles; each size is timed there
    against the dense product, and what is not faster stays dense. ``sparsify{pattern=16x1}`` makes such weights, and it
    is the best of the patterns: its tiles are vectors of outputs.
    """

    effect: ClassVar[Effect] = Effect.EXACT
    timed_on: ClassVar[tuple[str, ...]] = (TARGET,)

    tile: str = option("auto", "Outputs x inputs of a tile, as in 16x1; auto finds what leaves out most.")
    rows: int = option(0, "The rows that are timed; 0: those of the model, or 1 where they are dynamic.", least=0)
    always: bool = option(False, "Pack without timing.")
    include: tuple[str, ...] = option((), "Patterns of weight or node names to look at; all if none is given.")
    exclude: tuple[str, ...] = option((), "Patterns of weight or node names to leave alone.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tile != "auto" and Pattern.parse(self.tile).tile == (1, 1):
            raise ValueError("tile is auto, or outputs x inputs as in 16x1")

    def needs(self, model: ir.Model) -> Needs:
        return Needs(timings=not self.always)

    def caveats(self, model: ir.Model, ctx: Context) -> Iterable[str]:
        if ctx.target.name != TARGET:
            yield f"pack does nothing here: {ELSEWHERE}"

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        result = PassResult()
        name = model.graph.name or "the graph"
        if ctx.target.name != TARGET:
            result.refuse(name, ELSEWHERE)
            return result
        if ctx.time is None and not self.always:
            result.refuse(name, "nothing can be timed here")
            return result
        found: list[tuple[Layer, Tiled]] = []
        for layer in layers.find(model, KINDS, self.include, self.exclude, result, where="pack"):
            tiled = self._tiled(layer)
            if isinstance(tiled, str):
                result.refuse(layer.name, tiled)
            else:
                found.append((layer, tiled))
        probes = {} if self.always else {layer.name: self._probe(layer, tiled) for layer, tiled in found}
        ratios = ctx.time(list(probes.values())) if ctx.time is not None and probes else {}
        names = edit.Names(model)
        for layer, tiled in found:
            ratio = 0.0 if self.always else ratios.get(probes[layer.name].signature)
            if ratio is None:
                result.refuse(layer.name, "tiles could not be timed")
            elif ratio > FASTER:
                result.refuse(layer.name, f"tiles take {ratio:.2f} of the time of the dense product")
            else:
                kept = tiled.values.size / layer.size
                tiles.write(layer.value, tiled, names, model)
                high, deep = tiled.values.shape[1:]
                result.change(f"weight stored as tiles of {high}x{deep}")
                if ratio:
                    result.note(
                        f"pack: {layer.name} keeps {kept:.0%} of its weights, and takes {ratio:.2f} of the dense time"
                    )
        return result

    def _tiled(self, layer: Layer) -> Tiled | str:
        """The tiles of a weight, or why it stays as it is."""
        if layer.group != 1 or len(layer.held.shape) != 2:
            return "it is no matrix"
        if layer.held.dtype != ir.DataType.FLOAT:
            return "it is not float32"
        if any(use.node.inputs[1] is not layer.value for use in layer.uses):
            return "it is the first operand"
        (matrix,) = layer.matrices()
        if np.count_nonzero(matrix) > (1 - LEAST) * matrix.size:
            return "few of its weights are zero"
        shapes = SHAPES if self.tile == "auto" else (Pattern.parse(self.tile).tile,)
        best: tuple[float, tuple[int, int]] | None = None
        for high, deep in shapes:
            if not Pattern(tile=(high, deep)).problem(layer.shape):
                kept = _kept(matrix, high, deep)
                # Short vectors, and sums across vectors, cost something.
                cost = kept * (1.0 if high % 16 == 0 else 1.3 if high % 8 == 0 else 2.0)
                if kept <= 1 - LEAST and (best is None or cost < best[0]):
                    best = cost, (high, deep)
        if best is None:
            return "its zeros fill no tiles"
        return Tiled.of(matrix, *best[1], turned=_turned(layer))

    def _probe(self, layer: Layer, tiled: Tiled) -> Probe:
        """A product with the dense weight against one with its tiles."""
        rows = self.rows or _rows(layer)
        dense = layer.held.numpy()
        weight = np.ascontiguousarray(dense if tiled.turned else dense.T)
        x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((rows, tiled.depth)))
        held = ir.Value(
            name="w",
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape(weight.shape),
            const_value=ir.tensor(weight, name="w"),
        )
        y = ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((rows, tiled.outputs)))
        graph = ir.Graph(
            [x],
            [y],
            nodes=[ir.node("MatMul", [x, held], outputs=[y])],
            initializers=[held],
            name="probe",
            opset_imports={"": 21},
        )
        before = ir.Model(graph, ir_version=10)
        after = before.clone()
        turned = Tiled(tiled.values, tiled.places, tiled.outputs, tiled.depth, turned=True)
        tiles.write(after.graph.initializers["w"], turned, edit.Names(after), after)
        count, high, deep = tiled.values.shape
        # In steps of a twentieth: what is about as sparse is about as fast.
        part = round(20 * count * high * deep / layer.size) / 20
        signature = f"pack: {rows} rows, {tiled.outputs} x {tiled.depth}, {part:.0%} of the tiles of {high}x{deep}"
        inputs = {"x": np.random.default_rng(0).standard_normal((rows, tiled.depth)).astype(np.float32)}
        return Probe(signature, before, after, inputs)


def _kept(matrix: Array, high: int, deep: int) -> float:
    """The part of a matrix that is in tiles that are not zero."""
    outputs, depth = matrix.shape
    grid = matrix.reshape(outputs // high, high, depth // deep, deep)
    return float(grid.any(axis=(1, 3)).mean())


def _turned(layer: Layer) -> bool:
    """Whether a weight lies as ``(inputs, outputs)``."""
    node = layer.uses[0].node
    return not (edit.is_op(node, "Gemm") and edit.attribute(node, "transB", 0))


def _rows(layer: Layer) -> int:
    """The rows that a weight is multiplied with."""
    shape = layer.uses[0].activation.shape
    if shape is None or not shape.is_static():
        return 1
    return int(np.prod(shape.numpy()[:-1], dtype=np.int64))
