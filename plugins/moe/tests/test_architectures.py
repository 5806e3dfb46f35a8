"""Each architecture against transformers: logits at every position and greedy tokens, on checkpoints of odd shapes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from plexor import Engine, EngineConfig, SamplingParams
from plexor.api import Catalog, CheckpointError, GroupedLinear, Linear
from plexor.testing.architecture import (
    check_architecture,
    check_generation,
    expected_tokens,
    load_model,
    random_prompts,
    run,
)
from plexor.testing.checkpoints import write_checkpoint
from plexor_moe import mixtral, plugin, qwen3_moe

CATALOG = Catalog.load()
PRECISIONS = [name for name, spec in CATALOG.precisions.items() if not spec.selective]
VOCAB_SIZE = 307
# A vocabulary that is no multiple of 64, three query heads to a KV head, and head size 80, which is not the hidden size
# divided by the heads.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 80,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MIXTRAL: dict[str, Any] = {**COMMON, "intermediate_size": 33, "num_local_experts": 3, "num_experts_per_tok": 2}
QWEN3: dict[str, Any] = {
    **COMMON,
    "intermediate_size": 70,
    "moe_intermediate_size": 33,
    "num_experts": 5,
    "num_experts_per_tok": 3,
}
BASES: Mapping[str, tuple[Any, dict[str, Any]]] = {
    "MixtralForCausalLM": (transformers.MixtralConfig, MIXTRAL),
    "Qwen3MoeForCausalLM": (transformers.Qwen3MoeConfig, QWEN3),
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("MixtralForCausalLM", {}),
    ("MixtralForCausalLM", {"num_local_experts": 8, "tie_word_embeddings": True, "sliding_window": 6}),
    ("MixtralForCausalLM", {"num_experts_per_tok": 1, "head_dim": None, "num_key_value_heads": 6}),
    ("MixtralForCausalLM", {"num_experts_per_tok": 3, "hidden_act": "gelu", "intermediate_size": 1}),
    ("Qwen3MoeForCausalLM", {}),
    ("Qwen3MoeForCausalLM", {"norm_topk_prob": True, "tie_word_embeddings": True, "attention_bias": True}),
    ("Qwen3MoeForCausalLM", {"mlp_only_layers": [1], "num_experts": 8, "num_experts_per_tok": 2}),
    ("Qwen3MoeForCausalLM", {"decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 6}),
    ("Qwen3MoeForCausalLM", {"mlp_only_layers": [0, 1, 2]}),
]


def make(folder: Path, architecture: str, changes: Mapping[str, Any]) -> Path:
    config, base = BASES[architecture]
    return write_checkpoint(folder, architecture, config(**{**base, **changes}), seed=len(changes))


def name_of(case: object) -> str:
    if isinstance(case, dict):
        return ",".join(f"{name}={value}" for name, value in case.items()) or "plain"
    return str(case)


def test_every_architecture_is_tried() -> None:
    assert {spec.name for spec in plugin.architectures()} == set(BASES)


@pytest.mark.parametrize(("architecture", "changes"), VARIANTS, ids=name_of)
def test_logits_equal_those_of_transformers(architecture: str, changes: dict[str, Any], tmp_path: Path) -> None:
    check_architecture(make(tmp_path, architecture, changes), CATALOG, reach=60)


@pytest.mark.parametrize("architecture", BASES)
def test_greedy_tokens_equal_those_of_transformers(architecture: str, tmp_path: Path) -> None:
    check_generation(make(tmp_path, architecture, {}), CATALOG)


@pytest.mark.parametrize("architecture", BASES)
def test_the_layout_of_transformers_5_holds_the_same_model(architecture: str, tmp_path: Path) -> None:
    published = make(tmp_path / "published", architecture, {})
    fused = tmp_path / "fused"
    oracle = getattr(transformers, architecture).from_pretrained(published, dtype=torch.float32)
    oracle.save_pretrained(fused, save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in load_file(fused / "model.safetensors"))
    prompts = random_prompts(VOCAB_SIZE, (9, 2))
    expected = run(load_model(published, CATALOG), prompts, (7,))
    actual = run(load_model(fused, CATALOG), prompts, (7,))
    assert all(torch.equal(left, right) for left, right in zip(expected, actual, strict=True))


@pytest.mark.parametrize("architecture", BASES)
def test_two_ranks_write_the_same_tokens(architecture: str, tmp_path: Path) -> None:
    size = "intermediate_size" if architecture == "MixtralForCausalLM" else "moe_intermediate_size"
    folder = make(tmp_path, architecture, {size: 34})
    prompts = random_prompts(VOCAB_SIZE, (3, 11))
    config = EngineConfig(model=str(folder), dtype="float32", device="cpu", num_blocks=16, tensor_parallel=2)
    with Engine(config=config) as engine:
        answers = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=8))
    assert [answer.token_ids for answer in answers] == expected_tokens(folder, prompts, 8)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("architecture", BASES)
def test_a_precision_equals_the_dense_model_of_its_weights(architecture: str, precision: str, tmp_path: Path) -> None:
    """But for how it rounds activations; every token takes every expert, so that no choice hangs on that."""
    every = BASES[architecture][0](**BASES[architecture][1]).num_local_experts
    folder = make(tmp_path, architecture, {"num_experts_per_tok": every})
    rounded, reference = load_model(folder, CATALOG, precision=precision), load_model(folder, CATALOG)
    for name, module in rounded.module.named_modules():
        if isinstance(module, Linear | GroupedLinear):
            dense = reference.module.get_submodule(name)
            assert isinstance(dense, Linear | GroupedLinear)
            # The router's format is the built-in one in every precision.
            kept = rounded.build.dense if name.endswith("router.linear") else rounded.build.format
            dense.stored["weight"].copy_(kept.dense(module.stored))
    prompts = random_prompts(VOCAB_SIZE)
    expected, actual = (torch.cat(run(built, prompts, (7, 1))) for built in (reference, rounded))
    if precision == "dense":
        assert torch.equal(actual, expected)
    distance = (actual - expected).square().mean().sqrt()
    assert float(distance) < 0.2 * float(expected.std())


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    folder = make(tmp_path, "MixtralForCausalLM", {})
    lost = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"].pop(lost)
    tensors = load_file(file)
    del tensors[lost]
    save_file(tensors, file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors .*layers\.1\.block_sparse_moe\.experts\.2\.w3\.weight"):
        load_model(folder, CATALOG)


def test_an_expert_too_many_is_named(tmp_path: Path) -> None:
    folder = make(tmp_path, "MixtralForCausalLM", {})
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "num_local_experts": 2}))
    with pytest.raises(CheckpointError, match=r"no place in it .*experts\.2"):
        load_model(folder, CATALOG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_local_experts": 1, "num_experts_per_tok": 1}, "num_local_experts = 1.* at least 2 experts"),
        ({"num_experts_per_tok": 4}, "num_experts_per_tok = 4 experts of num_local_experts = 3"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok = 0"),
        ({"head_dim": None, "num_attention_heads": 5}, "48 hidden features between 5 attention heads"),
        ({"sliding_window": "wide"}, "sliding_window = 'wide'"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        mixtral.config({**MIXTRAL, **changes})


def test_experts_are_counted_under_either_name() -> None:
    published = qwen3_moe.config(QWEN3)
    renamed = {**QWEN3, "num_local_experts": QWEN3["num_experts"]}
    del renamed["num_experts"]
    assert qwen3_moe.config(renamed) == published


def test_dense_layers_must_be_listed_by_number() -> None:
    with pytest.raises(CheckpointError, match="mlp_only_layers = 'all'"):
        qwen3_moe.config({**QWEN3, "mlp_only_layers": "all"})
