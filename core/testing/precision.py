"""Hold a precision's format object to its contract: what it keeps, how near it is, and what it multiplies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plexor.kernels.table import KernelTable
from plexor.model.format import LinearFormat, LinearShape, Stored

# (out, in): common sizes, one of each, odd ones, and around groups of 32, 64 and 128 input features.
SIZES = ((64, 128), (1, 1), (5, 1), (1, 7), (33, 200), (3, 129), (7, 64), (12, 257))
STACKS = (LinearShape(7, 33, 3), LinearShape(16, 128, 2))
NUM_ROWS = (0, 1, 5)
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The numbers that a format can hold, written down once more, apart from the format's own code.

    step: `(weight [..., out, in] float32, stored) -> [..., out, in]`: how far apart the numbers around each weight
    are. rounded: `(x [T, in]) -> float32 [T, in]`: what the multiply makes of its input before the product; the
    identity but for widening where activations keep their dtype.
    """

    step: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    rounded: Callable[[Tensor], Tensor]


def check_precision(
    number_format: LinearFormat,
    *,
    table: KernelTable,
    grid: Grid,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Check a format on random weights with outliers, zeros and tiny rows, dense and grouped, on a CPU.

    dtype: of the weights and activations. AssertionError says which shape broke which promise:

    - `storage` names exactly what `load(convert(weight))` yields, for stacks with the groups in front;
    - `dense` of it is within half a step of the grid for every weight;
    - parts (q, k, v) and groups that are converted one by one equal the whole;
    - the multiply equals rounded(x) times `dense` transposed, but for the rounding of float32 sums and of the result;
    - the grouped multiply equals each group's dense product, with zeros in the rows of no group.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = [LinearShape(out_features, in_features) for out_features, in_features in SIZES]
    for shape in (*shapes, *STACKS):
        weight = _weight(generator, shape, dtype)
        stored = _kept(number_format, weight)
        _check_storage(number_format, shape, dtype, stored)
        _check_steps(number_format, shape, weight, stored, grid)
        _check_parts(number_format, shape, dtype, weight, stored)
        if shape.groups > 1:
            _check_groups(number_format, shape, weight, stored)
            _check_grouped_product(number_format, shape, table, stored, grid, generator, dtype)
        else:
            _check_product(number_format, shape, table, stored, grid, generator, dtype)


def _kept(number_format: LinearFormat, weight: Tensor) -> dict[str, Tensor]:
    return number_format.load(number_format.convert(weight))


def _weight(generator: torch.Generator, shape: LinearShape, dtype: torch.dtype) -> Tensor:
    """Normal numbers; where there is room, one outlier in its row, a row of zeros and a row of tiny numbers."""
    lead = (shape.groups,) if shape.groups > 1 else ()
    weight = torch.randn(*lead, shape.out_features, shape.in_features, generator=generator)
    weight[..., 0, 0] = 100
    if shape.out_features > 2:
        weight[..., 1, :] = 0
        weight[..., 2, :] *= 1e-30
    return weight.to(dtype)


def _check_storage(
    number_format: LinearFormat, shape: LinearShape, dtype: torch.dtype, stored: Mapping[str, Tensor]
) -> None:
    lead = (shape.groups,) if shape.groups > 1 else ()
    said = {kept.name: ((*lead, *kept.shape), kept.dtype) for kept in number_format.storage(shape, dtype)}
    real = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()}
    assert said == real, f"{shape}: storage says {said}, convert and load yield {real}"


def _check_steps(
    number_format: LinearFormat, shape: LinearShape, weight: Tensor, stored: Mapping[str, Tensor], grid: Grid
) -> None:
    dense = number_format.dense(stored)
    assert dense.dtype == torch.float32, f"{shape}: dense yields {dense.dtype}, not float32"
    assert dense.shape == weight.shape, f"{shape}: dense yields {tuple(dense.shape)}, not {tuple(weight.shape)}"
    error = (dense.double() - weight.double()).abs()
    # The last term is float32's own rounding where a scale is multiplied in.
    allowed = grid.step(weight.float(), stored).double() / 2 + 4 * torch.finfo(torch.float32).eps * dense.abs().double()
    excess = (error - allowed).max().item()
    assert bool((error <= allowed).all()), f"{shape}: a weight is {excess:.3g} further off than half a step of the grid"


def _check_parts(
    number_format: LinearFormat,
    shape: LinearShape,
    dtype: torch.dtype,
    weight: Tensor,
    stored: Mapping[str, Tensor],
) -> None:
    """Parts along the output features, converted one by one, lie side by side in what the whole yields."""
    sizes = _cut(shape.out_features)
    parts = [_kept(number_format, part) for part in torch.split(weight, sizes, dim=-2)]
    for kept in number_format.storage(shape, dtype):
        joined = _joined([part[kept.name] for part in parts], kept, shape)
        assert _same(joined, stored[kept.name]), f"{shape}: {kept.name!r} of parts {sizes} differs from the whole's"


