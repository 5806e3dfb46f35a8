"""The multiply of a stack of layers with e4m3 weights on the tensor cores, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from plexor_quant.kernels.torch.groups import without_strays
from plexor_quant.rounding import round_e4m3


def fp8_grouped_linear(x: Tensor, weight: Tensor, scale: Tensor, group_end: Tensor) -> Tensor:
    """x bfloat16 [M, in], weight e4m3 [G, out, in], scale float32 [G, out], group_end [G] int32 -> bfloat16 [M, out].

    Fast accumulation stays off for the reason given in the dense provider.
    """
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[1])
    codes, token_scale = round_e4m3(x)
    products = torch._scaled_grouped_mm(
        codes.contiguous(),
        weight.transpose(-2, -1),
        token_scale.squeeze(-1),
        scale,
        offs=group_end,
        out_dtype=torch.bfloat16,
        use_fast_accum=False,
    )
    return without_strays(products, group_end)
