"""What the pass ``simplify`` is made of: the sweep over a model, its rules, and dead code; one idea a file."""
