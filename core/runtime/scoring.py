"""Scores of a text through the engine's own model, cache and kernels: perplexity, and likeness to another model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from plexor.checkpoint.tokenizer import Tokenizer, load_tokenizer
from plexor.config import EngineConfig
from plexor.errors import CapacityError, ConfigError, PlexorError, RequestError
from plexor.extension.catalog import Catalog
from plexor.kernels.table import resolve
from plexor.model.decoder import ModelConfig
from plexor.runtime.core import EngineLimits
from plexor.runtime.engine import Engine
from plexor.runtime.ledger import make_plan
from plexor.runtime.prompts import find_folder

PART = 2**24
"""Logits that are widened to float32 at once: 64 MiB for each copy."""

LARGEST_EXPONENT = 709.0
"""e to the power of more is no float64."""


@dataclass(frozen=True, slots=True)
class Score:
    """num_tokens: those that were predicted. loss: mean negative log likelihood of one, in nats."""

    num_tokens: int
    num_bytes: int
    loss: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss <= LARGEST_EXPONENT else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Over all bytes of the text, so that tokenizers can be compared."""
        return self.loss * self.num_tokens / math.log(2) / self.num_bytes


@dataclass(frozen=True, slots=True)
class Likeness:
    """How close a model's predictions are to those of a reference, over the tokens of a text.

    agreement: share of tokens, 0 to 1, at which both hold the same next token for the likeliest. mean_kl and p99_kl:
    the mean and the 99th percentile over tokens of KL(reference || model), in nats.
    """

    agreement: float
    mean_kl: float
    p99_kl: float


def score_text(engine: Engine, text: str, window: int) -> Score:
    """Cut the text into windows of this many tokens and predict each token from those before it in its window.

    RequestError for a text or windows of fewer than two tokens; ConfigError if the cache cannot hold a window;
    CapacityError if a window needs more memory than there is; PlexorError if the logits are no numbers.
    """
    token_ids = engine.prompts.tokenizer.encode(text, add_special_tokens=False)
    size = _window_size(window, token_ids, engine.core.limits)
    loss = 0.0
    with _memory_for(size):
        for piece in _windows(token_ids, size):
            for logits, wanted in zip(_logits(engine, piece), _wanted(engine, piece), strict=True):
                loss += _loss(logits, wanted)
    return _score(engine, text, token_ids, loss)


def compare_text(engine: Engine, reference: Engine, text: str, window: int) -> tuple[Score, Likeness]:
    """The score of an engine's model as `score_text` gives it, and how close its predictions are to the reference's.

    Both engines compute a window one after the other, so that no logits are kept. Raises what `score_text` raises, and
    ConfigError if tokenizers or vocabularies differ.
    """
    _check_same_tokens(_vocabulary(engine), _vocabulary(reference), text)
    token_ids = engine.prompts.tokenizer.encode(text, add_special_tokens=False)
    size = min(_window_size(window, token_ids, each.core.limits) for each in (engine, reference))
    loss, agreed, divergences = 0.0, 0, []
    with _memory_for(size):
        for piece in _windows(token_ids, size):
            parts = zip(_logits(engine, piece), _logits(reference, piece), _wanted(engine, piece), strict=True)
            for logits, expected, wanted in parts:
                loss += _loss(logits, wanted)
                agreed += int((logits.argmax(dim=-1) == expected.argmax(dim=-1)).sum())
                divergences.append(divergence(expected, logits).cpu())
    score = _score(engine, text, token_ids, loss)
    return score, _likeness(agreed, torch.cat(divergences))


def divergence(reference: Tensor, tested: Tensor) -> Tensor:
    """KL(reference || tested) in nats of each row [R] of two sets of float32 logits [R, V].

    A token that the reference rules out adds nothing, whatever the other says of it. Rounding may leave a sum below
    zero, which no divergence is.
    """
    theirs, ours = reference.log_softmax(dim=-1), tested.log_softmax(dim=-1)
    terms = theirs.exp() * (theirs - ours)
    return terms.where(theirs > -math.inf, 0).sum(dim=-1).clamp_min(0)


