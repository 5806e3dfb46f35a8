"""Measures an engine on fixed workloads, beside what its device could do at most: the parts of `plexor bench`."""
