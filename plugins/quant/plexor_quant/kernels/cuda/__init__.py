"""CUDA C++ kernels for products with coded weights, compiled at run time."""
