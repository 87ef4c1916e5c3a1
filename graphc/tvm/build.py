"""From a Relax module to a shared library and the weights that stand beside it."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from graphc.errors import BadInput
from graphc.tvm import blocked, functions, install
from graphc.tvm.importer import WEIGHT
from graphc.tvm.nest import Machine

Array = np.ndarray[Any, np.dtype[Any]]

ALIGNMENT = 64
"""Bytes to which tensors in a data file are aligned; TVM's code relies on it."""


class TensorFile:
    """Tensors in one file, to be mapped into memory; equal ones are stored once.

    Args:
        path: The file, which is written at once.
    """

    def __init__(self, path: Path) -> None:
        self.tensors: list[dict[str, Any]] = []
        self._file = path.open("wb")
        self._known: dict[str, int] = {}

    def add(self, array: Array) -> int:
        """Store an array; returns its number in ``tensors``."""
        array = np.ascontiguousarray(array).reshape(array.shape)
        entry: dict[str, Any] = {"shape": list(array.shape), "dtype": array.dtype.name}
        digest = hashlib.sha256(repr(entry).encode())
        digest.update(array.reshape(-1).view(np.uint8).data if array.size else b"")
        number = self._known.setdefault(digest.hexdigest(), len(self.tensors))
        if number == len(self.tensors):
            offset = -(-self._file.tell() // ALIGNMENT) * ALIGNMENT
            self._file.write(b"\0" * (offset - self._file.tell()))
            array.tofile(self._file)
            self.tensors.append({**entry, "offset": offset})
        return number

    def close(self) -> None:
        # An empty file cannot be mapped.
        if not self._file.tell():
            self._file.write(b"\0" * ALIGNMENT)
        self._file.close()


_LAYOUTS = {"relax.nn.conv2d": ["NHWC", "HWIO"], "relax.nn.conv2d_transpose": ["NCHW", "IOHW"]}
"""The layouts that operators are brought to; TVM has no loops for transposed convolutions with channels last."""


def prepare(module: Any, target: Any) -> Any:
    """Graph-level rewrites and fusion: the module whose ``PrimFunc``s are then scheduled or tuned."""
    import tvm
    from tvm import relax

    first = [
        relax.transform.DecomposeOpsForInference(),
        relax.transform.CanonicalizeBindings(),
        tvm.transform.module_pass(lambda mod, context: _unstacked(mod), opt_level=0, name="Unstack"),
    ]
    layout = [relax.transform.ConvertLayout(_LAYOUTS), relax.transform.Normalize()]
    cpu = target.kind.name == "llvm"
    if cpu:
        functions.register()
    pack = tvm.transform.module_pass(
        lambda mod, context: blocked.blocked(mod, Machine.of(target)), opt_level=0, name="BlockWeights"
    )
    packs = [pack] if cpu else []
    passes = [
        tvm.transform.module_pass(lambda mod, context: _transposed(mod), opt_level=0, name="TransposeWeights"),
        relax.transform.FoldConstant(),
        *packs,
        relax.transform.LegalizeOps(functions.BOUNDS),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
    ]
    with target, _explained(target):
        module = tvm.transform.Sequential(first)(module)
        if cpu:
            # With channels last, every operator's innermost axis is contiguous. TVM cannot convert every graph.
            with contextlib.suppress(Exception):
                module = tvm.transform.Sequential(layout)(module)
        return tvm.transform.Sequential(passes)(module)


def _unstacked(module: Any) -> Any:
    """Make concatenations of stacks: TVM 0.27 cannot convert their layouts, and divides by the rank of scalars."""
    from tvm import relax
    from tvm.ir import Op
    from tvm.relax.expr_functor import PyExprMutator, mutator

    stack = Op.get("relax.stack")

    @mutator
    class Unstack(PyExprMutator):  # type: ignore[misc]
        def visit_call_(self, call: Any) -> Any:
            call = self.visit_expr_post_order(call)
            if not call.op.same_as(stack) or not isinstance(call.args[0], relax.Tuple):
                return call
            axis = 0 if call.attrs.axis is None else int(call.attrs.axis)
            parts = [self.builder_.emit(relax.op.expand_dims(part, axis)) for part in call.args[0].fields]
            return relax.op.concat(parts, axis)

    function = module["main"]
    body = Unstack(module).visit_expr(function.body)
    module["main"] = relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)
    return relax.transform.Normalize()(module)


def _transposed(module: Any) -> Any:
    """Transpose and reshape constants here: TVM's folding would compile a function for each."""
    from tvm import relax
    from tvm.ir import GenericConst, Op
    from tvm.relax.expr_functor import PyExprMutator, mutator

    transpose, reshape = Op.get("relax.permute_dims"), Op.get("relax.reshape")

    @mutator
    class Transpose(PyExprMutator):  # type: ignore[misc]
        def visit_call_(self, call: Any) -> Any:
            call = self.visit_expr_post_order(call)
            if not (call.op.same_as(transpose) or call.op.same_as(reshape)):
                return call
            held = call.args[0]
            held = self.lookup_binding(held) if isinstance(held, relax.Var) else held
            if not isinstance(held, GenericConst):
                return call
            array = held.value.numpy()
            if call.op.same_as(reshape):
                return relax.const(array.reshape([int(size) for size in call.args[1].values]), str(array.dtype))
            axes = [int(axis) for axis in call.attrs.axes] if call.attrs.axes else None
            return relax.const(np.ascontiguousarray(array.transpose(axes)), str(array.dtype))

    function = module["main"]
    body = Transpose(module).visit_expr(function.body)
    module["main"] = relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)
    return relax.transform.CanonicalizeBindings()(relax.transform.Normalize()(module))


def detach(module: Any) -> tuple[Any, list[Array]]:
    """Make the weights of ``main`` parameters after its inputs; returns the module and what they hold."""
    from tvm import relax
    from tvm.relax.expr_functor import PyExprMutator, mutator

    weights: list[Array] = []
    variables: list[Any] = []

    @mutator
    class Detach(PyExprMutator):  # type: ignore[misc]
        def visit_generic_const_(self, op: Any) -> Any:
            if not hasattr(op.value, "numpy") or (array := op.value.numpy()).size < WEIGHT:
                return op
            variable = relax.Var(f"weight{len(weights)}", op.ty)
            weights.append(array)
            variables.append(variable)
            return variable

    function = module["main"]
    body = Detach(module).visit_expr(function.body)
    module["main"] = relax.Function(
        [*function.params, *variables], body, function.ret_ty, function.is_pure, function.attrs
    )
    return relax.transform.Normalize()(module), weights


def link(module: Any, target: Any, path: Path) -> None:
    """Compile a scheduled module and link it into a shared library.

    Raises:
        BadInput: The compiler or the linker failed.
    """
    import tvm
    from tvm.support import cc

    options = ["-Wl,--build-id=none", "-Wl,-s", "-O2"]
    compiler = install.compiler()

    def create(output: str, objects: Sequence[str], options: Sequence[str] = options, **rest: Any) -> None:
        cc.create_shared(output, list(objects), list(options), cc=compiler)

    create.output_format = "so"  # type: ignore[attr-defined]
    with _explained(target), tempfile.TemporaryDirectory(prefix="graphc-") as folder:
        executable = tvm.compile(module, target=target)
        executable.export_library(str(path), fcompile=create, workspace_dir=folder)


@contextlib.contextmanager
def _explained(target: Any) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # TVM's errors share no other base
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BadInput(
            "TVM could not compile the model",
            where=f"target {target}",
            why=lines[-1][:400],
            hint="-t onnxruntime runs it; please report this as a defect of graphc, with the model if you may",
        ) from None
