"""The rule language: golden text of every rule, and what is not in the language."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphc.axes import notation
from graphc.axes.notation import Ellipsis_, Name, Number, Pattern, Product, Rule, RuleError, Star, Sum
from graphc.axes.rules import operators, text_of
from graphc.axes.trace import Trace

GOLDEN = Path(__file__).parent / "data" / "rules.txt"

names = st.sampled_from(["a", "b", "c", "heads", "x1", "k_"])
plain = st.builds(Name, names, st.sampled_from(["", "~", "^"]), st.booleans())
stars = st.builds(Star, names, st.sampled_from(["", "~"]), st.booleans())
numbers = st.builds(Number, st.integers(1, 9))
terms = st.recursive(
    plain | numbers,
    lambda inner: (
        st.builds(Product, st.lists(inner, min_size=2, max_size=3).map(tuple))
        | st.builds(Sum, st.lists(inner, min_size=2, max_size=3).map(tuple))
    ),
    max_leaves=6,
)
patterns = (
    st.builds(Pattern, st.lists(terms, max_size=3).map(tuple))
    | st.builds(Pattern, st.tuples(stars, terms))
    | st.builds(Pattern, st.tuples(st.builds(Ellipsis_), terms))
    | st.just(Pattern(whole=True))
    | st.just(Pattern(free=True))
    | st.builds(Pattern, st.lists(plain, min_size=1, max_size=2).map(tuple), indexes=names)
)
rules = st.builds(
    Rule,
    st.lists(patterns, min_size=1, max_size=3).map(tuple),
    st.lists(patterns, min_size=1, max_size=3).map(tuple),
    st.sampled_from(["", "Conv", "com.microsoft.FusedConv"]),
)


@given(rules)
def test_what_is_printed_is_read_back(rule: Rule) -> None:
    assert notation.parse(str(rule)) == rule


@pytest.mark.parametrize(
    "line",
    [
        "a b",
        "a -> b -> c",
        "(a b -> c",
        "a) -> b",
        "[a -> b",
        "a@ -> b",
        "(a + b c) -> a",
        "(*x + b) -> a",
        "a $ -> b",
        "Conv(group)  a -> b",
        "* -> a",
    ],
)
def test_what_is_not_in_the_language(line: str) -> None:
    with pytest.raises(RuleError):
        notation.parse(line)


def test_attributes_bind_names() -> None:
    rule = notation.parse("Conv(group=g:1)   n (g i), (g o) i -> n (g o)")
    assert rule.attributes == (("group", "g", 1),)
    assert str(rule) == "Conv(group=g:1)  n (g i), (g o) i -> n (g o)"


NODES = """
Transpose            perm=[0,2,1]                    | float[2,3,4]
Reshape              const=0,0,12,64                 | float[2,5,768]
Reshape              const=-1,64                     | float[2,12,64]
Reshape              const=2,6,10                    | float[2,4,15]
Flatten              axis=1                          | float[2,3,4,4]
Squeeze              const=1                         | float[2,1,4]
Unsqueeze            const=0,3                       | float[2,4]
Expand               const=2,8,3,4                   | float[2,1,3,4]
Tile                 const=1,3                       | float[2,4]
Concat               axis=1                          | float[2,3,4], float[2,5,4]
Split                axis=1 num_outputs=3            | float[2,6,4]
Slice                const=2 const=5 const=1         | float[2,8]
Slice                const=-1 const=-9999 const=1 const=-1 | float[2,8]
Slice                const=1 const=9999 const=1 const=2 | float[2,8]
Pad                  const=0,2,0,3                   | float[2,8]
Gather               axis=1 const=3,1,2,0            | float[2,4]
Gather               axis=1 const=0,0,1,1            | float[2,2]
Gather               axis=1 const=0,1,0,1            | float[2,2]
Gather               axis=1 const=1,2                | float[2,4]
Gather               axis=0                          | float[9,4], int64[2,3]
DepthToSpace         blocksize=2                     | float[2,8,3,3]
SpaceToDepth         blocksize=2                     | float[2,8,4,4]
MatMul                                               | float[2,3,4], float[4,5]
MatMul                                               | float[4], float[2,4,5]
Gemm                 transB=1                        | float[2,4], float[5,4], float[5]
Einsum               equation="bhqd,bhkd->bhqk"      | float[2,3,4,5], float[2,3,6,5]
Softmax              axis=1                          | float[2,3,4]
ReduceMean           keepdims=0 const=1              | float[2,3,4]
ReduceMax            keepdims=1 const=1              | float[2,3,4]
LayerNormalization   axis=-1                         | float[2,3,4], float[4], float[4]
LayerNormalization   axis=1                          | float[2,3,4], float[3,4]
GroupNormalization   num_groups=2                    | float[2,6,4], float[6], float[6]
TopK                 const=2                         | float[2,8]
Resize               const= const= const=2,4,8,8     | float[2,4,4,4]
QuantizeLinear       axis=1                          | float[2,4], float[4], int8[4]
DequantizeLinear     axis=1 block_size=2             | int8[2,8], float[2,4]
LSTM                 hidden_size=5                   | float[7,2,3], float[1,20,3], float[1,20,5], float[1,40]
Attention            q_num_heads=4 kv_num_heads=2    | float[2,5,32], float[2,5,16], float[2,5,16]
"""


def _node(line: str) -> tuple[ir.Node, ir.Model]:
    head, _, shapes = line.partition("|")
    operator, *rest = head.split()
    inputs = []
    for i, text in enumerate(s.strip() for s in shapes.replace("],", "];").split(";")):
        dtype, dims = text.rstrip("]").split("[")
        kind = ir.DataType[dtype.upper()]
        inputs.append(
            ir.Value(name=f"x{i}", shape=ir.Shape([int(d) for d in dims.split(",")]), type=ir.TensorType(kind))
        )
    attributes: list[ir.Attr] = []
    operands: list[ir.Value | None] = list(inputs)
    constants: list[ir.Value] = []
    for word in rest:
        name, _, value = word.partition("=")
        if name == "const":
            if not value:
                operands.append(None)
                continue
            array = np.array([int(v) for v in value.split(",")], dtype=np.int64)
            held = ir.Value(name=f"c{len(constants)}", const_value=ir.tensor(array))
            constants.append(held)
            operands.append(held)
        elif value.startswith("["):
            attributes.append(ir.AttrInt64s(name, [int(v) for v in value.strip("[]").split(",")]))
        elif value.startswith('"'):
            attributes.append(ir.AttrString(name, value.strip('"')))
        else:
            attributes.append(ir.AttrInt64(name, int(value)))
    count = int(dict(w.split("=", 1) for w in rest).get("num_outputs", "1"))
    node = ir.Node("", operator, operands, attributes, num_outputs=count)
    for i, out in enumerate(node.outputs):
        out.name = f"y{i}"
    graph = ir.Graph(inputs, node.outputs, nodes=[node], initializers=constants, opset_imports={"": 23})
    return node, ir.Model(graph, ir_version=10)


def _golden() -> str:
    lines = ["# Rules that are the same for every node", ""]
    lines += [text for operator in operators() if (text := text_of(operator))]
    lines += ["", "# Rules of single nodes", ""]
    for line in NODES.strip().splitlines():
        node, model = _node(line)
        trace = Trace(model, interface=True)
        rule = str(trace.bound[node].rule) if node in trace.bound else "none"
        lines += [line, f"    {rule}"]
    lines += ["", "# Operators whose rule depends on the node", ""]
    lines += [operator for operator in operators() if not text_of(operator)]
    return "\n".join(lines) + "\n"


def test_golden() -> None:
    """Regenerate the file with ``python tests/test_axes_notation.py`` and read the difference."""
    assert _golden() == GOLDEN.read_text()


if __name__ == "__main__":
    GOLDEN.write_text(_golden())
