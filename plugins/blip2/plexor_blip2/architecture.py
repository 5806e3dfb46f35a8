"""Blip2ForConditionalGeneration: a vision tower and a Q-Former in front of another architecture's language model.

picture -> vision tower -> Q-Former -> projection -> embeddings of the placeholder tokens -> language half
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from plexor.api import (
    Batch,
    Build,
    ForwardContext,
    KVShape,
    Linear,
    Model,
    Part,
    Rule,
    WeightRule,
    resolve,
    under,
)
from plexor_blip2 import qformer, vision
from plexor_blip2.config import LANGUAGE, Blip2Config


class Blip2(nn.Module):
    """A Model and a MediaModel.

    The number format is the language half's alone: what stands before it is small beside it and stays exact. The
    Q-Former computes in float32 whatever the model's dtype, as its publishers do.
    """

    def __init__(self, build: Build, config: Blip2Config) -> None:
        super().__init__()
        exact = build.exact()
        language = build.catalog.architecture(LANGUAGE)
        language_config = resolve(language.config)(config.language)
        self.vision = vision.VisionTower(exact, config.vision)
        self.qformer = qformer.QFormer(replace(exact, dtype=torch.float32), config.qformer)
        self.projection = Linear(exact, config.qformer.hidden_size, (Part(config.language_size),), bias=True)
        self.language: Model = resolve(language.model)(language_config, build)
        self._language_rules: tuple[WeightRule, ...] = resolve(language.weights)(language_config)
        self._dtype, self._device = build.dtype, build.device

    def encode(self, kind: str, items: Sequence[Tensor]) -> list[Tensor]:
        """Pictures [3, h, w], all of one size, to embeddings [num_query_tokens, H] each."""
        assert kind == "image", f"the catalog has no processor of {kind!r} for this architecture"
        pictures = torch.stack(tuple(items)).to(device=self._device, dtype=self._dtype)
        queries = self.qformer(self.vision(pictures).float())
        return list(self.projection(queries.to(self._dtype)).unbind())

    def forward(self, batch: Batch, ctx: ForwardContext) -> Tensor:
        return self.language.forward(batch, ctx)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.language.logits(hidden)

    def kv_shapes(self, num_blocks: int, block_size: int) -> tuple[KVShape, ...]:
        return self.language.kv_shapes(num_blocks, block_size)

    def weight_rules(self) -> tuple[WeightRule, ...]:
        """The language half's."""
        return under("language_model", "language", self._language_rules)


def model(config: Blip2Config, build: Build) -> Blip2:
    return Blip2(build, config)


def weights(config: Blip2Config) -> tuple[WeightRule, ...]:
    """For all but the language half, whose rules the model brings."""
    return (
        *under("vision_model", "vision", vision.rules()),
        Rule("query_tokens", "qformer", tensor="query_tokens"),
        *under("qformer", "qformer", qformer.rules()),
        Rule("language_projection", "projection"),
    )
