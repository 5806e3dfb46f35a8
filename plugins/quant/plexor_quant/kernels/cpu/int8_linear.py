"""The multiply of a dense layer with int8 weights and activations through exact float32 products."""

from __future__ import annotations

import torch
from torch import Tensor

from plexor_quant.rounding import round_int8

# 1024 * 127 * 127 is below 2^24, so float32 holds every partial sum of a piece without rounding.
PIECE = 1024


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [T, in], weight int8 [out, in], scale float32 [out] -> [T, out], equal to the reference to the last bit."""
    numbers, token_scale = round_int8(x)
    sums = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.int32, device=x.device)
    for left, right in zip(torch.split(numbers, PIECE, dim=1), torch.split(weight, PIECE, dim=1), strict=True):
        sums += (left.float() @ right.float().T).int()
    return (sums.float() * token_scale * scale).to(x.dtype)
