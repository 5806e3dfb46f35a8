"""The counter-based generator against the vectors published with it."""

from __future__ import annotations

import pytest
import torch

from plexor.kernels.random import philox, uniform

# The "philox4x32 10" lines of the known-answer file that the Random123 library is tested with.
KNOWN_ANSWERS = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answer(counter: str, key: str, answer: str) -> None:
    drawn = philox(torch.tensor(words(counter)).unsqueeze(1), torch.tensor(words(key)).unsqueeze(1))
    assert drawn.squeeze(1).tolist() == words(answer)


def test_rows_are_drawn_independently() -> None:
    counters = torch.tensor([words(counter) for counter, _, _ in KNOWN_ANSWERS]).T
    keys = torch.tensor([words(key) for _, key, _ in KNOWN_ANSWERS]).T
    assert philox(counters, keys).T.tolist() == [words(answer) for _, _, answer in KNOWN_ANSWERS]


def test_uniform_is_the_top_of_the_first_word() -> None:
    seeds, steps = torch.tensor([0, -1, -(2**63)]), torch.tensor([0, -1, 2**40])
    drawn = uniform(seeds, steps)
    assert drawn.dtype == torch.float32
    assert drawn[0].item() == (0x6627E8D5 >> 8) / 2**24
    assert bool((drawn >= 0).all() and (drawn < 1).all())


def test_uniform_fills_the_interval_evenly() -> None:
    drawn = uniform(torch.full((20000,), 7), torch.arange(20000))
    counts = torch.histc(drawn, bins=20, min=0, max=1)
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert chi_square < 43.8  # 19 degrees of freedom, one in a thousand


def test_all_bits_of_seed_and_step_matter() -> None:
    bits = torch.tensor([0] + [1 << bit if bit < 63 else -(2**63) for bit in range(64)])
    zeros = torch.zeros_like(bits)
    assert torch.unique(uniform(bits, zeros)).numel() == 65
    assert torch.unique(uniform(zeros, bits)).numel() == 65
