"""The multiply of a dense layer with 4-bit weights through a bfloat16 product."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from plexor_quant.packing import widen


def int4_wo_linear(x: Tensor, weight: Tensor, scale: Tensor, group_size: int, zero: Tensor | None = None) -> Tensor:
    """x bfloat16 [T, in], weight uint8 [out, ceil(in / 2)], scale bfloat16 [out, num_groups] -> bfloat16 [T, out].

    zero: uint8 [out, num_groups] or None, as in the reference. Widened weights are rounded to bfloat16, which
    it does not do.
    """
    return functional.linear(x, widen(weight, scale, x.shape[1], group_size, zero).to(x.dtype))
