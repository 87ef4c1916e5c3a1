"""Runs the calibration data through a model and collects what was asked for.

Values are tapped as outputs and every sample is added as it comes, so that memory does not grow with the data. What
does not fit into memory at once is collected in several sweeps. Results are kept in the cache by what they depend on:
the part of the model that computes the values, the data, and the request. A run that was interrupted goes on where
it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from graphc import caches
from graphc.cache import Store, key
from graphc.collection.hashing import data_hash, value_hashes
from graphc.contract import Arrays, no_progress
from graphc.errors import BadInput, nearest
from graphc.stats.base import Array, Request, Statistic, Statistics, Valid

if TYPE_CHECKING:
    from graphc.collection.loss import Loss

MEMORY = 2 << 30
"""Bytes of statistics that are collected in one sweep."""

SMALL = 1 << 20
"""Bytes up to which a statistic is kept in memory once it was read."""

SAVE_EVERY = 60.0
"""Seconds of work that an interruption may cost."""


@dataclass
class Collector:
    """Collects statistics over calibration data.

    Attributes:
        samples: The calibration data, arrays by input name.
        labels: What the outputs should be, one array a sample; empty if unknown.
        provider: The execution provider that runs the model.
        store: Where results are kept; None for a temporary folder.
        memory: Bytes of statistics that one sweep may collect.
        save_every: Seconds between two savings of unfinished sums.
        progress: ``progress(what, done, total)``.
    """

    samples: Sequence[Arrays]
    labels: Sequence[Array] = ()
    provider: str = "CPUExecutionProvider"
    store: Store | None = None
    memory: int = MEMORY
    save_every: float = SAVE_EVERY
    progress: Callable[[str, int, int], None] = no_progress
    _temporary: list[tempfile.TemporaryDirectory[str]] = field(default_factory=list, repr=False)

    def collect(self, model: ir.Model, requests: Iterable[Request[Any]]) -> Statistics:
        """The statistics of a model's values over all samples.

        Args:
            model: Any model; only the part that computes the requested values runs. It is not changed.
            requests: What is wanted; equal ones are collected once.

        Raises:
            BadInput: A value does not exist or cannot be tapped, has NaN, or the model does not run.
        """
        wanted = sorted(set(requests), key=repr)
        if not wanted:
            return Statistics()
        if not self.samples:
            raise BadInput("there is no calibration data", hint="give some with --calibrate")
        store = self.store or self._scratch()
        values = _values(model, wanted)
        names = self._names(model, wanted, values)
        missing = [request for request in wanted if store.get(names[request]) is None]
        for backward in (False, True):
            part = [request for request in missing if request.backward is backward]
            for sweep in _sweeps(part, _sizes(model, values), self.memory):
                self._sweep(model, sweep, names, store)
        held = {request: _reader(store, names[request], request, keep=self._temporary) for request in wanted}
        return Statistics(held)

    @cached_property
    def _data(self) -> str:
        return data_hash(self.samples, ({"labels": labels} for labels in self.labels))

    def _names(
        self, model: ir.Model, wanted: Sequence[Request[Any]], values: Mapping[str, ir.Value]
    ) -> dict[Request[Any], str]:
        """The cache entries of requests."""
        roots = list(values.values())
        if any(request.backward for request in wanted):
            # A gradient depends on all that comes after the value as well.
            roots += list(model.graph.outputs)
        hashes = value_hashes(model, roots)
        outputs = [hashes[v] for v in model.graph.outputs] if any(r.backward for r in wanted) else []
        masks = padding_mask(model)
        found = {}
        for request in wanted:
            plain = dataclasses.replace(request, **dict.fromkeys(_name_fields(request), ""))
            found[request] = key(
                request=[type(request).__qualname__, repr(plain)],
                values=[hashes[values[name]] for name in request.values()],
                rest=[outputs, masks] if request.backward else masks,
                data=self._data,
                provider=self.provider,
                code=_code(),
            )
        return found

    def _sweep(
        self, model: ir.Model, requests: Sequence[Request[Any]], names: Mapping[Request[Any], str], store: Store
    ) -> None:
        """Collect some requests in one pass over the data, and keep each."""
        partly = key(unfinished=sorted(names[request] for request in requests))
        done, held = _unfinished(store, partly, requests)
        mask = padding_mask(model)
        run = self._backward(model, requests) if requests[0].backward else self._forward(model, requests)
        saved = time.monotonic()
        for i in range(done, len(self.samples)):
            self.progress("collecting statistics", i, len(self.samples))
            sample = self.samples[i]
            found = run(i)
            valid = Valid(sample[mask].astype(bool) if mask in sample else None)
            for request in requests:
                try:
                    made = request.of([found[name] for name in request.named()], valid)
                except ValueError as error:
                    raise BadInput(
                        "statistics cannot be collected", where=f"sample {i} of the calibration data", why=str(error)
                    ) from None
                if request in held:
                    held[request].merge(made)
                else:
                    held[request] = made
            del found
            if time.monotonic() - saved >= self.save_every and i + 1 < len(self.samples):
                store.put(partly, partial(_save_unfinished, held, requests, i + 1), replace=True)
                saved = time.monotonic()
        for request in requests:
            store.put(names[request], partial(_save, held.pop(request)))
        store.drop(partly)

    def _forward(self, model: ir.Model, requests: Sequence[Request[Any]]) -> Callable[[int], dict[str, Array]]:
        """A function that runs one sample and gives the tapped values."""
        from graphc import runtime
        from graphc.checking.interface import fitting

        wanted = list(dict.fromkeys(name for request in requests for name in request.values()))
        fed = {v.name for v in model.graph.inputs}
        computed = [name for name in wanted if name not in fed]
        if not computed:
            return lambda i: dict(self.samples[i])
        tapped = with_outputs(model, computed)
        big = runtime.constants_nbytes(tapped) > runtime.BIG
        session = runtime.session(tapped, optimise=not big, provider=self.provider, frugal=big)
        read = set(session.input_names)

        def run(i: int) -> dict[str, Array]:
            sample = fitting(model, self.samples[i])
            given = {name: sample[name] for name in wanted if name in sample}
            return given | session.run({name: array for name, array in sample.items() if name in read})

        return run

    def _backward(self, model: ir.Model, requests: Sequence[Request[Any]]) -> Callable[[int], dict[str, Array]]:
        """A function that runs a sample forward and back: gradients by values, and values that are asked for."""
        from graphc.collection.loss import Loss

        given = dict.fromkeys(name for request in requests for name in request.given())
        wanted = dict.fromkeys(n for request in requests for n in request.values() if n not in request.given())
        loss: Loss = Loss(model, list(wanted), list(given))
        return lambda i: loss.gradients(self.samples[i], self.labels[i] if len(self.labels) else None)

    def _scratch(self) -> Store:
        """A store that goes away with this collector."""
        if not self._temporary:
            self._temporary.append(tempfile.TemporaryDirectory(prefix="graphc-"))
        return Store(Path(self._temporary[0].name))


def with_outputs(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy of a model whose outputs are these values, and which computes nothing else. It shares the tensors.

    Experts are not copied for each token that picks them.
    """
    from graphc.collection import picked

    copy = model.clone()
    graph = copy.graph
    by_name = {v.name: v for node in graph for v in node.outputs} | {v.name: v for v in graph.inputs}
    graph.outputs.clear()
    graph.outputs.extend(by_name[name] for name in names)
    RemoveUnusedNodesPass()(copy)
    picked.by_expert(copy)
    caches.name_presents(copy)
    return copy


