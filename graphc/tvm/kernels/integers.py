"""Products and convolutions of integers: pairs of 16-bit numbers are multiplied and summed by one instruction.

``vpmaddwd`` takes two vectors of 16-bit numbers and gives sums of two neighbouring products, 32 bits wide. It is exact
for all 8-bit codes less a zero point, with a sign or without, where products of bytes (``vpmaddubsw``) saturate.
Weights stay 8 bits wide in memory: ``(panels, taps * pairs of inputs, 2 * lanes)``, the two inputs of an output beside
each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from graphc.edit import Array
from graphc.tvm.kernels.writing import kernel, lanes_from, loop, registers, spread, store_columns
from graphc.tvm.nest import SERIAL, Machine

INSTRUCTIONS = {4: "llvm.x86.sse2.pmadd.wd", 8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}
"""By lanes."""

DEEPEST = (1 << 31) // (255 * 128)
"""Products in a sum, up to which it fits into 32 bits."""


@dataclass(frozen=True)
class Window:
    """What is computed: a convolution with channels last and without padding; a product of matrices is one of 1 x 1.

    Attributes:
        given: Shape of the input ``(batch, height, width, channels)``; channels are even.
        taps: Height and width of the kernel.
        strides, dilations: Of the kernel, down and across.
        outputs: Channels of the output.
    """

    given: tuple[int, int, int, int]
    taps: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]
    outputs: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the output."""
        sizes = zip(self.given[1:3], self.taps, self.strides, self.dilations, strict=True)
        high, wide = ((n - (taps - 1) * dilation - 1) // stride + 1 for n, taps, stride, dilation in sizes)
        return high, wide

    @property
    def depth(self) -> int:
        """Pairs in a sum."""
        return self.taps[0] * self.taps[1] * self.given[3] // 2


def in_pairs(weight: Array, lanes: int) -> Array:
    """``[R, S, I, O]`` -> ``[O / lanes, R * S * I / 2, lanes * 2]``, filled up with zeros."""
    high, wide, inputs, outputs = weight.shape
    filled = np.pad(weight, [(0, 0), (0, 0), (0, inputs % 2), (0, -outputs % lanes)])
    split = filled.reshape(high * wide * (-(-inputs // 2)), 2, -1, lanes)
    return np.ascontiguousarray(split.transpose(2, 0, 3, 1)).reshape(split.shape[2], split.shape[0], 2 * lanes)


def tile(rows: int, panels: int, machine: Machine) -> tuple[int, int]:
    """Rows and panels whose sums are in registers; more of them would be spilled."""
    sums = 8 if machine.registers == 16 else 12
    wide = [each for each in (2, 4, 3, 1, 8) if panels % each == 0]
    shapes = [(min(rows, sums // each), each) for each in wide]
    return max(shapes, key=lambda shape: shape[0] * shape[1] / (shape[0] + shape[1]))


def product(window: Window, machine: Machine) -> Any:
    """``y[batch * height * width, outputs]`` int32, of ``x`` int16 and packed weights."""
    from tvm import tirx
    from tvm.tirx.script.builder import ir as T

    lanes, (high, width), pairs = machine.lanes, window.size, window.given[3] // 2
    panels, lines = -(-window.outputs // lanes), window.given[0] * high
    height, wide = tile(width, panels, machine)
    groups, tiles, rest = panels // wide, width // height, width % height
    # Parts of a line are tasks where there are too few lines to keep all cores busy.
    parts = 1 if lines * groups >= 4 * machine.cores else min(max(1, tiles), -(-4 * machine.cores // (lines * groups)))
    parts = next(p for p in range(parts, 0, -1) if max(1, tiles) % p == 0)
    parallel = lines * width * window.outputs * window.depth > SERIAL
    arguments = [
        ("x", window.given, "int16"),
        ("w", (panels, window.depth, 2 * lanes), "int8"),
        ("y", (lines * width, window.outputs), "int32"),
    ]

    def body(x: Any, w: Any, y: Any) -> None:
        def summed(line: Any, group: Any, first: Any, count: int) -> None:
            """The sums of some neighbours in a line."""
            sums, numbers = registers(count * wide * lanes, dtype="int32"), registers(2 * lanes, dtype="int16")
            places = [[lanes_from((row * wide + v) * lanes, lanes) for v in range(wide)] for row in range(count)]
            for place in (p for each in places for p in each):
                T.buffer_store(sums, spread(T.int32(0), lanes), [place])
            with loop(window.taps[0]) as r, loop(window.taps[1]) as s, loop(pairs) as pair:
                down = line % high * window.strides[0] + r * window.dilations[0]
                for v in range(wide):
                    at = lanes_from(0, 2 * lanes)
                    codes = w[group * wide + v, (r * window.taps[1] + s) * pairs + pair, at]
                    T.buffer_store(numbers, T.cast(codes, f"int16x{2 * lanes}"), [at])
                    for row in range(count):
                        across = (first + row) * window.strides[1] + s * window.dilations[1]
                        both = T.reinterpret("int32", x[line // high, down, across, lanes_from(pair * 2, 2)])
                        given = T.reinterpret(f"int16x{2 * lanes}", spread(both, lanes))
                        products = tirx.call_llvm_pure_intrin(f"int32x{lanes}", INSTRUCTIONS[lanes], given, numbers[at])
                        place = places[row][v]
                        T.buffer_store(sums, sums[place] + products, [place])
            for row in range(count):
                for v in range(wide):
                    column = (group * wide + v) * lanes
                    value = sums[places[row][v]]
                    target = line * width + first + row
                    store_columns(y, target, column, value, lanes, window.outputs, panels * lanes, dtype="int32")

        with loop(groups * lines * parts, parallel=parallel) as task:
            group, line, part = task // (lines * parts), task // parts % lines, task % parts
            if tiles:
                with loop(tiles // parts) as number:
                    summed(line, group, (part * (tiles // parts) + number) * height, height)
            if rest:
                with T.If(part == parts - 1), T.Then():
                    summed(line, group, tirx.const(width - rest, "int32"), rest)

    return kernel(arguments, body)
