"""The bodies of requests: what OpenAI's clients send, checked strictly, and turned into sampling parameters.

Fields that nobody knows are ignored, as other servers do; fields that are known and not supported are refused, because
to ignore them would give an answer that was not asked for.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from plexor.errors import RequestError
from plexor.runtime.request import SamplingParams
from plexor.server.errors import ApiError

MAX_PROMPTS: Final = 1024
MAX_VALUES: Final = 2_000_000
"""Commas and brackets in a body: what bounds the memory that its objects take."""
MAX_STOP_CHARACTERS: Final = 1024
DEFAULT_MAX_TOKENS: Final = 16
"""Of /v1/completions, as OpenAI has it."""

_REFUSED: Final[Mapping[str, str]] = {
    "tools": "tools are not supported: leave them out",
    "functions": "functions are not supported: leave them out",
    "function_call": "functions are not supported: leave function_call out",
    "suffix": "suffix is not supported: put the text into the prompt",
    "use_beam_search": "beam search is not supported: leave use_beam_search out",
    "prompt_logprobs": "log probabilities of the prompt are not supported: leave prompt_logprobs out",
    "truncate_prompt_tokens": "prompts are never cut: shorten the prompt and leave truncate_prompt_tokens out",
    "prompt_embeds": "embeddings as a prompt are not supported: send text or token ids",
    "chat_template": "the model's own chat template is used: leave chat_template out",
    "chat_template_kwargs": "the model's own chat template is used as it is: leave chat_template_kwargs out",
    "continue_final_message": "continuing a message is not supported: leave continue_final_message out",
    "structured_outputs": "structured outputs are not supported: leave structured_outputs out",
    "guided_json": "structured outputs are not supported: leave guided_json out",
    "guided_regex": "structured outputs are not supported: leave guided_regex out",
    "guided_choice": "structured outputs are not supported: leave guided_choice out",
    "guided_grammar": "structured outputs are not supported: leave guided_grammar out",
    "audio": "audio is not supported: leave it out",
}
"""Field to message; null, false and "" ask for nothing and pass."""


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(_Body):
    """include_usage: a last chunk with the usage. continuous_usage_stats: the usage so far in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ResponseFormat(_Body):
    """The form of the answer; only text."""

    type: str


