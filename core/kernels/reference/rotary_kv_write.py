"""Rotate queries and keys by their positions (Su et al. 2021, arXiv 2104.09864), then store keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from plexor.batch import LayerCache
from plexor.kernels.reference.kv_write import kv_write


def rotary_kv_write(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, slots: Tensor, cache: LayerCache
) -> Tensor:
    """Rotate q [T, N, D] and k [T, K, D], store k and v [T, K, D] -> rotated q [T, N, D], contiguous.

    cos, sin [P, R / 2] float32 are looked up at positions [T] int64. The first R features of each head turn, feature i
    with feature i + R / 2; the rest pass through. The math is float32, rounded to q's dtype before anything is stored.
    """
    heads = rotated(torch.cat((q, k), dim=1), cos[positions], sin[positions])
    num_heads = q.shape[1]
    kv_write(heads[:, num_heads:], v, slots, cache)
    return heads[:, :num_heads].contiguous()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [T, N, D] by cos, sin [T, R / 2]; the result has x's dtype."""
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second, rest = x.float().split((half, half, x.shape[-1] - 2 * half), dim=-1)
    turned_first = torch.addcmul(first * cos, second, sin, value=-1)
    turned_second = torch.addcmul(second * cos, first, sin)
    return torch.cat((turned_first, turned_second, rest), dim=-1).to(x.dtype)
