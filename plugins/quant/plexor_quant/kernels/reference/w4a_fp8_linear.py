"""The multiply of a dense layer with 4-bit weights and e4m3 activations."""

from __future__ import annotations

from torch import Tensor

from plexor_quant.packing import widen
from plexor_quant.rounding import round_e4m3


def w4a_fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, group_size: int, zero: Tensor | None = None) -> Tensor:
    """x [T, in], weight uint8 [out, ceil(in / 2)], scale bfloat16 [out, ceil(in / group_size)] -> [T, out].

    zero: uint8 [out, ceil(in / group_size)], the nibble from 0 to 15 that means zero in each group; None: 8 in all.

    Each row of x is rounded to e4m3 with its own scale; weights are widened exactly, products summed in float32. The
    result is in x's dtype.
    """
    codes, token_scale = round_e4m3(x)
    sums = codes.float() @ widen(weight, scale, x.shape[1], group_size, zero).T
    return (sums * token_scale).to(x.dtype)
