"""Layouts in which quantised checkpoints are written."""
