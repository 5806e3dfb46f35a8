"""Counts of built models, held to arithmetic on their config by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from plexor.benchmark.cost import AttentionCost, ModelCost, WeightCost, count_model
from plexor.config import EngineConfig
from plexor.extension.catalog import Catalog
from plexor.runtime.loading import plan_model
from plexor.runtime.prompts import find_folder

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, SIZE, VOCAB = 48, 80, 3, 6, 2, 8, 301
DENSE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": SIZE,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
ATTENTION = HIDDEN * SIZE * (HEADS + 2 * KV_HEADS) + HEADS * SIZE * HIDDEN


def count(folder: Path, raw: dict[str, Any], **settings: Any) -> ModelCost:
    (folder / "config.json").write_text(json.dumps(raw))
    config = EngineConfig(model=str(folder), device="cpu", **settings)
    catalog = Catalog.load(strict=True)
    return count_model(plan_model(config, catalog, catalog.kernel_table(), find_folder(config, catalog)))


def test_a_step_reads_every_weight_and_the_head_once(tmp_path: Path) -> None:
    cost = count(tmp_path, DENSE)
    weights = LAYERS * (ATTENTION + 3 * HIDDEN * INNER) + VOCAB * HIDDEN
    assert cost.weight_bytes(5, 5) == 2 * weights
    assert cost.operations(5, 5) == {torch.bfloat16: 5 * 2 * weights}


def test_a_tied_head_is_read_too(tmp_path: Path) -> None:
    untied = count(tmp_path, DENSE)
    assert count(tmp_path, {**DENSE, "tie_word_embeddings": True}).weight_bytes(1, 1) == untied.weight_bytes(1, 1)


def test_rows_that_draw_nothing_end_in_the_last_layer(tmp_path: Path) -> None:
    cost = count(tmp_path, DENSE)
    qkv = HIDDEN * SIZE * (HEADS + 2 * KV_HEADS)
    each_token = (LAYERS - 1) * (ATTENTION + 3 * HIDDEN * INNER) + qkv
    each_row = ATTENTION - qkv + 3 * HIDDEN * INNER + VOCAB * HIDDEN
    assert cost.operations(7, 2) == {torch.bfloat16: 2 * (7 * each_token + 2 * each_row)}


def test_an_expert_stack_costs_what_its_tokens_touch(tmp_path: Path) -> None:
    experts, top_k = 8, 2
    moe = {"architectures": ["MixtralForCausalLM"], "num_local_experts": experts, "num_experts_per_tok": top_k}
    cost = count(tmp_path, {**DENSE, **moe})
    stack, router = 3 * HIDDEN * INNER, HIDDEN * experts
    rest = LAYERS * (ATTENTION + router) + VOCAB * HIDDEN
    touched = experts * (1 - (1 - top_k / experts) ** 4)
    assert cost.weight_bytes(1, 1) == pytest.approx(2 * (rest + LAYERS * top_k * stack))
    assert cost.weight_bytes(4, 4) == pytest.approx(2 * (rest + LAYERS * touched * stack))
    assert cost.operations(4, 4) == {torch.bfloat16: 4 * 2 * (rest + LAYERS * top_k * stack)}


def test_a_format_counts_as_it_is_stored(tmp_path: Path) -> None:
    cost = count(tmp_path, DENSE, precision="fp8", kv="fp8")
    head = VOCAB * HIDDEN
    numbers = LAYERS * (ATTENTION + 3 * HIDDEN * INNER)
    scales = LAYERS * (SIZE * (HEADS + 2 * KV_HEADS) + HIDDEN + 2 * INNER + HIDDEN)
    assert cost.weight_bytes(1, 1) == numbers + 4 * scales + 2 * head
    assert cost.operations(1, 1) == {torch.float8_e4m3fn: 2 * numbers, torch.bfloat16: 2 * head}
    assert cost.cache_bytes(0, 1) < count(tmp_path, DENSE).cache_bytes(0, 1)


def test_a_rank_counts_its_share(tmp_path: Path) -> None:
    whole, half = count(tmp_path, DENSE), count(tmp_path, DENSE, tensor_parallel=2)
    padding = 2 * HIDDEN * (VOCAB % 2)
    assert 2 * half.weight_bytes(1, 1) == whole.weight_bytes(1, 1) + padding
    assert 2 * half.cache_bytes(3, 9) == whole.cache_bytes(3, 9)


def test_only_what_runs_for_a_text_counts_in_a_model_that_sees(tmp_path: Path) -> None:
    text = {"model_type": "opt", "hidden_size": 32, "ffn_dim": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
        "do_layer_norm_before": True,
    }
    vision = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 28, "patch_size": 14, "layer_norm_eps": 1e-6, "hidden_act": "gelu", "qkv_bias": True}
    queries = {"vocab_size": 300, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    queries |= {"intermediate_size": 36, "encoder_hidden_size": 24, "max_position_embeddings": 32}
    raw = {"architectures": ["Blip2ForConditionalGeneration"], "text_config": text, "vision_config": vision}
    raw |= {"qformer_config": queries, "num_query_tokens": 5, "image_token_index": 300, "dtype": "float32"}
    linear = 2 * (4 * 32 * 32 + 2 * 32 * 40)
    assert count(tmp_path, raw).operations(1, 1) == {torch.float32: 2 * (linear + VOCAB * 32)}


def test_attention_within_a_window_sees_no_further(tmp_path: Path) -> None:
    layer = AttentionCost(num_bytes=10, num_heads=3, head_size=4, window=5)
    assert layer.seen(0, 8) == 1 + 2 + 3 + 4 + 5 + 5 + 5 + 5
    assert layer.seen(2, 4) == 3 + 4
    assert AttentionCost(10, 3, 4, None).seen(2, 9) == sum(range(3, 10))
    cost = ModelCost((), (layer, AttentionCost(10, 3, 4, None)))
    assert cost.cache_bytes(7, 8) == 10 * (5 + 8)
    assert cost.attention_operations(8) == 4 * 3 * 4 * (30 + 36)


def test_a_windowed_config_is_counted_as_such(tmp_path: Path) -> None:
    windowed = {**DENSE, "architectures": ["MistralForCausalLM"], "sliding_window": 9}
    entries = LAYERS * 2 * KV_HEADS * SIZE * 2
    assert count(tmp_path, windowed).cache_bytes(40, 42) == entries * 18
    assert count(tmp_path, DENSE).cache_bytes(40, 42) == entries * (41 + 42)


def test_a_weight_without_a_stack_is_always_read() -> None:
    assert WeightCost(torch.bfloat16, 100, 50).read_bytes(1) == 100
    assert WeightCost(torch.bfloat16, 100, 50, groups=4, rows_per_token=4).read_bytes(1) == 100
