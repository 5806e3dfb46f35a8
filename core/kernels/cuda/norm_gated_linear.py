"""A norm, the projection to gate and up, and the gate: in one kernel for few rows, in several for many."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from plexor.kernels.cuda.call import Norm, gated_call
from plexor.kernels.cuda.products import Choose, Products, best_known, few
from plexor.kernels.triton.norm_gated_linear import norm_gated_linear


class NormGatedLinear:
    """As plexor.kernels.reference.norm_gated_linear, for one layer."""

    def __init__(self, choose: Choose = best_known) -> None:
        self._products = Products(choose)

    def __call__(
        self, x: Tensor, gain: Tensor, eps: float, stored: Mapping[str, Tensor], bias: Tensor | None = None
    ) -> Tensor:
        y = self._products.run(gated_call(x, stored["weight"], Norm(gain, eps), bias)) if few(x) else None
        return norm_gated_linear(x, gain, eps, stored, bias) if y is None else y
