"""Paged attention: the step's decodes in one launch, all other sequences in another."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from plexor.batch import LayerCache, Pages
from plexor.kernels.triton.decode_attention import DecodeAttention
from plexor.kernels.triton.prefill_attention import Pieces, prefill_attention

AttendDecodes = Callable[[Tensor, LayerCache, Tensor, Tensor, float, int | None, Tensor], None]
"""As DecodeAttention is called."""


class PagedAttention:
    """The attention of one layer. decodes: what attends one-row sequences, if not Triton's kernel."""

    def __init__(self, decodes: AttendDecodes | None = None) -> None:
        self._decodes: AttendDecodes = DecodeAttention() if decodes is None else decodes

    def __call__(self, q: Tensor, cache: LayerCache, pages: Pages, scale: float, window: int | None) -> Tensor:
        """As plexor.kernels.reference.paged_attention; scale > 0, the cache's entries [K, D] are contiguous."""
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        num_decodes = pages.num_decodes
        if num_decodes:
            self.attend_decodes(q, cache, pages, scale, window, out)
        if num_decodes == pages.kv_length.shape[0]:
            out[num_decodes:].zero_()
        else:
            pieces = after_decodes(pages, q.shape[0])
            prefill_attention(q[num_decodes:], cache, pieces, scale, window, out[num_decodes:])
        return out

    def attend_decodes(
        self, q: Tensor, cache: LayerCache, pages: Pages, scale: float, window: int | None, out: Tensor
    ) -> None:
        """Attend the first rows of q, those of the decodes, into the first rows of out."""
        rows = slice(pages.num_decodes)
        self._decodes(q[rows], cache, pages.block_table, pages.kv_length, scale, window, out[rows])


def after_decodes(pages: Pages, num_rows: int) -> Pieces:
    """All sequences after the decodes, and the rows after the last; their rows are counted from the first of them."""
    if __name__ not in pages.memo:
        decodes = pages.num_decodes
        row_end = pages.query_start[decodes + 1 :]
        pages.memo[__name__] = Pieces(
            num_rows=num_rows - decodes,
            longest=pages.max_query,
            row_end=row_end - decodes if decodes else row_end,
            row_shift=None,
            kv_length=pages.kv_length[decodes:],
            block_table=pages.block_table[decodes:],
        )
    pieces: Pieces = pages.memo[__name__]
    return pieces
