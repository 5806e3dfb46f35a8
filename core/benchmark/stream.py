"""A Triton kernel that does nothing but read: each thread loads 16 bytes at a time and adds up what it sees."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def read_kernel(numbers, sums, TILE: tl.constexpr, TILES: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    place = numbers + program * TILE * TILES + tl.arange(0, TILE)
    total = tl.zeros([TILE], dtype=tl.int32)
    for tile in range(TILES):
        total += tl.load(place + tile * TILE, eviction_policy="evict_first")
    tl.store(sums + program, tl.sum(total, axis=0))


def read_sums(numbers: Tensor, tile: int, tiles: int, num_warps: int) -> Tensor:
    """The sum of each run of tile * tiles numbers, int32 [N] -> int32 [N / (tile * tiles)]; N must divide evenly."""
    programs, rest = divmod(numbers.numel(), tile * tiles)
    assert rest == 0, f"{numbers.numel()} numbers do not divide into runs of {tile * tiles}"
    sums = torch.empty(programs, dtype=torch.int32, device=numbers.device)
    read_kernel[(programs,)](numbers, sums, TILE=tile, TILES=tiles, num_warps=num_warps)
    return sums
