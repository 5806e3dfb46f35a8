"""The multiply of a dense layer with 2:4 weights: sparse tensor cores for few rows, the library for more."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from plexor_quant.kernels.cuda.sparse24_products import stream, streams, widened, widens
from plexor_quant.kernels.torch import sparse24_linear as portable


def sparse24_linear(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """As plexor_quant.kernels.reference.sparse24_linear."""
    if streams(x, weight, index):
        return stream(x, weight, index, None)
    if widens(x, weight, index):
        return functional.linear(x, widened(weight, index))
    return portable.sparse24_linear(x, weight, index)
