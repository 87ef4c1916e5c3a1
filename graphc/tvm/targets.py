"""Names of targets, and what TVM calls them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from graphc.errors import BadInput, nearest
from graphc.tvm import cuda, install

PORTABLE = "x86-64-v3"
"""The default: what every x86 processor of the last ten years has."""

CUDA = "cuda"


def resolve(name: str, threads: int = 0, arch: Sequence[str] = ("sm_80",)) -> Any:
    """TVM's target for a name.

    Args:
        name: ``native``, a processor as LLVM names it (``x86-64-v3``, ``znver4``, ...), ``cuda``, or TVM's own JSON.
        threads: Cores to schedule for; 0 means those of this machine.
        arch: For ``cuda``: the architectures to compile for; schedules keep the limits of the first.

    Raises:
        BadInput: There is no such target, or what it needs is not installed.
    """
    install.require()
    import tvm

    if name.startswith("{"):
        try:
            return tvm.target.Target(json.loads(name))
        except Exception as error:  # a JSON error, or one of TVM's
            last = (str(error).strip().splitlines() or [""])[-1]
            raise BadInput("TVM does not know the target", where=name, why=last) from None
    if name == CUDA:
        cuda.prepare(cuda.architectures(arch))
        return tvm.target.Target({"kind": "cuda", "arch": arch[0]}, host=_cpu(PORTABLE, threads))
    return tvm.target.Target(_cpu(name, threads))


def _cpu(name: str, threads: int) -> dict[str, Any]:
    import tvm
    from tvm.target import codegen

    cpu = codegen.llvm_get_system_cpu() if name == "native" else name
    known = sorted(map(str, codegen.llvm_get_cpu_archlist(tvm.target.Target({"kind": "llvm"}))))
    if cpu not in known:
        hint = nearest(name, ["native", CUDA, *known])
        if not hint.startswith("did you mean"):
            hint = "native, cuda, x86-64-v2, x86-64-v3, x86-64-v4, or what LLVM calls the processor"
        raise BadInput(f"TVM knows no target '{name}'", hint=hint)
    return {"kind": "llvm", "mcpu": cpu, "num-cores": threads or os.cpu_count() or 1}
