"""Mesh: which rank this is, which share of a layer it holds, and the collectives between the ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from plexor.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Mesh:
    """The tensor-parallel ranks. A mesh of size 1 exchanges nothing and needs no process group."""

    rank: int = 0
    size: int = 1

    def share(self, num_units: int, what: str) -> range:
        """The units (heads, features, experts) that this rank holds; ConfigError if they do not divide evenly."""
        if num_units % self.size:
            raise ConfigError(
                f"tensor parallel {self.size} does not divide the model's {num_units} {what}: choose a divisor"
            )
        per_rank = num_units // self.size
        return range(self.rank * per_rank, (self.rank + 1) * per_rank)

    def share_or_replicate(self, num_units: int, what: str) -> range:
        """As `share`, but with fewer units than ranks, neighbouring ranks hold a copy of the same unit."""
        if num_units >= self.size:
            return self.share(num_units, what)
        if self.size % num_units:
            raise ConfigError(
                f"tensor parallel {self.size} is not a multiple of the model's {num_units} {what}: choose one"
            )
        unit = self.rank * num_units // self.size
        return range(unit, unit + 1)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks; may be done in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """The ranks' x [..., n] side by side along the last axis, [..., size * n]."""
        if self.size == 1:
            return x
        gathered = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(gathered, x.contiguous())
        return torch.cat(gathered, dim=-1)
