"""The products that stream the weight through registers: how rows are cut into tiles, and which operands they take."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from plexor.kernels.reference.linear import linear as reference
from plexor.kernels.triton import linear
from plexor.kernels.triton.linear import linear as product
from plexor.kernels.triton.stream_linear import MAX_ROWS, WARP_INPUTS, Tile, takes, tile_for


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


@pytest.mark.parametrize("num_inputs", [8, 72, 256, 512, 520, 1024, 1032, 1280, 2560, 4096, 11008, 14336, 53248])
@pytest.mark.parametrize("num_rows", [1, MAX_ROWS])
def test_threads_of_a_tile_hold_different_numbers(num_inputs: int, num_rows: int) -> None:
    tile = tile_for(num_inputs, num_rows)
    assert tile.inputs >= WARP_INPUTS * tile.warps
    assert tile.inputs < 2 * max(num_inputs, WARP_INPUTS)
    assert tile.outputs % 2 == 0


@pytest.mark.parametrize("num_inputs", [64, 256, 264, 512, 768, 776, 1280])
@pytest.mark.parametrize("tile", [Tile(2, 256, 1), Tile(8, 256, 1), Tile(2, 512, 2)])
def test_rows_of_any_number_of_tiles(monkeypatch: pytest.MonkeyPatch, num_inputs: int, tile: Tile) -> None:
    monkeypatch.setattr(linear, "tile_for", lambda num_inputs, num_rows: tile)
    x, weight = normal(1, 3, num_inputs), normal(2, 11, num_inputs) * num_inputs**-0.5
    torch.testing.assert_close(product(x, weight), reference(x, weight), rtol=4e-3, atol=4e-3)


def test_operands_that_are_not_taken() -> None:
    x, weight = normal(1, 2, 64), normal(2, 6, 64)
    assert takes(x, weight)
    assert takes(normal(1, 4, 100)[:, 16:80], weight) is False, "rows start at no multiple of 16 bytes"
    assert takes(normal(1, 4, 96)[:, 4:68], weight) is False, "the first row starts at no multiple of 16 bytes"
    assert takes(normal(1, 4, 96)[:, 8:72], weight)
    assert not takes(x[:0], weight)
    assert not takes(normal(1, MAX_ROWS + 1, 64), weight)
    assert not takes(x.float(), weight.float())
    assert not takes(normal(1, 2, 60), normal(2, 6, 60))
