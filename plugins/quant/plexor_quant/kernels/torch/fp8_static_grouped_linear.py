"""The multiply of a stack of layers with e4m3 weights and activations of one scale, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from plexor_quant.kernels.torch.groups import without_strays
from plexor_quant.rounding import fix_e4m3


def fp8_static_grouped_linear(
    x: Tensor, weight: Tensor, scale: Tensor, input_scale: float, group_end: Tensor
) -> Tensor:
    """x bfloat16 [M, in], weight e4m3 [G, out, in], scale float32 [G, out], group_end [G] int32 -> bfloat16 [M, out].

    Fast accumulation stays off for the reason given in fp8_linear.
    """
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[1])
    products = torch._scaled_grouped_mm(
        fix_e4m3(x, input_scale).contiguous(),
        weight.transpose(-2, -1),
        torch.full((x.shape[0],), input_scale, device=x.device),
        scale,
        offs=group_end,
        out_dtype=torch.bfloat16,
        use_fast_accum=False,
    )
    return without_strays(products, group_end)
