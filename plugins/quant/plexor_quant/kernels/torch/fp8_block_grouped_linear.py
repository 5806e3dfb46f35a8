"""The multiply of a stack of layers with e4m3 weights in blocks, through a bfloat16 product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from plexor_quant.kernels.reference.fp8_block_linear import widen_blocks
from plexor_quant.kernels.torch.groups import without_strays


def fp8_block_grouped_linear(
    x: Tensor, weight: Tensor, scale: Tensor, block_rows: int, group_size: int, group_end: Tensor
) -> Tensor:
    """x bfloat16 [M, in], weight e4m3 [G, out, in], scale float32 [G, blocks, groups] -> bfloat16 [M, out].

    group_end: [G] int32. Rounds as the dense provider does, and does not wait for the device.
    """
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[1])
    widened = widen_blocks(weight, scale, block_rows, group_size).to(torch.bfloat16).transpose(-2, -1)
    return without_strays(functional.grouped_mm(x.contiguous(), widened, offs=group_end), group_end)
