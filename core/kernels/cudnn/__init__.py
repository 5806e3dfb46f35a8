"""Ops by kernels of cuDNN, called through torch."""
