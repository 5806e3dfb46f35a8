"""Attention over an int8 cache on a CPU: the blocks that a step reads are widened once, then attended by the core."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from plexor.api import LayerCache, Pages, paged_attention


@dataclass(frozen=True, slots=True)
class Widened:
    """What a step reads, the same in every layer: blocks [U] int64 of the cache, and pages that count in them."""

    blocks: Tensor
    pages: Pages


def int8_paged_attention(q: Tensor, cache: LayerCache, pages: Pages, scale: float, window: int | None) -> Tensor:
    """As plexor_quant.kernels.reference.int8_paged_attention; a block that sequences share is widened once."""
    block_size = cache["keys"].shape[1]
    key = (__name__, window, block_size)
    if key not in pages.memo:
        pages.memo[key] = read_blocks(pages, window, block_size)
    read: Widened = pages.memo[key]
    dense = {
        entries: widened(cache[entries], cache[scales], read.blocks)
        for entries, scales in (("keys", "key_scales"), ("values", "value_scales"))
    }
    return paged_attention(q, dense, read.pages, scale, window)


def read_blocks(pages: Pages, window: int | None, block_size: int) -> Widened:
    """Which blocks are read: up to a sequence's length and, for a single row, from where its window begins."""
    length = pages.kv_length.long().unsqueeze(1)
    column = torch.arange(pages.block_table.shape[1])
    is_read = column * block_size < length
    if window is not None:
        single = (pages.query_start.diff() == 1).unsqueeze(1)
        is_read &= ~single | ((column + 1) * block_size > length - window)
    blocks, places = pages.block_table[is_read].long().unique(return_inverse=True)
    table = torch.zeros_like(pages.block_table)
    table[is_read] = places.to(table.dtype)
    return Widened(blocks, replace(pages, block_table=table, memo={}))


def widened(entries: Tensor, scales: Tensor, blocks: Tensor) -> Tensor:
    """The blocks [U, block_size, K, D] of int8 entries times their scales, float32."""
    return entries.index_select(0, blocks).float().mul_(scales.index_select(0, blocks).unsqueeze(-1))
