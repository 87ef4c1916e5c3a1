"""Numbers on grids: which weights, what grids, how they are rounded, and how the graph says so."""
