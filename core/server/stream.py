"""Answers in OpenAI's shapes: one body, or server-sent events as the text comes.

chat        role, text, text, …, text + finish_reason    [usage]    [DONE]
completion        text, text, …, text + finish_reason    [usage]    [DONE]
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import msgspec

from plexor.checkpoint.tokenizer import Tokenizer
from plexor.runtime.detokenizer import REPLACEMENT
from plexor.runtime.prompts import Delta
from plexor.runtime.request import TokenLogprobs
from plexor.server.client import Event, Group
from plexor.server.errors import ApiError, error_object
from plexor.server.intake import Work
from plexor.server.protocol import ChatRequest, CompletionRequest

DONE = b"data: [DONE]\n\n"
LEAST_LOGPROB = -9999.0
"""JSON has no infinities; this stands for a token that cannot come."""

Json = dict[str, Any]


class TokenTexts:
    """What tokens add to a text, for log probabilities."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.text = lru_cache(maxsize=1 << 16)(tokenizer.token_text)

    def bytes_of(self, token_id: int) -> list[int] | None:
        """None for a token that is only a part of a character."""
        text = self.text(token_id)
        return None if REPLACEMENT in text else list(text.encode())


@dataclass(slots=True)
class Part:
    """An addition to one answer, or all of it. offset: characters before it, an echo included."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: str | None = None
    stop_reason: int | str | None = None
    offset: int = 0

    def add(self, delta: Delta) -> None:
        """Take in what a step gave."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.finish, self.stop_reason = delta.finish, delta.stop_reason


@dataclass(slots=True)
class Job:
    """One request from its body to its answers."""

    body: CompletionRequest | ChatRequest
    work: Work
    group: Group
    model: str
    texts: TokenTexts
    num_tokens: int = 0
    num_cached: dict[int, int] = field(default_factory=dict)

    @property
    def num_choices(self) -> int:
        """Answers to one prompt."""
        return len(self.work.requests) // len(self.work.prompts)

    async def events(self) -> AsyncIterator[Event]:
        """The group's events, counted; ApiError where the engine failed at one of the requests."""
        async for event in self.group.events():
            self.num_tokens += len(event.delta.token_ids)
            self.num_cached[event.index // self.num_choices] = event.output.num_cached_tokens
            if event.delta.finish == "error":
                raise engine_error(self.work.id, event.delta)
            yield event

    def head(self, kind: str) -> Json:
        """What every body and every chunk begins with."""
        return {"id": self.work.id, "object": kind, "created": self.work.created, "model": self.model}

    def echo(self, index: int) -> str:
        """What stands before an answer."""
        return self.work.echoes[index // self.num_choices]

    def usage(self) -> Json:
        """Tokens so far; a prompt counts once however many answers it has."""
        num_prompt = sum(len(prompt.token_ids) for prompt in self.work.prompts)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": self.num_tokens,
            "total_tokens": num_prompt + self.num_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self.num_cached.values())},
        }


def engine_error(work_id: str, delta: Delta) -> ApiError:
    """What the client is told of an answer that ended in an error; the log gets the rest."""
    print(f"plexor: request {work_id} failed: {delta.error}", file=sys.stderr)
    return ApiError(500, "the engine failed at this request: the server's log says more")


async def completion_body(job: Job) -> Json:
    """The answer to a request without `stream`."""
    parts = await _collect(job)
    choices = [_completion_choice(job, index, part, first=True) for index, part in enumerate(parts)]
    return {**job.head("text_completion"), "choices": choices, "usage": job.usage()}


async def chat_body(job: Job) -> Json:
    """The answer to a request without `stream`."""
    parts = await _collect(job)
    choices = []
    for index, part in enumerate(parts):
        message = {"role": "assistant", "content": part.text, "refusal": None}
        choices.append({"index": index, "message": message, **_chat_rest(job, part)})
    body = {**job.head("chat.completion"), "choices": choices, "usage": job.usage()}
    if job.body.return_token_ids:
        body["prompt_token_ids"] = list(job.work.prompts[0].token_ids)
    return body


async def completion_events(job: Job) -> AsyncIterator[bytes]:
    """The answer to a request with `stream`, as server-sent events."""
    offsets: dict[int, int] = {}

    async def chunks() -> AsyncIterator[Json]:
        async for event in job.events():
            first = event.index not in offsets
            offset = offsets.setdefault(event.index, 0)
            part = Part(offset=offset)
            part.add(event.delta)
            choice = _completion_choice(job, event.index, part, first=first)
            offsets[event.index] += len(choice["text"])
            if _says_something(job, part) or choice["text"]:
                yield {**job.head("text_completion"), "choices": [choice]}

    async for data in _as_events(job, chunks(), "text_completion"):
        yield data


