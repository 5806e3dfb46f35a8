"""Attention over an int8 cache on a CPU: some sequences' blocks at a time are widened, then attended by the core."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from plexor.api import LayerCache, Pages, paged_attention

# Numbers (of keys, and again of values) widened together, unless one sequence has more: 1 MiB of float32 in all.
# With 2 MiB a step of 16 x 256 entries took nine times as long.
WIDENED_LIMIT = 1 << 17


@dataclass(frozen=True, slots=True)
class Share:
    """Sequences that are attended together, the same in every layer.

    rows: theirs, start to end. blocks [U] int64: what they read of the cache. pages: theirs, which count in these.
    """

    rows: tuple[int, int]
    blocks: Tensor
    pages: Pages


def int8_paged_attention(q: Tensor, cache: LayerCache, pages: Pages, scale: float, window: int | None) -> Tensor:
    """As plexor_quant.kernels.reference.int8_paged_attention; a block that sequences share is widened once for all of
    them that are attended together.
    """
    block_size, num_kv_heads, head_size = cache["keys"].shape[1:]
    key = (__name__, window, block_size, num_kv_heads * head_size)
    if key not in pages.memo:
        pages.memo[key] = make_shares(pages, window, block_size, num_kv_heads * head_size)
    shares: tuple[Share, ...] = pages.memo[key]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    out[shares[-1].rows[1] if shares else 0 :] = 0
    for share in shares:
        dense = {
            entries: widened(cache[entries], cache[scales], share.blocks)
            for entries, scales in (("keys", "key_scales"), ("values", "value_scales"))
        }
        rows = slice(*share.rows)
        out[rows] = paged_attention(q[rows], dense, share.pages, scale, window)
    return out


def make_shares(pages: Pages, window: int | None, block_size: int, entry_size: int) -> tuple[Share, ...]:
    """Neighbours as long as they stay below the limit; entry_size: numbers of a key, over all heads."""
    most = max(WIDENED_LIMIT // (block_size * entry_size), 1)
    is_read = blocks_read(pages, window, block_size)
    firsts: list[int] = []
    num_blocks = 0
    for sequence, count in enumerate(is_read.sum(dim=1).tolist()):
        if not firsts or num_blocks + count > most:
            firsts.append(sequence)
            num_blocks = 0
        num_blocks += count
    ends = [*firsts[1:], len(is_read)] if firsts else []
    return tuple(share_of(pages, is_read[first:end], first, end) for first, end in zip(firsts, ends, strict=True))


def blocks_read(pages: Pages, window: int | None, block_size: int) -> Tensor:
    """[S, B] bool: blocks up to a sequence's length and, for a single row, from where its window begins."""
    length = pages.kv_length.unsqueeze(1)
    column = torch.arange(pages.block_table.shape[1])
    is_read = column * block_size < length
    if window is None:
        return is_read
    single = (pages.query_start.diff() == 1).unsqueeze(1)
    return is_read & (~single | ((column + 1) * block_size > length - window))


def share_of(pages: Pages, is_read: Tensor, first: int, end: int) -> Share:
    """The sequences first to end, of whose blocks is_read [end - first, B] says which are read."""
    block_table, starts = pages.block_table[first:end], pages.query_start[first : end + 1]
    blocks, places = block_table[is_read].long().unique(return_inverse=True)
    table = torch.zeros_like(block_table)
    table[is_read] = places.to(table.dtype)
    own = replace(
        pages,
        query_start=starts - starts[0],
        kv_length=pages.kv_length[first:end],
        block_table=table,
        num_decodes=0,
        prefills=(),
        memo={},
    )
    return Share((int(starts[0]), int(starts[-1])), blocks, own)


def widened(entries: Tensor, scales: Tensor, blocks: Tensor) -> Tensor:
    """The blocks [U, block_size, K, D] of int8 entries times their scales, float32."""
    return entries.index_select(0, blocks).float().mul_(scales.index_select(0, blocks).unsqueeze(-1))
