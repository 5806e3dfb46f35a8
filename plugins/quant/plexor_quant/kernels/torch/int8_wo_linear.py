"""The multiply of a dense layer with int8 weights through a bfloat16 product."""

from __future__ import annotations

import torch
from torch import Tensor


def int8_wo_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x bfloat16 [T, in], weight int8 [out, in], scale float32 [out] -> bfloat16 [T, out].

    bfloat16 holds every int8 exactly; the only difference from the reference is the sum's rounding to bfloat16 before
    it is scaled. float16 is not taken: the sums, not scaled yet, may leave its range.
    """
    sums = x @ weight.to(torch.bfloat16).T
    return (sums.float() * scale).to(x.dtype)
