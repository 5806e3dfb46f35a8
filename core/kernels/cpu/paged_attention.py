"""Paged attention on a CPU: decodes together, prefill pieces one by one, each with torch's fused attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from plexor.batch import LayerCache, Pages

# Gathered numbers (of keys, and again of values) for which decodes are attended together: what a core's cache holds.
# Larger temporaries are also handed back to the operating system each time, and page faults then cost more than the
# arithmetic.
GATHER_LIMIT = 1 << 18


@dataclass(frozen=True, slots=True)
class Decodes:
    """Decodes that are attended together: what they read does not change from layer to layer.

    rows: of the batch, None for all of its first ones in order. num_rows: how many. slots [S * L]: the entries, padded
    with each sequence's own last one. visible [S, 1, 1, L]: which of them count.
    """

    rows: Tensor | None
    num_rows: int
    slots: Tensor
    visible: Tensor


@dataclass(frozen=True, slots=True)
class Plan:
    """A step's attention.

    pieces: (start, end, sequence, entries) of prefills. empty: rows of sequences without entries. end: where padding
    begins.
    """

    pieces: tuple[tuple[int, int, int, int], ...]
    decodes: tuple[Decodes, ...]
    empty: tuple[int, ...]
    end: int


def paged_attention(q: Tensor, cache: LayerCache, pages: Pages, scale: float, window: int | None) -> Tensor:
    """As plexor.kernels.reference.paged_attention. No entry beyond a sequence's length is read."""
    block_size, num_kv_heads, head_size = cache["keys"].shape[1:]
    key = (__name__, window, block_size, num_kv_heads * head_size)
    if key not in pages.memo:
        pages.memo[key] = make_plan(pages, window, block_size, num_kv_heads * head_size)
    plan: Plan = pages.memo[key]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    out[plan.end :] = 0
    for row in plan.empty:
        out[row] = 0
    for start, end, sequence, length in plan.pieces:
        keys, values = sequence_entries(cache, pages.block_table[sequence], length, q.dtype)
        out[start:end] = attend_piece(q[start:end], keys, values, scale, window)
    for decodes in plan.decodes:
        if decodes.rows is None:
            out[: decodes.num_rows] = attend_decodes(q[: decodes.num_rows], cache, decodes, scale)
        else:
            out[decodes.rows] = attend_decodes(q[decodes.rows], cache, decodes, scale)
    return out


def make_plan(pages: Pages, window: int | None, block_size: int, entry_size: int) -> Plan:
    """entry_size: numbers of a key, over all heads."""
    starts, lengths = pages.query_start.tolist(), pages.kv_length.tolist()
    spans = [(starts[s], starts[s + 1], s, length) for s, length in enumerate(lengths)]
    pieces = tuple(span for span in spans if span[1] - span[0] > 1)
    single = [sequence for start, end, sequence, length in spans if end - start == 1 and length > 0]
    empty = tuple(start for start, end, _, length in spans if end - start == 1 and length == 0)
    decodes = []
    for chunk in chunks(single, lengths, entry_size, window):
        everything = len(chunk) == len(lengths)
        picked = torch.arange(len(chunk)) if everything else torch.tensor(chunk)
        slots, visible = decode_slots(
            pages.block_table[picked], pages.kv_length[picked], lengths[chunk[0]], window, block_size
        )
        decodes.append(Decodes(None if everything else pages.query_start[picked], len(chunk), slots, visible))
    return Plan(pieces, tuple(decodes), empty, starts[-1])


def decode_slots(
    block_table: Tensor, kv_length: Tensor, longest: int, window: int | None, block_size: int
) -> tuple[Tensor, Tensor]:
    """Slots and visibility of the entries that sequences of kv_length [S], none above `longest`, read: see Decodes."""
    length = kv_length.long().unsqueeze(1)
    position = torch.arange(longest)
    if window is not None:
        position = position[:window] + (length - window).clamp(min=0)
    visible = position < length
    position = torch.minimum(position, length - 1)
    slots = block_table.gather(1, position // block_size) * block_size + position % block_size
    return slots.flatten(), visible.view(len(kv_length), 1, 1, -1)


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


def attend_decodes(q: Tensor, cache: LayerCache, decodes: Decodes, scale: float) -> Tensor:
    """Attend q [S, N, D], one row of each sequence -> [S, N, D].

    The query heads of a KV head stand as rows beside each other, since all of them see the same positions:

        q        [S, K, N / K, D]
        entries  [S, K, L, D]
    """
    num_sequences, num_heads, head_size = q.shape
    num_kv_heads = cache["keys"].shape[2]
    shape = (num_sequences, -1, num_kv_heads, head_size)
    keys, values = (
        widened(cache[name].view(-1, num_kv_heads, head_size).index_select(0, decodes.slots), q.dtype)
        .view(shape)
        .transpose(1, 2)
        for name in ("keys", "values")
    )
    attended = scaled_dot_product_attention(
        q.to(keys.dtype).view(num_sequences, num_kv_heads, -1, head_size),
        keys,
        values,
        attn_mask=decodes.visible,
        scale=scale,
    )
    return attended.to(q.dtype).reshape(num_sequences, num_heads, head_size)
