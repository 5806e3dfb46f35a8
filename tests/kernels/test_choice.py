"""How products are cut: what was measured goes before the rule, as far as the kernels can do it."""

from __future__ import annotations

from pathlib import Path

import pytest

from plexor.kernels import tuning
from plexor.kernels.cuda.choice import Cut, Stream, as_choice, choose, possible, rule
from plexor.kernels.cuda.tiled_layout import TiledCut
from plexor.kernels.tuning import Choice, Product

QKV = Product("norm_rotary_linear", 6144, 4096, "bfloat16")
NUM_MULTIPROCESSORS = 132


@pytest.mark.parametrize(
    ("outputs", "pair", "blocks"),
    [
        (6144, 64, {1, 2}),
        (48, None, {1}),
        (96, 48, {1, 2}),
        (80, 40, {1}),
        (96, 8, {1}),
        (24, 12, set()),
        (40, 4, set()),
    ],
)
@pytest.mark.parametrize("num_rows", [1, 16])
def test_tiles_of_few_rows_are_whole(num_rows: int, outputs: int, pair: int | None, blocks: set[int]) -> None:
    cuts = possible(Product("linear", outputs, 192, "float16"), num_rows, pair)
    assert len(cuts) == len(set(cuts)) == 2 * len(blocks)
    assert {cut.blocks for cut in cuts if isinstance(cut, Stream)} == blocks


def test_more_rows_take_tiles_or_the_library() -> None:
    assert possible(QKV, 17, 64)[0] is None
    assert {TiledCut(64), TiledCut(96, 2)} < set(possible(QKV, 256, 64))
    assert possible(QKV, 257, 64) == possible(QKV, 64, 20) == (None,)


def test_blocks_that_share_a_tile_have_inputs_each() -> None:
    """The second would add what it never multiplied."""
    assert TiledCut(64, 2) not in possible(Product("linear", 256, 64, "bfloat16"), 17, None)
    assert TiledCut(64, 2) in possible(Product("linear", 256, 128, "bfloat16"), 17, None)


@pytest.mark.parametrize("outputs", [16, 48, 96, 2048, 6144, 28672])
@pytest.mark.parametrize("inputs", [64, 4096])
@pytest.mark.parametrize("op", ["linear", "norm_gated_linear"])
@pytest.mark.parametrize("num_rows", [1, 9, 17, 32, 40, 128, 129, 300])
def test_a_rule_asks_for_what_is_possible(op: str, inputs: int, outputs: int, num_rows: int) -> None:
    product = Product(op, outputs, inputs, "bfloat16")
    for pair in (None, outputs // 2):
        assert rule(product, num_rows, pair, NUM_MULTIPROCESSORS) in possible(product, num_rows, pair)


def test_a_rule_spreads_few_tiles_over_the_processors() -> None:
    assert rule(QKV, 20, 64, 132) == TiledCut(96, 2)
    assert rule(QKV, 129, 64, 132) is None
    assert rule(Product("norm_gated_linear", 28672, 4096, "bfloat16"), 64, 14336, 132) == TiledCut(224)
    assert rule(Product("linear", 128256, 4096, "bfloat16"), 65, None, 132) is None
    assert rule(Product("linear_add", 2048, 8192, "bfloat16"), 3, None, 132) == Stream(1, 512)


def test_nothing_fits_a_product_of_odd_outputs() -> None:
    assert rule(Product("linear", 72, 64, "bfloat16"), 4, None, NUM_MULTIPROCESSORS) is None


@pytest.mark.parametrize(
    ("num_rows", "measured", "expected"),
    [
        (1, {"blocks": 1, "depth": 512}, Stream(1, 512)),
        (16, {"blocks": 2, "depth": 512}, Stream(2, 512)),
        (64, {"outputs": 32, "split": 2, "share": 1}, TiledCut(32, 2)),
        (200, {"outputs": 96, "split": 2, "share": 1}, TiledCut(96, 2)),
        (20, None, None),
    ],
)
def test_what_was_measured_goes_before_the_rule(num_rows: int, measured: Choice, expected: Cut) -> None:
    assert rule(QKV, num_rows, 64, NUM_MULTIPROCESSORS) != expected
    assert choose({str(QKV): {256: measured}}, QKV, num_rows, 64, NUM_MULTIPROCESSORS) == expected


@pytest.mark.parametrize("measured", [None, {}, {"split": 2}, {"blocks": 4, "depth": 256}, {"blocks": 2, "deep": 256}])
def test_what_the_kernels_cannot_do_counts_as_not_measured(measured: Choice) -> None:
    default = rule(QKV, 8, 64, NUM_MULTIPROCESSORS)
    assert choose({str(QKV): {8: measured}}, QKV, 8, 64, NUM_MULTIPROCESSORS) == default == Stream(2, 256)


def test_other_products_and_more_rows_keep_the_rule() -> None:
    table = {str(QKV): {1: {"blocks": 1, "depth": 512}, 32: None}}
    assert choose(table, QKV, 32, 64, NUM_MULTIPROCESSORS) is None
    assert choose(table, QKV, 300, 64, NUM_MULTIPROCESSORS) is None
    other = Product("linear_add", 6144, 4096, "bfloat16")
    assert choose(table, other, 1, None, NUM_MULTIPROCESSORS) == Stream(2, 256)


def test_a_cut_is_found_again_in_a_table() -> None:
    for num_rows in (1, 64):
        for cut in possible(QKV, num_rows, 64):
            assert choose({str(QKV): {num_rows: as_choice(cut)}}, QKV, num_rows, 64, NUM_MULTIPROCESSORS) == cut


def test_a_file_changes_how_a_product_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "shipped_folder", lambda: tmp_path / "absent")
    monkeypatch.setattr(tuning, "user_folder", lambda: tmp_path)
    cuts = {8: Stream(1, 512), 32: TiledCut(32), 64: TiledCut(32, 2)}
    tuning.tuned.cache_clear()
    tuning.write_choices(
        tmp_path / "GPU.json", {str(QKV): {num_rows: as_choice(cut) for num_rows, cut in cuts.items()}}
    )
    try:
        for num_rows, cut in cuts.items():
            assert choose(tuning.tuned("GPU"), QKV, num_rows - 1, 64, NUM_MULTIPROCESSORS) == cut
            assert rule(QKV, num_rows - 1, 64, NUM_MULTIPROCESSORS) != cut
    finally:
        tuning.tuned.cache_clear()
