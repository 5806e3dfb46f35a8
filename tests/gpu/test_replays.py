"""A decode step replayed from the same state gives the same logits, bit by bit, however its kernels overlap."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from plexor import Engine, EngineConfig, SamplingParams
from plexor.benchmark.shape import shape_folder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

REPLAYS = 1500
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_end=True)
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "dtype": "float16",
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Of the width of a published model: kernels of small ones hardly overlap."""
    file = tmp_path_factory.mktemp("shape") / "wide.json"
    file.write_text(json.dumps(SHAPE), encoding="utf-8")
    with shape_folder(file) as folder:
        config = EngineConfig(
            model=str(folder), weights="random", device="cuda", num_blocks=2000, max_sequences=64, prefix_caching=False
        )
        with Engine(config=config) as engine:
            yield engine


def poison(entries: list[Tensor], places: Tensor) -> None:
    """Nothing may be read of these places before they have been written."""
    for entry in entries:
        entry.index_fill_(0, places, 3.0)


@pytest.mark.parametrize("count", [1, 3, 8, 16, 40])
@torch.inference_mode()
def test_replays_give_the_same_logits(model: Engine, count: int) -> None:
    """The newest cache entries are spoiled in between, so that an attention that runs ahead of its product shows."""
    core = model.core
    runner = core._ranks.rank.runner
    state, steps = runner._state, runner._decodes
    # After some 20 steps none of them is about to begin a block, which only the scheduler could give it.
    lengths = [2056, *(8 + 16 * index for index in range(count - 1))]
    prompts = [[(place * 13 + index) % 5000 + 3 for place in range(length)] for index, length in enumerate(lengths)]
    asked = [one for prompt in prompts for one in model._ask(prompt, LONG)]
    for _ in range(20):
        model.step()
    torch.cuda.synchronize()
    bucket = steps._bucket(count)
    graph = steps._captures._captured[bucket]
    slots = steps._slots[:count]
    kept = [(tensor, tensor.clone()) for tensor in (state.lengths, state.steps, state.tokens)]
    positions = state.lengths[slots].long()
    assert bool((positions % state.block_size > 0).all()), "the newest entry has no block yet"
    blocks = state.block_table[slots].gather(1, (positions // state.block_size).unsqueeze(1)).squeeze(1).long()
    places = blocks * state.block_size + positions % state.block_size
    entries = [entry.view(-1, *entry.shape[2:]) for layer in runner._cache for entry in layer.values()]
    expected: Tensor | None = None
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    furthest = torch.zeros(count, device="cuda")
    for _ in range(REPLAYS):
        for tensor, value in kept:
            tensor.copy_(value)
        poison(entries, places)
        graph.graph.replay()
        logits = graph.drawn.logits[:count]
        if expected is None:
            expected = logits.clone()
        different += (logits != expected).any()
        off = torch.linalg.vector_norm(logits.float() - expected.float(), dim=1)
        furthest = torch.maximum(furthest, off / torch.linalg.vector_norm(expected.float(), dim=1))
    for one in asked:
        core.finish(one.request.id, "abort")
    while core.has_work:
        model.step()
    rows = {row: f"{off:.1e}" for row, off in enumerate(furthest.tolist()) if off != 0}
    assert int(different) == 0, f"{int(different)} of {REPLAYS} replays differ, rows by as much of their norm: {rows}"
