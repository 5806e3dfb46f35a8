"""What is kept of a linear layer's inputs while a text runs through the model."""

from __future__ import annotations

import torch
from torch import Tensor


class InputStatistics:
    """Of the inputs x [T, in] that were added.

    gram: float32 [in, in], the sum of x xᵀ. mean_abs and max_abs: float32 [in]. sample: every `stride`-th row, [n, in].
    """

    def __init__(self, in_features: int, device: torch.device, stride: int) -> None:
        self.gram = torch.zeros(in_features, in_features, device=device)
        self.num_rows = 0
        self.max_abs = torch.zeros(in_features, device=device)
        self._total_abs = torch.zeros(in_features, device=device)
        self._stride = stride
        self._sampled: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        if not len(x):
            return
        wide = x.float()
        self.gram.addmm_(wide.T, wide)
        self.num_rows += len(x)
        magnitude = wide.abs()
        self._total_abs += magnitude.sum(dim=0)
        self.max_abs = torch.maximum(self.max_abs, magnitude.amax(dim=0))
        first = -(self.num_rows - len(x)) % self._stride
        self._sampled.append(wide[first :: self._stride].clone())

    @property
    def mean_abs(self) -> Tensor:
        return self._total_abs / max(self.num_rows, 1)

    @property
    def sample(self) -> Tensor:
        return torch.cat([self._total_abs.new_zeros(0, len(self._total_abs)), *self._sampled])
