"""CUDA C++ kernels, compiled at run time, one source for each op or family of ops."""
