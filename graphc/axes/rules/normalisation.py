"""Normalisation layers: what they average over, and the parameters along their axes."""

from __future__ import annotations

from graphc.axes.rules.registry import LETTERS, Line, NoRule, View, lines, rule

lines(
    """
    InstanceNormalization  n c *x~, c, c -> n c *x
    LRN                    n [c] *x -> n [c] *x
    com.microsoft.SkipLayerNormalization            *b c~, *b c, c, c, c -> *b c, *b 1, *b 1, *b c
    com.microsoft.SkipSimplifiedLayerNormalization  *b c~, *b c, c, c -> *b c, *b 1, *b 1, *b c
    com.microsoft.EmbedLayerNormalization  b s, b s, [v] c~, [p] c, [t] c, c, c, b s, b s -> b s c, b, b s c
    """
)


@rule("BatchNormalization")
def batch_normalization(n: View) -> str:
    """At inference every channel is scaled on its own; in training mode batch statistics come out too."""
    if n.attr("training_mode", 0):
        return "n~ c *x~, c, c, c, c -> n c *x, c, c"
    return "n c *x, c, c, c, c -> n c *x" if n.rank() > 1 else "c, c, c, c, c -> c"


@rule(
    "LayerNormalization",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
    "com.microsoft.SimplifiedLayerNormalization",
)
def layer_normalization(n: View) -> str:
    """Averages from ``axis`` on; scale and bias broadcast from the right."""
    rank, axis = n.rank(), n.axis(-1)
    names = LETTERS[:rank]
    x = " ".join(name + "~" if i >= axis else name for i, name in enumerate(names))
    parameters = []
    for k in range(1, n.inputs):
        shape = n.shape(k) if n.has(k) else []
        own = names[rank - len(shape) :]
        parameters.append(" ".join("1" if s == 1 else name for s, name in zip(shape, own, strict=True)))
    count = " ".join(name if i < axis else "1" for i, name in enumerate(names))
    return f"{', '.join([x, *parameters])} -> {' '.join(names)}, {count}, {count}"


@rule("GroupNormalization")
def group_normalization(n: View) -> Line:
    """Opset 21 scales every channel, opset 18 every group."""
    groups = n.attr("num_groups")
    per = "(g c)" if n.shape(1) == [n.shape(0)[1]] else "g"
    return Line(f"n (g c~) *x~, {per}, {per} -> n (g c) *x", {"g": groups})


@rule("com.microsoft.GroupNorm")
def group_norm_ms(n: View) -> Line:
    last = n.attr("channels_last", 1)
    x, y = ("n *x~ (g c~)", "n *x (g c)") if last else ("n (g c~) *x~", "n (g c) *x")
    return Line(f"{x}, (g c), (g c) -> {y}", {"g": n.attr("groups")})


@rule("com.microsoft.SkipGroupNorm")
def skip_group_norm(n: View) -> Line:
    last = n.attr("channels_last", 1)
    x, y = ("n *x~ (g c~)", "n *x (g c)") if last else ("n (g c~) *x~", "n (g c) *x")
    if n.rank(4) != n.rank(0) or n.shape(4) != n.shape(0):
        raise NoRule("a skip that broadcasts is not covered")
    return Line(f"{x}, (g c), (g c), {y}, (g c) -> {y}, {y}", {"g": n.attr("groups")})


@rule("MeanVarianceNormalization")
def mean_variance(n: View) -> str:
    axes = {a % n.rank() for a in n.attr("axes", (0, 2, 3))}
    names = LETTERS[: n.rank()]
    marked = " ".join(name + "~" if i in axes else name for i, name in enumerate(names))
    return f"{marked} -> {' '.join(names)}"
