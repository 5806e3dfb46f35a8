"""What observers are told of each step and of each finished request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from plexor.runtime.request import Output


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """One step as it was launched.

    num_tokens: computed in the step, prompts and answers together. num_sampled: tokens drawn. num_running,
    num_waiting: requests. num_preempted: requests that lost their blocks to older ones in this step. free_blocks:
    blocks that no running request holds, cached prefixes included. prefix_queries, prefix_hits: tokens of the requests
    admitted in this step, and how many of them the prefix cache held. started: ids of the requests that this step is
    the first for.
    """

    num_tokens: int
    num_sampled: int
    num_running: int
    num_waiting: int
    num_preempted: int
    free_blocks: int
    total_blocks: int
    prefix_queries: int
    prefix_hits: int
    started: tuple[str, ...] = ()


class StepObserver(Protocol):
    """What an `Observer` plugin builds; called in the process that schedules, so it must return at once."""

    def on_step(self, stats: StepStats) -> None:
        """After each step has been scheduled."""
        ...

    def on_finish(self, output: Output) -> None:
        """With the last output of each request."""
        ...
