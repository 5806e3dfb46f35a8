"""Read what a decode step needs of its sequences' state, and move the state on by one token."""

from __future__ import annotations

import torch
from torch import Tensor


def advance(
    slots: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    steps: Tensor,
    block_table: Tensor,
    row_table: Tensor,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """slots [B] int64 -> token_ids, positions, cache_slots [B] int64, kv_length [B] int32, drawn [B] int64.

    Row r computes the last token of the sequence in slots[r]; -1 is a padding row, and no slot is named twice. By slot:
    tokens int64, the token; lengths int32, entries in the cache; steps int64, tokens drawn so far; block_table
    [slots, W] int32. token_ids: the tokens. positions: where they stand. cache_slots: where their entries go
    (block * block_size + offset). kv_length: entries once these are written. drawn: which of its sequence's generated
    tokens a row draws. A padding row has 0, 0, -1, 0, 0.

    Written: one more in lengths and steps of the slots named, and row_table [>= B, W] int32: the blocks that kv_length
    needs of each row's sequence, the rest of the row as it was.
    """
    used = slots >= 0
    index = slots.clamp(min=0)
    position = lengths[index].where(used, 0).long()
    kv_length = (position + 1).where(used, 0)
    blocks = block_table[index]
    block = blocks.gather(1, (position // block_size).unsqueeze(1)).squeeze(1)
    cache_slots = (block.long() * block_size + position % block_size).where(used, -1)
    needed = torch.arange(block_table.shape[1], device=slots.device) * block_size < kv_length.unsqueeze(1)
    rows = row_table[: slots.shape[0]]
    rows.copy_(blocks.where(needed, rows))
    token_ids, drawn = tokens[index].where(used, 0), steps[index].where(used, 0)
    lengths.index_add_(0, index, used.to(lengths.dtype))
    steps.index_add_(0, index, used.to(steps.dtype))
    return token_ids, position, cache_slots, kv_length.to(torch.int32), drawn
