"""Perplexity through the engine equals that of transformers on the same windows."""

import math
from pathlib import Path

import pytest
import torch

from plexor import Engine, EngineConfig
from plexor.errors import ConfigError, RequestError
from plexor.runtime.scoring import score_text

TEXT = "The quick brown fox jumps over the lazy dog, and then it rests for a while in the shade.\n" * 3


@pytest.mark.parametrize("window", [16, 50, 1000])
def test_loss_equals_that_of_transformers(tiny: Path, window: int) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    with Engine(str(tiny), config=EngineConfig(num_blocks=16, device="cpu")) as engine:
        score = score_text(engine, TEXT, window)
        ids = engine.prompts.tokenizer.encode(TEXT, add_special_tokens=False)
    size, total = min(window, 128), 0.0
    for start in range(0, len(ids) - 1, size - 1):
        piece = torch.tensor([ids[start : start + size]])
        with torch.no_grad():
            total += float(theirs(piece, labels=piece).loss) * (piece.shape[1] - 1)
    assert score.num_tokens == len(ids) - 1
    assert score.loss == pytest.approx(total / (len(ids) - 1), rel=1e-4)
    assert score.perplexity == pytest.approx(math.exp(score.loss))
    assert score.bits_per_byte == pytest.approx(score.loss * score.num_tokens / math.log(2) / len(TEXT))


def test_too_short_a_text_is_refused(tiny: Path) -> None:
    with Engine(str(tiny), config=EngineConfig(num_blocks=16, device="cpu")) as engine, pytest.raises(RequestError):
        score_text(engine, "", 16)


@pytest.mark.parametrize("window", [1, 0, -3])
def test_windows_that_predict_nothing_are_refused(tiny: Path, window: int) -> None:
    config = EngineConfig(num_blocks=16, device="cpu")
    with Engine(str(tiny), config=config) as engine, pytest.raises(RequestError, match=f"window has {window} tokens"):
        score_text(engine, TEXT, window)


def test_a_window_beyond_the_cache_is_refused_with_both_numbers(tiny: Path) -> None:
    with Engine(str(tiny), config=EngineConfig(num_blocks=2, device="cpu")) as engine:
        with pytest.raises(ConfigError, match=r"50 .* 32"):
            score_text(engine, TEXT, 50)
        assert score_text(engine, TEXT, 32).num_tokens > 0
