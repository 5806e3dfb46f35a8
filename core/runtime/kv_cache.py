"""The paged cache of one rank: its tensors, and how many blocks fit."""

from __future__ import annotations

import math
import os

import numpy
import torch
from torch import Tensor

from plexor.batch import LayerCache
from plexor.errors import CapacityError
from plexor.model.build import Build
from plexor.model.decoder import Model
from plexor.model.format import Stored

CPU_SHARE = 4
"""On a CPU the cache of all ranks may grow to one part in this many of the machine's memory."""


def allocate(model: Model, build: Build, num_blocks: int, block_size: int) -> tuple[LayerCache, ...]:
    """One mapping of tensors for each layer that attends. Zeroed: a masked row must not hold NaN."""
    return tuple(
        {stored.name: _zeros(stored, build.device) for stored in build.kv_storage(shape)}
        for shape in model.kv_shapes(num_blocks, block_size)
    )


def cpu_cache_bytes(num_ranks: int) -> int:
    """What the cache of one rank may take on a CPU, where memory is shared with everything else."""
    return machine_bytes() // CPU_SHARE // num_ranks


def unused_bytes(device: torch.device) -> int:
    """What could still be allocated: all of a CPU's memory, since a cache there takes memory only as it fills."""
    if device.type == "cpu":
        return machine_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


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


def check_blocks(num_blocks: int, bytes_of_block: int, unused: int) -> None:
    """CapacityError if as many blocks as were asked for cannot fit."""
    if num_blocks * bytes_of_block > unused:
        raise CapacityError(
            f"{num_blocks:,} cache blocks take {num_blocks * bytes_of_block:,} bytes, but {unused:,} are there: lower "
            "--num-blocks or --block-size"
        )


def machine_bytes() -> int:
    """Memory of the machine, used or not."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _zeros(stored: Stored, device: torch.device) -> Tensor:
    """numpy's zeros take no memory on a CPU until they are written to; torch's do at once."""
    if device.type != "cpu":
        return torch.zeros(stored.shape, dtype=stored.dtype, device=device)
    flat = numpy.zeros(math.prod(stored.shape) * stored.dtype.itemsize, dtype=numpy.uint8)
    return torch.from_numpy(flat).view(stored.dtype).view(stored.shape)
