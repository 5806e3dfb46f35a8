"""Paged attention on a CPU: decodes together, prefill pieces one by one, each with torch's fused attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from plexor.batch import LayerCache

# Gathered numbers (of keys, and again of values) for which decodes are attended together: what a core's cache holds.
# Larger temporaries are also handed back to the operating system each time, and page faults then cost more than the
# arithmetic.
GATHER_LIMIT = 1 << 18


def paged_attention(
    q: Tensor,
    cache: LayerCache,
    block_table: Tensor,
    query_start: Tensor,
    kv_length: Tensor,
    scale: float,
    window: int | None,
    max_query: int,
) -> Tensor:
    """As plexor.kernels.reference.paged_attention. No entry beyond a sequence's length is read."""
    starts, lengths = query_start.tolist(), kv_length.tolist()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    out[starts[-1] :] = 0
    decodes = []
    for sequence, length in enumerate(lengths):
        start, end = starts[sequence], starts[sequence + 1]
        if end - start == 1:
            decodes.append(sequence)
        elif end > start:
            keys, values = sequence_entries(cache, block_table[sequence], length, q.dtype)
            out[start:end] = attend_piece(q[start:end], keys, values, scale, window)
    for chunk in chunks(decodes, lengths, cache["keys"][0, 0].numel(), window):
        longest = lengths[chunk[0]]
        if len(chunk) == len(lengths):
            num_rows = starts[-1]
            out[:num_rows] = attend_decodes(q[:num_rows], cache, block_table, kv_length, longest, scale, window)
            break
        picked = torch.tensor(chunk)
        rows = query_start[picked]
        out[rows] = attend_decodes(q[rows], cache, block_table[picked], kv_length[picked], longest, scale, window)
    return out


def sequence_entries(cache: LayerCache, blocks: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The keys and values [length, K, D] of one sequence."""
    block_size = cache["keys"].shape[1]
    own = blocks[: -(-length // block_size)]
    keys, values = (cache[name].index_select(0, own).flatten(0, 1)[:length] for name in ("keys", "values"))
    return widened(keys, dtype), widened(values, dtype)


def widened(entries: Tensor, dtype: torch.dtype) -> Tensor:
    """Cache entries as attention in this dtype takes them: as they are where the dtypes agree, otherwise float32."""
    return entries if entries.dtype == dtype else entries.float()


def attend_piece(q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
    """Attend one piece: q [n, N, D], the last n positions of keys and values [L, K, D] -> [n, N, D]."""
    num_rows, length = q.shape[0], keys.shape[0]
    visible = None
    if num_rows < length or (window is not None and window < length):
        own = torch.arange(length - num_rows, length).unsqueeze(1)
        position = torch.arange(length)
        visible = position <= own
        if window is not None:
            visible &= position > own - window
    attended = scaled_dot_product_attention(
        q.to(keys.dtype).transpose(0, 1).unsqueeze(0),
        keys.transpose(0, 1).unsqueeze(0),
        values.transpose(0, 1).unsqueeze(0),
        attn_mask=visible,
        is_causal=visible is None,
        scale=scale,
        enable_gqa=q.shape[1] != keys.shape[1],
    )
    return attended.squeeze(0).transpose(0, 1)


def chunks(decodes: list[int], lengths: list[int], entry_size: int, window: int | None) -> list[list[int]]:
    """Sequences of similar length side by side, as many as stay below the limit when padded to the longest."""
    found: list[list[int]] = []
    longest = 0
    for sequence in sorted(decodes, key=lambda sequence: -lengths[sequence]):
        length = lengths[sequence] if window is None else min(lengths[sequence], window)
        if not found or (len(found[-1]) + 1) * longest * entry_size > GATHER_LIMIT:
            found.append([])
            longest = length
        found[-1].append(sequence)
    return found


def attend_decodes(
    q: Tensor,
    cache: LayerCache,
    block_table: Tensor,
    kv_length: Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """Attend q [S, N, D], one row of each sequence with kv_length [S], none above `longest` -> [S, N, D].

    The query heads of a KV head stand as rows beside each other, since all of them see the same positions:

        q        [S, K, N / K, D]
        entries  [S, K, longest, D]    padded with each sequence's own last entry, which the mask hides
    """
    num_sequences, num_heads, head_size = q.shape
    keys, values = cache["keys"], cache["values"]
    block_size, num_kv_heads = keys.shape[1:3]
    length = kv_length.long().unsqueeze(1)
    position = torch.arange(longest)
    if window is not None:
        position = position[:window] + (length - window).clamp(min=0)
    visible = position < length
    position = torch.minimum(position, length - 1)
    slots = block_table.gather(1, position // block_size) * block_size + position % block_size
    shape = (num_sequences, -1, num_kv_heads, head_size)
    picked_keys, picked_values = (
        widened(entries.view(-1, num_kv_heads, head_size).index_select(0, slots.view(-1)), q.dtype)
        .view(shape)
        .transpose(1, 2)
        for entries in (keys, values)
    )
    attended = scaled_dot_product_attention(
        q.to(picked_keys.dtype).view(num_sequences, num_kv_heads, -1, head_size),
        picked_keys,
        picked_values,
        attn_mask=visible.view(num_sequences, 1, 1, -1),
        scale=scale,
    )
    return attended.to(q.dtype).reshape(num_sequences, num_heads, head_size)
