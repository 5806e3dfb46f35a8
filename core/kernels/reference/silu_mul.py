"""The gate of a gated feed-forward layer: SiLU of one half times the other half (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def silu_mul(x: Tensor) -> Tensor:
    """Gate x [T, 2 * I], gate in the first half -> [T, I]."""
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up
