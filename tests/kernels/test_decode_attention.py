"""The decode kernel's shares: however the tiles are cut, the result is the same and its counters come back to zero."""

from __future__ import annotations

import pytest
import torch

from plexor.batch import LayerCache, Pages
from plexor.kernels.reference.paged_attention import paged_attention
from plexor.kernels.samples import Maker, attention_sample
from plexor.kernels.triton.decode_attention import DecodeAttention, DecodeTuning

LENGTHS = (500, 3, 0, 33, 16, 200)
SCALE = 0.2


def decodes(lengths: tuple[int, ...], heads: tuple[int, int, int]) -> tuple[torch.Tensor, LayerCache, Pages]:
    """Queries, a cache whose unseen entries are NaN, and pages, in float32."""
    make = Maker(torch.device("cpu"), torch.float32, 21)
    pieces = [(1, length) for length in lengths]
    sample = attention_sample(make, "", pieces, heads, None, torch.float32, num_decodes=len(pieces))
    q, cache, pages = sample.args[:3]
    return q, cache, pages


@pytest.mark.parametrize(
    "tuning",
    [
        DecodeTuning(tile=16, warps=4, stages=2, registers=168, programs=1, least=16, most=64),
        DecodeTuning(tile=16, warps=4, stages=2, registers=168, programs=5, least=16, most=8),
        DecodeTuning(tile=32, warps=4, stages=2, registers=168, programs=50, least=64, most=32),
        DecodeTuning(tile=16, warps=4, stages=2, registers=168, programs=50, least=16, most=16),
    ],
    ids=str,
)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("lengths", [LENGTHS, (70,) * 8, (90, 96, 81, 82)], ids=str)
def test_every_way_to_cut_gives_the_same(tuning: DecodeTuning, lengths: tuple[int, ...], window: int | None) -> None:
    q, cache, pages = decodes(lengths, (6, 2, 24))
    expected = paged_attention(q, cache, pages, SCALE, window)
    attend = DecodeAttention(lambda num_rows, size, element_bytes: tuning)
    out = torch.full_like(q, float("nan"))
    attend(q, cache, pages.block_table, pages.kv_length, SCALE, window, out)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=2e-5)


def test_a_second_launch_with_other_lengths_finds_the_counters_at_zero() -> None:
    tuning = DecodeTuning(tile=16, warps=4, stages=2, registers=168, programs=8, least=16, most=64)
    attend = DecodeAttention(lambda num_rows, size, element_bytes: tuning)
    q, cache, pages = decodes(LENGTHS, (4, 1, 32))
    for lengths in (LENGTHS, (17, 0, 0, 32, 1, 199), LENGTHS):
        pages.kv_length.copy_(torch.tensor(lengths))
        out = torch.full_like(q, float("nan"))
        attend(q, cache, pages.block_table, pages.kv_length, SCALE, None, out)
        torch.testing.assert_close(out, paged_attention(q, cache, pages, SCALE, None), rtol=1e-4, atol=2e-5)
