"""The multiply of a dense layer with int8 weights on a CPU, some rows at a time: widened ones stay in cache."""

from __future__ import annotations

import torch
from torch import Tensor

PIECE = 256
"""Rows of the weight that are widened at once: a MiB or a few, read again at once from a cache."""


def int8_wo_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """As plexor_quant.kernels.reference.int8_wo_linear."""
    widened = x.float()
    sums = torch.cat([widened @ rows.float().T for rows in weight.split(PIECE)], dim=1)
    return (sums * scale).to(x.dtype)