def _cut(size: int) -> list[int]:
    first, second = size // 3, size // 2 - size // 3
    return [part for part in (first, second, size - first - second) if part]


def _joined(parts: Sequence[Tensor], kept: Stored, shape: LinearShape) -> Tensor:
    if kept.out_axis is not None:
        return _cat(parts, kept.out_axis + (shape.groups > 1))
    assert all(_same(part, parts[0]) for part in parts), (
        f"{shape}: {kept.name!r} has no output axis, so that parts overwrite one another, but it differs among them"
    )
    return parts[0]


def _cat(parts: Sequence[Tensor], axis: int) -> Tensor:
    """torch.cat for dtypes of one byte too."""
    if parts[0].dtype.itemsize > 1:
        return torch.cat(list(parts), dim=axis)
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=axis).view(parts[0].dtype)


def _same(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left.double(), right.double())


def _check_groups(
    number_format: LinearFormat, shape: LinearShape, weight: Tensor, stored: Mapping[str, Tensor]
) -> None:
    for group in range(shape.groups):
        for name, tensor in _kept(number_format, weight[group]).items():
            assert _same(tensor, stored[name][group]), f"{shape}: {name!r} of group {group} differs from the stack's"


def _check_product(
    number_format: LinearFormat,
    shape: LinearShape,
    table: KernelTable,
    stored: Mapping[str, Tensor],
    grid: Grid,
    generator: torch.Generator,
    dtype: torch.dtype,
) -> None:
    multiply = number_format.bind(table, shape, dtype, CPU)
    weight = number_format.dense(stored)
    for x in _activations(generator, shape, dtype):
        _check_result(f"{shape}, {x.shape[0]} rows", multiply(x, stored), grid.rounded(x), weight, dtype)


def _check_grouped_product(
    number_format: LinearFormat,
    shape: LinearShape,
    table: KernelTable,
    stored: Mapping[str, Tensor],
    grid: Grid,
    generator: torch.Generator,
    dtype: torch.dtype,
) -> None:
    """Every group but the first in turn has no rows, and some rows belong to none."""
    multiply = number_format.bind_grouped(table, shape, dtype, CPU)
    weight = number_format.dense(stored)
    for x in _activations(generator, shape, dtype):
        num_owned = max(0, x.shape[0] - 2)
        for last in range(shape.groups):
            ends = [num_owned // 2] * last + [num_owned] * (shape.groups - last)
            y = multiply(x, stored, torch.tensor(ends, dtype=torch.int32))
            assert y.shape == (x.shape[0], shape.out_features), f"{shape}: the grouped multiply yields {tuple(y.shape)}"
            assert not y[num_owned:].any(), f"{shape}: rows of no group are not zeros"
            for group, rows in enumerate(_spans(ends)):
                title = f"{shape}, group {group} of rows {ends}"
                _check_result(title, y[rows], grid.rounded(x[rows]), weight[group], dtype)


def _spans(ends: Sequence[int]) -> Iterator[slice]:
    start = 0
    for end in ends:
        yield slice(start, end)
        start = end


def _activations(generator: torch.Generator, shape: LinearShape, dtype: torch.dtype) -> Iterator[Tensor]:
    for num_rows in NUM_ROWS:
        x = torch.randn(num_rows, shape.in_features, generator=generator)
        x[1:2] = 0
        x[2:3, -1] = 300
        yield x.to(dtype)


def _check_result(title: str, y: Tensor, rounded: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    """y against rounded [T, in] times weight [out, in] transposed, within the rounding of sums and of the result."""
    assert y.dtype == dtype, f"{title}: the multiply yields {y.dtype}, not {dtype}"
    exact = rounded.double() @ weight.double().T
    assert y.shape == exact.shape, f"{title}: the multiply yields {tuple(y.shape)}, not {tuple(exact.shape)}"
    magnitude = rounded.double().abs() @ weight.double().abs().T
    float32_eps = torch.finfo(torch.float32).eps
    allowed = torch.finfo(dtype).eps * exact.abs() + (weight.shape[-1] + 4) * float32_eps * magnitude
    # What is too small for a dtype's normal numbers has only their absolute precision.
    allowed += torch.finfo(dtype).tiny
    excess = (y.double() - exact).abs() - allowed
    assert bool((excess <= 0).all()), (
        f"{title}: a product is {excess.max().item():.3g} further off than rounding explains"
    )