def padding_mask(model: ir.Model) -> str:
    """The input that says which tokens are padding: a mask of shape (batch, length); "" if there is none."""
    from graphc.checking.roles import role

    found = [
        value.name or ""
        for value in model.graph.inputs
        if value.shape is not None and len(value.shape) == 2 and value.dtype is not None
        if value.dtype.is_integer() or value.dtype == ir.DataType.BOOL or "mask" in (value.name or "").lower()
        if role(model, value).mask or value.name == "attention_mask"
    ]
    return found[0] if len(found) == 1 else ("attention_mask" if "attention_mask" in found else "")


def _values(model: ir.Model, requests: Sequence[Request[Any]]) -> dict[str, ir.Value]:
    """The values of the main graph that requests name."""
    graph = model.graph
    known = {v.name or "": v for v in (*graph.inputs, *graph.initializers.values())}
    known |= {v.name or "": v for node in graph for v in node.outputs}
    found = {}
    for request in requests:
        for name in request.values():
            if name not in known or not name:
                raise BadInput(
                    f"nothing can be collected of '{name}'",
                    why="the model has no such value outside of bodies",
                    hint=nearest(name, known),
                )
            found[name] = known[name]
    return found


Sizes = Mapping[str, Sequence[int | None]]


def _sweeps(requests: Sequence[Request[Any]], sizes: Sizes, memory: int) -> list[list[Request[Any]]]:
    """Requests in rows that fit into memory together, in their order; what is alone too large has a row of its own."""
    sweeps: list[list[Request[Any]]] = []
    left = 0
    for request in requests:
        need = request.nbytes([sizes[name] for name in request.values()])
        if not sweeps or need > left:
            sweeps.append([])
            left = memory
        sweeps[-1].append(request)
        left -= need
    return sweeps


