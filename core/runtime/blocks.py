"""The pool of cache blocks: who holds which, and which prefix each block remembers after it was freed.

    held       references > 0: in the table of one sequence, or of several that share the prefix
    cached     references = 0, hashed: free, but still found by its hash; the one freed first is evicted first
    blank      references = 0, no hash: free, nothing worth keeping

A block's hash covers every token from the start of the prompt to the block's end (a chain, as in vLLM's automatic
prefix caching), so equal hashes mean equal keys and values.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b


def root_digest(cache_salt: bytes) -> bytes:
    """What the first block of a prompt is chained to: requests of different salt never share a block."""
    return blake2b(cache_salt, digest_size=32).digest()


def block_digest(parent: bytes, token_ids: Sequence[int], media: Iterable[tuple[int, int, bytes]] = ()) -> bytes:
    """The hash of one full block.

    parent: the previous block's hash, or `root_digest`. media: for each medium whose placeholders reach into the
    block, where it starts relative to the block's first token (negative if before it), its length and its digest.
    """
    state = blake2b(parent, digest_size=32)
    state.update(array("q", token_ids).tobytes())
    for start, length, digest in media:
        state.update(array("q", (start, length, len(digest))).tobytes())
        state.update(digest)
    return state.digest()


class BlockPool:
    """Blocks 0 to num_blocks - 1, each of block_size cache entries."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._digest_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._cached: dict[int, None] = {}  # in the order in which they are evicted

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give, cached ones included."""
        return len(self._blank) + len(self._cached)

    def num_free_after_sharing(self, blocks: Iterable[int]) -> int:
        """How many blocks would be free once `share(blocks)` has taken the cached ones among them."""
        return self.num_free - sum(self._references[block] == 0 for block in blocks)

    def allocate(self, count: int) -> list[int]:
        """Takes count blocks for one holder, blank ones first; the caller has made sure that they are free."""
        assert count <= self.num_free, f"asked for {count} blocks of {self.num_free} free ones"
        return [self._take() for _ in range(count)]

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known prefix of a chain of hashes; they are not held until they are shared."""
        blocks = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Adds one holder to blocks that `match` found."""
        for block in blocks:
            assert self._digest_of[block] is not None, f"block {block} has no hash, so that it cannot be shared"
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Takes one holder away from each block of a table, the last block first: tails are evicted before heads."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} was freed twice"
            self._references[block] -= 1
            if self._references[block] > 0:
                continue
            if self._digest_of[block] is None:
                self._blank.append(block)
            else:
                self._cached[block] = None

    def register(self, block: int, digest: bytes) -> None:
        """Lets a held, full block be found; of two blocks with equal content the first stays the known one."""
        assert self._references[block] > 0, f"block {block} is not held, so that its content is not known"
        if digest in self._block_of:
            return
        assert self._digest_of[block] is None, f"block {block} already has another hash"
        self._digest_of[block] = digest
        self._block_of[digest] = block

    def forget(self) -> None:
        """Drops every hash, for when the content of the blocks can no longer be trusted."""
        self._digest_of = [None] * self.num_blocks
        self._block_of.clear()
        self._blank.extend(self._cached)
        self._cached.clear()

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Asserts that tables, one for each sequence, are all there is, and that every block is accounted for once."""
        held = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), "a table names one block twice"
            for block in table:
                held[block] += 1
        assert held == self._references, "reference counts differ from the tables"
        free = sorted([*self._blank, *self._cached])
        assert free == [block for block, count in enumerate(held) if count == 0], "a block is lost or free twice"
        assert all(self._digest_of[block] is None for block in self._blank), "a blank block has a hash"
        assert all(self._digest_of[block] is not None for block in self._cached), "a cached block has no hash"
        known = {digest: block for block, digest in enumerate(self._digest_of) if digest is not None}
        assert known == self._block_of, "hashes and blocks do not name each other"
        assert all(held[block] == 1 for block in range(self.num_blocks) if held[block] and not self._digest_of[block])

    def _take(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block = next(iter(self._cached))
            del self._cached[block]
            digest = self._digest_of[block]
            assert digest is not None
            del self._block_of[digest]
            self._digest_of[block] = None
        self._references[block] = 1
        return block
