"""The expert layer against a loop over tokens: layout, combining, empty experts, ranks, and every precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import Tensor

from plexor.api import Build, Catalog, ConfigError, GroupedLinear, LinearShape
from plexor.testing.architecture import ONE_RANK, load_model
from plexor.testing.checkpoints import write_checkpoint
from plexor_moe.experts import Experts, ExpertsConfig, combine, dispatch
from plexor_moe.router import RouterConfig

CATALOG = Catalog.load()
PRECISIONS = [name for name, spec in CATALOG.precisions.items() if not spec.selective]
NUM_EXPERTS = 5
CONFIG = ExpertsConfig(
    hidden_size=48,
    intermediate_size=34,
    activation="silu",
    router=RouterConfig(num_experts=NUM_EXPERTS, top_k=2, renormalise=True),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.MixtralConfig(
        vocab_size=307,
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=24,
        intermediate_size=34,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return write_checkpoint(tmp_path_factory.mktemp("mixture"), "MixtralForCausalLM", config)


@pytest.fixture(scope="module")
def build(folder: Path) -> Build:
    return load_model(folder, CATALOG).build


def activations(num_tokens: int, seed: int = 3) -> Tensor:
    return torch.randn(num_tokens, 48, generator=torch.Generator().manual_seed(seed))


def filled(build: Build, config: ExpertsConfig = CONFIG) -> Experts:
    """A layer of random weights on a whole or a shared mesh, the same weights whatever the mesh."""
    layer = build.layer("feed_forward", "experts", config)
    assert isinstance(layer, Experts)
    generator = torch.Generator().manual_seed(4)
    hidden, inner, count = config.hidden_size, config.intermediate_size, config.router.num_experts
    gate_up = torch.randn(count, 2, inner, hidden, generator=generator) / hidden**0.5
    down = torch.randn(count, hidden, inner, generator=generator) / inner**0.5
    mine = build.mesh.share(inner, "expert features")
    layer.router.linear.stored["weight"].copy_(torch.randn(count, hidden, generator=generator))
    layer.experts.gate_up.stored["weight"].copy_(gate_up[:, :, mine.start : mine.stop].flatten(1, 2))
    layer.experts.down.stored["weight"].copy_(down[:, :, mine.start : mine.stop])
    return layer


def one_by_one(layer: Experts, x: Tensor, gate_up: Callable[..., Tensor], down: Callable[..., Tensor]) -> Tensor:
    """Each token alone through each of its experts, in float64 sums; gate_up and down take (expert, x [1, n])."""
    weights, experts = layer.router(x)
    answers = []
    for token in range(x.shape[0]):
        total = torch.zeros(1, x.shape[1], dtype=torch.float64)
        for weight, expert in zip(weights[token].tolist(), experts[token].tolist(), strict=True):
            gate, up = gate_up(expert, x[token : token + 1]).chunk(2, dim=-1)
            total += weight * down(expert, torch.nn.functional.silu(gate) * up).double()
        answers.append(total.float())
    return torch.cat([*answers, x[:0]])


def plain(layer: Experts, x: Tensor) -> Tensor:
    first, second = layer.experts.gate_up.stored["weight"], layer.experts.down.stored["weight"]
    return one_by_one(layer, x, lambda e, row: row @ first[e].T, lambda e, row: row @ second[e].T)


def test_the_layout_is_the_one_in_the_picture() -> None:
    layout = dispatch(torch.tensor([[2, 0], [0, 1], [2, 1]], dtype=torch.int32), 3)
    assert layout.tokens.tolist() == [0, 1, 1, 2, 0, 2]
    assert layout.group_end.tolist() == [2, 4, 6]
    assert layout.group_end.dtype == torch.int32
    assert layout.places.tolist() == [4, 0, 1, 2, 5, 3]


@pytest.mark.parametrize(
    ("experts", "ends"), [([], [0, 0, 0, 0]), ([[2, 1]], [0, 1, 2, 2]), ([[3, 3]] * 4, [0, 0, 0, 8])]
)
def test_experts_that_nobody_chose_have_no_rows(experts: list[list[int]], ends: list[int]) -> None:
    layout = dispatch(torch.tensor(experts, dtype=torch.int32).reshape(-1, 2), 4)
    assert layout.group_end.tolist() == ends


def test_every_choice_finds_its_row_and_rows_keep_the_order_of_tokens() -> None:
    experts = torch.randint(0, 7, (50, 3), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    layout = dispatch(experts, 7)
    starts = [0, *layout.group_end.tolist()]
    for token in range(50):
        for choice in range(3):
            place = int(layout.places[3 * token + choice])
            expert = int(experts[token, choice])
            assert starts[expert] <= place < starts[expert + 1]
            assert int(layout.tokens[place]) == token
    for start, end in pairwise(starts):
        assert layout.tokens[start:end].tolist() == sorted(layout.tokens[start:end].tolist())


def test_rows_are_combined_in_float32() -> None:
    rows = torch.tensor([[256.0], [1.0], [1.0], [-256.0]], dtype=torch.bfloat16)
    weights = torch.tensor([[1.0, 0.5], [1.0, 0.25]])
    combined = combine(rows, weights, torch.tensor([0, 1, 2, 3]))
    assert combined.dtype == torch.bfloat16
    assert combined.tolist() == [[256.0], [-63.0]]
    # In bfloat16 256 + 1 would be 256 again, and the sum of three 0.
    three = combine(torch.tensor([[256.0], [1.0], [-256.0]], dtype=torch.bfloat16), torch.ones(1, 3), torch.arange(3))
    assert three.tolist() == [[1.0]]


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 23])
@pytest.mark.parametrize(("top_k", "renormalise"), [(1, False), (2, True), (5, False)])
def test_the_layer_equals_its_tokens_one_by_one(build: Build, num_tokens: int, top_k: int, renormalise: bool) -> None:
    router = RouterConfig(num_experts=NUM_EXPERTS, top_k=top_k, renormalise=renormalise)
    layer = filled(build, replace(CONFIG, router=router))
    x = activations(num_tokens)
    y = layer(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y, plain(layer, x), rtol=1e-5, atol=1e-5)


def test_another_plugin_needs_only_the_fields_of_the_config(build: Build) -> None:
    router = SimpleNamespace(num_experts=3, top_k=2, renormalise=True, scoring="sigmoid")
    config = SimpleNamespace(hidden_size=8, intermediate_size=5, activation="gelu", router=router)
    layer = build.layer("feed_forward", "experts", config)
    assert {name for name, _ in layer.named_children()} == {"router", "experts"}
    stack = layer.get_submodule("experts.gate_up")
    assert isinstance(stack, GroupedLinear)
    assert stack.pieces() == {(p, g, "weight") for p in range(2) for g in range(3)}


@pytest.mark.parametrize("favourite", range(NUM_EXPERTS))
def test_all_tokens_may_choose_one_expert(build: Build, favourite: int) -> None:
    layer = filled(build, replace(CONFIG, router=RouterConfig(num_experts=NUM_EXPERTS, top_k=1, renormalise=True)))
    weight = layer.router.linear.stored["weight"].zero_()
    weight[favourite] = 1.0
    x = activations(9).abs()
    assert (layer.router(x)[1] == favourite).all()
    torch.testing.assert_close(layer(x), plain(layer, x), rtol=1e-5, atol=1e-5)


def test_undecided_tokens_go_to_the_first_experts(build: Build) -> None:
    layer = filled(build)
    layer.router.linear.stored["weight"].zero_()
    weights, experts = layer.router(activations(4))
    assert experts.tolist() == [[0, 1]] * 4
    assert weights.tolist() == [[0.5, 0.5]] * 4


def test_a_token_does_not_depend_on_the_others(build: Build) -> None:
    layer, x = filled(build), activations(17)
    together = layer(x)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(layer(x[order]), together[order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x[5:6]), together[5:6], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_ranks", [2, 17])
def test_ranks_share_out_each_expert_and_add_up_once(
    build: Build, num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = activations(11)
    expected = filled(build)(x)
    sums: list[Tensor] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", sums.append)
    layers = [filled(replace(build, mesh=replace(ONE_RANK, rank=rank, size=num_ranks))) for rank in range(num_ranks)]
    total = torch.stack([layer(x) for layer in layers]).sum(dim=0)
    assert layers[0].experts.down.shape == LinearShape(48, 34 // num_ranks, NUM_EXPERTS)
    assert len(sums) == num_ranks
    assert all(partial.shape == x.shape for partial in sums)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


def test_experts_that_ranks_cannot_share_are_refused(build: Build) -> None:
    with pytest.raises(ConfigError, match="tensor parallel 3 does not divide the model's 34 expert features"):
        Experts(replace(build, mesh=replace(ONE_RANK, size=3)), CONFIG)


def _rows_of(stored: Mapping[str, Tensor], group: int) -> dict[str, Tensor]:
    return {name: tensor[group] for name, tensor in stored.items()}


def dense_multiply(build: Build, stack: GroupedLinear) -> Callable[[int, Tensor], Tensor]:
    """The precision's multiply for one dense layer, given one group of a stack: (group, x [T, in]) -> [T, out]."""
    shape = replace(stack.shape, groups=1)
    multiply = build.format.bind(build.table, shape, build.dtype, build.device)
    return lambda group, x: multiply(x, _rows_of(stack.stored, group))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_precision_multiplies_experts_as_it_does_dense_layers(folder: Path, precision: str) -> None:
    built = load_model(folder, CATALOG, precision=precision)
    layer = built.module.get_submodule("layers.1.feed_forward")
    assert isinstance(layer, Experts)
    gate_up, down = (dense_multiply(built.build, stack) for stack in (layer.experts.gate_up, layer.experts.down))
    x = activations(29)
    expected = one_by_one(layer, x, gate_up, down)
    error = (layer(x) - expected).abs().amax(dim=-1)
    # A last bit in the first product may carry a number over the middle between two of a coarse grid's.
    assert float(error.median()) < 1e-5 * float(expected.std())
    assert float(error.max()) < 0.1 * float(expected.std())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_router_is_exact_in_every_precision(folder: Path, precision: str) -> None:
    rounded, exact = load_model(folder, CATALOG, precision=precision), load_model(folder, CATALOG)
    x = activations(29)
    for name in ("layers.0.feed_forward.router", "layers.1.feed_forward.router"):
        expected = exact.module.get_submodule(name)(x)
        for left, right in zip(rounded.module.get_submodule(name)(x), expected, strict=True):
            assert torch.equal(left, right)
