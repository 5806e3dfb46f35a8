"""Text and pictures to requests, and outputs back to text: the half of the engine that knows the tokenizer."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from plexor.checkpoint.folder import ModelFolder, open_folder
from plexor.checkpoint.tokenizer import Tokenizer, load_tokenizer
from plexor.config import EngineConfig
from plexor.errors import RequestError
from plexor.extension.catalog import Catalog
from plexor.kernels.table import resolve
from plexor.runtime.detokenizer import StopScanner, TextDecoder
from plexor.runtime.request import (
    FinishReason,
    Media,
    MediaProcessor,
    Output,
    Request,
    SamplingParams,
    TokenLogprobs,
)

if TYPE_CHECKING:
    from PIL.Image import Image

SEED_STEP = 0x9E3779B97F4A7C15
"""Odd, so that the answers to one prompt get different seeds from one."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt in token ids, with the media whose placeholders stand among them."""

    token_ids: tuple[int, ...]
    media: tuple[Media, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step adds to one answer. ends_early: a stop string was found, so the engine must end the request."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish: FinishReason | None
    stop_reason: int | str | None
    error: str | None
    ends_early: bool = False


class PromptDesk:
    """Makes requests and follows their answers, for one model."""

    def __init__(self, folder: ModelFolder, catalog: Catalog) -> None:
        self.tokenizer: Tokenizer = load_tokenizer(folder.path)
        self._folder = folder
        self._decoder = TextDecoder(self.tokenizer.backend)
        self._catalog = catalog
        self._processors: dict[str, MediaProcessor] = {}
        self._numbers = itertools.count()

    def text(self, prompt: str, images: Sequence[Image] = (), *, add_special_tokens: bool = True) -> Prompt:
        """A plain prompt; RequestError if it cannot be encoded.

        add_special_tokens: whether the tokenizer frames the text, as it does for a prompt that is not a rendered chat.
        """
        prompt_ids = self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        if not images:
            return Prompt(tuple(prompt_ids))
        token_ids, media = self._processor("image").prepare(images, prompt_ids, self.tokenizer.backend)
        return Prompt(tuple(token_ids), media)

    def open_image(self, data: bytes) -> Image:
        """A picture from a file's bytes, decoded as this model's processor allows; RequestError for what it refuses."""
        return self._processor("image").open(data)

    def chat(self, messages: Sequence[Mapping[str, Any]], images: Sequence[Image] = ()) -> Prompt:
        """A conversation through the checkpoint's chat template, with the answer's beginning opened."""
        return self.text(self.tokenizer.render_chat(messages), images, add_special_tokens=False)

    def ids(self, token_ids: Sequence[int], vocab_size: int) -> Prompt:
        """A prompt given in ids; RequestError for one that the model does not have."""
        for token_id in token_ids:
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                raise RequestError(
                    f"the prompt holds token {token_id!r}, but the vocabulary has {vocab_size} tokens: use whole "
                    f"numbers from 0 to {vocab_size - 1}",
                    field="prompt",
                )
        return Prompt(tuple(token_ids))

    def requests(self, prompt: Prompt, sampling: SamplingParams, name: str | None = None) -> list[Request]:
        """One request for each of the n answers; with a seed, answer i draws from seed + i * SEED_STEP."""
        stem = name if name is not None else f"request-{next(self._numbers)}"
        arrived = time.monotonic()
        requests = []
        for index in range(sampling.n):
            seed = None if sampling.seed is None else _signed(sampling.seed + index * SEED_STEP)
            requests.append(
                Request(
                    f"{stem}.{index}",
                    prompt.token_ids,
                    replace(sampling, n=1, seed=seed),
                    self._folder.end_ids,
                    prompt.media,
                    arrived,
                )
            )
        return requests

    def follow(self, request: Request) -> Answer:
        """The text of a request's answer as it comes."""
        return Answer(request, self._decoder)

    def _processor(self, kind: str) -> MediaProcessor:
        if kind not in self._processors:
            spec = self._catalog.input_processor(self._folder.architecture, kind)
            self._processors[kind] = resolve(spec.build)(self._folder.path, self._folder.config)
        return self._processors[kind]


class Answer:
    """Turns a request's outputs into text: whole characters, up to the first stop string."""

    def __init__(self, request: Request, decoder: TextDecoder) -> None:
        sampling = request.sampling
        self._sampling = sampling
        self._stream = decoder.stream(request.tokens, skip_special_tokens=sampling.skip_special_tokens)
        self._scanner = StopScanner(sampling.stop, include_stop=sampling.include_stop)
        self._num_tokens = 0
        self._ended = False

    def push(self, output: Output) -> Delta | None:
        """The addition to the answer, or None for what comes after a stop string has ended it."""
        if self._ended:
            return None
        self._num_tokens += len(output.token_ids)
        visible = output.token_ids[:-1] if self._hides_last(output) else output.token_ids
        text, stop = self._scan(visible, output)
        early = stop is not None
        finish: FinishReason | None = "stop" if early else output.finish
        self._ended = finish is not None
        return Delta(
            text,
            output.token_ids,
            output.logprobs or (),
            finish,
            stop if early else output.stop_reason,
            output.error,
            ends_early=early and output.finish is None,
        )

    def _hides_last(self, output: Output) -> bool:
        """The id that ended the answer is not part of its text, unless it was asked for."""
        return output.finish == "stop" and bool(output.token_ids) and not self._sampling.include_stop

    def _scan(self, token_ids: Sequence[int], output: Output) -> tuple[str, str | None]:
        text = self._stream.push(token_ids)
        if output.finish is not None:
            text += self._stream.flush()
        armed = self._num_tokens > self._sampling.min_tokens
        shown, stop = self._scanner.push(text, armed=armed)
        if stop is None and output.finish is not None:
            shown += self._scanner.flush()
        return shown, stop


def find_folder(config: EngineConfig, catalog: Catalog) -> ModelFolder:
    """The checkpoint that a config means."""
    if config.model is None:
        return open_folder(catalog.checkpoint_folder(catalog.default_checkpoint()))
    return open_folder(catalog.resolve_model(config.model))


def _signed(seed: int) -> int:
    """Into 64 signed bits."""
    return (seed + 2**63) % 2**64 - 2**63
