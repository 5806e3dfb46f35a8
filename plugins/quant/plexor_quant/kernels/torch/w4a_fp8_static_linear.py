"""The multiply of a dense layer with 4-bit weights and e4m3 activations of one scale through a bfloat16 product."""

from __future__ import annotations

import torch
from torch import Tensor

from plexor_quant.packing import widen
from plexor_quant.rounding import fix_e4m3


def w4a_fp8_static_linear(
    x: Tensor, weight: Tensor, scale: Tensor, group_size: int, input_scale: float, zero: Tensor | None = None
) -> Tensor:
    """x bfloat16 [T, in], weight uint8 [out, ceil(in / 2)], scale bfloat16 [out, num_groups] -> bfloat16 [T, out].

    zero: uint8 [out, num_groups] or None. Rounds as w4a_fp8_linear does.
    """
    widened = widen(weight, scale, x.shape[1], group_size, zero).to(torch.bfloat16)
    codes = fix_e4m3(x, input_scale).to(torch.bfloat16)
    return ((codes @ widened.T).float() * input_scale).to(x.dtype)
