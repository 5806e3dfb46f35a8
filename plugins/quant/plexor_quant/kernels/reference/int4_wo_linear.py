"""The multiply of a dense layer with 4-bit weights and activations in the model's dtype."""

from __future__ import annotations

from torch import Tensor

from plexor_quant.packing import widen


def int4_wo_linear(x: Tensor, weight: Tensor, scale: Tensor, group_size: int, zero: Tensor | None = None) -> Tensor:
    """x [T, in], weight uint8 [out, ceil(in / 2)], scale bfloat16 [out, ceil(in / group_size)] -> [T, out].

    zero: uint8 [out, ceil(in / group_size)], the nibble from 0 to 15 that means zero in each group; None: 8 in all.

    Activations are not rounded; weights are widened exactly, products summed in float32. The result is in x's dtype.
    """
    return (x.float() @ widen(weight, scale, x.shape[1], group_size, zero).T).to(x.dtype)
