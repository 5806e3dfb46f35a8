"""Paged attention over entries with scales, as they lie or, for pieces that the host knows, from a widened copy.

A piece multiplies each entry with many rows, so that its copy, made once for all of them, costs little beside that, and
the library can take it.

    block table     7 2 9 | 4 7 |        of the pieces, any block of the cache
    copy            0 1 2 | 3 4 |        their blocks in the order of the sequences, in the dtype of the queries
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from plexor.batch import LayerCache, Pages
from plexor.extension.specs import Facts
from plexor.kernels.cuda.attention_choice import decodes_here
from plexor.kernels.cudnn.paged_attention import PagedAttention as LibraryAttention
from plexor.kernels.cudnn.paged_attention import refuses
from plexor.kernels.triton.paged_attention import PagedAttention

Attend = Callable[[Tensor, LayerCache, Pages, float, int | None], Tensor]

ROWS = 32
"""Heads of positions that a program widens."""


@dataclass(frozen=True, slots=True, eq=False)
class Copies:
    """Where the pieces' entries are copied to, the same in every layer.

    block_table [S, B] int32: of the cache. first [S] int32: each one's first block in the copy. num_blocks: that the
    copy has room for. pages: the pieces alone, which count in the copy.
    """

    block_table: Tensor
    first: Tensor
    num_blocks: int
    pages: Pages


@triton.jit(do_not_specialize=["block_table_stride"])
def widen_kernel(
    keys,
    values,
    key_scales,
    value_scales,
    block_table,
    first,
    kv_length,
    wide_keys,
    wide_values,
    block_table_stride,
    num_heads,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """One program: some heads of positions of one block of a sequence."""
    index = tl.program_id(0)
    sequence = tl.program_id(1)
    length = tl.load(kv_length + sequence)
    if index * BLOCK_SIZE >= length:
        return
    source = tl.load(block_table + sequence.to(tl.int64) * block_table_stride + index).to(tl.int64)
    target = (tl.load(first + sequence) + index).to(tl.int64)
    rows = BLOCK_SIZE * num_heads
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    feature = tl.arange(0, SIZE)
    there = row < rows
    inside = there[:, None] & (feature < HEAD_SIZE)[None, :]
    place = row[:, None] * HEAD_SIZE + feature[None, :]
    key_scale = tl.load(key_scales + source * rows + row, mask=there, other=0.0)
    value_scale = tl.load(value_scales + source * rows + row, mask=there, other=0.0)
    key = tl.load(keys + source * rows * HEAD_SIZE + place, mask=inside, other=0).to(tl.float32)
    value = tl.load(values + source * rows * HEAD_SIZE + place, mask=inside, other=0).to(tl.float32)
    wide_keys += target * rows * HEAD_SIZE
    wide_values += target * rows * HEAD_SIZE
    tl.store(wide_keys + place, (key * key_scale[:, None]).to(wide_keys.dtype.element_ty), mask=inside)
    tl.store(wide_values + place, (value * value_scale[:, None]).to(wide_values.dtype.element_ty), mask=inside)


class ScaledPagedAttention:
    """The attention of one layer over a cache with "key_scales", "value_scales" [num_blocks, block_size, K]."""

    def __init__(self) -> None:
        self._as_they_lie = PagedAttention(decodes_here())
        self._pieces: Attend | None = None

    def __call__(self, q: Tensor, cache: LayerCache, pages: Pages, scale: float, window: int | None) -> Tensor:
        """As plexor.kernels.reference.paged_attention, an entry being its numbers times its scale; scale > 0, all parts
        of the cache are contiguous. Pieces see entries rounded to q's dtype.
        """
        num_decodes, num_pieces = pages.num_decodes, pages.kv_length.shape[0] - pages.num_decodes
        if num_pieces == 0 or len(pages.prefills) != num_pieces:
            return self._as_they_lie(q, cache, pages, scale, window)
        copies = make_copies(pages, cache["keys"].shape[1])
        if self._pieces is None:
            self._pieces = attention_of_pieces(q)
        attended = self._pieces(q[num_decodes:], widened(cache, copies, q.dtype), copies.pages, scale, window)
        if num_decodes == 0:
            return attended
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self._as_they_lie.attend_decodes(q, cache, pages, scale, window, out)
        out[num_decodes:] = attended
        return out


def attention_of_pieces(q: Tensor) -> Attend:
    """What attends pieces of more than one row over a cache of the queries' dtype: the library if it takes them."""
    if q.device.type != "cuda" or q.dtype == torch.float32:
        return PagedAttention()
    dtype, capability = str(q.dtype).removeprefix("torch."), torch.cuda.get_device_capability(q.device)
    facts = Facts(q.device.type, dtype, capability, dtype, {"head_size": q.shape[2]})
    return LibraryAttention() if capability >= (9, 0) and refuses(facts) is None else PagedAttention()


def make_copies(pages: Pages, block_size: int) -> Copies:
    """The sequences after the decodes, each of which is one of pages.prefills."""
    key = (__name__, block_size)
    if key not in pages.memo:
        decodes, prefills = pages.num_decodes, pages.prefills
        kv_length, block_table = pages.kv_length[decodes:], pages.block_table[decodes:]
        counts = [-(-piece.kv_length // block_size) for piece in prefills]
        block_table = block_table[:, : max(counts)]
        used = (kv_length + block_size - 1) // block_size
        first = (used.cumsum(0) - used).int()
        table = first.unsqueeze(1) + torch.arange(max(counts), dtype=torch.int32, device=first.device)
        own = replace(
            pages,
            query_start=pages.query_start[decodes:] - decodes,
            kv_length=kv_length,
            block_table=table,
            num_decodes=0,
            prefills=tuple(
                replace(piece, sequence=piece.sequence - decodes, first_row=piece.first_row - decodes)
                for piece in prefills
            ),
            memo={},
        )
        pages.memo[key] = Copies(block_table, first, sum(counts), own)
    copies: Copies = pages.memo[key]
    return copies


def widened(cache: LayerCache, copies: Copies, dtype: torch.dtype) -> LayerCache:
    """ "keys" and "values" of the copied blocks, numbers times scales."""
    keys, pages = cache["keys"], copies.pages
    block_size, num_heads, head_size = keys.shape[1:]
    shape = (copies.num_blocks, block_size, num_heads, head_size)
    wide = {name: torch.empty(shape, dtype=dtype, device=keys.device) for name in ("keys", "values")}
    grid = (copies.block_table.shape[1], pages.kv_length.shape[0], triton.cdiv(block_size * num_heads, ROWS))
    widen_kernel[grid](
        keys,
        cache["values"],
        cache["key_scales"],
        cache["value_scales"],
        copies.block_table,
        copies.first,
        pages.kv_length,
        wide["keys"],
        wide["values"],
        copies.block_table.stride(0),
        num_heads,
        HEAD_SIZE=head_size,
        BLOCK_SIZE=block_size,
        ROWS=ROWS,
        SIZE=triton.next_power_of_2(head_size),
    )
    return wide
