"""Layouts of quantised checkpoints that others write, each shown as the dense tensors that it stands for."""
