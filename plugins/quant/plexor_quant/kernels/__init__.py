"""Ops of the quantised number formats: references, and providers of the same file names beside them."""
