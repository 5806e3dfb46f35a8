"""Products that are quicker than the reference on a CPU."""
