"""Products of many rows over e4m3 and int8 weights: what the kernels take everywhere, and what they give on a GPU."""

from __future__ import annotations

import pytest
import torch

from plexor.api import TiledCut

GPU = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs compute capability 9.x"
)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("epilogue", ["store", "add", "gated", "rotary"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "cut"),
    [(17, TiledCut(64, 2)), (64, TiledCut(128, 2, 2)), (100, TiledCut(112)), (300, TiledCut(128, 1, 2))],
    ids=str,
)
def test_products_are_those_of_float64(rows: int, cut: TiledCut, dtype: torch.dtype, epilogue: str) -> None:
    from bench.coded_wide import worst

    torch.manual_seed(rows)
    error = worst(dtype, rows, cut, epilogue)
    assert error is None or error < 6e-3
