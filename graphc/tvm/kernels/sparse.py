"""Products with a weight of which only some tiles are kept.

Tiles of ``high`` outputs and ``deep`` inputs lie in the order of their outputs: ``starts[b]`` is the number of the
first tile of the outputs from ``b * high`` on, ``places`` has where the inputs of each tile begin. Tall tiles are
computed in vectors of outputs, values as ``(tiles, deep, high)``; flat ones in vectors of inputs, ``(tiles, high,
deep)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graphc.tvm.kernels.writing import kernel, lanes_from, loop, registers, spread
from graphc.tvm.nest import SERIAL, Machine

_ROWS = 6
"""Rows at most that share what is read of a tile."""


@dataclass(frozen=True)
class Tiles:
    """How the tiles of a weight lie.

    Attributes:
        outputs: Of the weight.
        depth: Its inputs.
        high: Outputs of a tile.
        deep: Its inputs.
        count: How many tiles are kept.
    """

    outputs: int
    depth: int
    high: int
    deep: int
    count: int

    @property
    def tall(self) -> bool:
        """Whether vectors are of outputs."""
        return not self.high % 8 or (not self.high % 4 and self.deep % 8 > 0)

    @property
    def lanes(self) -> int:
        """Numbers in a vector: 0 if no side fills one."""
        side = self.high if self.tall else self.deep
        return next((lanes for lanes in (8, 4) if side % lanes == 0), 0)

    @property
    def values(self) -> tuple[int, int, int]:
        """The shape of the values."""
        return (self.count, self.deep, self.high) if self.tall else (self.count, self.high, self.deep)


def product(rows: int, tiles: Tiles, machine: Machine) -> Any:
    """``y[rows, outputs] = x[rows, depth] @ weight.T``, float32."""
    bands = tiles.outputs // tiles.high
    arguments = [
        ("x", (rows, tiles.depth), "float32"),
        ("starts", (bands + 1,), "int32"),
        ("places", (tiles.count,), "int32"),
        ("values", tiles.values, "float32"),
        ("y", (rows, tiles.outputs), "float32"),
    ]
    write = _tall if tiles.tall else _flat
    vectors = tiles.high // tiles.lanes if tiles.tall else tiles.high
    height = min(rows, max(1, min(_ROWS, (machine.registers - 4) // vectors)))

    def body(x: Any, starts: Any, places: Any, values: Any, y: Any) -> None:
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        # Rows outside: a band's tiles stay in the cache for all of them, and few rows still keep all threads busy.
        with loop(bands, parallel=rows * tiles.count * tiles.high * tiles.deep > SERIAL) as band:
            mine = Band(tiles, x, places, values, y, band, starts[band], starts[band + 1])
            if rows // height:
                with loop(rows // height) as part:
                    write(mine, part * height, height)
            if rows % height:
                left = tirx.const(rows - rows % height, "int32")
                write(mine, left, rows % height)
        del T

    return kernel(arguments, body)


@dataclass(frozen=True)
class Band:
    """The tiles of one band of outputs, while the loops over them are written.

    Attributes:
        tiles: Their sizes.
        x: What they are multiplied with, ``(rows, depth)``.
        places: Where each tile begins along the depth.
        values: Their numbers.
        y: The result, ``(rows, outputs)``.
        number: Which band it is.
        first, last: Its tiles, the last one excluded.
    """

    tiles: Tiles
    x: Any
    places: Any
    values: Any
    y: Any
    number: Any
    first: Any
    last: Any


def _tall(band: Band, row: Any, count: int) -> None:
    from tvm.tirx.script.builder import ir as T

    tiles, x, values = band.tiles, band.x, band.values
    lanes, vectors = tiles.lanes, tiles.high // tiles.lanes
    sums = registers(count * tiles.high)
    for at in range(count * vectors):
        T.buffer_store(sums, spread(T.float32(0), lanes), [lanes_from(at * lanes, lanes)])
    with T.serial(band.first, band.last) as tile:
        for k in range(tiles.deep):
            for i in range(count):
                number = spread(x[row + i, band.places[tile] + k], lanes)
                for v in range(vectors):
                    at = lanes_from((i * vectors + v) * lanes, lanes)
                    value = values[tile, k, lanes_from(v * lanes, lanes)]
                    T.buffer_store(sums, sums[at] + number * value, [at])
    for i in range(count):
        for v in range(vectors):
            at = lanes_from((i * vectors + v) * lanes, lanes)
            T.buffer_store(band.y, sums[at], [row + i, lanes_from(band.number * tiles.high + v * lanes, lanes)])


def _flat(band: Band, row: Any, count: int) -> None:
    from tvm.tirx.script.builder import ir as T

    tiles, x, values = band.tiles, band.x, band.values
    lanes = tiles.lanes
    sums = registers(count * tiles.high * lanes)
    for at in range(count * tiles.high):
        T.buffer_store(sums, spread(T.float32(0), lanes), [lanes_from(at * lanes, lanes)])
    with T.serial(band.first, band.last) as tile:
        for k in range(0, tiles.deep, lanes):
            for i in range(count):
                numbers = x[row + i, lanes_from(band.places[tile] + k, lanes)]
                for j in range(tiles.high):
                    at = lanes_from((i * tiles.high + j) * lanes, lanes)
                    value = values[tile, j, lanes_from(k, lanes)]
                    T.buffer_store(sums, sums[at] + numbers * value, [at])
    for i in range(count):
        for j in range(tiles.high):
            total = sums[(i * tiles.high + j) * lanes]
            for lane in range(1, lanes):
                total = total + sums[(i * tiles.high + j) * lanes + lane]
            T.buffer_store(band.y, total, [row + i, band.number * tiles.high + j])
