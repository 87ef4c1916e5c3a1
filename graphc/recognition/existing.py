"""Attention that a model already has as one operator: without the transposes, repeats and caches around it."""

from __future__ import annotations

import onnx_ir as ir

from graphc import edit
from graphc.recognition.graph import Graph
from graphc.recognition.layout import Axes, fresh, resolve, trace
from graphc.recognition.operator import Heads, Operands, copies, onwards
from graphc.rewrites.base import Refused


def tidy(node: ir.Node, graph: Graph) -> str | None:
    """Let Attention read queries, keys and values where they are made, and append to the cache itself.

    Raises:
        Refused: It would have to be another operator.
    """
    others = [*node.inputs[4:], *(v for v in node.outputs[1:] if v.uses() or v.is_graph_output())]
    if any(value is not None for value in others):
        return None
    read = _axes(node, graph)
    if read is None:
        return None
    axes, result = read
    operand = dict(zip("qkv", node.inputs, strict=False))
    places = {role: list(trace(value, axes[role], graph)) for role, value in operand.items() if value is not None}
    copied = copies(places["k"])
    if copied != copies(places["v"]):
        raise Refused("keys and values have different heads")
    head = resolve(axes["heads"][0])
    shared = tuple(leaf for leaf in resolve(axes["shared"][0]) if leaf not in copied)
    if head[: len(shared)] != shared:
        raise Refused("the heads of the keys are repeated in another order than that of the queries")
    own = {name: resolve(axes[name][0]) for name in ("batch", "queries", "keys", "inner", "outer")}
    inner = own["inner"]
    operands = Operands(graph, node, places, onwards(node, result, graph), Heads(heads=head, shared=shared, **own))
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    causal = bool(edit.attribute(node, "is_causal", 0))
    plan = operands.plan([] if mask is None else [mask], cached=not causal)
    if plan.cache is None and not copied and plan.cost >= operands.cost():
        return None
    if plan.factor <= 0:
        raise Refused("the scale of the scores is not positive")
    size = inner[-1].size if len(inner) == 1 else None
    scale = edit.attribute(node, "scale") or (size**-0.5 if isinstance(size, int) else None)
    if scale is None:
        raise Refused("the size of the heads is not known")
    kept = ("is_causal", "softcap", "softmax_precision")
    attributes = {name: edit.attribute(node, name) for name in kept if name in node.attributes}
    done = operands.write(plan, mask, {"scale": scale * plan.factor, **attributes})
    return done.replace("recognised", "reads where its operands are made") if plan.cache is None else done


def _axes(node: ir.Node, graph: Graph) -> tuple[dict[str, Axes], Axes] | None:
    """The axes of every operand, and, by their names, each of its own; and those of the result."""
    shapes = [graph.dims(value) for value in node.inputs[:3]]
    if len(shapes) < 3 or any(shape is None for shape in shapes):
        return None
    q, k, v = (shape or () for shape in shapes)
    counts = edit.attribute(node, "q_num_heads", 0), edit.attribute(node, "kv_num_heads", 0)
    if {len(q), len(k), len(v)} == {4}:
        parts = [(q[0], q[1], q[2], q[3]), (k[0], k[1], k[2], k[3]), (v[0], v[1], v[2], v[3])]
    elif {len(q), len(k), len(v)} == {3} and all(counts):
        parts = []
        for shape, count in zip((q, k, v), (counts[0], counts[1], counts[1]), strict=True):
            width = shape[2]
            if not isinstance(width, int) or width % count:
                return None
            parts.append((shape[0], count, shape[1], width // count))
    else:
        return None
    (batch, heads, length, inner), (_, fewer, total, _), (_, _, _, outer) = parts
    if not isinstance(heads, int) or not isinstance(fewer, int) or heads % fewer:
        return None
    if {part[0] for part in parts} != {batch} or parts[2][1:3] != (fewer, total) or parts[1][3] != inner:
        return None
    b, s, t, d, n = (fresh(dim) for dim in (batch, length, total, inner, outer))
    g = fresh(fewer)
    h = g + fresh(heads // fewer)
    found: dict[str, Axes] = {name: (axis,) for name, axis in (("batch", b), ("queries", s), ("keys", t))}
    found |= {"inner": (d,), "outer": (n,), "heads": (h,), "shared": (g,)}
    if len(q) == 4:
        return found | {"q": (b, h, s, d), "k": (b, g, t, d), "v": (b, g, t, n)}, (b, h, s, n)
    return found | {"q": (b, s, h + d), "k": (b, t, g + d), "v": (b, t, g + n)}, (b, s, h + n)
