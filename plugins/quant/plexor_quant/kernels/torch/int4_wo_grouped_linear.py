"""The multiply of a stack of layers with 4-bit weights through a bfloat16 product, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from plexor_quant.kernels.torch.groups import without_strays
from plexor_quant.packing import widen


def int4_wo_grouped_linear(
    x: Tensor, weight: Tensor, scale: Tensor, group_size: int, group_end: Tensor, zero: Tensor | None = None
) -> Tensor:
    """x bfloat16 [M, in], weight uint8 [G, out, ceil(in / 2)], scale bfloat16 [G, out, num_groups] -> [M, out].

    group_end: [G] int32; zero: uint8 [G, out, num_groups] or None. The result is bfloat16. Rounds as the dense
    provider does.
    """
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[1])
    widened = widen(weight, scale, x.shape[1], group_size, zero).to(torch.bfloat16).transpose(-2, -1)
    return without_strays(functional.grouped_mm(x.contiguous(), widened, offs=group_end), group_end)
