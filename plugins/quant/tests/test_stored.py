"""Quantised checkpoints of each layout against the dense model that the publisher's own formulas make of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file
from torch import Tensor

from plexor import Engine, EngineConfig, SamplingParams
from plexor.api import Catalog, Linear
from plexor.testing.architecture import expected_tokens, load_model, random_prompts
from plexor.testing.checkpoints import write_checkpoint

CATALOG = Catalog.load()
E4M3 = torch.float8_e4m3fn
Tensors = dict[str, Tensor]
CONFIG: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Layout:
    """pack: a weight [out, in] -> its tensors by last name, and the dense float32 weight that they mean.

    precision: the one that is chosen for it.
    """

    quantization: Mapping[str, Any]
    pack: Callable[[Tensor], tuple[Tensors, Tensor]]
    precision: str


def ct(weights: Mapping[str, Any], form: str, inputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": form}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


def spread(each: Tensor, rows: int, columns: int, shape: torch.Size) -> Tensor:
    """A number for each block of rows x columns -> one for each element."""
    return each.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]]


def blocks(weight: Tensor, rows: int, columns: int) -> Tensor:
    """The largest magnitude in each block."""
    out, size = weight.shape
    padded = torch.zeros(-(-out // rows) * rows, -(-size // columns) * columns)
    padded[:out, :size] = weight.abs()
    return padded.reshape(padded.shape[0] // rows, rows, -1, columns).amax(dim=(1, 3))


def float8(
    rows: int | None, columns: int | None, scale_name: str = "weight_scale"
) -> Callable[..., tuple[Tensors, Tensor]]:
    def pack(weight: Tensor) -> tuple[Tensors, Tensor]:
        block = rows or weight.shape[0], columns or weight.shape[1]
        scale = (blocks(weight, *block) / 448).bfloat16().float()
        wide = spread(scale, *block, weight.shape)
        codes = (weight / wide).clamp(-448, 448).to(E4M3)
        return {"weight": codes, scale_name: scale}, codes.float() * wide

    return pack


def int8(weight: Tensor) -> tuple[Tensors, Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 127.5).bfloat16()
    codes = (weight / scale.float()).round().clamp(-128, 127)
    return {"weight": codes.to(torch.int8), "weight_scale": scale}, codes * scale.float()


def numbers4(weight: Tensor, size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 to 15, scales bfloat16 and zero points 0 to 15 [out, groups], by rounding each group."""
    grouped = weight.reshape(weight.shape[0], -1, size)
    if symmetric:
        scale = (grouped.abs().amax(-1) / 7.5).bfloat16()
        zero = torch.full(scale.shape, 8.0)
    else:
        low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
        scale = ((high - low) / 15).bfloat16()
        zero = (-low / scale.float()).round().clamp(0, 15)
    codes = (grouped / scale.float().unsqueeze(-1) + zero.unsqueeze(-1)).round().clamp(0, 15)
    return codes.reshape(weight.shape), scale, zero


def meant(codes: Tensor, scale: Tensor, zero: Tensor, group: Tensor) -> Tensor:
    return (codes - zero[:, group]) * scale.float()[:, group]


def packed4(size: int | None, symmetric: bool, order: bool = False) -> Callable[..., tuple[Tensors, Tensor]]:
    def pack(weight: Tensor) -> tuple[Tensors, Tensor]:
        out, columns = weight.shape
        each = size or columns
        group = torch.arange(columns) // each
        if order:
            group = group[torch.randperm(columns, generator=torch.Generator().manual_seed(5))]
        sorting = group.argsort(stable=True)
        sorted_codes, scale, zero = numbers4(weight[:, sorting], each, symmetric)
        codes = torch.empty_like(sorted_codes)
        codes[:, sorting] = sorted_codes
        tensors = {
            "weight_packed": pack_to_int32((codes - 8).to(torch.int8), 4),
            "weight_scale": scale,
            "weight_shape": torch.tensor([out, columns]),
        }
        if not symmetric:
            tensors["weight_zero_point"] = pack_to_int32((zero - 8).to(torch.int8), 4, packed_dim=0).contiguous()
        if order:
            tensors["weight_g_idx"] = group.int()
        return tensors, meant(codes, scale, zero, group)

    return pack


