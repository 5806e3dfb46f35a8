"""The expert layer: send each token to its experts, run the experts as one stack, and add up what they answer.

Mixture of experts as in Shazeer et al. (2017) and Jiang et al. (2024). Nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plexor.api import Build, GroupedLinear, Part, gated_activation
from plexor_moe.router import Router, RouterConfig


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """intermediate_size: of one expert. activation: the name that `config.json` gives it, such as "silu"."""

    hidden_size: int
    intermediate_size: int
    activation: str
    router: RouterConfig


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Rows sorted by expert, one for each choice of each token.

        token      0    1    2          the experts that it chose
        choices   2,0  0,1  2,1
        row       0 1 | 2 3 | 4 5       by expert; group_end is 2, 4, 6
        token     0 1 | 1 2 | 0 2
        places    4,0  1,2  5,3         of each token's choices among the rows

    Within an expert the tokens keep their order, so that a batch has one layout only.
    """

    tokens: Tensor  # [T * k] int64: whose row it is
    group_end: Tensor  # [E] int32: one past each expert's last row
    places: Tensor  # [T * k] int64: the row of each token's choices in turn


def dispatch(experts: Tensor, num_experts: int) -> Dispatch:
    """The layout for the choices [T, k] int32."""
    top_k = experts.shape[1]
    ordered, order = experts.flatten().sort(stable=True)
    numbers = torch.arange(num_experts, dtype=experts.dtype, device=experts.device)
    ends = torch.searchsorted(ordered, numbers, right=True, out_int32=True)
    rows = torch.arange(order.shape[0], device=order.device)
    places = torch.empty_like(order).scatter_(0, order, rows)
    return Dispatch(tokens=order // top_k, group_end=ends, places=places)


def combine(rows: Tensor, weights: Tensor, places: Tensor) -> Tensor:
    """Each token's rows, weighted and summed in float32 in the order of its choices: [T * k, H] -> [T, H].

    A gather and a sum, because adding rows into tokens with atomics would round differently from run to run.
    """
    chosen = rows[places].unflatten(0, weights.shape)
    summed: Tensor = (chosen.float() * weights.unsqueeze(-1)).sum(dim=1)
    return summed.to(rows.dtype)


class ExpertStack(nn.Module):
    """down(act(gate x) * up x) with each row's own expert, rows sorted by expert: [M, H] -> [M, H].

    Every rank holds a share of each expert's features, and answers with its partial sum.
    """

    def __init__(self, build: Build, config: ExpertsConfig) -> None:
        super().__init__()
        groups, top_k = config.router.num_experts, config.router.top_k
        half = Part(config.intermediate_size, what="expert features")
        output = Part(config.hidden_size)
        self.gate_up = GroupedLinear(
            build, config.hidden_size, (half, half), groups=groups, rows_per_token=top_k, cut="out"
        )
        self.down = GroupedLinear(
            build, config.intermediate_size, (output,), groups=groups, rows_per_token=top_k, cut="in"
        )
        self._activate = gated_activation(build, config.activation, self.down.shape.in_features)

    def forward(self, x: Tensor, group_end: Tensor) -> Tensor:
        y: Tensor = self.down(self._activate(self.gate_up(x, group_end)), group_end)
        return y


class Experts(nn.Module):
    """A feed-forward layer of experts, [T, H] -> [T, H]; the ranks add up once, after combining."""

    def __init__(self, build: Build, config: ExpertsConfig) -> None:
        super().__init__()
        self.router = Router(build, config.hidden_size, config.router)
        self.experts = ExpertStack(build, config)
        self._num_experts = config.router.num_experts
        self._mesh = build.mesh

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = self.router(x)
        layout = dispatch(experts, self._num_experts)
        rows = self.experts(x[layout.tokens], layout.group_end)
        return self._mesh.all_reduce(combine(rows, weights, layout.places))


def build(config: ExpertsConfig, build: Build) -> Experts:
    """The layer "feed_forward/experts". Another plugin hands over a config of its own that has these fields."""
    return Experts(build, config)
