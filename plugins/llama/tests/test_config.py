"""What the configs read and refuse, and that checkpoints as they were published long ago still load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from plexor.api import CheckpointError
from plexor.testing.architecture import check_architecture, load_model
from plexor.testing.checkpoints import write_checkpoint
from plexor_llama import gpt2, gpt_neox, llama, opt

LLAMA: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
OPT: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 48,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def rewrite(folder: Path, rename: dict[str, str], extra: dict[str, torch.Tensor]) -> None:
    """Save the tensors again in one file, their names' beginnings replaced, with others added."""
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors*"):
        if path.suffix == ".safetensors":
            tensors |= load_file(path)
        path.unlink()
    for old, new in rename.items():
        tensors = {new + name.removeprefix(old) if name.startswith(old) else name: t for name, t in tensors.items()}
    save_file(tensors | extra, folder / "model.safetensors")


def test_gpt2_as_it_was_first_published(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=307, n_embd=48, n_head=2, n_layer=2, n_positions=64)
    write_checkpoint(tmp_path, "GPT2LMHeadModel", config)
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8) for layer in range(2)}
    rewrite(tmp_path, {"transformer.": ""}, masks | {"h.1.attn.masked_bias": torch.tensor(-1e4)})
    assert load_model(tmp_path).config.vocab_size == 307
    check_architecture(tmp_path)


def test_opt_without_the_outer_prefix(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "OPTForCausalLM", transformers.OPTConfig(**OPT, word_embed_proj_dim=32))
    rewrite(tmp_path, {"model.decoder.": "decoder."}, {"lm_head.weight": torch.zeros(307, 32)})
    assert load_model(tmp_path).config.vocab_size == 307


def test_tables_and_masks_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    config = transformers.GPTNeoXConfig(
        vocab_size=307, hidden_size=48, num_attention_heads=2, num_hidden_layers=1, intermediate_size=64
    )
    write_checkpoint(tmp_path, "GPTNeoXForCausalLM", config)
    place = "gpt_neox.layers.0.attention"
    old = {
        f"{place}.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        f"{place}.masked_bias": torch.tensor(-1e9),
        f"{place}.rotary_emb.inv_freq": torch.ones(3),
    }
    rewrite(tmp_path, {}, old)
    assert load_model(tmp_path).config.vocab_size == 307
    rewrite(tmp_path, {}, {f"{place}.unheard_of": torch.ones(1)})
    with pytest.raises(CheckpointError, match="unheard_of"):
        load_model(tmp_path)


def test_a_checkpoint_with_both_prefixes_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "OPTForCausalLM", transformers.OPTConfig(**OPT))
    rewrite(tmp_path, {}, {"decoder.final_layer_norm.weight": torch.ones(48)})
    with pytest.raises(CheckpointError, match=r"decoder\.final_layer_norm\.weight.*same place"):
        load_model(tmp_path)


def test_an_opt_inside_another_models_file_may_leave_out_defaults() -> None:
    saved: dict[str, Any] = {"ffn_dim": 64, "hidden_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    library = transformers.OPTConfig(**saved)
    decoder = opt.config(saved).decoder
    assert (decoder.vocab_size, decoder.max_positions) == (library.vocab_size, library.max_position_embeddings)
    assert opt.config(saved) == opt.config(library.to_dict())
    assert opt.config({}) == opt.config(transformers.OPTConfig().to_dict())


def test_windows_are_read_from_either_style() -> None:
    raw = {**LLAMA, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}
    assert [layer.window for layer in llama.qwen2(raw).decoder.attention] == [None, None, None, 16]
    kinds = ["sliding_attention", "full_attention"] * 2
    raw |= {"layer_types": kinds}
    assert [layer.window for layer in llama.qwen3(raw).decoder.attention] == [16, None, 16, None]
    assert {layer.window for layer in llama.qwen2({**raw, "use_sliding_window": False}).decoder.attention} == {None}
    with pytest.raises(CheckpointError, match="layer_types"):
        llama.qwen2({**raw, "layer_types": kinds[:3]})


@pytest.mark.parametrize(
    ("settings", "longest"),
    [
        ({}, 64),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 128),
        ({"rope_scaling": {"type": "dynamic", "factor": 3.0}}, 192),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}, 256),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}, 64),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}}, 64),
    ],
)
def test_the_longest_sequence_is_that_after_scaling(settings: dict[str, Any], longest: int) -> None:
    assert llama.llama({**LLAMA, **settings}).max_positions == longest


@pytest.mark.parametrize(
    ("config", "raw", "said"),
    [
        (llama.llama, {"hidden_size": None}, "hidden_size"),
        (llama.llama, {"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        (llama.llama, {"num_attention_heads": 5}, "48 hidden features between 5 attention heads"),
        (llama.llama, {"rope_scaling": {"rope_type": "su", "factor": 2.0}}, "'su'"),
        (llama.llama, {"rope_scaling": {"rope_type": "linear", "factor": "two"}}, "factor = 'two'"),
        (llama.mistral, {"sliding_window": -1}, "sliding_window = -1"),
        (gpt2.config, {"add_cross_attention": True}, "add_cross_attention = true"),
        (opt.config, {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine = false"),
        (gpt_neox.config, {"use_parallel_residual": "yes"}, "use_parallel_residual"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(config: Any, raw: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        config({**LLAMA, **raw})
