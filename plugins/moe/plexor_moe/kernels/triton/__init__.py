"""Providers written in Triton."""
