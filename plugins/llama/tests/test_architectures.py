"""Every architecture against transformers: logits at each position and greedy tokens, on checkpoints of odd shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from plexor.testing.architecture import check_architecture, check_generation
from plexor.testing.checkpoints import write_checkpoint
from plexor_llama import plugin

ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# A vocabulary that is no multiple of 64, three query heads to a KV head, and head size 80, which is not the hidden size
# divided by the heads.
GROUPED: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 80,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    **ENDS,
}
GPT2: dict[str, Any] = {"vocab_size": 307, "n_embd": 160, "n_head": 2, "n_layer": 3, "n_positions": 64, **ENDS}
NEOX: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 160,
    "num_attention_heads": 2,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    **ENDS,
}
OPT: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 160,
    "num_attention_heads": 2,
    "ffn_dim": 100,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 160,
    **ENDS,
}
BASES = {
    "LlamaForCausalLM": (transformers.LlamaConfig, GROUPED),
    "MistralForCausalLM": (transformers.MistralConfig, GROUPED),
    "Qwen2ForCausalLM": (transformers.Qwen2Config, GROUPED),
    "Qwen3ForCausalLM": (transformers.Qwen3Config, GROUPED),
    "GPT2LMHeadModel": (transformers.GPT2Config, GPT2),
    "GPTNeoXForCausalLM": (transformers.GPTNeoXConfig, NEOX),
    "OPTForCausalLM": (transformers.OPTConfig, OPT),
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
VARIANTS = [
    ("LlamaForCausalLM", {}),
    ("LlamaForCausalLM", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("LlamaForCausalLM", {"head_dim": None, "num_key_value_heads": None, "hidden_act": "gelu"}),
    ("LlamaForCausalLM", {"rope_parameters": LINEAR}),
    ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    ("LlamaForCausalLM", {"rope_parameters": YARN}),
    ("MistralForCausalLM", {"sliding_window": 6}),
    ("MistralForCausalLM", {"sliding_window": None, "tie_word_embeddings": True}),
    ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 6, "layer_types": LAYER_TYPES}),
    ("Qwen3ForCausalLM", {}),
    ("Qwen3ForCausalLM", {"attention_bias": True, "tie_word_embeddings": True}),
    ("GPT2LMHeadModel", {}),
    ("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "n_inner": 100}),
    ("GPT2LMHeadModel", {"scale_attn_weights": False, "tie_word_embeddings": False, "activation_function": "relu"}),
    ("GPTNeoXForCausalLM", {}),
    ("GPTNeoXForCausalLM", {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True}),
    (
        "GPTNeoXForCausalLM",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e3, "partial_rotary_factor": 0.5}},
    ),
    ("OPTForCausalLM", {}),
    ("OPTForCausalLM", {"do_layer_norm_before": False, "word_embed_proj_dim": 96}),
    ("OPTForCausalLM", {"enable_bias": False, "_remove_final_layer_norm": True, "tie_word_embeddings": False}),
]


def make(folder: Path, architecture: str, changes: dict[str, Any]) -> Path:
    config, base = BASES[architecture]
    return write_checkpoint(folder, architecture, config(**{**base, **changes}), seed=len(changes))


def name_of(case: str | dict[str, Any]) -> str:
    return case if isinstance(case, str) else ",".join(f"{name}={value}" for name, value in case.items()) or "plain"


def test_every_architecture_is_tried() -> None:
    assert {spec.name for spec in plugin.architectures()} == set(BASES)


@pytest.mark.parametrize(("architecture", "changes"), VARIANTS, ids=name_of)
def test_logits_equal_those_of_transformers(architecture: str, changes: dict[str, Any], tmp_path: Path) -> None:
    check_architecture(make(tmp_path, architecture, changes), reach=60)


@pytest.mark.parametrize("architecture", BASES)
def test_greedy_tokens_equal_those_of_transformers(architecture: str, tmp_path: Path) -> None:
    check_generation(make(tmp_path, architecture, {}))


def test_rotary_settings_in_the_older_fields_mean_the_same(tmp_path: Path) -> None:
    folder = make(tmp_path, "LlamaForCausalLM", {"rope_parameters": YARN})
    raw = json.loads((folder / "config.json").read_text())
    settings = raw.pop("rope_parameters")
    raw["rope_theta"] = settings.pop("rope_theta")
    raw["rope_scaling"] = {"type": settings.pop("rope_type"), **settings}
    (folder / "config.json").write_text(json.dumps(raw))
    check_architecture(folder)
