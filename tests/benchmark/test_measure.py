"""Workloads on a tiny engine: what runs, what is left out and why; no time is looked at."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from plexor import Engine, EngineConfig
from plexor.benchmark.measure import (
    Timing,
    median,
    random_prompts,
    run_once,
    run_repeatedly,
    seconds_since_start,
    warm_ups,
    why_not,
)
from plexor.benchmark.workloads import Workload, parse_workloads
from plexor.errors import PlexorError
from plexor.runtime.request import Output

SMALL = Workload("small", "decode", requests=3, prompt_tokens=20, new_tokens=5)


@pytest.fixture
def engine(tiny: Path) -> Iterator[Engine]:
    config = EngineConfig(model=str(tiny), device="cpu", num_blocks=16, max_sequences=4, max_step_tokens=32)
    with Engine(config=config) as engine:
        yield engine


class Counts:
    """A StepObserver that adds up what was computed."""

    def __init__(self) -> None:
        self.tokens = 0
        self.answers = 0

    def on_step(self, stats: object) -> None:
        self.tokens += stats.num_tokens  # type: ignore[attr-defined]

    def on_finish(self, output: Output) -> None:
        self.answers += 1


def test_a_repetition_computes_every_token(engine: Engine) -> None:
    counts = Counts()
    engine.core.observe(counts)
    timing = run_once(engine, SMALL, 0)
    assert counts.answers == 3
    assert counts.tokens == 3 * (20 + 5 - 1)
    assert 0 < timing.first_tokens <= timing.total


def test_repetitions_find_no_prefix_and_the_first_is_not_counted(engine: Engine) -> None:
    counts = Counts()
    engine.core.observe(counts)
    assert len(run_repeatedly(engine, SMALL, 2)) == 2
    assert counts.tokens == 3 * 3 * (20 + 5 - 1)


def test_prompts_repeat_between_runs_and_nowhere_else() -> None:
    again = random_prompts(SMALL, 1, 301)
    assert random_prompts(SMALL, 1, 301) == again
    assert random_prompts(SMALL, 2, 301) != again
    assert again[0] != again[1]
    assert all(len(prompt) == 20 and min(prompt) >= 0 and max(prompt) < 301 for prompt in again)


@pytest.mark.parametrize(
    ("workload", "said"),
    [
        (Workload("", "prefill", 1, 1024, 1), "a request has 1,025 tokens and the context 128"),
        (Workload("", "decode", 5, 4, 4), "4 requests run at once: raise --max-sequences"),
        (Workload("", "decode", 4, 60, 20), "it takes 20 cache blocks and there are 16"),
        (Workload("", "serve", 512, 60, 20), None),
        (SMALL, None),
    ],
)
def test_what_does_not_fit_is_left_out_with_a_reason(engine: Engine, workload: Workload, said: str | None) -> None:
    reason = why_not(workload, engine)
    assert (reason or "").startswith(said or "")
    assert (reason is None) == (said is None)


def test_a_failed_request_is_an_error(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = engine.generate([[1, 2]])
    answers[0].error = "the device is gone"
    monkeypatch.setattr(engine, "generate", lambda prompts, sampling: answers)
    with pytest.raises(PlexorError, match="a request of small failed: the device is gone"):
        run_once(engine, SMALL, 0)


def test_the_median_is_of_each_time_by_itself() -> None:
    assert median([Timing(1, 9), Timing(3, 7), Timing(2, 8)]) == Timing(2, 8)


def test_a_process_has_been_running_for_a_while() -> None:
    earlier = seconds_since_start()
    assert 0 < earlier <= seconds_since_start() < 24 * 3600


def test_serving_warms_up_with_few_requests_and_with_all_of_them() -> None:
    (serve, decode) = parse_workloads("serve_1024_128,decode_bs8")
    few, many = warm_ups(serve)
    assert (few.requests, few.prompt_tokens, few.new_tokens) == (64, 1024, 16)
    assert (many.requests, many.prompt_tokens, many.new_tokens) == (512, 16, 16)
    (short,) = warm_ups(decode)
    assert (short.requests, short.prompt_tokens, short.new_tokens) == (8, 128, 16)
