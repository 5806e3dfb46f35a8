"""Factors that move what is hard to round from inputs into weights or back, folded into the layer before.

    x Wᵀ = (x / s) (W s)ᵀ      s: a factor for each input feature

x / s costs nothing where x comes from a norm with gains or from rows of a linear layer: these are divided once. A fold
is known from the modules of a DecoderLayer alone; where none is, the layer is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plexor.api import DecoderLayer, FeedForward, GatedFeedForward, Linear, RMSNorm
from plexor_quant.calibration.grid import Grid, Rounding
from plexor_quant.calibration.statistics import InputStatistics

ALPHAS = tuple(0.1 * step for step in range(1, 10))
"""How much of the inputs' spread is moved; without a factor is tried before them."""

SMALLEST = 1e-4
"""Of a factor before its range is centred: features that are all but silent would get factors near zero."""

Factors = Callable[[InputStatistics, Tensor, float], Tensor]
"""(statistics, weight [out, in], alpha) -> s, float32 [in]."""


def awq_factors(statistics: InputStatistics, weight: Tensor, alpha: float) -> Tensor:
    """mean |x|^alpha, of AWQ (Lin et al., 2023, arXiv 2306.00978): features that carry much get finer weights."""
    return _centred(statistics.mean_abs.clamp_min(SMALLEST).pow(alpha))


def smoothquant_factors(statistics: InputStatistics, weight: Tensor, alpha: float) -> Tensor:
    """max |x|^alpha / max |w|^(1 - alpha), of SmoothQuant (Xiao et al., 2022, arXiv 2211.10438)."""
    of_input = statistics.max_abs.clamp_min(SMALLEST).pow(alpha)
    of_weight = weight.float().abs().amax(dim=0).clamp_min(SMALLEST).pow(1 - alpha)
    return _centred((of_input / of_weight).clamp_min(SMALLEST))


def _centred(factors: Tensor) -> Tensor:
    """The largest and the smallest as far from one."""
    return factors / (factors.amax() * factors.amin()).sqrt()


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """A layer whose inputs can be divided. exact: s -> the nearest factors that the producer can carry; divide: it.

    producer: the linear layer whose rows are divided, None where a norm's gains are.
    """

    linear: Linear
    producer: Linear | None
    exact: Callable[[Tensor], Tensor]
    divide: Callable[[Tensor], None]


def find_folds(layer: DecoderLayer, gain_dtype: torch.dtype) -> tuple[Fold, ...]:
    """The folds of a layer, consumers before what produces for them.

    gain_dtype: in which the gains of norms will be kept; factors are chosen so that these hold the divided gains
    exactly. A norm whose output is also the residual has no fold, nor has one that experts or a router read.
    """
    found = []
    feed_forward = layer.feed_forward
    if isinstance(feed_forward, GatedFeedForward) and feed_forward.gate_up.bias is None:
        found.append(_fold_rows(feed_forward.gate_up, feed_forward.down))
    if layer.residual == "norm_after" or layer.attention_norm is layer.feed_forward_norm:
        return tuple(found)
    pairs = [(layer.attention_norm, layer.attention.qkv)]
    if isinstance(feed_forward, GatedFeedForward):
        pairs.append((layer.feed_forward_norm, feed_forward.gate_up))
    elif isinstance(feed_forward, FeedForward):
        pairs.append((layer.feed_forward_norm, feed_forward.up))
    found.extend(_fold_norm(norm, linear, gain_dtype) for norm, linear in pairs if _takes_factors(norm, linear))
    return tuple(found)


def _takes_factors(norm: nn.Module, linear: Linear) -> bool:
    return isinstance(norm, RMSNorm) and bool(norm.weight.ne(0).all()) and norm.weight.numel() == linear.in_features


def _fold_norm(norm: nn.Module, linear: Linear, gain_dtype: torch.dtype) -> Fold:
    assert isinstance(norm, RMSNorm)
    gain = norm.weight

    def exact(factors: Tensor) -> Tensor:
        divided = (gain.float() / factors).to(gain_dtype).float()
        return gain.float() / divided

    def divide(factors: Tensor) -> None:
        gain.copy_(gain.float() / factors)

    return Fold(linear, None, exact, divide)


def _fold_rows(producer: Linear, linear: Linear) -> Fold:
    """Into the second half of a gated layer: down((act(gate) * up / s) with s times its columns."""
    weight = producer.stored["weight"]
    first = producer.parts[0].size

    def divide(factors: Tensor) -> None:
        weight[first:] = weight[first:].float() / factors.unsqueeze(1)

    return Fold(linear, producer, lambda factors: factors, divide)


@dataclass(frozen=True, slots=True)
class Search:
    """How weights and inputs are rounded while factors are tried."""

    rounding: Rounding
    round_input: Callable[[Tensor], Tensor]


def smooth(fold: Fold, statistics: InputStatistics, factors: Factors, grid: Grid, parts: Search) -> float | None:
    """Fold in the factors with the least error of the output; the alpha that gave them, None where none is better."""
    weight = fold.linear.stored["weight"]
    best, chosen, least = None, None, _output_error(weight, None, statistics, grid, parts)
    for alpha in ALPHAS:
        tried = fold.exact(factors(statistics, weight, alpha))
        error = _output_error(weight, tried, statistics, grid, parts)
        if error < least:
            best, chosen, least = tried, alpha, error
    if best is not None:
        fold.divide(best)
        weight.copy_(weight.float() * best)
    return chosen


def _output_error(
    weight: Tensor, factors: Tensor | None, statistics: InputStatistics, grid: Grid, parts: Search
) -> float:
    """Squared, over the sampled inputs."""
    x, wide = statistics.sample, weight.float()
    gram = statistics.gram
    expected = x @ wide.T
    if factors is not None:
        x, wide, gram = x / factors, wide * factors, gram / factors / factors.unsqueeze(1)
    rounded = parts.rounding(wide, gram, grid).dense()
    return float((parts.round_input(x) @ rounded.T - expected).square().sum())
