"""The Python door: prompts in, text out, everything in this process.

from plexor import Engine, SamplingParams
engine = Engine("path/to/checkpoint")
print(engine.generate("Once upon a time", SamplingParams(max_tokens=64))[0].text)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from plexor.checkpoint.folder import ModelFolder
from plexor.checkpoint.loader import Progress
from plexor.config import EngineConfig
from plexor.errors import RequestError
from plexor.extension.catalog import Catalog
from plexor.runtime.core import EngineCore
from plexor.runtime.loading import settle_precision
from plexor.runtime.prompts import Answer, Delta, Prompt, PromptDesk, find_folder
from plexor.runtime.request import FinishReason, Output, Request, SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from PIL.Image import Image

PromptLike = str | Sequence[int] | Prompt
"""Text, token ids, or a prompt that PromptDesk made."""


@dataclass(slots=True)
class Completion:
    """One answer. index: which of the n answers to its prompt. Times are seconds since the request was made."""

    prompt_token_ids: tuple[int, ...]
    index: int = 0
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    num_cached_tokens: int = 0
    first_token_seconds: float = 0.0
    total_seconds: float = 0.0


@dataclass(slots=True)
class _Running:
    """A request under way. unread: tokens whose text nobody has needed yet; None where each step's text is needed."""

    request: Request
    answer: Answer
    completion: Completion
    started: float
    unread: list[int] | None


class Engine:
    """A loaded model that answers prompts. Close it, or use it as a context manager, to end its other processes."""

    def __init__(
        self,
        model: str | None = None,
        *,
        config: EngineConfig | None = None,
        catalog: Catalog | None = None,
        progress: Progress | None = None,
    ) -> None:
        """model: a checkpoint folder or a shipped checkpoint's name, over config.model; None takes the default one."""
        config = config or EngineConfig()
        self.config = config if model is None else replace(config, model=model)
        self.catalog = catalog or Catalog.load(strict=self.config.strict_plugins)
        self.folder: ModelFolder = find_folder(self.config, self.catalog)
        self.config = settle_precision(self.config, self.catalog, self.folder)
        self.prompts = PromptDesk(self.folder, self.catalog)
        self.core = EngineCore(self.config, self.catalog, self.folder, progress)
        self.prompts.tokenizer.check_vocabulary(self.core.limits.vocab_size)
        self._running: dict[str, _Running] = {}

    def generate(
        self, prompts: PromptLike | Sequence[PromptLike], sampling: SamplingParams | None = None
    ) -> list[Completion]:
        """Answers to one prompt or to several, run together; n answers to each, in order."""
        asked: list[_Running] = []
        try:
            for prompt in _listed(prompts):
                asked += self._ask(prompt, sampling or SamplingParams())
            while any(running.completion.finish_reason is None for running in asked):
                self.step()
        except BaseException:
            self._abort(asked)
            raise
        return [running.completion for running in asked]

    def stream(self, prompt: PromptLike, sampling: SamplingParams | None = None) -> Iterator[tuple[Completion, Delta]]:
        """Each addition to the answers to one prompt as it comes, with the answer so far.

        Leaving the loop early aborts the request.
        """
        group = self._ask(prompt, sampling or SamplingParams(), streams=True)
        mine = {running.request.id for running in group}
        try:
            while any(running.completion.finish_reason is None for running in group):
                yield from [(running.completion, delta) for running, delta in self.step() if running.request.id in mine]
        finally:
            self._abort(group)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: SamplingParams | None = None,
        images: Sequence[Image] = (),
    ) -> list[Completion]:
        """The answer to a conversation, through the checkpoint's chat template."""
        return self.generate(self.prompts.chat(messages, images), sampling)

    def step(self) -> list[tuple[_Running, Delta]]:
        """One step of everything that runs; what it adds to answers that are read as they come, or that have ended."""
        changes = []
        for output in self.core.step():
            running = self._running.get(output.id)
            if running is None:
                continue
            if running.unread is not None:
                self._keep_unread(running, running.unread, output)
                if output.finish is None:
                    continue
                output = replace(output, token_ids=tuple(running.unread))
            delta = running.answer.push(output)
            if delta is not None:
                self._record(running, output, delta)
                changes.append((running, delta))
        return changes

    def close(self) -> None:
        self.core.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, prompt: PromptLike, sampling: SamplingParams, *, streams: bool = False) -> list[_Running]:
        made = self._prompt(prompt)
        needs_text = streams or bool(sampling.stop) or sampling.logprobs is not None
        group = []
        for index, request in enumerate(self.prompts.requests(made, sampling)):
            self.core.add(request)
            completion = Completion(made.token_ids, index)
            unread: list[int] | None = None if needs_text else []
            running = _Running(request, self.prompts.follow(request), completion, time.perf_counter(), unread)
            self._running[request.id] = running
            group.append(running)
        return group

    def _abort(self, group: Sequence[_Running]) -> None:
        for running in group:
            if running.completion.finish_reason is None:
                self.core.finish(running.request.id, "abort")

    def _prompt(self, prompt: PromptLike) -> Prompt:
        if isinstance(prompt, Prompt):
            return prompt
        if isinstance(prompt, str):
            return self.prompts.text(prompt)
        return self.prompts.ids(prompt, self.core.limits.vocab_size)

    def _keep_unread(self, running: _Running, unread: list[int], output: Output) -> None:
        if not unread:
            running.completion.first_token_seconds = time.perf_counter() - running.started
        unread += output.token_ids

    def _record(self, running: _Running, output: Output, delta: Delta) -> None:
        completion, now = running.completion, time.perf_counter() - running.started
        if delta.token_ids and not completion.token_ids and running.unread is None:
            completion.first_token_seconds = now
        completion.token_ids.extend(delta.token_ids)
        completion.logprobs.extend(delta.logprobs)
        completion.text += delta.text
        completion.num_cached_tokens = output.num_cached_tokens
        completion.total_seconds = now
        if delta.finish is None:
            return
        completion.finish_reason, completion.stop_reason, completion.error = (
            delta.finish,
            delta.stop_reason,
            delta.error,
        )
        del self._running[output.id]
        if delta.ends_early:
            self.core.finish(output.id, "stop", str(delta.stop_reason))


def _listed(prompts: PromptLike | Sequence[PromptLike]) -> Sequence[PromptLike]:
    """A single prompt as a list of one; a list of ints is one prompt in ids."""
    if isinstance(prompts, str | Prompt):
        return [prompts]
    if not prompts:
        raise RequestError("the list of prompts is empty: give at least one", field="prompt")
    if isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]
    return prompts  # type: ignore[return-value]
