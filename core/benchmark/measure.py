"""Runs workloads through the engine as a user would, text made of the tokens included, and times them."""

from __future__ import annotations

import os
import random
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

from plexor.benchmark.workloads import Workload
from plexor.errors import PlexorError
from plexor.runtime.engine import Completion, Engine
from plexor.runtime.request import SamplingParams

WARM_UP_TOKENS = 16
WARM_UP_REQUESTS = 64


@dataclass(frozen=True, slots=True)
class Timing:
    """One repetition. Seconds until every request had its first token, and until the last token of all."""

    first_tokens: float
    total: float


def why_not(workload: Workload, engine: Engine) -> str | None:
    """Why the engine, as it is set up, cannot run a workload as it is defined; None if it can."""
    limits = engine.core.limits
    if workload.length > limits.max_length:
        return f"a request has {workload.length:,} tokens and the context {limits.max_length:,}"
    if workload.kind == "decode" and workload.requests > limits.max_sequences:
        return f"{limits.max_sequences:,} requests run at once: raise --max-sequences"
    together = workload.requests if workload.kind == "decode" else 1
    wanted = together * -(-workload.length // limits.block_size)
    if wanted > limits.num_blocks:
        return (
            f"it takes {wanted:,} cache blocks and there are {limits.num_blocks:,}: use fewer bits, more GPUs or a "
            "smaller model"
        )
    return None


def run_once(engine: Engine, workload: Workload, repetition: int) -> Timing:
    """One repetition, with prompts of its own so that no prefix is in the cache; PlexorError if a request fails."""
    prompts = random_prompts(workload, repetition, engine.core.limits.vocab_size)
    sampling = SamplingParams(temperature=0, max_tokens=workload.new_tokens, ignore_end=True)
    started = time.perf_counter()
    answers = engine.generate(prompts, sampling)
    total = time.perf_counter() - started
    for answer in answers:
        _check(answer, workload)
    return Timing(max(answer.first_token_seconds for answer in answers), total)


def run_repeatedly(engine: Engine, workload: Workload, repeats: int) -> list[Timing]:
    """Repetitions of short answers that are not counted, for what is compiled and captured, and then the others."""
    for short in warm_ups(workload):
        run_once(engine, short, 0)
    return [run_once(engine, workload, repetition) for repetition in range(1, repeats + 1)]


def warm_ups(workload: Workload) -> tuple[Workload, ...]:
    """Short runs that meet what a workload runs.

    Where requests wait for each other's prompts, few of them fill steps with prompts, and all of them, with next to no
    prompt, decode together.
    """
    short = replace(workload, new_tokens=min(workload.new_tokens, WARM_UP_TOKENS))
    if workload.kind != "serve":
        return (short,)
    few = replace(short, requests=min(workload.requests, WARM_UP_REQUESTS))
    return few, replace(short, prompt_tokens=min(workload.prompt_tokens, WARM_UP_TOKENS))


def median(timings: list[Timing]) -> Timing:
    """Of each time by itself."""
    return Timing(
        statistics.median(timing.first_tokens for timing in timings),
        statistics.median(timing.total for timing in timings),
    )


def random_prompts(workload: Workload, repetition: int, vocab_size: int) -> list[list[int]]:
    """Alike in every run, and different in every workload, repetition and request."""
    draw = random.Random(f"{workload.name} {repetition}")
    return [draw.choices(range(vocab_size), k=workload.prompt_tokens) for _ in range(workload.requests)]


def seconds_since_start() -> float:
    """Since this process was started, to a hundredth: the kernel's count of ticks (Linux, proc(5), starttime)."""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def _check(answer: Completion, workload: Workload) -> None:
    if answer.error is not None:
        raise PlexorError(f"a request of {workload.name} failed: {answer.error}")
    assert len(answer.token_ids) == workload.new_tokens, f"{len(answer.token_ids)} tokens of {workload.new_tokens}"
    assert answer.num_cached_tokens == 0, f"{answer.num_cached_tokens} tokens of a fresh prompt were cached"
