"""The multiply of a dense layer with 2:4 weights in e4m3: sparse tensor cores for few rows, the library for more."""

from __future__ import annotations

import torch
from torch import Tensor

from plexor_quant.kernels.cuda.sparse24_products import stream, streams, widened, widens
from plexor_quant.kernels.torch import sparse24_fp8_linear as portable
from plexor_quant.rounding import round_e4m3


def sparse24_fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, index: Tensor) -> Tensor:
    """As plexor_quant.kernels.reference.sparse24_fp8_linear, with the activations of streamed products as they are."""
    if streams(x, weight, index):
        return stream(x, weight, index, scale)
    if x.dtype == torch.bfloat16 and x.shape[0] > 0 and weight.shape[0] % 16 == 0 and widens(x, weight, index):
        codes, token_scale = round_e4m3(x)
        dense = widened(weight, index).t()
        return torch._scaled_mm(codes, dense, token_scale, scale.unsqueeze(0), out_dtype=x.dtype, use_fast_accum=True)
    return portable.sparse24_fp8_linear(x, weight, scale, index)