class CommonRequest(_Body, ABC):
    """The fields that both kinds of requests have; null means the default everywhere."""

    model: str
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    seed: int | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = Field(default=None, min_length=1, max_length=1024)

    @field_validator("stop", mode="before")
    @classmethod
    def _check_stop(cls, value: Any) -> Any:
        strings = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(strings, list) or not all(isinstance(string, str) for string in strings):
            raise PydanticCustomError("stop", "it must be a string or a list of strings")
        if any(len(string) > MAX_STOP_CHARACTERS for string in strings):
            raise PydanticCustomError("stop", f"a stop string has more than {MAX_STOP_CHARACTERS} characters")
        return value

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """As SamplingParams.logprobs."""

    @property
    def answer_limit(self) -> int | None:
        """Tokens that were asked for, None where nothing was said."""
        return self.max_tokens

    def sampling(self, advice: Mapping[str, float], max_tokens: int | None) -> SamplingParams:
        """How to sample: the request over the publisher's advice over OpenAI's defaults; RequestError as ever."""
        given = {
            name: value
            for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
            if (value := getattr(self, name)) is not None
        }
        chosen: dict[str, Any] = {**advice, **given}
        return SamplingParams(
            temperature=chosen.get("temperature", 1.0),
            top_k=chosen.get("top_k", 0),
            top_p=chosen.get("top_p", 1.0),
            min_p=chosen.get("min_p", 0.0),
            repetition_penalty=chosen.get("repetition_penalty", 1.0),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            stop=tuple([self.stop] if isinstance(self.stop, str) else self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            include_stop=bool(self.include_stop_str_in_output),
            ignore_end=bool(self.ignore_eos),
            seed=self.seed,
            logprobs=self.num_logprobs,
            logit_bias=_bias(self.logit_bias or {}),
            n=1 if self.n is None else self.n,
            skip_special_tokens=self.skip_special_tokens is not False,
        )

    def param_of(self, field: str | None) -> str | None:
        """What a field of SamplingParams is called in this body."""
        return {"ignore_end": "ignore_eos", "include_stop": "include_stop_str_in_output"}.get(field or "", field)


class CompletionRequest(CommonRequest):
    """The body of POST /v1/completions. prompt: text, ids, or a list of either."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _check_prompt(cls, value: Any, _: Any) -> Any:
        """One loop over plain types: the general union takes much longer and explains less."""
        if isinstance(value, str) or (isinstance(value, list) and value and _all_ids(value)):
            return value
        if not isinstance(value, list) or not value:
            raise PydanticCustomError("prompt", "it must be a text, a list of token ids, or a list of such prompts")
        if len(value) > MAX_PROMPTS:
            raise PydanticCustomError("prompt", f"it has {len(value)} prompts, but may have at most {MAX_PROMPTS}")
        if all(isinstance(item, str) for item in value) or all(_is_id_list(item) for item in value):
            return value
        raise PydanticCustomError("prompt", "its items must all be texts, all token ids, or all lists of token ids")

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class Message(_Body):
    """One message. content: text, or a list of parts of the types text and image_url."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]]
    name: str | None = None
    reasoning_content: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _check_content(cls, value: Any) -> Any:
        if isinstance(value, str):
            return value
        if not isinstance(value, list) or not value:
            raise PydanticCustomError("content", "it must be a text or a list of parts with at least one")
        for part in value:
            _check_part(part)
        return value

    @property
    def text(self) -> str:
        """The text parts, one to a line."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part["text"] for part in self.content if part["type"] == "text")

    @property
    def image_urls(self) -> list[str]:
        """The addresses of the pictures."""
        if isinstance(self.content, str):
            return []
        return [part["image_url"]["url"] for part in self.content if part["type"] == "image_url"]

    def plain(self) -> dict[str, str]:
        """As a chat template takes it."""
        message = {"role": self.role, "content": self.text}
        if self.name is not None:
            message["name"] = self.name
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        return message


class ChatRequest(CommonRequest):
    """The body of POST /v1/chat/completions. max_completion_tokens is the newer name of max_tokens and goes before."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tool_choice: Any = None
    add_generation_prompt: bool | None = None

    @field_validator("messages", mode="before")
    @classmethod
    def _check_messages(cls, value: Any) -> Any:
        for message in value if isinstance(value, list) else ():
            if isinstance(message, dict) and (message.get("tool_calls") or message.get("function_call")):
                raise PydanticCustomError("messages", "calls of tools are not supported: leave tool_calls out")
        return value

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def answer_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def param_of(self, field: str | None) -> str | None:
        if field == "max_tokens" and self.max_completion_tokens is not None:
            return "max_completion_tokens"
        return {"logprobs": "top_logprobs", "image": "messages", "prompt": "messages"}.get(
            field or "", super().param_of(field)
        )


AnyRequest = TypeVar("AnyRequest", CompletionRequest, ChatRequest)


def parse(model: type[AnyRequest], data: bytes) -> AnyRequest:
    """A body as the request that it is; ApiError with status 400 and the field at fault."""
    found = _read_object(data)
    for name, message in _REFUSED.items():
        if found.get(name) not in (None, False, ""):
            raise ApiError(400, message, param=name)
    try:
        request = model.model_validate(found)
    except ValidationError as error:
        raise _first_error(error) from error
    _check_common(request)
    if isinstance(request, CompletionRequest):
        _check_completion(request)
    else:
        _check_chat(request)
    return request


def _check_common(request: CommonRequest) -> None:
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options goes with stream: set stream to true", param="stream_options")
    if request.response_format is not None and request.response_format.type != "text":
        raise ApiError(
            400, "response_format is not supported, except for the type text: leave it out", param="response_format"
        )


def _check_completion(request: CompletionRequest) -> None:
    if request.best_of not in (None, 1):
        raise ApiError(400, "best_of is not supported: use n and choose among the answers", param="best_of")
    if request.echo and request.logprobs is not None:
        raise ApiError(
            400,
            "echo together with logprobs needs log probabilities of the prompt, which are not supported: leave out one",
            param="echo",
        )


def _check_chat(request: ChatRequest) -> None:
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs goes with logprobs: set logprobs to true", param="top_logprobs")
    if request.tool_choice not in (None, "none"):
        raise ApiError(400, "tools are not supported: leave tool_choice out", param="tool_choice")
    if request.add_generation_prompt is False:
        raise ApiError(
            400, "answers always begin a message: leave add_generation_prompt out", param="add_generation_prompt"
        )


def _read_object(data: bytes) -> dict[str, Any]:
    """The JSON object in a body. NaN and infinities pass here, so that the field that holds one is named later."""
    num_values = data.count(b",") + data.count(b"[") + data.count(b"{")
    if num_values > MAX_VALUES:
        raise ApiError(413, f"the body holds {num_values} commas and brackets, but may hold at most {MAX_VALUES}")
    try:
        found = json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON: {error.msg} (line {error.lineno} column {error.colno})") from error
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply") from error
    except ValueError as error:  # an integer of more digits than Python reads
        raise ApiError(400, "the body holds a number of thousands of digits") from error
    if not isinstance(found, dict):
        raise ApiError(400, "the body must be a JSON object")
    if b"\\u" in data:
        _refuse_half_characters(found)
    return found


def _refuse_half_characters(found: dict[str, Any]) -> None:
    """JSON can spell half of a surrogate pair, which is no text and cannot be sent on."""
    for param, value in found.items():
        pending = [param, value]
        while pending:
            current = pending.pop()
            if isinstance(current, dict):
                pending += [*current, *current.values()]
            elif isinstance(current, list):
                pending += current
            elif isinstance(current, str) and not _is_text(current):
                shown = param if _is_text(param) else None
                raise ApiError(400, "the body holds half of a surrogate pair, which is no text", param=shown)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _first_error(error: ValidationError) -> ApiError:
    """One field at fault is enough to say; its value is not sent back."""
    details = error.errors(include_url=False, include_context=False, include_input=False)[0]
    # Unions add the type that was tried to the place, as in ("stop", "list[str]", 0).
    field = str(details["loc"][0]) if details["loc"] else None
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in details["loc"]).lstrip(".")
    message = details["msg"]
    return ApiError(400, f"{where}: {message[:1].lower()}{message[1:]}", param=field)


def _bias(given: Mapping[str, float]) -> dict[int, float]:
    """Token id to bias; JSON has only strings for keys."""
    bias = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise RequestError("logit_bias has a key that is no token id: use numbers from 0", field="logit_bias")
        bias[int(key)] = value
    return bias


def _all_ids(value: list[Any]) -> bool:
    return all(type(item) is int for item in value)


def _is_id_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and _all_ids(value)


def _check_part(part: Any) -> None:
    """One part of a message's content."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise PydanticCustomError("content", "a part of the type text must have a string as its text")
    elif kind == "image_url":
        image = part.get("image_url")
        if not isinstance(image, dict) or not isinstance(image.get("url"), str):
            raise PydanticCustomError("content", "a part of the type image_url must have image_url: {url: string}")
    else:
        raise PydanticCustomError("content", "each part must be an object of the type text or image_url")
