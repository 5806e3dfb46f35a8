"""The multiply of a dense layer with 4-bit weights and e4m3 activations through a bfloat16 product."""

from __future__ import annotations

import torch
from torch import Tensor

from plexor_quant.packing import widen
from plexor_quant.rounding import round_e4m3


def w4a_fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, group_size: int, zero: Tensor | None = None) -> Tensor:
    """x bfloat16 [T, in], weight uint8 [out, ceil(in / 2)], scale bfloat16 [out, num_groups] -> bfloat16 [T, out].

    zero: uint8 [out, num_groups] or None, as in the reference. bfloat16 holds every e4m3 exactly; widened
    weights are rounded to it, which the reference does not do.
    """
    codes, token_scale = round_e4m3(x)
    widened = widen(weight, scale, x.shape[1], group_size, zero).to(torch.bfloat16)
    return ((codes.to(torch.bfloat16) @ widened.T).float() * token_scale).to(x.dtype)
