"""Quantised checkpoints of each layout against the dense model that the publisher's own formulas make of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from plexor import Engine, EngineConfig, SamplingParams
from plexor.api import Catalog, CheckpointError, DenseFormat, GroupedLinear, Linear
from plexor.testing.architecture import ONE_RANK, expected_tokens, load_model, random_prompts
from plexor.testing.checkpoints import write_checkpoint

CATALOG = Catalog.load()
E4M3 = torch.float8_e4m3fn
INPUT_SCALE = 0.02
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
    rows: int | None,
    columns: int | None,
    scale_name: str = "weight_scale",
    shape: tuple[int, ...] | None = None,
    static: bool = False,
) -> Callable[..., tuple[Tensors, Tensor]]:
    def pack(weight: Tensor) -> tuple[Tensors, Tensor]:
        block = rows or weight.shape[0], columns or weight.shape[1]
        scale = (blocks(weight, *block) / 448).bfloat16().float()
        wide = spread(scale, *block, weight.shape)
        codes = (weight / wide).clamp(-448, 448).to(E4M3)
        tensors = {"weight": codes, scale_name: scale if shape is None else scale.reshape(shape)}
        if static:
            tensors["input_scale"] = torch.tensor(INPUT_SCALE)
        return tensors, codes.float() * wide

    return pack


def int8(weight: Tensor) -> tuple[Tensors, Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 127.5).bfloat16()
    codes = (weight / scale.float()).round().clamp(-128, 127)
    return {"weight": codes.to(torch.int8), "weight_scale": scale}, codes * scale.float()


def pack_to_int32(codes: Tensor, bits: int, axis: int = 1) -> Tensor:
    """By the publisher's own code, where it is installed."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    packed: Tensor = helpers.pack_to_int32(codes, bits, packed_dim=axis)
    return packed


def packed8(weight: Tensor) -> tuple[Tensors, Tensor]:
    tensors, dense = int8(weight)
    packed = pack_to_int32(tensors["weight"], 8)
    shape = torch.tensor(weight.shape)
    return {"weight_packed": packed, "weight_scale": tensors["weight_scale"], "weight_shape": shape}, dense


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
            tensors["weight_zero_point"] = pack_to_int32((zero - 8).to(torch.int8), 4, axis=0).contiguous()
        if order:
            tensors["weight_g_idx"] = group.int()
        return tensors, meant(codes, scale, zero, group)

    return pack


