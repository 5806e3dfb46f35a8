"""Dense feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn import functional

from plexor.errors import CheckpointError
from plexor.model.build import Build
from plexor.model.linear import Linear, Part
from plexor.model.norm import RMSNorm

SILU = ("silu", "swish")
"""The names under which `config.json` asks for x * sigmoid(x)."""


@dataclass(frozen=True, slots=True)
class FeedForwardConfig:
    """activation: the name that `config.json` gives it, such as "silu" or "gelu_new"."""

    hidden_size: int
    intermediate_size: int
    activation: str
    bias: bool = False


@runtime_checkable
class ResidualFeedForward(Protocol):
    """A feed-forward layer that knows a shorter way to its sum with the residual than three steps."""

    def as_residual(self, build: Build, norm: nn.Module) -> Callable[[Tensor], Tensor]:
        """The function x [T, H] -> x + self(norm(x)); x may be overwritten."""
        ...


class GatedFeedForward(nn.Module):
    """down(act(gate x) * up x), [T, H] -> [T, H] (Shazeer, 2020); a ResidualFeedForward."""

    def __init__(self, build: Build, config: FeedForwardConfig) -> None:
        super().__init__()
        half = Part(config.intermediate_size, what="feed-forward features")
        self.gate_up = Linear(build, config.hidden_size, (half, half), cut="out", bias=config.bias)
        self.down = Linear(build, config.intermediate_size, (Part(config.hidden_size),), cut="in", bias=config.bias)
        self._activate = gated_activation(build, config.activation, config.intermediate_size)
        self._is_silu = config.activation in SILU

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self._activate(self.gate_up(x)))
        return y

    def as_residual(self, build: Build, norm: nn.Module) -> Callable[[Tensor], Tensor]:
        gated, add = self._gated_after(build, norm), self.down.onto(build)
        return lambda x: add(gated(x), x)

    def _gated_after(self, build: Build, norm: nn.Module) -> Callable[[Tensor], Tensor]:
        """The function x [T, H] -> act(gate norm(x)) * up norm(x), [T, I]."""
        gate_up = self.gate_up
        product = gate_up.fused(build, "norm_gated") if self._is_silu and isinstance(norm, RMSNorm) else None
        if product is None or not isinstance(norm, RMSNorm):
            inner = gate_up.after(build, norm)
            return lambda x: self._activate(inner(x))
        return lambda x: product(x, norm.weight, norm.eps, gate_up.stored, gate_up.bias)


class FeedForward(nn.Module):
    """down(act(up x)), [T, H] -> [T, H]; a ResidualFeedForward."""

    def __init__(self, build: Build, config: FeedForwardConfig) -> None:
        super().__init__()
        inner = Part(config.intermediate_size, what="feed-forward features")
        self.up = Linear(build, config.hidden_size, (inner,), cut="out", bias=config.bias)
        self.down = Linear(build, config.intermediate_size, (Part(config.hidden_size),), cut="in", bias=config.bias)
        self._activate = activation(config.activation)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self._activate(self.up(x)))
        return y

    def as_residual(self, build: Build, norm: nn.Module) -> Callable[[Tensor], Tensor]:
        up, add = self.up.after(build, norm), self.down.onto(build)
        return lambda x: add(self._activate(up(x)), x)


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The elementwise function that a checkpoint names; CheckpointError for one that is not known."""
    known: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": functional.relu,
        "silu": functional.silu,
        "swish": functional.silu,
        "gelu": functional.gelu,
        "gelu_new": _gelu_tanh,
        "gelu_fast": _gelu_tanh,
        "gelu_pytorch_tanh": _gelu_tanh,
        "quick_gelu": _quick_gelu,
    }
    if name not in known:
        raise CheckpointError(f"config.json names the activation {name!r}: known are {', '.join(sorted(known))}")
    return known[name]


def gated_activation(build: Build, name: str, intermediate_size: int) -> Callable[[Tensor], Tensor]:
    """[M, 2 I] -> [M, I]: the activated first half times the second half."""
    if name in SILU:
        return build.bind("silu_mul", intermediate_size=intermediate_size)
    activate = activation(name)

    def multiply(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return activate(gate) * up

    return multiply


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * (1.702 * x).sigmoid()
