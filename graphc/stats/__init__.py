"""What calibration collects: requests, and the statistics that they give.

A pass returns requests from ``needs`` and finds the statistics in ``Context.statistics``; while it changes the model
it may ask for more with ``Context.collect``.
"""

from graphc.stats.base import Request, Statistic, Statistics, Valid
from graphc.stats.counts import Counts, CountsOf
from graphc.stats.gradients import GradientGramOf, Gradients, GradientsOf, GuidedGramOf
from graphc.stats.gram import Cross, CrossOf, Gram, GramOf
from graphc.stats.moments import Moments, MomentsOf
from graphc.stats.range import Range, RangeOf
from graphc.stats.routing import Routing, RoutingOf
from graphc.stats.rows import Rows, Window
from graphc.stats.similarity import Similarity, SimilarityOf

__all__ = [
    "Counts",
    "CountsOf",
    "Cross",
    "CrossOf",
    "GradientGramOf",
    "Gradients",
    "GradientsOf",
    "Gram",
    "GramOf",
    "GuidedGramOf",
    "Moments",
    "MomentsOf",
    "Range",
    "RangeOf",
    "Request",
    "Routing",
    "RoutingOf",
    "Rows",
    "Similarity",
    "SimilarityOf",
    "Statistic",
    "Statistics",
    "Valid",
    "Window",
]
