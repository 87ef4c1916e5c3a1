"""Collects the statistics that passes ask for, by running models over data."""

from graphc.collection.collector import Collector, padding_mask, with_outputs

__all__ = ["Collector", "padding_mask", "with_outputs"]
