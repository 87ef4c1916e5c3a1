"""Depth: the residual branches and blocks of a model, what they are worth, and how they are taken out or replaced."""
