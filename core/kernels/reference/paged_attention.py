"""Causal attention of a batch's pieces over their sequences' paged keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from plexor.batch import LayerCache, Pages


def paged_attention(
    q: Tensor,
    cache: LayerCache,
    pages: Pages,
    scale: float,
    window: int | None,
) -> Tensor:
    """Attend q [T, N, D] over cache "keys", "values" [num_blocks, block_size, K, D] -> [T, N, D] in q's dtype.

    Sequence s owns rows query_start[s] to query_start[s + 1] and the first kv_length[s] entries of the blocks in
    block_table[s]. Its rows are its last positions: row i of n stands at
    kv_length[s] - n + i. A row sees the positions up to its own; with a window, only the last `window` of them, its
    own included. Query head h reads KV head h // (N / K). Cache entries are widened to float32 and the softmax is
    float32. Rows beyond query_start[-1] are padding and come back as zeros, as does the one row of a sequence without
    entries.
    """
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    starts, lengths = pages.query_start.tolist(), pages.kv_length.tolist()
    for sequence, length in enumerate(lengths):
        rows = slice(starts[sequence], starts[sequence + 1])
        keys, values = (
            sequence_entries(cache[name], pages.block_table[sequence], length) for name in ("keys", "values")
        )
        visible = visible_positions(rows.stop - rows.start, length, window, q.device)
        out[rows] = dense_attention(q[rows].float(), keys, values, visible, scale).to(q.dtype)
    return out


def sequence_entries(entries: Tensor, blocks: Tensor, length: int) -> Tensor:
    """The first `length` entries of a sequence in float32 [length, K, D]."""
    num_blocks = -(-length // entries.shape[1])
    return entries[blocks[:num_blocks].long()].flatten(0, 1)[:length].float()


def visible_positions(num_rows: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """Which of `length` positions each of the last `num_rows` sees [num_rows, length] bool."""
    own = torch.arange(length - num_rows, length, device=device).unsqueeze(1)
    position = torch.arange(length, device=device)
    visible = position <= own
    return visible if window is None else visible & (position > own - window)


def dense_attention(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Attend q [n, N, D], keys and values [L, K, D], visible [n, L] -> [n, N, D], all float32."""
    group = q.shape[1] // keys.shape[1]
    keys, values = (entries.repeat_interleave(group, dim=1) for entries in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", q, keys) * scale
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, values)