def gptq(version: int, size: int, symmetric: bool, desc_act: bool = False) -> Layout:
    """Numbers of consecutive input features share a word; the first version's zero points are stored less one."""

    def pack(weight: Tensor) -> tuple[Tensors, Tensor]:
        columns = weight.shape[1]
        group = torch.arange(columns) // size
        if desc_act:
            group = group[torch.randperm(columns, generator=torch.Generator().manual_seed(6))]
        sorting = group.argsort(stable=True)
        sorted_codes, scale, zero = numbers4(weight[:, sorting], size, symmetric)
        codes = torch.empty_like(sorted_codes)
        codes[:, sorting] = sorted_codes
        tensors = {
            "qweight": words(codes.T, 0),
            "qzeros": words((zero.T - (2 - version)) % 16, 1),
            "scales": scale.half().T,
            "g_idx": group.int(),
        }
        return tensors, meant(codes, scale.half(), zero, group)

    quantization = {"quant_method": "gptq", "bits": 4, "group_size": size, "sym": symmetric, "desc_act": desc_act}
    quantization |= {"checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
    return Layout(quantization, pack, {128: "int4_wo", 32: "int4_wo_g32"}[size])


def words(numbers: Tensor, axis: int) -> Tensor:
    """Eight numbers of 0 to 15 along an axis in each int32, the first in the lowest bits."""
    rows = numbers if axis == 1 else numbers.T
    packed = [
        [sum(int(n) << 4 * i for i, n in enumerate(row[at : at + 8])) for at in range(0, len(row), 8)]
        for row in rows.int().tolist()
    ]
    signed = torch.tensor(packed).to(torch.int32)
    return signed if axis == 1 else signed.T


def gptq8(weight: Tensor) -> tuple[Tensors, Tensor]:
    """Four numbers to a word and a scale for each output channel; zero points say 127, for 128."""
    tensors, dense = int8(weight)
    codes = (tensors["weight"].int() + 128).T.reshape(-1, 4, weight.shape[0])
    packed = sum(codes[:, place].long() << 8 * place for place in range(4))
    assert isinstance(packed, Tensor)
    zeros = torch.full((1, weight.shape[0] // 4), 0x7F7F7F7F, dtype=torch.int32)
    return {"qweight": packed.to(torch.int32), "qzeros": zeros, "scales": tensors["weight_scale"].T}, dense


def awq(weight: Tensor) -> tuple[Tensors, Tensor]:
    """Words hold output features 0 2 4 6 1 3 5 7 of eight, the first in the lowest bits."""
    columns = weight.shape[1]
    codes, scale, zero = numbers4(weight, 64, symmetric=False)
    order = torch.arange(weight.shape[0]).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].flatten()
    tensors = {"qweight": words(codes.T[:, order], 1), "qzeros": words(zero.T[:, order], 1), "scales": scale.half().T}
    return tensors, meant(codes, scale.half(), zero, torch.arange(columns) // 64)


def modelopt4(static: bool) -> Callable[..., tuple[Tensors, Tensor]]:
    """Two output features share a byte; inputs are multiplied by factors that the weights were divided by."""

    def pack(weight: Tensor) -> tuple[Tensors, Tensor]:
        out, columns = weight.shape
        factor = torch.rand(columns, generator=torch.Generator().manual_seed(columns)) + 0.5
        codes, scale, zero = numbers4(weight / factor, 128, True)
        pairs = (codes - 8).to(torch.int8).reshape(out // 2, 2, columns)
        tensors = {
            "weight": ((pairs[:, 0] & 15) | ((pairs[:, 1] & 15) << 4)).view(torch.uint8),
            "weight_scale": scale.float(),
            "pre_quant_scale": factor,
            "weight_scale_2": torch.tensor(0.01),
        }
        dense = meant(codes, scale, zero, torch.arange(columns) // 128) * factor
        return (tensors | {"input_scale": torch.tensor(INPUT_SCALE)} if static else tensors), dense

    return pack


def with_input_scale(pack: Callable[..., tuple[Tensors, Tensor]]) -> Callable[..., tuple[Tensors, Tensor]]:
    def packed(weight: Tensor) -> tuple[Tensors, Tensor]:
        tensors, dense = pack(weight)
        return tensors | {"input_scale": torch.tensor([INPUT_SCALE])}, dense

    return packed


def weights(kind: str, bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return {"type": kind, "num_bits": bits, "strategy": strategy, "symmetric": True, "dynamic": False} | more


TOKENS8 = {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}
STATIC = {"dynamic": False, "strategy": "tensor"}
FLOAT8, INT8 = TOKENS8 | {"type": "float"}, TOKENS8 | {"type": "int"}
LAYOUTS = {
    "fp8 channel": Layout(ct(weights("float", 8, "channel"), "float-quantized", FLOAT8), float8(1, None), "fp8"),
    "fp8 tensor": Layout(ct(weights("float", 8, "tensor"), "float-quantized", FLOAT8), float8(None, None), "fp8"),
    "fp8 block": Layout(
        ct(weights("float", 8, "block", block_structure=[128, 128]), "float-quantized", FLOAT8),
        float8(128, 128),
        "fp8_block",
    ),
    "w8a8": Layout(ct(weights("int", 8, "channel"), "int-quantized", INT8), int8, "int8_sq"),
    "w8a16": Layout(ct(weights("int", 8, "channel"), "pack-quantized"), packed8, "int8_wo"),
    "w4a16": Layout(ct(weights("int", 4, "group", group_size=128), "pack-quantized"), packed4(128, True), "int4_wo"),
    "w4a16 32": Layout(
        ct(weights("int", 4, "group", group_size=32), "pack-quantized"), packed4(32, True), "int4_wo_g32"
    ),
    "w4a16 channel": Layout(ct(weights("int", 4, "channel"), "pack-quantized"), packed4(None, True), "int4_wo_channel"),
    "w4a16 asymmetric": Layout(
        ct(weights("int", 4, "group", group_size=64, symmetric=False), "pack-quantized"),
        packed4(64, False),
        "int4_wo_g64",
    ),
    "w4a16 ordered": Layout(
        ct(weights("int", 4, "group", group_size=64, actorder="group"), "pack-quantized"),
        packed4(64, True, True),
        "int4_wo_g64",
    ),
    "w4a8": Layout(
        ct(weights("int", 4, "group", group_size=128), "pack-quantized", FLOAT8), packed4(128, True), "w4a_fp8"
    ),
    "gptq": gptq(1, 128, symmetric=True),
    "gptq 32": gptq(1, 32, symmetric=True),
    "gptq asymmetric": gptq(1, 128, symmetric=False),
    "gptq ordered": gptq(1, 32, symmetric=True, desc_act=True),
    "gptq v2": gptq(2, 128, symmetric=False),
    "gptq 8": Layout({"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": True}, gptq8, "int8_wo"),
    "awq": Layout(
        {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}, awq, "int4_wo_g64"
    ),
    "block fp8": Layout(
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        float8(128, 128, "weight_scale_inv"),
        "fp8_block",
    ),
    "tensor fp8": Layout(
        {"quant_method": "fp8", "activation_scheme": "dynamic"}, float8(None, None, shape=(1,)), "fp8"
    ),
    "fbgemm fp8": Layout(
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, float8(1, None, shape=(-1,)), "fp8"
    ),
    "static fp8": Layout(
        {"quant_method": "fp8", "activation_scheme": "static"},
        float8(None, None, shape=(), static=True),
        "fp8",
    ),
    "fp8 static": Layout(
        ct(weights("float", 8, "tensor"), "float-quantized", FLOAT8 | STATIC),
        float8(None, None, static=True),
        "fp8",
    ),
    "w8a8 static": Layout(
        ct(weights("int", 8, "channel"), "int-quantized", INT8 | STATIC), with_input_scale(int8), "int8_sq"
    ),
    "w4a8 static": Layout(
        ct(weights("int", 4, "group", group_size=128), "pack-quantized", FLOAT8 | STATIC),
        with_input_scale(packed4(128, True)),
        "w4a_fp8",
    ),
    "modelopt fp8": Layout(
        {"quant_method": "modelopt", "quant_algo": "FP8"}, float8(None, None, shape=(), static=True), "fp8"
    ),
    "modelopt fp8 channel": Layout(
        {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, float8(1, None, shape=(-1,)), "fp8"
    ),
    "modelopt w4a8": Layout(
        {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ", "group_size": 128}, modelopt4(True), "w4a_fp8"
    ),
    "modelopt w4a16": Layout(
        {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "group_size": 128}, modelopt4(False), "int4_wo"
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
        assert not isinstance(module.format, DenseFormat)


@pytest.mark.parametrize("name", ["fp8 channel", "w4a16", "gptq", "w8a8"])
def test_two_ranks_read_what_one_does(name: str, plain: Path, tmp_path: Path) -> None:
    stored, dense = write_layout(LAYOUTS[name], plain, tmp_path)
    prompts = random_prompts(CONFIG["vocab_size"], (5, 9))
    assert answers(stored, prompts, ranks=2) == expected_tokens(dense, prompts, 8)


@pytest.mark.parametrize("name", ["w4a16 32", "w4a16 channel", "w4a16 asymmetric", "awq", "gptq 8", "modelopt w4a16"])
def test_two_ranks_keep_what_is_stored(name: str, plain: Path, tmp_path: Path) -> None:
    """Activations are not rounded, and nearly all shares are whole groups of these sizes."""
    stored, dense = write_layout(LAYOUTS[name], plain, tmp_path)
    prompts = random_prompts(CONFIG["vocab_size"], (5, 9))
    assert answers(stored, prompts, "auto", ranks=2) == expected_tokens(dense, prompts, 8)


@pytest.mark.parametrize("name", ["w4a16 32", "gptq ordered", "block fp8"])
def test_experts_are_kept_too(name: str, tmp_path: Path) -> None:
    """A stack of Mixtral's, each expert stored on its own; the attention stays dense."""
    layout = LAYOUTS[name]
    sizes = CONFIG | {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 96}
    plain = tmp_path / "plain"
    write_checkpoint(plain, "MixtralForCausalLM", transformers.MixtralConfig(**sizes))
    expert = re.compile(r"(.*experts\.\d+\.w\d)\.weight")
    stored: Tensors = {}
    dense: Tensors = {}
    for name, tensor in read_tensors(plain).items():
        hit = expert.fullmatch(name)
        packed, dense[name] = ({}, tensor) if hit is None else layout.pack(tensor)
        stored |= {name: tensor} if hit is None else {f"{hit[1]}.{last}": each for last, each in packed.items()}
    assert stored.keys() != dense.keys()
    folders = (
        write_like(plain, tmp_path / "s", stored, layout.quantization),
        write_like(plain, tmp_path / "d", dense, None),
    )
    kept = load_model(folders[0], precision=layout.precision).module
    meant_by = dict(load_model(folders[1]).module.named_modules())
    stacks = {key: module for key, module in kept.named_modules() if isinstance(module, GroupedLinear)}
    assert len(stacks) == 4
    for key, module in stacks.items():
        exact = meant_by[key].stored["weight"]
        assert not isinstance(module.format, DenseFormat)
        torch.testing.assert_close(module.format.dense(module.stored), exact, rtol=2e-7, atol=0, msg=key)
    assert all(isinstance(module.format, DenseFormat) for _, module in linears(kept))
    if layout.precision.startswith("int4"):
        prompts = random_prompts(CONFIG["vocab_size"], (5, 9))
        assert answers(folders[0], prompts, "auto") == expected_tokens(folders[1], prompts, 8)


def test_explain_says_the_layout_and_why(plain: Path, tmp_path: Path) -> None:
    stored, _ = write_layout(LAYOUTS["gptq 32"], plain, tmp_path)
    for given, why in (((), "int4_wo_g32 was chosen to keep them"), (("--precision", "fp8"), "fp8 was asked for")):
        command = [sys.executable, "-m", "plexor", "explain", str(stored), "--device", "cpu", *given]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert f"stored quantised in the layout GPTQ; precision {why}" in said


def test_explain_counts_layers_by_how_they_are_kept(plain: Path, tmp_path: Path) -> None:
    """Also where one of the parts that a layer merges is ignored: it is dense, as its parts have no form in common."""
    folder = write_mixed(plain, tmp_path, ignored=("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"))[0]
    command = [sys.executable, "-m", "plexor", "explain", str(folder), "--device", "cpu"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "linear layers: 6 int4_wo, groups of 64, zero points; 2 dense\n" in said


def write_mixed(plain: Path, folder: Path, ignored: Sequence[str], eight: Sequence[str] = ()) -> tuple[Path, Path]:
    """Asymmetric 4-bit layers but for those that are ignored or have eight bits, and the dense model that it means."""
    four, bytes_ = packed4(64, False), packed8
    quantization = ct(weights("int", 4, "group", group_size=64, symmetric=False), "pack-quantized")
    quantization["ignore"] = [*quantization["ignore"], *(f"model.{name}" for name in ignored)]
    targets = [f"re:.*{name.replace('.', '[.]')}$" for name in eight]
    group = {"targets": targets, "weights": weights("int", 8, "channel"), "input_activations": None}
    quantization["config_groups"]["group_1"] = group
    stored: Tensors = {}
    dense: Tensors = {}
    for name, tensor in read_tensors(plain).items():
        hit = LAYERS.fullmatch(name)
        if hit is None or any(name == f"model.{each}.weight" for each in ignored):
            stored[name] = dense[name] = tensor
            continue
        pack = bytes_ if any(each in name for each in eight) else four
        tensors, dense[name] = pack(tensor)
        stored |= {f"{hit[1]}.{last}": each for last, each in tensors.items()}
    return write_like(plain, folder / "s", stored, quantization), write_like(plain, folder / "d", dense, None)


@pytest.mark.parametrize("ranks", [1, 2])
def test_layers_are_kept_each_in_its_own_way(ranks: int, plain: Path, tmp_path: Path) -> None:
    ignored = ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj")
    stored, dense = write_mixed(plain, tmp_path, ignored, eight=("0.mlp.gate_proj", "0.mlp.up_proj", "1.mlp.up_proj"))
    with Engine(config=EngineConfig(model=str(stored), device="cpu", num_blocks=8)) as engine:
        assert engine.config.precision == "int4_wo_g64"
    kept = load_model(stored, precision="int4_wo_g64").module
    formats = {key: str(module.format) for key, module in kept.named_modules() if isinstance(module, Linear)}
    four = "int4_wo, groups of 64, zero points"
    assert formats == {
        "layers.0.attention.qkv": "dense",
        "layers.0.attention.out": four,
        "layers.0.feed_forward.gate_up": "int8_wo",
        "layers.0.feed_forward.down": four,
        "layers.1.attention.qkv": four,
        "layers.1.attention.out": four,
        "layers.1.feed_forward.gate_up": "dense",
        "layers.1.feed_forward.down": "dense",
    }
    prompts = random_prompts(CONFIG["vocab_size"], (5, 9))
    assert answers(stored, prompts, "auto", ranks=ranks) == expected_tokens(dense, prompts, 8)


@pytest.mark.parametrize("precision", ["int4_wo", "fp8"])
def test_another_precision_rounds_ignored_layers_too(precision: str, plain: Path, tmp_path: Path) -> None:
    stored, _ = write_mixed(plain, tmp_path, ignored=("layers.1.mlp.down_proj",))
    kept = load_model(stored, precision=precision).module
    assert len({str(module.format) for module in kept.modules() if isinstance(module, Linear)}) == 1


@pytest.mark.parametrize("name", ["gptq ordered", "w4a16 ordered"])
def test_a_row_share_of_weights_in_activation_order_is_dense(name: str, plain: Path, tmp_path: Path) -> None:
    """Groups are spread over the ranks; layers whose outputs are shared out are kept."""
    stored, dense = write_layout(LAYOUTS[name], plain, tmp_path)
    precision = LAYOUTS[name].precision
    kept = load_model(stored, precision=precision, mesh=replace(ONE_RANK, rank=1, size=2)).module
    is_dense = {key.rpartition(".")[2]: isinstance(module.format, DenseFormat) for key, module in linears(kept)}
    assert is_dense == {"qkv": False, "out": True, "gate_up": False, "down": True}
    prompts = random_prompts(CONFIG["vocab_size"], (5, 9))
    assert answers(stored, prompts, "auto", ranks=2) == expected_tokens(dense, prompts, 8)


def linears(module: torch.nn.Module) -> list[tuple[str, Linear]]:
    return [(key, layer) for key, layer in module.named_modules() if isinstance(layer, Linear)]


def test_blocks_that_a_rank_parts_are_kept_row_by_row(tmp_path: Path) -> None:
    """Queries of 128 rows are whole blocks, keys and values of 64 are not, and 192 rows of a feed-forward are not."""
    plain = tmp_path / "plain"
    write_checkpoint(plain, "LlamaForCausalLM", transformers.LlamaConfig(**CONFIG))
    stored, _ = write_layout(LAYOUTS["block fp8"], plain, tmp_path)
    kept = load_model(stored, precision="fp8_block", mesh=replace(ONE_RANK, size=2)).module
    formats = {key.rpartition(".")[2]: str(module.format) for key, module in linears(kept)}
    assert formats == {
        "qkv": "fp8 in blocks of 1 x 128",
        "out": "fp8 in blocks of 128 x 128",
        "gate_up": "fp8 in blocks of 1 x 128",
        "down": "dense",
    }


def test_one_scale_for_all_inputs_is_kept_where_the_parts_agree(plain: Path, tmp_path: Path) -> None:
    stored, _ = write_layout(LAYOUTS["static fp8"], plain, tmp_path)
    tensors = load_file(stored / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.input_scale"] *= 2
    save_file(tensors, stored / "model.safetensors")
    kept = dict(linears(load_model(stored, precision="fp8").module))
    assert str(kept["layers.0.attention.qkv"].format) == "fp8"
    assert str(kept["layers.1.attention.qkv"].format) == "fp8, static scale of the inputs"


@pytest.mark.parametrize("name", ["fp8 static", "w8a8 static", "w4a8 static", "fp8 block", "modelopt w4a8"])
def test_inputs_are_rounded_as_the_checkpoint_asks(name: str, plain: Path, tmp_path: Path) -> None:
    stored, _ = write_layout(LAYOUTS[name], plain, tmp_path)
    kept = load_model(stored, precision=LAYOUTS[name].precision).module
    layer = dict(linears(kept))["layers.1.feed_forward.down"]
    x = torch.randn(3, 384, generator=torch.Generator().manual_seed(9))
    x[1, 5] = 40
    tensors = load_file(stored / "model.safetensors")
    factor = tensors.get("model.layers.1.mlp.down_proj.pre_quant_scale", torch.ones(384))
    if name == "fp8 block":
        scale = x.unflatten(1, (3, 128)).abs().amax(2).repeat_interleave(128, 1) / 448
        rounded = (x / scale).to(E4M3).float() * scale
    elif name == "w8a8 static":
        rounded = (x / INPUT_SCALE).round().clamp(-128, 127) * INPUT_SCALE
    else:
        rounded = (x * factor / INPUT_SCALE).clamp(-448, 448).to(E4M3).float() * INPUT_SCALE / factor
    expected = rounded.double() @ layer.format.dense(layer.stored).double().T
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_gpu_keeps_what_a_cpu_keeps(name: str, plain: Path, tmp_path: Path) -> None:
    """Several threads read onto it."""
    stored, _ = write_layout(LAYOUTS[name], plain, tmp_path)
    wanted = LAYOUTS[name].precision
    on_cpu = dict(load_model(stored, precision=wanted, dtype=torch.bfloat16).module.named_buffers())
    device = torch.device("cuda", 0)
    on_gpu = load_model(stored, precision=wanted, dtype=torch.bfloat16, device=device).module
    for key, tensor in on_gpu.named_buffers():
        assert torch.equal(tensor.cpu().double(), on_cpu[key].double()), key
    layer = dict(linears(on_gpu))["layers.1.feed_forward.down"]
    x = torch.randn(40, 384, device=device, dtype=torch.bfloat16)
    meant = layer.format.dense(layer.stored).double()
    error = (layer(x).double() - x.double() @ meant.T).norm() / (x.double() @ meant.T).norm()
    assert error < 0.06


def test_unused_scales_are_passed_over(plain: Path, tmp_path: Path) -> None:
    stored, dense = write_layout(LAYOUTS["modelopt fp8"], plain, tmp_path)
    tensors = load_file(stored / "model.safetensors")
    tensors |= {
        "model.layers.0.mlp.up_proj.input_scale": torch.ones(()),
        "model.layers.1.self_attn.k_proj.k_scale": torch.ones(1),
    }
    save_file(tensors, stored / "model.safetensors")
    assert answers(stored, [[5, 9]]) == answers(dense, [[5, 9]])


NAME = "model.layers.1.mlp.up_proj."


def without(last: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(NAME + last)


def with_nan(last: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors[NAME + last][:1].fill_(float("nan"))  # type: ignore[return-value]


def with_tensor(last: str, tensor: Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(NAME + last, tensor)


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("fp8 channel", without("weight_scale"), "'model.layers.1.mlp.up_proj.weight_scale' is missing"),
        ("block fp8", without("weight_scale_inv"), "weight_scale_inv' is missing"),
        ("modelopt fp8", without("weight_scale"), "weight_scale' is missing"),
        ("w4a16", without("weight_shape"), "weight_shape' is missing"),
        ("gptq", without("qzeros"), "qzeros' is missing"),
        ("awq", without("scales"), "scales' is missing"),
        ("w8a8", with_nan("weight_scale"), "holds scales that are NaN, infinite or negative"),
        ("gptq", with_nan("scales"), "holds scales that are NaN, infinite or negative"),
        ("fp8 channel", with_tensor("weight_scale", torch.ones(7, 1)), r"is float32 \[7, 1\] where .* \[384, 1\]"),
        ("w4a16", with_tensor("weight_scale", torch.ones(384, 2, dtype=torch.int8)), "is int8"),
        ("w4a16", with_tensor("weight_shape", torch.tensor([384, 7])), "does not hold"),
        ("w4a16 ordered", with_tensor("weight_g_idx", torch.full((256,), 9)), "names groups beyond the 4"),
        ("gptq ordered", with_tensor("g_idx", torch.full((256,), -1)), "names groups beyond the 8"),
        (
            "gptq ordered",
            with_tensor("g_idx", torch.zeros(256, dtype=torch.int32)),
            "other than 32 input features each",
        ),
        ("w4a16 ordered", with_tensor("weight_g_idx", torch.zeros(256)), "is float32"),
        ("awq", with_tensor("qweight", torch.zeros(256, 48)), "is float32"),
        ("awq", without("qzeros"), "qzeros' is missing"),
        (
            "w4a16 asymmetric",
            with_tensor("weight_zero_point", torch.zeros(48, 3, dtype=torch.int32)),
            r"int32 \[48, 4\]",
        ),
        ("modelopt w4a8", without("weight_scale"), "weight_scale' is missing"),
        ("modelopt w4a8", with_nan("pre_quant_scale"), "factors of inputs that are NaN"),
        ("modelopt w4a8", with_tensor("pre_quant_scale", torch.ones(255)), r"float32 \[255\]"),
        ("modelopt w4a8", with_tensor("weight_scale", torch.ones(384, 3)), r"\[384, 3\] where .* \[384, 2\]"),
    ],
)
def test_what_cannot_be_true_is_refused(
    name: str, damage: Callable[[Tensors], None], says: str, plain: Path, tmp_path: Path
) -> None:
    stored, _ = write_layout(LAYOUTS[name], plain, tmp_path)
    tensors = load_file(stored / "model.safetensors")
    damage(tensors)
    save_file(tensors, stored / "model.safetensors")
    with pytest.raises(CheckpointError, match=says):
        load_model(stored)


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("static fp8", without("input_scale"), "up_proj.input_scale' is missing, the scale of a layer's inputs"),
        ("fp8 static", with_tensor("input_scale", torch.tensor(float("nan"))), "gives nan for the scale"),
        ("w8a8 static", with_tensor("input_scale", torch.zeros(1)), "gives 0.0 for the scale"),
        ("modelopt w4a8", with_tensor("input_scale", torch.ones(384)), r"is float32 \[384\] where one number is due"),
        ("fp8 channel", with_nan("weight"), "holds NaN"),
        ("fp8 block", with_nan("weight"), "holds NaN"),
    ],
)
def test_what_cannot_be_kept_is_refused(
    name: str, damage: Callable[[Tensors], None], says: str, plain: Path, tmp_path: Path
) -> None:
    stored, _ = write_layout(LAYOUTS[name], plain, tmp_path)
    tensors = load_file(stored / "model.safetensors")
    damage(tensors)
    save_file(tensors, stored / "model.safetensors")
    with pytest.raises(CheckpointError, match=says):
        load_model(stored, precision=LAYOUTS[name].precision)


def test_parts_in_orders_of_their_own_are_refused(plain: Path, tmp_path: Path) -> None:
    stored, _ = write_layout(LAYOUTS["gptq ordered"], plain, tmp_path)
    tensors = load_file(stored / "model.safetensors")
    order = tensors[NAME + "g_idx"]
    tensors[NAME + "g_idx"] = order.roll(1)
    save_file(tensors, stored / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"another 'order' than .* use --precision dense"):
        load_model(stored, precision="int4_wo_g32")
    assert load_model(stored)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("int4_w", "did you mean 'int4_wo'"),
        ("fp8_blocks", "did you mean 'fp8_block'"),
    ],
)
def test_a_precision_that_cannot_be_had_is_refused_in_a_line(given: str, says: str, plain: Path) -> None:
    command = [sys.executable, "-m", "plexor", "explain", str(plain), "--device", "cpu", "--precision", given]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.returncode != 0
    assert says in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1


def test_a_damaged_pattern_of_layers_is_refused(plain: Path, tmp_path: Path) -> None:
    quantization = ct(weights("int", 4, "group", group_size=128), "pack-quantized")
    quantization["config_groups"]["group_0"]["targets"] = ["re:(.*"]
    stored, _ = write_layout(Layout(quantization, packed4(128, True), "int4_wo"), plain, tmp_path)
    with pytest.raises(CheckpointError, match=r"'\(\.\*', which is no regular expression"):
        load_model(stored)


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv'"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_p"}, "format 'gptq_p'"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "format 'marlin'"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "in 3 bits"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "algorithm 'NVFP4'"),
        (ct(weights("float", 4, "group", group_size=16), "nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized'"),
        ({"quant_method": "compressed-tensors"}, "describes no weights"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes.*which no installed plugin reads"),
        (ct(weights("int", 4, "group", group_size=100), "pack-quantized"), "groups of 100 do not divide"),
    ],
)
def test_a_layout_that_is_not_read_is_refused_by_name(
    quantization: Mapping[str, Any], says: str, plain: Path, tmp_path: Path
) -> None:
    layout = Layout(quantization, LAYOUTS["w4a16"].pack, "dense")
    stored, _ = write_layout(layout, plain, tmp_path)
    with pytest.raises(CheckpointError, match=says):
        load_model(stored)
