"""A cache of int8: what is stored, what is read, what a token takes, and that scales stay with their blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from plexor import Engine, EngineConfig, SamplingParams
from plexor.api import Catalog, KVShape, Output, Pages, StepStats
from plexor.testing.architecture import load_model, random_prompts
from plexor.testing.checkpoints import write_checkpoint
from plexor_quant.kernels.cpu.int8_paged_attention import int8_paged_attention, make_shares
from plexor_quant.kernels.reference.int8_kv_write import int8_kv_write
from plexor_quant.kv import int8_storage

VOCAB_SIZE = 307
NUM_TOKENS = 12


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The models are tiny: threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=20,
        intermediate_size=131,
        num_hidden_layers=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    if "LlamaForCausalLM" not in Catalog.load().architectures:
        pytest.skip("no installed plugin serves LlamaForCausalLM")
    return write_checkpoint(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM", config)


def empty_cache(num_blocks: int, block_size: int, num_heads: int, size: int) -> dict[str, Tensor]:
    stored = int8_storage(KVShape(num_blocks, block_size, num_heads, size), torch.float32)
    return {part.name: torch.zeros(part.shape, dtype=part.dtype) for part in stored}


def read_one(cache: dict[str, Tensor], block: int) -> Tensor:
    """The value at the first slot of a block, as a sequence of one entry attends it: its weight is one."""
    size = cache["values"].shape[-1]
    pages = Pages(torch.tensor([0, 1]), torch.tensor([1]), torch.tensor([[block]], dtype=torch.int32), 1)
    return int8_paged_attention(torch.zeros(1, cache["values"].shape[2], size), cache, pages, 1.0, None)[0]


def test_what_is_read_is_what_the_grid_holds() -> None:
    generator = torch.Generator().manual_seed(3)
    k, v = (torch.randn(5, 3, 23, generator=generator) * 10.0 ** torch.arange(-2, 3)[:, None, None] for _ in range(2))
    cache = empty_cache(7, 1, 3, 23)
    slots = torch.tensor([6, 0, 3, 2, 5])
    int8_kv_write(k, v, slots, cache)
    for token, slot in enumerate(slots.tolist()):
        for head in range(3):
            step = float(v[token, head].abs().max()) / 127
            expected = torch.tensor([round(float(x) / step) * step for x in v[token, head]])
            torch.testing.assert_close(read_one(cache, slot)[head], expected, rtol=1e-6, atol=0)
    keys = cache["keys"].float() * cache["key_scales"].unsqueeze(-1)
    error = (keys[slots, 0] - k).abs()
    assert bool((error <= k.abs().amax(dim=-1, keepdim=True) / 127 * 0.5001).all())
    assert float(error.max()) > 0


def test_a_head_with_nan_or_infinity_reads_as_nan_and_spares_the_others() -> None:
    v = torch.ones(2, 2, 4)
    v[0, 0, 1], v[1, 1, 2] = float("nan"), float("inf")
    cache = empty_cache(2, 1, 2, 4)
    int8_kv_write(torch.ones(2, 2, 4), v, torch.tensor([0, 1]), cache)
    first, second = read_one(cache, 0), read_one(cache, 1)
    assert first[0].isnan().all()
    assert second[1].isnan().all()
    torch.testing.assert_close(torch.stack((first[1], second[0])), torch.ones(2, 4))


def test_shares_hold_every_sequence_once_and_blocks_that_are_read() -> None:
    lengths = torch.tensor([40, 1, 0, 33, 64])
    pages = Pages(torch.arange(6), lengths, torch.arange(20, dtype=torch.int32).view(5, 4), 1)
    wide = make_shares(pages, None, 16, 1 << 20)
    assert [share.rows for share in wide] == [(0, 1), (1, 3), (3, 4), (4, 5)]
    assert [share.blocks.tolist() for share in wide] == [[0, 1, 2], [4], [12, 13, 14], [16, 17, 18, 19]]
    (together,) = make_shares(pages, 5, 16, 8)
    assert together.blocks.tolist() == [2, 4, 13, 14, 19]
    assert together.pages.block_table[0].tolist()[2] == 0
    assert together.pages.block_table[4].tolist()[3] == 4
    assert make_shares(Pages(torch.zeros(1), lengths[:0], pages.block_table[:0], 1), None, 16, 8) == ()


def test_ops_of_its_own_store_and_read(folder: Path) -> None:
    used = {choice.op for choice in load_model(folder, kv="int8").build.table.choices}
    assert {"int8_rotary_kv_write", "int8_paged_attention"} <= used
    assert not used & {"rotary_kv_write", "kv_write", "paged_attention", "norm_rotary_linear"}


def test_what_a_token_takes(folder: Path) -> None:
    """For each of two layers, keys and values: two heads of 20 bytes and a scale of 4."""
    build = load_model(folder, kv="int8").build
    shape = KVShape(1, 1, 2, 20)
    assert 2 * sum(math.prod(part.shape) * part.dtype.itemsize for part in build.kv_storage(shape)) == 2 * 2 * 2 * 24


class Preemptions:
    """A StepObserver that counts them."""

    def __init__(self) -> None:
        self.count = 0

    def on_step(self, stats: StepStats) -> None:
        self.count += stats.num_preempted

    def on_finish(self, output: Output) -> None:
        pass


def test_greedy_tokens_with_prefix_hits_in_chunks_and_after_preemption(folder: Path) -> None:
    """A sequence's tokens do not depend on what shares its blocks, nor on how it was cut; hardly on the cache."""
    base = EngineConfig(model=str(folder), kv="int8", dtype="float32", device="cpu", block_size=4, num_blocks=128)
    prompts = random_prompts(VOCAB_SIZE)
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)

    def tokens(engine: Engine) -> list[list[int]]:
        return [list(completion.token_ids) for completion in engine.generate(prompts, sampling)]

    with Engine(config=base) as engine:
        expected = tokens(engine)
        again = engine.generate(prompts, sampling)
        assert [list(completion.token_ids) for completion in again] == expected
        assert max(completion.num_cached_tokens for completion in again) > 0
    with Engine(config=replace(base, chunk=7, prefix_caching=False)) as engine:
        assert tokens(engine) == expected
    blocks_of_longest = -(-(max(map(len, prompts)) + NUM_TOKENS) // base.block_size) + 1
    with Engine(config=replace(base, num_blocks=blocks_of_longest)) as engine:
        preemptions = Preemptions()
        engine.core.observe(preemptions)
        assert tokens(engine) == expected
        assert preemptions.count > 0
    with Engine(config=replace(base, kv="dense")) as engine:
        dense = tokens(engine)
    pairs = [pair for ours, theirs in zip(expected, dense, strict=True) for pair in zip(ours, theirs, strict=False)]
    assert sum(ours == theirs for ours, theirs in pairs) >= 0.8 * len(pairs)
