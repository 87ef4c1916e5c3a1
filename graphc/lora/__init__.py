"""Low-rank adapters that a graph still computes beside its weights."""

from graphc.lora.fold import fold

__all__ = ["fold"]
