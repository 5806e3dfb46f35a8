"""Arguments on which every provider of the ops of 2:4 weights is held to its reference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from plexor.api import LinearFormat, Sample
from plexor_quant.rounding import E4M3_MAX, to_e4m3
from plexor_quant.sparse24 import Sparse24Format, Sparse24Fp8Format
from plexor_quant.sparse24_layout import prune

# (tokens, in, out): none, one, an odd number of groups, sizes that no tensor core takes, around the 8, 16 and 32 rows
# that kernels tell apart, tiles of 32 outputs that are not full, layouts of the library's.
SIZES = (
    (0, 64, 32),
    (1, 256, 48),
    (3, 12, 5),
    (1, 4, 1),
    (2, 132, 33),
    (1, 1024, 64),
    (5, 64, 517),
    (8, 192, 96),
    (9, 2112, 80),
    (16, 128, 64),
    (17, 128, 96),
    (29, 448, 71),
    (33, 128, 64),
    (40, 1280, 192),
)
# (rows of each group, rows of no group, in, out)
STACKS = (
    ((0, 0, 0), 0, 64, 32),
    ((1,), 0, 16, 8),
    ((2, 0, 5, 0), 3, 132, 7),
    ((0, 3, 1, 20), 0, 256, 64),
    ((0, 0), 4, 64, 32),
    ((1, 0, 2), 1, 40, 259),
)
UNROUNDED_ROWS = 32
"""Up to so many rows a provider may leave activations as they are: only such as rounding keeps are drawn."""


def sparse24_linear(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    return _dense(Sparse24Format(), ("weight", "index"), device, dtype)


def sparse24_fp8_linear(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    return _dense(Sparse24Fp8Format(), ("weight", "scale", "index"), device, dtype)


def sparse24_grouped_linear(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    return _stacks(Sparse24Format(), ("weight", "index"), device, dtype)


def sparse24_fp8_grouped_linear(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    return _stacks(Sparse24Fp8Format(), ("weight", "scale", "index"), device, dtype)


def _dense(
    number_format: LinearFormat, names: tuple[str, ...], device: torch.device, dtype: torch.dtype
) -> Iterable[Sample]:
    generator = torch.Generator().manual_seed(23)
    for num_tokens, in_features, out_features in SIZES:
        stored = number_format.convert(_weight(generator, out_features, in_features).to(device, dtype))
        shape = (("out_features", out_features), ("in_features", in_features))
        for name, x in _activations(generator, num_tokens, in_features):
            title = f"{num_tokens} x {in_features} by {out_features}, {name}"
            yield Sample(title, (x.to(device, dtype), *(stored[kept] for kept in names)), shape=shape)
        if num_tokens > 1:
            wide = _on_grid(torch.randn(num_tokens, in_features + 24, generator=generator)).to(device, dtype)
            wide[:, 8] = wide.abs().amax(dim=1)
            title = f"{num_tokens} x {in_features} by {out_features}, rows of a wider tensor"
            yield Sample(title, (wide[:, 8 : 8 + in_features], *(stored[kept] for kept in names)), shape=shape)


def _stacks(
    number_format: LinearFormat, names: tuple[str, ...], device: torch.device, dtype: torch.dtype
) -> Iterable[Sample]:
    generator = torch.Generator().manual_seed(24)
    for rows, num_strays, in_features, out_features in STACKS:
        stored = number_format.convert(_weight(generator, len(rows), out_features, in_features).to(device, dtype))
        shape = (("out_features", out_features), ("in_features", in_features), ("groups", len(rows)))
        for name, x in _activations(generator, sum(rows) + num_strays, in_features):
            title = f"groups of {rows} and {num_strays} of none, {in_features} by {out_features}, {name}"
            args = (x.to(device, dtype), *(stored[kept] for kept in names), _ends(rows).to(device))
            yield Sample(title, args, shape=shape)


def _ends(rows: Sequence[int]) -> Tensor:
    return torch.tensor(list(accumulate(rows)), dtype=torch.int32)


def _weight(generator: torch.Generator, *shape: int) -> Tensor:
    """Pruned rows that give products near one; one large weight, a row of zeros, groups with fewer than two weights."""
    weight = torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
    weight[..., 0, 0] *= 20
    if shape[-2] > 1:
        weight[..., -1, :] = 0
    weight = prune(weight)
    weight[..., ::3, :4] *= torch.tensor([1.0, 0, 0, 0])
    weight[..., 1::3, :4] *= torch.tensor([0, 0, 0, 1.0])
    return weight


def _activations(generator: torch.Generator, num_rows: int, in_features: int) -> Iterable[tuple[str, Tensor]]:
    x = torch.randn(num_rows, in_features, generator=generator)
    yield "plain", x if num_rows > UNROUNDED_ROWS else _on_grid(x)
    if num_rows > 1:
        odd = x.clone()
        odd[0] = 0
        odd[-1, in_features // 2] = 60
        yield "a row of zeros and an outlier", odd if num_rows > UNROUNDED_ROWS else _on_grid(odd)


def _on_grid(x: Tensor) -> Tensor:
    """Near x: e4m3 codes of which each row that is not zeros has the largest, over 128, so that rounding keeps them."""
    codes = to_e4m3(x / x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-9) * E4M3_MAX).float()
    return codes / 128