async def chat_events(job: Job) -> AsyncIterator[bytes]:
    """The answer to a request with `stream`, as server-sent events."""

    async def chunks() -> AsyncIterator[Json]:
        started: set[int] = set()
        async for event in job.events():
            if event.index not in started:
                started.add(event.index)
                yield _opening(job, event.index, is_first=len(started) == 1)
            part = Part()
            part.add(event.delta)
            if _says_something(job, part):
                delta = {"content": part.text} if part.text or part.finish is None else {}
                choice = {"index": event.index, "delta": delta, **_chat_rest(job, part)}
                yield {**job.head("chat.completion.chunk"), "choices": [choice]}

    async for data in _as_events(job, chunks(), "chat.completion.chunk"):
        yield data


async def _collect(job: Job) -> list[Part]:
    parts = [Part() for _ in job.work.requests]
    async for event in job.events():
        parts[event.index].add(event.delta)
    return parts


async def _as_events(job: Job, chunks: AsyncIterator[Json], kind: str) -> AsyncIterator[bytes]:
    """Chunks as server-sent events, with the usage where it was asked for; an error on the way is an event too."""
    options = job.body.stream_options
    try:
        async for chunk in chunks:
            if options is not None and options.continuous_usage_stats:
                chunk["usage"] = job.usage()
            yield _event(chunk)
        if options is not None and options.include_usage:
            yield _event({**job.head(kind), "choices": [], "usage": job.usage()})
    except ApiError as error:
        yield _event(error_object(error))
    yield DONE


def _event(content: Json) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def _says_something(job: Job, part: Part) -> bool:
    """Tokens inside a character or a possible stop string add no text yet, but their ids and logprobs may be wanted."""
    wanted = job.body.return_token_ids or job.body.num_logprobs is not None
    return bool(part.text or part.finish is not None or (wanted and part.token_ids))


def _opening(job: Job, index: int, *, is_first: bool) -> Json:
    choice = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    chunk = {**job.head("chat.completion.chunk"), "choices": [choice]}
    if job.body.return_token_ids and is_first:
        chunk["prompt_token_ids"] = list(job.work.prompts[0].token_ids)
    return chunk


def _completion_choice(job: Job, index: int, part: Part, *, first: bool) -> Json:
    """first: whether the answer begins with this part, so that the echo comes before it."""
    echo = job.echo(index) if first else ""
    choice: Json = {
        "index": index,
        "text": echo + part.text,
        "logprobs": None,
        "finish_reason": part.finish,
        "stop_reason": part.stop_reason,
    }
    if job.body.num_logprobs is not None:
        choice["logprobs"] = _completion_logprobs(job.texts, part.logprobs, part.offset + len(echo))
    if job.body.return_token_ids:
        choice["token_ids"] = part.token_ids
        if first:
            choice["prompt_token_ids"] = list(job.work.prompts[index // job.num_choices].token_ids)
    return choice


def _chat_rest(job: Job, part: Part) -> Json:
    """What stands beside the message or delta of a choice."""
    rest: Json = {"logprobs": None, "finish_reason": part.finish, "stop_reason": part.stop_reason}
    if job.body.num_logprobs is not None:
        rest["logprobs"] = {"content": [_chat_logprob(job.texts, entry) for entry in part.logprobs], "refusal": None}
    if job.body.return_token_ids:
        rest["token_ids"] = part.token_ids
    return rest


def _completion_logprobs(texts: TokenTexts, entries: Sequence[TokenLogprobs], offset: int) -> Json:
    tokens, offsets, top = [], [], []
    for entry in entries:
        text = texts.text(entry.token_id)
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
        likeliest: dict[str, float] = {}
        for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            likeliest.setdefault(texts.text(token_id), _finite(logprob))
        top.append(likeliest)
    logprobs = [_finite(entry.logprob) for entry in entries]
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets}


def _chat_logprob(texts: TokenTexts, entry: TokenLogprobs) -> Json:
    top = [_one_logprob(texts, token_id, logprob) for token_id, logprob in entry.top]
    return {**_one_logprob(texts, entry.token_id, entry.logprob), "top_logprobs": top}


def _one_logprob(texts: TokenTexts, token_id: int, logprob: float) -> Json:
    return {"token": texts.text(token_id), "logprob": _finite(logprob), "bytes": texts.bytes_of(token_id)}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
