"""Qwen3MoeForCausalLM (Yang et al., 2025): normed queries and keys; chosen layers are dense instead of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from plexor.api import CheckpointError, FeedForwardConfig, Fields, Rule, WeightRule
from plexor_moe.experts import ExpertsConfig
from plexor_moe.router import read_router
from plexor_moe.stack import (
    FEED_FORWARD,
    LAYER,
    StackConfig,
    decoder_rules,
    expert_rules,
    fused_expert_rules,
    read_attention,
    read_decoder,
)


def config(raw: Mapping[str, Any]) -> StackConfig:
    fields = Fields({"num_key_value_heads": 4, "intermediate_size": 6144, **raw})
    eps = fields.number("rms_norm_eps", 1e-6)
    bias = fields.flag("attention_bias", False)
    window = fields.integer("sliding_window", 4096) if fields.flag("use_sliding_window", False) else None
    attention = replace(read_attention(fields), qkv_bias=bias, out_bias=bias, qk_norm_eps=eps, window=window)
    decoder = read_decoder(fields, attention)
    activation = fields.text("hidden_act", "silu")
    experts = ExpertsConfig(
        hidden_size=decoder.hidden_size,
        intermediate_size=fields.integer("moe_intermediate_size"),
        activation=activation,
        router=read_router(fields, renormalise=fields.flag("norm_topk_prob", False)),
    )
    dense = FeedForwardConfig(decoder.hidden_size, fields.integer("intermediate_size"), activation)
    has_experts = _layers_with_experts(fields, decoder.num_layers)
    layers = tuple(experts if index in has_experts else dense for index in range(decoder.num_layers))
    return StackConfig(decoder, layers, eps)


def weights(config: StackConfig) -> tuple[WeightRule, ...]:
    """In the published layout and in transformers 5's own."""
    dense = f"{LAYER}.mlp"
    return (
        *decoder_rules(config),
        Rule(f"{LAYER}.self_attn.q_norm", "layers.{layer}.attention.q_norm"),
        Rule(f"{LAYER}.self_attn.k_norm", "layers.{layer}.attention.k_norm"),
        *expert_rules("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
        *fused_expert_rules(config),
        Rule(f"{dense}.gate_proj", f"{FEED_FORWARD}.gate_up", part=0),
        Rule(f"{dense}.up_proj", f"{FEED_FORWARD}.gate_up", part=1),
        Rule(f"{dense}.down_proj", f"{FEED_FORWARD}.down"),
    )


def _layers_with_experts(fields: Fields, num_layers: int) -> frozenset[int]:
    """Every decoder_sparse_step-th layer, without those that mlp_only_layers lists."""
    step = fields.integer("decoder_sparse_step", 1)
    dense = fields.raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise CheckpointError(
            f"config.json has mlp_only_layers = {dense!r}, which must be a list of layer numbers: correct the file"
        )
    return frozenset(range(step - 1, num_layers, step)) - frozenset(dense)
