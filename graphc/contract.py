"""What a pass and a backend are: the two interfaces that everything else plugs into.

Both are frozen dataclasses. Their fields are their options: on the command line, in recipes, in searches
and in the documentation.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from graphc.bounds import Bounds, check
from graphc.errors import BadInput

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from graphc.cache import Store
    from graphc.stats import Request, Statistics

Arrays = Mapping[str, "np.ndarray[Any, Any]"]
"""Tensors by input or output name."""


def option(default: Any, help: str, **bounds: float) -> Any:
    """A dataclass field that is an option of a pass or a backend.

    Args:
        default: The default value; it must be immutable.
        help: One sentence for ``graphc list NAME`` and the documentation.
        bounds: Those of :class:`graphc.bounds.Bounds` that a number must be within, e.g. ``least=0, below=1``.
    """
    return field(default=default, metadata={"help": help, "bounds": Bounds(**bounds) if bounds else None})


class Effect(enum.Enum):
    """What a pass may do to the function that a model computes."""

    EXACT = "exact"
    """The model computes the same, up to the rounding of its dtype. The runner checks it."""
    LOSSY = "lossy"
    """The model computes something else. The runner measures how far it is."""


@dataclass(frozen=True)
class Refusal:
    """Something that was tried and did not apply.

    Attributes:
        node: The node (or value) where it was tried.
        reason: Why it did not apply, in plain words and without the node's name, so that equal reasons group.
        count: How many places the same reason stands for; ``node`` is then the first of them.
    """

    node: str
    reason: str
    count: int = 1


class PassResult:
    """What one run of a pass did, and what it left alone and why.

    Attributes:
        notes: What the user should know of the result.
        losses: What each layer alone would cost, where that was measured: a relative squared error by name.
    """

    def __init__(self) -> None:
        self._changes: Counter[str] = Counter()
        self._refusals: dict[str, list[str]] = {}
        self.notes: list[str] = []
        self.losses: dict[str, float] = {}

    def change(self, what: str, count: int = 1) -> None:
        """Record ``count`` changes of the same kind, e.g. ``"Identity removed"``."""
        if count:
            self._changes[what] += count

    def refuse(self, node: ir.Node | ir.Value | str, reason: str) -> None:
        """Record that something did not apply at ``node``."""
        name = node if isinstance(node, str) else (node.name or "")
        self._refusals.setdefault(reason, []).append(name)

    def note(self, text: str) -> None:
        """Tell the user something about the result that is neither a change nor a refusal."""
        if text not in self.notes:
            self.notes.append(text)

    @property
    def changed(self) -> bool:
        return bool(self._changes)

    @property
    def changes(self) -> list[str]:
        """Each kind of change once, with how often it happened, in the order of its first occurrence."""
        return [what if n == 1 else f"{what} (×{n})" for what, n in self._changes.items()]

    @property
    def refusals(self) -> list[Refusal]:
        """Refusals, equal reasons grouped."""
        return [Refusal(nodes[0], reason, len(nodes)) for reason, nodes in self._refusals.items()]

    def places(self, reason: str) -> Sequence[str]:
        """The names of all nodes that were refused for ``reason``."""
        return self._refusals.get(reason, ())


@dataclass(frozen=True)
class Needs:
    """What a pass wants the runner to have collected before it runs.

    Attributes:
        statistics: Requests of ``graphc.stats``, e.g. ``GramOf("h.3.mlp.act")`` or ``GradientsOf("h.3.mlp.w")``.
        calibration: Whether samples are wanted: to probe losses on, or to collect more while the pass runs.
        timings: Whether ``Context.time`` is wanted.
    """

    statistics: frozenset[Request[Any]] = frozenset()
    calibration: bool = False
    timings: bool = False


@dataclass(frozen=True)
class Capabilities:
    """What a target can run, as asked of the installed runtime; without one, what is portable.

    Attributes:
        name: The target, e.g. ``"onnxruntime"``.
        max_ir: The highest ONNX IR version that it loads.
        max_opset: The highest opset version by domain (``""`` is the standard one).
        kernels: ``(domain, operator, provider)`` for which a kernel exists; empty when it could not be asked.
        providers: The execution providers that really start on this machine.
        portable: Whether only standard ONNX may be emitted.
    """

    name: str
    max_ir: int
    max_opset: Mapping[str, int]
    kernels: frozenset[tuple[str, str, str]] = frozenset()
    providers: tuple[str, ...] = ()
    portable: bool = True

    def has_kernel(self, domain: str, operator: str, provider: str = "CPUExecutionProvider") -> bool:
        return (domain, operator, provider) in self.kernels


@dataclass(frozen=True)
class Probe:
    """Two ways to compute the same, to be timed against each other on the target.

    Attributes:
        signature: What is timed, in words: operators, dtypes, sizes. Equal signatures are timed once.
        before: A model of the standard operators.
        after: A model of what may take their place, with the same inputs.
        inputs: Arrays for both.
        shared: Outputs of ``after`` that are written in place, each with the input whose buffer it takes.
        beside: Other arrays that both are run with once for every ``times`` runs with ``inputs``; what counts is the
            time of all these runs.
        times: See ``beside``.
    """

    signature: str
    before: ir.Model
    after: ir.Model
    inputs: Arrays
    shared: Mapping[str, str] = field(default_factory=dict)
    beside: Arrays | None = None
    times: int = 1


Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, total)``; a total of 0 means that it is not known."""


