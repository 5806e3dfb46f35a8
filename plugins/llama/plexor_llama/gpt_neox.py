"""GPT-NeoX (Black et al., 2022) and Pythia: partial rotary positions, parallel residual, q, k, v fused head by head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from plexor.api import (
    DecoderConfig,
    FeedForwardConfig,
    Fields,
    Ignore,
    Interleaved,
    Rule,
    WeightRule,
    read_rotary,
)
from plexor_llama.stack import StackConfig, multi_head


def config(raw: Mapping[str, Any]) -> StackConfig:
    """GPTNeoXForCausalLM"""
    fields = Fields(raw)
    hidden_size = fields.integer("hidden_size")
    bias = fields.flag("attention_bias", True)
    heads = multi_head(hidden_size, fields.integer("num_attention_heads"), bias=bias)
    # A quarter of each head turns unless the file says otherwise.
    rotary = read_rotary({"rotary_pct": 0.25, **raw}, heads.head_size, fields.integer("max_position_embeddings"))
    return StackConfig(
        decoder=DecoderConfig(
            vocab_size=fields.integer("vocab_size"),
            max_positions=rotary.num_positions,
            hidden_size=hidden_size,
            attention=(replace(heads, rotary=rotary),) * fields.integer("num_hidden_layers"),
            tied_head=fields.flag("tie_word_embeddings", False),
            residual="parallel" if fields.flag("use_parallel_residual", True) else "sequential",
        ),
        feed_forward=FeedForwardConfig(
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size"),
            activation=fields.text("hidden_act", "gelu"),
            bias=True,
        ),
        norm_eps=fields.number("layer_norm_eps", 1e-5),
    )


def weights(config: StackConfig) -> tuple[WeightRule, ...]:
    layer, target = "gpt_neox.layers.{layer}", "layers.{layer}"
    size = config.decoder.attention[0].head_size
    fused = tuple(
        Rule(
            f"{layer}.attention.query_key_value",
            f"{target}.attention.qkv",
            part=part,
            steps=(Interleaved(index=part, of=3, unit=size),),
        )
        for part in range(3)
    )
    return (
        Rule("gpt_neox.embed_in", "embedding"),
        *fused,
        Rule(f"{layer}.attention.dense", f"{target}.attention.out"),
        Rule(f"{layer}.input_layernorm", f"{target}.attention_norm"),
        Rule(f"{layer}.mlp.dense_h_to_4h", f"{target}.feed_forward.up"),
        Rule(f"{layer}.mlp.dense_4h_to_h", f"{target}.feed_forward.down"),
        Rule(f"{layer}.post_attention_layernorm", f"{target}.feed_forward_norm"),
        Rule("gpt_neox.final_layer_norm", "norm"),
        Ignore("embed_out.weight") if config.decoder.tied_head else Rule("embed_out", "head"),
        Ignore(f"{layer}.attention.bias"),
        Ignore(f"{layer}.attention.masked_bias"),
        Ignore(f"{layer}.attention.rotary_emb.inv_freq"),
    )
