"""Replayed decode steps draw what steps launched kernel by kernel draw: `pytest -m gpu tests/gpu`."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPTNeoXConfig, LlamaConfig, MixtralConfig, OPTConfig, PretrainedConfig, Qwen3Config

from plexor import Engine, EngineConfig, SamplingParams
from plexor.testing.checkpoints import write_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

SIZES = {"vocab_size": 517, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6}
GATED = {**SIZES, "intermediate_size": 136, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256}
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
CONFIGS: dict[str, PretrainedConfig] = {
    "LlamaForCausalLM": LlamaConfig(**GATED, **IDS, tie_word_embeddings=False),
    "Qwen3ForCausalLM": Qwen3Config(**GATED, **IDS),
    "MixtralForCausalLM": MixtralConfig(**GATED, **IDS, num_local_experts=5, num_experts_per_tok=2),
    "GPTNeoXForCausalLM": GPTNeoXConfig(**SIZES, **IDS, intermediate_size=136, max_position_embeddings=256),
    "OPTForCausalLM": OPTConfig(**SIZES, **IDS, ffn_dim=136, max_position_embeddings=256, word_embed_proj_dim=96),
}
GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_end=True)
DRAWN = SamplingParams(temperature=1.1, top_p=0.9, top_k=50, seed=3, max_tokens=27, ignore_end=True)
SPECIAL = SamplingParams(
    temperature=0.9,
    seed=8,
    max_tokens=22,
    min_tokens=5,
    stop_token_ids=(4, 9),
    logit_bias={5: 3.0, 6: -100.0},
    repetition_penalty=1.3,
    frequency_penalty=0.2,
    logprobs=2,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("graphs")
    return {name: write_checkpoint(root / name, name, config, seed=5) for name, config in CONFIGS.items()}


def engine(folder: Path, **changes: object) -> Engine:
    settings = {"num_blocks": 200, "max_sequences": 21, "device": "cuda", "dtype": "float32", **changes}
    return Engine(str(folder), config=EngineConfig(**settings))  # type: ignore[arg-type]


def prompts(count: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 517) for _ in range(draw.randint(1, 70))] for _ in range(count)]


def crowd(model: Engine, seed: int = 4) -> list[tuple[list[int], str]]:
    """Requests that join while others run and end at different steps: mixed steps, other buckets, other rows."""
    running = []
    for index, prompt in enumerate(prompts(19, seed)):
        running += model._ask(model._prompt(prompt), (GREEDY, DRAWN, SPECIAL)[index % 3])
        model.step()
        model.step()
    while model.core.has_work:
        model.step()
    return [(one.completion.token_ids, one.completion.text) for one in running]


@pytest.mark.parametrize("name", CONFIGS)
def test_replayed_steps_draw_what_launched_steps_draw(folders: dict[str, Path], name: str) -> None:
    with engine(folders[name], decode_graphs=False) as launched:
        expected = crowd(launched)
    with engine(folders[name]) as replayed:
        assert crowd(replayed) == expected
        runner = replayed.core._ranks.rank.runner
        captures = runner._decodes._captures, runner._pieces._captures
        assert all(len(kind) > 2 for kind in captures), "nothing was captured"
        captured = [dict(kind._captured) for kind in captures]
        assert crowd(replayed) == expected
        for kind, graphs in zip(captures, captured, strict=True):
            assert all(kind._captured[key] is graph for key, graph in graphs.items())


def test_preemption_and_prefix_hits_between_replays(folders: dict[str, Path]) -> None:
    folder = folders["LlamaForCausalLM"]
    with engine(folder, decode_graphs=False) as roomy:
        expected = crowd(roomy)
    with engine(folder, num_blocks=30, chunk=11) as small:
        assert crowd(small) == expected
        assert crowd(small) == expected


def test_logits_of_a_replay_are_those_of_the_launched_step(folders: dict[str, Path]) -> None:
    """Step by step, for the same request: first a bucket's launched step, then its replays, then replays alone."""
    with engine(folders["LlamaForCausalLM"], prefix_caching=False) as model:
        runs: list[list[Tensor]] = []
        for _ in range(2):
            seen: list[Tensor] = []
            model.core.watch_logits(lambda ids, logits, seen=seen: seen.append(logits))
            answer = model.generate([prompts(1, seed=9)[0]], GREEDY)[0]
            runs.append(seen)
        model.core.watch_logits(None)
        assert len(runs[0]) == len(answer.token_ids) == 30
        for first, second in zip(*runs, strict=True):
            torch.testing.assert_close(first, second, rtol=0, atol=0)
        text = [*prompts(1, seed=9)[0], *answer.token_ids[:-1]]
        whole = model.core.logits(text)[-30:]
        torch.testing.assert_close(torch.cat(runs[1]), whole, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_captured_is_said_once_and_still_right(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """The reference attention reads lengths on the host, which no capture can hold."""
    folder = folders["LlamaForCausalLM"]
    slow = {"paged_attention": "reference"}
    with engine(folder, decode_graphs=False, kernels=slow) as launched:
        expected = crowd(launched)
    with caplog.at_level(logging.WARNING), engine(folder, kernels=slow) as tried:
        assert crowd(tried) == expected
        assert not len(tried.core._ranks.rank.runner._decodes._captures)
    records = [record.getMessage() for record in caplog.records if record.name == "plexor.runtime.capture"]
    assert [said.split(" run ")[0] for said in sorted(records)] == ["decode steps", "steps of short prompts"]
    assert all("paged_attention.py" in said for said in records)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_replay_what_one_launches(folders: dict[str, Path]) -> None:
    folder = folders["LlamaForCausalLM"]
    with engine(folder, decode_graphs=False) as alone:
        expected = crowd(alone)
    with engine(folder, tensor_parallel=2) as both:
        assert crowd(both) == expected
        assert crowd(both) == expected


def test_launching_a_step_never_waits_for_the_device(folders: dict[str, Path]) -> None:
    """Neither of decodes nor of prompts; torch raises where it would."""
    with engine(folders["LlamaForCausalLM"]) as model:
        model.generate(prompts(4, seed=1), GREEDY)
        for prompt in prompts(4, seed=2):
            model._ask(model._prompt(prompt), GREEDY)
        for _ in range(20):
            plan = model.core.scheduler.schedule()
            assert plan is not None
            torch.cuda.set_sync_debug_mode("error")
            try:
                model.core._launch(plan)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            if len(model.core._launched) > 1:
                model.core._read()
        while model.core.has_work:
            model.step()
