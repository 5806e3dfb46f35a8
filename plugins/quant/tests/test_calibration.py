"""Calibration against what it promises: less error of the output, grids met exactly, folds that change nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from plexor.api import Catalog, CheckpointError, ConfigError, Decoder, DecoderLayer, GroupedLinear, Linear, RequestError
from plexor.testing.architecture import load_model, random_prompts, run
from plexor.testing.checkpoints import write_checkpoint
from plexor_quant.calibration.clip import clipped
from plexor_quant.calibration.gptq import gptq
from plexor_quant.calibration.grid import Grid, Rounded, Rounding, nearest
from plexor_quant.calibration.layers import calibrate
from plexor_quant.calibration.scheme import find_scheme
from plexor_quant.calibration.smoothing import find_folds

CATALOG = Catalog.load()
INT4 = Grid(7.0, torch.bfloat16, 32)
INT8 = Grid(127.0, torch.float32)
E4M3 = Grid(448.0, torch.float32, codes=torch.float8_e4m3fn)


def _inputs(rows: int, in_features: int, seed: int = 0) -> Tensor:
    """Rows whose features depend on one another and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, in_features, generator=generator) @ torch.randn(
        in_features, in_features, generator=generator
    )
    return mixed * torch.rand(in_features, generator=generator).add(0.05).pow(2)


def _weight(out_features: int, in_features: int) -> Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(7)).pow(3)


def _error(weight: Tensor, rounded: Rounded, x: Tensor) -> float:
    return float((x @ (weight - rounded.dense()).T).square().sum())


@pytest.mark.parametrize("in_features", [31, 64, 75, 257])
@pytest.mark.parametrize("grid", [INT4, INT8, E4M3], ids=["int4", "int8", "e4m3"])
def test_gptq_lowers_the_output_error_of_plain_rounding(grid: Grid, in_features: int) -> None:
    x, weight = _inputs(400, in_features), _weight(19, in_features)
    gram = x.T @ x
    assert _error(weight, gptq(weight, gram, grid), x) < 0.8 * _error(weight, nearest(weight, gram, grid), x)


@pytest.mark.parametrize("in_features", [31, 64, 75])
def test_clip_search_lowers_the_error_of_each_group(in_features: int) -> None:
    x, weight = _inputs(400, in_features), _weight(19, in_features)
    gram = x.T @ x
    plain, found = nearest(weight, gram, INT4), clipped(weight, gram, INT4)
    for columns in INT4.groups(in_features):
        for row in range(len(weight)):
            errors = [x[:, columns] @ (weight - one.dense())[row, columns] for one in (plain, found)]
            assert errors[1].square().sum() <= errors[0].square().sum() * 1.0001
    assert not torch.equal(plain.scale, found.scale)


def test_gptq_matches_the_published_loop_on_one_scale_for_a_row() -> None:
    """The algorithm as published: invert once, round a column, spread its error, eliminate the column."""
    x, weight = _inputs(300, 37), _weight(5, 37)
    gram = (x.T @ x).double()
    inverse = torch.linalg.inv(gram + 0.01 * gram.diagonal().mean() * torch.eye(37, dtype=torch.float64))
    scale = (weight.abs().amax(dim=1) / 127).double()
    left, expected = weight.double().clone(), torch.zeros(5, 37, dtype=torch.float64)
    for column in range(37):
        expected[:, column] = (left[:, column] / scale).round().clamp(-127, 127)
        error = (left[:, column] - expected[:, column] * scale) / inverse[column, column]
        left -= error.unsqueeze(1) * inverse[column]
        inverse = inverse - inverse[:, column : column + 1] @ inverse[column : column + 1] / inverse[column, column]
    found = gptq(weight, gram.float(), INT8)
    assert (found.numbers.double() != expected).float().mean() < 0.03


@pytest.mark.parametrize("rounding", [nearest, clipped, gptq])
def test_a_weight_on_the_grid_stays_as_it_is(rounding: Rounding) -> None:
    generator = torch.Generator().manual_seed(3)
    numbers = torch.randint(-7, 8, (11, 75), generator=generator).float()
    for columns in INT4.groups(75):
        numbers[:, columns.start] = 7
    scale = (0.5 ** torch.randint(1, 6, (11, 3), generator=generator)).repeat_interleave(32, dim=1)[:, :75]
    x = _inputs(200, 75)
    assert torch.equal(rounding(numbers * scale, x.T @ x, INT4).dense(), numbers * scale)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_few_inputs_make_a_singular_gram_that_is_still_served(rows: int) -> None:
    x, weight = _inputs(rows, 70), _weight(9, 70)
    found = gptq(weight, x.T @ x, INT4)
    assert found.dense().isfinite().all()
    assert _error(weight, found, x) <= _error(weight, nearest(weight, x.T @ x, INT4), x) + 1e-6


def test_a_feature_without_input_is_rounded_to_the_nearest() -> None:
    x, weight = _inputs(200, 40), _weight(6, 40)
    x[:, 13] = 0
    found = gptq(weight, x.T @ x, INT8)
    assert torch.equal(found.numbers[:, 13], nearest(weight, x.T @ x, INT8).numbers[:, 13])


