"""Checkpoints of 2:4 weights as kept numbers and a bitmask, packed here with NumPy, against the dense weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from plexor.api import CheckpointError
from plexor.testing.source import MemorySource
from plexor_quant.sparse24_layout import compress
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
    assert is_sparse({"sparsity_config": {"format": "dense", "sparsity_structure": "2:4"}})
    assert not is_sparse({"sparsity_config": {"format": "dense", "sparsity_structure": "unstructured"}})
    assert not is_sparse({"sparsity_config": {}})
    assert not is_sparse({})
    with pytest.raises(CheckpointError, match="sparse format 'sparse-bitmask'"):
        is_sparse({"sparsity_config": {"format": "sparse-bitmask", "sparsity_structure": "unstructured"}})
