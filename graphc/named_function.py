"""Functions of the user's that are named on the command line: ``file.py:function`` or ``package.module:function``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graphc.errors import BadInput, nearest


def named_function(name: str, what: str) -> Callable[..., Any]:
    """The function of a name.

    Args:
        name: ``file.py:function`` or ``package.module:function``.
        what: What it is for, for errors: ``"metric"``, ``"data"``.

    Raises:
        BadInput: There is no such file or function, or its module cannot be loaded.
    """
    place, _, function = name.rpartition(":")
    module = _module(place, name, what)
    found = getattr(module, function, None)
    if not callable(found):
        known = [n for n, value in vars(module).items() if inspect.isfunction(value)]
        raise BadInput(f"{what} '{name}' has no function '{function}'", hint=nearest(function, known))
    return found  # type: ignore[no-any-return]


def _module(place: str, name: str, what: str) -> Any:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place)
        if not path.is_file():
            raise BadInput("there is no such file", where=place, hint=f"give {what} as FILE.py:FUNCTION")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except BadInput:
        raise
    except Exception as failure:  # whatever the user's code raises
        raise BadInput(
            f"the module of {what} '{name}' cannot be loaded",
            where=place,
            why=f"{type(failure).__name__}: {failure}",
        ) from failure
    return module
