"""From a checked body to requests for the engine: data URLs to pictures, templates, tokens; it runs in a thread."""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from plexor.checkpoint.folder import ModelFolder
from plexor.errors import ConfigError, RequestError
from plexor.runtime.prompts import Prompt, PromptDesk
from plexor.runtime.request import Request
from plexor.server.client import EngineClient
from plexor.server.errors import ApiError
from plexor.server.protocol import DEFAULT_MAX_TOKENS, ChatRequest, CommonRequest, CompletionRequest
from plexor.server.wire import Ready

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class Work:
    """What one body asks for. requests: n for each prompt, in order. echoes: the text to repeat before each answer."""

    id: str
    created: int
    prompts: tuple[Prompt, ...]
    echoes: tuple[str, ...]
    requests: tuple[Request, ...]


class Intake:
    """Makes the requests of one model. max_images: pictures in one body. max_waiting: as in ServerSettings."""

    def __init__(
        self, desk: PromptDesk, folder: ModelFolder, client: EngineClient, *, max_images: int, max_waiting: int
    ) -> None:
        self._desk = desk
        self._advice = folder.default_sampling
        self._client = client
        self._max_images = max_images
        self._max_waiting = max_waiting

    def completion(self, work_id: str, body: CompletionRequest) -> Work:
        """ApiError with status 400 for what cannot be served."""
        with_frame = body.add_special_tokens is not False
        try:
            self._check_answers(len(body.prompts), body)
            prompts = tuple(self._prompt(prompt, with_frame) for prompt in body.prompts)
            requests = self._requests(work_id, body, prompts, default_max_tokens=DEFAULT_MAX_TOKENS)
        except RequestError as error:
            raise as_api_error(error, body) from error
        echoes = tuple(self._echo(given, body) for given in body.prompts) if body.echo else ("",) * len(prompts)
        return Work(work_id, int(time.time()), prompts, echoes, requests)

    def chat(self, work_id: str, body: ChatRequest) -> Work:
        """ApiError with status 400 for what cannot be served."""
        try:
            self._check_answers(1, body)
            prompts = (self._conversation(body),)
            requests = self._requests(work_id, body, prompts, default_max_tokens=None)
        except RequestError as error:
            raise as_api_error(error, body) from error
        return Work(work_id, int(time.time()), prompts, ("",), requests)

    @property
    def _limits(self) -> Ready:
        return self._client.limits

    @cached_property
    def _max_characters(self) -> int:
        """Of a prompt that could fit: as many of the longest tokens as the context holds."""
        vocabulary = self._desk.tokenizer.backend.get_vocab(with_added_tokens=True)
        return self._limits.room * max((len(token) for token in vocabulary), default=1)

    def _check_answers(self, num_prompts: int, body: CommonRequest) -> None:
        wanted = num_prompts * (1 if body.n is None else body.n)
        most = self._limits.max_sequences + self._max_waiting
        if wanted > most:
            raise RequestError(
                f"{num_prompts} prompts with n = {body.n or 1} ask for {wanted} answers, but the server takes at most "
                f"{most} at once: send fewer in one request",
                field="n",
            )

    def _prompt(self, given: str | list[int], with_frame: bool) -> Prompt:
        if isinstance(given, str):
            self._check_characters(len(given))
            return self._desk.text(given, add_special_tokens=with_frame)
        return self._desk.ids(given, self._limits.vocab_size)

    def _check_characters(self, count: int) -> None:
        """Sooner than tokenizing megabytes would tell."""
        if count > self._max_characters:
            raise RequestError(
                f"the prompt has {count} characters, and even the longest tokens put only {self._max_characters} into "
                f"a context of {self._limits.room} tokens: shorten the prompt",
                field="prompt",
            )

    def _conversation(self, body: ChatRequest) -> Prompt:
        self._check_characters(sum(len(message.text) for message in body.messages))
        images = self._images([url for message in body.messages for url in message.image_urls])
        if images and not self._desk.tokenizer.has_chat_template and len(body.messages) == 1:
            # Models that only describe pictures have no template: the one message is their prompt.
            return self._desk.text(body.messages[0].text, images)
        messages = [message.plain() for message in body.messages]
        if not images and body.add_special_tokens:
            return self._desk.text(self._desk.tokenizer.render_chat(messages))
        return self._desk.chat(messages, images)

    def _images(self, urls: Sequence[str]) -> list[Image]:
        if len(urls) > self._max_images:
            raise RequestError(
                f"the messages hold {len(urls)} images, but may hold at most {self._max_images}: send fewer",
                field="messages",
            )
        try:
            return [self._desk.open_image(read_data_url(url)) for url in urls]
        except ConfigError as error:
            raise RequestError("the model takes no images: send text alone", field="messages") from error

    def _echo(self, given: str | list[int], body: CompletionRequest) -> str:
        if isinstance(given, str):
            return given
        return self._desk.tokenizer.decode(given, skip_special_tokens=body.skip_special_tokens is not False)

    def _requests(
        self, work_id: str, body: CommonRequest, prompts: Sequence[Prompt], *, default_max_tokens: int | None
    ) -> tuple[Request, ...]:
        salt = (body.cache_salt or "").encode()
        requests: list[Request] = []
        for index, prompt in enumerate(prompts):
            max_tokens = body.answer_limit
            if max_tokens is None and default_max_tokens is not None:
                max_tokens = max(1, min(default_max_tokens, self._limits.room - len(prompt.token_ids)))
            sampling = body.sampling(self._advice, max_tokens)
            made = self._desk.requests(prompt, sampling, f"{work_id}-{index}")
            requests += [replace(request, cache_salt=salt) for request in made]
        return tuple(requests)


def as_api_error(error: RequestError, body: CommonRequest) -> ApiError:
    """A refusal with the name that the field at fault has in the body."""
    return ApiError(400, str(error), param=body.param_of(error.field))


def read_data_url(url: str) -> bytes:
    """The bytes in a base64 data URL of a picture (RFC 2397); RequestError for any other address."""
    if url[:5].lower() != "data:":
        raise RequestError(
            "image_url is no data URL, and nothing is fetched from elsewhere: send data:image/png;base64,…",
            field="messages",
        )
    head, comma, data = url[5:].partition(",")
    kind, *parameters = head.lower().split(";")
    if not comma or not parameters or parameters[-1].strip() != "base64":
        raise RequestError("image_url must have the form data:image/png;base64,…", field="messages")
    if not kind.startswith("image/"):
        raise RequestError("image_url holds something other than an image: its type must be image/…", field="messages")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError("image_url holds no valid base64", field="messages") from error
