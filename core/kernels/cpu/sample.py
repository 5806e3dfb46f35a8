"""Draw the next token of each row on a CPU, without sorting a vocabulary of which top_p keeps little."""

from __future__ import annotations

from torch import Tensor

from plexor.kernels.reference.sample import choose, keep, least_of_top_p

CANDIDATES = 256


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
    """As plexor.kernels.reference.sample."""
    return keep(choose(logits, temperature, top_k, top_p, min_p, seeds, steps, least_of_top_p_nearby), slots, tokens)


def least_of_top_p_nearby(logits: Tensor, weight: Tensor, top_p: Tensor) -> Tensor:
    """As least_of_top_p, from the largest logits alone in the rows where top_p drops one of them."""
    if logits.shape[1] <= CANDIDATES:
        return least_of_top_p(logits, weight, top_p)
    ordered, order = logits.topk(CANDIDATES, dim=-1)
    mass = weight.gather(1, order)
    before = mass.cumsum(dim=-1) - mass
    num_kept = (before < top_p.unsqueeze(1) * weight.sum(dim=-1, keepdim=True)).sum(dim=-1, keepdim=True)
    threshold = ordered.gather(1, num_kept.clamp(min=1) - 1)
    threshold.masked_fill_((top_p >= 1).unsqueeze(1), float("-inf"))
    beyond = ((num_kept.squeeze(1) == CANDIDATES) & (top_p < 1)).nonzero().squeeze(1)
    if beyond.numel():
        threshold[beyond] = least_of_top_p(logits[beyond], weight[beyond], top_p[beyond])
    return threshold
