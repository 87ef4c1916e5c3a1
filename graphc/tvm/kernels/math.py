"""Functions of vectors: TVM calls the C library for each element of one."""

from __future__ import annotations

from typing import Any

from graphc.tvm.kernels.writing import cast, spread

_LOG2E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
"""The polynomial of Cephes' ``expf`` (Moshier, 1989) for ``(exp(r) - 1 - r) / r**2``, ``|r| <= ln 2 / 2``."""

_MOST = 87.0
"""Where ``exp`` is cut off: just within the normal numbers of float32."""


def exp(x: Any, lanes: int) -> Any:
    """``e**x`` of a float32 vector, to two units in the last place; cut off at both ends of the range."""
    from tvm.tirx.script.builder import ir as T

    def number(value: float) -> Any:
        return spread(T.float32(value), lanes)

    x = T.max(T.min(x, number(_MOST)), number(-_MOST))
    n = T.floor(x * number(_LOG2E) + number(0.5))
    r = x - n * number(_LN2_HIGH) - n * number(_LN2_LOW)
    p = number(_EXP[0])
    for factor in _EXP[1:]:
        p = p * r + number(factor)
    power = T.shift_left(cast(n, "int32", lanes) + spread(T.int32(127), lanes), spread(T.int32(23), lanes))
    dtype = "float32" if lanes == 1 else f"float32x{lanes}"
    return (p * r * r + r + number(1)) * T.reinterpret(dtype, power)


def sigmoid(x: Any, lanes: int) -> Any:
    """``1 / (1 + e**-x)``."""
    from tvm.tirx.script.builder import ir as T

    one = spread(T.float32(1), lanes)
    return one / (one + exp(-x, lanes))


def tanh(x: Any, lanes: int) -> Any:
    """``1 - 2 / (e**2x + 1)``: right to a unit in the last place of 1."""
    from tvm.tirx.script.builder import ir as T

    one, two = spread(T.float32(1), lanes), spread(T.float32(2), lanes)
    return one - two / (exp(two * x, lanes) + one)
