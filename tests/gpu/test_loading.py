"""Weights reach a GPU as the file holds them, bad ones are named, and random ones are drawn there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from plexor.checkpoint.folder import open_folder
from plexor.checkpoint.source import SINGLE_FILE, open_source
from plexor.checkpoint.staging import StagedSource
from plexor.errors import CheckpointError
from plexor.extension.catalog import Catalog
from plexor.runtime.loading import Placement, draw_model, load_model
from plexor.testing.checkpoints import write_checkpoint

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
CATALOG = Catalog.load()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(
        vocab_size=517,
        hidden_size=96,
        intermediate_size=136,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return write_checkpoint(tmp_path_factory.mktemp("gpu") / "model", "LlamaForCausalLM", config, seed=5)


def tensors(folder: Path, placement: Placement) -> dict[str, torch.Tensor]:
    built, _ = load_model(open_folder(folder), CATALOG, CATALOG.kernel_table(), placement)
    return {name: tensor.cpu() for name, tensor in built.module.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_has_the_same_weights_on_both_devices(folder: Path, dtype: torch.dtype) -> None:
    here, there = tensors(folder, Placement(CPU, dtype)), tensors(folder, Placement(CUDA, dtype))
    assert here.keys() == there.keys()
    for name, tensor in here.items():
        assert torch.equal(tensor, there[name]), name


def test_buffers_are_not_filled_before_they_have_been_copied(tmp_path: Path) -> None:
    """Many more bytes than the buffers hold, so that each is used over and over."""
    generator = torch.Generator().manual_seed(0)
    kept = {f"t{i}": torch.randint(0, 1 << 30, (1531, 1 << 10), generator=generator) for i in range(12)}
    save_file(kept, tmp_path / SINGLE_FILE)
    with open_source(tmp_path) as source:
        staged = StagedSource(source, CUDA, readers=2, buffer_bytes=1 << 18)
        found = {name: staged.read(name) for name in staged.names()}
    assert all(torch.equal(found[name].cpu(), tensor) for name, tensor in kept.items())


def test_a_value_that_is_not_finite_is_named(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    name = "model.layers.3.mlp.down_proj.weight"
    with open_source(tmp_path) as source:
        info = source.info(name)
        held = {other: source.read(other) for other in source.names() if source.info(other).file == info.file}
    held[name][7, 11] = float("inf")
    save_file(held, info.file)
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.down_proj.* in 1 of"):
        tensors(tmp_path, Placement(CUDA, torch.bfloat16))


@pytest.mark.parametrize("precision", [spec.name for spec in CATALOG.precisions.values() if not spec.selective])
def test_random_weights_are_drawn_on_the_device_in_every_precision(folder: Path, precision: str) -> None:
    placement = Placement(CUDA, torch.bfloat16, precision)
    drawn = [draw_model(open_folder(folder), CATALOG, CATALOG.kernel_table(), placement)[0] for _ in range(2)]
    first, second = (built.module.state_dict() for built in drawn)
    for name, tensor in first.items():
        assert tensor.device.type == "cuda", name
        assert tensor.float().isfinite().all(), name
        assert torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8)), name


def test_torch_finds_the_gpu_that_was_opened_beside_its_import() -> None:
    script = (
        "from plexor.runtime.startup import import_engine\n"
        "import_engine('auto')\n"
        "import torch\n"
        "print(float(torch.ones(3, device='cuda').sum()))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "3.0"
