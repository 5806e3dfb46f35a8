"""The multiply of a dense linear layer."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x [T, in], weight [out, in] -> [T, out]."""
    return functional.linear(x, weight)
