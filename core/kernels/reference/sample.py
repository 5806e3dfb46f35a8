"""Draw the next token of each row from its logits, reproducibly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from plexor.kernels.random import uniform


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    steps: Tensor,
    slots: Tensor,
    tokens: Tensor,
) -> Tensor:
    """Choose from logits [R, V], of any float dtype and widened to float32 -> ids [R] int64; other arguments are [R].

    temperature float32: 0 takes the lowest index among the largest logits; otherwise p = softmax(logits / temperature).
    Then tokens are dropped, in this order:
    top_k int32: those whose logit is below the k-th largest (ties are kept); 0 keeps all.
    top_p float32: those for which the strictly more probable survivors hold a share of at least top_p of the
    survivors' mass, except the most probable; 1 keeps all.
    min_p float32: those with p < min_p * max p; 0 keeps all.
    One number u in [0, 1) is drawn from seeds and steps (int64) alone; the answer is the first index at which the
    cumulated mass of the kept tokens, in vocabulary order, exceeds u times the whole kept mass. A logit of -inf has
    no mass; each row needs one finite logit. Masses are summed in float64.

    Written: ids[r] to tokens [N] int64 at slots[r] int64, where that is not -1; no slot is named twice.
    """
    return keep(choose(logits, temperature, top_k, top_p, min_p, seeds, steps, least_of_top_p), slots, tokens)


def keep(ids: Tensor, slots: Tensor, tokens: Tensor) -> Tensor:
    """The ids [R], once `sample` has written them to their slots."""
    used = slots >= 0
    tokens[slots[used]] = ids[used]
    return ids


def choose(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    steps: Tensor,
    find_least_of_top_p: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """What `sample` draws, with a way to find what `least_of_top_p` finds; what no row asks for costs nothing."""
    drawn = (temperature > 0).nonzero().squeeze(1)
    ids = logits.argmax(dim=-1)
    if drawn.numel() == 0:
        return ids
    rows, top_k, top_p, min_p = logits[drawn].float(), top_k[drawn], top_p[drawn], min_p[drawn]
    weight = masses(rows, temperature[drawn])
    kept = weight
    if bool((top_k > 0).any()):
        kept = kept.masked_fill(rows < least_of_top_k(rows, top_k), 0.0)
    if bool((top_p < 1).any()):
        kept = kept.masked_fill(rows < find_least_of_top_p(rows, kept, top_p), 0.0)
    if bool((min_p > 0).any()):
        kept = kept.masked_fill(weight < min_p.unsqueeze(1), 0.0)
    ids[drawn] = inverse_cdf(kept, uniform(seeds[drawn], steps[drawn]))
    return ids


def masses(logits: Tensor, temperature: Tensor) -> Tensor:
    """The probabilities [R, V] float64, relative to that of each row's most probable token."""
    scaled = logits / temperature.unsqueeze(1)
    return (scaled - scaled.amax(dim=-1, keepdim=True)).exp().double()


def least_of_top_k(logits: Tensor, top_k: Tensor) -> Tensor:
    """The k-th largest logit of each row [R, 1]; -inf where top_k is 0."""
    most = min(int(top_k.max()), logits.shape[1])
    rank = top_k.long().clamp(1, most) - 1
    threshold = logits.topk(most, dim=-1).values.gather(1, rank.unsqueeze(1))
    return threshold.masked_fill((top_k == 0).unsqueeze(1), float("-inf"))


def least_of_top_p(logits: Tensor, weight: Tensor, top_p: Tensor) -> Tensor:
    """The smallest logit that top_p keeps in each row [R, 1]; -inf where it is 1.

    weight [R, V] float64: the survivors' masses. A token stays if those before it in descending order hold less than
    the share; where it is the first of several equal ones, these are the strictly more probable.
    """
    ordered, order = logits.sort(dim=-1, descending=True)
    mass = weight.gather(1, order)
    before = mass.cumsum(dim=-1) - mass
    num_kept = (before < top_p.unsqueeze(1) * weight.sum(dim=-1, keepdim=True)).sum(dim=-1, keepdim=True)
    threshold = ordered.gather(1, num_kept.clamp(min=1) - 1)
    return threshold.masked_fill((top_p >= 1).unsqueeze(1), float("-inf"))


def inverse_cdf(weight: Tensor, uniforms: Tensor) -> Tensor:
    """The first index at which the cumulated weight [R, V] float64 exceeds uniforms [R] times its sum."""
    cumulated = weight.cumsum(dim=-1)
    target = uniforms.double().unsqueeze(1) * cumulated[:, -1:]
    index = torch.searchsorted(cumulated, target, right=True).squeeze(1)
    positions = torch.arange(weight.shape[1], device=weight.device)
    last_kept = torch.where(weight > 0, positions, 0).amax(dim=-1)
    return torch.minimum(index, last_kept)
