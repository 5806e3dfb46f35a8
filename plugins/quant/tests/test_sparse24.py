"""2:4 weights: what is kept and what is refused, apart from the plugin's own packing, and the products over it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from plexor.api import Catalog, ConfigError, KernelTable, LinearFormat, LinearShape
from plexor.testing.architecture import load_model, random_prompts, run
from plexor.testing.checkpoints import write_checkpoint
from plexor_quant import plugin
from plexor_quant.sparse24 import Sparse24Format, Sparse24Fp8Format
from plexor_quant.sparse24_layout import compress, prune, widen

FORMATS: Mapping[str, LinearFormat] = {"sparse24": Sparse24Format(), "sparse24_fp8": Sparse24Fp8Format()}
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


def drawn(seed: int, *shape: int) -> Tensor:
    """Two numbers other than zero in most groups of four, one or none in others."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randn(*shape[:-1], shape[-1] // 4, 4, generator=generator)
    places = torch.rand(groups.shape, generator=generator).argsort(dim=-1)
    count = torch.randint(0, 3, groups.shape[:-1], generator=generator).clamp_min(1).unsqueeze(-1)
    count[..., ::5, :] = 2
    count[..., 3::7, :] = 0
    return torch.where(places < count, groups, 0).flatten(-2)


def table() -> KernelTable:
    return KernelTable(plugin.ops(), plugin.kernels())


def shown(kept: Tensor, index: Tensor, in_features: int) -> list[float]:
    """One row, put together number by number as the layout is described."""
    row = [0.0] * in_features
    for group in range(in_features // 4):
        nibble = int(index[group // 2]) >> 4 * (group % 2) & 15
        for which, place in enumerate((nibble & 3, nibble >> 2)):
            row[4 * group + place] += float(kept[2 * group + which])
    return row


def test_every_pattern_of_a_group_is_kept() -> None:
    for used in itertools.product((False, True), repeat=4):
        group = torch.tensor([[number if kept else 0.0 for number, kept in zip((1, -2, 3, -4), used, strict=True)]])
        if sum(used) > 2:
            with pytest.raises(ConfigError, match=r"100\.00% of its groups"):
                compress(group)
            continue
        kept, index = compress(group)
        assert int(index) & 3 < int(index) >> 2
        assert int(index) < 16
        assert shown(kept[0], index[0], 4) == group[0].tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 4), (3, 8), (5, 12), (33, 132), (2, 7, 260)], ids=str)
