"""The decoder stack: embedding, layers with slots for attention, feed-forward and norms, and the output head.

It knows no model's name. An architecture fills the slots:

    sequential:  x = x + attention(norm(x));  x = x + feed_forward(norm(x))
    parallel:    x = x + attention(norm_1(x)) + feed_forward(norm_2(x))
    norm after:  x = norm(x + attention(x));  x = norm(x + feed_forward(x))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, nn

from plexor.batch import Batch, ForwardContext, LogitRows
from plexor.model.attention import Attention, AttentionConfig, RotaryTables
from plexor.model.build import Build
from plexor.model.embedding import PositionEmbedding, VocabEmbedding
from plexor.model.feed_forward import ResidualFeedForward
from plexor.model.format import KVShape
from plexor.model.linear import Linear, Part

Residual = Literal["sequential", "parallel", "norm_after"]
Step = Callable[[Tensor, Tensor, ForwardContext, LogitRows | None], Tensor]
"""(x [T, H], positions [T], ctx, rows) -> what a layer makes of them, as in DecoderLayer."""


class ModelConfig(Protocol):
    """What the runtime reads of an architecture's config; an architecture's own dataclass holds more."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_positions(self) -> int:
        """The longest sequence, prompt and answer together."""
        ...


class Model(Protocol):
    """What the runtime calls. `MediaModel` in plexor.model.media adds encoding."""

    def forward(self, batch: Batch, ctx: ForwardContext) -> Tensor:
        """The last layer's output, normalised, of the rows ctx.logit_rows (None: of every row), [R, H]."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """What `forward` gave [R, H] -> [R, V] in the model's dtype, on every rank; whoever computes widens them."""
        ...

    def kv_shapes(self, num_blocks: int, block_size: int) -> tuple[KVShape, ...]:
        """The cache of each layer that attends, on this rank."""
        ...


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A decoder stack.

    learned_positions: rows of a learned position table, looked up at position + position_offset; None without one.
    embedding_size: of tokens where it differs from the hidden size: a projection then follows it and another
    precedes the head.
    """

    vocab_size: int
    max_positions: int
    hidden_size: int
    attention: tuple[AttentionConfig, ...]
    tied_head: bool
    residual: Residual = "sequential"
    learned_positions: int | None = None
    position_offset: int = 0
    embedding_size: int | None = None
    final_norm: bool = True

    @property
    def num_layers(self) -> int:
        return len(self.attention)


@dataclass(frozen=True, slots=True)
class Slots:
    """What an architecture puts in each layer; called with the layer's number, norm with the hidden size."""

    feed_forward: Callable[[int], nn.Module]
    norm: Callable[[int], nn.Module]


class DecoderLayer(nn.Module):
    """One layer, [T, H] -> [T, H]; with `rows`, all but keys and values is computed for these alone: [R, H].

    Its input may be overwritten.
    """

    def __init__(
        self,
        build: Build,
        attention: Attention,
        feed_forward: nn.Module,
        norms: Sequence[nn.Module],
        residual: Residual,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.feed_forward = feed_forward
        self.attention_norm, self.feed_forward_norm = norms
        self.residual = residual
        steps = {"parallel": self._parallel, "norm_after": self._norm_after}
        self._step = self._sequential(build) if residual == "sequential" else steps[residual]

    def forward(self, x: Tensor, positions: Tensor, ctx: ForwardContext, rows: LogitRows | None = None) -> Tensor:
        return self._step(x, positions, ctx, rows)

    def _sequential(self, build: Build) -> Step:
        """Both halves as their layers do them best, norm and sum included."""
        attend = self.attention.as_residual(build, self.attention_norm)
        feed_forward, norm = self.feed_forward, self.feed_forward_norm
        if isinstance(feed_forward, ResidualFeedForward):
            advance = feed_forward.as_residual(build, norm)
        else:
            advance = _in_steps(feed_forward, norm)
        return lambda x, positions, ctx, rows: advance(attend(x, positions, ctx, rows))

    def _parallel(self, x: Tensor, positions: Tensor, ctx: ForwardContext, rows: LogitRows | None) -> Tensor:
        attended = self.attention(self.attention_norm(x), positions, ctx, rows)
        x = _chosen(x, rows)
        y: Tensor = x + attended + self.feed_forward(self.feed_forward_norm(x))
        return y

    def _norm_after(self, x: Tensor, positions: Tensor, ctx: ForwardContext, rows: LogitRows | None) -> Tensor:
        x = self.attention_norm(_chosen(x, rows) + self.attention(x, positions, ctx, rows))
        y: Tensor = self.feed_forward_norm(x + self.feed_forward(x))
        return y


def _in_steps(feed_forward: nn.Module, norm: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: x + feed_forward(norm(x))


def _chosen(x: Tensor, rows: LogitRows | None) -> Tensor:
    return x if rows is None else x[rows.index]


class Decoder(nn.Module):
    """A whole language model: Model for the runtime, and the language half of models that see."""

    def __init__(self, build: Build, config: DecoderConfig, slots: Slots) -> None:
        super().__init__()
        width = config.embedding_size or config.hidden_size
        exact = build.exact()
        self.embedding = VocabEmbedding(build, config.vocab_size, width)
        self.positions: PositionEmbedding | None = None
        if config.learned_positions is not None:
            self.positions = PositionEmbedding(
                build, config.learned_positions, config.hidden_size, config.position_offset
            )
        self.project_in: Linear | None = None
        self.project_out: Linear | None = None
        if width != config.hidden_size:
            self.project_in = Linear(exact, width, (Part(config.hidden_size),))
            self.project_out = Linear(exact, config.hidden_size, (Part(width),))
        self.layers = nn.ModuleList(_layers(build, config, slots))
        self.norm = slots.norm(config.hidden_size) if config.final_norm else nn.Identity()
        self.head = None if config.tied_head else VocabEmbedding(build, config.vocab_size, width)

    def forward(self, batch: Batch, ctx: ForwardContext) -> Tensor:
        x = self.embed(batch)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            # Nothing reads the last layer's output but the head, so its other rows end with their keys and values.
            x = layer(x, batch.positions, ctx, ctx.logit_rows if index == last else None)
        normed: Tensor = self.norm(x)
        return normed

    def embed(self, batch: Batch) -> Tensor:
        """Token embeddings [T, H], those of placeholders replaced by the batch's media, positions added."""
        x: Tensor = self.embedding(batch.token_ids)
        if self.project_in is not None:
            x = self.project_in(x)
        for media in batch.media:
            x[media.rows] = media.embeddings.to(x.dtype)
        return x if self.positions is None else x + self.positions(batch.positions)

    def logits(self, hidden: Tensor) -> Tensor:
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        return (self.embedding if self.head is None else self.head).logits(hidden)

    def kv_shapes(self, num_blocks: int, block_size: int) -> tuple[KVShape, ...]:
        shapes = []
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            shapes.append(layer.attention.kv_shape(num_blocks, block_size))
        return tuple(shapes)


def _layers(build: Build, config: DecoderConfig, slots: Slots) -> list[DecoderLayer]:
    tables: dict[object, RotaryTables] = {}
    layers = []
    for index, attention in enumerate(config.attention):
        if attention.rotary is not None and attention.rotary not in tables:
            tables[attention.rotary] = RotaryTables(attention.rotary, config.max_positions, build.device)
        mixer = Attention(build, attention, index, tables.get(attention.rotary))
        norms = (slots.norm(config.hidden_size), slots.norm(config.hidden_size))
        layers.append(DecoderLayer(build, mixer, slots.feed_forward(index), norms, config.residual))
    return layers
