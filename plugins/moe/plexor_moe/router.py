"""The router: a declaration of how a token's experts are chosen, and the layer that chooses them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from plexor.api import Build, CheckpointError, Fields, Linear, Part

Scoring = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """A token goes to the top_k experts with the largest logits, of equal ones to the lower numbers.

    scoring: how logits become weights: "softmax" over all experts, "sigmoid" of each alone. renormalise: the chosen
    experts' weights sum to one; with softmax that is the same as a softmax over the chosen alone.
    """

    num_experts: int
    top_k: int
    renormalise: bool
    scoring: Scoring = "softmax"


class Router(nn.Module):
    """[T, H] -> weights [T, k] float32 and experts [T, k] int32, alike on every rank.

    The product is in the model's own dtype whatever the precision, because a rounded logit changes which experts run.
    """

    def __init__(self, build: Build, hidden_size: int, config: RouterConfig) -> None:
        super().__init__()
        self._config = config
        self.linear = Linear(build.exact(), hidden_size, (Part(config.num_experts),))
        self._route = build.bind("moe_route", experts=config.num_experts, top_k=config.top_k)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        config = self._config
        routed: tuple[Tensor, Tensor] = self._route(self.linear(x), config.top_k, config.scoring, config.renormalise)
        return routed


def read_router(fields: Fields, *, renormalise: bool) -> RouterConfig:
    """The router of a `config.json`; CheckpointError for fewer than two experts or more choices than experts."""
    name = "num_experts" if "num_experts" in fields.raw else "num_local_experts"
    num_experts = fields.integer(name)
    top_k = fields.integer("num_experts_per_tok")
    if num_experts < 2:
        raise CheckpointError(
            f"config.json has {name} = {num_experts}, and a mixture needs at least 2 experts: "
            "convert the checkpoint to the dense architecture that it is"
        )
    if top_k > num_experts:
        raise CheckpointError(
            f"config.json sends each token to num_experts_per_tok = {top_k} experts of {name} = {num_experts}: "
            "correct the file"
        )
    return RouterConfig(num_experts=num_experts, top_k=top_k, renormalise=renormalise)
