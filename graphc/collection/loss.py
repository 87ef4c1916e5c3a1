"""The loss whose gradients are collected, through ``graphc.fx``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc.contract import Arrays
from graphc.errors import BadInput
from graphc.stats.base import Array, itself


class Loss:
    """The loss of a model, and its gradients.

    With labels: the mean cross-entropy of the first floating-point output ``(..., classes)`` for integer labels
    ``(...)``, of which negative ones do not count; the mean squared error for floats. Without: the mean cross-entropy
    of the next token for a language model (padding does not count), else half the mean square of all outputs.

    Args:
        model: The model; it is not changed.
        names: Constants and values by which gradients are wanted.
        given: Values that are wanted themselves.

    Raises:
        BadInput: torch is missing or has no form of an operator; or there is no way from a value to the outputs.
    """

    def __init__(self, model: ir.Model, names: Sequence[str], given: Sequence[str] = ()) -> None:
        from graphc.fx import to_torch

        self._outputs = [v.name or "" for v in model.graph.outputs]
        clone = model.clone()
        made = {v.name or "": v for node in clone.graph for v in node.outputs}
        constants = {*clone.graph.initializers} - {v.name for v in clone.graph.inputs}
        self._values = [n for n in names if n in made and n not in constants]
        self._given = list(given)
        tapped = dict.fromkeys([*self._values, *(n for n in given if n in made)])
        clone.graph.outputs.extend(made[n] for n in tapped if n not in self._outputs)
        self._module = to_torch(clone)
        self._module.eval()
        held = {**dict(self._module.named_buffers()), **dict(self._module.named_parameters())}
        # What only folded code read is no longer in the module.
        by_name = {name: held[key] for key, name in self._module.meta["initializers"].items() if key in held}
        unread = [n for n in names if n not in self._values and n not in by_name]
        if unread:
            raise BadInput(f"there is no gradient by '{unread[0]}'", why="no output depends on it")
        for name, tensor in by_name.items():
            if tensor.is_floating_point():
                tensor.requires_grad_(name in names or bool(self._values))
        self._constants = {n: by_name[n] for n in names if n not in self._values}
        self._arguments: dict[str, str] = self._module.meta["inputs"]

    def gradients(self, sample: Arrays, labels: Array | None) -> dict[str, Array]:
        """The gradients of one sample's loss by each name; for a value of integers, the value.

        Values that are wanted themselves are called as :func:`graphc.stats.base.itself` has it.
        """
        import torch

        given = {key: torch.from_numpy(np.ascontiguousarray(sample[name])) for key, name in self._arguments.items()}
        found = self._module(**given)
        loss = self._of({n: found[n] for n in self._outputs}, sample, labels)
        wanted = {**self._constants, **{n: found[n] for n in self._values}}
        moving = {n: t for n, t in wanted.items() if t.requires_grad}
        made = torch.autograd.grad(loss, list(moving.values()), allow_unused=True)
        result = {n: t.detach().numpy() for n, t in wanted.items() if n not in moving}
        for (name, tensor), gradient in zip(moving.items(), made, strict=True):
            result[name] = (torch.zeros_like(tensor) if gradient is None else gradient).detach().float().numpy()
        for name in self._given:
            result[itself(name)] = found[name].detach().float().numpy() if name in found else sample[name]
        return result

    def _of(self, outputs: dict[str, Any], sample: Arrays, labels: Array | None) -> Any:
        from torch.nn import functional

        floats = [t for t in outputs.values() if t.is_floating_point()]
        if not floats:
            raise BadInput("the model has no floating-point output to take a loss of")
        if labels is not None:
            return labelled(floats[0].float(), labels)
        tokens = _next_tokens(outputs, sample)
        if tokens is not None:
            scores, targets, counted = tokens
            return functional.cross_entropy(scores[counted], targets[counted])
        return sum((t.float().square().mean() for t in floats), start=floats[0].new_zeros(())) / 2


def labelled(scores: Any, labels: Array) -> Any:
    """The cross-entropy of scores ``(..., classes)`` for integers ``(...)``; the mean squared error for floats.

    Args:
        scores: A float tensor.
        labels: Negative integers do not count.

    Raises:
        BadInput: The shapes do not fit.
    """
    import torch
    from torch.nn import functional

    targets = torch.from_numpy(np.ascontiguousarray(labels)).to(scores.device)
    if targets.is_floating_point():
        if targets.shape != scores.shape:
            raise BadInput(f"the labels have shape {tuple(targets.shape)}, the output {tuple(scores.shape)}")
        return functional.mse_loss(scores, targets.float())
    if targets.shape != scores.shape[:-1]:
        raise BadInput(
            f"the labels have shape {tuple(targets.shape)}, the output {tuple(scores.shape)}",
            hint="give one integer for each position of the output, or floats of the output's shape",
        )
    targets = targets.long()
    targets = torch.where(targets < 0, -100, targets)
    return functional.cross_entropy(scores.reshape(-1, scores.shape[-1]), targets.reshape(-1))


def _next_tokens(outputs: dict[str, Any], sample: Arrays) -> tuple[Any, Any, Any] | None:
    """Scores, next tokens and which of them count, flat, if the model is a language model."""
    import torch

    from graphc.checking.metrics import language

    shapes = {name: np.empty((*t.shape[:2], 0)) if t.dim() == 3 else np.empty(0) for name, t in outputs.items()}
    found = language(shapes, sample)
    if found is None or not outputs[found[0]].is_floating_point():
        return None
    name, tokens, counted = found
    scores = outputs[name].float()[:, :-1]
    targets = torch.from_numpy(np.ascontiguousarray(tokens[:, 1:])).long().reshape(-1)
    return scores.reshape(-1, scores.shape[-1]), targets, torch.from_numpy(counted.reshape(-1))
