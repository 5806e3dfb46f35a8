"""What of a step goes to the library and what is left over, with a library of plain torch in the place of cuDNN."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from plexor.batch import Pages, Prefill
from plexor.extension.specs import Facts
from plexor.kernels.cudnn.paged_attention import GATHERED, PagedAttention, make_plan, refuses
from plexor.kernels.reference.paged_attention import paged_attention
from plexor.kernels.samples import Maker, attention_sample

STEP = 16
SHAPE = (6, 2, 24)


class Library:
    """Attention by definition; keeps (pieces, rows, positions, causal) of each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, int, bool]] = []

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        num_rows, length = q.shape[2], keys.shape[2]
        self.calls.append((q.shape[0], num_rows, length, causal))
        group = q.shape[1] // keys.shape[1]
        keys, values = (entries.repeat_interleave(group, dim=1) for entries in (keys, values))
        scores = q @ keys.transpose(2, 3) * scale
        if causal:
            scores = scores.masked_fill(torch.ones(num_rows, length, dtype=torch.bool).triu(1), float("-inf"))
        return scores.softmax(dim=-1) @ values, scores.logsumexp(dim=-1)


@pytest.mark.parametrize(
    ("pieces", "num_decodes", "calls"),
    [
        ([(33, 33)], 0, [(1, 32, 32, True)]),
        ([(16, 48), (5, 40)], 0, [(1, 16, 16, True), (1, 16, 32, False)]),
        ([(1, 30), (1, 0), (20, 20), (20, 20), (20, 20)], 2, [(2, 16, 16, True), (1, 16, 16, True)]),
        (
            [(1, 7), (40, 56), (40, 56), (0, 0), (35, 35), (3, 9)],
            1,
            [(2, 32, 32, True), (2, 32, 16, False), (1, 32, 32, True)],
        ),
        ([(17, 18), (15, 31), (32, 32)], 0, [(1, 32, 32, True)]),
    ],
)
def test_pieces_agree_with_the_reference(
    pieces: Sequence[tuple[int, int]], num_decodes: int, calls: list[tuple[int, int, int, bool]]
) -> None:
    make = Maker(torch.device("cpu"), torch.float32, 11)
    for block_size, fused, num_padding in ((16, False, 0), (24, True, 3)):
        sample = attention_sample(
            make,
            "pieces",
            pieces,
            SHAPE,
            None,
            torch.float32,
            num_padding=num_padding,
            fused=fused,
            block_size=block_size,
            num_decodes=num_decodes,
        )
        library = Library()
        actual = PagedAttention(library, STEP)(*sample.args)
        torch.testing.assert_close(actual, paged_attention(*sample.args), rtol=1e-4, atol=2e-5)
        assert library.calls == calls


def test_pieces_under_a_window_or_not_told_of_stay_with_triton() -> None:
    make = Maker(torch.device("cpu"), torch.float32, 12)
    for window, num_decodes, calls in ((31, 0, []), (None, None, []), (32, 0, [(1, 32, 32, True)])):
        sample = attention_sample(make, "a piece", [(32, 32)], SHAPE, window, torch.float32, num_decodes=num_decodes)
        library = Library()
        actual = PagedAttention(library, STEP)(*sample.args)
        torch.testing.assert_close(actual, paged_attention(*sample.args), rtol=1e-4, atol=2e-5)
        assert library.calls == calls


def test_a_call_gathers_a_bounded_number_of_positions() -> None:
    long = GATHERED // 2
    plan = make_plan(told([(long, long)] * 5 + [(long, long + GATHERED)]), None, 16, STEP)
    assert plan is not None
    assert [(run.num_pieces, run.num_attended) for run in plan.runs] == [(2, long), (2, long), (1, long)]
    assert plan.rest is not None
    assert plan.rest.num_rows == long
    assert plan.end == 6 * long


def told(pieces: Sequence[tuple[int, int]]) -> Pages:
    """Pages of pieces (rows, entries) whose tables are all zeros."""
    starts = [0, *accumulate(num_rows for num_rows, _ in pieces)]
    widest = -(-max(kv_length for _, kv_length in pieces) // 16)
    return Pages(
        query_start=torch.zeros(len(pieces) + 1, dtype=torch.int32),
        kv_length=torch.zeros(len(pieces), dtype=torch.int32),
        block_table=torch.zeros(len(pieces), widest, dtype=torch.int32),
        max_query=max(num_rows for num_rows, _ in pieces),
        prefills=tuple(Prefill(s, starts[s], *piece) for s, piece in enumerate(pieces)),
    )


@pytest.mark.parametrize(
    ("head_size", "kv_dtype", "reason"),
    [(256, "bfloat16", "128 features"), (60, "bfloat16", "multiple of 8"), (64, "float8_e4m3fn", "own dtype")],
)
def test_refuses_what_the_library_cannot_read(head_size: int, kv_dtype: str, reason: str) -> None:
    facts = Facts("cuda", "bfloat16", (9, 0), kv_dtype, {"head_size": head_size})
    answer = refuses(facts)
    assert answer is not None
    assert reason in answer
