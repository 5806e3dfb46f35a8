"""The vision tower: pictures to features, a ViT whose blocks norm before they compute (Dosovitskiy et al., 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plexor.api import Build, LayerNorm, Linear, Part, Rule, activation
from plexor_blip2.attention import attend
from plexor_blip2.config import VisionConfig


class VisionTower(nn.Module):
    """Pictures [N, 3, h, w] -> features [N, P, H], those of the class token first. Every rank holds all of it."""

    def __init__(self, build: Build, config: VisionConfig) -> None:
        super().__init__()
        size, patch = config.hidden_size, config.patch_size
        self.patches = nn.Conv2d(3, size, patch, stride=patch, dtype=build.dtype, device=build.device)
        self.patches.requires_grad_(False)
        first, positions = (1, 1, size), (1, config.num_positions, size)
        self.class_embedding = nn.Parameter(_empty(build, first), requires_grad=False)
        self.position_embedding = nn.Parameter(_empty(build, positions), requires_grad=False)
        self.blocks = nn.ModuleList(VisionBlock(build, config) for _ in range(config.num_layers))
        self.norm = LayerNorm(build, size, config.norm_eps)

    def forward(self, pictures: Tensor) -> Tensor:
        patches = self.patches(pictures).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_embedding.expand(len(pictures), -1, -1), patches), dim=1) + self.position_embedding
        for block in self.blocks:
            x = block(x)
        features: Tensor = self.norm(x)
        return features


class VisionBlock(nn.Module):
    """[N, P, H] -> [N, P, H]"""

    def __init__(self, build: Build, config: VisionConfig) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.attention_norm = LayerNorm(build, size, config.norm_eps)
        self.qkv = Linear(build, size, (Part(3 * size),), bias=config.qkv_bias)
        self.out = Linear(build, size, (Part(size),), bias=True)
        self.feed_forward_norm = LayerNorm(build, size, config.norm_eps)
        self.up = Linear(build, size, (Part(inner),), bias=True)
        self.down = Linear(build, inner, (Part(size),), bias=True)
        self._activate = activation(config.activation)
        self._num_heads = config.num_heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        x = x + self.out(attend(q, k, v, self._num_heads))
        y: Tensor = x + self.down(self._activate(self.up(self.feed_forward_norm(x))))
        return y


def _empty(build: Build, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=build.dtype, device=build.device)


def rules() -> tuple[Rule, ...]:
    """Into a VisionTower, from a checkpoint's `vision_model`."""
    block, target = "encoder.layers.{block}", "blocks.{block}"
    return (
        Rule("embeddings.patch_embedding", "patches"),
        Rule("embeddings.class_embedding", "", tensor="class_embedding"),
        Rule("embeddings.position_embedding", "", tensor="position_embedding"),
        Rule(f"{block}.layer_norm1", f"{target}.attention_norm"),
        Rule(f"{block}.self_attn.qkv", f"{target}.qkv"),
        Rule(f"{block}.self_attn.projection", f"{target}.out"),
        Rule(f"{block}.layer_norm2", f"{target}.feed_forward_norm"),
        Rule(f"{block}.mlp.fc1", f"{target}.up"),
        Rule(f"{block}.mlp.fc2", f"{target}.down"),
        Rule("post_layernorm", "norm"),
    )
