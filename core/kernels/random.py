"""Counter-based random numbers: equal on every device, and a function of (seed, step) alone.

Philox-4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Words are
32 bits wide and held in int64, whose products may pass 2^63: they wrap, and the masked bits are still the right ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Four random words [4, R] for each counter [4, R] under each key [2, R]; all int64 below 2^32."""
    multipliers = torch.tensor(MULTIPLIERS, device=counter.device).unsqueeze(1)
    key_steps = torch.tensor(KEY_STEPS, device=counter.device).unsqueeze(1)
    even, odd = counter[0::2], counter[1::2]
    for _ in range(NUM_ROUNDS):
        product = even * multipliers
        high = (product >> 32) & WORD
        even, odd = high.flip(0) ^ odd ^ key, (product & WORD).flip(0)
        key = (key + key_steps) & WORD
    return torch.stack((even[0], odd[0], even[1], odd[1]))


def uniform(seeds: Tensor, steps: Tensor) -> Tensor:
    """One float32 in [0, 1) for each (seed, step), [R] int64 each: the top 24 bits of the first word."""
    nothing = torch.zeros_like(steps)
    counter = torch.stack((steps & WORD, (steps >> 32) & WORD, nothing, nothing))
    key = torch.stack((seeds & WORD, (seeds >> 32) & WORD))
    return (philox(counter, key)[0] >> 8).float() * 2.0**-24