Timer = Callable[[Sequence["Probe"], Progress], Mapping[str, tuple[float, float]]]
"""Gives bounds of the ratio after / before of the times of probes, by signature, without what does not run."""


def no_progress(what: str, done: int, total: int) -> None:
    """The progress callback that shows nothing."""


def _no_statistics() -> Statistics:
    from graphc.stats import Statistics

    return Statistics()


def no_collector(model: ir.Model, requests: Iterable[Request[Any]]) -> Statistics:
    """The collector of a context that was made without one."""
    raise BadInput("there is no calibration data", hint="give some with --calibrate")


@dataclass(frozen=True)
class Context:
    """What the runner gives a pass: everything from outside the model that it may look at.

    Attributes:
        target: What the target can run.
        seed: The seed of everything random in the pass.
        checkable: Whether the model can be run here, and hence the result be checked.
        statistics: What ``Pass.needs`` asked for, by request.
        collect: ``collect(model, requests)`` collects more while the pass runs, of any model: of its own half changed
            one, say, where later layers are to see what earlier ones have become.
        original: The model as it came into the run, at the working opset, for passes that compare with it; not to be
            changed. None if the run was resumed from a half done one.
        store: Where unfinished work may be kept by content; None for nowhere.
        data: Samples to check on given by the user, each a mapping from input name to array; empty if none.
        calibration: Samples that statistics and losses are taken from: the user's, or some made to fit.
        labels: What the outputs should be for them, one array a sample; empty if unknown.
        time: Gives the ratio after / before of the times of probes, by signature, if asked for; without one that may
            not be measured.
        progress: ``progress(what, done, total)``; call it in loops that may exceed a second.
    """

    target: Capabilities
    seed: int = 0
    checkable: bool = True
    statistics: Statistics = field(default_factory=_no_statistics)
    collect: Callable[[ir.Model, Iterable[Request[Any]]], Statistics] = no_collector
    original: ir.Model | None = None
    store: Store | None = None
    data: Sequence[Arrays] = ()
    calibration: Sequence[Arrays] = ()
    labels: Sequence[np.ndarray[Any, Any]] = ()
    time: Callable[[Sequence[Probe]], Mapping[str, float]] | None = None
    progress: Callable[[str, int, int], None] = no_progress


@dataclass(frozen=True)
class Pass(abc.ABC):
    """A named rewrite with typed options and an effect.

    A pass changes the model it is given in place; the runner keeps a snapshot. It decides everything before
    it changes anything, refuses with a reason, and does no I/O, no logging, nothing random without the
    seed of its context. The runner checks or measures what it did.
    """

    effect: ClassVar[Effect]
    unchecked_ok: ClassVar[bool] = False
    """Whether the pass has a part that is safe on a model that cannot be run here (it then looks at
    ``Context.checkable``); the runner does not call other passes on such a model."""

    timed_on: ClassVar[tuple[str, ...]] = ("onnxruntime",)
    """The targets that its probes are models for; on others nothing is timed for it."""

    def __post_init__(self) -> None:
        check(self, self.name)

    @property
    def name(self) -> str:
        """The name on the command line: the file's, with hyphens."""
        return type(self).__module__.rpartition(".")[2].replace("_", "-")

    @property
    def alone(self) -> bool:
        """Whether it is for models of one graph: what several hand each other would become another thing in each."""
        return False

    def needs(self, model: ir.Model) -> Needs:
        """What must be collected before the pass runs on ``model``."""
        return Needs()

    def caveats(self, model: ir.Model, ctx: Context) -> Iterable[str]:
        """What the user should know before any work: that the target makes the pass pointless, say.

        It may look at the target and have probes timed (``ctx.time``, None if there is no time for that), and takes
        no longer.
        """
        return ()

    def levels(self, model: ir.Model) -> Sequence[Pass]:
        """The same pass from the strongest setting, which is itself, to the mildest; the gate backs off along it."""
        return (self,)

    @abc.abstractmethod
    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Change ``model`` in place and say what was done and what was left alone."""

    def spec(self) -> str:
        """The pass as recipe text, with the options that are not at their defaults."""
        return spec_text(self.name, self)


class Runnable(abc.ABC):
    """Something that runs: a loaded artifact."""

    provider: str
    """What really runs it, e.g. ``"CPUExecutionProvider"``."""

    shapes: tuple[Mapping[str, tuple[int, ...]], ...] = ()
    """The shapes of inputs, by name, for which it was compiled; empty if it takes all that the model does."""

    @abc.abstractmethod
    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Compute all outputs, by name."""


