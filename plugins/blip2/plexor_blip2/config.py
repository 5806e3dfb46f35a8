"""Reads a BLIP-2 `config.json`: the vision tower's, the Q-Former's and the language half's settings.

Published files leave out what equals the defaults of BLIP-2 (Li et al., 2023) and of OPT, so those stand here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from plexor.api import CheckpointError, Fields

LANGUAGE = "OPTForCausalLM"
_OPT: Mapping[str, int] = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "ffn_dim": 3072,
    "num_attention_heads": 12,
    "max_position_embeddings": 2048,
}


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The vision tower: a ViT (Dosovitskiy et al., 2021) over square pictures of image_size pixels a side."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    activation: str
    norm_eps: float
    qkv_bias: bool

    @property
    def num_positions(self) -> int:
        """One for each patch, and one for the class token before them."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclass(frozen=True, slots=True)
class QFormerConfig:
    """The Q-Former; layers 0, cross_every, 2 * cross_every and so on look at the picture.

    picture_size: of the features that they see.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    activation: str
    norm_eps: float
    cross_every: int
    picture_size: int
    num_queries: int


@dataclass(frozen=True, slots=True)
class Blip2Config:
    """A ModelConfig. language: the language half's section, completed, for its own architecture to read.

    image_token_id: of the placeholder tokens, None where config.json does not name it.
    """

    vision: VisionConfig
    qformer: QFormerConfig
    language: Mapping[str, Any]
    language_size: int
    vocab_size: int
    max_positions: int
    image_token_id: int | None


def config(raw: Mapping[str, Any]) -> Blip2Config:
    """CheckpointError where the language half is not OPT, or where sizes do not go together."""
    fields = Fields(raw)
    published = fields.section("text_config").raw
    text = Fields(
        {**_OPT, **{name: value for name, value in published.items() if value is not None}},
        "text_config of config.json",
    )
    kind = text.text("model_type", "opt")
    if kind != "opt":
        raise CheckpointError(
            f"the language half of this BLIP-2 is {kind!r}, and plexor-blip2 serves those with 'opt': "
            "choose a checkpoint such as Salesforce/blip2-opt-2.7b"
        )
    vision = _vision(fields.section("vision_config"))
    vocab_size = text.integer("vocab_size")
    return Blip2Config(
        vision=vision,
        qformer=_qformer(fields.section("qformer_config"), vision, fields.integer("num_query_tokens", 32)),
        language=text.raw,
        language_size=text.integer("hidden_size"),
        vocab_size=vocab_size,
        max_positions=text.integer("max_position_embeddings"),
        image_token_id=_image_token_id(fields, vocab_size),
    )


def _vision(fields: Fields) -> VisionConfig:
    vision = VisionConfig(
        hidden_size=fields.integer("hidden_size", 1408),
        intermediate_size=fields.integer("intermediate_size", 6144),
        num_layers=fields.integer("num_hidden_layers", 39),
        num_heads=fields.integer("num_attention_heads", 16),
        image_size=fields.integer("image_size", 224),
        patch_size=fields.integer("patch_size", 14),
        activation=fields.text("hidden_act", "gelu"),
        norm_eps=fields.number("layer_norm_eps", 1e-6),
        qkv_bias=fields.flag("qkv_bias", True),
    )
    _check_heads("vision_config", vision.hidden_size, vision.num_heads)
    if vision.image_size < vision.patch_size:
        raise CheckpointError(
            f"vision_config of config.json cuts pictures of {vision.image_size} pixels a side into patches of "
            f"{vision.patch_size}, which leaves none: correct the file"
        )
    return vision


def _qformer(fields: Fields, vision: VisionConfig, num_queries: int) -> QFormerConfig:
    qformer = QFormerConfig(
        hidden_size=fields.integer("hidden_size", 768),
        intermediate_size=fields.integer("intermediate_size", 3072),
        num_layers=fields.integer("num_hidden_layers", 12),
        num_heads=fields.integer("num_attention_heads", 12),
        activation=fields.text("hidden_act", "gelu"),
        norm_eps=fields.number("layer_norm_eps", 1e-12),
        cross_every=fields.integer("cross_attention_frequency", 2),
        picture_size=vision.hidden_size,
        num_queries=num_queries,
    )
    _check_heads("qformer_config", qformer.hidden_size, qformer.num_heads)
    return qformer


def _check_heads(section: str, hidden_size: int, num_heads: int) -> None:
    if hidden_size % num_heads:
        raise CheckpointError(
            f"{section} of config.json shares {hidden_size} hidden features between {num_heads} attention heads, "
            "which does not go evenly: correct the file"
        )


def _image_token_id(fields: Fields, vocab_size: int) -> int | None:
    """Published files write `image_token_index`, newer ones `image_token_id`."""
    name = "image_token_index" if fields.raw.get("image_token_index") is not None else "image_token_id"
    if fields.raw.get(name) is None:
        return None
    token_id = fields.integer(name, least=0)
    if token_id >= vocab_size:
        raise CheckpointError(
            f"config.json has {name} = {token_id}, but the language half has {vocab_size} tokens: correct the file"
        )
    return token_id
