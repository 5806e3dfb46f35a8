"""Causal attention of a batch's pieces over their sequences' paged keys and values in int8."""

from __future__ import annotations

import torch
from torch import Tensor

from plexor.api import LayerCache, Pages, dense_attention, sequence_entries, visible_positions


def int8_paged_attention(q: Tensor, cache: LayerCache, pages: Pages, scale: float, window: int | None) -> Tensor:
    """Attend q [T, N, D] over a cache that int8_kv_write fills -> [T, N, D] in q's dtype.

    As the core's paged_attention, but that an entry is its codes times its scale, in float32. Rows beyond
    query_start[-1] are padding and come back as zeros, as does the one row of a sequence without entries.
    """
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    starts, lengths = pages.query_start.tolist(), pages.kv_length.tolist()
    for sequence, length in enumerate(lengths):
        rows, blocks = slice(starts[sequence], starts[sequence + 1]), pages.block_table[sequence]
        keys, values = (
            sequence_entries(cache[entries], blocks, length)
            * sequence_entries(cache[scales], blocks, length).unsqueeze(-1)
            for entries, scales in (("keys", "key_scales"), ("values", "value_scales"))
        )
        visible = visible_positions(rows.stop - rows.start, length, window, q.device)
        out[rows] = dense_attention(q[rows].float(), keys, values, visible, scale).to(q.dtype)
    return out
