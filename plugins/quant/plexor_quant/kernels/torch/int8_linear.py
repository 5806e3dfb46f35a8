"""The multiply of a dense layer with int8 weights and activations on the integer tensor cores."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from plexor_quant.kernels.triton.round_rows import round_rows

MIN_ROWS = 32
"""torch's integer product refuses 16 rows and fewer."""


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [T, in], weight int8 [out, in], scale float32 [out] -> [T, out] in x's dtype; zeros pad too few rows."""
    num_rows = x.shape[0]
    numbers, token_scale = round_rows(x, weight.dtype)
    numbers = functional.pad(numbers, (0, 0, 0, max(0, MIN_ROWS - num_rows)))
    sums = torch._int_mm(numbers.contiguous(), weight.t())[:num_rows]
    return (sums.float() * token_scale * scale).to(x.dtype)
