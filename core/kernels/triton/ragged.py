"""Find, on the device, whose rows a tile holds when each owner has a number of rows that the host does not know."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def owner_start(ends, owner):
    """The first row of an owner: where the one before it ends."""
    return tl.load(ends + owner - 1, mask=owner > 0, other=0)


@triton.jit
def find_owner(ends, num_owners, tile, TILE: tl.constexpr):
    """The owner of a tile, num_owners for the rows that no one owns.

    Owner g begins with tile start(g) // TILE + g, which leaves it at least as many tiles as its rows need:

        rows   |aaaaa|b|ccc|       TILE = 2, starts 0, 5, 6
        tiles   a a a b c c        begin 0, 3, 5: b's tile 4 is empty

    So num_rows // TILE + num_owners + 1 tiles suffice for all rows, whoever owns them.
    """
    low = tile * 0
    high = low + num_owners
    while low < high:
        middle = (low + high + 1) // 2
        begins = owner_start(ends, middle) // TILE + middle <= tile
        low = tl.where(begins, middle, low)
        high = tl.where(begins, high, middle - 1)
    return low


@triton.jit
def tile_rows(ends, num_owners, num_rows, owner, tile, TILE: tl.constexpr):
    """The tile's rows, from the first up to its owner's end; none if the first is not below the end."""
    start = owner_start(ends, owner)
    end = tl.load(ends + owner, mask=owner < num_owners, other=num_rows)
    return start + (tile - start // TILE - owner) * TILE, end
