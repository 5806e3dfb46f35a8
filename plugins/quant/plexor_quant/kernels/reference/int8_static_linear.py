"""The multiply of a dense layer with int8 weights and activations that share one scale."""

from __future__ import annotations

from torch import Tensor

from plexor_quant.rounding import fix_int8


def int8_static_linear(x: Tensor, weight: Tensor, scale: Tensor, input_scale: float) -> Tensor:
    """x [T, in], weight int8 [out, in], scale float32 [out] -> [T, out] in x's dtype.

    x over input_scale is rounded to the integers from -128 to 127, saturating; sums are exact integers,
    then scaled. Rows that are not finite come back as NaN.
    """
    numbers, token_scale = fix_int8(x, input_scale)
    sums = numbers.double() @ weight.double().T  # exact below 2^53
    return (sums.float() * token_scale * scale).to(x.dtype)