def test_widening_gives_the_weight_back(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = drawn(31, *shape).to(dtype)
    kept, index = compress(weight)
    assert kept.shape == (*shape[:-1], shape[-1] // 2)
    assert index.shape == (*shape[:-1], (shape[-1] // 4 + 1) // 2)
    assert torch.equal(widen(kept, index).float(), weight.float())
    first = (0,) * (len(shape) - 1)
    assert shown(kept[first].float(), index[first], shape[-1]) == weight[first].float().tolist()


def test_weights_that_are_not_numbers_are_kept() -> None:
    weight = torch.tensor([[0.0, math.nan, 0.0, math.inf]])
    found = widen(*compress(weight))
    assert torch.equal(found.nan_to_num(7, 9), weight.nan_to_num(7, 9))


def test_a_dense_weight_is_refused_with_what_pruning_would_cost() -> None:
    weight = torch.zeros(2, 8)
    weight[0, :4] = torch.tensor([3.0, 0.0, -4.0, 0.0])
    weight[1, 4:] = torch.tensor([2.0, 1.0, 0.0, -2.0])
    error = 1 / math.sqrt(25 + 9)
    for number_format in FORMATS.values():
        with pytest.raises(ConfigError, match=rf"\[2, 8\] is not 2:4: 25\.00% of its groups .* by {error:.2%} of"):
            number_format.convert(weight)
    kept = prune(weight)
    assert kept[1, 4:].tolist() == [2, 0, 0, -2]
    assert torch.equal(kept[0], weight[0])
    compress(kept)


@pytest.mark.parametrize("name", FORMATS)
def test_groups_that_do_not_divide_a_layer_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="lie in groups of 4 input features, and a layer has 6"):
        FORMATS[name].storage(LinearShape(3, 6), torch.float32)


@pytest.mark.parametrize(
    ("name", "num_bytes"), [("sparse24", 48 * (264 * 2 // 2 + 33)), ("sparse24_fp8", 48 * (132 + 33 + 4))]
)
def test_bytes_kept_for_a_weight(name: str, num_bytes: int) -> None:
    parts = FORMATS[name].storage(LinearShape(48, 264), torch.bfloat16)
    assert sum(math.prod(part.shape) * part.dtype.itemsize for part in parts) == num_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [LinearShape(64, 128), LinearShape(5, 12, 3), LinearShape(1, 4)], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_storage_parts_and_groups(name: str, shape: LinearShape, dtype: torch.dtype) -> None:
    """storage says what convert yields; rows and groups converted one by one, and columns in fours, equal the whole."""
    number_format = FORMATS[name]
    lead = (shape.groups,) if shape.groups > 1 else ()
    weight = drawn(32, *lead, shape.out_features, shape.in_features).to(dtype)
    stored = number_format.load(number_format.convert(weight))
    parts = number_format.storage(shape, dtype)
    assert {part.name: ((*lead, *part.shape), part.dtype) for part in parts} == {
        key: (tuple(tensor.shape), tensor.dtype) for key, tensor in stored.items()
    }
    cut = shape.out_features // 2
    pieces = [number_format.convert(part) for part in (weight[..., :cut, :], weight[..., cut:, :]) if part.numel()]
    for part in parts:
        axis = len(lead)
        joined = torch.cat([piece[part.name].float() for piece in pieces], dim=axis)
        assert torch.equal(joined, stored[part.name].float()), part.name
    if shape.groups > 1:
        for key, tensor in number_format.convert(weight[1]).items():
            assert torch.equal(tensor.float(), stored[key][1].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_is_the_weight_or_its_nearest_code(dtype: torch.dtype) -> None:
    weight = drawn(33, 9, 260).to(dtype)
    exact = FORMATS["sparse24"].dense(FORMATS["sparse24"].convert(weight))
    assert exact.dtype == torch.float32
    assert torch.equal(exact, weight.float())
    rounded = FORMATS["sparse24_fp8"].dense(FORMATS["sparse24_fp8"].convert(weight))
    largest = weight.float().abs().amax(dim=1, keepdim=True)
    assert not rounded[weight == 0].any()
    assert bool(((rounded - weight.float()).abs() <= weight.float().abs() / 16 + largest / 448 / 512).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_are_those_of_the_dense_weight(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(34)
    number_format = FORMATS["sparse24"]
    weight = drawn(35, 3, 300, 132).to(dtype)
    x = torch.randn(7, 132, generator=generator).to(dtype)
    eps = torch.finfo(dtype).eps
    expected = x.double() @ weight[0].double().T
    y = number_format.bind(table(), LinearShape(300, 132), dtype, CPU)(x, number_format.convert(weight[0]))
    assert y.dtype == dtype
    assert bool(((y.double() - expected).abs() <= eps * expected.abs() + 1e-4).all())
    grouped = number_format.bind_grouped(table(), LinearShape(300, 132, 3), dtype, CPU)
    y = grouped(x, number_format.convert(weight), torch.tensor([2, 2, 6], dtype=torch.int32))
    assert not y[6].any()
    for rows, group in ((slice(0, 2), 0), (slice(2, 6), 2)):
        expected = x[rows].double() @ weight[group].double().T
        assert bool(((y[rows].double() - expected).abs() <= eps * expected.abs() + 1e-4).all())


def test_an_index_that_is_ignored_would_be_seen() -> None:
    number_format = FORMATS["sparse24"]
    weight = drawn(36, 20, 64)
    stored = number_format.convert(weight)
    shifted = {**stored, "index": stored["index"].roll(1, dims=1)}
    assert not torch.equal(number_format.dense(shifted), weight)


SIZES = {"vocab_size": 307, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12}
SIZES |= {"intermediate_size": 36, "num_hidden_layers": 2, "max_position_embeddings": 64}
CONFIGS: Mapping[str, Callable[[], transformers.PretrainedConfig]] = {
    "LlamaForCausalLM": lambda: transformers.LlamaConfig(**SIZES, attention_bias=True),
    "MixtralForCausalLM": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_model_whose_layers_are_2_4_answers_as_it_does_dense(architecture: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, architecture, CONFIGS[architecture](), seed=4)
    catalog, prompts = Catalog.load(), random_prompts(307)
    with pytest.raises(ConfigError, match="is not 2:4"):
        load_model(tmp_path, catalog, precision="sparse24")
    for path in tmp_path.glob("*.safetensors"):
        tensors = load_file(path)
        rows = {name: tensor for name, tensor in tensors.items() if tensor.dim() > 1 and "layers." in name}
        save_file({**tensors, **{name: prune(tensor).contiguous() for name, tensor in rows.items()}}, path)
    dense = run(load_model(tmp_path, catalog), prompts, (1 << 30,))
    sparse = run(load_model(tmp_path, catalog, precision="sparse24"), prompts, (1 << 30,))
    rounded = run(load_model(tmp_path, catalog, precision="sparse24_fp8"), prompts, (1 << 30,))
    for expected, found, near in zip(dense, sparse, rounded, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert not torch.equal(near, expected)
