"""Dimensions as models write them: numbers, names, and expressions such as ``past + 1``."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping

Sizes = dict[str, int]
"""A size for every symbol."""


def symbols_in(dim: str) -> list[str]:
    """The symbols of a dimension: itself, or the names in an expression such as ``past + 1``."""
    if not re.search(r"[-+*/]", dim):
        return [dim]
    try:
        tree = ast.parse(dim, mode="eval")
    except SyntaxError:
        return [dim]
    allowed = (ast.Expression, ast.BinOp, ast.operator, ast.Name, ast.Load, ast.Constant)
    if not all(isinstance(node, allowed) for node in ast.walk(tree)):
        return [dim]
    return [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]


def evaluate(dim: int | str, sizes: Mapping[str, int]) -> int:
    """The size of a dimension: a number, a symbol, or an expression of sums, differences, products and quotients."""
    if isinstance(dim, int):
        return dim
    if dim in sizes:
        return sizes[dim]
    return max(_value(ast.parse(dim, mode="eval").body, sizes), 0)


def _value(node: ast.expr, sizes: Mapping[str, int]) -> int:
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.Name(id=name):
            return sizes[name]
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _value(left, sizes), _value(right, sizes)
            match op:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
            return a // max(b, 1)
    raise ValueError(f"'{ast.unparse(node)}' is no size")
