"""Products cut into tiles and splits equal the reference, whatever the sizes leave over."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

knobs = pytest.importorskip("triton").knobs

from plexor.kernels.triton import split_linear as module  # noqa: E402
from plexor.kernels.triton.split_linear import Split, multiply, multiply_gated, split_gated_linear, split_linear, takes  # noqa: E402

interpreted = pytest.mark.skipif(not knobs.runtime.interpret, reason="a GPU is measured and checked by bench/linear.py")
SPLITS = (
    Split(rows=16, outputs=64, inputs=64, splits=1, warps=4, stages=3),
    Split(rows=32, outputs=64, inputs=64, splits=3, warps=4, stages=3),
    Split(rows=64, outputs=128, inputs=32, splits=5, warps=8, stages=4),
)
SIZES = ((17, 64, 64), (40, 168, 136), (70, 72, 200))


@pytest.fixture
def numbers() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def operands(sizes: tuple[int, int, int], generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, residual, bias, of which x and the residual are parts of wider rows."""
    num_rows, num_inputs, num_outputs = sizes
    x = torch.randn(num_rows, num_inputs + 8, generator=generator)[:, :num_inputs]
    weight = torch.randn(num_outputs, num_inputs, generator=generator) * num_inputs**-0.5
    residual = torch.randn(num_rows, num_outputs + 3, generator=generator)[:, :num_outputs]
    bias = torch.randn(num_outputs, generator=generator)
    half = torch.float16
    wide = torch.empty(num_rows, num_inputs + 8, dtype=half)
    wide[:, :num_inputs] = x
    return wide[:, :num_inputs], weight.to(half), residual.to(half), bias.to(half)


@interpreted
@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_products(sizes: tuple[int, int, int], split: Split, numbers: torch.Generator) -> None:
    x, weight, residual, bias = operands(sizes, numbers)
    exact = x.double() @ weight.double().t()
    for addend, shift in ((None, None), (residual, None), (None, bias), (residual, bias)):
        expected = exact + (0 if addend is None else addend.double()) + (0 if shift is None else shift.double())
        actual = split_linear(x, weight, addend, shift, split)
        torch.testing.assert_close(actual.double(), expected, rtol=2e-3, atol=2e-3)


@interpreted
@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gated_products(sizes: tuple[int, int, int], split: Split, numbers: torch.Generator) -> None:
    x, weight, _, bias = operands(sizes, numbers)
    for shift in (None, bias):
        gate, up = functional.linear(x.double(), weight.double(), shift if shift is None else shift.double()).chunk(
            2, 1
        )
        actual = split_gated_linear(x, weight, shift, split)
        torch.testing.assert_close(actual.double(), functional.silu(gate) * up, rtol=2e-3, atol=2e-3)


@interpreted
def test_counters_are_left_at_zero(numbers: torch.Generator) -> None:
    x, weight, _, _ = operands(SIZES[1], numbers)
    first = split_linear(x, weight, None, None, SPLITS[2])
    assert not module._arrivals(x.device).any()
    torch.testing.assert_close(split_linear(x, weight, None, None, SPLITS[2]), first, rtol=0, atol=0)


def test_what_was_not_measured_goes_to_the_library(numbers: torch.Generator) -> None:
    x, weight, residual, bias = (part.float() for part in operands(SIZES[1], numbers))
    product = functional.linear(x, weight)
    torch.testing.assert_close(multiply(x, weight), product)
    torch.testing.assert_close(multiply(x, weight, residual.clone()), product + residual)
    torch.testing.assert_close(multiply(x, weight, None, bias), product + bias)
    torch.testing.assert_close(multiply(x, weight, residual.clone(), bias), product + residual + bias)


def test_gates_that_were_not_measured_go_to_the_library(numbers: torch.Generator) -> None:
    x, weight, _, bias = (part.float() for part in operands(SIZES[2], numbers))
    gate, up = functional.linear(x, weight, bias).chunk(2, dim=1)
    torch.testing.assert_close(multiply_gated(x, weight, bias), functional.silu(gate) * up)


def test_which_tensors_the_copy_engine_takes() -> None:
    x, weight = torch.zeros(20, 64, dtype=torch.bfloat16), torch.zeros(48, 64, dtype=torch.bfloat16)
    assert takes(x, weight)
    assert not takes(x[:0], weight)
    assert not takes(x.float(), weight.float())
    assert not takes(x[:, :60], torch.zeros(48, 60, dtype=torch.bfloat16)), "rows of the weight are not aligned"
    assert not takes(x[:, 4:60], weight[:, 4:60]), "the first number is not aligned"
    assert not takes(x.t().contiguous().t(), weight)
