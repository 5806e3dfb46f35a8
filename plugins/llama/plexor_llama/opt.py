"""OPT (Zhang et al., 2022): learned positions that start at row 2, layer norms before or after, ReLU.

The same functions serve as the language half of models that see: `plexor.api.Build.catalog` gives them by name, and
`plexor.api.under` moves the rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from plexor.api import (
    DecoderConfig,
    FeedForwardConfig,
    Fields,
    Ignore,
    Rule,
    WeightRule,
    under,
)
from plexor_llama.stack import StackConfig, multi_head, refuse

POSITION_OFFSET = 2
NORM_EPS = 1e-5
LIBRARY_DEFAULTS: Mapping[str, int] = MappingProxyType(
    {
        "vocab_size": 50272,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "ffn_dim": 3072,
        "max_position_embeddings": 2048,
    }
)


def config(raw: Mapping[str, Any]) -> StackConfig:
    """OPTForCausalLM. Inside another model's file, fields that have the library's default value may be left out."""
    fields = Fields({**LIBRARY_DEFAULTS, **raw})
    refuse(fields, "layer_norm_elementwise_affine", unless=True)
    hidden_size = fields.integer("hidden_size")
    num_positions = fields.integer("max_position_embeddings")
    bias = fields.flag("enable_bias", True)
    before = fields.flag("do_layer_norm_before", True)
    attention = multi_head(hidden_size, fields.integer("num_attention_heads"), bias=bias)
    return StackConfig(
        decoder=DecoderConfig(
            vocab_size=fields.integer("vocab_size"),
            max_positions=num_positions,
            hidden_size=hidden_size,
            attention=(attention,) * fields.integer("num_hidden_layers"),
            tied_head=fields.flag("tie_word_embeddings", True),
            residual="sequential" if before else "norm_after",
            learned_positions=num_positions,
            position_offset=POSITION_OFFSET,
            embedding_size=fields.integer("word_embed_proj_dim", hidden_size),
            final_norm=before and not fields.flag("_remove_final_layer_norm", False),
        ),
        feed_forward=FeedForwardConfig(
            hidden_size=hidden_size,
            intermediate_size=fields.integer("ffn_dim"),
            activation=fields.text("activation_function", "relu"),
            bias=bias,
        ),
        norm_eps=NORM_EPS,
    )


def weights(config: StackConfig) -> tuple[WeightRule, ...]:
    """Some checkpoints were published without the outer prefix."""
    head = Ignore("lm_head.weight") if config.decoder.tied_head else Rule("lm_head", "head")
    return (*under("model", "", _STACK), *_STACK, head)


_LAYER, _TARGET = "decoder.layers.{layer}", "layers.{layer}"
_STACK: tuple[WeightRule, ...] = (
    Rule("decoder.embed_tokens", "embedding"),
    Rule("decoder.embed_positions", "positions"),
    Rule("decoder.project_in", "project_in"),
    Rule("decoder.project_out", "project_out"),
    Rule(f"{_LAYER}.self_attn.q_proj", f"{_TARGET}.attention.qkv", part=0),
    Rule(f"{_LAYER}.self_attn.k_proj", f"{_TARGET}.attention.qkv", part=1),
    Rule(f"{_LAYER}.self_attn.v_proj", f"{_TARGET}.attention.qkv", part=2),
    Rule(f"{_LAYER}.self_attn.out_proj", f"{_TARGET}.attention.out"),
    Rule(f"{_LAYER}.self_attn_layer_norm", f"{_TARGET}.attention_norm"),
    Rule(f"{_LAYER}.fc1", f"{_TARGET}.feed_forward.up"),
    Rule(f"{_LAYER}.fc2", f"{_TARGET}.feed_forward.down"),
    Rule(f"{_LAYER}.final_layer_norm", f"{_TARGET}.feed_forward_norm"),
    Rule("decoder.final_layer_norm", "norm"),
)
