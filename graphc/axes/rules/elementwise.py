"""Operators that work on each element alone; several inputs broadcast."""

from graphc.axes.rules.registry import View, lines, rule, same

UNARY = (
    "Abs Acos Acosh Asin Asinh Atan Atanh Bernoulli BitwiseNot Cast Ceil Celu Cos Cosh Elu Erf Exp Floor Gelu "
    "HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu "
    "Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu "
    "RandomNormalLike RandomUniformLike BitCast com.microsoft.QuickGelu com.microsoft.Gelu"
)
BINARY = (
    "Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual "
    "Mod Mul Or Pow Sub Xor"
)

same(UNARY, "... -> ...")
same(BINARY, "..., ... -> ...")
lines(
    """
    Where                      ..., ..., ... -> ...
    CastLike                   ..., . -> ...
    Dropout                    ..., ,  -> ..., ...
    com.microsoft.BiasGelu     ... c, c -> ... c
    com.microsoft.FastGelu     ... c, c -> ... c
    com.microsoft.BiasAdd      n s c, c, n s c -> n s c
    com.microsoft.BiasSplitGelu  n s (2 c), (2 c) -> n s c
    com.microsoft.BiasDropout  ... c, c, ..., ,  -> ... c, ... c
    """
)


@rule("Sum", "Max", "Min", "Mean")
def variadic(n: View) -> str:
    return ", ".join(["..."] * n.inputs) + " -> ..."


@rule("Clip")
def clip(n: View) -> str:
    return "..., , -> ..."


@rule("PRelu")
def prelu(n: View) -> str:
    """The slope broadcasts to the input, from the right; older exporters give it one axis less."""
    return "..., ... -> ..."
