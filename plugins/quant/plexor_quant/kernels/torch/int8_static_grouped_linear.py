"""The multiply of a stack of layers with int8 weights and activations of one scale through a bfloat16 product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from plexor_quant.kernels.torch.groups import group_of_row, without_strays
from plexor_quant.rounding import fix_int8


def int8_static_grouped_linear(
    x: Tensor, weight: Tensor, scale: Tensor, input_scale: float, group_end: Tensor
) -> Tensor:
    """x bfloat16 [M, in], weight int8 [G, out, in], scale float32 [G, out], group_end [G] int32 -> bfloat16 [M, out].

    Rounds as int8_grouped_linear does, and like it does not wait for the device.
    """
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[1])
    widened = weight.to(torch.bfloat16).transpose(-2, -1)
    numbers, token_scale = fix_int8(x, input_scale)
    sums = functional.grouped_mm(numbers.to(torch.bfloat16), widened, offs=group_end)
    owner = group_of_row(x.shape[0], group_end).clamp_max(weight.shape[0] - 1)
    return without_strays((sums.float() * token_scale * scale[owner]).to(x.dtype), group_end)
