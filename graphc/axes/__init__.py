"""Axes: which indices of which tensors belong together, derived from one line of text per operator."""
