"""Arguments on which every provider of the ops over an int8 cache is held to its reference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from plexor.api import KVShape, Pages, Prefill, Sample
from plexor_quant.kernels.reference.int8_kv_write import int8_kv_write
from plexor_quant.kv import int8_storage

# (name, slots, KV heads, head size, block size)
WRITES = (
    ("no tokens", (), 2, 16, 16),
    ("one token", (37,), 1, 80, 16),
    ("only padding", (-1, -1), 2, 8, 16),
    ("padding between tokens", (3, -1, 47, 0, -1), 3, 24, 16),
    ("wide heads, blocks of 32", (5, 18, 4), 8, 128, 32),
    ("one feature, blocks of one", (2, -1, 0), 5, 1, 1),
)
# (name, (rows, entries) of each sequence, query heads, KV heads, head size, block size)
READS: tuple[tuple[str, tuple[tuple[int, int], ...], int, int, int, int], ...] = (
    ("no sequences", (), 2, 1, 16, 16),
    ("one decode at the first position", ((1, 1),), 2, 2, 16, 16),
    ("decodes", ((1, 1), (1, 16), (1, 17), (1, 70)), 8, 2, 64, 16),
    ("prefill of new sequences", ((5, 5), (1, 1), (33, 33)), 4, 4, 32, 16),
    ("prefill and decodes", ((7, 40), (1, 12), (20, 20), (1, 33), (2, 18)), 6, 2, 24, 8),
    ("empty sequences between", ((1, 9), (0, 0), (1, 0), (3, 4)), 4, 1, 80, 16),
    ("wide heads", ((3, 19), (1, 40)), 2, 1, 256, 32),
    ("tiny heads, blocks of one", ((4, 30), (1, 5)), 3, 3, 7, 1),
    ("long decodes, blocks of 24", ((1, 900), (1, 64), (1, 257)), 34, 34, 16, 24),
)
NUM_POSITIONS = 32


def int8_kv_write_samples(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    generator = torch.Generator().manual_seed(31)
    for name, slots, heads, size, block_size in WRITES:
        k, v = (torch.randn(len(slots), heads, size, generator=generator).to(device, dtype) for _ in range(2))
        yield _write(name, (k, v), slots, block_size)
    fused = torch.randn(4, 5 * 24, generator=generator).to(device, dtype)
    inside = (fused[:, 24 : 3 * 24].view(4, 2, 24), fused[:, 3 * 24 :].view(4, 2, 24))
    yield _write("inside a fused projection", inside, (9, 8, 31, -1), 16)
    k = torch.randn(3, 2, 8, generator=generator)
    k[0] = 0
    k[1, 0, 3] = 3e4
    k[2, 1] *= 1e-6
    yield _write(
        "a token of zeros, an outlier, a faint head", (k.to(device, dtype), -k.to(device, dtype)), (1, 2, 3), 4
    )


def int8_rotary_kv_write_samples(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    generator = torch.Generator().manual_seed(32)
    for name, slots, heads, size, block_size in WRITES[:-1]:
        turning, num_tokens = size - 4 if size > 16 else size, len(slots)
        q, k, v = (
            torch.randn(num_tokens, count, size, generator=generator).to(device, dtype)
            for count in (3 * heads, heads, heads)
        )
        cos, sin = _rotation_tables(turning)
        positions = torch.tensor([(7 * token + 3) % NUM_POSITIONS for token in range(num_tokens)], dtype=torch.int64)
        where = (positions.to(device), torch.tensor(slots, dtype=torch.int64, device=device))
        args = (q, k, v, cos.to(device), sin.to(device), *where, _cache(k, block_size))
        yield Sample(name, args, written=(7,), shape=_sizes(k, 3 * heads), kv_dtype="int8")


def int8_paged_attention_samples(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    """Entries that no row may see have scales of NaN, so that reading them shows."""
    generator = torch.Generator().manual_seed(33)
    for name, pieces, heads, kv_heads, size, block_size in READS:
        for window in (None, 1, 6, 1000):
            for num_padding in (0, 3):
                q = torch.randn(sum(rows for rows, _ in pieces) + num_padding, heads, size, generator=generator)
                cache, pages = _pages(generator, pieces, (kv_heads, size, block_size))
                if num_padding:  # as in a captured step, of which the host says nothing
                    pages = replace(pages, num_decodes=0, prefills=())
                args = (q.to(device, dtype), *_moved(cache, pages, device), size**-0.5, window)
                shape = (("num_heads", heads), ("num_kv_heads", kv_heads), ("head_size", size))
                title = f"{name}, window {window}, {num_padding} rows of padding"
                yield Sample(title, args, shape=shape, kv_dtype="int8")


def _write(name: str, entries: tuple[Tensor, Tensor], slots: Sequence[int], block_size: int) -> Sample:
    k, v = entries
    args = (k, v, torch.tensor(slots, dtype=torch.int64, device=k.device), _cache(k, block_size))
    return Sample(name, args, written=(3,), shape=_sizes(k), kv_dtype="int8")


def _cache(k: Tensor, block_size: int) -> dict[str, Tensor]:
    """A cache of three blocks with entries in it, so that overwriting the wrong ones shows."""
    stored = int8_storage(KVShape(3, block_size, k.shape[1], k.shape[2]), k.dtype)
    return {part.name: torch.full(part.shape, 9, dtype=part.dtype, device=k.device) for part in stored}


def _sizes(k: Tensor, num_heads: int = 0) -> tuple[tuple[str, int], ...]:
    sizes = (("num_kv_heads", k.shape[1]), ("head_size", k.shape[2]))
    return (("num_heads", num_heads), *sizes) if num_heads else sizes


def _rotation_tables(turning: int) -> tuple[Tensor, Tensor]:
    frequency = 10000.0 ** (-torch.arange(0, turning, 2) / turning)
    angle = torch.arange(NUM_POSITIONS).unsqueeze(1) * frequency
    return angle.cos(), angle.sin()


def _pages(
    generator: torch.Generator, pieces: Sequence[tuple[int, int]], sizes: tuple[int, int, int]
) -> tuple[dict[str, Tensor], Pages]:
    """A cache whose blocks are handed out at random; sizes: (KV heads, head size, block size)."""
    kv_heads, size, block_size = sizes
    num_blocks = [-(-entries // block_size) for _, entries in pieces]
    free = torch.randperm(sum(num_blocks) + 1, generator=generator).tolist()
    shape = KVShape(len(free), block_size, kv_heads, size)
    cache = {part.name: torch.zeros(part.shape, dtype=part.dtype) for part in int8_storage(shape, torch.float32)}
    for part in ("key_scales", "value_scales"):
        cache[part].fill_(float("nan"))
    table = torch.zeros(len(pieces), max([*num_blocks, 1]), dtype=torch.int32)
    for sequence, (_, entries) in enumerate(pieces):
        own = torch.tensor([free.pop() for _ in range(num_blocks[sequence])], dtype=torch.int64)
        table[sequence, : len(own)] = own.int()
        position = torch.arange(entries)
        k, v = (torch.randn(entries, kv_heads, size, generator=generator) for _ in range(2))
        int8_kv_write(k, v, own[position // block_size] * block_size + position % block_size, cache)
    starts = [0, *accumulate(rows for rows, _ in pieces)]
    decodes = next((index for index, (rows, _) in enumerate(pieces) if rows != 1), len(pieces))
    pages = Pages(
        query_start=torch.tensor(starts, dtype=torch.int32),
        kv_length=torch.tensor([entries for _, entries in pieces], dtype=torch.int32),
        block_table=table,
        max_query=max([rows for rows, _ in pieces], default=1),
        num_decodes=decodes,
        prefills=tuple(Prefill(index, starts[index], *pieces[index]) for index in range(decodes, len(pieces))),
    )
    return cache, pages


def _moved(cache: dict[str, Tensor], pages: Pages, device: torch.device) -> tuple[dict[str, Tensor], Pages]:
    there = Pages(
        query_start=pages.query_start.to(device),
        kv_length=pages.kv_length.to(device),
        block_table=pages.block_table.to(device),
        max_query=pages.max_query,
        num_decodes=pages.num_decodes,
        prefills=pages.prefills,
    )
    return {name: part.to(device) for name, part in cache.items()}, there
