"""The multiply of a dense layer with e4m3 weights and activations on the tensor cores."""

from __future__ import annotations

import torch
from torch import Tensor

from plexor_quant.kernels.triton.round_rows import round_normed, round_rows


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x bfloat16 [T, in], weight e4m3 [out, in] row-major, scale float32 [out] -> bfloat16 [T, out]."""
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    return scaled_product(*round_rows(x, weight.dtype), weight, scale)


def normed_fp8_linear(x: Tensor, gain: Tensor, eps: float, weight: Tensor, scale: Tensor) -> Tensor:
    """As `fp8_linear` of the root mean square norm of x with gain [in], in one kernel less."""
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    return scaled_product(*round_normed(x, gain, eps, weight.dtype), weight, scale)


def scaled_product(codes: Tensor, token_scale: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """codes e4m3 [T, in], token_scale float32 [T, 1], as `fp8_linear` -> bfloat16 [T, out].

    With fast accumulation: Hopper's tensor cores then keep about 14 bits of a sum from beginning to end. The codes have
    4 significant bits, whose rounding weighs far more, while adding partial sums up in float32 would take time.
    """
    return torch._scaled_mm(
        codes, weight.t(), token_scale, scale.unsqueeze(0), out_dtype=torch.bfloat16, use_fast_accum=True
    )
