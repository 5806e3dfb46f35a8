"""The multiply of a dense layer with 2:4 weights on a CPU, some rows at a time: widened ones stay in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from plexor_quant.sparse24_layout import widen

PIECE = 256
"""Rows of the weight that are widened at once: a MiB or a few, read again at once from a cache."""


def sparse24_linear(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """As plexor_quant.kernels.reference.sparse24_linear."""
    widened = x.float()
    pieces = zip(weight.split(PIECE), index.split(PIECE), strict=True)
    return torch.cat([widened @ widen(*piece).float().T for piece in pieces], dim=1).to(x.dtype)
