"""Pooling and resizing, and the spatial sizes that convolutions and pools make."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from graphc.axes.rules.registry import LETTERS, Line, NoRule, View, lines, rule, same, sizes
from graphc.axes.size import Size

same("AveragePool LpPool", "n c [*x] -> n c [*y]")
lines(
    """
    MaxPool       n c [*x] -> n c [*y], n c [*y]
    Col2Im        n [c] [l], , -> n [d] [*y]
    GridSample    n c [*x], n [*y] 2 -> n c [*y]
    RoiAlign      n c [*x], r 4, r -> r c [*y]
    MaxRoiPool    n c [*x], r 5 -> r c [*y]
    com.microsoft.NhwcMaxPool  n [*x] c -> n [*y] c
    """
)


@rule("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def global_pool(n: View) -> str:
    spatial = " ".join(["1"] * (n.rank() - 2))
    return f"n c [*x] -> n c {spatial}".rstrip()


def window(n: View, size: Sequence[Size], kernel: Sequence[Size], *, pool: bool) -> tuple[Size, ...]:
    """The spatial sizes after a convolution or a pool (ONNX operator specification, Conv and MaxPool)."""
    rank = len(size)
    strides = n.attr("strides", (1,) * rank)
    dilations = n.attr("dilations", (1,) * rank)
    pads = n.attr("pads", (0,) * (2 * rank))
    auto = n.attr("auto_pad", "NOTSET")
    rounding = math.ceil if pool and n.attr("ceil_mode", 0) else math.floor
    result: list[Size] = []
    for i in range(rank):
        length, k = size[i], kernel[i]
        if not isinstance(k, int):
            raise NoRule("the kernel has a dynamic size")
        extent = dilations[i] * (k - 1) + 1
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            out = -(-length // strides[i]) if isinstance(length, int) else (length + strides[i] - 1) // strides[i]
        else:
            padded = length if auto == "VALID" else length + pads[i] + pads[i + rank]
            free = padded - extent
            if isinstance(free, int):
                out = rounding(free / strides[i]) + 1
                if rounding is math.ceil and (out - 1) * strides[i] >= padded - pads[i + rank]:
                    out -= 1
            else:
                out = free // strides[i] + 1 if strides[i] != 1 else free + 1
        result.append(out)
    return tuple(result)


@sizes("Conv", "com.microsoft.FusedConv", "ConvInteger")
def conv_sizes(n: View) -> Mapping[str, Size | tuple[Size, ...]]:
    return {"y": window(n, n.shape(0)[2:], n.shape(1)[2:], pool=False)}


@sizes("QLinearConv")
def qlinear_conv_sizes(n: View) -> Mapping[str, Size | tuple[Size, ...]]:
    return {"y": window(n, n.shape(0)[2:], n.shape(3)[2:], pool=False)}


@sizes("com.microsoft.NhwcFusedConv")
def nhwc_conv_sizes(n: View) -> Mapping[str, Size | tuple[Size, ...]]:
    return {"y": window(n, n.shape(0)[1:-1], n.shape(1)[2:], pool=False)}


@sizes("MaxPool", "AveragePool", "LpPool")
def pool_sizes(n: View) -> Mapping[str, Size | tuple[Size, ...]]:
    return {"y": window(n, n.shape(0)[2:], n.attr("kernel_shape"), pool=True)}


@sizes("ConvTranspose")
def conv_transpose_sizes(n: View) -> Mapping[str, Size | tuple[Size, ...]]:
    """``stride * (size - 1) + output_padding + extent - pads``, or what ``output_shape`` and ``auto_pad`` say."""
    size, kernel = n.shape(0)[2:], n.shape(1)[2:]
    rank = len(size)
    given = n.attr("output_shape")
    if given is not None:
        return {"y": tuple(given[-rank:])}
    strides = n.attr("strides", (1,) * rank)
    dilations = n.attr("dilations", (1,) * rank)
    pads = n.attr("pads", (0,) * (2 * rank))
    more = n.attr("output_padding", (0,) * rank)
    if n.attr("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER"):
        return {"y": tuple(s * t for s, t in zip(size, strides, strict=True))}
    if n.attr("auto_pad", "NOTSET") == "VALID":
        pads = (0,) * (2 * rank)
    return {
        "y": tuple(
            (size[i] - 1) * strides[i] + more[i] + (kernel[i] - 1) * dilations[i] + 1 - pads[i] - pads[i + rank]
            for i in range(rank)
        )
    }


@rule("Resize", "Upsample")
def resize(n: View) -> Line:
    """Axes that keep their length are untouched; the others are interpolated."""
    shape = n.shape()
    rank = len(shape)
    names = list(LETTERS[:rank])
    axes = [a % rank for a in n.attr("axes", range(rank))]
    old = n.node.op_type == "Upsample" or n.version < 11
    factors = n.values(1 if old else 2) if not n.attr("scales") else list(n.attr("scales"))
    target = None if old else n.values(3)
    inputs, outputs = list(names), list(names)
    found: dict[str, Size | tuple[Size, ...]] = {}
    for k, axis in enumerate(axes):
        size: Size = shape[axis]
        length: Size | None = None
        if factors:
            factor = factors[k]
            same_length = factor == 1
            if isinstance(size, int) and isinstance(factor, float | int):
                length = math.floor(size * factor)
            elif isinstance(factor, float) and factor.is_integer():
                length = size * int(factor)
        elif target:
            same_length, length = target[k] == size, target[k]
            if n.attr("keep_aspect_ratio_policy", "stretch") != "stretch":
                same_length, length = False, None
        else:
            declared = n.declared()
            length = declared[axis] if declared else None
            same_length = length is not None and length == size and axis < 2
        if same_length:
            continue
        inputs[axis], outputs[axis] = f"[{names[axis]}]", f"[{names[axis]}_]"
        if length is not None:
            found[f"{names[axis]}_"] = length
    return Line(f"{' '.join(inputs)}{', ' * (n.inputs - 1)} -> {' '.join(outputs)}", found)


@rule("CenterCropPad")
def center_crop_pad(n: View) -> Line:
    shape = n.shape()
    axes = [a % len(shape) for a in n.attr("axes", range(len(shape)))]
    names = list(LETTERS[: len(shape)])
    inputs = [f"[{x}]" if i in axes else x for i, x in enumerate(names)]
    outputs = [f"[{x}_]" if i in axes else x for i, x in enumerate(names)]
    target = n.values(1)
    found = {f"{names[a]}_": s for a, s in zip(axes, target or (), strict=False)}
    return Line(f"{' '.join(inputs)},  -> {' '.join(outputs)}", found)


@rule("AffineGrid")
def affine_grid(n: View) -> Line:
    size = n.values(1)
    if size is None:
        raise NoRule("the size of the grid is not known")
    return Line("[n] [i] [j],  -> [n] [*y]", {"y": (*size[2:], len(size) - 2)})


@rule("MaxUnpool")
def max_unpool(n: View) -> str:
    return "n c [*x], n c [*x],  -> n c [*y]"
