"""The multiply of a stack of layers with 4-bit weights and activations of one scale through a bfloat16 product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from plexor_quant.kernels.torch.groups import without_strays
from plexor_quant.packing import widen
from plexor_quant.rounding import fix_e4m3


def w4a_fp8_static_grouped_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    group_size: int,
    input_scale: float,
    group_end: Tensor,
    zero: Tensor | None = None,
) -> Tensor:
    """x bfloat16 [M, in], weight uint8 [G, out, ceil(in / 2)], scale bfloat16 [G, out, num_groups] -> [M, out].

    group_end: [G] int32; zero: uint8 [G, out, num_groups] or None. The result is bfloat16. Rounds as the dense
    provider does, and does not wait for the device.
    """
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[1])
    widened = widen(weight, scale, x.shape[1], group_size, zero).to(torch.bfloat16).transpose(-2, -1)
    codes = fix_e4m3(x, input_scale).to(torch.bfloat16)
    sums = functional.grouped_mm(codes, widened, offs=group_end)
    return without_strays((sums.float() * input_scale).to(x.dtype), group_end)
