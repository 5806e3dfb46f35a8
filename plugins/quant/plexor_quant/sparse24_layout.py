"""2:4 weights: of four consecutive input features at most two have a weight other than zero, and only two are kept.

    weight   | 0  a  0  b | c  0  0  0 | ...        kept    | a  b | c  0 | ...
    group      0            1                       index   | 1, 3 | 0, 1 | ...   two bits each

A group's places ascend. Its nibble is first + 4 * second; a byte holds the nibbles of two groups, the even one's in the
low half. The places of zeros that fill a group up are the lowest free ones: equal weights are kept in equal bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from plexor.api import ConfigError

GROUP = 4
_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def num_groups(in_features: int) -> int:
    """ConfigError where groups do not divide the input features that a rank holds."""
    if in_features % GROUP:
        raise ConfigError(
            f"2:4 weights lie in groups of {GROUP} input features, and a layer has {in_features} of them on a rank: "
            "choose another --precision or another --tp"
        )
    return in_features // GROUP


def index_bytes(in_features: int) -> int:
    return (num_groups(in_features) + 1) // 2


def compress(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [..., in] in any float dtype -> kept [..., in / 2], bit for bit, index uint8 [..., ceil(in / 8)].

    ConfigError for a weight that is not 2:4, with what pruning it would cost.
    """
    num_groups(weight.shape[-1])
    occupied = _occupied(weight)
    nibbles = _nibble_of_mask(weight.device)[occupied.int()]
    if bool((nibbles == _REFUSED).any()):
        raise ConfigError(_refusal(weight, nibbles))
    return select(weight, nibbles), pack_nibbles(nibbles)


def select(weight: Tensor, nibbles: Tensor) -> Tensor:
    """The two numbers of each group that its nibble names: weight [..., in], nibbles [..., in / 4] -> [..., in / 2]."""
    bits = weight.contiguous().view(_BYTES[weight.element_size()]).unflatten(-1, (-1, GROUP))
    kept = []
    for place in (nibbles & 3, nibbles >> 2):
        chosen = bits[..., 0]
        for other in range(1, GROUP):
            chosen = torch.where(place == other, bits[..., other], chosen)
        kept.append(chosen)
    return torch.stack(kept, dim=-1).flatten(-2).view(weight.dtype)


def widen(kept: Tensor, index: Tensor) -> Tensor:
    """kept [..., in / 2], index [..., ceil(in / 8)] -> [..., in] in the dtype of what is kept, bit for bit."""
    bits = kept.contiguous().view(_BYTES[kept.element_size()]).unflatten(-1, (-1, 2))
    nibbles = unpack_nibbles(index)[..., : bits.shape[-2]]
    first, second = nibbles & 3, nibbles >> 2
    zero = bits.new_zeros(())
    places = [
        torch.where(first == place, bits[..., 0], torch.where(second == place, bits[..., 1], zero))
        for place in range(GROUP)
    ]
    return torch.stack(places, dim=-1).flatten(-2).view(kept.dtype)


def prune(weight: Tensor) -> Tensor:
    """The weight with the two largest magnitudes of each group, the first ones of equals, and zeros beside them."""
    grouped: Tensor = weight.unflatten(-1, (-1, GROUP))
    order = grouped.abs().float().argsort(dim=-1, descending=True, stable=True)
    dropped = torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, order[..., 2:], True)
    return grouped.masked_fill(dropped, 0).flatten(-2)


def pack_nibbles(nibbles: Tensor) -> Tensor:
    """uint8 [..., n] -> uint8 [..., ceil(n / 2)]."""
    padded = functional.pad(nibbles, (0, nibbles.shape[-1] % 2))
    return padded[..., 0::2] | (padded[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [..., n] -> uint8 [..., 2 n]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def _occupied(weight: Tensor) -> Tensor:
    """Which places of each group are not zero, a bit each: uint8 [..., in / 4]."""
    shown = weight if weight.element_size() > 1 else weight.float()
    used: Tensor = (shown != 0).to(torch.uint8).unflatten(-1, (-1, GROUP))
    return used[..., 0] | used[..., 1] << 1 | used[..., 2] << 2 | used[..., 3] << 3


_REFUSED = 255


def _nibble_of_mask(device: torch.device) -> Tensor:
    """The nibble for each of the 16 sets of occupied places, uint8 [16]; _REFUSED for more than two."""
    nibbles = []
    for mask in range(1 << GROUP):
        used = [place for place in range(GROUP) if mask >> place & 1]
        free = [place for place in range(GROUP) if not mask >> place & 1]
        places = sorted((used + free)[:2])
        nibbles.append(places[0] + 4 * places[1] if len(used) <= 2 else _REFUSED)
    return torch.tensor(nibbles, dtype=torch.uint8, device=device)


def _refusal(weight: Tensor, nibbles: Tensor) -> str:
    wide = weight.float()
    error = (wide - prune(wide)).norm() / wide.norm()
    share = (nibbles == _REFUSED).float().mean()
    return (
        f"a weight {list(weight.shape)} is not 2:4: {share:.2%} of its groups of {GROUP} input features hold more than "
        f"two numbers other than zero, and keeping the two largest would change it by {error:.2%} of its norm: use a "
        "checkpoint that was trained with 2:4 weights, or another --precision"
    )
