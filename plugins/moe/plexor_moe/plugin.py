"""What plexor-moe offers: two architectures, the expert layer, and the op that chooses a token's experts."""

from __future__ import annotations

from collections.abc import Iterable

from plexor import hookimpl
from plexor.api import Architecture, Facts, Kernel, Layer, Op


@hookimpl
def architectures() -> Iterable[Architecture]:
    return (_architecture("MixtralForCausalLM", "mixtral"), _architecture("Qwen3MoeForCausalLM", "qwen3_moe"))


@hookimpl
def layers() -> Iterable[Layer]:
    return (Layer(slot="feed_forward", name="experts", build="plexor_moe.experts:build"),)


@hookimpl
def ops() -> Iterable[Op]:
    return (
        Op(
            name="moe_route",
            reference="plexor_moe.kernels.reference.moe_route:moe_route",
            samples="plexor_moe.kernels.samples:moe_route",
            # The arithmetic is float32 whatever the logits' dtype; the choice itself only compares them.
            tolerance=dict.fromkeys(("float32", "float16", "bfloat16"), (1e-5, 1e-7)),
        ),
    )


@hookimpl
def kernels() -> Iterable[Kernel]:
    return (
        Kernel(
            op="moe_route",
            provider="triton",
            load="plexor_moe.kernels.triton.moe_route:moe_route",
            devices=frozenset({"cuda"}),
            dtypes=frozenset({"float32", "float16", "bfloat16"}),
            refuses=_refuses_many_experts,
        ),
    )


def _architecture(name: str, module: str) -> Architecture:
    home = f"plexor_moe.{module}"
    return Architecture(name=name, config=f"{home}:config", model="plexor_moe.stack:model", weights=f"{home}:weights")


def _refuses_many_experts(facts: Facts) -> str | None:
    num_experts = facts.shape.get("experts", 0)
    return f"holds the scores of at most 1024 experts in registers, not {num_experts}" if num_experts > 1024 else None
