"""The options of ``quantize``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, Self

from graphc.contract import Pass, option
from graphc.errors import BadInput
from graphc.quantization.sites import KINDS

NO_LIMITS: dict[str, Any] = {"rank": False, "keep": 0, "budget": 0.0, "megabytes": 0.0, "time": 0.0}
"""Options with which all layers are quantized alike."""


@dataclass(frozen=True)
class Options(Pass):
    """What ``quantize`` can be told; the pass itself adds what it does."""

    scheme: Literal["weights", "dynamic", "static"] = option(
        "weights", "weights: they only; dynamic: activations too, as they come; static: activations by calibration."
    )
    bits: int = option(8, "Bits of a weight: 8, 4, 3 (stored in 4) or 2; dynamic and static take 8.")
    block: int = option(0, "Inputs of an output that share a scale: 16 to 256; 0: all of them; -1: the whole tensor.")
    symmetric: bool = option(True, "Codes with a sign around zero; false: unsigned, with zero points.")
    form: Literal["int", "float8e4m3fn", "float8e5m2"] = option("int", "Whether codes are integers or 8-bit floats.")
    rounding: Literal["nearest", "gptq", "awp"] = option(
        "nearest",
        "nearest: each weight for itself; gptq: so that the layer's output changes least, calibrated; awp: that by "
        "projected descent. With both, zeros stay.",
    )
    clip: Literal["none", "mse"] = option("none", "mse: narrow each range to where the squared error is least.")
    order: bool = option(True, "For rounding=gptq: columns with the largest inputs first.")
    damp: float = option(
        0.01, "For rounding=gptq: what is added to the Gram matrix's diagonal, as a part of its mean.", above=0
    )
    refine: int = option(
        0, "For rounding=gptq and awp: how often then scales are fitted to codes, and codes to scales.", least=0
    )
    guide: Literal["inputs", "loss", "curvature"] = option(
        "inputs",
        "For rounding=gptq and awp: inputs: all rows that a matrix multiplies count alike; loss: each by the squared "
        "gradient of the loss by what becomes of it, which needs torch; curvature: so, and errors of outputs make up "
        "for each other, for rounding=gptq.",
    )
    sequential: bool = option(False, "For rounding=gptq: collect each layer's inputs from quantized layers before it.")
    scaling: Literal["none", "smooth", "awq", "channels", "flatten"] = option(
        "none",
        "Move scales from activations to weights first, which is exact: SmoothQuant, AWQ's search, or, for "
        "scheme=static, channels brought to like ranges through Relu, sums, pooling and depthwise convolutions; or "
        "flatten, for dynamic and static: split channels that stand out into several (FlattenQuant); calibrated.",
    )
    extra: float = option(
        0.125, "For scaling=flatten: the part of its channels that an activation may grow by.", least=0, most=1
    )
    alpha: float = option(
        0.5, "For scaling=smooth: how much of the activation's range moves, from 0 to 1.", least=0, most=1
    )
    correct: bool = option(
        False, "Add to biases what the rounding of weights takes from the outputs' means; calibrated."
    )
    activations: Literal["auto", "minmax", "percentile", "mse", "entropy"] = option(
        "auto",
        "For scheme=static: how the range of an activation is chosen from what calibration saw; auto: minmax, "
        "unless another one, as tried on the model's outputs, halves the error.",
    )
    percentile: float = option(
        99.999, "For activations=percentile: the part of the values that is in the range.", above=50, most=100
    )
    full_range: bool = option(
        False,
        "For dynamic and static: all codes, whatever sums come to; on CPUs without VNNI right as an artifact only, "
        "which is slower.",
    )
    embeddings: int = option(
        8, "Bits of embeddings and of heads tied to them, and at least of convolutions of an input; 0 leaves them."
    )
    budget: float = option(
        0.0, "Bits per weight, scales included, that layers share by what their errors cost; 0: none.", least=0
    )
    megabytes: float = option(
        0.0, "Instead of budget: megabytes that all quantized weights may take together; 0: none.", least=0
    )
    time: float = option(
        0.0,
        "Instead of budget: the part of float32's time that products may take, as timed on the target; 0: none.",
        least=0,
    )
    rows: int = option(1, "For time: the rows that products are timed with.", least=1)
    choices: tuple[int, ...] = option((2, 3, 4, 8), "For a budget: the bits that a layer may get; or its own type.")
    rank: bool = option(False, "Measure what each layer alone costs, for the report; its bars: -v, --report FILE.html.")
    keep: int = option(0, "How many layers, the most sensitive first, get the fallback; what the gate raises.", least=0)
    fallback: int = option(0, "Bits of layers that are kept; 0: 8 for fewer bits, else their own type.")
    sensitivity: Literal["auto", "outputs", "layers", "loss"] = option(
        "auto",
        "How layers are ranked: measured at the model's outputs, estimated at their own, or estimated by what their "
        "errors add to the loss (needs torch); auto: one of the first two, by size.",
    )
    least: int = option(1024, "Elements from which a weight is quantized; scheme=static takes all.")
    kinds: tuple[str, ...] = option(KINDS, "The operators whose weights are looked at; Gather for embeddings.")
    include: tuple[str, ...] = option((), "Patterns of weight or node names to look at; all if none is given.")
    exclude: tuple[str, ...] = option((), "Patterns of weight or node names to leave alone.")

    def __post_init__(self) -> None:
        super().__post_init__()
        where = self.name
        for name, bits in (("bits", self.bits), *(("choices", b) for b in self.choices)):
            if bits not in (2, 3, 4, 8):
                raise BadInput(f"{name} cannot be {bits}", where=where, hint="2, 3, 4 or 8")
        for name, bits in (("embeddings", self.embeddings), ("fallback", self.fallback)):
            if bits not in (0, 4, 8):
                raise BadInput(f"{name} cannot be {bits}", where=where, hint="0, 4 or 8")
        if self.block not in (-1, 0) and not 16 <= self.block <= 256:
            raise BadInput(
                f"block cannot be {self.block}", where=where, hint="0, -1, or 16 to 256; powers of two are fast"
            )
        if self.form != "int" and (self.bits != 8 or not self.symmetric or self.rounding != "nearest"):
            raise BadInput("floats have 8 bits, a sign, and no gptq", where=where, hint="leave the other options out")
        plain = self.bits == 8 and not self.block and self.symmetric and self.form == "int" and not self.limits
        if self.scheme != "weights" and not plain:
            raise BadInput(
                f"scheme={self.scheme} takes symmetric 8-bit integers with a scale for each output",
                where=where,
                hint="leave bits, block, symmetric, form and budget out",
            )
        if self.scaling == "channels" and self.scheme != "static":
            raise BadInput("scaling=channels is for scheme=static", where=where, hint="smooth or awq")
        if self.scaling == "flatten" and self.scheme == "weights":
            raise BadInput("scaling=flatten is for activations", where=where, hint="scheme=dynamic, or static")
        if len(self.limits) > 1:
            raise BadInput("budget, megabytes and time are three ways to limit the same", where=where, hint="give one")
        for kind in self.kinds:
            if kind not in KINDS:
                raise BadInput(f"weights of '{kind}' are not looked at", where=where, hint=", ".join(KINDS))

    @property
    def limits(self) -> list[float]:
        """The limits that layers share; one at most."""
        return [limit for limit in (self.budget, self.megabytes, self.time) if limit]

    def plain(self, **options: Any) -> Self:
        """A way to quantize one product as this does it, without what takes long and changes no speed."""
        off = {"rounding": "nearest", "scaling": "none", "clip": "none", "correct": False, "least": 0}
        off["activations"] = "minmax"
        return dataclasses.replace(self, **{**NO_LIMITS, **off, "include": (), "exclude": (), **options})
