"""What the config of every architecture here is: a decoder stack, its feed-forward layers, and the norms' eps."""

from __future__ import annotations

from dataclasses import dataclass

from plexor.api import CheckpointError, DecoderConfig, FeedForwardConfig, Fields


@dataclass(frozen=True, slots=True)
class StackConfig:
    """A ModelConfig."""

    decoder: DecoderConfig
    feed_forward: FeedForwardConfig
    norm_eps: float

    @property
    def vocab_size(self) -> int:
        return self.decoder.vocab_size

    @property
    def max_positions(self) -> int:
        return self.decoder.max_positions


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
