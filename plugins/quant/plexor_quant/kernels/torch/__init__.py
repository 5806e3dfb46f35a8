"""Products that torch brings, on CUDA."""
