"""The multiply of a dense layer with e4m3 weights and e4m3 activations."""

from __future__ import annotations

from torch import Tensor

from plexor_quant.rounding import round_e4m3


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [T, in], weight e4m3 [out, in], scale float32 [out] -> [T, out] in x's dtype.

    Each row of x is rounded to e4m3 with its own scale; products are summed in float32, then scaled.
    """
    codes, token_scale = round_e4m3(x)
    sums = codes.float() @ weight.float().T
    return (sums * token_scale * scale).to(x.dtype)
