"""Fused ops of coded weights: their references, on what they are held to providers with, and who names them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from plexor.api import FusingFormat, LinearFormat, LinearShape, PlexorError, resolve
from plexor_quant import fusions, plugin
from plexor_quant.fp8 import Fp8Format
from plexor_quant.int4_wo import Int4WeightFormat
from plexor_quant.int8_sq import Int8Format
from plexor_quant.int8_wo import Int8WeightFormat
from plexor_quant.kernels.reference.fused import row_group_size
from plexor_quant.rounding import round_e4m3, round_int8
from plexor_quant.w4a_fp8 import W4AFp8Format

CPU = torch.device("cpu")
EPS = 1e-5
FORMATS = (
    Fp8Format(),
    Int8Format(),
    W4AFp8Format(32),
    Int8WeightFormat(),
    Int4WeightFormat(64, True),
    Int4WeightFormat(None),
)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fused(number_format: LinearFormat, fusion: str) -> Callable[..., Tensor]:
    assert isinstance(number_format, FusingFormat)
    name = number_format.fused[fusion]  # type: ignore[index]
    function: Callable[..., Tensor] = resolve(next(op.reference for op in plugin.ops() if op.name == name))
    return function


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_references_are_products_with_what_is_around_them(number_format: LinearFormat) -> None:
    """Close to float64 of the dense weights; activations are rounded on the way by some, by 4 % at most."""
    x, gain, bias, residual = normal(0, 3, 100), normal(1, 100), normal(2, 24), normal(3, 3, 24)
    stored = number_format.convert(normal(4, 24, 100) / 10)
    weight = number_format.dense(stored).double()
    normed = functional.rms_norm(x.double(), (100,), gain.double(), EPS)
    product = normed @ weight.T + bias
    close = {"rtol": 0.05, "atol": 0.15}
    torch.testing.assert_close(fused(number_format, "norm")(x, gain, EPS, stored, bias).double(), product, **close)
    gate, up = product.chunk(2, dim=1)
    gated = fused(number_format, "norm_gated")(x, gain, EPS, stored, bias)
    torch.testing.assert_close(gated.double(), functional.silu(gate) * up, rtol=0.05, atol=0.4)
    added = fused(number_format, "add")(x, stored, residual, bias)
    torch.testing.assert_close(added.double(), residual + (x.double() @ weight.T + bias), **close)


def test_queries_turn_and_keys_and_values_are_stored() -> None:
    """One head each of queries, keys and values, of eight features; they turn by a right angle."""
    x, gain = normal(0, 2, 64), torch.ones(64)
    number_format = Int8WeightFormat()
    stored = number_format.convert(normal(1, 24, 64) / 8)
    cos, sin = torch.zeros(1, 4), torch.ones(1, 4)
    cache = {part: torch.zeros(1, 4, 1, 8) for part in ("keys", "values")}
    where = (cos, sin, torch.tensor([0, 0]), torch.tensor([3, -1]), cache)
    q = fused(number_format, "norm_rotary")(x, gain, EPS, stored, *where)
    heads = fused(number_format, "norm")(x, gain, EPS, stored).view(2, 3, 8)
    turned = torch.cat((-heads[..., 4:], heads[..., :4]), dim=-1)
    torch.testing.assert_close(q, turned[:, :1])
    torch.testing.assert_close(cache["keys"][0, 3], turned[0, 1:2])
    torch.testing.assert_close(cache["values"][0, 3], heads[0, 2:])
    assert not cache["keys"][0, :3].any()


@pytest.mark.parametrize("op", ["fp8_linear_add", "int8_norm_linear", "w4a_fp8_norm_rotary_linear"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_leaves_the_samples_as_they_are(op: str, dtype: torch.dtype) -> None:
    """What providers that do not round are given is, behind its norm, what rounding makes of it."""
    spec = next(spec for spec in fusions.ops() if spec.name == op)
    rounds = round_int8 if op.startswith("int8") else round_e4m3
    num_rows = 0
    for sample in resolve(spec.samples)(CPU, dtype):
        x = sample.args[0]
        if x.shape[0] == 0:
            continue
        if "norm" in op:
            x = functional.rms_norm(x, (x.shape[1],), sample.args[1], EPS)
        codes, scale = rounds(x)
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(codes.float() * scale, x.float(), rtol=2 * step, atol=step * float(scale.max()))
        num_rows += x.shape[0]
    assert num_rows > 50


def test_a_group_size_is_told_from_the_number_of_scales() -> None:
    for size in (32, 64, 128, 256):
        for in_features in (256, 300, 4096):
            groups = -(-in_features // size)
            assert row_group_size(in_features, groups) == (in_features if groups == 1 else size)
    with pytest.raises(PlexorError, match="3 scales for 256 input features"):
        row_group_size(256, 3)


def test_formats_name_fused_ops_that_are_declared() -> None:
    declared = {op.name for op in plugin.ops()}
    for number_format in FORMATS:
        assert isinstance(number_format, FusingFormat)
        assert len(number_format.fused) == 4
        assert set(number_format.fused.values()) <= declared
    assert not W4AFp8Format(96).fused, "its size is not told from the number of its scales"
    assert not fusions.fused_ops("fp8_static_linear")
    assert {kernel.op for kernel in fusions.kernels()} <= declared


def test_a_short_last_group_keeps_its_size() -> None:
    number_format = Int4WeightFormat(32)
    x, gain = normal(0, 2, 72), torch.ones(72)
    stored = number_format.convert(normal(1, 8, 72))
    assert number_format.storage(LinearShape(8, 72), torch.float32)[1].shape == (8, 3)
    y = fused(number_format, "norm")(x, gain, EPS, stored)
    expected = functional.rms_norm(x, (72,), gain, EPS) @ number_format.dense(stored).T
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
