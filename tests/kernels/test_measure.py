"""What is measured in which order, and that wrong products are noticed before they are timed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product as every
from typing import Any

import pytest
import torch
from torch import Tensor

from plexor.errors import PlexorError
from plexor.extension import builtin
from plexor.extension.specs import Facts
from plexor.kernels.cuda.choice import Cut, Stream
from plexor.kernels.cuda.tiled_layout import TiledCut
from plexor.kernels.measure import Layer, Tuned, chains_of, check, choices_of, descend, draw
from plexor.kernels.table import Choice, resolve
from plexor.kernels.tuning import Product

CPU = torch.device("cpu")
QKV = Layer(Product("norm_rotary_linear", 96, 40, "float16"), head_size=24, num_kv_heads=1)
GATED = Layer(Product("norm_gated_linear", 72, 40, "float16"))
DOWN = Layer(Product("linear_add", 40, 36, "float16"))
PROJECTION, HEAD = Layer(Product("norm_linear", 56, 40, "float16")), Layer(Product("linear", 33, 40, "float16"))
LAYERS = (QKV, GATED, DOWN, PROJECTION, HEAD)


def choice(op: str, outputs: int, inputs: int, winner: str = "cuda", **sizes: int) -> Choice:
    sizes |= {"out_features": outputs, "in_features": inputs}
    return Choice(op, Facts("cuda", "bfloat16", (9, 0), None, sizes), winner, ())


def test_layers_that_do_more_than_multiply_are_one_chain() -> None:
    heads = {"num_heads": 2, "num_kv_heads": 1, "head_size": 16}
    choices = (
        choice("linear", 64, 32),
        choice("linear", 500, 32),
        choice("rms_norm", 32, 32, "triton"),
        choice("norm_rotary_linear", 64, 32, **heads, rotary_size=16),
        choice("norm_rotary_linear", 80, 32, **heads, rotary_size=8),
        choice("linear_add", 32, 32),
        choice("linear_add", 32, 32, bias=1),
        choice("norm_gated_linear", 128, 32, "triton"),
        choice("grouped_linear", 64, 64),
    )
    fused, head = chains_of(choices)
    assert [str(layer.product) for layer in fused] == ["norm_rotary_linear 64x32 bfloat16", "linear_add 32x32 bfloat16"]
    assert (fused[0].head_size, fused[0].num_kv_heads, fused[0].pair, fused[1].pair) == (16, 1, 8, None)
    assert [str(layer.product) for layer in head] == ["linear 500x32 bfloat16"]
    assert chains_of(choices[2:3]) == ()


def test_one_cut_after_the_other_is_changed_and_the_quickest_kept() -> None:
    options: list[tuple[Cut, ...]] = [(None, TiledCut(64), TiledCut(64, 2)), (TiledCut(64), None), (None, TiledCut(64))]
    taken = {None: 3.0, TiledCut(64): 2.0, TiledCut(64, 2): 1.0}
    tried: list[tuple[Cut, ...]] = []

    def seconds(cuts: tuple[Cut, ...]) -> float:
        tried.append(cuts)
        first, second, third = cuts
        return taken[first] + taken[second] * (1.25 if first == TiledCut(64, 2) else 1.0) - (0.001 if third else 0.0)

    cuts, before, after = descend((None, TiledCut(64), None), options, seconds)
    assert cuts == (TiledCut(64, 2), TiledCut(64), None), "the third change is within what may be noise"
    assert (before, after) == (5.0, 3.5)
    assert len(tried) == len(set(tried)) == 5


def test_what_is_kept_for_each_number_of_rows() -> None:
    first = Tuned((QKV, DOWN), 8, (Stream(1, 256), Stream(2, 512)), 2e-6, 1e-6)
    second = Tuned((QKV, DOWN), 64, (None, TiledCut(64, 2)), 2e-6, 1.5e-6)
    assert choices_of((first, second)) == {
        str(QKV.product): {8: {"blocks": 1, "depth": 256}, 64: None},
        str(DOWN.product): {8: {"blocks": 2, "depth": 512}, 64: {"outputs": 64, "split": 2, "share": 1}},
    }
    assert str(second).startswith("64 rows: 2.0 us by the rules, 1.5 us with norm_rotary_linear 96x40 float16 library")


def reference(layer: Layer) -> Callable[..., Tensor]:
    function: Callable[..., Tensor] = resolve(f"plexor.kernels.reference.{layer.product.op}:{layer.product.op}")
    return function


@pytest.mark.parametrize(("layer", "num_rows"), list(every(LAYERS, (1, 7))), ids=str)
def test_right_products_pass(layer: Layer, num_rows: int) -> None:
    torch.manual_seed(3)
    check(layer, num_rows, reference(layer), draw(layer, CPU))


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_wrong_products_are_noticed(layer: Layer) -> None:
    torch.manual_seed(4)

    def mixed_up(*given: Any) -> Tensor:
        return reference(layer)(*given).roll(1, dims=1)

    with pytest.raises(PlexorError, match=rf"{layer.product}, 7 rows by hand: off by .* nothing was written down"):
        check(layer, 7, mixed_up, draw(layer, CPU), " by hand")


def test_wrong_entries_of_the_cache_are_noticed() -> None:
    def forgetful(*given: Any) -> Tensor:
        *others, cache = given
        return reference(QKV)(*others, {part: entries.clone() for part, entries in cache.items()})

    torch.manual_seed(5)
    with pytest.raises(PlexorError, match="off by"):
        check(QKV, 7, forgetful, draw(QKV, CPU))


def test_every_op_with_variants_can_be_measured() -> None:
    ops = {k.op for k in builtin.kernels() if k.provider == "cuda"} - {"paged_attention"}
    assert {layer.product.op for layer in LAYERS} == ops
