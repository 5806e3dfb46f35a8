"""Perplexity of a text through the engine's own model, cache and kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from plexor.errors import ConfigError, RequestError
from plexor.runtime.engine import Engine


@dataclass(frozen=True, slots=True)
class Score:
    """num_tokens: those that were predicted. loss: mean negative log likelihood of one, in nats."""

    num_tokens: int
    num_bytes: int
    loss: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Over all bytes of the text, so that tokenizers can be compared."""
        return self.loss * self.num_tokens / math.log(2) / self.num_bytes


def score_text(engine: Engine, text: str, window: int) -> Score:
    """Cut the text into windows of this many tokens and predict each token from those before it in its window.

    RequestError for a text or windows of fewer than two tokens; ConfigError if the cache cannot hold a window.
    """
    token_ids = engine.prompts.tokenizer.encode(text, add_special_tokens=False)
    if len(token_ids) < 2:
        raise RequestError(f"the text has {len(token_ids)} tokens, but scoring needs at least 2: give a longer one")
    limits = engine.core.limits
    size = min(window, limits.max_length, len(token_ids))
    if size < 2:
        raise RequestError(
            f"the window has {size} tokens, but scoring needs at least 2: raise it (--window, --max-length)"
        )
    if size > limits.num_blocks * limits.block_size:
        raise ConfigError(
            f"a window of {size} tokens does not fit the cache of {limits.num_blocks * limits.block_size}: lower "
            "--window or raise --num-blocks"
        )
    total, count = 0.0, 0
    for piece in _windows(token_ids, size):
        logits = engine.core.logits(piece)[:-1]
        wanted = torch.tensor(piece[1:], dtype=torch.int64, device=logits.device)
        total += float(torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="sum").double())
        count += len(wanted)
    return Score(count, len(text.encode()), total / count)


def _windows(token_ids: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Neighbours share one token, so that every token but the text's first is predicted once."""
    for start in range(0, len(token_ids) - 1, size - 1):
        yield token_ids[start : start + size]
