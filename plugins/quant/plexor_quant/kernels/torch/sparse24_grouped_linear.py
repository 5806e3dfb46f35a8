"""The multiply of a stack of layers with 2:4 weights through dense products, without waiting for the device."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from plexor_quant.kernels.torch.groups import without_strays
from plexor_quant.sparse24_layout import widen


def sparse24_grouped_linear(x: Tensor, weight: Tensor, index: Tensor, group_end: Tensor) -> Tensor:
    """x bfloat16 [M, in], weight bfloat16 [G, out, in / 2], index uint8 [G, out, ceil(in / 8)] -> bfloat16 [M, out].

    group_end: [G] int32.
    """
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[1])
    widened = widen(weight, index).transpose(-2, -1)
    return without_strays(functional.grouped_mm(x.contiguous(), widened, offs=group_end), group_end)
