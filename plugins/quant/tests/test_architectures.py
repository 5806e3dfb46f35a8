"""Each precision against its dense reference on every architecture that is installed, experts included.

The reference is the same checkpoint in dense layers whose weights are what the precision made of them, and whose inputs
are rounded as its activations are, by formulas apart from the plugin's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from plexor.api import Catalog, GroupedLinear, Linear
from plexor.testing.architecture import load_model, random_prompts, run
from plexor.testing.checkpoints import write_checkpoint

CATALOG = Catalog.load()
VOCAB_SIZE = 307
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# Three query heads to a KV head, and sizes that groups of 128 do not divide.
GROUPED: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "intermediate_size": 131,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    **ENDS,
}
WIDE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 160,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    **ENDS,
}
GPT2: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "n_embd": 160, "n_head": 2, "n_layer": 2, "n_positions": 64, **ENDS}
# The half of a model that sees; the language half is what is compared here.
SMALL: dict[str, Any] = {
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}
CONFIGS: Mapping[str, Callable[[], transformers.PretrainedConfig]] = {
    "LlamaForCausalLM": lambda: transformers.LlamaConfig(**GROUPED, attention_bias=True),
    "MistralForCausalLM": lambda: transformers.MistralConfig(**GROUPED),
    "Qwen2ForCausalLM": lambda: transformers.Qwen2Config(**GROUPED),
    "Qwen3ForCausalLM": lambda: transformers.Qwen3Config(**GROUPED),
    "GPT2LMHeadModel": lambda: transformers.GPT2Config(**GPT2),
    "GPTNeoXForCausalLM": lambda: transformers.GPTNeoXConfig(**WIDE, intermediate_size=100),
    "OPTForCausalLM": lambda: transformers.OPTConfig(**WIDE, ffn_dim=100, word_embed_proj_dim=160),
    "MixtralForCausalLM": lambda: transformers.MixtralConfig(**GROUPED, num_local_experts=5, num_experts_per_tok=2),
    "Qwen3MoeForCausalLM": lambda: transformers.Qwen3MoeConfig(
        **GROUPED, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=37
    ),
    "Blip2ForConditionalGeneration": lambda: transformers.Blip2Config(
        vision_config={**SMALL, "image_size": 20, "patch_size": 10},
        qformer_config={**SMALL, "vocab_size": 300},
        text_config=transformers.OPTConfig(**WIDE, ffn_dim=100, word_embed_proj_dim=160).to_dict(),
        num_query_tokens=3,
        image_token_index=3,
    ),
}
TINY = torch.finfo(torch.float32).tiny


def e4m3(x: Tensor) -> Tensor:
    """Each row on e4m3's grid: steps of an eighth of a number's power of two, 448 the largest."""
    scale = (x.abs().amax(dim=-1, keepdim=True) / 448).clamp_min(TINY)
    ratio = (x / scale).double()
    step = torch.exp2((torch.frexp(ratio).exponent - 1).clamp(-6, 8).double() - 3)
    return ((ratio / step).round() * step).clamp(-448, 448).float() * scale


def int8(x: Tensor) -> Tensor:
    scale = (x.abs().amax(dim=-1, keepdim=True) / 127).clamp_min(TINY)
    return (x / scale).round() * scale


ROUNDED: Mapping[str, Callable[[Tensor], Tensor]] = {"fp8": e4m3, "int8_sq": int8, "w4a_fp8": e4m3}
WEIGHTS_ALONE = ("int8_wo", "int4_wo", "int4_wo_channel")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The models are tiny: threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture: str = request.param
    if architecture not in CATALOG.architectures:
        pytest.skip(f"no installed plugin serves {architecture}")
    return write_checkpoint(tmp_path_factory.mktemp(architecture), architecture, CONFIGS[architecture]())


@pytest.mark.parametrize("precision", ROUNDED)
def test_logits_equal_those_of_the_dense_reference(folder: Path, precision: str) -> None:
    quantised = load_model(folder, CATALOG, precision=precision)
    reference = load_model(folder, CATALOG)
    prompts = random_prompts(VOCAB_SIZE)
    plain = torch.cat(run(reference, prompts, (7, 1)))
    pairs = _linears(quantised.module, reference.module)
    kinds = {type(module) for module in quantised.module.modules()} & {Linear, GroupedLinear}
    assert {type(kept) for kept, _ in pairs} == kinds, "a kind of layer is dense in spite of the precision"
    for kept, dense in pairs:
        dense.stored["weight"].copy_(quantised.build.format.dense(kept.stored))
    rounded_weights = torch.cat(run(reference, prompts, (7, 1)))
    for _, dense in pairs:
        dense.register_forward_pre_hook(lambda _, args: (ROUNDED[precision](args[0]), *args[1:]))
    expected = torch.cat(run(reference, prompts, (7, 1)))
    actual = torch.cat(run(quantised, prompts, (7, 1)))

    spread = float(plain.std())
    error = (actual - expected).abs().amax(dim=-1)
    # Equal but for float32 sums; where their last bits carry a number over the middle between two of the grid's, the
    # rows that see it differ by much less than rounding matters.
    assert float(error.quantile(0.25)) < 2e-5 * spread
    by_activations = _distance(actual, rounded_weights)
    assert _distance(actual, expected) < 0.5 * by_activations
    # Rounding the activations and the weights moves the logits, and not far: both were really rounded.
    assert 1e-3 * spread < by_activations < 0.3 * spread
    assert 1e-3 * spread < _distance(rounded_weights, plain) < 0.8 * spread


@pytest.mark.parametrize("precision", WEIGHTS_ALONE)
def test_logits_equal_those_of_dense_layers_with_the_same_weights(folder: Path, precision: str) -> None:
    quantised = load_model(folder, CATALOG, precision=precision)
    reference = load_model(folder, CATALOG)
    prompts = random_prompts(VOCAB_SIZE)
    plain = torch.cat(run(reference, prompts, (7, 1)))
    pairs = _linears(quantised.module, reference.module)
    assert pairs, "every layer is dense in spite of the precision"
    for kept, dense in pairs:
        dense.stored["weight"].copy_(quantised.build.format.dense(kept.stored))
    expected = torch.cat(run(reference, prompts, (7, 1)))
    actual = torch.cat(run(quantised, prompts, (7, 1)))

    spread = float(plain.std())
    assert float((actual - expected).abs().max()) < 1e-4 * spread
    assert 1e-3 * spread < _distance(expected, plain) < 0.8 * spread


@pytest.mark.parametrize(("kv", "least", "most"), [("fp8", 1e-4, 0.2), ("int8", 1e-5, 0.02)])
def test_a_narrow_cache_moves_the_logits_little(folder: Path, kv: str, least: float, most: float) -> None:
    narrow = load_model(folder, CATALOG, kv=kv)
    prompts = random_prompts(VOCAB_SIZE)
    expected = torch.cat(run(load_model(folder, CATALOG), prompts, (7, 1)))
    actual = torch.cat(run(narrow, prompts, (7, 1)))
    spread = float(expected.std())
    # The median over rows: a few may be sent to another expert, which moves them far.
    moved = float((actual - expected).square().mean(dim=-1).sqrt().median())
    assert least * spread < moved < most * spread


def _distance(left: Tensor, right: Tensor) -> float:
    """Root mean square."""
    return float((left - right).square().mean().sqrt())


def _linears(quantised: nn.Module, reference: nn.Module) -> list[tuple[Linear | GroupedLinear, Linear | GroupedLinear]]:
    """The layers that the precision keeps in its own way, beside the same ones of the dense model."""
    others = dict(reference.named_modules())
    pairs = []
    for name, module in quantised.named_modules():
        other = others[name]
        if not isinstance(module, Linear | GroupedLinear) or not isinstance(other, Linear | GroupedLinear):
            continue
        if module.stored.keys() != other.stored.keys():
            pairs.append((module, other))
    return pairs
