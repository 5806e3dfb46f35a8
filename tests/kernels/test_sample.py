"""What the reference of `sample` draws: the right tokens, with the right frequencies, whoever stands beside."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plexor.kernels.reference.sample import sample

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)
LOGITS = st.lists(st.integers(-6, 6).map(lambda eighths: eighths / 2), min_size=1, max_size=12)
ROW = st.tuples(
    st.sampled_from((0.0, 0.5, 1.0, 1.7)),
    st.integers(0, 13),
    st.sampled_from((0.0, 0.31, 0.77, 1.0)),
    st.sampled_from((0.0, 0.011, 0.23)),
)


def draw(logits: Tensor, rows: list[tuple[float, int, float, float]], steps: list[int] | None = None) -> list[int]:
    temperature, top_k, top_p, min_p = zip(*rows, strict=True)
    ids = sample(
        logits,
        torch.tensor(temperature),
        torch.tensor(top_k, dtype=torch.int32),
        torch.tensor(top_p),
        torch.tensor(min_p),
        torch.arange(len(rows)) * 1000003 + 17,
        torch.tensor(steps or [0] * len(rows)),
        *nowhere(len(rows)),
    )
    answer: list[int] = ids.tolist()
    return answer


def nowhere(num_rows: int) -> tuple[Tensor, Tensor]:
    """Slots and tokens of rows that keep nothing."""
    return torch.full((num_rows,), -1), torch.zeros(0, dtype=torch.int64)


def kept_by_hand(logits: list[float], row: tuple[float, int, float, float]) -> dict[int, float]:
    """Token to mass, straight from the words of the definition."""
    temperature, top_k, top_p, min_p = row
    mass = {token: math.exp((logit - max(logits)) / temperature) for token, logit in enumerate(logits)}
    kept = set(mass)
    if top_k:
        kept = {token for token in kept if sum(logits[other] > logits[token] for other in mass) < top_k}
    if top_p < 1:
        whole = sum(mass[token] for token in kept)
        kept = {
            token
            for token in kept
            if logits[token] == max(logits)
            or sum(mass[other] for other in kept if logits[other] > logits[token]) < top_p * whole
        }
    return {token: mass[token] for token in sorted(kept) if mass[token] >= min_p}


def test_greedy_takes_the_lowest_of_the_largest() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0], [-math.inf, -math.inf, -2.0, -math.inf]])
    greedy = (0.0, 1, 0.1, 0.9)
    assert draw(logits, [greedy] * 3) == [1, 0, 2]
    assert draw(logits, [greedy, (1.0, 0, 1.0, 0.0), greedy])[::2] == [1, 2]


def test_each_slot_keeps_what_its_row_drew() -> None:
    best = torch.tensor([3, 1, 0, 2])
    zeros, tokens = torch.zeros(4), torch.full((6,), -5)
    settings_of_rows = (zeros, zeros.int(), zeros + 1, zeros, zeros.long(), zeros.long())
    sample(torch.eye(4)[best], *settings_of_rows, torch.tensor([5, -1, 0, 2]), tokens)
    assert tokens.tolist() == [0, -5, 2, -5, -5, 3]


def test_no_rows() -> None:
    empty = torch.zeros(0)
    ids = sample(torch.zeros(0, 5), empty, empty.int(), empty, empty, empty.long(), empty.long(), *nowhere(0))
    assert ids.shape == (0,)
    assert ids.dtype == torch.int64


@EXAMPLES
@given(LOGITS, ROW, st.integers(0, 999))
def test_draws_come_from_what_is_kept(logits: list[float], row: tuple[float, int, float, float], step: int) -> None:
    (token,) = draw(torch.tensor([logits]), [row], [step])
    if row[0] == 0:
        assert token == logits.index(max(logits))
    else:
        assert token in kept_by_hand(logits, row)


def test_each_kept_token_is_drawn_as_often_as_it_should() -> None:
    logits = [0.3, -1.0, 2.0, 0.0, 1.5, 0.3, -math.inf, 0.9]
    num_draws = 8000
    for row in ((1.0, 0, 1.0, 0.0), (2.0, 5, 1.0, 0.0), (0.8, 0, 0.9, 0.0), (1.5, 6, 0.97, 0.2)):
        ids = draw(torch.tensor([logits] * num_draws), [row] * num_draws, list(range(num_draws)))
        mass = {token: share for token, share in kept_by_hand(logits, row).items() if share > 0}
        counts = torch.bincount(torch.tensor(ids), minlength=len(logits)).tolist()
        assert {token for token, count in enumerate(counts) if count} == set(mass)
        expected = {token: num_draws * share / sum(mass.values()) for token, share in mass.items()}
        chi_square = sum((counts[token] - wanted) ** 2 / wanted for token, wanted in expected.items())
        assert chi_square < 22.5  # six degrees of freedom or fewer, one in a thousand


@EXAMPLES
@given(st.lists(st.tuples(ROW, st.integers(0, 99)), min_size=1, max_size=5), st.integers(0, 99))
def test_neighbours_do_not_matter(rows: list[tuple[tuple[float, int, float, float], int]], seed: int) -> None:
    logits = torch.randn(len(rows), 40, generator=torch.Generator().manual_seed(seed)) * 2
    settings_of_rows, steps = [row for row, _ in rows], [step for _, step in rows]
    together = draw(logits, settings_of_rows, steps)
    temperature, top_k, top_p, min_p = settings_of_rows[-1]
    last = len(rows) - 1
    alone = sample(
        logits[last:],
        torch.tensor([temperature]),
        torch.tensor([top_k], dtype=torch.int32),
        torch.tensor([top_p]),
        torch.tensor([min_p]),
        torch.tensor([last * 1000003 + 17]),
        torch.tensor([steps[last]]),
        *nowhere(1),
    )
    assert together[last] == alone.item()
