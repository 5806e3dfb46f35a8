"""Providers written in Triton, one file for each op; they run on CUDA devices and under Triton's interpreter."""
