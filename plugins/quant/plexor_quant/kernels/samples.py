"""Arguments on which every provider of this plugin's ops is held to its reference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, product

import torch
from torch import Tensor
from torch.nn import functional

from plexor.api import LinearFormat, Sample
from plexor_quant.fp8 import Fp8Format, Fp8StaticFormat
from plexor_quant.fp8_block import Fp8BlockFormat
from plexor_quant.int4_wo import Int4WeightFormat
from plexor_quant.int8_sq import Int8Format, Int8StaticFormat
from plexor_quant.int8_wo import Int8WeightFormat
from plexor_quant.rounding import E4M3_MAX, INT8_MAX, to_e4m3
from plexor_quant.w4a_fp8 import W4AFp8Format, W4AFp8StaticFormat

FEW_ROWS = 16
"""So many activations a provider may leave as they are where its op rounds them."""

GROUP_SIZE = 128
# Also groups within a row's short last 128, and one of more features than any row has.
GROUP_SIZES = (128, 32, 2048)
# Puts most of the activations on the grid, and the outliers beyond it.
INPUT_SCALE = 0.015625
BLOCKS = ((128, 128), (1, 128), (32, 64))
# (tokens, in, out): none, one, sizes that no tensor core takes, short last groups, around the 16 rows of an int8 tile.
SIZES = (
    (0, 64, 32),
    (1, 256, 48),
    (3, 7, 5),
    (1, 1, 1),
    (2, 129, 33),
    (16, 64, 64),
    (9, 512, 128),
    (17, 144, 80),
    (40, 1280, 96),
    (5, 66, 517),
)
# (rows of each group, rows of no group, in, out)
STACKS = (
    ((0, 0, 0), 0, 64, 32),
    ((1,), 0, 16, 8),
    ((2, 0, 5, 0), 3, 129, 7),
    ((0, 3, 1, 20), 0, 256, 64),
    ((0, 0), 4, 64, 32),
    ((33, 1, 17), 5, 144, 48),
    ((1, 0, 2), 1, 40, 259),
)


def fp8_linear(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    return _dense(Fp8Format(), {}, device, dtype, E4M3_MAX)


def int8_linear(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    return _dense(Int8Format(), {}, device, dtype, INT8_MAX)


def w4a_fp8_linear(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    for zero_points in (False, True):
        number_format = W4AFp8Format(GROUP_SIZE, zero_points)
        yield from _dense(number_format, {"group_size": GROUP_SIZE}, device, dtype, E4M3_MAX)


def int8_wo_linear(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    return _dense(Int8WeightFormat(), {}, device, dtype)


def int4_wo_linear(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    for group_size, zero_points in product(GROUP_SIZES, (False, True)):
        yield from _dense(Int4WeightFormat(group_size, zero_points), {"group_size": group_size}, device, dtype)


def fp8_grouped_linear(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    return _stacks(Fp8Format(), {}, device, dtype)


def int8_grouped_linear(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    return _stacks(Int8Format(), {}, device, dtype)


def w4a_fp8_grouped_linear(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    for zero_points in (False, True):
        yield from _stacks(W4AFp8Format(GROUP_SIZE, zero_points), {"group_size": GROUP_SIZE}, device, dtype)


def int8_wo_grouped_linear(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    return _stacks(Int8WeightFormat(), {}, device, dtype)


def int4_wo_grouped_linear(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    for group_size, zero_points in product(GROUP_SIZES, (False, True)):
        yield from _stacks(Int4WeightFormat(group_size, zero_points), {"group_size": group_size}, device, dtype)


def fp8_static_linear(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    return _dense(Fp8StaticFormat(INPUT_SCALE), {"input_scale": INPUT_SCALE}, device, dtype)


def int8_static_linear(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    return _dense(Int8StaticFormat(INPUT_SCALE), {"input_scale": INPUT_SCALE}, device, dtype)


def w4a_fp8_static_linear(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    for zero_points in (False, True):
        number_format = W4AFp8StaticFormat(GROUP_SIZE, zero_points, INPUT_SCALE)
        yield from _dense(number_format, {"group_size": GROUP_SIZE, "input_scale": INPUT_SCALE}, device, dtype)


def fp8_static_grouped_linear(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    return _stacks(Fp8StaticFormat(INPUT_SCALE), {"input_scale": INPUT_SCALE}, device, dtype)


def int8_static_grouped_linear(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    return _stacks(Int8StaticFormat(INPUT_SCALE), {"input_scale": INPUT_SCALE}, device, dtype)


def w4a_fp8_static_grouped_linear(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    for zero_points in (False, True):
        number_format = W4AFp8StaticFormat(GROUP_SIZE, zero_points, INPUT_SCALE)
        yield from _stacks(number_format, {"group_size": GROUP_SIZE, "input_scale": INPUT_SCALE}, device, dtype)


def fp8_block_linear(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    for rows, group_size in BLOCKS:
        sizes = {"block_rows": rows, "group_size": group_size}
        for sample in _dense(Fp8BlockFormat(rows, group_size), sizes, device, dtype):
            yield replace(sample, args=(on_grid(sample.args[0], group_size), *sample.args[1:]))


def fp8_block_grouped_linear(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    for rows, group_size in BLOCKS:
        sizes = {"block_rows": rows, "group_size": group_size}
        for sample in _stacks(Fp8BlockFormat(rows, group_size), sizes, device, dtype):
            yield replace(sample, args=(on_grid(sample.args[0], group_size), *sample.args[1:]))


def _dense(
    number_format: LinearFormat,
    sizes: Mapping[str, int | float],
    device: torch.device,
    dtype: torch.dtype,
    grid: float | None = None,
) -> Iterable[Sample]:
    """grid: the largest of the numbers that a provider may leave few rows unrounded to, and that those then are of."""
    generator = torch.Generator().manual_seed(21)
    for num_tokens, in_features, out_features in SIZES:
        stored = number_format.convert(_weight(generator, out_features, in_features).to(device))
        shape = (("out_features", out_features), ("in_features", in_features), *_facts(sizes, stored))
        for name, x in _activations(generator, num_tokens, in_features, device, dtype):
            name = f"{num_tokens} x {in_features} by {out_features}, {name}"
            if grid is not None and num_tokens <= FEW_ROWS:
                x = on_grid(x, in_features, grid)
            yield Sample(name, (x, stored["weight"], stored["scale"], *sizes.values(), *_zero(stored)), shape=shape)


def _stacks(
    number_format: LinearFormat, sizes: Mapping[str, int | float], device: torch.device, dtype: torch.dtype
) -> Iterable[Sample]:
    generator = torch.Generator().manual_seed(22)
    for rows, num_strays, in_features, out_features in STACKS:
        stored = number_format.convert(_weight(generator, len(rows), out_features, in_features).to(device))
        features = (("out_features", out_features), ("in_features", in_features))
        shape = (*features, ("groups", len(rows)), *_facts(sizes, stored))
        for name, x in _activations(generator, sum(rows) + num_strays, in_features, device, dtype):
            name = f"groups of {rows} and {num_strays} of none, {in_features} by {out_features}, {name}"
            args = (x, stored["weight"], stored["scale"], *sizes.values(), _ends(rows).to(device), *_zero(stored))
            yield Sample(name, args, shape=shape)


def _facts(sizes: Mapping[str, int | float], stored: Mapping[str, Tensor]) -> tuple[tuple[str, int], ...]:
    """What the kernels of a product are chosen on besides its features."""
    whole = tuple((name, size) for name, size in sizes.items() if isinstance(size, int))
    return (*whole, *(("zero_points", 1) for _ in _zero(stored)))


def on_grid(x: Tensor, group_size: int, largest: float = E4M3_MAX) -> Tensor:
    """About x [T, in], each group of e4m3's numbers or of integers times a power of two, up to the largest.

    Rounding leaves it as it is, so that providers which do not round agree with those that do.
    """
    size = x.shape[1]
    grouped = functional.pad(x.float(), (0, -size % group_size)).unflatten(1, (-1, group_size))
    scale = torch.exp2((grouped.abs().amax(dim=-1, keepdim=True) / largest).log2().floor())
    codes = (grouped / scale).clamp(-largest, largest)
    codes = to_e4m3(codes).float() if largest == E4M3_MAX else codes.round()
    codes.scatter_(-1, grouped.abs().argmax(dim=-1, keepdim=True), largest)
    return torch.where(scale > 0, codes * scale, 0).flatten(1)[:, :size].to(x.dtype)


def _zero(stored: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    return (stored["zero"],) if "zero" in stored else ()


def _ends(rows: Sequence[int]) -> Tensor:
    return torch.tensor(list(accumulate(rows)), dtype=torch.int32)


def _weight(generator: torch.Generator, *shape: int) -> Tensor:
    """Rows that give products near one, the last of them zeros and the first with one large weight."""
    weight = torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
    weight[..., 0, 0] *= 20
    if shape[-2] > 1:
        weight[..., -1, :] = 0
    return weight


def _activations(
    generator: torch.Generator, num_rows: int, in_features: int, device: torch.device, dtype: torch.dtype
) -> Iterable[tuple[str, Tensor]]:
    x = torch.randn(num_rows, in_features, generator=generator)
    yield "plain", x.to(device, dtype)
    if num_rows > 1:
        odd = x.clone()
        odd[0] = 0
        odd[-1, in_features // 2] = 60
        yield "a row of zeros and an outlier", odd.to(device, dtype)
        wide = torch.randn(num_rows, in_features + 24, generator=generator).to(device, dtype)
        yield "rows of a wider tensor", wide[:, 8 : 8 + in_features]
