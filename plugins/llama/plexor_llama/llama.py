"""The LLaMA family: gated feed-forward, RMS norms, rotary positions, grouped heads of keys and values.

LLaMA (Touvron et al., 2023), Mistral (Jiang et al., 2023), Qwen2 (Yang et al., 2024), Qwen3 (Yang et al., 2025). What
sets the members apart is which layers have biases, whether queries and keys are normed, and which layers see a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from plexor.api import (
    AttentionConfig,
    Build,
    CheckpointError,
    Decoder,
    DecoderConfig,
    FeedForwardConfig,
    Fields,
    GatedFeedForward,
    Ignore,
    RMSNorm,
    Rule,
    Slots,
    WeightRule,
    read_rotary,
)
from plexor_llama.stack import StackConfig, head_size


def llama(raw: Mapping[str, Any]) -> StackConfig:
    """LlamaForCausalLM"""
    fields = Fields(raw)
    bias = fields.flag("attention_bias", False)
    attention = replace(_attention(fields), qkv_bias=bias, out_bias=bias)
    return _stack(fields, attention, feed_forward_bias=fields.flag("mlp_bias", False))


def mistral(raw: Mapping[str, Any]) -> StackConfig:
    """MistralForCausalLM"""
    fields = Fields(raw)
    window = None if raw.get("sliding_window") is None else fields.integer("sliding_window")
    return _stack(fields, replace(_attention(fields), window=window))


def qwen2(raw: Mapping[str, Any]) -> StackConfig:
    """Qwen2ForCausalLM"""
    fields = Fields(raw)
    return _windowed(fields, _stack(fields, replace(_attention(fields), qkv_bias=True)))


def qwen3(raw: Mapping[str, Any]) -> StackConfig:
    """Qwen3ForCausalLM"""
    fields = Fields({"head_dim": 128, **raw})
    bias = fields.flag("attention_bias", False)
    eps = fields.number("rms_norm_eps", 1e-6)
    attention = replace(_attention(fields), qkv_bias=bias, out_bias=bias, qk_norm_eps=eps)
    return _windowed(fields, _stack(fields, attention))


def model(config: StackConfig, build: Build) -> Decoder:
    slots = Slots(
        feed_forward=lambda _: GatedFeedForward(build, config.feed_forward),
        norm=lambda size: RMSNorm(build, size, config.norm_eps),
    )
    return Decoder(build, config.decoder, slots)


def weights(config: StackConfig) -> tuple[WeightRule, ...]:
    layer, target = "model.layers.{layer}", "layers.{layer}"
    return (
        Rule("model.embed_tokens", "embedding"),
        Rule(f"{layer}.self_attn.q_proj", f"{target}.attention.qkv", part=0),
        Rule(f"{layer}.self_attn.k_proj", f"{target}.attention.qkv", part=1),
        Rule(f"{layer}.self_attn.v_proj", f"{target}.attention.qkv", part=2),
        Rule(f"{layer}.self_attn.o_proj", f"{target}.attention.out"),
        Rule(f"{layer}.self_attn.q_norm", f"{target}.attention.q_norm"),
        Rule(f"{layer}.self_attn.k_norm", f"{target}.attention.k_norm"),
        Rule(f"{layer}.input_layernorm", f"{target}.attention_norm"),
        Rule(f"{layer}.mlp.gate_proj", f"{target}.feed_forward.gate_up", part=0),
        Rule(f"{layer}.mlp.up_proj", f"{target}.feed_forward.gate_up", part=1),
        Rule(f"{layer}.mlp.down_proj", f"{target}.feed_forward.down"),
        Rule(f"{layer}.post_attention_layernorm", f"{target}.feed_forward_norm"),
        Rule("model.norm", "norm"),
        Ignore("lm_head.weight") if config.decoder.tied_head else Rule("lm_head", "head"),
        Ignore(f"{layer}.self_attn.rotary_emb.inv_freq"),
        Ignore("model.rotary_emb.inv_freq"),
    )


def _attention(fields: Fields) -> AttentionConfig:
    """Without biases, norms and windows."""
    num_heads = fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    size = fields.integer("head_dim") if fields.raw.get("head_dim") else head_size(hidden_size, num_heads)
    return AttentionConfig(
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_size=size,
        scale=size**-0.5,
        rotary=read_rotary(fields.raw, size, fields.integer("max_position_embeddings")),
    )


def _stack(fields: Fields, attention: AttentionConfig, *, feed_forward_bias: bool = False) -> StackConfig:
    assert attention.rotary is not None
    return StackConfig(
        decoder=DecoderConfig(
            vocab_size=fields.integer("vocab_size"),
            max_positions=attention.rotary.num_positions,
            hidden_size=attention.hidden_size,
            attention=(attention,) * fields.integer("num_hidden_layers"),
            tied_head=fields.flag("tie_word_embeddings", False),
        ),
        feed_forward=FeedForwardConfig(
            hidden_size=attention.hidden_size,
            intermediate_size=fields.integer("intermediate_size"),
            activation=fields.text("hidden_act", "silu"),
            bias=feed_forward_bias,
        ),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
    )


def _windowed(fields: Fields, stack: StackConfig) -> StackConfig:
    """The stack with a window in those layers that `layer_types`, or in older files `max_window_layers`, give one."""
    if not fields.flag("use_sliding_window", False) or fields.raw.get("sliding_window") is None:
        return stack
    window = fields.integer("sliding_window")
    layers = stack.decoder.attention
    kinds = fields.raw.get("layer_types")
    if kinds is None:
        first = fields.integer("max_window_layers", 28, least=0)
        kinds = ["full_attention" if index < first else "sliding_attention" for index in range(len(layers))]
    if (
        not isinstance(kinds, list)
        or len(kinds) != len(layers)
        or not {"full_attention", "sliding_attention"} >= {*kinds}
    ):
        raise CheckpointError(
            f"config.json has layer_types = {kinds!r}, which must name full_attention or sliding_attention for each of "
            f"the {len(layers)} layers: correct the file"
        )
    attention = tuple(
        replace(layer, window=window if kind == "sliding_attention" else None)
        for layer, kind in zip(layers, kinds, strict=True)
    )
    return replace(stack, decoder=replace(stack.decoder, attention=attention))
