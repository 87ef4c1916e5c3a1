"""Operators that exporters took apart, found by what their parts compute rather than by how they are arranged."""
