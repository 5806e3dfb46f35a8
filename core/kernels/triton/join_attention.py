"""Attention over two runs of positions from the attention over each: one program for some rows of a head."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from plexor.kernels.triton.pdl import launch_next, overlaps, wait

ROWS = 32


@triton.jit(do_not_specialize=["num_rows"])
def join_attention_kernel(
    one,
    one_sums,
    other,
    other_sums,
    out,
    num_heads,
    num_rows,
    head_size,
    one_piece_stride,
    one_head_stride,
    one_row_stride,
    other_piece_stride,
    other_head_stride,
    other_row_stride,
    out_piece_stride,
    out_row_stride,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_next(PDL)
    wait(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    piece = tl.program_id(2).to(tl.int64)
    feature = tl.arange(0, SIZE)[None, :]
    inside = (row < num_rows)[:, None] & (feature < head_size)
    one += piece * one_piece_stride + head * one_head_stride
    other += piece * other_piece_stride + head * other_head_stride
    out += piece * out_piece_stride + head * head_size
    wide_row = row.to(tl.int64)[:, None]
    a = tl.load(one + wide_row * one_row_stride + feature, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(other + wide_row * other_row_stride + feature, mask=inside, other=0.0).to(tl.float32)
    sums = (piece * num_heads + head) * num_rows + row
    a_sum = tl.load(one_sums + sums, mask=row < num_rows, other=0.0)
    b_sum = tl.load(other_sums + sums, mask=row < num_rows, other=0.0)
    share = tl.sigmoid(b_sum - a_sum)[:, None]
    joined = a + share * (b - a)
    tl.store(out + wide_row * out_row_stride + feature, joined.to(out.dtype.element_ty), mask=inside)


def join_attention(one: Tensor, one_sums: Tensor, other: Tensor, other_sums: Tensor, out: Tensor) -> None:
    """Put one and other [S, N, n, D], with the logs of their sums [S, N, n] float32, together in out [S, n, N, D].

    Of a row, each has the share that its sum has of both; the math is float32. The sums are contiguous, as is a row of
    out.
    """
    num_pieces, num_heads, num_rows, head_size = one.shape
    pdl = overlaps(out.device)
    join_attention_kernel[(triton.cdiv(num_rows, ROWS), num_heads, num_pieces)](
        one,
        one_sums,
        other,
        other_sums,
        out,
        num_heads,
        num_rows,
        head_size,
        *one.stride()[:3],
        *other.stride()[:3],
        *out.stride()[:2],
        ROWS=ROWS,
        SIZE=triton.next_power_of_2(head_size),
        PDL=pdl,
        launch_pdl=pdl,
    )
