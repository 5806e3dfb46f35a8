"""Rotate queries and keys by their positions, then store keys and values as int8."""

from __future__ import annotations

import torch
from torch import Tensor

from plexor.api import LayerCache, rotated
from plexor_quant.kernels.reference.int8_kv_write import int8_kv_write


def int8_rotary_kv_write(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, slots: Tensor, cache: LayerCache
) -> Tensor:
    """Rotate q [T, N, D] and k [T, K, D], store k and v [T, K, D] -> rotated q [T, N, D], contiguous.

    As the core's rotary_kv_write, but that keys, rotated and rounded to q's dtype, and values are stored as
    int8_kv_write does.
    """
    heads = rotated(torch.cat((q, k), dim=1), cos[positions], sin[positions])
    num_heads = q.shape[1]
    int8_kv_write(heads[:, num_heads:], v, slots, cache)
    return heads[:, :num_heads].contiguous()
