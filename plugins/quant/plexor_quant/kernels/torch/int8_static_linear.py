"""The multiply of a dense layer with int8 weights and activations of one scale on the integer tensor cores."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from plexor_quant.kernels.torch.int8_linear import MIN_ROWS
from plexor_quant.rounding import fix_int8


def int8_static_linear(x: Tensor, weight: Tensor, scale: Tensor, input_scale: float) -> Tensor:
    """x [T, in], weight int8 [out, in], scale float32 [out] -> [T, out] in x's dtype; zeros pad too few rows."""
    num_rows = x.shape[0]
    numbers, token_scale = fix_int8(x, input_scale)
    numbers = functional.pad(numbers, (0, 0, 0, max(0, MIN_ROWS - num_rows)))
    sums = torch._int_mm(numbers.contiguous(), weight.t())[:num_rows]
    return (sums.float() * token_scale * scale).to(x.dtype)
