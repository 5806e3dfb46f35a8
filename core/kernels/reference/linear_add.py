"""A dense linear layer added to the residual."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from plexor.kernels.reference.linear import linear


def linear_add(x: Tensor, stored: Mapping[str, Tensor], residual: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply x [T, in] by "weight" [out, in], add bias [out] and residual [T, out] -> [T, out], in memory of its own.

    Providers may keep float32 between the steps, which the reference rounds to x's dtype.
    """
    y = linear(x, stored["weight"])
    return residual + (y if bias is None else y + bias)
