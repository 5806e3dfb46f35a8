"""Root mean square normalisation over the last axis (Zhang and Sennrich 2019, arXiv 1910.07467)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise x [..., H] with a contiguous last axis, weight [H] -> [..., H] in x's dtype.

    Computed in float32 and rounded to x's dtype before the weight is applied, as published models were trained.
    """
    return functional.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype) * weight
