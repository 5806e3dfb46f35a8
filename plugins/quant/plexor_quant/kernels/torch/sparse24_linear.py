"""The multiply of a dense layer with 2:4 weights through the library's dense product."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from plexor_quant.sparse24_layout import widen


def sparse24_linear(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """x [T, in], weight [out, in / 2], both bfloat16 or float16, index uint8 [out, ceil(in / 8)] -> [T, out]."""
    return functional.linear(x, widen(weight, index))
