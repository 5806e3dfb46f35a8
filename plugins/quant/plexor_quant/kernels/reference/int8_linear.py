"""The multiply of a dense layer with int8 weights and int8 activations."""

from __future__ import annotations

from torch import Tensor

from plexor_quant.rounding import round_int8


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [T, in], weight int8 [out, in], scale float32 [out] -> [T, out] in x's dtype.

    Each row of x is rounded to int8 with its own scale; the integer sums are exact (float64 carries them on every
    device) and are then scaled in float32.
    """
    numbers, token_scale = round_int8(x)
    sums = numbers.double() @ weight.double().T
    return (sums.float() * token_scale * scale).to(x.dtype)
