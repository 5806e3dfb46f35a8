"""Attention of all positions to all others, over whole pictures instead of the paged cache."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """From q [N, Q, H], k and v [N, K, H] to [N, Q, H], every query attending to all K with num_heads heads."""
    q, k, v = (x.view(*x.shape[:2], num_heads, -1).transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
