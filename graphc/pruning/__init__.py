"""What ``prune`` and ``shrink`` decide with: scores, budgets, masks, dead units."""
