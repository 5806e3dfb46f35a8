"""MixtralForCausalLM (Jiang et al., 2024): every feed-forward layer is experts, their weights renormalised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from plexor.api import Fields, Rule, WeightRule
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
    fields = Fields({"num_key_value_heads": 8, "rope_theta": 1e6, **raw})
    window = None if raw.get("sliding_window") is None else fields.integer("sliding_window")
    decoder = read_decoder(fields, replace(read_attention(fields), window=window))
    experts = ExpertsConfig(
        hidden_size=decoder.hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        activation=fields.text("hidden_act", "silu"),
        router=read_router(fields, renormalise=True),
    )
    return StackConfig(decoder, (experts,) * decoder.num_layers, fields.number("rms_norm_eps", 1e-5))


def weights(config: StackConfig) -> tuple[WeightRule, ...]:
    """In the published layout and in transformers 5's own."""
    return (
        *decoder_rules(config),
        *expert_rules("block_sparse_moe", gate="w1", up="w3", down="w2"),
        Rule(f"{LAYER}.mlp.gate", f"{FEED_FORWARD}.router.linear"),
        *fused_expert_rules(config),
    )
