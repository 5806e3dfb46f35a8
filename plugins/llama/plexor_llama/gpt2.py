"""GPT-2 (Radford et al., 2019): learned positions, layer norms, biases everywhere, weights stored as [in, out]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from plexor.api import (
    AttentionConfig,
    DecoderConfig,
    FeedForwardConfig,
    Fields,
    Ignore,
    Rows,
    Rule,
    Transpose,
    WeightRule,
    under,
)
from plexor_llama.stack import StackConfig, multi_head, refuse


def config(raw: Mapping[str, Any]) -> StackConfig:
    """GPT2LMHeadModel. `reorder_and_upcast_attn` needs nothing: scores and softmax are float32 here in any case."""
    fields = Fields(raw)
    refuse(fields, "add_cross_attention", unless=False)
    hidden_size, num_positions = fields.integer("n_embd"), fields.integer("n_positions")
    return StackConfig(
        decoder=DecoderConfig(
            vocab_size=fields.integer("vocab_size"),
            max_positions=num_positions,
            hidden_size=hidden_size,
            attention=tuple(_attention(fields, index) for index in range(fields.integer("n_layer"))),
            tied_head=fields.flag("tie_word_embeddings", True),
            learned_positions=num_positions,
        ),
        feed_forward=FeedForwardConfig(
            hidden_size=hidden_size,
            intermediate_size=fields.integer("n_inner", 4 * hidden_size),
            activation=fields.text("activation_function", "gelu_new"),
            bias=True,
        ),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
    )


def weights(config: StackConfig) -> tuple[WeightRule, ...]:
    """The first checkpoints were published without the prefix that later ones have."""
    stack = _stack(config.decoder.hidden_size)
    head = Ignore("lm_head.weight") if config.decoder.tied_head else Rule("lm_head", "head")
    return (*under("transformer", "", stack), *stack, head)


def _stack(hidden_size: int) -> tuple[WeightRule, ...]:
    layer, target = "h.{layer}", "layers.{layer}"
    turned = (Transpose(),)
    fused = tuple(
        Rule(
            f"{layer}.attn.c_attn",
            f"{target}.attention.qkv",
            part=part,
            steps=(Transpose(), Rows(part * hidden_size, (part + 1) * hidden_size, 3 * hidden_size)),
        )
        for part in range(3)
    )
    return (
        Rule("wte", "embedding"),
        Rule("wpe", "positions"),
        *fused,
        Rule(f"{layer}.attn.c_proj", f"{target}.attention.out", steps=turned),
        Rule(f"{layer}.ln_1", f"{target}.attention_norm"),
        Rule(f"{layer}.mlp.c_fc", f"{target}.feed_forward.up", steps=turned),
        Rule(f"{layer}.mlp.c_proj", f"{target}.feed_forward.down", steps=turned),
        Rule(f"{layer}.ln_2", f"{target}.feed_forward_norm"),
        Rule("ln_f", "norm"),
        Ignore(f"{layer}.attn.bias"),
        Ignore(f"{layer}.attn.masked_bias"),
    )


def _attention(fields: Fields, index: int) -> AttentionConfig:
    attention = multi_head(fields.integer("n_embd"), fields.integer("n_head"), bias=True)
    scale = attention.scale if fields.flag("scale_attn_weights", True) else 1.0
    if fields.flag("scale_attn_by_inverse_layer_idx", False):
        scale /= index + 1
    return replace(attention, scale=scale)
