"""What the architectures here share: a decoder whose feed-forward layers are experts or dense, and its weight rules."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

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
    Rows,
    Rule,
    Slots,
    WeightRule,
    read_rotary,
)
from plexor_moe.experts import Experts, ExpertsConfig

LAYER = "model.layers.{layer}"
FEED_FORWARD = "layers.{layer}.feed_forward"


@dataclass(frozen=True, slots=True)
class StackConfig:
    """A ModelConfig. feed_forward: one for each layer, of experts or dense."""

    decoder: DecoderConfig
    feed_forward: tuple[ExpertsConfig | FeedForwardConfig, ...]
    norm_eps: float

    @property
    def vocab_size(self) -> int:
        return self.decoder.vocab_size

    @property
    def max_positions(self) -> int:
        return self.decoder.max_positions


def model(config: StackConfig, build: Build) -> Decoder:
    """Every architecture here is this stack; their configs and weight rules set them apart."""

    def feed_forward(layer: int) -> nn.Module:
        chosen = config.feed_forward[layer]
        if isinstance(chosen, ExpertsConfig):
            return Experts(build, chosen)
        return GatedFeedForward(build, chosen)

    slots = Slots(feed_forward=feed_forward, norm=lambda size: RMSNorm(build, size, config.norm_eps))
    return Decoder(build, config.decoder, slots)


def read_attention(fields: Fields) -> AttentionConfig:
    """Rotary attention without biases, norms and windows."""
    num_heads = fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    if fields.raw.get("head_dim") is None and hidden_size % num_heads:
        raise CheckpointError(
            f"config.json shares {hidden_size} hidden features between {num_heads} attention heads, which does not go "
            "evenly: correct the file, or state head_dim"
        )
    size = fields.integer("head_dim", hidden_size // num_heads)
    return AttentionConfig(
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_size=size,
        scale=size**-0.5,
        rotary=read_rotary(fields.raw, size, fields.integer("max_position_embeddings")),
    )


def read_decoder(fields: Fields, attention: AttentionConfig) -> DecoderConfig:
    """A stack of layers that attend alike."""
    assert attention.rotary is not None
    return DecoderConfig(
        vocab_size=fields.integer("vocab_size"),
        max_positions=attention.rotary.num_positions,
        hidden_size=attention.hidden_size,
        attention=(attention,) * fields.integer("num_hidden_layers"),
        tied_head=fields.flag("tie_word_embeddings", False),
    )


def decoder_rules(config: StackConfig) -> tuple[WeightRule, ...]:
    """All but the feed-forward layers."""
    attention = "layers.{layer}.attention"
    return (
        Rule("model.embed_tokens", "embedding"),
        Rule(f"{LAYER}.self_attn.q_proj", f"{attention}.qkv", part=0),
        Rule(f"{LAYER}.self_attn.k_proj", f"{attention}.qkv", part=1),
        Rule(f"{LAYER}.self_attn.v_proj", f"{attention}.qkv", part=2),
        Rule(f"{LAYER}.self_attn.o_proj", f"{attention}.out"),
        Rule(f"{LAYER}.input_layernorm", "layers.{layer}.attention_norm"),
        Rule(f"{LAYER}.post_attention_layernorm", "layers.{layer}.feed_forward_norm"),
        Rule("model.norm", "norm"),
        Ignore("lm_head.weight") if config.decoder.tied_head else Rule("lm_head", "head"),
        Ignore(f"{LAYER}.self_attn.rotary_emb.inv_freq"),
    )


def expert_rules(source: str, gate: str, up: str, down: str) -> tuple[WeightRule, ...]:
    """Experts in tensors of their own below `source`, by the names that gate, up and down have there."""
    each = f"{LAYER}.{source}.experts.{{expert}}"
    return (
        Rule(f"{LAYER}.{source}.gate", f"{FEED_FORWARD}.router.linear"),
        Rule(f"{each}.{gate}", f"{FEED_FORWARD}.experts.gate_up", part=0, group="expert"),
        Rule(f"{each}.{up}", f"{FEED_FORWARD}.experts.gate_up", part=1, group="expert"),
        Rule(f"{each}.{down}", f"{FEED_FORWARD}.experts.down", group="expert"),
    )


def fused_expert_rules(config: StackConfig) -> tuple[WeightRule, ...]:
    """All experts of a layer in two tensors, gate_up_proj [E, 2 I, H] and down_proj [E, H, I]: what transformers 5
    keeps in memory, and saves when it is told not to restore the published layout.
    """
    stacks = {layer.intermediate_size for layer in config.feed_forward if isinstance(layer, ExpertsConfig)}
    fused: list[WeightRule] = []
    for size in stacks:
        for part in (0, 1):
            rows = Rows(part * size, (part + 1) * size, 2 * size)
            fused.append(_stacked("gate_up_proj", "gate_up", part, (rows,)))
        fused.append(_stacked("down_proj", "down", 0, ()))
    return tuple(fused)


def _stacked(source: str, target: str, part: int, steps: tuple[Rows, ...]) -> Rule:
    return Rule(
        f"{LAYER}.mlp.experts.{source}",
        f"{FEED_FORWARD}.experts.{target}",
        part=part,
        stacked=True,
        tensor="weight",
        steps=steps,
    )
