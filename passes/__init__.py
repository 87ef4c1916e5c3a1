"""Rewrite passes, one a file; the file's name is the pass's name (a hyphen there is an underscore here)."""
