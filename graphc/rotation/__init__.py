"""Axes turned by orthogonal matrices that are folded into weights."""