def _sizes(model: ir.Model, values: Mapping[str, ir.Value]) -> Sizes:
    """The sizes of values' axes, as far as they are known; shapes are inferred where some have none."""
    known: Mapping[str, ir.Value] = values
    if any(value.shape is None for value in values.values()):
        from graphc import shapes

        clone = model.clone()
        shapes.infer(clone)
        inferred = {v.name or "": v for node in clone.graph for v in node.outputs}
        known = {name: inferred.get(name, value) for name, value in values.items()}
    return {
        name: [d if isinstance(d, int) else None for d in value.shape] if value.shape is not None else [None]
        for name, value in known.items()
    }


def _name_fields(request: Request[Any]) -> list[str]:
    """The fields of a request that only name values: their hashes stand for them in the cache."""
    named = set(request.values())
    return [f.name for f in dataclasses.fields(request) if getattr(request, f.name) in named]


def _reader(store: Store, name: str, request: Request[Any], *, keep: object) -> Callable[[], Statistic]:
    """A function that reads a statistic; ``keep`` is what must live as long, a temporary folder."""
    kept: list[Statistic] = []

    def read(alive: object = keep) -> Statistic:
        if kept:
            return kept[0]
        entry = store.get(name)
        if entry is None:
            raise BadInput(
                "statistics were collected and are gone",
                where=str(store.folder),
                why="the cache is full, or another process emptied it",
                hint="raise GRAPHC_CACHE_LIMIT, or use --no-cache",
            )
        with np.load(entry / "statistic.npz", allow_pickle=False) as stored:
            found: Statistic = request.statistic.from_arrays(dict(stored))
        if found.nbytes <= SMALL:
            kept.append(found)
        return found

    return read


def _save(statistic: Statistic, folder: Path) -> None:
    arrays: Mapping[str, Any] = statistic.arrays()
    np.savez(folder / "statistic.npz", **arrays)


def _save_unfinished(
    held: Mapping[Request[Any], Statistic], requests: Sequence[Request[Any]], done: int, folder: Path
) -> None:
    for i, request in enumerate(requests):
        arrays: Mapping[str, Any] = held[request].arrays()
        np.savez(folder / f"{i}.npz", **arrays)
    (folder / "done.json").write_text(json.dumps(done))


def _unfinished(store: Store, name: str, requests: Sequence[Request[Any]]) -> tuple[int, dict[Request[Any], Statistic]]:
    """How many samples an interrupted run had added, and its sums."""
    entry = store.get(name)
    if entry is None:
        return 0, {}
    held: dict[Request[Any], Statistic] = {}
    for i, request in enumerate(requests):
        with np.load(entry / f"{i}.npz", allow_pickle=False) as stored:
            held[request] = request.statistic.from_arrays(dict(stored))
    return int(json.loads((entry / "done.json").read_text())), held


def _code() -> str:
    """SHA-256 of this package: statistics that other code collected do not count."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
