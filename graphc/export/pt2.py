"""``.pt2`` files of ``torch.export.save``, read without running anything that is in them.

``torch.export.load`` of torch 2.13 would run code of a file in five places: it unpickles weights, constants and sample
inputs; it evaluates size expressions with SymPy's ``sympify``; it looks up the targets of nodes by name, in all of
``torch``; it imports the modules that container types name; and it executes the guards. So the parts are read
before it sees the file, and what is not data is refused; pickles are limited to tensors.
"""

from __future__ import annotations

import ast
import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphc.errors import BadInput

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_SAVE_AGAIN = "save it again with this version of torch: torch.export.save(torch.export.export(...), path)"
_CONTAINERS = {"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", "builtins.NoneType"}
_FUNCTIONS = (
    "FloorDiv ModularIndexing Where PythonMod Mod CleanDiv CeilToInt FloorToInt CeilDiv LShift RShift PowByNatural"
    " FloatPow FloatTrueDiv IntTrueDiv IsNonOverlappingAndDenseIndicator TruncToFloat TruncToInt RoundToInt"
    " RoundDecimal ToFloat Identity Max Min Abs Eq Ne Lt Le Gt Ge And Or Not True False Integer Float Rational"
    " floor ceiling oo int_oo Symbol Add Mul Pow Equality Unequality StrictLessThan LessThan StrictGreaterThan"
    " GreaterThan Piecewise ExprCondPair Tuple"
)
_KNOWN = frozenset(_FUNCTIONS.split())
_PLAIN = (
    *(ast.Expression, ast.Load, ast.keyword, ast.Tuple),
    *(ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
)
_MATH = frozenset({"ceil", "floor", "sqrt", "trunc", "pow", "log2"})


def load(path: Path) -> ExportedProgram:
    """Read an exported program.

    Raises:
        BadInput: It is no such file, or holds something other than data.
    """
    import torch

    if not path.is_file():
        raise BadInput("there is no such file", where=str(path))
    _check(path)
    with _tensors_only():
        try:
            program = torch.export.load(path)
        except Exception as error:  # whatever a damaged file makes torch raise
            if "Weights only load failed" in str(error):
                raise _unsafe(path, "it holds pickled objects that are no tensors", _SAVE_AGAIN) from error
            raise _unreadable(path, str(error).strip().split("\n")[0] or type(error).__name__) from error
    program._guards_code = []  # conditions on the inputs, as code
    return program


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Make every ``torch.load`` refuse what is not a tensor, also where its caller asks for all."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = {key: os.environ.get(key) for key in (name, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")}
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    os.environ[name] = "1"
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value


