"""The paged cache of one rank: its tensors, and how many blocks fit."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from plexor.batch import LayerCache
from plexor.errors import CapacityError
from plexor.model.build import Build
from plexor.model.decoder import Model

CPU_CACHE_BYTES = 1 << 30
"""What the cache takes at most on a CPU, where memory is shared with everything else."""


def allocate(model: Model, build: Build, num_blocks: int, block_size: int) -> tuple[LayerCache, ...]:
    """One mapping of tensors for each layer that attends. Zeroed: a masked row must not hold NaN."""
    caches = []
    for shape in model.kv_shapes(num_blocks, block_size):
        layer: dict[str, Tensor] = {}
        for stored in build.kv_storage(shape):
            layer[stored.name] = torch.zeros(stored.shape, dtype=stored.dtype, device=build.device)
        caches.append(layer)
    return tuple(caches)


def block_bytes(model: Model, build: Build, block_size: int) -> int:
    """Bytes of one block over all layers of this rank."""
    total = 0
    for shape in model.kv_shapes(1, block_size):
        for stored in build.kv_storage(shape):
            total += math.prod(stored.shape) * stored.dtype.itemsize
    return total


def fit_blocks(free_bytes: int, bytes_of_block: int, most: int) -> int:
    """How many blocks fit, at most `most`; CapacityError if not even one does."""
    fitting = free_bytes // bytes_of_block
    if fitting < 1:
        raise CapacityError(
            f"no cache block fits: one takes {bytes_of_block:,} bytes and {max(free_bytes, 0):,} are left beside the "
            "weights: raise --memory-fraction, use --kv or --precision with fewer bits, or more GPUs"
        )
    return min(fitting, most)
