"""Decode steps padded to buckets, as a GPU replays them, give the tokens that unpadded ones give."""

import random
from pathlib import Path

import pytest

from plexor import Engine, EngineConfig, SamplingParams
from plexor.runtime import ranks, runner
from plexor.runtime.capture import Captures
from plexor.runtime.graphs import decode_buckets

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_end=True)
DRAWN = SamplingParams(temperature=1.1, top_p=0.9, seed=3, max_tokens=17, ignore_end=True)
SPECIAL = SamplingParams(
    temperature=0.9,
    seed=8,
    max_tokens=12,
    min_tokens=5,
    stop_token_ids=(4, 9),
    logit_bias={5: 3.0, 6: -100.0},
    repetition_penalty=1.3,
    frequency_penalty=0.2,
    logprobs=2,
)


def prompts(count: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 301) for _ in range(draw.randint(1, 40))] for _ in range(count)]


def engine(folder: Path, **changes: object) -> Engine:
    settings = {"num_blocks": 64, "max_sequences": 13, "device": "cpu", **changes}
    return Engine(str(folder), config=EngineConfig(**settings, kernels={"paged_attention": "reference"}))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def alone(tiny: Path) -> Engine:
    return engine(tiny, steps_ahead=0)


@pytest.fixture
def padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on a GPU: buckets and padding rows."""
    monkeypatch.setattr(ranks, "replays_decodes", lambda config, device: True)


def test_buckets_grow_with_what_they_hold() -> None:
    assert decode_buckets(1) == (1,)
    assert decode_buckets(5) == (1, 2, 4, 5)
    assert decode_buckets(100) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 100)
    assert decode_buckets(400)[-6:] == (192, 224, 256, 320, 384, 400)


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("num_blocks", [64, 12])
def test_arrivals_ends_and_preemption_change_no_token(
    tiny: Path, alone: Engine, padded: None, monkeypatch: pytest.MonkeyPatch, steps_ahead: int, num_blocks: int
) -> None:
    """Requests join and leave at different steps, so that rows move, buckets change and mixed steps come between."""
    monkeypatch.setattr(runner, "REDRAWN", 2)
    asked = [(prompt, (GREEDY, DRAWN, SPECIAL)[i % 3]) for i, prompt in enumerate(prompts(11, seed=4))]
    expected = [alone.generate([prompt], sampling)[0] for prompt, sampling in asked]
    with engine(tiny, steps_ahead=steps_ahead, num_blocks=num_blocks, chunk=9) as crowded:
        running = []
        for prompt, sampling in asked:
            running += crowded._ask(crowded._prompt(prompt), sampling)
            crowded.step()
            crowded.step()
        while crowded.core.has_work:
            crowded.step()
    for got, wanted in zip(running, expected, strict=True):
        assert got.completion.token_ids == wanted.token_ids
        assert got.completion.text == wanted.text
        assert [p.token_id for p in got.completion.logprobs] == [p.token_id for p in wanted.logprobs]


def test_a_slot_taken_again_keeps_nothing_of_its_last_sequence(tiny: Path, alone: Engine, padded: None) -> None:
    """The same slots decode before and after, for another request with other settings."""
    first, second, third = prompts(3, seed=9)
    with engine(tiny, max_sequences=2, steps_ahead=1) as small:
        long = small._ask(small._prompt(first), SamplingParams(temperature=0, max_tokens=40, ignore_end=True))
        for prompt, sampling in ((second, SPECIAL), (third, DRAWN), (second, GREEDY)):
            wanted = alone.generate([prompt], sampling)[0].token_ids
            assert small.generate([prompt], sampling)[0].token_ids == wanted
        assert long[0].completion.finish_reason is None or len(long[0].completion.token_ids) == 40


def test_prefix_hits_change_no_token(tiny: Path, alone: Engine, padded: None) -> None:
    prompt = (prompts(1, seed=3)[0] * 9)[:60]
    wanted = alone.generate([prompt], DRAWN)[0].token_ids
    with engine(tiny, steps_ahead=1) as sharing:
        assert [sharing.generate([prompt], DRAWN)[0].token_ids for _ in range(2)] == [wanted, wanted]
        assert sharing.generate([prompt], DRAWN)[0].num_cached_tokens >= 48


class Graphs(Captures):
    """Captures that only say which steps they have."""

    def __init__(self, *keys: int) -> None:
        super().__init__("decode steps", None, reports=False)
        self.keys = keys

    def __contains__(self, key: object) -> bool:
        return key in self.keys


def test_a_number_of_rows_that_comes_by_takes_a_larger_graph(tiny: Path, padded: None) -> None:
    """At most twice as large, and at most eight times."""
    with engine(tiny, max_sequences=100) as model:
        steps = model.core._ranks.rank.runner._decodes
        steps._captures = Graphs(4, 24, 100)
        assert [steps._bucket(rows) for rows in (1, 2, 3, 7, 12, 13, 49, 50)] == [1, 4, 4, 8, 24, 24, 56, 100]
        assert [steps._bucket(2) for _ in range(9)] == [4] * 7 + [2] * 2
        assert steps._bucket(51) == 100
        steps._captures = Graphs(4, 24, 56, 100)
        assert [steps._bucket(rows) for rows in (49, 24, 23)] == [56, 24, 24]
