"""graphc: a compiler that makes trained neural networks smaller and faster, and proves what it did."""

__version__ = "0.1.0"
