"""Frontends: each turns one kind of source into an ``onnx_ir.Model``."""
