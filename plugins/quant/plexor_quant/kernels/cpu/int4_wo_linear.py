"""The multiply of a dense layer with 4-bit weights on a CPU, some rows at a time: widened ones stay in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from plexor_quant.packing import widen

PIECE = 256
"""Rows of the weight that are widened at once: a MiB or a few, read again at once from a cache."""


def int4_wo_linear(x: Tensor, weight: Tensor, scale: Tensor, group_size: int, zero: Tensor | None = None) -> Tensor:
    """As plexor_quant.kernels.reference.int4_wo_linear."""
    widened = x.float()
    sums = []
    for start in range(0, weight.shape[0], PIECE):
        piece = slice(start, start + PIECE)
        zeros = None if zero is None else zero[piece]
        sums.append(widened @ widen(weight[piece], scale[piece], x.shape[1], group_size, zeros).T)
    return torch.cat(sums, dim=1).to(x.dtype)
