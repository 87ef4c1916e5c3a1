"""Products with packed codes, and rows of them: codes stay as they are in memory and become numbers in registers.

Codes lie as ``(panels, depth / codes of a word, lanes)`` int32: a word has consecutive inputs of one output, the first
in its lowest bits, and the words of the outputs of a vector register lie beside each other. So a vector of words gives
a vector of outputs for each of its codes, by a shift and a conversion. Scales (and zero points, as numbers) are
``(panels, blocks, lanes)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from graphc.tvm.contraction import tile
from graphc.tvm.kernels.writing import cast, kernel, lanes_from, loop, registers, spread, store_columns
from graphc.tvm.nest import SERIAL, Machine

FEW = 4
"""Rows up to which codes are converted for each product anew; for more, once for all rows."""

WORD = 32
"""Bits of a word of codes."""

Store = Callable[[Any, Any, Any], None]
"""Of a row, a panel, and the vector of its sums."""

OUTPUTS = 16
"""The number that outputs are filled up to a multiple of: the lanes of the widest vector register."""


@dataclass(frozen=True)
class Layout:
    """How a weight is packed.

    Attributes:
        outputs: Its outputs; codes are filled up to whole panels.
        depth: Its inputs, filled up to whole blocks.
        bits: Of a code: 2, 4 or 8.
        block: Inputs that share a scale, a multiple of the codes of a word.
        signed: Whether codes have a sign.
        zeros: Whether there are zero points.
        lanes: Outputs of a panel.
    """

    outputs: int
    depth: int
    bits: int
    block: int
    signed: bool
    zeros: bool
    lanes: int

    @property
    def per(self) -> int:
        """Codes in a word."""
        return WORD // self.bits

    @property
    def filled(self) -> int:
        """Outputs with those that only fill up."""
        return -(-self.outputs // OUTPUTS) * OUTPUTS

    @property
    def panels(self) -> int:
        return self.filled // self.lanes

    def arguments(self) -> list[tuple[str, tuple[int, ...], str]]:
        """The buffers of a weight: words, scales, zero points."""
        scales = (self.panels, self.depth // self.block, self.lanes)
        words = ("words", (self.panels, self.depth // self.per, self.lanes), "int32")
        return [words, ("scales", scales, "float32"), *([("zeros", scales, "float32")] if self.zeros else [])]

    def code(self, word: Any, place: int, lanes: int) -> Any:
        """The code at a place of a word (or of a vector of words), as a number."""
        from tvm.tirx.script.builder import ir as T

        if self.signed:
            above = WORD - self.bits * (place + 1)
            moved = T.shift_left(word, spread(T.int32(above), lanes)) if above else word
            return cast(T.shift_right(moved, spread(T.int32(WORD - self.bits), lanes)), "float32", lanes)
        moved = T.shift_right(word, spread(T.int32(self.bits * place), lanes)) if place else word
        return cast(T.bitwise_and(moved, spread(T.int32((1 << self.bits) - 1), lanes)), "float32", lanes)


def product(rows: int, layout: Layout, machine: Machine, *, bias: bool = False, relu: bool = False) -> Any:
    """``y[rows, outputs] = x[rows, depth] @ dequantized.T + bias``, all float32, bounded by ``relu``.

    ``bias`` is ``(panels, 1, lanes)``.
    """
    write = _few if rows <= FEW else _many
    added = [("bias", (layout.panels, 1, layout.lanes), "float32")] if bias else []
    given, result = ("x", (rows, layout.depth), "float32"), ("y", (rows, layout.outputs), "float32")

    def body(x: Any, words: Any, scales: Any, *rest: Any) -> None:
        def store(row: Any, panel: Any, value: Any) -> None:
            from tvm import tirx

            lanes = layout.lanes
            value = value + rest[-2][panel, 0, lanes_from(0, lanes)] if bias else value
            # Zero first: a number that is none stays.
            value = tirx.Max(spread(tirx.const(0.0, "float32"), lanes), value) if relu else value
            store_columns(rest[-1], row, panel * lanes, value, lanes, layout.outputs, layout.filled)

        write(rows, layout, machine, x, words, scales, rest[0] if layout.zeros else None, store)

    return kernel([given, *layout.arguments(), *added, result], body)


def _few(
    rows: int, layout: Layout, machine: Machine, x: Any, words: Any, scales: Any, zeros: Any, store: Store
) -> None:
    """Each task has some panels of outputs; a block's sum is scaled once."""
    from tvm.tirx.script.builder import ir as T

    lanes, per, steps = layout.lanes, layout.per, layout.block // layout.per
    wide = {1: 4, 2: 2}.get(rows, 1)
    wide = next(w for w in (wide, 2, 1) if layout.panels % w == 0 and w <= wide)
    parallel = rows * layout.outputs * layout.depth > SERIAL
    nothing = spread(T.float32(0), lanes)
    with loop(layout.panels // wide, parallel=parallel) as task:
        total, part = registers(rows * wide * lanes), registers(rows * wide * lanes)
        given = registers(rows * lanes)
        places = [[lanes_from((row * wide + v) * lanes, lanes) for v in range(wide)] for row in range(rows)]
        for place in (p for each in places for p in each):
            T.buffer_store(total, nothing, [place])
        with loop(layout.depth // layout.block) as block:
            for place in (p for each in places for p in each):
                T.buffer_store(part, nothing, [place])
            if layout.zeros:
                for row in range(rows):
                    T.buffer_store(given, nothing, [lanes_from(row * lanes, lanes)])
            with loop(steps) as step:
                for place in range(per):
                    numbers = [x[row, block * layout.block + step * per + place] for row in range(rows)]
                    for row in range(rows if layout.zeros else 0):
                        at = lanes_from(row * lanes, lanes)
                        T.buffer_store(given, given[at] + spread(numbers[row], lanes), [at])
                    for v in range(wide):
                        word = words[task * wide + v, block * steps + step, lanes_from(0, lanes)]
                        code = layout.code(word, place, lanes)
                        for row in range(rows):
                            at = places[row][v]
                            T.buffer_store(part, part[at] + spread(numbers[row], lanes) * code, [at])
            for v in range(wide):
                where = (task * wide + v, block, lanes_from(0, lanes))
                for row in range(rows):
                    at, sums = places[row][v], part[places[row][v]]
                    # The zero point times the sum of what it is subtracted from: once in a block.
                    sums = sums - zeros[where] * given[lanes_from(row * lanes, lanes)] if layout.zeros else sums
                    T.buffer_store(total, total[at] + sums * scales[where], [at])
        for row in range(rows):
            for v in range(wide):
                store(row, task * wide + v, total[places[row][v]])


def _many(
    rows: int, layout: Layout, machine: Machine, x: Any, words: Any, scales: Any, zeros: Any, store: Store
) -> None:
    """Each task converts the codes of some outputs once, and multiplies its rows with them in tiles."""
    from tvm.tirx.script.builder import ir as T

    lanes, per, steps = layout.lanes, layout.per, layout.block // layout.per
    height, width = tile(rows, layout.panels * lanes, machine)
    wide = next(w for w in range(max(1, width // lanes), 0, -1) if layout.panels % w == 0)
    groups, tiles = layout.panels // wide, rows // height
    chunks = max(1, min(tiles, -(-2 * machine.cores // groups)))
    each = -(-tiles // chunks)

    def multiplied(numbers: Any, first: Any, count: int, task: Any) -> None:
        sums = registers(count * wide * lanes)
        places = [[lanes_from((row * wide + v) * lanes, lanes) for v in range(wide)] for row in range(count)]
        for place in (p for line in places for p in line):
            T.buffer_store(sums, spread(T.float32(0), lanes), [place])
        with loop(layout.depth) as k:
            for row in range(count):
                number = spread(x[first + row, k], lanes)
                for v in range(wide):
                    at = places[row][v]
                    T.buffer_store(sums, sums[at] + number * numbers[k, lanes_from(v * lanes, lanes)], [at])
        for row in range(count):
            for v in range(wide):
                store(first + row, task * wide + v, sums[places[row][v]])

    with loop(groups * chunks, parallel=True) as both:
        task, chunk = (both // chunks, both % chunks) if chunks > 1 else (both, 0)
        numbers = T.alloc_buffer((layout.depth, wide * lanes), "float32", layout=None)
        with loop(layout.depth // layout.block) as block, loop(steps) as step:
            for v in range(wide):
                word = words[task * wide + v, block * steps + step, lanes_from(0, lanes)]
                for place in range(per):
                    code = layout.code(word, place, lanes)
                    if layout.zeros:
                        code = code - zeros[task * wide + v, block, lanes_from(0, lanes)]
                    code = code * scales[task * wide + v, block, lanes_from(0, lanes)]
                    k = block * layout.block + step * per + place
                    T.buffer_store(numbers, code, [k, lanes_from(v * lanes, lanes)])
        if tiles:
            with loop(each) as number:
                if chunks * each == tiles:
                    multiplied(numbers, (chunk * each + number) * height, height, task)
                else:
                    with T.If(chunk * each + number < tiles), T.Then():
                        multiplied(numbers, (chunk * each + number) * height, height, task)
        if rows % height:
            if chunks > 1:
                with T.If(chunk == chunks - 1), T.Then():
                    multiplied(numbers, tiles * height, rows % height, task)
            else:
                multiplied(numbers, tiles * height, rows % height, task)


def lookup(count: int, dtype: str, layout: Layout) -> Any:
    """``y[count, depth]``: the dequantized weights of the outputs that ``index`` names, from the end if negative.

    Args:
        count: How many rows are looked up.
        dtype: The dtype of the index.
        layout: How the table is packed.
    """
    from tvm.tirx.script.builder import ir as T

    steps = layout.block // layout.per
    arguments = [("index", (count,), dtype), *layout.arguments(), ("y", (count, layout.depth), "float32")]

    def body(index: Any, words: Any, scales: Any, *rest: Any) -> None:
        y = rest[-1]
        with loop(count, parallel=count * layout.depth > SERIAL) as number:
            given = T.cast(index[number], "int32")
            row = T.Select(given < 0, given + layout.outputs, given)
            panel, lane = row // layout.lanes, row % layout.lanes
            with loop(layout.depth // layout.block) as block, loop(steps) as step:
                word = words[panel, block * steps + step, lane]
                for place in range(layout.per):
                    code = layout.code(word, place, 1)
                    code = code - rest[0][panel, block, lane] if layout.zeros else code
                    where = block * layout.block + step * layout.per + place
                    T.buffer_store(y, code * scales[panel, block, lane], [number, where])

    return kernel(arguments, body)


def computed_row(layout: Layout) -> Any:
    """:func:`product` of one row as an expression of its operands, for targets with schedules of their own.

    The result has the dtype of ``x``; sums are float32. Panels have one output each.
    """
    from tvm import te

    def write(x: Any, words: Any, scales: Any, *zeros: Any) -> Any:
        numbers = _computed(layout, words, scales, zeros, "float32")
        k = te.reduce_axis((0, layout.depth), "k")
        shape, dtype = (1, layout.outputs), str(x.dtype)
        product = te.compute(shape, lambda i, j: te.sum(x[i, k].astype("float32") * numbers[j, k], axis=k), "product")
        return te.compute(shape, lambda i, j: product[i, j].astype(dtype), "rounded")

    return write


def computed_numbers(layout: Layout) -> Any:
    """The dequantized weight ``(outputs, depth)`` as an expression, in the dtype of ``x``.

    ``x`` is an operand so that TVM does not take the weight for a constant, and compute it at once.
    """

    def write(x: Any, words: Any, scales: Any, *zeros: Any) -> Any:
        return _computed(layout, words, scales, zeros, str(x.dtype))

    return write


def computed_product(x: Any, numbers: Any) -> Any:
    """``x @ numbers.T`` as an expression, in the form that tensor cores take."""
    from tvm import te

    k = te.reduce_axis((0, x.shape[1]), "k")
    return te.compute((x.shape[0], numbers.shape[0]), lambda i, j: te.sum(x[i, k] * numbers[j, k], axis=k), "product")


def computed_lookup(layout: Layout) -> Any:
    """:func:`lookup` as an expression, float32."""
    from tvm import te, tirx

    def write(index: Any, words: Any, scales: Any, *zeros: Any) -> Any:
        numbers = _computed(layout, words, scales, zeros, "float32")

        def element(i: Any, k: Any) -> Any:
            row = index[i].astype("int64")
            return numbers[tirx.Select(row < 0, row + layout.outputs, row), k]

        return te.compute((index.shape[0], layout.depth), element, "rows")

    return write


def _computed(layout: Layout, words: Any, scales: Any, zeros: Any, dtype: str) -> Any:
    """The dequantized weight, ``(outputs, depth)``."""
    from tvm import te, tirx

    def number(n: Any, k: Any) -> Any:
        # Unsigned: TVM may make signed ones wider, and what is shifted out of 32 bits would come back.
        word, place = words[n, k // layout.per, 0].astype("uint32"), (k % layout.per).astype("uint32")
        low = (word >> (place * tirx.const(layout.bits, "uint32"))) & tirx.const((1 << layout.bits) - 1, "uint32")
        value = low.astype("float32")
        if layout.signed:
            top = tirx.const(1 << (layout.bits - 1), "uint32")
            value = (low ^ top).astype("float32") - tirx.const(float(1 << (layout.bits - 1)), "float32")
        value = value - zeros[0][n, k // layout.block, 0] if zeros else value
        return (value * scales[n, k // layout.block, 0]).astype(dtype)

    return te.compute((layout.outputs, layout.depth), number, "numbers")
