"""Providers that are fast on a CPU."""
