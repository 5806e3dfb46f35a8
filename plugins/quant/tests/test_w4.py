"""Products of many rows over four-bit weights: how they are cut everywhere, and what they give on a GPU."""

from __future__ import annotations

from itertools import product as every

import pytest
import torch

from plexor.api import product_call
from plexor_quant.kernels.cuda import w4_layout
from plexor_quant.kernels.cuda.coded import Activations, CodedCall, Codes
from plexor_quant.kernels.cuda.w4_layout import W4Cut, layout, lies_well, rule, takes, unit

BF16, FP16 = torch.bfloat16, torch.float16
LARGEST_BLOCK = 227 * 1024
GPU = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs compute capability 9.x"
)


def coded(
    rows: int,
    outputs: int,
    inputs: int,
    group_size: int,
    activations: Activations = Activations.E4M3,
    *,
    zero: bool = False,
) -> CodedCall:
    groups = -(-inputs // group_size)
    weight = torch.zeros(outputs, inputs // 2, dtype=torch.uint8)
    zeros = torch.zeros(outputs, groups, dtype=torch.uint8) if zero else None
    codes = Codes(weight, torch.ones(outputs, groups, dtype=BF16), zeros, group_size)
    return CodedCall(product_call(torch.zeros(rows, inputs, dtype=BF16), weight), codes, activations)


@pytest.mark.parametrize(("columns", "split"), [*every((32, 64, 128), (1, 2))])
@pytest.mark.parametrize(("group_size", "zero"), [*every((32, 64, 128, 1024), (False, True))])
@pytest.mark.parametrize("activations", [Activations.E4M3, Activations.AS_THEY_ARE])
def test_a_ring_of_two_stages_fits_and_holds_what_blocks_exchange(
    columns: int, split: int, group_size: int, zero: bool, activations: Activations
) -> None:
    stages, num_bytes = layout(coded(4, 128, 1024, group_size, activations, zero=zero), W4Cut(columns, split=split))
    assert stages >= 2
    assert num_bytes <= LARGEST_BLOCK - 1024
    assert num_bytes >= 128 * columns * 4


@pytest.mark.parametrize("rows", [17, 32, 33, 64, 100, 129, 256, 300, 8192])
@pytest.mark.parametrize(("outputs", "inputs"), [(128, 256), (384, 512), (4096, 14336), (28672, 4096), (6144, 4096)])
def test_the_rule_gives_every_block_something_to_do(
    rows: int, outputs: int, inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(w4_layout, "num_multiprocessors", lambda _: 132)
    cut = rule(coded(rows, outputs, inputs, 128))
    assert cut.fits(inputs)
    assert cut.columns in (32, 64, 128)


@pytest.mark.parametrize(
    ("rows", "outputs", "cut"),
    [
        (17, 4096, W4Cut(32, 2)),
        (64, 4096, W4Cut(32, 2)),
        (64, 6144, W4Cut(64, 2)),
        (64, 28672, W4Cut(64)),
        (128, 4096, W4Cut(64, 2)),
        (128, 6144, W4Cut(64)),
        (128, 28672, W4Cut(128)),
        (256, 4096, W4Cut(128, 2)),
        (256, 6144, W4Cut(128)),
        (8192, 4096, W4Cut(128)),
    ],
)
def test_blocks_are_small_while_multiprocessors_are_left(
    rows: int, outputs: int, cut: W4Cut, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(w4_layout, "num_multiprocessors", lambda _: 132)
    assert rule(coded(rows, outputs, 4096, 128)) == cut


@pytest.mark.parametrize(
    ("outputs", "inputs", "group_size", "taken"),
    [
        (128, 256, 128, True),
        (128, 96, 32, True),
        (128, 96, 96, True),
        (256, 512, 384, True),
        (64, 256, 128, False),
        (128, 240, 128, False),
        (128, 256, 96, False),
        (128, 256, 16, False),
        (128, 65536, 128, False),
    ],
)
def test_sizes_that_the_kernels_take(outputs: int, inputs: int, group_size: int, taken: bool) -> None:
    assert takes(outputs, inputs, group_size) is taken


def test_sums_are_scaled_once_for_a_group_of_128_at_most() -> None:
    assert unit(coded(1, 128, 1024, 32).codes) == 32
    assert unit(coded(1, 128, 1024, 256).codes) == 128
    assert unit(coded(1, 128, 1024, 1024).codes) == 128


def test_int8_activations_and_bytes_are_left_to_others() -> None:
    assert lies_well(coded(17, 128, 256, 128))
    assert not lies_well(coded(17, 128, 256, 128, Activations.INT8))
    narrow = torch.zeros(128, 256, dtype=torch.float8_e4m3fn)
    codes = Codes(narrow, torch.ones(128), None, 256)
    assert not lies_well(CodedCall(product_call(torch.zeros(17, 256, dtype=BF16), narrow), codes, Activations.E4M3))


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize(("group_size", "inputs"), [(128, 640), (64, 512), (32, 288)])
@pytest.mark.parametrize("e4m3", [True, False])
@pytest.mark.parametrize("cut", [W4Cut(128), W4Cut(32, 2), W4Cut(64)], ids=str)
def test_one_hot_rows_give_the_weights_exactly(group_size: int, inputs: int, e4m3: bool, cut: W4Cut) -> None:
    from bench.coded_w4 import check_one_hot

    check_one_hot(group_size, e4m3, cut, inputs)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("epilogue", ["store", "add", "gated", "rotary"])
@pytest.mark.parametrize(("rows", "group_size", "zero"), [(17, 128, False), (100, 32, True), (300, 64, False)])
@pytest.mark.parametrize(("e4m3", "dtype"), [(True, BF16), (False, BF16), (True, FP16), (False, FP16)])
def test_products_are_the_reference_s(
    epilogue: str, rows: int, group_size: int, zero: bool, e4m3: bool, dtype: torch.dtype
) -> None:
    from bench.coded_w4 import Weight, check_case

    torch.manual_seed(rows)
    weight = Weight.draw(1536, 1056, group_size, zero=zero)
    check_case(rows, 1536, 1056, epilogue, None, e4m3, weight, dtype)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("rows", [17, 130])
def test_heads_of_64_features_are_rotated(rows: int) -> None:
    from bench.coded_w4 import Weight, check_case

    torch.manual_seed(rows)
    check_case(rows, 1536, 1024, "rotary", None, True, Weight.draw(1536, 1024), BF16, 64)
