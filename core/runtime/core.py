"""The step loop of one model: requests of token ids in, outputs of token ids out. It knows no text and no HTTP.

    schedule -> pack -> launch -> wait -> commit

With steps_ahead = 1 a step is launched before the last one has been waited for, so the device never idles while the
CPU reads tokens and plans.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plexor.checkpoint.folder import ModelFolder
from plexor.checkpoint.loader import LoadReport, Progress
from plexor.config import EngineConfig
from plexor.errors import ConfigError
from plexor.extension.catalog import Catalog
from plexor.kernels.table import resolve
from plexor.runtime.packer import pack
from plexor.runtime.ranks import Ranks
from plexor.runtime.request import FinishReason, Output, Request
from plexor.runtime.runner import Pending
from plexor.runtime.scheduler import Plan, Scheduler, SchedulerConfig
from plexor.runtime.stats import StepObserver

LogitsWatcher = Callable[[tuple[str, ...], Tensor], None]
"""Called with the request ids of a step's rows [R] and the logits that their tokens were drawn from [R, V]."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What requests must keep to, and what the engine has room for."""

    max_length: int
    vocab_size: int
    num_blocks: int
    block_size: int
    max_sequences: int


class EngineCore:
    """A loaded model and the requests that it runs."""

    def __init__(
        self, config: EngineConfig, catalog: Catalog, folder: ModelFolder, progress: Progress | None = None
    ) -> None:
        self._ranks = Ranks(config, catalog, folder, progress)
        rank = self._ranks.rank
        self.report: LoadReport = rank.report
        self.device: torch.device = rank.built.build.device
        self.limits = EngineLimits(
            rank.max_length, rank.built.config.vocab_size, rank.num_blocks, config.block_size, config.max_sequences
        )
        self.scheduler = Scheduler(
            SchedulerConfig(
                block_size=config.block_size,
                num_blocks=rank.num_blocks,
                max_sequences=config.max_sequences,
                max_step_tokens=config.step_tokens(self.device.type),
                max_length=rank.max_length,
                prefix_caching=config.prefix_caching,
                chunk=config.chunk,
            )
        )
        on_gpu = self.device.type == "cuda"
        self._steps_ahead = int(on_gpu) if config.steps_ahead is None else config.steps_ahead
        self._launched: deque[tuple[Plan, Pending]] = deque()
        self._plan: Plan | None = None  # launched last
        self._ended: list[Output] = []
        self._logits_watcher: LogitsWatcher | None = None
        self._observers: list[StepObserver] = [resolve(spec.build)() for spec in catalog.observers.values()]

    @property
    def has_work(self) -> bool:
        """Whether a further `step` would do or say something."""
        return bool(self._ended) or self.scheduler.has_work

    def observe(self, observer: StepObserver) -> None:
        """Tell a listener of every step and every finished request from now on."""
        self._observers.append(observer)

    def add(self, request: Request) -> None:
        """Queue a request; RequestError if it can never be served."""
        request.sampling.check_vocabulary(self.limits.vocab_size)
        self.scheduler.add(request)

    def finish(self, request_id: str, reason: FinishReason, stop_reason: str | None = None) -> None:
        """End a request now; its last Output comes with the next step. Nothing happens if it has ended already."""
        output = self.scheduler.finish(request_id, reason, stop_reason)
        if output is not None:
            self._ended.append(output)

    def step(self) -> list[Output]:
        """Launch the next step, read the oldest one that is due, and say what changed."""
        plan = self.scheduler.schedule()
        try:
            if plan is not None:
                self._launch(plan)
            outputs = self._read() if self._is_due(plan) else []
        except torch.OutOfMemoryError as error:
            outputs = self._fail(f"a step needed more memory than the device has ({error}): lower max_step_tokens")
        except BaseException:
            self._launched.clear()
            raise
        outputs = [*self._ended, *outputs]
        self._ended = []
        self._tell(outputs)
        return outputs

    def watch_logits(self, watcher: LogitsWatcher | None) -> None:
        """Tell a listener the logits of every step from now on, for measuring; None ends it.

        It gets the ids of the requests of the step's rows and a copy of the logits [R, V] in the model's dtype, on the
        device, before penalties, bias and bans. A row may belong to a request that has ended meanwhile.
        """
        self._logits_watcher = watcher
        self._ranks.rank.runner.watch_logits = None if watcher is None else self._take_logits

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """The logits [T, V] of a text that no request asked for, for measuring; ConfigError while requests run."""
        self._clear_cache()
        return self._ranks.rank.runner.logits(token_ids)

    def logit_parts(self, token_ids: Sequence[int], num_rows: int) -> Iterator[Tensor]:
        """What `logits` gives, num_rows rows at a time: a long text's logits would take gigabytes as a whole."""
        self._clear_cache()
        return self._ranks.rank.runner.logit_parts(token_ids, num_rows)

    def close(self) -> None:
        """End the processes of the other ranks; no step is possible from now on."""
        self._ranks.rank.runner.close()
        self._ranks.close()

    def _clear_cache(self) -> None:
        """For a text that is written over the cached prefixes."""
        if self.has_work:
            raise ConfigError("requests are running: measure when they have ended")
        if self._ranks.size > 1:
            raise ConfigError(f"measuring runs on one rank, not on {self._ranks.size}: leave --tp out")
        self.scheduler.pool.forget()

    def _launch(self, plan: Plan) -> None:
        step = pack(plan)
        stats = self.scheduler.stats(plan)
        self._plan = plan
        self._launched.append((plan, self._ranks.launch(step)))
        for observer in self._observers:
            observer.on_step(stats)

    def _take_logits(self, logits: Tensor) -> None:
        assert self._plan is not None
        assert self._logits_watcher is not None
        self._logits_watcher(tuple(sequence.request.id for sequence in self._plan.rows), logits.clone())

    def _is_due(self, plan: Plan | None) -> bool:
        """With nothing new to launch, what is under way is read; else as many steps stay ahead as are wanted."""
        return len(self._launched) > (self._steps_ahead if plan is not None else 0)

    def _read(self) -> list[Output]:
        plan, pending = self._launched.popleft()
        ids, logprobs = pending.wait()
        return self.scheduler.commit(plan, ids, logprobs)

    def _fail(self, error: str) -> list[Output]:
        self._launched.clear()
        torch.cuda.empty_cache()
        return self.scheduler.fail(error)

    def _tell(self, outputs: list[Output]) -> None:
        for output in outputs:
            if output.finish is not None:
                for observer in self._observers:
                    observer.on_finish(output)
