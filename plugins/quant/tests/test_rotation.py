"""Rotations folded into weights: matrices that are orthogonal, logits that stay, architectures that are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from plexor.api import Catalog, ConfigError, Decoder
from plexor.testing.architecture import load_model, random_prompts, run
from plexor.testing.checkpoints import write_checkpoint
from plexor_quant.calibration.rotation import hadamard, orthogonal, rotate

CATALOG = Catalog.load()
WHOLE = 1 << 30
VOCAB_SIZE = 307
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    **ENDS,
}
# Hidden sizes with and without a Hadamard matrix of their own, and head sizes of both kinds.
SERVED: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, hidden_size=48, head_dim=16, attention_bias=True),
    "tied": lambda: transformers.LlamaConfig(**SIZES, hidden_size=42, head_dim=10, tie_word_embeddings=True),
    "same sizes": lambda: transformers.LlamaConfig(**SIZES | {"intermediate_size": 60}, hidden_size=60, head_dim=12),
    "norms of queries": lambda: transformers.Qwen3Config(**SIZES, hidden_size=40, head_dim=20),
    "experts": lambda: transformers.MixtralConfig(
        **SIZES, hidden_size=60, head_dim=10, num_local_experts=5, num_experts_per_tok=2
    ),
}
REFUSED: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=48, n_head=2, n_layer=1, n_positions=64, **ENDS
    ),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        ffn_dim=37,
        num_attention_heads=2,
        num_hidden_layers=1,
        word_embed_proj_dim=48,
        max_position_embeddings=64,
        **ENDS,
    ),
}


def _write(folder: Path, config: transformers.PretrainedConfig) -> None:
    name = type(config).__name__.removesuffix("Config")
    write_checkpoint(folder, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM", config, seed=5)


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 24, 28, 36, 64, 80, 96, 112, 256, 3 * 256])
def test_hadamard_matrices_are_orthogonal(size: int) -> None:
    found = hadamard(size)
    assert found is not None
    assert bool((found.abs() == 1).all())
    assert torch.equal(found @ found.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [3, 7, 10, 42])
def test_sizes_without_one_get_another_orthogonal_matrix(size: int) -> None:
    assert hadamard(size) is None
    found = orthogonal(size, torch.Generator().manual_seed(1))
    torch.testing.assert_close(found @ found.T, torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("name", SERVED)
def test_logits_stay_and_weights_do_not(name: str, tmp_path: Path) -> None:
    _write(tmp_path, SERVED[name]())
    prompts = random_prompts(VOCAB_SIZE, seed=6)
    built = load_model(tmp_path, CATALOG)
    expected = run(built, prompts, (WHOLE,))
    before = {key: tensor.clone() for key, tensor in built.module.state_dict().items()}
    rotate(built.module, built.build, seed=7)
    for found, logits in zip(run(built, prompts, (WHOLE,)), expected, strict=True):
        assert float(logits.abs().max()) > 1e-3
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-4)
    after = built.module.state_dict()
    same = [key for key in before if torch.equal(before[key], after[key])]
    assert all("q_norm" in key or "k_norm" in key for key in same), same


def test_a_feature_that_stands_out_is_spread(tmp_path: Path) -> None:
    _write(tmp_path, SERVED["llama"]())
    built = load_model(tmp_path, CATALOG)
    decoder = next(part for part in built.module.modules() if isinstance(part, Decoder))
    decoder.embedding.weight[:, 11] *= 100
    before = decoder.embedding.weight.abs().amax(dim=1) / decoder.embedding.weight.square().mean(dim=1).sqrt()
    rotate(built.module, built.build)
    after = decoder.embedding.weight.abs().amax(dim=1) / decoder.embedding.weight.square().mean(dim=1).sqrt()
    assert float(after.mean()) < 0.5 * float(before.mean())


@pytest.mark.parametrize("name", REFUSED)
def test_norms_that_see_a_rotation_are_refused(name: str, tmp_path: Path) -> None:
    _write(tmp_path, REFUSED[name]())
    built = load_model(tmp_path, CATALOG)
    before = {key: tensor.clone() for key, tensor in built.module.state_dict().items()}
    with pytest.raises(ConfigError, match="cannot be rotated, because it has norms of the kind LayerNorm"):
        rotate(built.module, built.build)
    assert all(torch.equal(tensor, before[key]) for key, tensor in built.module.state_dict().items())


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, SERVED["llama"]())
    built = load_model(tmp_path, CATALOG, precision="fp8")
    with pytest.raises(ConfigError, match="because it is not dense"):
        rotate(built.module, built.build)
