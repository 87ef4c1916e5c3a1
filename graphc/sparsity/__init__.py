"""Single weights written to zero: which ones, how many of each layer, and what the others take over."""
