"""Paged attention: the step's decodes in one launch, all other sequences in another."""

from __future__ import annotations

import torch
from torch import Tensor

from plexor.batch import LayerCache, Pages
from plexor.kernels.triton.decode_attention import DecodeAttention
from plexor.kernels.triton.prefill_attention import prefill_attention


class PagedAttention:
    """The attention of one layer."""

    def __init__(self) -> None:
        self._attend_decodes = DecodeAttention()

    def __call__(self, q: Tensor, cache: LayerCache, pages: Pages, scale: float, window: int | None) -> Tensor:
        """As plexor.kernels.reference.paged_attention; the cache's entries [K, D] are contiguous."""
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        num_decodes = pages.num_decodes
        if num_decodes:
            self._attend_decodes(
                q[:num_decodes], cache, pages.block_table, pages.kv_length, scale, window, out[:num_decodes]
            )
        if num_decodes == pages.kv_length.shape[0]:
            out[num_decodes:].zero_()
        else:
            prefill_attention(q[num_decodes:], cache, after_decodes(pages), scale, window, out[num_decodes:])
        return out


def after_decodes(pages: Pages) -> Pages:
    """The sequences after the decodes, their rows counted from their first."""
    if pages.num_decodes == 0:
        return pages
    if __name__ not in pages.memo:
        pages.memo[__name__] = Pages(
            query_start=pages.query_start[pages.num_decodes :] - pages.num_decodes,
            kv_length=pages.kv_length[pages.num_decodes :],
            block_table=pages.block_table[pages.num_decodes :],
            max_query=pages.max_query,
        )
    rest: Pages = pages.memo[__name__]
    return rest
