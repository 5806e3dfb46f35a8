"""A dense linear layer: kernels in CUDA C++ for few rows, the library for more."""

from __future__ import annotations

from torch import Tensor

from plexor.kernels.cuda.call import product_call
from plexor.kernels.cuda.products import Choose, Products, best_known, few
from plexor.kernels.triton.linear import linear


class Linear:
    """As plexor.kernels.reference.linear, for one layer."""

    def __init__(self, choose: Choose = best_known) -> None:
        self._products = Products(choose)

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        y = self._products.run(product_call(x, weight)) if few(x) else None
        return linear(x, weight) if y is None else y