def test_inputs_that_are_not_finite_are_refused() -> None:
    with pytest.raises(CheckpointError, match="not finite"):
        gptq(_weight(3, 8), torch.full((8, 8), float("nan")), INT8)


LLAMA: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 76,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
}
OPT: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "ffn_dim": 76,
    "num_hidden_layers": 2,
    "word_embed_proj_dim": 48,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "LlamaForCausalLM": lambda: transformers.LlamaConfig(**LLAMA),
    "MixtralForCausalLM": lambda: transformers.MixtralConfig(**LLAMA, num_local_experts=3),
    "OPTForCausalLM": lambda: transformers.OPTConfig(**OPT),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM", CONFIGS["LlamaForCausalLM"]())


def _tokens(count: int) -> list[int]:
    return random_prompts(307, (count,), seed=5)[0]


@pytest.mark.parametrize("precision", ["fp8", "w4a_fp8", "int8_sq", "int4_wo_channel"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_what_is_kept_is_what_the_calibrated_model_multiplies_by(
    architecture: str, precision: str, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path, architecture, CONFIGS[architecture]())
    built, target = load_model(folder, CATALOG), load_model(folder, CATALOG, precision=precision)
    kept = calibrate(built.module, built.build, _tokens(95), 30, find_scheme(precision), gain_dtype=torch.float32)
    modules, targets = dict(built.module.named_modules()), dict(target.module.named_modules())
    quantised = {
        name
        for name, module in targets.items()
        if isinstance(module, Linear | GroupedLinear) and module.format is target.build.format
    }
    assert set(kept) == quantised
    for name, stored in kept.items():
        layer, wanted = modules[name], targets[name]
        assert isinstance(layer, Linear | GroupedLinear)
        assert isinstance(wanted, Linear | GroupedLinear)
        assert {key: (value.shape, value.dtype) for key, value in stored.items()} == {
            key: (value.shape, value.dtype) for key, value in wanted.stored.items()
        }
        torch.testing.assert_close(wanted.format.dense(stored), layer.stored["weight"], rtol=1e-6, atol=0)


def test_calibration_is_nearer_to_the_dense_model_than_plain_rounding_and_repeats(llama: Path) -> None:
    prompts = random_prompts(307, (40, 33), seed=9)
    dense = torch.cat(run(load_model(llama, CATALOG), prompts, (50,)))
    scheme = find_scheme("w4a_fp8")
    distances = []
    for chosen in (replace(scheme, rounding=nearest, factors=None), replace(scheme, factors=None), scheme, scheme):
        built = load_model(llama, CATALOG)
        calibrate(built.module, built.build, _tokens(60 * 40), 40, chosen, gain_dtype=torch.float32)
        distances.append(float((torch.cat(run(built, prompts, (50,))) - dense).square().mean()))
    # Weights drawn at random leave inputs almost independent, so there is little to make up for.
    assert max(distances[1:]) < 0.95 * distances[0], distances
    assert distances[3] == distances[2]


def test_a_fold_changes_no_logit_and_its_gains_are_exact(llama: Path) -> None:
    built = load_model(llama, CATALOG)
    prompts = random_prompts(307)
    before = torch.cat(run(built, prompts, (50,)))
    decoder = next(module for module in built.module.modules() if isinstance(module, Decoder))
    generator = torch.Generator().manual_seed(2)
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        folds = find_folds(layer, torch.bfloat16)
        assert [fold.linear for fold in folds] == [
            layer.feed_forward.down,
            layer.attention.qkv,
            layer.feed_forward.gate_up,
        ]
        for fold in folds:
            factors = fold.exact(torch.rand(fold.linear.in_features, generator=generator) + 0.5)
            fold.divide(factors)
            fold.linear.stored["weight"].mul_(factors)
        gain = layer.attention_norm.weight
        torch.testing.assert_close(gain, gain.bfloat16().float(), rtol=2e-7, atol=0)
    torch.testing.assert_close(torch.cat(run(built, prompts, (50,))), before, rtol=1e-3, atol=1e-3)


def test_no_fold_where_a_router_or_the_residual_reads_the_norm(tmp_path: Path) -> None:
    config = CONFIGS["MixtralForCausalLM"]()
    built = load_model(write_checkpoint(tmp_path, "MixtralForCausalLM", config), CATALOG)
    decoder = next(module for module in built.module.modules() if isinstance(module, Decoder))
    layer = decoder.layers[0]
    assert isinstance(layer, DecoderLayer)
    assert [fold.linear for fold in find_folds(layer, torch.float32)] == [layer.attention.qkv]
    layer.residual = "norm_after"
    assert find_folds(layer, torch.float32) == ()


def test_what_cannot_be_calibrated_is_refused(llama: Path) -> None:
    built = load_model(llama, CATALOG)
    with pytest.raises(RequestError, match="29 tokens, fewer than a window of 30"):
        calibrate(built.module, built.build, _tokens(29), 30, find_scheme("w4a_fp8"), gain_dtype=torch.float32)
    with pytest.raises(ConfigError, match="does not serve the precision 'dense'"):
        find_scheme("dense")
