"""The multiply of a dense layer with e4m3 weights and activations that share one scale."""

from __future__ import annotations

from torch import Tensor

from plexor_quant.rounding import fix_e4m3


def fp8_static_linear(x: Tensor, weight: Tensor, scale: Tensor, input_scale: float) -> Tensor:
    """x [T, in], weight e4m3 [out, in], scale float32 [out] -> [T, out] in x's dtype.

    x over input_scale is rounded to e4m3, saturating; products are summed in float32, then scaled.
    """
    sums = fix_e4m3(x, input_scale).float() @ weight.float().T
    return (sums * input_scale * scale).to(x.dtype)
