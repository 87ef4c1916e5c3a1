"""What a lossy pass costs: metrics of a model's outputs against those of the model as it came.

A metric takes all cases at once, reference first: ``metric(reference_outputs, outputs, inputs) -> float``, each a
sequence with one mapping from name to array for every case. Lower is better and 0 means no loss. What cannot be
compared (NaN or infinity where the reference has numbers, another shape) gives infinity, so that no gate lets it pass.

On the command line: ``--max-drop error=0.01``, or a function of the user's, ``--max-drop check.py:loss=0.1`` or
``package.module:loss=0.1``, which is called as ``loss(outputs, reference_outputs, inputs)`` with the same sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from graphc.contract import Arrays
from graphc.errors import BadInput, nearest
from graphc.named_function import named_function

Array = np.ndarray[Any, np.dtype[Any]]
Cases = Sequence[Mapping[str, Array]]
Metric = Callable[[Cases, Cases, Sequence[Arrays]], float]


def error(reference: Cases, outputs: Cases, inputs: Sequence[Arrays]) -> float:
    """Relative output error ``||y' - y|| / ||y||`` (Euclidean norms over all cases) of the worst output."""
    worst = 0.0
    for name in reference[0]:
        difference = total = 0.0
        for want, got in zip(reference, outputs, strict=True):
            if name not in got or not _comparable(want[name], got[name]):
                return math.inf
            y, found = _float(want[name]), _float(got[name])
            usable = np.isfinite(y)
            difference += float(np.square(found[usable] - y[usable]).sum())
            total += float(np.square(y[usable]).sum())
        if difference:
            worst = max(worst, math.sqrt(difference / total) if total else math.inf)
    return worst


def top1(reference: Cases, outputs: Cases, inputs: Sequence[Arrays]) -> float:
    """Share of the positions at which the arg max over the last axis of the first output is another."""
    changed = count = 0
    for y, found in _scores(reference, outputs, "top1"):
        if not _comparable(y, found):
            return math.inf
        changed += int((y.argmax(-1) != found.argmax(-1)).sum())
        count += math.prod(y.shape[:-1])
    return changed / max(count, 1)


def kl(reference: Cases, outputs: Cases, inputs: Sequence[Arrays]) -> float:
    """Mean Kullback-Leibler divergence ``sum p log(p / p')`` in nats.

    ``p`` is the softmax over the last axis of the reference's first output, ``p'`` the candidate's.
    """
    total, count = 0.0, 0
    for y, found in _scores(reference, outputs, "kl"):
        if not _comparable(y, found):
            return math.inf
        log_p, log_q = _log_softmax(y), _log_softmax(found)
        p = np.exp(log_p)
        with np.errstate(invalid="ignore"):
            terms = np.where(p > 0, p * (log_p - log_q), 0.0)
        total += float(terms.sum())
        count += math.prod(y.shape[:-1])
    return _number(max(total / max(count, 1), 0.0))


def perplexity(reference: Cases, outputs: Cases, inputs: Sequence[Arrays]) -> float:
    """By which share the perplexity of the next tokens rises: 0.02 is 2 % more.

    The model has integer inputs ``[batch, length]``, of which ``input_ids`` (or the first) has the tokens, and an
    output ``[batch, length, vocabulary]``; positions that ``attention_mask`` leaves out do not count.
    """
    before, after, count = 0.0, 0.0, 0
    for want, got, given in zip(reference, outputs, inputs, strict=True):
        name, tokens, counted = _tokens(want, given)
        if name not in got or not _comparable(want[name], got[name]):
            return math.inf
        rows, columns = np.nonzero(counted)
        targets = tokens[:, 1:][rows, columns]
        for array, sign in ((want[name], 0), (got[name], 1)):
            loss = -float(_log_softmax(_float(array)[:, :-1])[rows, columns, targets].sum())
            before, after = (before + loss, after) if sign == 0 else (before, after + loss)
        count += len(targets)
    if not count:
        raise BadInput("perplexity needs data with sequences of two tokens or more")
    return _number(math.expm1(min((after - before) / count, 700.0)))


METRICS: Mapping[str, Metric] = {"error": error, "kl": kl, "perplexity": perplexity, "top1": top1}


def metric(name: str) -> Metric:
    """A metric by its name, or a function of the user's as ``file.py:function`` or ``package.module:function``.

    Raises:
        BadInput: There is no such metric, file or function.
    """
    if name in METRICS:
        return METRICS[name]
    if ":" not in name:
        raise BadInput(f"there is no metric '{name}'", hint=f"{nearest(name, METRICS)}; or give FILE.py:FUNCTION")
    return _user(named_function(name, "metric"), name)


def _user(found: Callable[..., Any], name: str) -> Metric:
    def call(reference: Cases, outputs: Cases, inputs: Sequence[Arrays]) -> float:
        try:
            return _number(float(found(outputs, reference, inputs)))
        except Exception as failure:  # whatever the user's code raises
            raise BadInput(
                f"metric '{name}' failed",
                why=f"{type(failure).__name__}: {failure}",
                hint="it is called as function(outputs, reference_outputs, inputs) and returns a number",
            ) from failure

    return call


def _number(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _float(array: Array) -> Array:
    return np.asarray(array, dtype=np.float64)


def _comparable(want: Array, got: Array) -> bool:
    """Whether both have the same shape, and the candidate has numbers where the reference has."""
    if want.shape != got.shape:
        return False
    return not want.size or bool(np.isfinite(_float(got))[np.isfinite(_float(want))].all())


def _scores(reference: Cases, outputs: Cases, metric: str) -> Iterator[tuple[Array, Array]]:
    """The first output with a last axis to choose from, of reference and candidate, case by case."""
    name = next((n for n, a in reference[0].items() if a.ndim and a.shape[-1] > 1), None)
    if name is None:
        raise BadInput(f"metric '{metric}' needs an output with scores along its last axis")
    for want, got in zip(reference, outputs, strict=True):
        yield _float(want[name]), _float(got[name]) if name in got else np.empty(0)


def _log_softmax(scores: Array) -> Array:
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def language(outputs: Mapping[str, Array], inputs: Arrays) -> tuple[str, Array, Array] | None:
    """The name of the logits, the tokens, and which of the positions but the last count; None for other models."""
    ids = {n: a for n, a in inputs.items() if a.ndim == 2 and a.dtype.kind in "iu"}
    tokens = ids.get("input_ids", next(iter(ids.values()), None))
    if tokens is not None:
        for name, array in outputs.items():
            if array.ndim == 3 and array.shape[:2] == tokens.shape:
                mask = ids.get("attention_mask", np.ones_like(tokens))
                if mask.shape != tokens.shape:
                    mask = np.ones_like(tokens)
                return name, tokens, (mask[:, 1:] * mask[:, :-1]) > 0
    return None


def _tokens(outputs: Mapping[str, Array], inputs: Arrays) -> tuple[str, Array, Array]:
    found = language(outputs, inputs)
    if found is not None:
        return found
    raise BadInput(
        "metric 'perplexity' needs a language model",
        why="there is no pair of integer inputs [batch, length] and outputs [batch, length, vocabulary]",
    )
