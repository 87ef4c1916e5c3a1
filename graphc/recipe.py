"""Recipes: ordered passes with options, as text, TOML or Python.

Text: ``simplify,fuse{only=conv-bn},prune{ratio=0.3 include=["*.up_proj","*.gate_proj"]}``. TOML: ``[[pass]]``
tables with ``name`` and the same keys. Python: ``Recipe((Simplify(), Fuse(only=("conv-bn",))))``.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from graphc import registry
from graphc.contract import Backend, Pass
from graphc.errors import BadInput, nearest

T = TypeVar("T")

DEFAULT = "default"
"""The shipped recipe that runs when none is named: every exact portable pass."""


@dataclass(frozen=True)
class Recipe:
    """An ordered list of passes with their options."""

    passes: tuple[Pass, ...]
    description: str = ""

    @staticmethod
    def parse(text: str) -> Recipe:
        """Read recipe text.

        Raises:
            BadInput: Unknown pass or option, a value of the wrong type, or a syntax error, with the nearest name.
        """
        parsed = list(_Parser(text).specs())
        if not parsed:
            raise BadInput("the recipe names no pass", where=repr(text), hint="e.g. -p simplify,fuse")
        return Recipe(tuple(_pass(name, options) for name, options in parsed))

    @staticmethod
    def read(path: Path) -> Recipe:
        """Read a TOML file.

        Raises:
            BadInput: As for ``parse``, and if the file cannot be read.
        """
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise BadInput("cannot read the recipe", where=str(path), why=str(error)) from None
        unknown = set(document) - {"pass", "description"}
        if unknown:
            raise BadInput(f"a recipe has no key '{min(unknown)}'", where=str(path), hint="keys: description, [[pass]]")
        tables = document.get("pass", [])
        if not isinstance(tables, list) or not tables or not all(isinstance(t, dict) and "name" in t for t in tables):
            raise BadInput("the recipe has no [[pass]] tables with a name", where=str(path))
        passes = tuple(
            _pass(table["name"], {k: v for k, v in table.items() if k != "name"}, str(path)) for table in tables
        )
        return Recipe(passes, str(document.get("description", "")))

    @staticmethod
    def named(name: str) -> Recipe:
        """A shipped recipe (a preset) by name, or a TOML file by path."""
        shipped = registry.recipe_files()
        if name in shipped:
            return Recipe.read(shipped[name])
        if name.endswith(".toml") or Path(name).is_file():
            return Recipe.read(Path(name))
        raise BadInput(f"there is no recipe '{name}'", hint=f"{nearest(name, shipped)}; or give a .toml file")

    def with_option(self, option: str, value: Any) -> Recipe:
        """The recipe with an option set on every pass that has it: what a flag of the command line stands for.

        Raises:
            BadInput: No pass of the recipe has it, or it cannot take the value.
        """
        having = [each for each in self.passes if option in (f.name for f in dataclasses.fields(each))]
        flag = option.replace("_", "-")
        if not having:
            raise BadInput(f"--{flag} has no effect", why=f"no pass of the recipe has an option '{flag}'")
        return dataclasses.replace(
            self,
            passes=tuple(
                dataclasses.replace(p, **{option: _coerce(value, hints(type(p))[option], f"{p.name}{{{flag}}}", "")})
                if p in having
                else p
                for p in self.passes
            ),
        )

    def files(self) -> list[Path]:
        """The files that options of passes name (masks, scores): what they hold decides on the result, too."""
        values = (getattr(each, f.name) for each in self.passes for f in dataclasses.fields(each))
        return [value for value in values if isinstance(value, Path)]

    def text(self) -> str:
        """The recipe as text; ``Recipe.parse(r.text()) == r`` up to the description."""
        return ",".join(p.spec() for p in self.passes)

    def toml(self) -> str:
        """The recipe as TOML, with the options that are not at their defaults."""
        lines = [f"description = {_toml(self.description)}", ""] if self.description else []
        for each in self.passes:
            lines += ["[[pass]]", f"name = {_toml(each.name)}"]
            for f in dataclasses.fields(each):
                value = getattr(each, f.name)
                if value != f.default:
                    lines.append(f"{f.name.replace('_', '-')} = {_toml(value)}")
            lines.append("")
        return "\n".join(lines)


def specs(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Read ``name{option=value ...}``, any number of them separated by commas."""
    return list(_Parser(text).specs())


def parse_backend(text: str, flags: Mapping[str, Any] | None = None) -> Backend:
    """Read a target: ``name{option=value ...}`` of a backend.

    Args:
        text: The target.
        flags: Options that flags of the command line stand for, with their values; they win over the text.

    Raises:
        BadInput: There is no such backend or option, or it cannot take the value.
    """
    parsed = specs(text)
    if len(parsed) != 1:
        raise BadInput("a target is one backend", where=repr(text), hint="e.g. -t onnxruntime")
    name, options = parsed[0]
    cls = registry.backend_class(name)
    for flag in flags or ():
        if flag not in (f.name for f in dataclasses.fields(cls)):
            raise BadInput(f"--{flag} has no effect", why=f"target '{name}' has no option '{flag}'")
    return build(cls, name, {**options, **(flags or {})})


