"""The one mutable record of the runtime: how far a request has come.

    tokens         known: the prompt, then every generated token that the CPU has read
    in_flight      drawn on the device (or about to be), not read yet
    computed       entries that are in the cache once the steps launched so far have run

    [ prompt .............. | generated ...... ][ in flight ]
    [ computed ........................ ]  pending = length - computed

There is no prefill flag: a new prompt and a sequence that lost its blocks differ only in `pending`. Once a step has
drawn for a sequence in its slot, it decodes: each further token is known to the device first.
"""

from __future__ import annotations

from enum import Enum

from plexor.runtime.blocks import block_digest, root_digest
from plexor.runtime.request import Request


class State(Enum):
    """WAITING holds no blocks, RUNNING holds blocks and a slot, FINISHED has given its last output."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """One request under way.

    order: place in the line, kept through preemption. limit: tokens it may generate. seed: resolved, so that a resumed
    sequence draws as before. slot: its row in the device's state while it runs. decodes: whether its last token was
    drawn while it has held this slot. num_registered: leading blocks whose hashes the pool has seen.
    """

    __slots__ = (
        "blocks",
        "computed",
        "decodes",
        "hashes",
        "in_flight",
        "limit",
        "num_cached",
        "num_prompt",
        "num_registered",
        "order",
        "request",
        "seed",
        "slot",
        "state",
        "tokens",
    )

    def __init__(self, request: Request, *, order: int, limit: int, seed: int) -> None:
        self.request = request
        self.order = order
        self.limit = limit
        self.seed = seed
        self.tokens = list(request.tokens)
        self.num_prompt = len(request.tokens)
        self.num_cached: int | None = None
        self.computed = 0
        self.in_flight = 0
        self.blocks: list[int] = []
        self.hashes: list[bytes] = []
        self.num_registered = 0
        self.state = State.WAITING
        self.slot = -1
        self.decodes = False

    @property
    def length(self) -> int:
        """Tokens, the one in flight included."""
        return len(self.tokens) + self.in_flight

    @property
    def pending(self) -> int:
        """Tokens whose cache entries no launched step makes."""
        return self.length - self.computed

    @property
    def is_drained(self) -> bool:
        """Whether its last token is already in flight, so that no further step is for it."""
        return len(self.tokens) + self.in_flight - self.num_prompt >= self.limit

    def extend_hashes(self, block_size: int) -> None:
        """Hashes the blocks that known tokens have filled since the last call."""
        for index in range(len(self.hashes), len(self.tokens) // block_size):
            start, end = index * block_size, (index + 1) * block_size
            parent = self.hashes[-1] if self.hashes else root_digest(self.request.cache_salt)
            media = [
                (medium.start - start, medium.length, medium.digest)
                for medium in self.request.media
                if medium.start < end and start < medium.start + medium.length
            ]
            self.hashes.append(block_digest(parent, self.tokens[start:end], media))
