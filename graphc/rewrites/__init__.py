"""Exact rewrites of small neighbourhoods of a graph, one idea a file; the pass ``fuse`` runs them."""
