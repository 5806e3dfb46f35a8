"""Rows rounded in one kernel, as they are or normed, become the numbers of plain rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from plexor_quant.rounding import round_e4m3, round_int8

pytest.importorskip("triton")

from plexor_quant.kernels.triton.round_rows import round_normed, round_rows

EPS = 1e-5
ROUND = {torch.float8_e4m3fn: round_e4m3, torch.int8: round_int8}
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# Triton's interpreter cuts bfloat16 off instead of rounding it.
DEVICES = [
    pytest.param(
        "cpu", torch.float16, marks=pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the device")
    ),
    pytest.param("cuda", torch.bfloat16, marks=(pytest.mark.gpu, GPU)),
    pytest.param("cuda", torch.float16, marks=(pytest.mark.gpu, GPU)),
]


def draw(size: int, dtype: torch.dtype, device: str) -> Tensor:
    """Rows of several magnitudes, one of zeros; every other column of a wider tensor's rows is not theirs."""
    torch.manual_seed(size)
    x = torch.randn(6, size + 8) * torch.tensor([1e-3, 1.0, 30.0, 0.0, 5.0, 0.2])[:, None]
    return x.to(device, dtype)[:, :size]


@pytest.mark.parametrize(("device", "activations"), DEVICES)
@pytest.mark.parametrize("dtype", ROUND, ids=str)
@pytest.mark.parametrize("size", [16, 100, 1000, 4097])
def test_rows_become_codes_and_scales(size: int, dtype: torch.dtype, device: str, activations: torch.dtype) -> None:
    x = draw(size, activations, device)
    codes, scale = round_rows(x, dtype)
    expected, expected_scale = ROUND[dtype](x.cpu())  # on a GPU torch multiplies by 1 / 448
    assert codes.dtype == dtype
    assert torch.equal(scale.cpu(), expected_scale)
    if device == "cpu" and dtype == torch.float8_e4m3fn:
        assert_close(codes, scale, x, dtype)
    else:
        assert torch.equal(codes.cpu().float(), expected.float())


@pytest.mark.parametrize(("device", "activations"), DEVICES)
@pytest.mark.parametrize("dtype", ROUND, ids=str)
@pytest.mark.parametrize("size", [16, 100, 1000])
def test_rows_are_normed_and_rounded_to_their_dtype_first(
    size: int, dtype: torch.dtype, device: str, activations: torch.dtype
) -> None:
    x = draw(size, activations, device)
    gain = torch.randn(size).to(device, activations)
    wide = x.double()
    normed = (wide * (wide.square().mean(1, keepdim=True) + EPS).rsqrt()).to(activations) * gain
    codes, scale = round_normed(x, gain, EPS, dtype)
    assert_close(codes, scale, normed, dtype)


def assert_close(codes: Tensor, scale: Tensor, dense: Tensor, dtype: torch.dtype) -> None:
    """Within one rounding to the activations' dtype, which another order of operations may turn, and one to codes.

    Triton's interpreter rounds ties in e4m3 away from zero, and halves what is rounded up to a power of two.
    """
    step = 1 / 8 if dtype == torch.float8_e4m3fn else 0.0
    numbers = codes.double() * scale.double()
    if dense.device.type == "cpu" and dtype == torch.float8_e4m3fn:
        near = (2 * numbers - dense.double()).abs() < (numbers - dense.double()).abs()
        numbers = torch.where(near, 2 * numbers, numbers)
    assert ((numbers - dense.double()).abs() <= 0.51 * (step * dense.double().abs() + scale) + 1e-12).all()
    expected = ROUND[dtype](dense)[1]
    assert ((scale / expected - 1).abs() < 2 * torch.finfo(dense.dtype).eps).all()


def test_features_need_not_be_adjacent() -> None:
    x = torch.randn(48, 5, dtype=torch.float16, device="cuda" if torch.cuda.is_available() else "cpu").t()
    assert torch.equal(round_rows(x, torch.int8)[0], round_int8(x)[0])


def test_no_rows_give_no_codes() -> None:
    codes, scale = round_rows(torch.zeros(0, 64), torch.int8)
    assert codes.shape == (0, 64)
    assert scale.shape == (0, 1)
