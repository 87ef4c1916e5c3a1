"""Weights as products of two smaller ones."""
