"""The multiply of a stack of layers with 2:4 weights in e4m3 through dense products, without waiting for the device."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from plexor_quant.kernels.torch.groups import group_of_row, without_strays
from plexor_quant.rounding import round_e4m3
from plexor_quant.sparse24_layout import widen


def sparse24_fp8_grouped_linear(x: Tensor, weight: Tensor, scale: Tensor, index: Tensor, group_end: Tensor) -> Tensor:
    """x bfloat16 [M, in], weight e4m3 [G, out, in / 2], scale float32 [G, out], index uint8 [G, out, ceil(in / 8)].

    group_end: [G] int32. Rounds as the dense provider does; the result is bfloat16 [M, out].
    """
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[1])
    codes, token_scale = round_e4m3(x)
    widened = widen(weight, index).to(x.dtype).transpose(-2, -1)
    sums = functional.grouped_mm(codes.to(x.dtype), widened, offs=group_end)
    row_scale = scale[group_of_row(x.shape[0], group_end).clamp_max(scale.shape[0] - 1)]
    return without_strays((sums.float() * token_scale * row_scale).to(x.dtype), group_end)
