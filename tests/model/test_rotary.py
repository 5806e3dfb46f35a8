"""Rotary tables against transformers' own modules, for every variant that config files name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPTNeoXConfig, LlamaConfig
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from plexor.errors import CheckpointError
from plexor.model.rotary import read_rotary

HEAD_SIZE = 80
LONGEST = 96
CPU = torch.device("cpu")
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "large theta": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "frequency": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 48,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    "yarn in a short context": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24},
    "yarn in a tiny context": {"rope_type": "yarn", "factor": 24.0, "original_max_position_embeddings": 4},
    "yarn with betas": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16,
        "beta_slow": 2,
        "truncate": False,
    },
    "yarn with a factor for attention": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 4096,
        "attention_factor": 0.7,
    },
    "yarn with mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
    },
}


def raw_config(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": 2 * HEAD_SIZE,
        "num_attention_heads": 2,
        "max_position_embeddings": LONGEST,
        "rope_parameters": {"rope_theta": 1e4, **settings},
    }


def expected(module: Any, length: int) -> tuple[Tensor, Tensor]:
    """Cos and sin [length, size / 2] as transformers rotates a sequence of this length; it doubles the features."""
    cos, sin = module(torch.zeros(1), torch.arange(length).unsqueeze(0))
    half = cos.shape[-1] // 2
    return cos[0, :, :half], sin[0, :, :half]


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_tables_equal_those_of_transformers(settings: dict[str, Any]) -> None:
    raw = raw_config(settings)
    module = LlamaRotaryEmbedding(LlamaConfig(**raw))
    rotary = read_rotary(raw, HEAD_SIZE, LONGEST)
    assert rotary.size == HEAD_SIZE
    torch.testing.assert_close(rotary.tables(LONGEST, CPU), expected(module, LONGEST), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_the_older_fields_mean_the_same(settings: dict[str, Any]) -> None:
    raw = raw_config(settings)
    old = {**raw, "rope_theta": raw["rope_parameters"]["rope_theta"]}
    del old["rope_parameters"]
    old["rope_scaling"] = {("type" if k == "rope_type" else k): v for k, v in settings.items() if k != "rope_theta"}
    assert read_rotary(old, HEAD_SIZE, LONGEST) == read_rotary(raw, HEAD_SIZE, LONGEST)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_part_of_each_head_turns(share: float) -> None:
    raw = raw_config({"rope_type": "default", "partial_rotary_factor": share})
    module = GPTNeoXRotaryEmbedding(GPTNeoXConfig(**raw))
    rotary = read_rotary(raw, HEAD_SIZE, LONGEST)
    assert rotary.size == HEAD_SIZE * share
    torch.testing.assert_close(rotary.tables(LONGEST, CPU), expected(module, LONGEST), rtol=1e-5, atol=1e-5)
    old = {"rotary_pct": share, "rotary_emb_base": 1e4}
    assert read_rotary(old, HEAD_SIZE, LONGEST) == rotary


def test_dynamic_scaling_goes_by_the_length_that_each_token_sees() -> None:
    """Beyond the original context transformers turns all keys by the longest length so far, which chunks and shared
    prefixes would change; ours agree with it for the last token of each length.
    """
    raw = raw_config(VARIANTS["dynamic"])
    rotary = read_rotary(raw, HEAD_SIZE, LONGEST)
    assert rotary.num_positions == 2 * LONGEST
    cos, sin = rotary.tables(rotary.num_positions, CPU)
    for length in (LONGEST + 1, 150, 2 * LONGEST):
        module = LlamaRotaryEmbedding(LlamaConfig(**raw))
        last = [table[-1] for table in expected(module, length)]
        torch.testing.assert_close([cos[length - 1], sin[length - 1]], last, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rotary.tables(150, CPU)[0], cos[:150], rtol=1e-5, atol=1e-5)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"'longrope'.*dynamic"):
        read_rotary(raw_config({"rope_type": "longrope"}), HEAD_SIZE, LONGEST)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rope_theta": 0}, "rope_theta = 0, which must be greater than 0"),
        ({"rope_type": "linear", "factor": -2.0}, r"factor = -2\.0"),
        ({"rope_type": "linear", "factor": float("nan")}, "factor = nan"),
        ({"partial_rotary_factor": 0.01}, "rotates 0 of a head's 80 features"),
        ({"partial_rotary_factor": 0.1875}, "rotates 15 of"),
        ({"partial_rotary_factor": 2}, "rotates 160 of"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        read_rotary(raw_config(settings), HEAD_SIZE, LONGEST)


@pytest.mark.parametrize("settings", [["linear"], {"rope_type": "linear", "factor": "2"}])
def test_settings_of_the_wrong_type_are_refused(settings: Any) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_rotary({"rope_scaling": settings}, HEAD_SIZE, LONGEST)
