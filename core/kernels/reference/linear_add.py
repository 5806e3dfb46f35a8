"""A dense linear layer added to the residual."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from plexor.kernels.reference.linear import linear
from plexor.kernels.reference.steps import added_product


def linear_add(x: Tensor, stored: Mapping[str, Tensor], residual: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply x [T, in] by "weight" [out, in], add bias [out] and residual [T, out] -> [T, out].

    Providers may keep float32 between the steps, which the reference rounds to x's dtype, and may put the result in the
    place of the residual, which is not to be read again.
    """
    return added_product(partial(linear, weight=stored["weight"]), x, residual, bias)
