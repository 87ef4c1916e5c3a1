"""Exponentials and their kin as polynomials, which vectors can compute: TVM would call the C library for each number.

The errors are those of float32 arithmetic, some units in the last place; infinities and NaN come out as they should.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

# Cephes' expf: ln 2 in two parts, and the polynomial of (exp(r) - 1 - r) / r^2 for |r| <= ln(2) / 2.
_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
_EXP = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
_LOWEST, _HIGHEST = -104.0, 89.0
"""Where the exponential has become zero, and infinite."""

# Eigen's rational functions of x^2, by falling powers: numerator (times x) and denominator.
_ERF = (
    (
        -2.72614225801306e-10,
        2.77068142495902e-08,
        -2.10102402082508e-06,
        -5.69250639462346e-05,
        -7.34990630326855e-04,
        -2.95459980854025e-03,
        -1.60960333262415e-02,
    ),
    (
        -1.45660718464996e-05,
        -2.13374055278905e-04,
        -1.68282697438203e-03,
        -7.37332916720468e-03,
        -1.42647390514189e-02,
    ),
    4.0,
)
_TANH = (
    (
        -2.76076847742355e-16,
        2.00018790482477e-13,
        -8.60467152213735e-11,
        5.12229709037114e-08,
        1.48572235717979e-05,
        6.37261928875436e-04,
        4.89352455891786e-03,
    ),
    (
        1.19825839466702e-06,
        1.18534705686654e-04,
        2.26843463243900e-03,
        4.89352518554385e-03,
    ),
    9.0,
)


@cache
def register() -> None:
    """Make TVM lower these functions of float32 in this way for processors, from now on in this process."""
    from tvm.ir import Op
    from tvm.tirx.op import register_intrin_lowering

    for name, rule in _RULES.items():
        op = Op.get(name)
        known = op.get_attr("llvm.FLowerIntrinsic") or op.get_attr("default.FLowerIntrinsic")

        def lowered(call: Any, rule: Callable[[Any], Any] = rule, known: Any = known) -> Any:
            if str(call.ty.dtype).partition("x")[0] == "float32":
                return rule(call.args[0])
            return known(call) if known else call

        register_intrin_lowering(name, target="llvm", f=lowered, level=99)


def _bound(builder: Any, call: Any) -> Any:
    """Let NaN through: TVM's own ``max(x, 0)`` is compiled as ``x > 0 ? x : 0``, this as ``0 > x ? 0 : x``."""
    from tvm import te, tirx

    low, high = (0.0, math.inf) if len(call.args) == 1 else (float(each.value) for each in call.args[1:])

    def within(x: Any) -> Any:
        def element(*place: Any) -> Any:
            value = x[place]
            value = value if low == -math.inf else tirx.Max(tirx.const(low, x.dtype), value)
            return value if high == math.inf else tirx.Min(tirx.const(high, x.dtype), value)

        return te.compute(x.shape, element, name="bound")

    return builder.call_te(within, call.args[0], primfunc_name_hint="bound")


BOUNDS = {"relax.nn.relu": _bound, "relax.clip": _bound}
"""What operators become, by name, in place of TVM's own loops."""


def _exp(x: Any) -> Any:
    from tvm import tirx

    lanes = str(x.ty.dtype).removeprefix("float32")
    integers = f"int32{lanes}"
    clamped = tirx.max(tirx.min(x, _like(x, _HIGHEST)), _like(x, _LOWEST))
    power = tirx.floor(clamped * _like(x, _LOG2_E) + _like(x, 0.5))
    rest = clamped - power * _like(x, _LN2_HIGH) - power * _like(x, _LN2_LOW)
    value = _polynomial(_EXP, rest) * rest * rest + rest + _like(x, 1.0)
    # Twice a half: each is an exponent of its own, and the smallest results come out, too.
    whole = power.astype(integers)
    half = whole >> tirx.const(1, integers)
    for part in (half, whole - half):
        bits = (part + tirx.const(127, integers)) << tirx.const(23, integers)
        value = value * tirx.reinterpret(x.ty.dtype, bits)
    return tirx.Select(tirx.EQ(x, x), value, x)


def _sigmoid(x: Any) -> Any:
    one = _like(x, 1.0)
    return one / (one + _exp(_like(x, 0.0) - x))


def _rational(numerator: Sequence[float], denominator: Sequence[float], end: float) -> Callable[[Any], Any]:
    def rule(x: Any) -> Any:
        from tvm import tirx

        clamped = tirx.max(tirx.min(x, _like(x, end)), _like(x, -end))
        square = clamped * clamped
        value = clamped * _polynomial(numerator, square) / _polynomial(denominator, square)
        return tirx.Select(tirx.EQ(x, x), value, x)

    return rule


def _polynomial(factors: Sequence[float], x: Any) -> Any:
    """By falling powers."""
    value = _like(x, factors[0])
    for factor in factors[1:]:
        value = value * x + _like(x, factor)
    return value


def _like(x: Any, number: float) -> Any:
    from tvm import tirx

    return tirx.const(number, x.ty.dtype)


_RULES: dict[str, Callable[[Any], Any]] = {
    "tirx.erf": _rational(*_ERF),
    "tirx.exp": _exp,
    "tirx.sigmoid": _sigmoid,
    "tirx.tanh": _rational(*_TANH),
}
