"""Kernels in Triton that make codes of activations; they run on CUDA devices and under Triton's interpreter."""
