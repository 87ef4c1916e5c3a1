"""The layers of a model, and how each is quantized."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import onnx_ir as ir

from graphc.contract import PassResult
from graphc.quantization.allocation import Way
from graphc.quantization.options import NO_LIMITS, Options
from graphc.quantization.sites import Site
from graphc.quantization.ways import sites_of


@dataclass(frozen=True)
class Layers:
    """Weights of a model and how each is quantized.

    Attributes:
        options: What ``quantize`` was told.
        model: The model.
        sites: The weights, in the order in which they are first read.
        ways: How each is quantized; None: it stays as it is.
    """

    options: Options
    model: ir.Model
    sites: Sequence[Site]
    ways: Sequence[Way | None]

    @property
    def chosen(self) -> list[tuple[Site, Way]]:
        """The weights that are quantized, with their ways."""
        return [(site, way) for site, way in zip(self.sites, self.ways, strict=True) if way]

    def given(self, ways: Sequence[Way | None]) -> Self:
        """The same weights in other ways."""
        return dataclasses.replace(self, ways=ways)

    def told(self, **options: Any) -> Self:
        """The same with other options."""
        return dataclasses.replace(self, options=dataclasses.replace(self.options, **options))

    @property
    def quick(self) -> Self:
        """The same, each weight at its nearest code and without limits that they share: by this ways are compared."""
        return self.told(**NO_LIMITS, rounding="nearest", refine=0)

    def copied(self) -> Self:
        """The same weights in a copy of the model."""
        model = self.model.clone()
        return dataclasses.replace(self, model=model, sites=sites_of(self.options, model, PassResult()))
