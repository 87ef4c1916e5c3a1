"""What ONNX Runtime says when it cannot load or run a model, made readable."""

from __future__ import annotations

import re

from graphc.errors import BadInput


class CannotRun(BadInput):
    """ONNX Runtime does not load a model, or fails to run it.

    Attributes:
        message: What it said, without the places in its source.
        node: The node it names, if it names one.
        operator: ``(domain, operator)`` that it lacks, if that is the cause.
    """

    def __init__(
        self,
        what: str,
        *,
        message: str,
        node: str = "",
        operator: tuple[str, str] | None = None,
        where: str = "",
        why: str = "",
        hint: str = "",
    ) -> None:
        super().__init__(what, where=where, why=why or message, hint=hint)
        self.message, self.node, self.operator = message, node, operator


_PREFIX = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : ")
_SIGNATURE = re.compile(r"\S*/\S+\.(?:cc|h):\d+ .*?\) (?=[A-Z])", re.S)
_PLACE = re.compile(r"\b\w+\.(?:cc|h):\d+ \w+ ")

_NODE = r'In Node, \("(?P<node>[^"]*)", (?P<op>\w+), "(?P<domain>[^"]*)", -?\d+\)'
_UNKNOWN_OPERATOR = (
    re.compile(r"(?P<domain>[\w.]*):(?P<op>\w+)\(-?\d+\) is not a registered function/op"),
    re.compile(_NODE + r".*Error No (?:Op registered|opset import)", re.S),
)
_NO_KERNEL = re.compile(r"Could not find an implementation for (?P<op>[\w.:]+)\(\d+\) node with name '(?P<node>[^']*)'")
_AT_NODE = (
    re.compile(r".*while running \w+ node\. Name:'(?P<node>[^']*)' Status Message: (?P<why>.*)", re.S),
    re.compile(r"(?P<why>Type Error: .* in node \((?P<node>[^)]*)\).*)", re.S),
    re.compile(r"Node \((?P<node>[^)]*)\) Op \(\w+\) (?P<why>.*)", re.S),
    re.compile(_NODE + r".*?, (?:Status Message: |Error )?(?P<why>[^,]*)$", re.S),
)


def explain(error: Exception, what: str, where: str) -> CannotRun:
    """Turn an exception of ONNX Runtime into one that names the node or the operator it is about.

    Args:
        error: What was raised.
        what: What could not be done, the first line for the user.
        where: The model.
    """
    text = _PLACE.sub("", _SIGNATURE.sub("", _PREFIX.sub("", str(error))))
    text = " ".join(text.split()) or type(error).__name__
    for pattern in _UNKNOWN_OPERATOR:
        if match := pattern.search(text):
            domain, name = _standard(match["domain"]), match["op"]
            return CannotRun(
                what,
                message=text,
                node=match.groupdict().get("node") or "",
                operator=(domain, name),
                where=where,
                why=f"it does not know the operator {domain}:{name}".replace(" :", " "),
                hint="the model needs a library of custom operators, or another version of ONNX Runtime",
            )
    if match := _NO_KERNEL.search(text):
        domain, _, name = match["op"].rpartition(":")
        return CannotRun(
            what,
            message=text,
            node=match["node"],
            operator=(_standard(domain), name),
            where=where,
            why=f"it has no kernel for {match['op']} with the dtypes of node '{match['node']}'",
        )
    for pattern in _AT_NODE:
        if match := pattern.search(text):
            why = f"node '{match['node']}': {match['why'].strip()}"
            return CannotRun(what, message=text, node=match["node"], where=where, why=why)
    return CannotRun(what, message=text, where=where)


def _standard(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain
