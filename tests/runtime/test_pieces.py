"""Steps with pieces, padded to a size as a GPU replays them, give what unpadded ones give."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from plexor import Engine, EngineConfig, SamplingParams
from plexor.runtime import pieces, ranks
from plexor.runtime.packer import KnownPiece, StepInput
from plexor.runtime.pieces import PieceSteps, Size

DRAWN = SamplingParams(temperature=1.1, top_p=0.9, seed=3, max_tokens=15, ignore_end=True)


def engine(folder: Path, **changes: object) -> Engine:
    settings = {"num_blocks": 64, "max_sequences": 13, "device": "cpu", **changes}
    return Engine(str(folder), config=EngineConfig(**settings, kernels={"paged_attention": "reference"}))  # type: ignore[arg-type]


def steps_of(model: Engine) -> PieceSteps:
    return model.core._ranks.rank.runner._pieces


@pytest.fixture
def padded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "replays_decodes", lambda config, device: True)


@pytest.fixture
def steps(tiny: Path, padded: None) -> Iterator[PieceSteps]:
    with engine(tiny) as model:
        yield steps_of(model)


def prompts(count: int, longest: int) -> list[list[int]]:
    draw = random.Random(count)
    return [[draw.randrange(3, 301) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def step(decodes: list[int], lengths: list[int]) -> StepInput:
    asked = [KnownPiece(len(decodes) + index, 0, [5] * length, 0) for index, length in enumerate(lengths)]
    return StepInput(step=0, decodes=decodes, pieces=asked, blocks=[], new=[], media=[])


@pytest.mark.parametrize(
    ("decodes", "lengths", "size"),
    [
        ([], [1], Size(16, 1, False)),
        ([], [16], Size(16, 1, False)),
        ([], [17], Size(32, 1, False)),
        ([], [9, 3], Size(16, 4, False)),
        ([0, 1, 2], [13], Size(16, 4, True)),
        ([0, 1, 2], [14, 1], Size(32, 13, True)),
        ([], [1000, 24], Size(1024, 4, False)),
        ([], [1025], None),
        ([], [1] * 13, Size(16, 13, False)),
    ],
)
def test_a_step_is_padded_to_the_next_size(
    steps: PieceSteps, decodes: list[int], lengths: list[int], size: Size | None
) -> None:
    assert steps._padded(step(decodes, lengths)) == size


def test_sizes_hold_more_rows_than_sequences(tiny: Path, padded: None) -> None:
    """Else a decode would have no row."""
    with engine(tiny, max_sequences=100) as model:
        assert steps_of(model)._padded(step(list(range(20)), [1])) == Size(64, 64, True)
        assert steps_of(model)._padded(step(list(range(70)), [1])) == Size(128, 100, True)


def test_more_sequences_than_any_size_are_not_padded(tiny: Path, padded: None) -> None:
    with engine(tiny, max_sequences=400) as model:
        assert steps_of(model)._padded(step(list(range(255)), [1])) == Size(256, 256, True)
        assert steps_of(model)._padded(step(list(range(256)), [1])) is None


def test_nothing_is_padded_that_is_not_replayed(tiny: Path) -> None:
    with engine(tiny) as model:
        assert steps_of(model)._padded(step([], [3])) is None


@pytest.mark.parametrize("longest_decode", [0, 32, 8192])
def test_padding_changes_no_token(tiny: Path, monkeypatch: pytest.MonkeyPatch, longest_decode: int) -> None:
    """Prompts come while others decode, in one piece or in several; long decodes keep a step from being padded."""
    monkeypatch.setattr(pieces, "LONGEST_DECODE", longest_decode)
    asked = prompts(9, longest=60)
    with engine(tiny, steps_ahead=1, chunk=23) as plain:
        expected = crowd(plain, asked)
        assert not steps_of(plain)._inputs
    monkeypatch.setattr(ranks, "replays_decodes", lambda config, device: True)
    with engine(tiny, steps_ahead=1, chunk=23) as model:
        assert crowd(model, asked) == expected
        sizes = steps_of(model)._inputs
        assert len(sizes) > 1
        assert any(size.decodes for size in sizes) == (longest_decode > 0)


def crowd(model: Engine, asked: list[list[int]]) -> list[list[int]]:
    running = []
    for prompt in asked:
        running += model._ask(model._prompt(prompt), DRAWN)
        model.step()
        model.step()
    while model.core.has_work:
        model.step()
    return [one.completion.token_ids for one in running]


def test_warming_up_keeps_to_the_context(tiny: Path, padded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions beyond it may have no angles."""
    with engine(tiny, max_length=33, max_sequences=3) as model:
        steps = steps_of(model)
        seen: list[list[int]] = []
        monkeypatch.setattr(steps, "run", lambda step, media: seen.append([len(p.token_ids) for p in step.pieces]))
        model.core._ranks.rank.runner.warm_up(100)
        assert seen == [[33], [33] * 3]


def test_warming_up_meets_every_number_of_rows_and_changes_no_token(tiny: Path, padded: None) -> None:
    """Twice, so that a GPU captures it."""
    asked = prompts(4, longest=60)
    with engine(tiny) as cold:
        expected = crowd(cold, asked)
    with engine(tiny) as warm:
        runner = warm.core._ranks.rank.runner
        runner.warm_up(2048)
        sizes = runner._pieces._inputs
        assert {size.rows for size in sizes} == set(pieces.ROWS)
        assert {(size.sequences, size.decodes) for size in sizes} == {(1, False), (13, True), (13, False)}
        assert crowd(warm, asked) == expected
