"""The plan says what a run then takes, and makes nothing to find out."""

from pathlib import Path

import pytest

from plexor import Engine, EngineConfig
from plexor.checkpoint.folder import open_folder
from plexor.errors import CapacityError, ConfigError
from plexor.extension.catalog import Catalog
from plexor.runtime.kv_cache import fit_blocks
from plexor.runtime.ledger import make_plan


@pytest.mark.parametrize("precision", [spec.name for spec in Catalog.load().precisions.values() if not spec.selective])
@pytest.mark.parametrize("kv", sorted(Catalog.load().kv_formats))
def test_weights_and_cache_are_as_planned(tiny: Path, precision: str, kv: str) -> None:
    config = EngineConfig(model=str(tiny), precision=precision, kv=kv, device="cpu", num_blocks=20)
    plan = make_plan(config, Catalog.load(), open_folder(tiny))
    lines = {line.name: line.num_bytes for line in plan.lines}
    with Engine(config=config) as engine:
        rank = engine.core._ranks.rank
        module = rank.built.module
        kept = sum(
            t.numel() * t.element_size() for t in {id(t): t for t in (*module.parameters(), *module.buffers())}.values()
        )
        cache = sum(t.numel() * t.element_size() for layer in rank.runner._cache for t in layer.values())
    assert lines["weights"] == kept
    assert lines["KV blocks"] == cache
    assert plan.max_length == 128
    assert plan.verdict.startswith("fits: 2 requests")


def test_a_small_cache_is_said_to_hold_less_than_a_context(tiny: Path) -> None:
    config = EngineConfig(model=str(tiny), device="cpu", num_blocks=3)
    verdict = make_plan(config, Catalog.load(), open_folder(tiny)).verdict
    assert "no request may be longer than 48 tokens" in verdict


def test_every_op_of_the_model_is_in_the_plan(tiny: Path) -> None:
    plan = make_plan(EngineConfig(device="cpu"), Catalog.load(), open_folder(tiny))
    assert {"linear", "rms_norm", "rotary_kv_write", "paged_attention", "silu_mul"} <= {c.op for c in plan.choices}
    assert all(choice.winner for choice in plan.choices)


def test_an_override_wins_and_a_wrong_one_is_explained(tiny: Path) -> None:
    catalog, folder = Catalog.load(), open_folder(tiny)
    chosen = EngineConfig(device="cpu", kernels={"paged_attention": "reference"})
    choices = {choice.op: choice for choice in make_plan(chosen, catalog, folder).choices}
    assert choices["paged_attention"].winner == "reference"
    with pytest.raises(ConfigError, match="runs on cuda"):
        make_plan(EngineConfig(device="cpu", kernels={"rms_norm": "triton"}), catalog, folder)


def test_blocks_that_do_not_fit() -> None:
    assert fit_blocks(1000, 300, most=10) == 3
    assert fit_blocks(1000, 10, most=10) == 10
    with pytest.raises(CapacityError, match="2,000 bytes and 1,000"):
        fit_blocks(1000, 2000, most=10)
