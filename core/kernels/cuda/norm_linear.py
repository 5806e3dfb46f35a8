"""A root mean square norm and a dense linear layer: in one kernel for few rows, in two for many."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from plexor.kernels.cuda.call import Norm, product_call
from plexor.kernels.cuda.products import Choose, Products, best_known, few
from plexor.kernels.triton.norm_linear import norm_linear


class NormLinear:
    """As plexor.kernels.reference.norm_linear, for one layer."""

    def __init__(self, choose: Choose = best_known) -> None:
        self._products = Products(choose)

    def __call__(
        self, x: Tensor, gain: Tensor, eps: float, stored: Mapping[str, Tensor], bias: Tensor | None = None
    ) -> Tensor:
        y = self._products.run(product_call(x, stored["weight"], Norm(gain, eps), bias)) if few(x) else None
        return norm_linear(x, gain, eps, stored, bias) if y is None else y
