"""Normalisation layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plexor.model.build import Build


class RMSNorm(nn.Module):
    """Root mean square norm over the last axis (Zhang and Sennrich, 2019), [..., size] -> [..., size]."""

    def __init__(self, build: Build, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=build.dtype, device=build.device), requires_grad=False)
        self.eps = eps
        self._norm = build.bind("rms_norm", hidden_size=size)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self._norm(x, self.weight, self.eps)
        return normed


class LayerNorm(nn.Module):
    """Layer norm over the last axis with weight and bias (Ba et al., 2016), [..., size] -> [..., size]."""

    def __init__(self, build: Build, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=build.dtype, device=build.device), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size, dtype=build.dtype, device=build.device), requires_grad=False)
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self._eps)