def weights(kind: str, bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return {"type": kind, "num_bits": bits, "strategy": strategy, "symmetric": True, "dynamic": False} | more


TOKENS8 = {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}
FLOAT8, INT8 = TOKENS8 | {"type": "float"}, TOKENS8 | {"type": "int"}
LAYOUTS = {
    "fp8 channel": Layout(ct(weights("float", 8, "channel"), "float-quantized", FLOAT8), float8(1, None), "fp8"),
    "fp8 tensor": Layout(ct(weights("float", 8, "tensor"), "float-quantized", FLOAT8), float8(None, None), "fp8"),
    "fp8 block": Layout(
        ct(weights("float", 8, "block", block_structure=[128, 128]), "float-quantized", FLOAT8),
        float8(128, 128),
        "dense",
    ),
    "w8a8": Layout(ct(weights("int", 8, "channel"), "int-quantized", INT8), int8, "int8_sq"),
    "w4a16": Layout(ct(weights("int", 4, "group", group_size=128), "pack-quantized"), packed4(128, True), "int4_wo"),
    "w4a16 32": Layout(
        ct(weights("int", 4, "group", group_size=32), "pack-quantized"), packed4(32, True), "int4_wo_g32"
    ),
    "w4a16 channel": Layout(ct(weights("int", 4, "channel"), "pack-quantized"), packed4(None, True), "int4_wo_channel"),
    "w4a16 asymmetric": Layout(
        ct(weights("int", 4, "group", group_size=64, symmetric=False), "pack-quantized"), packed4(64, False), "dense"
    ),
    "w4a16 ordered": Layout(
        ct(weights("int", 4, "group", group_size=64, actorder="group"), "pack-quantized"),
        packed4(64, True, True),
        "dense",
    ),
    "w4a8": Layout(
        ct(weights("int", 4, "group", group_size=128), "pack-quantized", FLOAT8), packed4(128, True), "w4a_fp8"
    ),
}
LAYERS = re.compile(r"(model\.layers\.\d+\.(self_attn|mlp)\.\w+)\.weight")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    write_checkpoint(folder, "LlamaForCausalLM", transformers.LlamaConfig(**CONFIG))
    return folder


def read_tensors(folder: Path) -> Tensors:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def write_like(plain: Path, folder: Path, tensors: Tensors, quantization: Mapping[str, Any] | None) -> Path:
    """A folder with the plain one's config and tokenizer and these tensors."""
    folder.mkdir()
    for file in plain.glob("*.json"):
        if not file.name.endswith("index.json"):
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((plain / "config.json").read_text())
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def write_layout(layout: Layout, plain: Path, folder: Path) -> tuple[Path, Path]:
    """The checkpoint in a layout, and the dense one that it means."""
    stored: Tensors = {}
    dense: Tensors = {}
    for name, tensor in read_tensors(plain).items():
        hit = LAYERS.fullmatch(name)
        if hit is None:
            stored[name] = dense[name] = tensor
            continue
        tensors, dense[name] = layout.pack(tensor)
        stored |= {f"{hit[1]}.{last}": each for last, each in tensors.items()}
    return (
        write_like(plain, folder / "stored", stored, layout.quantization),
        write_like(plain, folder / "dense", dense, None),
    )


def answers(folder: Path, prompts: list[list[int]], precision: str = "dense", ranks: int = 1) -> list[list[int]]:
    config = EngineConfig(
        model=str(folder), precision=precision, device="cpu", dtype="float32", num_blocks=64, tensor_parallel=ranks
    )
    with Engine(config=config) as engine:
        return [answer.token_ids for answer in engine.generate(prompts, SamplingParams(temperature=0, max_tokens=8))]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_stored_checkpoint_is_the_dense_one_that_it_means(name: str, plain: Path, tmp_path: Path) -> None:
    stored, dense = write_layout(LAYOUTS[name], plain, tmp_path)
    ours, theirs = (dict(load_model(folder).module.named_buffers()) for folder in (stored, dense))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=2e-7, atol=0, msg=key)


@pytest.mark.parametrize("name", LAYOUTS)
def test_it_answers_as_transformers_does_with_the_dense_weights(name: str, plain: Path, tmp_path: Path) -> None:
    stored, dense = write_layout(LAYOUTS[name], plain, tmp_path)
    prompts = random_prompts(CONFIG["vocab_size"])
    assert answers(stored, prompts) == expected_tokens(dense, prompts, 8)


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.precision != "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_chosen_precision_keeps_what_is_stored(name: str, dtype: torch.dtype, plain: Path, tmp_path: Path) -> None:
    """Merged q, k, v and gate, up as well; scales are bfloat16 numbers here, which every precision can hold."""
    stored, dense = write_layout(LAYOUTS[name], plain, tmp_path)
    with Engine(config=EngineConfig(model=str(stored), device="cpu", num_blocks=8)) as engine:
        assert engine.config.precision == LAYOUTS[name].precision
    kept = load_model(stored, precision=LAYOUTS[name].precision, dtype=dtype).module
    meant_by = dict(load_model(dense).module.named_modules())
    linears = {key: module for key, module in kept.named_modules() if isinstance(module, Linear)}
    assert len(linears) == 8
    for key, module in linears.items():
        exact = meant_by[key].stored["weight"]
        torch.testing.assert_close(module.format.dense(module.stored), exact, rtol=2e-7, atol=0, msg=key)
