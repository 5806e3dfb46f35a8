"""Paged attention whose decodes go to clusters of blocks where rows are few, and to Triton where they are many."""

from __future__ import annotations

from torch import Tensor

from plexor.batch import LayerCache
from plexor.kernels.cuda.decode_attention import DecodeAttention, serves
from plexor.kernels.triton.decode_attention import FEW_ROWS
from plexor.kernels.triton.decode_attention import DecodeAttention as SharedAttention
from plexor.kernels.triton.paged_attention import PagedAttention as TritonAttention


class Decodes:
    """The attention of one-row sequences for one layer, by the quicker of two kernels."""

    def __init__(self) -> None:
        self._few = DecodeAttention()
        self._many = SharedAttention()

    def __call__(
        self,
        q: Tensor,
        cache: LayerCache,
        block_table: Tensor,
        kv_length: Tensor,
        scale: float,
        window: int | None,
        out: Tensor,
    ) -> None:
        """As plexor.kernels.triton.decode_attention.DecodeAttention."""
        attend = self._few if q.shape[0] <= FEW_ROWS and serves(q, cache) else self._many
        attend(q, cache, block_table, kv_length, scale, window, out)


class PagedAttention(TritonAttention):
    """The attention of one layer."""

    def __init__(self) -> None:
        super().__init__(Decodes())
