"""The benchmark of handovers: idle connections move to a new worker at a reload."""
