"""Draw the next token of each row from its logits, reproducibly."""

from __future__ import annotations

import torch
from torch import Tensor

from plexor.kernels.random import uniform


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, steps: Tensor
) -> Tensor:
    """Choose from logits [R, V] float32 -> ids [R] int64; each other argument is [R].

    temperature float32: 0 takes the lowest index among the largest logits; otherwise p = softmax(logits / temperature).
    Then tokens are dropped, in this order:
    top_k int32: those whose logit is below the k-th largest (ties are kept); 0 keeps all.
    top_p float32: those for which the strictly more probable survivors hold a share of at least top_p of the
    survivors' mass, except the most probable; 1 keeps all.
    min_p float32: those with p < min_p * max p; 0 keeps all.
    One number u in [0, 1) is drawn from seeds and steps (int64) alone; the answer is the first index at which the
    cumulated mass of the kept tokens, in vocabulary order, exceeds u times the whole kept mass. A logit of -inf has
    no mass; each row needs one finite logit. Masses are summed in float64.
    """
    drawn = (temperature > 0).nonzero().squeeze(1)
    ids = logits.argmax(dim=-1)
    if drawn.numel() == 0:
        return ids
    rows = logits[drawn]
    scaled = rows / temperature[drawn].unsqueeze(1)
    weight = (scaled - scaled.amax(dim=-1, keepdim=True)).exp().double()
    kept = weight.masked_fill(below_top_k(rows, top_k[drawn]), 0.0)
    kept = kept.masked_fill(beyond_top_p(rows, kept, top_p[drawn]), 0.0)
    kept = kept.masked_fill(weight < min_p[drawn].unsqueeze(1), 0.0)
    ids[drawn] = inverse_cdf(kept, uniform(seeds[drawn], steps[drawn]))
    return ids


def below_top_k(logits: Tensor, top_k: Tensor) -> Tensor:
    """True [R, V] where a logit is below its row's k-th largest."""
    most = min(int(top_k.max()), logits.shape[1])
    if most <= 0:
        return torch.zeros_like(logits, dtype=torch.bool)
    largest = logits.topk(most, dim=-1).values
    rank = top_k.long().clamp(1, most) - 1
    threshold = largest.gather(1, rank.unsqueeze(1))
    return (logits < threshold) & (top_k > 0).unsqueeze(1)


def beyond_top_p(logits: Tensor, weight: Tensor, top_p: Tensor) -> Tensor:
    """True [R, V] where the strictly more probable tokens already hold top_p of the weight [R, V] float64."""
    if not bool((top_p < 1).any()):
        return torch.zeros_like(logits, dtype=torch.bool)
    order = logits.argsort(dim=-1, descending=True)
    ordered = logits.gather(1, order)
    mass = weight.gather(1, order).cumsum(dim=-1)
    # The logits that are strictly larger are as many as the place of the first of those that are equal.
    num_larger = torch.searchsorted(-ordered, -logits)
    above = torch.where(num_larger > 0, mass.gather(1, (num_larger - 1).clamp(min=0)), 0.0)
    full = (top_p >= 1).unsqueeze(1)
    return (above >= top_p.double().unsqueeze(1) * mass[:, -1:]) & (num_larger > 0) & ~full


def inverse_cdf(weight: Tensor, uniforms: Tensor) -> Tensor:
    """The first index at which the cumulated weight [R, V] float64 exceeds uniforms [R] times its sum."""
    cumulated = weight.cumsum(dim=-1)
    target = uniforms.double().unsqueeze(1) * cumulated[:, -1:]
    index = torch.searchsorted(cumulated, target, right=True).squeeze(1)
    positions = torch.arange(weight.shape[1], device=weight.device)
    last_kept = torch.where(weight > 0, positions, 0).amax(dim=-1)
    return torch.minimum(index, last_kept)
