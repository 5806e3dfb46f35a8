"""Each precision keeps its contract, against grids that are written down apart from the plugin's own rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from plexor.api import KernelTable, LinearFormat, LinearShape, resolve
from plexor.testing.precision import Grid, check_precision
from plexor_quant import plugin
from plexor_quant.fp8 import Fp8Format, Fp8StaticFormat
from plexor_quant.fp8_block import Fp8BlockFormat
from plexor_quant.inputs import InputsFormat
from plexor_quant.int4_wo import Int4WeightFormat
from plexor_quant.int8_sq import Int8Format, Int8StaticFormat
from plexor_quant.int8_wo import Int8WeightFormat
from plexor_quant.packing import pack, unpack
from plexor_quant.per_group import PerGroupFormat
from plexor_quant.rounding import round_e4m3, round_int8, to_e4m3
from plexor_quant.w4a_fp8 import W4AFp8Format, W4AFp8StaticFormat

TINY = torch.finfo(torch.float32).tiny


def e4m3_spacing(x: Tensor) -> Tensor:
    """How far apart e4m3's numbers are around x: an eighth of its power of two, not below 2^-9."""
    exponent = torch.frexp(x.double()).exponent - 1
    return torch.exp2(exponent.clamp(-6, 8).double() - 3)


def e4m3_rounded(x: Tensor) -> Tensor:
    """x [T, in] after each row is scaled to 448 in float32 and rounded to e4m3's numbers, in float32."""
    x = x.float()
    scale = (x.abs().amax(dim=-1, keepdim=True) / 448).clamp_min(TINY)
    ratio = (x / scale).double()
    spacing = e4m3_spacing(ratio)
    return ((ratio / spacing).round() * spacing).clamp(-448, 448).float() * scale


def int8_rounded(x: Tensor) -> Tensor:
    x = x.float()
    scale = (x.abs().amax(dim=-1, keepdim=True) / 127).clamp_min(TINY)
    return (x / scale).round().clamp(-127, 127) * scale


