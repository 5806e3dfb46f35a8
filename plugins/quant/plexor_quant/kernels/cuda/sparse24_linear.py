"""The multiply of a dense layer with 2:4 weights: sparse tensor cores, streamed to for few rows."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from plexor_quant.kernels.cuda.sparse24_library import multiplies, product
from plexor_quant.kernels.cuda.sparse24_products import stream, streams, widened, widens
from plexor_quant.kernels.torch import sparse24_linear as portable


def sparse24_linear(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """As plexor_quant.kernels.reference.sparse24_linear."""
    if streams(x, weight, index):
        return stream(x, weight, index, None)
    if multiplies(x, weight, index):
        return product(x, weight, index)
    if widens(x, weight, index):
        return functional.linear(x, widened(weight, index))
    return portable.sparse24_linear(x, weight, index)
