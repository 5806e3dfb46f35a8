"""Arguments on which every provider of this plugin's op is held to its reference."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from plexor.api import Sample

# (tokens, experts, chosen, scoring, renormalise)
CASES = (
    (0, 8, 2, "softmax", True),
    (1, 8, 2, "softmax", True),
    (1, 2, 1, "softmax", False),
    (5, 3, 2, "softmax", True),
    (4, 3, 3, "softmax", False),
    (17, 60, 4, "softmax", False),
    (9, 128, 8, "softmax", True),
    (3, 257, 6, "softmax", False),
    (6, 7, 2, "sigmoid", False),
    (6, 160, 5, "sigmoid", True),
)


def moe_route(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    generator = torch.Generator().manual_seed(31)
    for num_tokens, num_experts, top_k, scoring, renormalise in CASES:
        logits = (2 * torch.randn(num_tokens, num_experts, generator=generator)).to(device, dtype)
        what = f"{top_k} of {num_experts}, {num_tokens} tokens, {scoring}{', renormalised' if renormalise else ''}"
        yield _sample(what, logits, top_k, scoring, renormalise)
    rounded = torch.randint(-1, 2, (11, 12), generator=generator).to(device, dtype)
    yield _sample("ties", rounded, 4, "softmax", True)
    yield _sample("all equal", torch.zeros(2, 10, device=device, dtype=dtype), 3, "softmax", True)
    zeros = torch.tensor([[0.0, -0.0, -0.0, 0.0]], device=device, dtype=dtype)
    yield _sample("zeros of both signs", zeros, 3, "sigmoid", True)
    wide = torch.tensor([[300.0, -300.0, 299.0, 0.0], [-4e4, 4e4, 0.0, -4e4]], device=device, dtype=dtype)
    yield _sample("weights that vanish", wide, 3, "softmax", False)
    closed = torch.tensor([[float("-inf"), 1.0, float("-inf"), 0.5]], device=device, dtype=dtype)
    yield _sample("closed experts", closed, 3, "softmax", True)
    columns = torch.randn(9, 5, generator=generator).to(device, dtype)
    yield _sample("rows of a wider tensor", torch.cat((columns, columns), dim=1)[:, 3:8], 2, "softmax", True)


def _sample(name: str, logits: Tensor, top_k: int, scoring: str, renormalise: bool) -> Sample:
    shape = (("experts", logits.shape[1]), ("top_k", top_k))
    return Sample(name, (logits, top_k, scoring, renormalise), shape=shape)
