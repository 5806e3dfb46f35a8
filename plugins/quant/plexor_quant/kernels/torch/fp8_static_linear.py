"""The multiply of a dense layer with e4m3 weights and activations of one scale on the tensor cores."""

from __future__ import annotations

import torch
from torch import Tensor

from plexor_quant.rounding import fix_e4m3


def fp8_static_linear(x: Tensor, weight: Tensor, scale: Tensor, input_scale: float) -> Tensor:
    """x bfloat16 [T, in], weight e4m3 [out, in] row-major, scale float32 [out] -> bfloat16 [T, out].

    Fast accumulation stays off for the reason given in fp8_linear.
    """
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    return torch._scaled_mm(
        fix_e4m3(x, input_scale).contiguous(),
        weight.t(),
        torch.full((x.shape[0], 1), input_scale, device=x.device),
        scale.unsqueeze(0),
        out_dtype=torch.bfloat16,
        use_fast_accum=False,
    )
