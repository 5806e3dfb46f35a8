"""How the CPU's attention puts decodes together."""

from __future__ import annotations

from plexor.kernels.cpu.paged_attention import GATHER_LIMIT, chunks


def test_decodes_share_a_chunk_while_it_is_small() -> None:
    assert chunks([3, 0, 1], [10, 30, 0, 20], 8, None) == [[1, 3, 0]]
    assert chunks([], [], 8, None) == []


def test_chunks_stay_below_the_limit_and_hold_every_decode_once() -> None:
    lengths = [1 + 37 * sequence % 500 for sequence in range(40)]
    found = chunks(list(range(40)), lengths, 1024, None)
    assert sorted(sequence for chunk in found for sequence in chunk) == list(range(40))
    for chunk in found:
        padded = len(chunk) * max(lengths[sequence] for sequence in chunk) * 1024
        assert len(chunk) == 1 or padded <= GATHER_LIMIT
    assert len(found) < 40


def test_a_window_bounds_what_is_gathered() -> None:
    lengths = [GATHER_LIMIT] * 4
    assert len(chunks([0, 1, 2, 3], lengths, 1, None)) == 4
    assert len(chunks([0, 1, 2, 3], lengths, 1, 16)) == 1
