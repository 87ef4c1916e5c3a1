"""Backends, one a file; the file's name is the backend's name."""
