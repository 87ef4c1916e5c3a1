"""One layout for a table whose rows are looked up, and which a product reads as well: an embedding tied to its head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def shared(module: Any, blocks: Mapping[Any, Any]) -> Any:
    """Let lookups of rows read the blocks of a product with the table's transposition; they are small beside it.

    Args:
        module: Relax operators before they are legalized; not changed.
        blocks: For weights of products ``[K, N]``: the same as :func:`graphc.tvm.blocked.in_blocks` lays it out.
    """
    from tvm import relax
    from tvm.ir import GenericConst, Op
    from tvm.relax.expr_functor import PyExprMutator, mutator

    take = Op.get("relax.take")

    def same(table: Any) -> Any:
        """The blocks that hold a table; None if there are none."""
        rows: Any = None
        for weight, packed in blocks.items():
            if list(weight.ty.shape) == list(reversed(table.ty.shape)) and weight.ty.dtype == table.ty.dtype:
                rows = table.value.numpy() if rows is None else rows
                columns = weight.value.numpy()
                if np.array_equal(rows[0], columns[:, 0]) and np.array_equal(rows, columns.T):
                    return packed
        return None

    @mutator
    class Share(PyExprMutator):  # type: ignore[misc]
        def visit_call_(self, call: Any) -> Any:
            call = self.visit_expr_post_order(call)
            if not call.op.same_as(take) or call.attrs.axis is None or int(call.attrs.axis):
                return call
            table, index = call.args
            table = self.lookup_binding(table) if isinstance(table, relax.Var) else table
            if not isinstance(table, GenericConst) or len(table.ty.shape) != 2 or (packed := same(table)) is None:
                return call
            return self.builder_.call_te(_lookup, packed, index)

    function = module["main"]
    share = Share(module)
    body = share.visit_expr(function.body)
    module = share.builder_.get()
    module["main"] = relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)
    return relax.transform.Normalize()(module)


def _lookup(packed: Any, index: Any) -> Any:
    """Rows of ``[N, K]``, which lies as ``[N / lanes, K, lanes]``; no index is negative."""
    from tvm import te

    _, depth, lanes = packed.shape

    def at(*place: Any) -> Any:
        row = index[place[:-1]] if place[:-1] else index()
        return packed[row // lanes, place[-1], row % lanes]

    return te.compute((*index.shape, depth), at, name="lookup")
