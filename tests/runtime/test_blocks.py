"""The block pool against a model of it, over random operations; and what makes two blocks equal."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plexor.runtime.blocks import BlockPool, block_digest, root_digest

CHAINS = [[f"{name}{index}".encode() for index in range(4)] for name in "ab"]


@settings(derandomize=True)
@given(data=st.data(), num_blocks=st.integers(1, 9))
def test_random_use_loses_no_block_and_shares_only_equal_ones(data: st.DataObject, num_blocks: int) -> None:
    """Tables follow one of two chains of content; a block's content is what was last registered or written."""
    pool = BlockPool(num_blocks, block_size=4)
    tables: list[list[int]] = []
    content: dict[int, bytes] = {}
    for _ in range(data.draw(st.integers(0, 25))):
        is_free = bool(tables) and data.draw(st.booleans())
        if is_free:
            index = data.draw(st.integers(0, len(tables) - 1))
            pool.free(tables.pop(index))
        else:
            chain = data.draw(st.sampled_from(CHAINS))[: data.draw(st.integers(1, 4))]
            shared = pool.match(chain)
            assert [content[block] for block in shared] == chain[: len(shared)], "a hash stands for other content"
            if pool.num_free_after_sharing(shared) < len(chain) - len(shared):
                continue
            pool.share(shared)
            fresh = pool.allocate(len(chain) - len(shared))
            held = {block for table in tables for block in table} | set(shared)
            assert not held & set(fresh), "a block in use was given away"
            for block, digest in zip(fresh, chain[len(shared) :], strict=True):
                content[block] = digest
                pool.register(block, digest)
            tables.append(shared + fresh)
        pool.check(tables)
    for table in tables:
        pool.free(table)
    pool.check([])
    assert pool.num_free == num_blocks


def test_blank_blocks_go_first_then_the_one_freed_longest_ago() -> None:
    pool = BlockPool(5, block_size=4)
    old, new = pool.allocate(2), pool.allocate(2)
    for block, digest in zip(old + new, CHAINS[0], strict=True):
        pool.register(block, digest)
    pool.free(old)
    pool.free(new)
    (blank,) = pool.allocate(1)
    assert blank not in old + new
    assert pool.allocate(4) == [old[1], old[0], new[1], new[0]]
    assert pool.match(CHAINS[0]) == []


def test_a_cached_block_taken_again_is_young_again() -> None:
    pool = BlockPool(2, block_size=4)
    first, second = pool.allocate(2)
    pool.register(first, b"first")
    pool.register(second, b"second")
    pool.free([first])
    pool.free([second])
    pool.share(pool.match([b"first"]))
    pool.free([first])
    assert pool.allocate(1) == [second]
    assert pool.match([b"first"]) == [first]


def test_a_gap_in_the_chain_ends_the_match() -> None:
    pool = BlockPool(3, block_size=4)
    first, third = pool.allocate(2)
    pool.register(first, b"1")
    pool.register(third, b"3")
    assert pool.match([b"1", b"2", b"3"]) == [first]


def test_the_first_of_two_equal_blocks_stays_the_known_one() -> None:
    pool = BlockPool(2, block_size=4)
    first, second = pool.allocate(2)
    pool.register(first, b"x")
    pool.register(second, b"x")
    assert pool.match([b"x"]) == [first]
    pool.check([[first], [second]])


def test_forgetting_keeps_the_blocks_and_drops_the_hashes() -> None:
    pool = BlockPool(3, block_size=4)
    held, cached = pool.allocate(2)
    pool.register(held, b"held")
    pool.register(cached, b"cached")
    pool.free([cached])
    pool.forget()
    assert pool.match([b"held"]) == pool.match([b"cached"]) == []
    pool.check([[held]])


def test_misuse_is_an_assertion() -> None:
    pool = BlockPool(2, block_size=4)
    (block,) = pool.allocate(1)
    with pytest.raises(AssertionError, match="asked for 2 blocks of 1"):
        pool.allocate(2)
    with pytest.raises(AssertionError, match="cannot be shared"):
        pool.share([block])
    pool.free([block])
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free([block])
    with pytest.raises(AssertionError, match="not held"):
        pool.register(block, b"x")
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check([[block]])


def test_a_hash_covers_all_that_the_entries_depend_on() -> None:
    root = root_digest(b"")
    base = block_digest(root, [1, 2, 3, 4], [(1, 6, b"cat")])
    assert base == block_digest(root_digest(b""), (1, 2, 3, 4), [(1, 6, b"cat")])
    others = [
        block_digest(root_digest(b"salt"), [1, 2, 3, 4], [(1, 6, b"cat")]),
        block_digest(base, [1, 2, 3, 4], [(1, 6, b"cat")]),
        block_digest(root, [1, 2, 3, 5], [(1, 6, b"cat")]),
        block_digest(root, [1, 2, 3, 4]),
        block_digest(root, [1, 2, 3, 4], [(2, 6, b"cat")]),
        block_digest(root, [1, 2, 3, 4], [(-3, 6, b"cat")]),
        block_digest(root, [1, 2, 3, 4], [(1, 6, b"dog")]),
        block_digest(root, [1, 2, 3, 4], [(1, 5, b"cat")]),
    ]
    assert len({base, *others}) == 1 + len(others)