def _check(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            programs = [name for name in names if re.search(r"(^|/)models/[^/]+\.json$", name)]
            if not programs:
                _refuse_kind(path, names)
            for name in names:
                if re.search(r"/data/constants/.*(custom|opaque)_obj", name):
                    raise _unsafe(path, "it holds pickled objects", "remove custom objects from the module")
                if name.endswith(".json"):
                    _walk(json.loads(archive.read(name)), path)
    except (zipfile.BadZipFile, OSError, ValueError, KeyError) as error:
        raise _unreadable(path, str(error)) from error


def _refuse_kind(path: Path, names: list[str]) -> None:
    base = [name.rpartition("/")[2] for name in names]
    if "serialized_exported_program.json" in base:
        raise _unreadable(path, "it has the format of torch 2.7 or earlier")
    if any("aotinductor" in name for name in names):
        raise BadInput(
            "a compiled package cannot be optimised", where=str(path), hint="save the program: torch.export.save"
        )
    if "data.pkl" in base:
        raise BadInput(
            "this is a checkpoint, not an exported program",
            where=str(path),
            why="it holds weights or a pickled module, no graph",
            hint="give the module as package.module:factory, or torch.export.save it",
        )
    raise _unreadable(path, "it holds no exported program")


def _walk(item: Any, path: Path) -> None:
    """Look at everything in a JSON document that torch would evaluate, look up or import."""
    if isinstance(item, list):
        for each in item:
            _walk(each, path)
        return
    if not isinstance(item, dict):
        return
    for key, value in item.items():
        if key in ("expr_str", "as_expr") and isinstance(value, str):
            _expression(value, path)
        elif key in ("target", "as_operator") and isinstance(value, str):
            _target(value, path)
        elif key == "as_custom_obj" or (key == "custom_obj_values" and value):
            raise _unsafe(path, "it uses custom objects", "remove them from the module")
        elif key in ("in_spec", "out_spec") and isinstance(value, str):
            if "__enum__" in value:  # it names a module to import
                raise _unsafe(path, "its inputs or outputs are keyed by an enumeration", "key them by text")
            _containers(json.loads(value) if value else None, path)
        elif key == "range_constraints" and isinstance(value, dict):
            for symbol in value:
                _expression(symbol, path)
        _walk(value, path)


def _expression(text: str, path: Path) -> None:
    """Let only numbers, symbols and known functions of them pass: SymPy evaluates it as Python."""
    try:
        parts = list(ast.walk(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError):
        parts = []
    if not parts or not all(_is_plain(part) for part in parts):
        raise _unsafe(path, f"a size is given as '{text[:60]}', which is no expression over sizes", _SAVE_AGAIN)


def _is_plain(part: ast.AST) -> bool:
    if isinstance(part, ast.Constant):
        if isinstance(part.value, str):
            return re.fullmatch(r"[\w.+-]*", part.value) is not None
        return isinstance(part.value, int | float)
    if isinstance(part, ast.Name):
        return part.id in _KNOWN or re.fullmatch(r"[a-z]+\d+", part.id) is not None
    if isinstance(part, ast.Call):
        return isinstance(part.func, ast.Name) and part.func.id in _KNOWN
    return isinstance(part, _PLAIN)


def _target(text: str, path: Path) -> None:
    import operator

    import torch
    from torch._ops import HigherOrderOperator, OpOverload

    prefix, _, rest = text.partition(".")
    if prefix == "_operator" and rest in dir(operator) and not rest.startswith(("attrgetter", "method", "itemgetter")):
        return
    if prefix == "math" and rest in _MATH:
        return
    if re.fullmatch(r"torch\.sym_\w+", text) and hasattr(torch, rest):
        return
    if (
        re.fullmatch(r"torch\.ops\.\w+\.\w+(\.\w+)?", text)
        and "." not in text.removeprefix("torch.ops.").partition(".")[0]
    ):
        found: Any = torch.ops
        try:
            for word in text.split(".")[2:]:
                found = getattr(found, word)
        except (AttributeError, RuntimeError):
            found = None
        if isinstance(found, OpOverload | HigherOrderOperator):
            return
        if found is None:
            raise BadInput(
                f"the operator {text} is not installed here",
                where=str(path),
                hint="import the package that registers it first, and use graphc from Python",
            )
    if re.fullmatch(r"\w+", text):  # an attribute or a placeholder of the graph itself
        return
    raise _unsafe(path, f"a node calls '{text}', which is no operator", _SAVE_AGAIN)


def _containers(spec: Any, path: Path) -> None:
    if isinstance(spec, list):
        for each in spec:
            _containers(each, path)
    elif isinstance(spec, dict):
        kind = spec.get("type")
        if isinstance(kind, str) and kind not in _CONTAINERS:
            raise _unsafe(
                path, f"its inputs or outputs are of the type {kind}", "return tuples, lists or dicts from forward"
            )
        for each in spec.values():
            _containers(each, path)


def _unsafe(path: Path, why: str, hint: str) -> BadInput:
    return BadInput("the file cannot be read safely", where=str(path), why=why, hint=hint)


def _unreadable(path: Path, why: str) -> BadInput:
    return BadInput("cannot read the exported program", where=str(path), why=why, hint=_SAVE_AGAIN)
