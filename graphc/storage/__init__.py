"""Models on disk: reading, writing, checking and converting ONNX files."""
