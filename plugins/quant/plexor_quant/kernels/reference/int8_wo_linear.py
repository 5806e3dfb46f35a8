"""The multiply of a dense layer with int8 weights and activations in the model's dtype."""

from __future__ import annotations

from torch import Tensor


def int8_wo_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [T, in], weight int8 [out, in], scale float32 [out] -> [T, out] in x's dtype.

    Activations are not rounded; products are summed in float32, then scaled.
    """
    sums = x.float() @ weight.float().T
    return (sums * scale).to(x.dtype)
