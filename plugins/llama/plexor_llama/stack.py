"""What the architectures here share: their config, the model of the GPT family, and helpers that read configs."""

from __future__ import annotations

from dataclasses import dataclass

from plexor.api import (
    AttentionConfig,
    Build,
    CheckpointError,
    Decoder,
    DecoderConfig,
    FeedForward,
    FeedForwardConfig,
    Fields,
    LayerNorm,
    Slots,
)


@dataclass(frozen=True, slots=True)
class StackConfig:
    """A ModelConfig: a decoder stack, its feed-forward layers, and the norms' eps."""

    decoder: DecoderConfig
    feed_forward: FeedForwardConfig
    norm_eps: float

    @property
    def vocab_size(self) -> int:
        return self.decoder.vocab_size

    @property
    def max_positions(self) -> int:
        return self.decoder.max_positions


def model(config: StackConfig, build: Build) -> Decoder:
    """GPT-2, GPT-NeoX and OPT: feed-forward layers without gates, and layer norms. Their configs set them apart."""
    slots = Slots(
        feed_forward=lambda _: FeedForward(build, config.feed_forward),
        norm=lambda size: LayerNorm(build, size, config.norm_eps),
    )
    return Decoder(build, config.decoder, slots)


def multi_head(hidden_size: int, num_heads: int, *, bias: bool) -> AttentionConfig:
    """Every head with keys and values of its own (Vaswani et al., 2017); CheckpointError if the sizes do not fit."""
    size = head_size(hidden_size, num_heads)
    return AttentionConfig(
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_size=size,
        scale=size**-0.5,
        qkv_bias=bias,
        out_bias=bias,
    )


def head_size(hidden_size: int, num_heads: int) -> int:
    """The size of a head where the heads share the hidden size; CheckpointError if they cannot."""
    if hidden_size % num_heads:
        raise CheckpointError(
            f"config.json shares {hidden_size} hidden features between {num_heads} attention heads, which does not go "
            "evenly: correct the file"
        )
    return hidden_size // num_heads


def refuse(fields: Fields, name: str, *, unless: bool) -> None:
    """CheckpointError where a switch of `config.json` asks for a variant that is not built."""
    if fields.flag(name, unless) is not unless:
        raise CheckpointError(
            f"config.json sets {name} = {str(not unless).lower()}, a variant that plexor-llama does not build: "
            "no published checkpoint that it knows needs it, so check the file or open an issue"
        )
