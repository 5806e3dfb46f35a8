"""A norm and the linear layer behind it: one launch for few rows, two for more."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional

from plexor.kernels.triton.linear import stream
from plexor.kernels.triton.rms_norm import rms_norm
from plexor.kernels.triton.stream_linear import takes


def norm_linear(
    x: Tensor, gain: Tensor, eps: float, stored: Mapping[str, Tensor], bias: Tensor | None = None
) -> Tensor:
    """As plexor.kernels.reference.norm_linear."""
    weight = stored["weight"]
    if takes(x, weight):
        return stream(x, gain, eps, weight, bias)
    return functional.linear(rms_norm(x, gain, eps), weight, bias)
