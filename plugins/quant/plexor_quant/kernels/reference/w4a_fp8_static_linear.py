"""The multiply of a dense layer with 4-bit weights and e4m3 activations that share one scale."""

from __future__ import annotations

from torch import Tensor

from plexor_quant.packing import widen
from plexor_quant.rounding import fix_e4m3


def w4a_fp8_static_linear(
    x: Tensor, weight: Tensor, scale: Tensor, group_size: int, input_scale: float, zero: Tensor | None = None
) -> Tensor:
    """x [T, in], weight uint8 [out, ceil(in / 2)], scale bfloat16 [out, ceil(in / group_size)] -> [T, out].

    zero: as in w4a_fp8_linear. x over input_scale is rounded to e4m3, saturating; weights are widened exactly, products
    summed in float32. The result is in x's dtype.
    """
    sums = fix_e4m3(x, input_scale).float() @ widen(weight, scale, x.shape[1], group_size, zero).T
    return (sums * input_scale).to(x.dtype)
