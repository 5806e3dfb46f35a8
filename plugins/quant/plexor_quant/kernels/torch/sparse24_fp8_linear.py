"""The multiply of a dense layer with 2:4 weights in e4m3 through the library's dense product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from plexor_quant.rounding import round_e4m3
from plexor_quant.sparse24_layout import widen


def sparse24_fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, index: Tensor) -> Tensor:
    """x [T, in], weight e4m3 [out, in / 2], scale float32 [out], index uint8 [out, ceil(in / 8)] -> [T, out].

    bfloat16 holds every e4m3 code; sums are rounded to it before they are scaled, which the reference does not do.
    """
    codes, token_scale = round_e4m3(x)
    sums = functional.linear(codes.to(torch.bfloat16), widen(weight, index).to(torch.bfloat16))
    return (sums.float() * token_scale * scale).to(x.dtype)
