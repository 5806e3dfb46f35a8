"""What goes into the runtime and what comes out of it: requests, how to sample, media, and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from plexor.errors import RequestError

if TYPE_CHECKING:
    import tokenizers
    from PIL.Image import Image

FinishReason = Literal["stop", "length", "abort", "error"]
"""stop: an end id, a stop id or a stop string. length: max_tokens or the context. abort: the client."""

MAX_TEMPERATURE = 2.0
MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOP_STRINGS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are drawn and when they end; checked once, on construction.

    temperature: 0 takes the likeliest token, at most 2. top_k: 0 or -1 is off. top_p: (0, 1]. min_p: [0, 1], relative
    to the likeliest token. repetition_penalty: [0.01, 100], 1 is off. presence_penalty, frequency_penalty: [-2, 2].
    max_tokens: None generates until the context is full. min_tokens: end ids and stops do not count before it.
    stop: at most 4 strings; stop_token_ids: ids that end the text besides the model's own.
    include_stop: keep the stop string's or stop id's text in the answer. ignore_end: go on after the model's end ids.
    seed: signed 64 bits; None draws one. logprobs: None is off, 0 gives the drawn token's, up to 20 the likeliest too.
    logit_bias: added to the logits, [-100, 100] by token id. n: answers for one prompt, at most 128.

    Raises RequestError, with `field` set, for a value outside of these ranges.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_end: bool = False
    seed: int | None = None
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    n: int = 1
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        _check_integer("top_k", self.top_k, -1, 2**31 - 1)
        _check_number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.max_tokens is not None:
            _check_integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
            _check_integer("min_tokens", self.min_tokens, 0, self.max_tokens, note=" (max_tokens)")
        _check_integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.seed is not None:
            _check_integer("seed", self.seed, -(2**63), 2**63 - 1)
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _check_integer("n", self.n, 1, MAX_CHOICES)
        for name in ("include_stop", "ignore_end", "skip_special_tokens"):
            _check_bool(name, getattr(self, name))
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _stop_token_ids(self.stop_token_ids))
        _check_logit_bias(self.logit_bias)

    def check_vocabulary(self, vocabulary_size: int) -> None:
        """Raises RequestError for a token id that the model does not have."""
        for name, token_ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias)):
            for token_id in token_ids:
                if token_id >= vocabulary_size:
                    raise RequestError(
                        f"{name} names token {token_id}, but the vocabulary has {vocabulary_size} tokens: "
                        f"use ids from 0 to {vocabulary_size - 1}",
                        field=name,
                    )


@dataclass(frozen=True, slots=True, eq=False)
class Media:
    """One picture (or other medium) of a prompt, and the placeholder tokens whose embeddings it replaces.

    start, length: the span of placeholder tokens in the prompt; `encode` gives that many embeddings.
    digest: of the content; two media with one digest may share prefix blocks.
    data: what the model's `encode` takes, a CPU tensor or a numpy array; the runtime only carries it.
    """

    kind: str
    start: int
    length: int
    digest: bytes
    data: Any


class MediaProcessor(Protocol):
    """What an `InputProcessor` builds: media and a prompt to tokens."""

    def open(self, data: bytes) -> Image:
        """The picture in the bytes of a file that a client sent or a user named.

        Raises RequestError where they are no picture, damaged, or too large.
        """
        ...

    def prepare(
        self, images: Sequence[Image], prompt_ids: Sequence[int], tokenizer: tokenizers.Tokenizer
    ) -> tuple[list[int], tuple[Media, ...]]:
        """The prompt's token ids with placeholders put among them, and the media in order of `start`.

        Raises RequestError where prompt and images do not fit together.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One prompt to continue once; the engine makes n of them where n answers are wanted.

    tokens: the prompt's ids, media placeholders included. end_ids: ids that end the model's text.
    arrived: seconds on the engine's clock. cache_salt: only requests of equal salt share prefix blocks.
    """

    id: str
    tokens: tuple[int, ...]
    sampling: SamplingParams
    end_ids: tuple[int, ...]
    media: tuple[Media, ...] = ()
    arrived: float = 0.0
    cache_salt: bytes = b""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities at one position: of the drawn token and of the likeliest ones, best first.

    rank: how many tokens are at least as likely as the drawn one, itself included: 1 is the likeliest.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What one step added to one request; every request's last output, and only that one, has `finish`.

    token_ids: the new ones, an end id included. logprobs: one for each new token, None where not asked for.
    stop_reason: the stop id or stop string that ended the text, None for the model's own end id.
    num_cached_tokens: prompt tokens found in the prefix cache when the request was admitted.
    """

    id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0


def _check_number(
    name: str, value: object, low: float, high: float, *, open_low: bool = False, what: str | None = None
) -> None:
    """Comparisons with NaN are false, so one test of the range refuses NaN and both infinities."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and low <= value <= high and not (open_low and value == low):  # type: ignore[operator]
        return
    allowed = f"above {low:g} and at most {high:g}" if open_low else f"from {low:g} to {high:g}"
    raise RequestError(f"{what or name} is {_show(value)}, but must be a number {allowed}", field=name)


def _check_integer(name: str, value: object, low: int, high: int, *, what: str | None = None, note: str = "") -> None:
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return
    message = f"{what or name} is {_show(value)}, but must be a whole number from {low} to {high}{note}"
    raise RequestError(message, field=name)


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise RequestError(f"{name} is {_show(value)}, but must be true or false", field=name)


def _stop_strings(stop: object) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, (tuple, list)) or not all(isinstance(string, str) and string for string in strings):
        raise RequestError(f"stop is {_show(stop)}, but must be strings, none of them empty", field="stop")
    if len(strings) > MAX_STOP_STRINGS:
        raise RequestError(f"stop has {len(strings)} strings, but may have at most {MAX_STOP_STRINGS}", field="stop")
    return tuple(strings)


def _stop_token_ids(token_ids: object) -> tuple[int, ...]:
    if not isinstance(token_ids, (tuple, list)):
        raise RequestError(f"stop_token_ids is {_show(token_ids)}, but must be a list of ids", field="stop_token_ids")
    for token_id in token_ids:
        _check_integer("stop_token_ids", token_id, 0, 2**31 - 1, what="one of stop_token_ids")
    return tuple(token_ids)


def _check_logit_bias(logit_bias: object) -> None:
    if not isinstance(logit_bias, Mapping):
        raise RequestError(
            f"logit_bias is {_show(logit_bias)}, but must map token ids to numbers from -100 to 100", field="logit_bias"
        )
    for token_id, bias in logit_bias.items():
        _check_integer("logit_bias", token_id, 0, 2**31 - 1, what="a token id of logit_bias")
        _check_number("logit_bias", bias, -100.0, 100.0, what=f"logit_bias of token {token_id}")


def _show(value: object) -> str:
    """A value in an error message, cut so that hostile input cannot flood a log."""
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python prints
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:60]}…"
