"""What is measured: variants that a processor can hold, against an exact product, with a margin for noise."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton")

from plexor.kernels.measure import SHARED_BYTES, Timing, candidates, check, exact_product
from plexor.kernels.triton.split_linear import Split
from plexor.kernels.tuning import Product

SLOW, FAST = (Split(rows=32, outputs=64, inputs=64, splits=splits, warps=4, stages=4) for splits in (1, 2))


@pytest.mark.parametrize("op", ["linear", "gated_linear"])
@pytest.mark.parametrize("sizes", [(6144, 4096), (2048, 8192), (128256, 2048), (96, 72)], ids=str)
@pytest.mark.parametrize("num_rows", [5, 33, 200])
def test_candidates_fit_a_multiprocessor(op: str, sizes: tuple[int, int], num_rows: int) -> None:
    found = candidates(Product(op, *sizes, "bfloat16"), num_rows, processors=132)
    assert 0 < len(found) == len(set(found)) <= 12
    for split in found:
        outputs = split.outputs * (2 if op == "gated_linear" else 1)
        assert split.stages * 2 * split.inputs * (split.rows + outputs) <= SHARED_BYTES
        assert split.rows * outputs <= 128 * 32 * split.warps
        assert split.rows >= min(num_rows, 128)


def test_few_outputs_are_split_and_many_need_not_be() -> None:
    narrow = candidates(Product("linear", 2048, 8192, "bfloat16"), 32, processors=132)
    assert all(split.splits > 1 for split in narrow)
    wide = candidates(Product("linear", 128256, 4096, "bfloat16"), 32, processors=132)
    assert 1 in [split.splits for split in wide]


def test_a_choice_needs_a_margin_over_the_library() -> None:
    product = Product("linear", 64, 64, "bfloat16")
    variants = {SLOW: 2.0e-6, FAST: 1.0e-6}
    assert Timing(product, 32, 1.1e-6, variants, {}).choice == {
        "rows": 32,
        "outputs": 64,
        "inputs": 64,
        "splits": 2,
        "warps": 4,
        "stages": 4,
    }
    assert Timing(product, 32, 1.005e-6, variants, {}).choice is None
    assert Timing(product, 32, 1.0e-6, variants, {}).bandwidth(1e-6) == 2 * 64 * 64 / 1e-6


def test_wrong_products_are_noticed() -> None:
    product = Product("gated_linear", 48, 40, "bfloat16")
    x, weight = torch.randn(7, 40), torch.randn(48, 40)
    gate, up = (x @ weight.t()).chunk(2, dim=1)
    exact = exact_product(product, x, weight)
    actual = (functional.silu(gate) * up).to(torch.bfloat16)
    check(product, actual, exact)
    with pytest.raises(AssertionError, match="gated_linear 48x40 bfloat16, 7 rows: off by"):
        check(product, actual.roll(1, dims=1), exact)
