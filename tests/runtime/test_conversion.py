"""Which windows of a text calibrate, and how progress through the layers is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from plexor.checkpoint.folder import open_folder
from plexor.errors import RequestError
from plexor.extension.catalog import Catalog
from plexor.runtime.conversion import Conversion, convert, spread_windows
from plexor.testing.checkpoints import write_checkpoint


@pytest.mark.parametrize(
    ("num_tokens", "window", "most", "starts"),
    [
        (10, 10, 5, [0]),
        (39, 10, 5, [0, 10, 20]),
        (100, 10, 3, [0, 30, 60]),
        (70, 10, 4, [0, 10, 30, 50]),
        (1000, 10, 100, list(range(0, 1000, 10))),
    ],
)
def test_windows_are_whole_and_spread_over_the_text(num_tokens: int, window: int, most: int, starts: list[int]) -> None:
    found = spread_windows(range(num_tokens), window, most)
    assert found == [start + offset for start in starts for offset in range(window)]


def test_too_few_tokens_for_a_window_are_refused() -> None:
    with pytest.raises(RequestError, match="has 9 tokens, fewer than one window of 10: give a longer one"):
        spread_windows(range(9), 10, 5)


@pytest.mark.parametrize("text", [None, "a text that is long enough. " * 9])
def test_progress_is_told_layer_by_layer(text: str | None, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=307,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    folder = write_checkpoint(tmp_path / "dense", "LlamaForCausalLM", config, dtype=torch.bfloat16)
    told: list[tuple[int, int]] = []
    job = Conversion(folder=open_folder(folder), precision="fp8", out=tmp_path / "out", device="cpu", text=text)
    report = convert(job, Catalog.load(), lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert (report.num_files, report.num_rounded, report.ignored) == (1, 21, ("lm_head",))
