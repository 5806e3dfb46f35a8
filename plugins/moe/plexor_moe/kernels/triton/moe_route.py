"""Choose each token's experts in one pass: one program a token, its logits in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def moe_route_kernel(
    logits,
    weights,
    experts,
    num_experts,
    logits_stride,
    TOP_K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALISE: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    choice = tl.arange(0, CHOICES)
    inside = expert < num_experts
    logit = tl.load(logits + row * logits_stride + expert, mask=inside, other=float("-inf")).to(tl.float32)
    if SOFTMAX:
        mass = tl.exp(logit - tl.max(logit))
        score = mass / tl.sum(mass)
    else:
        score = tl.sigmoid(logit)
    # NaN compares with nothing: as infinity it is still chosen once, so that every index names an expert.
    key = tl.where(logit != logit, float("inf"), logit)
    free = inside
    chosen = tl.zeros((CHOICES,), dtype=tl.int32)
    weight = tl.zeros((CHOICES,), dtype=tl.float32)
    for turn in range(TOP_K):
        best = tl.max(tl.where(free, key, float("-inf")))
        first = tl.min(tl.where(free & (key == best), expert, EXPERTS))
        chosen = tl.where(choice == turn, first, chosen)
        weight = tl.where(choice == turn, tl.sum(tl.where(expert == first, score, 0.0)), weight)
        free = free & (expert != first)
    if RENORMALISE:
        weight = weight / tl.sum(weight)
    target = row * TOP_K + choice
    tl.store(experts + target, chosen, mask=choice < TOP_K)
    tl.store(weights + target, weight, mask=choice < TOP_K)


def moe_route(logits: Tensor, top_k: int, scoring: str, renormalise: bool) -> tuple[Tensor, Tensor]:
    """As plexor_moe.kernels.reference.moe_route; never waits for the device."""
    num_tokens, num_experts = logits.shape
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits.device)
    experts = torch.empty(num_tokens, top_k, dtype=torch.int32, device=logits.device)
    if num_tokens == 0:
        return weights, experts
    moe_route_kernel[(num_tokens,)](
        logits,
        weights,
        experts,
        num_experts,
        logits.stride(0),
        TOP_K=top_k,
        SOFTMAX=scoring == "softmax",
        RENORMALISE=renormalise,
        EXPERTS=triton.next_power_of_2(num_experts),
        CHOICES=triton.next_power_of_2(top_k),
        num_warps=1 if num_experts <= 256 else 4,
    )
    return weights, experts
