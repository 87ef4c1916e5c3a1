"""Recurrent layers. Gates are digits of fixed size outside the hidden units; time is kept whole.

``hidden_size`` follows from the hidden axis. With both directions, each may lose other units (``dir`` is always
beside ``h``).
"""

from graphc.axes.rules.registry import Line, NoRule, View, rule

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@rule(*GATES)
def recurrent(n: View) -> Line:
    kind = n.node.op_type
    gates = GATES[kind]
    if n.attr("layout", 0):
        raise NoRule("the batch-first layout is not covered")

    def rows(count: int) -> str:
        return f"({count} h)" if count > 1 else "h"

    inputs = [
        "[s] b i",
        f"[dir] {rows(gates)} i",
        f"[dir] {rows(gates)} h",
        f"[dir] {rows(2 * gates)}",
        "b",
        "[dir] b h",
    ]
    outputs = ["[s] [dir] b h", "[dir] b h"]
    if kind == "LSTM":
        inputs += ["[dir] b h", f"[dir] {rows(3)}"]
        outputs += ["[dir] b h"]
    inputs = [text if n.has(k) else "" for k, text in enumerate(inputs)][: n.inputs]
    return Line(f"{', '.join(inputs)} -> {', '.join(outputs)}", {"h": n.shape(2)[2]})
