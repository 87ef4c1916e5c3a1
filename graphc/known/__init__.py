"""What is known of a model's values before it runs, index by index."""

from graphc.known.facets import NOTHING, Facet, Facets, collapse
from graphc.known.knowledge import ConstantFacets, Knowledge

__all__ = ["NOTHING", "ConstantFacets", "Facet", "Facets", "Knowledge", "collapse"]
