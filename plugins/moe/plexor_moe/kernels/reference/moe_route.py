"""Choose each token's experts and how much each of them counts."""

from __future__ import annotations

from torch import Tensor


def moe_route(logits: Tensor, top_k: int, scoring: str, renormalise: bool) -> tuple[Tensor, Tensor]:
    """logits [T, E] -> weights [T, k] float32, experts [T, k] int32, from the most preferred expert to the least.

    The k experts with the largest logits are chosen; of equal ones, the lower index comes first. scoring makes weights
    of logits, in float32: "softmax" over all experts, or "sigmoid" of each alone. renormalise: divide the weights of
    the chosen by their sum. (With softmax that equals a softmax over the chosen alone.)
    """
    order = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    scores = logits.float().softmax(dim=-1) if scoring == "softmax" else logits.float().sigmoid()
    weights = scores.gather(1, order)
    if renormalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, order.int()
