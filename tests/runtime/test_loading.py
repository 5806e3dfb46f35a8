"""Where an engine's weights come from: read from a checkpoint's files, or drawn where there are none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from plexor import Engine, EngineConfig, SamplingParams
from plexor.errors import CheckpointError

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_end=True)
PROMPTS = [[7, 80, 9, 200], [41] * 19]


@pytest.fixture(scope="module")
def bare(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration and a tokenizer, without weights."""
    folder = tmp_path_factory.mktemp("bare") / "model"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    return folder


def answers(folder: Path, weights: str, ranks: int = 1) -> list[list[int]]:
    config = EngineConfig(
        model=str(folder), weights=weights, tensor_parallel=ranks, device="cpu", num_blocks=32, max_sequences=4
    )
    with Engine(config=config) as engine:
        return [answer.token_ids for answer in engine.generate(PROMPTS, GREEDY)]


def test_random_weights_need_no_files_and_are_the_same_on_any_number_of_ranks(bare: Path, tiny: Path) -> None:
    drawn = answers(bare, "random")
    assert drawn == answers(tiny, "random") == answers(bare, "random", ranks=2)
    assert drawn != answers(tiny, "checkpoint")


def test_a_folder_without_weights_is_refused_where_they_are_to_be_read(bare: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        answers(bare, "checkpoint")
