"""All rules of :mod:`graphc.known`: importing this module registers them."""

from graphc.known import attention, elementwise, movement, normalisation, products
from graphc.known.choice import bottom, exclude
from graphc.known.products import matmul_letters, unpadded
from graphc.known.registry import facets

__all__ = [
    "attention",
    "bottom",
    "elementwise",
    "exclude",
    "facets",
    "matmul_letters",
    "movement",
    "normalisation",
    "products",
    "unpadded",
]
