"""MatMul and Einsum as one thing: two operands whose axes are shared with each other or with the result."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graphc import edit
from graphc.recognition.graph import Graph
from graphc.recognition.layout import Axes, Axis, Leaf, fresh, resolve, sizes
from graphc.rewrites.base import Refused
from graphc.shapes import Shape

OPERATORS = ("MatMul", "Einsum")


@dataclass(frozen=True)
class Product:
    """A product of two values.

    Attributes:
        node: The MatMul or Einsum.
        values: Its two operands.
        operands: Their axes; where one is broadcast, its axis has no leaves.
        result: The axes of the result.
        summed: The leaves that are summed.
    """

    node: ir.Node
    values: tuple[ir.Value, ir.Value]
    operands: tuple[Axes, Axes]
    result: Axes

    @property
    def summed(self) -> frozenset[Leaf]:
        out = {leaf for axis in self.result for leaf in resolve(axis)}
        return frozenset(leaf for axis in self.operands[0] for leaf in resolve(axis) if leaf not in out)


def is_product(node: ir.Node | None) -> bool:
    """Whether a node multiplies two values neither of which is constant."""
    if not edit.is_op(node, *OPERATORS) or node is None or len(node.inputs) != 2:
        return False
    return all(value is not None and edit.tensor(value) is None for value in node.inputs)


def read(node: ir.Node, graph: Graph, given: tuple[int, Axes] | None = None) -> Product:
    """The axes of a product.

    Args:
        node: For which ``is_product`` holds.
        graph: The graph.
        given: One operand and its axes, if they are known.

    Raises:
        Refused: Sizes are not known, or not known to be equal.
    """
    a, b = node.inputs
    assert a is not None and b is not None
    shapes = graph.dims(a), graph.dims(b)
    if shapes[0] is None or shapes[1] is None:
        raise Refused("the rank of a product's operand is not known")
    letters = _letters(node, shapes[0], shapes[1])
    known: dict[str, Axis] = {}
    broadcast: tuple[set[str], set[str]] = (set(), set())
    if given is not None:
        side, axes = given
        # What is known of the axes counts, not what a broadcast might have made of them.
        shapes = (sizes(axes), shapes[1]) if side == 0 else (shapes[0], sizes(axes))
        assert shapes[0] is not None and shapes[1] is not None
        for letter, axis, dim in zip(letters[side], axes, shapes[side] or (), strict=True):
            if dim == 1 and shapes[1 - side] is not None and letter in letters[1 - side]:
                other = shapes[1 - side][letters[1 - side].index(letter)]
                if other != 1:
                    broadcast[side].add(letter)
                    continue
            known[letter] = axis
    found: list[Axes] = []
    for side in (0, 1):
        own, own_shape = letters[side], shapes[side]
        other_letters, other_shape = letters[1 - side], shapes[1 - side]
        assert own_shape is not None and other_shape is not None
        made: list[Axis] = []
        for letter, dim in zip(own, own_shape, strict=True):
            if letter in other_letters:
                other = other_shape[other_letters.index(letter)]
                if dim == 1 and other != 1:
                    made.append(())
                    continue
                if other not in (dim, 1):
                    raise Refused("two sizes that a product needs equal are not known to be")
            if letter not in known:
                known[letter] = fresh(dim)
            made.append(known[letter])
        found.append(tuple(made))
    return Product(node, (a, b), (found[0], found[1]), tuple(known[letter] for letter in letters[2]))


def _letters(node: ir.Node, a: Shape, b: Shape) -> tuple[str, str, str]:
    """One letter an axis: of both operands and of the result."""
    if edit.is_op(node, "Einsum"):
        equation = str(edit.attribute(node, "equation", "")).replace(" ", "")
        terms, _, out = equation.partition("->")
        operands = terms.split(",")
        if "." in equation or len(operands) != 2 or not out or any(len(set(t)) != len(t) for t in (*operands, out)):
            raise Refused("the equation of the Einsum is not that of one plain product")
        if len(operands[0]) != len(a) or len(operands[1]) != len(b):
            raise Refused("the equation of the Einsum does not fit its operands")
        return operands[0], operands[1], out
    if len(a) < 2 or len(b) < 2:
        raise Refused("an operand of the product is a vector")
    batch = "abcdefgh"[: max(len(a), len(b)) - 2]
    left, right = batch[len(batch) - len(a) + 2 :] + "mk", batch[len(batch) - len(b) + 2 :] + "kn"
    return left, right, batch + "mn"