def options(text: str) -> dict[str, Any]:
    """The options of ``name{option=value ...}``, by name.

    Raises:
        BadInput: A syntax error.
    """
    return next(_Parser(text).specs())[1]


def build(cls: type[T], name: str, options: Mapping[str, Any], where: str = "") -> T:
    """Make a pass or a backend from option values as TOML or text gives them, checked against the field types."""
    fields = {f.name.replace("_", "-"): f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    types_ = hints(cls)  # type: ignore[arg-type]
    values = {}
    for key, value in options.items():
        field = fields.get(key.replace("_", "-"))
        if field is None:
            raise BadInput(f"'{name}' has no option '{key}'", where=where, hint=nearest(key, fields))
        values[field.name] = _coerce(value, types_[field.name], f"{name}{{{key}}}", where)
    try:
        return cls(**values)
    except ValueError as error:
        raise BadInput(f"'{name}' cannot take these options", where=where, why=str(error)) from None


def type_text(annotation: Any) -> str:
    """A field's type for people: ``number``, ``true|false``, ``a|b``, ``list of text``."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "|".join(str(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_text(a) for a in args if a is not type(None))
    if origin is tuple:
        return f"list of {type_text(args[0])}"
    names = {bool: "true|false", int: "whole number", float: "number", str: "text", Path: "path"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


@cache
def hints(cls: type[Any]) -> dict[str, Any]:
    """The types of a dataclass's fields, resolved."""
    return typing.get_type_hints(cls)


def _pass(name: str, options: Mapping[str, Any], where: str = "") -> Pass:
    name = str(name).replace("_", "-")
    return build(registry.pass_class(name), name, options, where)


def _coerce(value: Any, annotation: Any, option: str, where: str) -> Any:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        for each in args:
            try:
                return _coerce(value, each, option, where)
            except BadInput:
                continue
    elif origin is typing.Literal:
        # The word 'none' is read as no value.
        value = "none" if value is None and None not in args else value
        if value in args:
            return value
        raise BadInput(f"option {option} cannot be {value!r}", where=where, hint=nearest(str(value), map(str, args)))
    elif origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_coerce(item, args[0], option, where) for item in items)
    elif annotation is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif annotation is Path and isinstance(value, str):
        return Path(value)
    elif annotation is Any or (isinstance(value, annotation) and not (annotation is int and isinstance(value, bool))):
        return value
    raise BadInput(f"option {option} cannot be {value!r}", where=where, hint=f"it takes: {type_text(annotation)}")


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, int | float):
        return repr(value)
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


_TOKEN = re.compile(r'\s*(?:(?P<string>"(?:[^"\\]|\\.)*")|(?P<punct>[{}\[\],=])|(?P<word>[^\s{}\[\],="]+))')
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")


class _Parser:
    """Recursive descent over ``spec {"," spec}``, ``spec = name ["{" {key "=" value} "}"]``."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, str, int]] = []
        position = 0
        while text[position:].strip():
            match = _TOKEN.match(text, position)
            if match is None:
                self.fail("a closing quote is missing", position)
            assert match is not None and match.lastgroup is not None
            self.tokens.append((match.lastgroup, match[match.lastgroup], match.start(match.lastgroup)))
            position = match.end()
        self.at = 0

    def fail(self, why: str, position: int) -> typing.NoReturn:
        raise BadInput(
            "cannot read the recipe text",
            where=f"{self.text!r}, column {position + 1}",
            why=why,
            hint="e.g. 'simplify,fuse{only=[conv-bn,pad]}'",
        )

    def peek(self) -> str:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    def take(self, *kinds: str, expect: str) -> str:
        if self.at >= len(self.tokens):
            self.fail(f"{expect} expected at the end", len(self.text))
        kind, text, position = self.tokens[self.at]
        if kind not in kinds and text not in kinds:
            self.fail(f"{expect} expected, not '{text}'", position)
        self.at += 1
        return text

    def specs(self) -> Iterator[tuple[str, dict[str, Any]]]:
        while self.at < len(self.tokens):
            name = self.take("word", expect="a name")
            options: dict[str, Any] = {}
            if self.peek() == "{":
                self.take("{", expect="'{'")
                while self.peek() != "}":
                    key = self.take("word", expect="an option or '}'")
                    self.take("=", expect=f"'=' after '{key}'")
                    options[key] = self.value()
                    if self.peek() == ",":
                        self.take(",", expect="','")
                self.take("}", expect="'}'")
            yield name, options
            if self.at < len(self.tokens):
                self.take(",", expect="','")

    def value(self) -> Any:
        if self.peek() == "[":
            self.take("[", expect="'['")
            items = []
            while self.peek() != "]":
                items.append(self.value())
                if self.peek() == ",":
                    self.take(",", expect="','")
            self.take("]", expect="']'")
            return items
        quoted = self.peek().startswith('"')
        text = self.take("word", "string", expect="a value")
        if quoted:
            return re.sub(r"\\(.)", r"\1", text[1:-1])
        if text in ("true", "false"):
            return text == "true"
        if text == "none":
            return None
        if _NUMBER.match(text):
            return float(text) if any(c in text for c in ".eE") else int(text)
        return text
