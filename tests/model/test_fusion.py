"""Layers computed by ops that do more than multiply: the same numbers, and only where a kernel serves them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from plexor.batch import Batch, ForwardContext, LogitRows, Pages
from plexor.extension import builtin
from plexor.extension.specs import Kernel
from plexor.kernels.table import KernelTable
from plexor.model.attention import AttentionConfig
from plexor.model.build import Build
from plexor.model.decoder import Decoder, DecoderConfig, Slots
from plexor.model.feed_forward import FeedForward, FeedForwardConfig, GatedFeedForward, ResidualFeedForward
from plexor.model.norm import LayerNorm, RMSNorm
from plexor.model.rotary import Rotary

Make = Callable[..., Build]
FUSED = ("norm_linear", "linear_add", "norm_gated_linear", "norm_rotary_linear")
HIDDEN, HEAD_SIZE, LENGTH = 12, 8, 5


def fusing(build: Build) -> Build:
    """The build with the references of the fused ops as providers of the CPU's, so that layers use them."""
    kernels = [
        Kernel(
            op=op,
            provider="probe",
            load=f"plexor.kernels.reference.{op}:{op}",
            devices=frozenset({"cpu"}),
            dtypes=frozenset({"float32"}),
            kv_dtypes=frozenset({"float32"}),
        )
        for op in FUSED
    ]
    return replace(build, table=KernelTable(builtin.ops(), (*builtin.kernels(), *kernels)))


def used(build: Build) -> set[str]:
    return {choice.op for choice in build.table.choices} & {*FUSED}


def decoder(build: Build, **changes: object) -> Decoder:
    """Two layers as of the LLaMA family with biases, or what the changes make of them."""
    settings: dict[str, object] = {
        "residual": "sequential",
        "activation": "silu",
        "norm": RMSNorm,
        "feed_forward": GatedFeedForward,
        "qk_norm_eps": None,
        "rotary": Rotary(HEAD_SIZE, 100.0, 16),
    } | changes
    attention = AttentionConfig(
        hidden_size=HIDDEN,
        num_heads=4,
        num_kv_heads=2,
        head_size=HEAD_SIZE,
        scale=0.3,
        rotary=settings["rotary"],  # type: ignore[arg-type]
        qkv_bias=True,
        qk_norm_eps=settings["qk_norm_eps"],  # type: ignore[arg-type]
    )
    config = DecoderConfig(
        vocab_size=9,
        max_positions=16,
        hidden_size=HIDDEN,
        attention=(attention, attention),
        tied_head=True,
        residual=settings["residual"],  # type: ignore[arg-type]
    )
    inner = FeedForwardConfig(HIDDEN, 20, str(settings["activation"]), bias=True)
    slots = Slots(
        feed_forward=lambda _: settings["feed_forward"](build, inner),  # type: ignore[operator]
        norm=lambda size: settings["norm"](build, size, 1e-5),  # type: ignore[operator]
    )
    model = Decoder(build, config, slots)
    with torch.no_grad():
        for seed, (name, tensor) in enumerate([*model.named_parameters(), *model.named_buffers()]):
            if "tables" not in name:
                tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)) / 2)
    return model


def forward(build: Build, model: Decoder) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Five tokens of one sequence in block 1, of which the last and the first want logits."""
    caches = [
        {stored.name: torch.zeros(stored.shape) for stored in build.kv_storage(shape)}
        for shape in model.kv_shapes(2, 8)
    ]
    pages = Pages(
        query_start=torch.tensor([0, LENGTH], dtype=torch.int32),
        kv_length=torch.tensor([LENGTH], dtype=torch.int32),
        block_table=torch.tensor([[1]], dtype=torch.int32),
        max_query=LENGTH,
    )
    alone = Pages(
        query_start=torch.arange(3, dtype=torch.int32),
        kv_length=torch.tensor([LENGTH, 1], dtype=torch.int32),
        block_table=torch.ones(2, 1, dtype=torch.int32),
        max_query=1,
        num_decodes=2,
    )
    rows = LogitRows(torch.tensor([LENGTH - 1, 0]), alone)
    ctx = ForwardContext(pages, torch.arange(8, 8 + LENGTH), rows, tuple(caches))
    return model.forward(Batch(torch.tensor([1, 2, 3, 4, 5]), torch.arange(LENGTH)), ctx), caches


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"norm_rotary_linear", "norm_gated_linear", "linear_add"}),
        ({"activation": "gelu"}, {"norm_rotary_linear", "norm_linear", "linear_add"}),
        ({"qk_norm_eps": 1e-6}, {"norm_linear", "norm_gated_linear", "linear_add"}),
        ({"rotary": None}, {"norm_linear", "norm_gated_linear", "linear_add"}),
        ({"rotary": Rotary(4, 100.0, 16)}, {"norm_rotary_linear", "norm_gated_linear", "linear_add"}),
        ({"norm": LayerNorm, "feed_forward": FeedForward}, {"linear_add"}),
        ({"residual": "parallel"}, set()),
        ({"residual": "norm_after"}, set()),
    ],
    ids=["plain", "gelu", "head norms", "no rotary", "partial rotary", "layer norms", "parallel", "norm after"],
)
def test_fused_layers_compute_what_their_steps_do(make: Make, changes: dict[str, object], expected: set[str]) -> None:
    build = make()
    fused = fusing(build)
    (whole, caches), (steps, caches_of_steps) = (forward(b, decoder(b, **changes)) for b in (fused, build))
    assert used(fused) == expected
    assert used(build) == set()
    torch.testing.assert_close(whole, steps)
    torch.testing.assert_close(caches, caches_of_steps)
    assert float(whole.std()) > 0.1


def test_a_rank_that_holds_a_share_adds_after_the_sum(make: Make) -> None:
    build = fusing(make(0, 2))
    decoder(build)
    assert used(build) == {"norm_rotary_linear", "norm_gated_linear"}


def test_another_kv_format_rotates_by_its_own_op(make: Make) -> None:
    build = fusing(make())
    own = replace(build, kv_format=replace(build.kv_format, rotary_write="kv_write"))
    decoder(own)
    assert used(own) == {"norm_linear", "norm_gated_linear", "linear_add"}


def test_a_format_without_fused_ops_is_done_in_steps(make: Make) -> None:
    class Plain:
        """The dense format but for the ops that it names."""

        def __init__(self, dense: object) -> None:
            for name in ("storage", "convert", "load", "dense", "bind", "bind_grouped"):
                setattr(self, name, getattr(dense, name))

    build = fusing(make())
    plain = replace(build, format=Plain(build.format))  # type: ignore[arg-type]
    model = decoder(plain)
    assert used(plain) == set()
    assert torch.isfinite(forward(plain, model)[0]).all()


def test_a_feed_forward_of_another_kind_is_added_in_steps(make: Make) -> None:
    class Squares(nn.Module):
        def __init__(self, build: Build, config: FeedForwardConfig) -> None:
            super().__init__()

        def forward(self, x: Tensor) -> Tensor:
            return x.square()

    build = fusing(make())
    model = decoder(build, feed_forward=Squares)
    assert not isinstance(model.layers[0].feed_forward, ResidualFeedForward)
    assert used(build) == {"norm_rotary_linear", "linear_add"}
    (whole, _), (steps, _) = forward(build, model), forward(make(), decoder(make(), feed_forward=Squares))
    torch.testing.assert_close(whole, steps)
