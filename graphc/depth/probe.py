"""What a model loses without some of its branches: all are probed in one session of a model with a gate at each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.checking import metrics
from graphc.checking.metrics import Metric
from graphc.contract import Arrays
from graphc.depth.residual import Branch
from graphc.errors import BadInput

Outputs = dict[str, edit.Array]


class Probe:
    """Measures a model's outputs with branches switched off, against those of the whole model.

    Args:
        model: The model; it is not changed.
        branches: The branches that can be switched off.
        samples: What it runs on.
        metric: See ``graphc.checking.metrics``; "auto" is by how much the cross-entropy with the labels rises, where
            there are some; perplexity for a language model; else the outputs' error.
        labels: The class of each position of the first output, an array of integers for every sample; or none.
        progress: ``progress(what, done, total)``.

    Raises:
        CannotRun: The model does not run here.
    """

    def __init__(
        self,
        model: ir.Model,
        branches: Sequence[Branch],
        samples: Sequence[Arrays],
        metric: str,
        progress: Callable[[str, int, int], None],
        labels: Sequence[edit.Array] = (),
    ) -> None:
        from graphc import runtime

        self._samples, self._progress = samples, progress
        self._index = {id(branch): i for i, branch in enumerate(branches)}
        gated, self._gates = _gated(model, branches)
        big = runtime.constants_nbytes(model) > runtime.BIG
        self._session = runtime.session(gated, optimise=not big, frugal=big)
        self._read = set(self._session.input_names)
        self._whole = self._outputs(())
        self._metric = self._named(metric, labels)

    def __call__(self, off: Collection[Branch]) -> float:
        """The metric without these branches."""
        return self._metric(self._whole, self._outputs(off), self._samples)

    def _named(self, name: str, labels: Sequence[edit.Array]) -> Metric:
        if name != "auto":
            return metrics.metric(name)
        if len(labels) and all(array.dtype.kind in "iu" for array in labels):
            return partial(_rise, labels)
        try:
            metrics.perplexity(self._whole[:1], self._whole[:1], self._samples[:1])
        except BadInput:
            return metrics.error
        return metrics.perplexity

    def close(self) -> None:
        self._session.close()

    def _outputs(self, off: Collection[Branch]) -> list[Outputs]:
        gates = np.ones(len(self._index), dtype=np.float32)
        gates[[self._index[id(branch)] for branch in off]] = 0.0
        found = []
        for i, sample in enumerate(self._samples):
            self._progress("running without a branch" if off else "running the whole model", i, len(self._samples))
            fed = {name: array for name, array in sample.items() if name in self._read}
            found.append(self._session.run({**fed, self._gates: gates}))
        return found


def _rise(
    labels: Sequence[edit.Array],
    reference: Sequence[Mapping[str, edit.Array]],
    outputs: Sequence[Mapping[str, edit.Array]],
    inputs: Sequence[Arrays],
) -> float:
    """By how much the mean cross-entropy of the first output ``(..., classes)`` with its labels rises."""
    losses = []
    for cases in (reference, outputs):
        total, count = 0.0, 0
        for case, right in zip(cases, labels, strict=True):
            scores = next(a for a in case.values() if a.dtype.kind == "f").astype(np.float64)
            if scores.shape[:-1] != right.shape:
                raise BadInput(f"the labels have shape {right.shape}, the output {scores.shape}")
            scores = scores - scores.max(axis=-1, keepdims=True)
            logs = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
            total -= float(np.take_along_axis(logs, right[..., None].astype(np.int64), -1).sum())
            count += right.size
        losses.append(total / max(count, 1))
    return losses[1] - losses[0]


def _gated(model: ir.Model, branches: Sequence[Branch]) -> tuple[ir.Model, str]:
    """A copy of a model with one input more, a factor for each branch; and the input's name."""
    copy = model.clone()
    names = edit.Names(copy)
    graph = copy.graph
    made = {out.name: out for node in graph for out in node.outputs}
    gates = ir.Value(name=names.fresh("gates"), shape=ir.Shape([len(branches)]), type=ir.TensorType(ir.DataType.FLOAT))
    graph.inputs.append(gates)
    for i, branch in enumerate(branches):
        value = made[branch.value.name]
        total = made[branch.node.outputs[0].name].producer()
        assert total is not None
        index = edit.initializer(graph, np.array(i, dtype=np.int64), names.fresh(f"gate{i}.index"))
        picked = ir.Node("", "Gather", [gates, index], num_outputs=1)
        like = ir.Node("", "CastLike", [picked.outputs[0], value], num_outputs=1)
        scaled = ir.Node("", "Mul", [value, like.outputs[0]], num_outputs=1)
        for node, hint in ((picked, "gate"), (like, "gate.cast"), (scaled, "gated")):
            node.outputs[0].name = names.fresh(f"{hint}{i}")
            node.name = node.outputs[0].name
        graph.insert_before(total, [picked, like, scaled])
        for at, operand in enumerate(total.inputs):
            if operand is value:
                total.replace_input_with(at, scaled.outputs[0])
    return copy, gates.name or ""
