"""What loading takes beside the model: never more than the weight that is being read would take in bfloat16."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plexor.testing.architecture import load_model
from plexor.testing.checkpoints import write_checkpoint

CONFIG: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 2048,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 512,
    "intermediate_size": 4096,
    "num_hidden_layers": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LARGEST = 2048 * 4096
"""Numbers of its largest weights."""

LINEAR = re.compile(r"(model\.layers\.\d+\.(?:self_attn|mlp)\.\w+)\.weight")
Tensors = dict[str, Tensor]


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is on: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not leaf.is_meta:
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._seen and storage.nbytes():
            self._seen.add(key)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, num_bytes: int) -> None:
        self._seen.discard(key)
        self.now -= num_bytes


def test_peaks_are_seen() -> None:
    with Peak() as peak:
        x = torch.zeros(1000)
        y = x + 1
        del x
        y = y[:500] + y[500:]
    assert (peak.most, peak.now) == (8000, 2000)
    assert y.shape == (500,)


def words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, generator=torch.Generator().manual_seed(1))


def gptq(out: int, size: int) -> Tensors:
    order = torch.randperm(size, generator=torch.Generator().manual_seed(2))
    groups = size // 128
    scales = torch.full((groups, out), 0.01, dtype=torch.float16)
    return {
        "qweight": words(size // 8, out),
        "qzeros": words(groups, out // 8),
        "scales": scales,
        "g_idx": (order // 128).int(),
    }


def awq(out: int, size: int) -> Tensors:
    groups = size // 128
    scales = torch.full((groups, out), 0.01, dtype=torch.float16)
    return {"qweight": words(size, out // 8), "qzeros": words(groups, out // 8), "scales": scales}


def packed(out: int, size: int) -> Tensors:
    scale = torch.full((out, size // 128), 0.01, dtype=torch.bfloat16)
    shape = torch.tensor([out, size])
    return {"weight_packed": words(out, size // 8), "weight_scale": scale, "weight_shape": shape}


def blocks(out: int, size: int) -> Tensors:
    codes = (words(out, size) % 100).to(torch.uint8).view(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": torch.full((out // 128, size // 128), 0.01)}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": False, "desc_act": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
FOUR_BITS = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 128, "symmetric": True}
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": FOUR_BITS}},
}
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    config = transformers.LlamaConfig(**CONFIG, dtype="bfloat16")
    write_checkpoint(folder, "LlamaForCausalLM", config)
    return folder


def write(plain: Path, folder: Path, pack: Callable[[int, int], Tensors], quantization: Mapping[str, Any]) -> Path:
    tensors: Tensors = {}
    for name, tensor in (item for file in plain.glob("*.safetensors") for item in load_file(file).items()):
        hit = LINEAR.fullmatch(name)
        if hit is None:
            tensors[name] = tensor
        else:
            sizes = tensor.shape[0], tensor.shape[1]
            tensors |= {f"{hit[1]}.{last}": each.contiguous() for last, each in pack(*sizes).items()}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return folder


def taken(folder: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that loading takes at most beside what it leaves behind."""
    monkeypatch.setattr("plexor.model.linear.AT_ONCE", 1 << 16)
    monkeypatch.setattr("plexor.checkpoint.source._FINITE_CHUNK", 1 << 16)
    monkeypatch.setattr("plexor_quant.stored.source.AT_ONCE", 1 << 16)
    with Peak() as peak:
        built = load_model(folder, precision=precision, dtype=torch.bfloat16)
        left = sum(tensor.nbytes for tensor in built.module.state_dict().values())
        assert left <= peak.now
        return peak.most - left


@pytest.mark.parametrize("precision", ["dense", "fp8", "int8_sq", "w4a_fp8", "int8_wo", "int4_wo", "fp8_block"])
def test_plain_weights(precision: str, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert taken(plain, precision, monkeypatch) <= 2 * LARGEST


@pytest.mark.parametrize("precision", ["int4_wo", "int4_wo_g32", "fp8", "dense"])
@pytest.mark.parametrize(("pack", "quantization"), [(gptq, GPTQ), (awq, AWQ), (packed, PACKED)])
def test_four_bit_checkpoints(
    precision: str,
    pack: Callable[[int, int], Tensors],
    quantization: Mapping[str, Any],
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As they are stored, rounded once more to two others, and dense."""
    folder = write(plain, tmp_path, pack, quantization)
    assert taken(folder, precision, monkeypatch) <= 2 * LARGEST


@pytest.mark.parametrize("precision", ["fp8_block", "fp8", "dense"])
def test_float8_checkpoints(precision: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(plain, tmp_path, blocks, BLOCKS)
    assert taken(folder, precision, monkeypatch) <= 2 * LARGEST
