"""The Triton draw gives the reference's tokens on random rows, however a row is divided and whatever stands open."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from plexor.kernels.reference.sample import sample

knobs = pytest.importorskip("triton").knobs

from plexor.kernels.triton.sample import Draw  # noqa: E402

pytestmark = pytest.mark.skipif(not knobs.runtime.interpret, reason="the interpreter divides and multiplies as torch")

CUTS = (
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.7, 40, 1.0, 0.0),
    (1.3, 0, 0.9, 0.0),
    (0.9, 300, 0.95, 0.01),
    (100.0, 900, 0.999, 0.0),
    (0.05, 3, 0.2, 0.0),
)


def arguments(logits: Tensor, seed: int) -> tuple[Tensor, ...]:
    """A row of settings for each row of logits, all of CUTS in turn."""
    temperature, top_k, top_p, min_p = zip(*(CUTS[row % len(CUTS)] for row in range(logits.shape[0])), strict=True)
    generator = torch.Generator().manual_seed(seed)
    return (
        logits,
        torch.tensor(temperature),
        torch.tensor(top_k, dtype=torch.int32),
        torch.tensor(top_p),
        torch.tensor(min_p),
        torch.randint(-(2**62), 2**62, (logits.shape[0],), generator=generator),
        torch.arange(logits.shape[0]),
        torch.arange(logits.shape[0]),
        torch.zeros(logits.shape[0], dtype=torch.int64),
    )


def random_logits(rows: int, vocabulary: int, seed: int) -> Tensor:
    """Rows of several widths and offsets, some with ties, banned tokens and enormous negative ones."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator) * torch.rand(rows, 1, generator=generator) * 6 + 3
    logits[1::5] = (logits[1::5] * 4).round() / 4
    logits[2::5, ::3] = float("-inf")
    logits[3::5, 1::2] = -1e9
    return logits


@pytest.mark.parametrize(("tile", "max_listed"), [(2048, 4096), (64, 4096), (256, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_random_rows(tile: int, max_listed: int, dtype: torch.dtype) -> None:
    given = arguments(random_logits(21, 603, tile + max_listed).clamp(min=-6e4).to(dtype), 7)
    torch.testing.assert_close(Draw(tile, max_listed)(*given), sample(*given), rtol=0, atol=0)


def test_rows_of_one_value() -> None:
    given = arguments(torch.full((7, 300), -2.5), 5)
    for draw in (Draw(), Draw(tile=128, max_listed=16)):
        torch.testing.assert_close(draw(*given), sample(*given), rtol=0, atol=0)


def test_scratch_is_left_as_it_was_found_and_grows() -> None:
    draw = Draw(tile=128)
    for rows in (1, 9, 4):
        given = arguments(random_logits(rows, 500, rows), rows)
        torch.testing.assert_close(draw(*given), sample(*given), rtol=0, atol=0)
    assert [scratch.counts.shape[0] for scratch in draw._scratches] == [1, 16]
    for scratch in draw._scratches:
        for part in (scratch.counts, scratch.masses, scratch.num_listed, scratch.num_arrived):
            assert not part.any()


def test_a_row_of_nan_gives_some_token() -> None:
    given = arguments(torch.full((2, 300), float("nan")), 3)
    ids = Draw(tile=128)(*given)
    assert bool(((ids >= 0) & (ids < 300)).all())
