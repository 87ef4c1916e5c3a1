"""Opsets: the versions of the standard operators, and how a model gets from one to another."""

WORKING = 21
"""The opset that frontends bring models to, and the lowest one that is written."""