def scoring_config(config: EngineConfig, catalog: Catalog, window: int) -> EngineConfig:
    """The same model in an engine that only scores: a cache of one window, no captured steps, room for another engine.

    A number of blocks that is given stays.
    """
    longest = max(min(window, context(config, catalog)), 1)
    num_blocks = config.num_blocks or -(-longest // config.block_size)
    return replace(config, num_blocks=num_blocks, max_sequences=1, max_step_tokens=longest, decode_graphs=False)


def context(config: EngineConfig, catalog: Catalog) -> int:
    """The longest window that an engine with this config takes, read off before it is there."""
    folder = find_folder(config, catalog)
    model: ModelConfig = resolve(catalog.architecture(folder.architecture).config)(folder.config)
    return config.max_length or model.max_positions


def check_comparable(tested: EngineConfig, reference: EngineConfig, catalog: Catalog, text: str) -> None:
    """Refuse a comparison on this text before a weight is read.

    ConfigError if tokenizers or vocabularies differ, CapacityError if both engines do not fit in memory together.
    """
    folders = [find_folder(config, catalog) for config in (tested, reference)]
    plans = [make_plan(config, catalog, folder) for config, folder in zip((tested, reference), folders, strict=True)]
    ours, theirs = (
        _Vocabulary(str(folder.path), load_tokenizer(folder.path), plan.vocab_size)
        for folder, plan in zip(folders, plans, strict=True)
    )
    _check_same_tokens(ours, theirs, text)
    missing = plans[1].taken - plans[0].left
    if missing > 0:
        raise CapacityError(
            f"{ours.name} takes {plans[0].taken:,} bytes beside the {plans[1].taken:,} of its reference {theirs.name}, "
            f"which is {missing:,} bytes more than there are: lower --window, or measure each alone without a reference"
        )


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """What two checkpoints must share if their logits are to be compared. size: that of the model, not less."""

    name: str
    tokenizer: Tokenizer
    size: int


def _vocabulary(engine: Engine) -> _Vocabulary:
    return _Vocabulary(str(engine.folder.path), engine.prompts.tokenizer, engine.core.limits.vocab_size)


def _check_same_tokens(ours: _Vocabulary, theirs: _Vocabulary, text: str) -> None:
    if ours.size != theirs.size:
        raise ConfigError(
            f"{ours.name} has a vocabulary of {ours.size:,} tokens and {theirs.name} one of {theirs.size:,}, so their "
            "predictions cannot be compared: choose a checkpoint with the same tokenizer"
        )
    if _reading(ours.tokenizer, text) != _reading(theirs.tokenizer, text):
        raise ConfigError(
            f"{ours.name} and {theirs.name} have different tokenizers, so their predictions cannot be compared: choose "
            "a checkpoint with the same one"
        )


def _reading(tokenizer: Tokenizer, text: str) -> tuple[dict[str, int], list[int]]:
    """What its ids mean and how it cuts the text; how it frames prompts or decodes does not matter here."""
    return tokenizer.backend.get_vocab(with_added_tokens=True), tokenizer.encode(text, add_special_tokens=False)


def _window_size(window: int, token_ids: Sequence[int], limits: EngineLimits) -> int:
    if len(token_ids) < 2:
        raise RequestError(f"the text has {len(token_ids)} tokens, but scoring needs at least 2: give a longer one")
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
    return size


@contextmanager
def _memory_for(size: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise CapacityError(
            f"a window of {size} tokens needs more memory than the device has ({error}): lower --window"
        ) from error


def _windows(token_ids: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Neighbours share one token, so that every token but the text's first is predicted once."""
    for start in range(0, len(token_ids) - 1, size - 1):
        yield token_ids[start : start + size]


def _logits(engine: Engine, piece: Sequence[int]) -> Iterator[Tensor]:
    """Float32 logits [R, V] of what follows each token of a window but its last, in parts."""
    for logits in engine.core.logit_parts(piece[:-1], _part_rows(engine)):
        yield logits.float()


def _wanted(engine: Engine, piece: Sequence[int]) -> Sequence[Tensor]:
    """What does follow, [R] for each part."""
    wanted = torch.tensor(piece[1:], dtype=torch.int64, device=engine.core.device)
    parts: Sequence[Tensor] = wanted.split(_part_rows(engine))
    return parts


def _part_rows(engine: Engine) -> int:
    return max(PART // engine.core.limits.vocab_size, 1)


def _loss(logits: Tensor, wanted: Tensor) -> float:
    """Negative log likelihood of a part's tokens, in nats; each in float32, their sum in float64."""
    return float(cross_entropy(logits, wanted, reduction="none").double().sum())


def _score(engine: Engine, text: str, token_ids: Sequence[int], loss: float) -> Score:
    if not math.isfinite(loss):
        raise PlexorError(
            f"{engine.folder.path} in {engine.config.precision} gives logits whose loss is {loss}: its weights or "
            "scales are damaged, or its numbers are too large for their dtype (try --dtype float32)"
        )
    num_tokens = len(token_ids) - 1
    return Score(num_tokens, len(text.encode()), loss / num_tokens)


def _likeness(agreed: int, divergences: Tensor) -> Likeness:
    """divergences: of each token, [T]."""
    values = divergences.double().numpy()
    return Likeness(agreed / len(values), float(values.mean()), float(numpy.quantile(values, 0.99)))
