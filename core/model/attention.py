"""Attention over the paged cache: project, normalise, rotate, store, attend, project back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plexor.batch import ForwardContext, LogitRows
from plexor.model.build import Build
from plexor.model.format import KVShape
from plexor.model.linear import Linear, Part
from plexor.model.norm import RMSNorm
from plexor.model.rotary import Rotary


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """One attention layer, whole (before the ranks share it out).

    scale: of the scores before softmax. window: how many positions, its own included, a token sees; None for all.
    qk_norm_eps: None for no norm on queries and keys.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    rotary: Rotary | None = None
    window: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm_eps: float | None = None


class RotaryTables(nn.Module):
    """cos and sin [P, size / 2], computed once and shared by the layers that rotate alike."""

    def __init__(self, rotary: Rotary, num_positions: int, device: torch.device) -> None:
        super().__init__()
        cos, sin = rotary.tables(num_positions, device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.cos: Tensor
        self.sin: Tensor


class Attention(nn.Module):
    """[T, H] -> [T, H] with the heads shared out between the ranks; kv_index is this layer's place in ctx.kv.

    With `rows`, keys and values of all rows are stored, but only these rows are attended: [R, H].
    """

    def __init__(
        self, build: Build, config: AttentionConfig, kv_index: int, tables: RotaryTables | None = None
    ) -> None:
        super().__init__()
        size, mesh = config.head_size, build.mesh
        self.num_heads = len(mesh.share(config.num_heads, "attention heads"))
        self.num_kv_heads = len(mesh.share_or_replicate(config.num_kv_heads, "key-value heads"))
        self.window = config.window
        self._config = config
        self._kv_index = kv_index
        # A tuple hides the tables from the module tree: they belong to the stack, not to this layer.
        self._tables = None if tables is None else (tables,)
        keys = Part(config.num_kv_heads, size, "key-value heads", replicate=True)
        parts = (Part(config.num_heads, size, "attention heads"), keys, keys)
        self.qkv = Linear(build, config.hidden_size, parts, cut="out", bias=config.qkv_bias)
        self.out = Linear(build, config.num_heads * size, (Part(config.hidden_size),), cut="in", bias=config.out_bias)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm_eps is not None:
            self.q_norm = RMSNorm(build, size, config.qk_norm_eps)
            self.k_norm = RMSNorm(build, size, config.qk_norm_eps)
        self._kv_dtype = build.kv_storage(self.kv_shape(0, 1))[0].dtype
        self._sizes = {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads, "head_size": size}
        formats = build.kv_format
        self._write = build.bind(
            formats.write if tables is None else formats.rotary_write, self._kv_dtype, **self._sizes
        )
        self._attend = build.bind(formats.attend, self._kv_dtype, **self._sizes)

    def kv_shape(self, num_blocks: int, block_size: int) -> KVShape:
        """The cache that this layer needs on this rank."""
        return KVShape(num_blocks, block_size, self.num_kv_heads, self._config.head_size)

    def forward(self, x: Tensor, positions: Tensor, ctx: ForwardContext, rows: LogitRows | None = None) -> Tensor:
        y: Tensor = self.out(self._attended(self._queries(self.qkv(x), positions, ctx), ctx, rows))
        return y

    def as_residual(
        self, build: Build, norm: nn.Module
    ) -> Callable[[Tensor, Tensor, ForwardContext, LogitRows | None], Tensor]:
        """The function (x, positions, ctx, rows) -> x + self(norm(x), positions, ctx, rows), of these rows of x, which
        may be overwritten.
        """
        queries, add = self._queries_after(build, norm), self.out.onto(build)

        def attend(x: Tensor, positions: Tensor, ctx: ForwardContext, rows: LogitRows | None) -> Tensor:
            return add(self._attended(queries(x, positions, ctx), ctx, rows), x if rows is None else x[rows.index])

        return attend

    def _queries_after(self, build: Build, norm: nn.Module) -> Callable[[Tensor, Tensor, ForwardContext], Tensor]:
        """The function (x, positions, ctx) -> what `_queries` makes of the projected norm(x)."""
        plain = self.q_norm is None and build.kv_format.rotary_write == "rotary_kv_write"
        if plain and self._tables is not None and isinstance(norm, RMSNorm):
            rotary_size = 2 * self._tables[0].cos.shape[1]
            product = self.qkv.fused(build, "norm_rotary", self._kv_dtype, rotary_size=rotary_size, **self._sizes)
            if product is not None:
                return self._fused_queries(product, norm, self._tables[0])
        project = self.qkv.after(build, norm)
        return lambda x, positions, ctx: self._queries(project(x), positions, ctx)

    def _fused_queries(
        self, product: Callable[..., Tensor], norm: RMSNorm, tables: RotaryTables
    ) -> Callable[[Tensor, Tensor, ForwardContext], Tensor]:
        qkv = self.qkv

        def project(x: Tensor, positions: Tensor, ctx: ForwardContext) -> Tensor:
            turn = (tables.cos, tables.sin, positions, ctx.slots, ctx.kv[self._kv_index])
            return product(x, norm.weight, norm.eps, qkv.stored, *turn, qkv.bias)

        return project

    def _queries(self, projected: Tensor, positions: Tensor, ctx: ForwardContext) -> Tensor:
        """Queries [T, N, D], normed and rotated as the layer asks; the keys and values beside them are stored."""
        size = self._config.head_size
        q, k, v = projected.unflatten(-1, (-1, size)).split((self.num_heads, self.num_kv_heads, self.num_kv_heads), 1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        cache = ctx.kv[self._kv_index]
        if self._tables is None:
            self._write(k, v, ctx.slots, cache)
        else:
            tables = self._tables[0]
            q = self._write(q, k, v, tables.cos, tables.sin, positions, ctx.slots, cache)
        queries: Tensor = q
        return queries

    def _attended(self, q: Tensor, ctx: ForwardContext, rows: LogitRows | None) -> Tensor:
        """What the queries find in the cache, [T, N * D], or of these rows alone, [R, N * D]."""
        q, pages = (q, ctx.pages) if rows is None else (q[rows.index], rows.pages)
        attended: Tensor = self._attend(q, ctx.kv[self._kv_index], pages, self._config.scale, self.window)
        return attended.flatten(1)
