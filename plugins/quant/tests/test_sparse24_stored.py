"""Checkpoints of 2:4 weights as kept numbers and a bitmask, packed here with NumPy, against the dense weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from plexor.api import Catalog, CheckpointError, Linear
from plexor.testing.architecture import load_model, random_prompts, run
from plexor.testing.checkpoints import write_checkpoint
from plexor.testing.source import MemorySource
from plexor_quant.rounding import round_e4m3
from plexor_quant.sparse24 import Sparse24Format, Sparse24Fp8Format
from plexor_quant.sparse24_layout import compress, prune
from plexor_quant.stored.compressed_tensors import precision
from plexor_quant.stored.sparse24 import BitmaskSource, is_sparse

E4M3 = torch.float8_e4m3fn


def packed(seed: int, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """A weight and what is stored for it; some of the kept numbers are zeros."""
    generator = np.random.default_rng(seed)
    mask = np.argsort(np.argsort(generator.random((rows, columns // 4, 4)), axis=-1), axis=-1) < 2
    mask = mask.reshape(rows, columns)
    weight = torch.from_numpy(generator.standard_normal((rows, columns), dtype=np.float32) * mask + 0.0)
    weight[:, :4] = 0
    weight = weight.to(dtype)
    kept = weight.float()[torch.from_numpy(mask)].view(rows, columns // 2).to(dtype)
    bits = torch.from_numpy(np.packbits(mask, axis=-1, bitorder="little"))
    return weight, {"m.compressed": kept, "m.bitmask": bits, "m.shape": torch.tensor([[rows], [columns]])}


def opened(stored: dict[str, Tensor]) -> tuple[MemorySource, BitmaskSource]:
    memory = MemorySource({"before": torch.arange(3), **stored, "m.weight_scale": torch.ones(1)})
    return memory, BitmaskSource(memory)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, E4M3], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (5, 12), (7, 64), (33, 132)])
def test_the_dense_weight_is_shown(rows: int, columns: int, dtype: torch.dtype) -> None:
    weight, stored = packed(41, rows, columns, dtype)
    _, source = opened(stored)
    assert source.names() == ("before", "m.weight", "m.weight_scale")
    info = source.info("m.weight")
    assert (info.shape, info.dtype) == ((rows, columns), dtype)
    assert info.num_bytes == stored["m.compressed"].nbytes + stored["m.bitmask"].nbytes
    found = source.read("m.weight")
    assert found.dtype == dtype
    assert torch.equal(found.float(), weight.float())
    compress(found)
    assert torch.equal(source.read("before"), torch.arange(3))
    content = bytearray(10)
    source.read_into(memoryview(content), "before", (slice(1, 3),), 3)
    assert content == torch.arange(3).numpy().tobytes()[11:21]


def test_parts_read_only_what_they_need() -> None:
    weight, stored = packed(42, 24, 100, torch.bfloat16)
    for rows in (slice(0, 24), slice(3, 4), slice(10, 20)):
        for columns in (slice(0, 100), slice(0, 8), slice(50, 75), slice(96, 100), slice(13, 14)):
            memory, source = opened(stored)
            memory.reads.clear()
            found = source.read("m.weight", (rows, columns))
            assert torch.equal(found, weight[rows, columns])
            assert all(index[0] == rows for _, index in memory.reads)
            (kept,) = (index[1] for name, index in memory.reads if name == "m.compressed")
            assert kept.stop - kept.start <= (columns.stop - columns.start) // 2 + 8
    expected = weight.view(torch.int16).numpy().tobytes()
    content = bytearray(50)
    source.read_into(memoryview(content), "m.weight", (), 30)
    assert content == expected[30:80]


def test_masks_that_keep_more_or_less_than_two_are_refused() -> None:
    for change in (1, 128):
        _, stored = packed(43, 6, 40, torch.bfloat16)
        stored["m.bitmask"][3, 2] ^= change
        _, source = opened(stored)
        source.read("m.weight", (slice(0, 3),))
        with pytest.raises(CheckpointError, match=r"'m\.bitmask' .* does not keep two numbers of every 4"):
            source.read("m.weight")


def test_tensors_that_do_not_belong_together_are_refused() -> None:
    _, stored = packed(44, 6, 40, torch.bfloat16)
    for name, other in (
        ("m.compressed", stored["m.compressed"][:, :19]),
        ("m.compressed", stored["m.compressed"].float()),
        ("m.bitmask", stored["m.bitmask"][:5]),
        ("m.bitmask", stored["m.bitmask"].to(torch.int8)),
        ("m.shape", torch.tensor([6, 41])),
        ("m.shape", torch.tensor([240])),
    ):
        with pytest.raises(CheckpointError, match=r"do not hold 2:4 weights of the shape \["):
            opened({**stored, name: other})
    for name in ("m.compressed", "m.shape"):
        with pytest.raises(CheckpointError, match=f"'{name.removeprefix('m.')}' beside it is missing"):
            opened({key: tensor for key, tensor in stored.items() if key != name})


def test_the_config_says_whether_weights_are_sparse() -> None:
    assert is_sparse({"sparsity_config": {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"}})
    assert not is_sparse({"sparsity_config": {"format": "dense", "sparsity_structure": "2:4"}})
    assert not is_sparse({"sparsity_config": {}})
    assert not is_sparse({})
    with pytest.raises(CheckpointError, match="sparse format 'sparse-bitmask'"):
        is_sparse({"sparsity_config": {"format": "sparse-bitmask", "sparsity_structure": "unstructured"}})


SPARSITY = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4", "targets": ["Linear"], "ignore": ["lm_head"]}
EIGHT_BITS = {
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"type": "float", "num_bits": 8, "strategy": "channel", "symmetric": True},
            "input_activations": {"type": "float", "num_bits": 8, "strategy": "token", "dynamic": True},
        }
    },
}


@pytest.mark.parametrize("eight_bits", [False, True], ids=["bfloat16", "e4m3"])
def test_a_stored_checkpoint_is_kept_and_answers_as_the_dense_one(eight_bits: bool, tmp_path: Path) -> None:
    """All layers but one are stored as 2:4; that one stays as it is, in the same model."""
    quantization = {"quant_method": "compressed-tensors", "sparsity_config": SPARSITY}
    quantization |= EIGHT_BITS if eight_bits else {"format": "dense"}
    name = precision(quantization)
    assert name == ("sparse24_fp8" if eight_bits else "sparse24")
    dense, stored = _write(tmp_path, quantization, eight_bits)
    catalog, prompts = Catalog.load(), random_prompts(307)
    kept = load_model(stored, catalog, precision=name)
    wanted = Sparse24Fp8Format if eight_bits else Sparse24Format
    linears = {key: module for key, module in kept.module.named_modules() if isinstance(module, Linear)}
    others = [key for key, linear in linears.items() if not isinstance(linear.format, wanted)]
    assert others == ["layers.1.feed_forward.down"]
    expected = run(load_model(dense, catalog), prompts, (1 << 30,))
    as_dense = run(load_model(stored, catalog), prompts, (1 << 30,))
    found = run(kept, prompts, (1 << 30,))
    for plain, meant, own in zip(expected, as_dense, found, strict=True):
        torch.testing.assert_close(meant, plain, rtol=0, atol=0)
        if not eight_bits:
            torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-4)
    if eight_bits:
        for linear in (linear for key, linear in linears.items() if key not in others):
            assert linear.stored["weight"].dtype == E4M3
            assert torch.equal(
                linear.format.dense(linear.stored), _weight_of(load_model(dense, catalog), linears, linear)
            )


def _weight_of(built: Any, linears: dict[str, Linear], linear: Linear) -> Tensor:
    (key,) = (key for key, other in linears.items() if other is linear)
    weight: Tensor = dict(built.module.named_modules())[key].stored["weight"]
    return weight.float()


def _write(folder: Path, quantization: dict[str, Any], eight_bits: bool) -> tuple[Path, Path]:
    """The folders of a random model of 2:4 weights, dense and stored as 2:4."""
    config = transformers.LlamaConfig(
        vocab_size=307,
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=36,
        num_hidden_layers=2,
        max_position_embeddings=64,
    )
    dense, stored = (
        write_checkpoint(folder / name, "LlamaForCausalLM", config, seed=4) for name in ("dense", "stored")
    )
    described = json.loads((stored / "config.json").read_text()) | {"quantization_config": quantization}
    (stored / "config.json").write_text(json.dumps(described))
    for path in dense.glob("*.safetensors"):
        plain = load_file(path)
        written: dict[str, Tensor] = {}
        for name, tensor in load_file(path).items():
            if tensor.dim() < 2 or "layers." not in name or "layers.1.mlp.down_proj" in name:
                written[name] = tensor
                continue
            module = name.removesuffix(".weight")
            pruned = prune(tensor).to(torch.bfloat16)
            if eight_bits:
                codes, scale = round_e4m3(pruned.float())
                plain[name], pruned = codes.float() * scale, codes
                written[f"{module}.weight_scale"] = scale
            else:
                plain[name] = pruned.float()
            written |= _stored(module, pruned)
        save_file(plain, path)
        save_file(written, stored / path.name)
    for index in stored.glob("*.index.json"):
        names = {name: path.name for path in stored.glob("*.safetensors") for name in load_file(path)}
        index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return dense, stored


def _stored(module: str, weight: Tensor) -> dict[str, Tensor]:
    wide = weight.float()
    order = (wide.unflatten(-1, (-1, 4)) == 0).to(torch.int8).argsort(dim=-1, stable=True)
    mask = torch.zeros(order.shape, dtype=torch.bool).scatter_(-1, order[..., :2], True).flatten(-2)
    bits = torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))
    kept = wide[mask].view(len(weight), -1).to(weight.dtype)
    shape = torch.tensor([[size] for size in weight.shape])
    return {f"{module}.compressed": kept, f"{module}.bitmask": bits, f"{module}.shape": shape}
