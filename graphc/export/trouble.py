"""What went wrong while a module was exported: in plain words, with the module and the line of the user's code."""

from __future__ import annotations

import re
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from graphc.errors import BadInput

if TYPE_CHECKING:
    import torch

_DATA_DEPENDENT = (
    r"data-dependent|DataDependent|GuardOnDataDependent|Dynamic control flow|aten::_local_scalar_dense"
    r"|nonzero is not|Cannot convert.* symbols to|aten::is_nonzero"
)
_CAUSES: tuple[tuple[str, str, str], ...] = (
    (
        _DATA_DEPENDENT,
        "its control flow, or a size, depends on the values of a tensor, and a graph has only one course",
        "replace the branch by torch.where, or by torch.cond; replace .item() and .tolist() by tensor operations; "
        "move the decision out of forward",
    ),
    (
        r"fake tensor.*found in|Unhandled FakeTensor Device|[Ee]xpected all tensors to be on the same device",
        "its tensors are on different devices",
        "move the module and the example inputs to one device: module.cpu(), x.cpu()",
    ),
    (
        r"expected (m1 and m2|.*scalar type|.*dtype)|same dtype|must have the same dtype|Expected tensor for argument.*"
        r"scalar types",
        "an input has another dtype than the module expects",
        "give example inputs in the dtypes that the module takes, such as int64 for token ids",
    ),
    (
        r"shapes cannot be multiplied|size of tensor a|sizes do not match|[Ee]xpected input.*channels|invalid for input"
        r" of size|index out of range|out of bounds|dimension.*mismatch|normalized_shape",
        "the example inputs do not fit: shape or value",
        "give example inputs with which the module runs",
    ),
    (
        r"No ONNX function found|DispatchError|No decompositions registered",
        "ONNX has no form for an operator that it uses",
        "write that part with other torch operations",
    ),
    (
        r"Constraints violated|ConstraintViolation|marked .* as dynamic but",
        "an axis that was asked to be dynamic must have one size",
        "leave that axis out of the dynamic ones",
    ),
)
"""A pattern in the error's text or type, the cause in plain words, and what to try."""


def summary(error: BaseException) -> str:
    """The first line that says something, at most 160 characters."""
    root = cause(error)
    # What follows is of use to torch's developers.
    text = re.split(r"\s*\(unhinted|\n\s*(?:Caused by|Developer debug|For more information|from user code)", str(root))[
        0
    ]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    text = f"{type(root).__name__}: {lines[0]}" if lines else type(root).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."


def cause(error: BaseException) -> BaseException:
    """What an exception that only wraps others was raised from."""
    while error.__cause__ is not None and type(error).__name__ in ("TorchExportError", "ConversionError", "UserError"):
        error = error.__cause__
    return error


def is_final(error: BaseException) -> bool:
    """Whether no other way of tracing can help: the example inputs themselves do not run."""
    return isinstance(error, BadInput | KeyboardInterrupt | MemoryError)


class Untraceable(BadInput):
    """``torch.export`` or the ONNX exporter failed on something that recording one run of the module may manage."""


def is_data_dependent(error: BaseException) -> bool:
    """Whether the values of tensors decide on the course or on a size, which no way of tracing can follow."""
    return re.search(_DATA_DEPENDENT, f"{type(error).__name__} {error}") is not None


def explain(module: torch.nn.Module, error: BaseException, what: str = "the module cannot be exported") -> BadInput:
    """The error that the user is shown: where in the module and in whose code, why, and what to try.

    Args:
        module: What was run or traced.
        error: What was raised.
        what: What failed.
    """
    if isinstance(error, BadInput):
        return error
    text = f"{type(error).__name__} {error}"
    for pattern, words, advice in _CAUSES:
        if re.search(pattern, text, re.DOTALL):
            return BadInput(what, where=where(module, error), why=f"{words} ({summary(error)})", hint=advice)
    hint = "run the module on the example inputs to see whether it runs at all"
    return Untraceable(what, where=where(module, error), why=summary(error), hint=hint)


def where(module: torch.nn.Module, error: BaseException) -> str:
    """``layer.0.attention (Attention), model.py:12: line of code``, as far as it is known."""
    names = {id(each): name for name, each in module.named_modules()}
    path, kind, code = "", "", ""
    for tb, frame in frames(error):
        owner = frame.f_locals.get("self")
        if id(owner) in names:
            path, kind = names[id(owner)], type(owner).__name__
        if is_users(frame.f_code.co_filename):
            code = line(frame.f_code.co_filename, tb.tb_lineno)
    code = code or user_code(str(error))
    module_text = f"{path} ({kind})" if path else kind or type(module).__name__
    return ", ".join(filter(None, (module_text, code)))


def frames(error: BaseException) -> list[tuple[TracebackType, Any]]:
    """The traceback of an error and of what it was raised from, with its frames, outermost first."""
    found = []
    tb = error.__traceback__
    while tb is not None:
        found.append((tb, tb.tb_frame))
        tb = tb.tb_next
    inner = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return found + (frames(inner) if inner is not None else [])


def is_users(filename: str) -> bool:
    """Whether a file is the user's own code: neither torch's, nor graphc's, nor Python's."""
    import torch

    ours = (Path(torch.__file__).parent, Path(__file__).parent.parent)
    if filename.startswith("<") or "site-packages/onnxscript" in filename or "/lib/python" in filename:
        return "site-packages" in filename and not any(Path(filename).is_relative_to(p) for p in ours)
    return not any(Path(filename).is_relative_to(p) for p in ours)


def line(filename: str, number: int) -> str:
    """``model.py:12: code``, below the current folder if it is there."""
    import linecache

    code = linecache.getline(filename, number).strip()
    path = Path(filename)
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return f"{shown}:{number}" + (f": {code}" if code else "")


def user_code(text: str) -> str:
    """The last line of the user's code that torch quotes in its message."""
    found = re.findall(r'File "([^"]+)", line (\d+)', text)
    users = [(name, int(number)) for name, number in found if is_users(name)]
    return line(*users[-1]) if users else ""
