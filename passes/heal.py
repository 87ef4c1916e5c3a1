"""Healing: what is left of a pruned or quantized model learns to answer as the original did."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from graphc.contract import Arrays, Context, Effect, Needs, Pass, PassResult, option
from graphc.edit import Array
from graphc.errors import BadInput, nearest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from graphc.healing.points import Kind
    from graphc.healing.training import State, Trainer
    from graphc.healing.weights import Parts

GENERATED = "trained on generated inputs: do not trust the quality; give samples of real data with --calibrate"

RATES = {"all": 1e-3, "bias-norm": 3e-3, "lora": 3e-3, "codes": 1e-3}
"""The highest learning rate where none is given: right for what pruning has hurt, while what least squares has repaired
may need ``GENTLER`` times that."""
GENTLER = 0.1


@dataclass(frozen=True)
class Heal(Pass):
    """Train the weights for a short time to give the outputs and hidden states of the original model.

    The original is the model as it came into the run, or ``teacher``. What is zero stays zero, so that ``shrink`` may
    come before or after. Of quantized weights the scales are trained, and on request codes: it comes before ``lower``.
    If nothing is better on held-out data than the start, the start is kept.
    """

    effect: ClassVar[Effect] = Effect.LOSSY

    steps: int = option(200, "Optimizer steps.", least=0)
    minutes: float = option(0.0, "Wall time after which it ends early; 0 is no limit.", least=0)
    learning_rate: float = option(
        0.0,
        "The highest learning rate; 0 is 1e-3 for all weights, else 3e-3, and a tenth of it where that does not help.",
        least=0,
    )
    batch: int = option(
        0, "Rows a step, run case by case with gradients added up; 0 is 32, or as many as have 2048 tokens.", least=0
    )
    weights: Literal["all", "bias-norm", "lora", "codes"] = option(
        "all",
        "What is trained: all weights, of quantized ones the scales; biases and norms; a product of low rank added to "
        "each matrix; or all, and codes of 4 bits at most.",
    )
    rank: int = option(8, "The rank of what weights=lora adds.", least=1)
    temperature: float = option(1.0, "Of the softmax by which scores are compared.", above=0)
    loss: Literal["auto", "kl", "mse"] = option(
        "auto", "How outputs are compared: as distributions, as values, or by what makes them."
    )
    hidden: float = option(1.0, "The weight of the hidden states that both models have, beside the outputs.", least=0)
    taps: int = option(4, "How many hidden states are compared.", least=0)
    labels: float = option(0.5, "The weight of the labels, where the data has some.", least=0)
    weight_decay: float = option(0.0, "AdamW's, of matrices.", least=0)
    warmup: float = option(
        0.1, "The part of the steps in which the learning rate rises; then it falls as a cosine.", least=0, below=1
    )
    clip: float = option(1.0, "The largest norm of the gradient; 0 is any.", least=0)
    held_out: float = option(0.1, "The part of the data that is not trained on, and decides.", least=0, below=1)
    patience: int = option(4, "Readings (of about 10) without a better one after which it ends; 0 is never.", least=0)
    keep_zeros: bool = option(True, "Whether weights that are exactly zero stay so.")
    precision: Literal["model", "bfloat16"] = option("model", "What products are computed in; updates are float32.")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "Where; 'auto' is a CUDA device if there is one.")
    teacher: Path | None = option(  # noqa: RUF009
        None, "A model file to learn from instead of the model as it came."
    )

    def needs(self, model: ir.Model) -> Needs:
        return Needs(calibration=True)

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        result = PassResult()
        if not self.steps:
            result.refuse("", "steps is 0: nothing was asked for")
            return result
        if model.functions:
            InlinePass()(model)  # whose weights are then constants of the graph
        original = self._original(ctx)
        _fits(model, original)
        samples, labels = self._data(original, ctx, result)
        start = time.monotonic()
        trainer, outputs = self._trainer(model, original, samples, labels, ctx)
        if not len(trainer.weights):
            result.refuse("", f"there is nothing to train with weights={self.weights}")
            return result
        state = trainer.run()
        gentler = self._gentler(start) if state.first and not state.best < state.first else None
        if gentler is not None:
            trainer, outputs = gentler._trainer(model, original, samples, labels, ctx)
            state = trainer.run()
        for note in trainer.notes:
            result.refuse("", note)
        if not state.best < state.first:
            result.refuse(
                "",
                "nothing was better on held-out data than the start, which was kept"
                if state.first
                else "the model answers as the original does: there is nothing to heal",
            )
            return result
        _write(model, trainer)
        result.change(f"loss on held-out data from {state.first:.4g} to {state.best:.4g} in {_steps(state)}")
        if gentler is not None:
            result.change(f"at {RATES[self.weights]:g} nothing was better: learning rate {gentler.learning_rate:g}")
        result.change("constant trained", len(trainer.weights))
        result.change(f"compared: {', '.join(f'{name} ({kind})' for name, kind in outputs.items())}")
        if trainer.objective.hidden:
            result.change("hidden state compared", len(trainer.objective.hidden))
        return result

    def _gentler(self, start: float) -> Heal | None:
        """The same at a lower learning rate, in the time that is left; None where the rate was given, or time is up."""
        left = self.minutes - (time.monotonic() - start) / 60
        if self.learning_rate or (self.minutes and left <= 0):
            return None
        return replace(self, learning_rate=RATES[self.weights] * GENTLER, minutes=left if self.minutes else 0.0)

    def _original(self, ctx: Context) -> ir.Model:
        if self.teacher is not None:
            from graphc import frontends

            return frontends.load(self.teacher).model
        if ctx.original is None:
            raise BadInput(
                "there is no original to learn from",
                where="heal",
                why="the model was resumed, or the pass was called without one",
                hint="name it: heal{teacher=model.onnx}",
            )
        return ctx.original

    def _data(self, original: ir.Model, ctx: Context, result: PassResult) -> tuple[Sequence[Arrays], Sequence[Array]]:
        if len(ctx.calibration):
            return ctx.calibration, ctx.labels
        from graphc import measure

        result.refuse("", GENERATED)
        return measure.samples(original, ctx.seed), ()

    def _trainer(
        self, model: ir.Model, original: ir.Model, samples: Sequence[Arrays], labels: Sequence[Array], ctx: Context
    ) -> tuple[Trainer, Mapping[str, Kind]]:
        from graphc.fx import to_torch
        from graphc.healing import points

        names = points.hidden(model, original, self.taps) if self.hidden else []
        student, teacher = to_torch(_tapped(model, names), quantized=True), to_torch(_tapped(original, names))

        from graphc.healing.objective import Objective
        from graphc.healing.training import Plan, Trainer, batch_of
        from graphc.healing.weights import Weights

        objective = Objective(
            kinds := self._kinds(original),
            names,
            temperature=self.temperature,
            by_hidden=self.hidden,
            by_labels=self.labels,
            mask=Objective.mask_of(original),
        )
        parts: Parts = self.weights
        plan = Plan(
            steps=self.steps,
            minutes=self.minutes,
            rate=self.learning_rate or RATES[parts],
            warmup=self.warmup,
            batch=self.batch or batch_of(samples[0]),
            decay=self.weight_decay,
            clip=self.clip,
            held_out=self.held_out,
            patience=self.patience,
            bfloat16=self.precision == "bfloat16",
            seed=ctx.seed,
        )
        trainer = Trainer(
            student,
            teacher,
            Weights(student, parts, rank=self.rank, seed=ctx.seed, keep_zeros=self.keep_zeros),
            objective,
            samples,
            labels,
            plan,
            _device(self.device),
            store=ctx.store,
            name=_key(self, model, original, samples, labels, ctx) if ctx.store is not None else "",
            progress=ctx.progress,
        )
        return trainer, kinds

    def _kinds(self, original: ir.Model) -> dict[str, Kind]:
        """What each floating-point output holds."""
        from graphc.healing.points import kind

        found: dict[str, Kind] = {}
        for value in original.graph.outputs:
            if value.dtype is None or value.dtype.is_floating_point():
                made = kind(value)
                if self.loss == "mse" or made == "values":
                    made = "values" if self.loss != "kl" else "logits"
                found[str(value.name)] = made
        if not found:
            raise BadInput("the model has no floating-point output to compare", where="heal")
        return found


def _fits(model: ir.Model, original: ir.Model) -> None:
    """Check that both models have the same inputs and outputs by name."""
    for what, mine, theirs in (
        ("input", model.graph.inputs, original.graph.inputs),
        ("output", model.graph.outputs, original.graph.outputs),
    ):
        known = {str(v.name) for v in theirs if not v.is_initializer()}
        for value in mine:
            if not value.is_initializer() and value.name not in known:
                raise BadInput(
                    f"the original has no {what} '{value.name}'", where="heal", hint=nearest(str(value.name), known)
                )


def _tapped(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy of a model that also puts out some of its values."""
    clone = model.clone()
    made = {v.name: v for node in clone.graph for v in node.outputs}
    clone.graph.outputs.extend(made[name] for name in names)
    return clone


