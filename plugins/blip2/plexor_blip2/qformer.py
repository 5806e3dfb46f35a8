"""The Q-Former: a few learned queries that gather from a picture's features what the language half is to read.

BLIP-2 (Li et al., 2023). Its blocks norm after each sum, as BERT's do:

    queries -> norm -> [ self-attention -> cross-attention (every few blocks) -> feed-forward ] x num_layers
                                                  ^
                                          a picture's features
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plexor.api import Build, Ignore, LayerNorm, Linear, Part, Rule, WeightRule, activation
from plexor_blip2.attention import attend
from plexor_blip2.config import QFormerConfig


class QFormer(nn.Module):
    """Features [N, P, H_vision] -> [N, Q, H]. Every rank holds all of it."""

    def __init__(self, build: Build, config: QFormerConfig) -> None:
        super().__init__()
        queries = torch.empty(1, config.num_queries, config.hidden_size, dtype=build.dtype, device=build.device)
        self.query_tokens = nn.Parameter(queries, requires_grad=False)
        self.norm = LayerNorm(build, config.hidden_size, config.norm_eps)
        self.blocks = nn.ModuleList(
            QFormerBlock(build, config, crosses=index % config.cross_every == 0) for index in range(config.num_layers)
        )

    def forward(self, features: Tensor) -> Tensor:
        x: Tensor = self.norm(self.query_tokens).expand(len(features), -1, -1)
        for block in self.blocks:
            x = block(x, features)
        return x


class QFormerBlock(nn.Module):
    """x [N, Q, H], features [N, P, H_vision] -> [N, Q, H]; only a block that crosses looks at the features."""

    def __init__(self, build: Build, config: QFormerConfig, *, crosses: bool) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.attention = QFormerAttention(build, config, size)
        self.cross_attention = QFormerAttention(build, config, config.picture_size) if crosses else None
        self.up = Linear(build, size, (Part(inner),), bias=True)
        self.down = Linear(build, inner, (Part(size),), bias=True)
        self.feed_forward_norm = LayerNorm(build, size, config.norm_eps)
        self._activate = activation(config.activation)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        x = self.attention(x, x)
        if self.cross_attention is not None:
            x = self.cross_attention(x, features)
        y: Tensor = self.feed_forward_norm(x + self.down(self._activate(self.up(x))))
        return y


class QFormerAttention(nn.Module):
    """x [N, Q, H], seen [N, K, S] -> [N, Q, H], the sum of x and what its queries take from seen, normed."""

    def __init__(self, build: Build, config: QFormerConfig, seen_size: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.query = Linear(build, size, (Part(size),), bias=True)
        self.key_value = Linear(build, seen_size, (Part(size), Part(size)), bias=True)
        self.out = Linear(build, size, (Part(size),), bias=True)
        self.norm = LayerNorm(build, size, config.norm_eps)
        self._num_heads = config.num_heads

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        k, v = self.key_value(seen).chunk(2, dim=-1)
        y: Tensor = self.norm(x + self.out(attend(self.query(x), k, v, self._num_heads)))
        return y


def rules() -> tuple[WeightRule, ...]:
    """Into a QFormer, from a checkpoint's `qformer`; its query tokens lie beside that.

    A Q-Former that can also read text has a feed-forward layer of its own for it, which no picture passes.
    """
    block, target = "encoder.layer.{block}", "blocks.{block}"
    text = ("intermediate.dense", "output.dense", "output.LayerNorm")
    return (
        Rule("layernorm", "norm"),
        *_attention_rules(f"{block}.attention", f"{target}.attention"),
        *_attention_rules(f"{block}.crossattention", f"{target}.cross_attention"),
        Rule(f"{block}.intermediate_query.dense", f"{target}.up"),
        Rule(f"{block}.output_query.dense", f"{target}.down"),
        Rule(f"{block}.output_query.LayerNorm", f"{target}.feed_forward_norm"),
        *(Ignore(f"{block}.{module}.{tensor}") for module in text for tensor in ("weight", "bias")),
    )


def _attention_rules(source: str, target: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{source}.attention.query", f"{target}.query"),
        Rule(f"{source}.attention.key", f"{target}.key_value", part=0),
        Rule(f"{source}.attention.value", f"{target}.key_value", part=1),
        Rule(f"{source}.output.dense", f"{target}.out"),
        Rule(f"{source}.output.LayerNorm", f"{target}.norm"),
    )