def fp8_step(weight: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
    scale = stored["scale"].double().unsqueeze(-1)
    return e4m3_spacing(weight.double() / scale) * scale


def int8_step(weight: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
    return stored["scale"].unsqueeze(-1).expand_as(weight)


def int4_step(weight: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
    features = torch.arange(weight.shape[-1]) // 128
    return stored["scale"].float()[..., features]


def int4_wo_grid(group_size: int) -> Grid:
    def step(weight: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        return stored["scale"].float()[..., torch.arange(weight.shape[-1]) // group_size]

    return Grid(step=step, rounded=Tensor.float)


FP8 = Grid(step=fp8_step, rounded=e4m3_rounded)
INT8 = Grid(step=int8_step, rounded=int8_rounded)
INT4 = Grid(step=int4_step, rounded=e4m3_rounded)
FORMATS: list[tuple[LinearFormat, Grid]] = [
    (Fp8Format(), FP8),
    (Int8Format(), INT8),
    (W4AFp8Format(), INT4),
    (Int8WeightFormat(), Grid(step=int8_step, rounded=Tensor.float)),
    (Int4WeightFormat(128), int4_wo_grid(128)),
    (Int4WeightFormat(64), int4_wo_grid(64)),
    (Int4WeightFormat(32), int4_wo_grid(32)),
    (Int4WeightFormat(None), int4_wo_grid(1 << 20)),
]
IDS = ["fp8", "int8_sq", "w4a_fp8", "int8_wo", "int4_wo", "int4_wo_g64", "int4_wo_g32", "int4_wo_channel"]


def fixed_e4m3(x: Tensor) -> Tensor:
    """x after it is rounded to e4m3's numbers times INPUT_SCALE."""
    ratio = (x.float() / INPUT_SCALE).double()
    spacing = e4m3_spacing(ratio)
    return ((ratio / spacing).round() * spacing).clamp(-448, 448).float() * INPUT_SCALE


def fixed_int8(x: Tensor) -> Tensor:
    return (x.float() / INPUT_SCALE).round().clamp(-128, 127) * INPUT_SCALE


def block_step(weight: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
    rows = torch.arange(weight.shape[-2])
    scale = stored["scale"].double()[..., rows, :][..., torch.arange(weight.shape[-1]) // 128]
    return e4m3_spacing(weight.double() / scale) * scale


def e4m3_rounded_in_groups(x: Tensor) -> Tensor:
    return torch.cat([e4m3_rounded(part) for part in x.split(128, dim=1)], dim=1)


INPUT_SCALE = 0.03
STORED: dict[str, tuple[LinearFormat, Grid]] = {
    "fp8_static": (Fp8StaticFormat(INPUT_SCALE), Grid(step=fp8_step, rounded=fixed_e4m3)),
    "int8_static": (Int8StaticFormat(INPUT_SCALE), Grid(step=int8_step, rounded=fixed_int8)),
    "w4a_fp8_static": (W4AFp8StaticFormat(128, False, INPUT_SCALE), Grid(step=int4_step, rounded=fixed_e4m3)),
    "w4a_fp8_static zero": (W4AFp8StaticFormat(128, True, INPUT_SCALE), Grid(step=int4_step, rounded=fixed_e4m3)),
    "fp8_block": (Fp8BlockFormat(1, 128), Grid(step=block_step, rounded=e4m3_rounded_in_groups)),
    "ordered": (InputsFormat(Int4WeightFormat(128), ordered=True), int4_wo_grid(128)),
    "factored": (InputsFormat(W4AFp8Format(128, True), factored=True), INT4),
}
"""Those that only checkpoints ask for."""

ZERO_POINTS: list[tuple[LinearFormat, Grid]] = [
    (W4AFp8Format(128, zero_points=True), INT4),
    (Int4WeightFormat(128, zero_points=True), int4_wo_grid(128)),
    (Int4WeightFormat(32, zero_points=True), int4_wo_grid(32)),
    (Int4WeightFormat(None, zero_points=True), int4_wo_grid(1 << 20)),
]


def table() -> KernelTable:
    return KernelTable(plugin.ops(), plugin.kernels())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("number_format", "grid"),
    [*FORMATS, *ZERO_POINTS, *STORED.values()],
    ids=[*IDS, "w4a_fp8 zero", "int4_wo zero", "g32 zero", "channel zero", *STORED],
)
def test_contract(number_format: LinearFormat, grid: Grid, dtype: torch.dtype) -> None:
    check_precision(number_format, table=table(), grid=grid, dtype=dtype)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("number_format", "grid"), FORMATS, ids=IDS)
def test_contract_with_other_numbers(number_format: LinearFormat, grid: Grid, seed: int) -> None:
    check_precision(number_format, table=table(), grid=grid, seed=seed)


@pytest.mark.parametrize("group_size", [2, 32])
def test_four_bits_in_other_groups(group_size: int) -> None:
    def step(weight: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        return stored["scale"].float()[..., torch.arange(weight.shape[-1]) // group_size]

    check_precision(W4AFp8Format(group_size), table=table(), grid=Grid(step=step, rounded=e4m3_rounded))


def test_precisions_name_their_formats() -> None:
    named = {precision.name: precision.format for precision in plugin.precisions()}
    for name, (number_format, _) in zip(IDS, FORMATS, strict=True):
        assert resolve(named[name])() == number_format
    assert resolve(named["fp8_block"])() == Fp8BlockFormat(1, 128)


def test_what_is_fused_knows_of_no_static_scale() -> None:
    for static, plain in (
        (Fp8StaticFormat(0.1), Fp8Format()),
        (Int8StaticFormat(0.1), Int8Format()),
        (W4AFp8StaticFormat(64, True, 0.1), W4AFp8Format(64, True)),
    ):
        assert static.fused == plain.fused != {}
    assert W4AFp8Format(96).fused == {}


@pytest.mark.parametrize("rows", [2, 128])
def test_blocks_of_rows(rows: int) -> None:
    """Their parts are whole multiples of a block, unlike those of check_precision."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(3 * rows, 300, generator=generator)
    weight[:rows, :128] = 0
    number_format = Fp8BlockFormat(rows, 128)
    stored = number_format.convert(weight)
    assert stored["scale"].shape == (3, 3)
    wide = stored["scale"].repeat_interleave(rows, 0).repeat_interleave(128, 1)[:, :300]
    error = (number_format.dense(stored) - weight).abs()
    assert (error <= e4m3_spacing(weight / wide) * wide / 2 * (1 + 1e-6)).all()
    largest = weight.unflatten(0, (3, rows))[:, :, 256:].abs().amax(dim=(1, 2)) / 448
    torch.testing.assert_close(stored["scale"][:, 2], largest)
    parts = [number_format.convert(part) for part in weight.split((rows, 2 * rows))]
    assert torch.equal(torch.cat([part["scale"] for part in parts]), stored["scale"])
    x = torch.randn(5, 300, generator=generator)
    multiply = number_format.bind(table(), LinearShape(3 * rows, 300), torch.float32, torch.device("cpu"))
    expected = e4m3_rounded_in_groups(x).double() @ number_format.dense(stored).double().T
    torch.testing.assert_close(multiply(x, stored).double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 3])
def test_inputs_are_ordered_and_multiplied(groups: int) -> None:
    """A stack's members each have an order of their own."""
    generator = torch.Generator().manual_seed(groups)
    base = Int4WeightFormat(32, zero_points=True)
    number_format = InputsFormat(base, ordered=True, factored=True)
    order = torch.stack([torch.randperm(70, generator=generator) for _ in range(groups)])
    factor = torch.rand(groups, 70, generator=generator) + 0.5
    weight = torch.randn(groups, 9, 70, generator=generator)
    stored = base.convert(weight) | {"order": order.int(), "factor": factor}
    meant = torch.empty_like(weight).scatter_(2, order.unsqueeze(1).expand_as(weight), base.dense(stored))
    meant *= factor.unsqueeze(1)
    torch.testing.assert_close(number_format.dense(stored), meant)
    x = torch.randn(8, 70, generator=generator)
    cpu = torch.device("cpu")
    if groups == 1:
        single = {name: tensor[0] for name, tensor in stored.items()}
        multiply = number_format.bind(table(), LinearShape(9, 70), torch.float32, cpu)
        torch.testing.assert_close(multiply(x, single), x @ meant[0].T, rtol=1e-4, atol=1e-4)
        return
    stacked = number_format.bind_grouped(table(), LinearShape(9, 70, groups), torch.float32, cpu)
    ends = [2, 2, 7]
    y = stacked(x, stored, torch.tensor(ends, dtype=torch.int32))
    expected = torch.cat([x[:2] @ meant[0].T, x[2:7] @ meant[2].T, torch.zeros(1, 9)])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "in_features", "num_bytes"),
    [
        ("int8_wo", 200, 48 * 200 + 48 * 4),
        ("int4_wo", 512, 48 * 256 + 48 * 4 * 2),
        ("int4_wo", 257, 48 * 129 + 48 * 3 * 2),
        ("int4_wo_g64", 512, 48 * 256 + 48 * 8 * 2),
        ("int4_wo_g32", 512, 48 * 256 + 48 * 16 * 2),
        ("int4_wo_channel", 512, 48 * 256 + 48 * 2),
    ],
)
def test_bytes_kept_for_a_weight(name: str, in_features: int, num_bytes: int) -> None:
    number_format = dict(zip(IDS, FORMATS, strict=True))[name][0]
    for groups in (1, 3):
        kept = number_format.storage(LinearShape(48, in_features, groups), torch.bfloat16)
        assert sum(math.prod(part.shape) * part.dtype.itemsize for part in kept) == num_bytes


@pytest.mark.parametrize("name", ["int8_wo", "int4_wo_g32"])
def test_rows_that_are_not_consecutive_in_memory(name: str) -> None:
    number_format = dict(zip(IDS, FORMATS, strict=True))[name][0]
    generator = torch.Generator().manual_seed(8)
    stored = number_format.convert(torch.randn(300, 70, generator=generator))
    x = torch.randn(70, 6, generator=generator).T
    multiply = number_format.bind(table(), LinearShape(300, 70), torch.float32, torch.device("cpu"))
    expected = x.double() @ number_format.dense(stored).double().T
    torch.testing.assert_close(multiply(x, stored).double(), expected, rtol=0, atol=1e-4)


def test_a_wrong_scale_breaks_the_contract() -> None:
    class Doubled(Fp8Format):
        def convert(self, weight: Tensor) -> dict[str, Tensor]:
            stored = super().convert(weight)
            return {**stored, "scale": stored["scale"] * 2}

    with pytest.raises(AssertionError, match="half a step"):
        check_precision(Doubled(), table=table(), grid=FP8)


def test_a_scale_shared_by_parts_breaks_the_contract() -> None:
    class Shared(Int8Format):
        def convert(self, weight: Tensor) -> dict[str, Tensor]:
            scale = weight.float().abs().amax(dim=(-2, -1), keepdim=True) / 127
            numbers = (weight.float() / scale).round().to(torch.int8)
            return {"weight": numbers, "scale": scale.squeeze(-1).expand(weight.shape[:-1])}

    with pytest.raises(AssertionError, match="differs from the whole's"):
        check_precision(Shared(), table=table(), grid=INT8)


def test_activations_left_as_they_are_break_the_contract() -> None:
    with pytest.raises(AssertionError, match="than rounding explains"):
        check_precision(Fp8Format(), table=table(), grid=Grid(step=fp8_step, rounded=Tensor.float))


def test_the_largest_weight_of_a_row_is_met() -> None:
    weight = torch.randn(20, 300, generator=torch.Generator().manual_seed(5))
    weight[3] = 0
    for number_format, _ in FORMATS:
        tolerance = 2.0**-8 if isinstance(number_format, PerGroupFormat) else 1e-6
        largest = number_format.dense(number_format.convert(weight)).abs().amax(dim=1)
        torch.testing.assert_close(largest, weight.abs().amax(dim=1), rtol=tolerance, atol=0)


def test_every_four_bit_number_survives_packing() -> None:
    numbers = torch.arange(-8, 8, dtype=torch.int8)
    pairs = torch.cartesian_prod(numbers, numbers)
    assert torch.equal(unpack(pack(pairs)), pairs)
    assert pack(torch.tensor([1, -2], dtype=torch.int8)).tolist() == [9 + (6 << 4)]


def test_zero_points_halve_the_step_of_weights_of_one_sign() -> None:
    weight = torch.rand(9, 256, generator=torch.Generator().manual_seed(3)) + 0.01
    errors = []
    for zero_points in (False, True):
        number_format = Int4WeightFormat(64, zero_points)
        errors.append((number_format.dense(number_format.convert(weight)) - weight).square().mean().sqrt())
    assert errors[1] < 0.6 * errors[0]


def test_an_odd_row_is_told_from_an_even_one() -> None:
    number_format = W4AFp8Format()
    for in_features in (1, 2, 127, 128, 129, 130):
        weight = torch.full((2, in_features), -3.0)
        assert number_format.dense(number_format.convert(weight)).shape == weight.shape


def test_e4m3_saturates_and_keeps_nan() -> None:
    codes = to_e4m3(torch.tensor([1e9, -1e9, 449.0, float("inf"), float("nan")])).float()
    assert codes[:4].tolist() == [448, -448, 448, 448]
    assert codes[4].isnan()


def test_a_token_with_nan_or_infinity_stays_so_and_spares_the_others() -> None:
    x = torch.ones(3, 4)
    x[0, 1], x[1, 2] = float("nan"), float("inf")
    for number_format, _ in FORMATS:
        multiply = number_format.bind(table(), LinearShape(2, 4), torch.float32, torch.device("cpu"))
        y = multiply(x, number_format.convert(torch.ones(2, 4)))
        assert not y[:2].isfinite().any()
        torch.testing.assert_close(y[2], torch.full((2,), 4.0), rtol=1e-2, atol=0)


@pytest.mark.parametrize("quantise", [round_e4m3, round_int8])
@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-38, 1e38])
def test_rows_at_the_ends_of_float32_stay_finite(quantise: object, magnitude: float) -> None:
    assert callable(quantise)
    x = torch.tensor([[magnitude, 0.0, -magnitude]])
    codes, scale = quantise(x)
    assert torch.isfinite(codes.float() * scale).all()
    assert (codes.float() * scale - x).abs().max() <= max(magnitude / 16, TINY)
