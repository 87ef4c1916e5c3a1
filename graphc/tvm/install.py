"""Whether TVM can be used here, and what to install when it cannot."""

from __future__ import annotations

import importlib.util
import os
import shutil
from functools import cache
from pathlib import Path

from graphc.environment import installed, to_install
from graphc.errors import BadInput

VERSION = "0.27"
"""The release of TVM that this is written for; its Python interface changes with every one."""

FFI = "0.1.14"
"""The release of ``apache-tvm-ffi``: with 0.1.15, TVM 0.27 crashes when it saves what tuning found."""


@cache
def require() -> None:
    """Make sure that TVM can compile.

    Raises:
        BadInput: TVM or its companion is missing or of another version, or there is no C++ compiler to link with.
    """
    versions()
    try:
        import tvm  # noqa: F401
        from tvm import relax  # noqa: F401
    except (ImportError, OSError, AttributeError) as error:
        raise BadInput("TVM cannot be imported", why=str(error), hint=to_install("tvm")) from None
    compiler()


def versions() -> None:
    """Make sure that the versions of TVM and of ``apache-tvm-ffi`` are the ones that work together.

    Raises:
        BadInput: They are not.
    """
    tvm, ffi = installed("apache-tvm"), installed("apache-tvm-ffi")
    if not tvm:
        raise BadInput("TVM is not installed", hint=to_install("tvm"))
    if not tvm.startswith(f"{VERSION}."):
        raise BadInput(f"TVM {tvm} is not supported", why=f"graphc needs apache-tvm {VERSION}", hint=to_install("tvm"))
    if not ffi.startswith(f"{FFI}."):
        raise BadInput(
            f"apache-tvm-ffi {ffi or 'is missing, which'} does not go with TVM {tvm}".replace(
                ", which does", " and does"
            ),
            why=f"TVM {VERSION} needs {FFI}; with later ones it crashes while it saves tuning results",
            hint=to_install("tvm"),
        )


def compiler() -> str:
    """The C++ compiler that links what TVM compiles.

    Raises:
        BadInput: There is none.
    """
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "clang++", "c++"]:
        if name and (found := shutil.which(name)):
            return found
    raise BadInput(
        f"the C++ compiler {wanted} is not there" if wanted else "there is no C++ compiler",
        why="TVM's code is linked into a shared library with one",
        hint="install g++ (apt install g++), or name one in CXX",
    )


def library(name: str = "libtvm_runtime.so") -> Path | None:
    """A shared library of the installed TVM, found without importing it; None if it is not there."""
    spec = importlib.util.find_spec("tvm")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(place) / "lib" / name
        if path.is_file():
            return path
    return None