def _device(name: str) -> torch.device:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("there is no CUDA device", where="heal{device}", hint="leave it out, or device=cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _key(
    heal: Heal, model: ir.Model, original: ir.Model, samples: Sequence[Arrays], labels: Sequence[Array], ctx: Context
) -> str:
    """The name of unfinished work: a hash of all that it depends on."""
    import torch

    from graphc.cache import code_hash, key
    from graphc.collection.hashing import data_hash, value_hashes

    hashes = [value_hashes(each, each.graph.outputs) for each in (model, original)]
    return key(
        healing=heal.spec(),
        models=[[found[v] for v in each.graph.outputs] for found, each in zip(hashes, (model, original), strict=True)],
        names=[str(v.name) for v in model.graph.outputs],
        data=data_hash(samples, ({"labels": array} for array in labels)),
        seed=ctx.seed,
        torch=torch.__version__,
        code=code_hash(),
    )


def _write(model: ir.Model, trainer: Trainer) -> None:
    """Put the trained weights into the model, in place."""
    from graphc.fx import from_torch
    from graphc.fx.constants import named

    trainer.weights.fold(trainer.student)
    healed = from_torch(trainer.student.cpu(), model)
    new = dict(named(healed))
    for name, value in named(model):
        node, made = value.producer(), new[name]
        if node is None:
            value.const_value = made.const_value
        elif (other := made.producer()) is not None:
            node.attributes.clear()
            node.attributes.update(other.attributes)


def _steps(state: State) -> str:
    return f"{state.step} steps" + (f", the best after {state.best_step}" if state.best_step != state.step else "")
