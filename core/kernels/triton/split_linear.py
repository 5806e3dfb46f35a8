"""Products of some 256 rows at most: the weight is read once, by as many programs as the device has room for.

A program multiplies a tile of the weight's rows with a tile of x over a part of the features:

    weight [N, K]      split 0   split 1   split 2            x [T, K]
    tile 0          [ . . . . | . . . . | . . . . ]
    tile 1          [ . . . . | . . . . | . . . . ]    each cell: OUTPUTS x K / SPLITS of the weight, one program

so that the grid fills the device although N / OUTPUTS is small. Sums of the splits are float32 and are added in order
by the program that comes last, whichever that is: the result is the same every time. The weight is the left operand,
of which a tensor core instruction takes 64 rows, and x the right one, whose width may be as small as 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional
from triton.tools.tensor_descriptor import TensorDescriptor

from plexor.kernels.triton.pdl import launch_next, overlaps, wait
from plexor.kernels.triton.silu_mul import silu_mul
from plexor.kernels.tuning import Product, find, tuned

MAX_TILES = 1 << 16
"""Tiles of one product whose splits can be counted."""


@triton.jit
def prefetch(
    weight, weight_stride, first_row, num_rows, first_input, num_inputs, ROWS: tl.constexpr, LINES: tl.constexpr
):
    """Ask for the first lines of 64 features of a tile of the weight, which does not depend on an earlier kernel."""
    row = tl.minimum(first_row + tl.arange(0, ROWS), num_rows - 1).to(tl.int64)
    feature = tl.minimum(first_input + tl.arange(0, LINES) * 64, num_inputs - 1)
    address = (weight + row[:, None] * weight_stride + feature[None, :]).to(tl.int64)
    code: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(code, "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def add_splits(parts, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, SPLITS: tl.constexpr):
    """The sum of the splits' products [OUTPUTS, ROWS], always in the same order."""
    place = tl.arange(0, OUTPUTS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    total = tl.load(parts + place, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts + split * (OUTPUTS * ROWS) + place, cache_modifier=".cg")
    return total


@triton.jit
def with_bias(product, bias, output, num_outputs):
    if bias is not None:
        product += tl.load(bias + output, mask=output < num_outputs, other=0.0).to(tl.float32)[:, None]
    return product


@triton.jit
def split_linear_kernel(
    x_tiles,
    weight_tiles,
    weight,
    bias,
    residual,
    out,
    parts,
    num_arrived,
    num_rows,
    num_inputs,
    num_outputs,
    weight_stride,
    residual_stride,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    LINES: tl.constexpr,
    PDL: tl.constexpr,
):
    """GATED: the weight has num_outputs rows of gates, then as many of what they let through."""
    program = tl.program_id(0)
    split = program % SPLITS
    tile = program // SPLITS
    num_row_tiles = tl.cdiv(num_rows, ROWS)
    first_row = tile % num_row_tiles * ROWS
    first_output = tile // num_row_tiles * OUTPUTS
    num_steps = tl.cdiv(num_inputs, INPUTS)
    first_step = num_steps * split // SPLITS
    last_step = num_steps * (split + 1) // SPLITS
    if PDL:
        prefetch(weight, weight_stride, first_output, num_outputs, first_step * INPUTS, num_inputs, OUTPUTS, LINES)
        if GATED:
            gated = weight + num_outputs.to(tl.int64) * weight_stride
            prefetch(gated, weight_stride, first_output, num_outputs, first_step * INPUTS, num_inputs, OUTPUTS, LINES)
    wait(PDL)
    product = tl.zeros((OUTPUTS, ROWS), tl.float32)
    other = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for step in tl.range(first_step, last_step, num_stages=STAGES):
        left = weight_tiles.load([first_output, step * INPUTS])
        right = x_tiles.load([first_row, step * INPUTS]).T
        product = tl.dot(left, right, product)
        if GATED:
            other = tl.dot(weight_tiles.load([num_outputs + first_output, step * INPUTS]), right, other)
    launch_next(PDL)

    if SPLITS > 1:
        place = tl.arange(0, OUTPUTS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        size: tl.constexpr = OUTPUTS * ROWS
        parts += tile.to(tl.int64) * (size * SPLITS * (2 if GATED else 1))
        tl.store(parts + split * size + place, product)
        if GATED:
            tl.store(parts + (SPLITS + split) * size + place, other)
        tl.debug_barrier()
        if tl.atomic_add(num_arrived + tile, 1) < SPLITS - 1:
            return
        tl.store(num_arrived + tile, 0)
        product = add_splits(parts, ROWS, OUTPUTS, SPLITS)
        if GATED:
            other = add_splits(parts + SPLITS * size, ROWS, OUTPUTS, SPLITS)

    output = first_output + tl.arange(0, OUTPUTS)
    row = first_row + tl.arange(0, ROWS).to(tl.int64)
    inside = (output < num_outputs)[:, None] & (row < num_rows)[None, :]
    product = with_bias(product, bias, output, num_outputs)
    if GATED:
        if bias is not None:
            bias += num_outputs
        product = product * tl.sigmoid(product) * with_bias(other, bias, output, num_outputs)
    if residual is not None:
        product += tl.load(residual + row[None, :] * residual_stride + output[:, None], mask=inside).to(tl.float32)
    target = out + row[None, :] * num_outputs + output[:, None]
    tl.store(target, product.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class Split:
    """How a product is cut: rows of x, of the weight (outputs) and features (inputs) of a tile, and splits of the sum.

    stages: tiles of the weight that are on their way or being multiplied. warps: of a program.
    """

    rows: int
    outputs: int
    inputs: int
    splits: int
    warps: int
    stages: int


def multiply(x: Tensor, weight: Tensor, residual: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """residual [T, N] + x [T, K] weight [N, K]^T + bias [N], by whatever is fastest for these sizes here.

    The sum may take the residual's place: the library adds to what it finds, and would copy it first.
    """
    split = split_for("linear", x, weight)
    if split is not None:
        return split_linear(x, weight, residual, bias, split)
    if residual is None:
        return functional.linear(x, weight, bias)
    return (residual if bias is None else residual + bias).addmm_(x, weight.t())


def multiply_gated(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """silu(gate) * up [T, N / 2], where gate and up are the halves of x weight^T + bias, likewise."""
    split = split_for("gated_linear", x, weight)
    if split is None:
        return silu_mul(functional.linear(x, weight, bias))
    return split_gated_linear(x, weight, bias, split)


def split_for(op: str, x: Tensor, weight: Tensor) -> Split | None:
    """The variant that was measured to beat the library, if one was and the kernel takes the tensors."""
    if x.device.type != "cuda" or not takes(x, weight):
        return None
    return _measured(op, *weight.shape, x.dtype, x.shape[0], x.device)


@cache
def _measured(
    op: str, num_outputs: int, num_inputs: int, dtype: torch.dtype, num_rows: int, device: torch.device
) -> Split | None:
    product = Product(op, num_outputs, num_inputs, str(dtype).removeprefix("torch."))
    choice = find(tuned(torch.cuda.get_device_name(device)), product, num_rows)
    return None if choice is None else Split(**choice)


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the copy engine can fetch tiles of both."""
    return (
        x.shape[0] > 0
        and x.dtype in (torch.bfloat16, torch.float16)
        and weight.dtype == x.dtype
        and x.stride(1) == weight.stride(1) == 1
        and x.stride(0) % 8 == weight.stride(0) % 8 == x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
    )


def split_linear(x: Tensor, weight: Tensor, residual: Tensor | None, bias: Tensor | None, split: Split) -> Tensor:
    """residual [T, N] + x [T, K] weight [N, K]^T + bias [N], cut as told."""
    return _launch(x, weight, residual, bias, split, gated=False)


def split_gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, split: Split) -> Tensor:
    """silu(gate) * up [T, N / 2], cut as told: a tile has as many outputs of each half."""
    return _launch(x, weight, None, bias, split, gated=True)


def compile_ahead(x: Tensor, weight: Tensor, split: Split, gated: bool) -> None:
    """Compile what a product without residual and bias takes, and launch nothing."""
    call = _Call(x, weight, None, None, split, gated)
    split_linear_kernel.warmup(*call.arguments(call.new_output()), grid=call.grid(), **call.options())


def _launch(
    x: Tensor, weight: Tensor, residual: Tensor | None, bias: Tensor | None, split: Split, gated: bool
) -> Tensor:
    call = _Call(x, weight, residual, bias, split, gated)
    out = call.new_output()
    split_linear_kernel[call.grid()](*call.arguments(out), **call.options())
    return out


@dataclass(frozen=True, slots=True)
class _Call:
    """The operands of one launch and how they are cut."""

    x: Tensor
    weight: Tensor
    residual: Tensor | None
    bias: Tensor | None
    split: Split
    gated: bool

    @property
    def num_outputs(self) -> int:
        return self.weight.shape[0] // 2 if self.gated else self.weight.shape[0]

    @property
    def num_tiles(self) -> int:
        split = self.split
        return -(-self.num_outputs // split.outputs) * -(-self.x.shape[0] // split.rows)

    def grid(self) -> tuple[int]:
        return (self.num_tiles * self.split.splits,)

    def new_output(self) -> Tensor:
        return torch.empty(self.x.shape[0], self.num_outputs, dtype=self.x.dtype, device=self.x.device)

    def arguments(self, out: Tensor) -> tuple[Any, ...]:
        x, weight, split = self.x, self.weight, self.split
        tile_size = split.outputs * split.rows * (2 if self.gated else 1)
        num_parts = self.num_tiles * split.splits if split.splits > 1 else 0
        return (
            TensorDescriptor.from_tensor(x, [split.rows, split.inputs]),
            TensorDescriptor.from_tensor(weight, [split.outputs, split.inputs]),
            weight,
            self.bias,
            self.residual,
            out,
            torch.empty(num_parts * tile_size, device=x.device),
            _arrivals(x.device),
            *x.shape,
            self.num_outputs,
            weight.stride(0),
            0 if self.residual is None else self.residual.stride(0),
        )

    def options(self) -> dict[str, Any]:
        split = self.split
        early = overlaps(self.x.device)
        return {
            "GATED": self.gated,
            "ROWS": split.rows,
            "OUTPUTS": split.outputs,
            "INPUTS": split.inputs,
            "SPLITS": split.splits,
            "STAGES": split.stages,
            "LINES": triton.next_power_of_2(split.stages * split.inputs // 64),
            "PDL": early,
            "num_warps": split.warps,
            "num_stages": split.stages,
            "launch_pdl": early,
        }


@cache
def _arrivals(device: torch.device) -> Tensor:
    """A zero for each tile, which every launch leaves as it found it; launches follow each other on one stream."""
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)