@dataclass(frozen=True)
class Backend(abc.ABC):
    """Turns a model into an artifact on disk, and an artifact into something that runs."""

    main: ClassVar[str] = "model.onnx"
    """The file of an artifact folder that holds the model."""
    when_slower: ClassVar[str] = ""
    """What to do about an output that is slower than the input model in ONNX Runtime."""

    @property
    def name(self) -> str:
        """The name on the command line: the file's, with hyphens."""
        return type(self).__module__.rpartition(".")[2].replace("_", "-")

    def check(self, model: ir.Model) -> None:  # noqa: B027  most have nothing to refuse
        """Refuse, before any work, a model that cannot be emitted, or options that cannot be used here.

        Raises:
            BadInput: All that is in the way, with what to do.
        """

    @abc.abstractmethod
    def capabilities(self) -> Capabilities:
        """What the target can run."""

    @abc.abstractmethod
    def emit(self, model: ir.Model, folder: Path, *, progress: Progress = no_progress) -> Mapping[str, Any]:
        """Write everything that the artifact needs to run into ``folder``, which exists and is empty.

        Args:
            model: What to emit.
            folder: Where.
            progress: ``progress(what, done, total)``.

        Returns:
            What the artifact needs of its runtime (session options, say), for the manifest.
        """

    def emit_parts(self, models: Mapping[str, ir.Model], folder: Path) -> Mapping[str, Mapping[str, Any]]:
        """Write several graphs of one model into ``folder``, ``NAME.onnx`` each; what they share, once.

        Returns:
            What each needs of its runtime, by name, for the manifest.

        Raises:
            BadInput: The backend writes one graph only.
        """
        raise BadInput(
            f"target '{self.name}' writes one graph, not several",
            why=f"the model is {', '.join(models)}",
            hint="give one of them as an .onnx file",
        )

    def emit_file(self, model: ir.Model, path: Path) -> None:
        """Write one file, ``path``, in the folder where it shall be (weights beside it when needed), atomically.

        What is written needs nothing but the runtime's defaults.

        Raises:
            BadInput: The backend writes artifact folders only.
        """
        raise BadInput(f"target '{self.name}' writes a folder, not one file", where=str(path), hint="give -o FOLDER/")

    @abc.abstractmethod
    def load(self, path: Path, *, frugal: bool = False) -> Runnable:
        """Load an artifact folder, or a single file if the backend has such a form, in a fresh session.

        Args:
            path: What ``emit`` or ``emit_file`` wrote.
            frugal: Spend time to save memory; what is loaded so must not be timed.
        """

    def timer(self) -> Timer | None:
        """What times probes as the target runs them; None if it cannot be done here."""
        return None

    def unrealised(self, path: Path) -> Sequence[str]:
        """What the target does not run, or store, as the emitted model has it, in whole sentences.

        Args:
            path: What ``emit`` or ``emit_file`` wrote.
        """
        return ()

    def spec(self) -> str:
        """The backend as text, with the options that are not at their defaults."""
        return spec_text(self.name, self)


def spec_text(name: str, instance: Any) -> str:
    """``name{option=value ...}`` with the options of a dataclass that differ from their defaults."""
    changed = [
        f"{f.name.replace('_', '-')}={value_text(getattr(instance, f.name))}"
        for f in dataclasses.fields(instance)
        if getattr(instance, f.name) != f.default
    ]
    return f"{name}{{{' '.join(changed)}}}" if changed else name


def value_text(value: Any) -> str:
    """An option's value as recipe text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ",".join(map(value_text, value)) + "]"
    if isinstance(value, str):
        plain = value[:1].isalpha() and all(c.isalnum() or c in "_-./:%+" for c in value)
        if plain and value not in ("true", "false", "none"):
            return value
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return "none" if value is None else str(value)
