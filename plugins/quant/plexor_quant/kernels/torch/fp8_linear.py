"""The multiply of a dense layer with e4m3 weights and activations on the tensor cores."""

from __future__ import annotations

import torch
from torch import Tensor

from plexor_quant.rounding import round_e4m3


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x bfloat16 [T, in], weight e4m3 [out, in] row-major, scale float32 [out] -> bfloat16 [T, out].

    Fast accumulation stays off: Hopper's tensor cores keep about 14 bits of a sum, and without it torch adds their
    partial sums up in float32, as the op is defined.
    """
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    codes, token_scale = round_e4m3(x)
    return torch._scaled_mm(
        codes.contiguous(),
        weight.t(),
        token_scale,
        scale.unsqueeze(0),
        out_dtype=torch.bfloat16,
        use_fast_accum=False,
    )
