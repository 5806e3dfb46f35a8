"""How products of many rows are cut into tiles: everything is covered once, fits, and is what the instructions take."""

from __future__ import annotations

import re
from itertools import product as every

import pytest
import torch

from plexor.kernels.cuda.tiled_layout import TiledCut, instruction, piece_rows, tiled_cut_for, tiled_layout, tokens_for

MULTIPROCESSORS = 132
LARGEST_BLOCK = 227 * 1024
SIZES = [
    # outputs, boxes of 128 bytes of k, pair
    (6144, 64, 64),
    (4096, 224, None),
    (28672, 32, 14336),
    (128256, 64, None),
    (1040, 9, None),
    (672 * 2, 3, 672),
    (16, 1, None),
]


@pytest.mark.parametrize("rows", [17, 32, 33, 64, 65, 128, 200, 256, 257, 8192])
@pytest.mark.parametrize(("outputs", "boxes", "pair"), SIZES)
def test_the_cut_that_is_chosen_fits(rows: int, outputs: int, boxes: int, pair: int | None) -> None:
    cut = tiled_cut_for(rows, outputs, boxes, pair, MULTIPROCESSORS)
    assert cut is not None
    assert cut.fits(rows, outputs, boxes, pair)
    tokens, stages, num_bytes = tiled_layout(rows, cut)
    assert min(rows, 256) <= tokens == tokens_for(rows)
    assert stages >= 3
    assert num_bytes + 1024 <= LARGEST_BLOCK
    assert num_bytes >= stages * (tokens + cut.outputs) * 128 + tokens * cut.outputs * 4 * (cut.split - 1) // cut.split


@pytest.mark.parametrize(("outputs", "pair"), [(8 * 3, None), (100, 50), (2 * 20, 20)])
def test_odd_sizes_fit_no_cut(outputs: int, pair: int | None) -> None:
    assert tiled_cut_for(64, outputs, 8, pair, MULTIPROCESSORS) is None


def test_few_tiles_are_split_and_long_prompts_are_not() -> None:
    assert tiled_cut_for(256, 4096, 224, None, MULTIPROCESSORS).split > 1  # type: ignore[union-attr]
    assert tiled_cut_for(8192, 4096, 224, None, MULTIPROCESSORS).split == 1  # type: ignore[union-attr]
    assert not TiledCut(128, split=2).fits(300, 4096, 224, None)


@pytest.mark.parametrize(("outputs", "pair"), [*every((32, 64, 96, 112, 128, 224, 256), (16, 64, 96, 672, 14336))])
def test_pieces_hold_whole_groups_of_a_tile_and_of_a_block_of_pairs(outputs: int, pair: int) -> None:
    rows = piece_rows(outputs, pair)
    assert outputs % rows == 0
    assert pair % (rows // 2) == 0
    assert rows % 16 == 0


@pytest.mark.parametrize("columns", [16, 48, 112, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8])
def test_an_instruction_names_every_sum_once(columns: int, dtype: torch.dtype) -> None:
    text = instruction(columns, dtype)
    operands = [int(number) for number in re.findall(r"\(d\)\[(\d+)\]", text)]
    assert operands == list(range(columns // 2))
    places = [int(number) for number in re.findall(r"%(\d+)", text)]
    assert sorted(places) == list(range(columns // 2 + 3))
    assert f"m64n{columns}k{32 // dtype.itemsize}." in text
    assert ('"+r"' in text) == (dtype == torch.int8)
