"""Arguments on which every provider of a built-in op is held to its reference, odd shapes first of all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from plexor.batch import Pages, Prefill
from plexor.kernels.op import Sample
from plexor.kernels.reference.kv_write import saturated

BLOCK_SIZE = 16


class Maker:
    """Makes tensors on a device from one seed, the same on every device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.device = device
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers in the sample's dtype."""
        return (torch.randn(shape, generator=self.generator) * scale).to(self.device, self.dtype)

    def integers(self, values: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def floats(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def permutation(self, size: int) -> list[int]:
        numbers: list[int] = torch.randperm(size, generator=self.generator).tolist()
        return numbers


def rms_norm(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    make = Maker(device, dtype, 1)
    for rows, hidden in ((0, 64), (1, 64), (3, 80), (5, 1), (2, 4096), (17, 257)):
        yield Sample(f"{rows} rows of {hidden}", (make.normal(rows, hidden), make.normal(hidden), 1e-5))
    fused = make.normal(6, 7 * 24)
    heads = fused[:, 24 : 4 * 24].view(6, 3, 24)
    yield Sample("heads inside a fused projection", (heads, make.normal(24), 1e-6))
    yield Sample("rows of a wider tensor", (fused[:, 5:69], make.normal(64), 1e-6))
    yield Sample("four axes", (make.normal(2, 3, 4, 32), make.normal(32), 1e-6))
    yield Sample(
        "one row of zeros", (make.normal(2, 48) * make.floats([0, 1])[:, None].to(dtype), make.normal(48), 1e-5)
    )
    yield Sample("large values", (make.normal(2, 64, scale=300.0), make.normal(64), 1e-5))


def silu_mul(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    make = Maker(device, dtype, 2)
    for rows, size in ((0, 16), (1, 16), (3, 40), (2, 1), (2, 5000), (9, 333)):
        yield Sample(f"{rows} rows of {size}", (make.normal(rows, 2 * size),))
    yield Sample("rows of a wider tensor", (make.normal(4, 100)[:, 10:74],))
    yield Sample("far from zero", (make.normal(3, 64, scale=40.0),))


def kv_write(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    make = Maker(device, dtype, 3)
    for storage in storages(dtype):
        for name, slots, heads, size in (
            ("no tokens", [], 2, 16),
            ("one token", [37], 1, 80),
            ("only padding", [-1, -1], 2, 8),
            ("padding between tokens", [3, -1, 47, 0, -1], 3, 24),
            ("wide heads", [5, 18, 4], 8, 128),
        ):
            k, v = make.normal(len(slots), heads, size), make.normal(len(slots), heads, size)
            yield written_sample(make, f"{name}, {name_of(storage)}", (k, v), slots, storage)
        fused = make.normal(4, 5 * 24)
        k, v = fused[:, 24 : 3 * 24].view(4, 2, 24), fused[:, 3 * 24 :].view(4, 2, 24)
        yield written_sample(make, f"inside a fused projection, {name_of(storage)}", (k, v), [9, 8, 31, -1], storage)
        beyond = make.floats([1e30, -1e30, 500.0, -470.0, float("nan"), float("inf"), -float("inf"), 0.0])
        beyond = beyond.to(dtype).view(1, 1, 8)
        yield written_sample(make, f"beyond the range, {name_of(storage)}", (beyond, -beyond), [2], storage)


def written_sample(
    make: Maker, name: str, entries: tuple[Tensor, Tensor], slots: Sequence[int], storage: torch.dtype
) -> Sample:
    """A call of kv_write into a cache of three blocks."""
    k, v = entries
    cache = filled_cache(make, 3, k.shape[1], k.shape[2], storage)
    args = (k, v, make.integers(slots, torch.int64), cache)
    return Sample(name, args, written=(3,), shape=cache_shape(k), kv_dtype=name_of(storage))


def rotary_kv_write(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    make = Maker(device, dtype, 4)
    for storage in storages(dtype):
        for name, positions, slots, heads, kv_heads, size, turning in (
            ("no tokens", [], [], 4, 2, 16, 16),
            ("one token", [29], [17], 1, 1, 64, 64),
            ("three query heads to a KV head", [4, 5, 0], [20, -1, 0], 6, 2, 24, 24),
            ("partial rotary", [0, 1, 30, 31], [1, 2, 3, 40], 4, 4, 80, 32),
            ("two features turn", [7, 3], [33, 5], 2, 1, 20, 2),
            ("many heads", [8, 2, 9], [44, 45, 2], 40, 8, 128, 128),
        ):
            num_tokens = len(slots)
            q = make.normal(num_tokens, heads, size)
            k, v = make.normal(num_tokens, kv_heads, size), make.normal(num_tokens, kv_heads, size)
            yield rotated_sample(make, f"{name}, {name_of(storage)}", (q, k, v), (turning, positions, slots), storage)
        fused = make.normal(5, 7 * 24)
        q, k, v = fused[:, : 5 * 24].view(5, 5, 24), fused[:, 5 * 24 : 6 * 24].view(5, 1, 24), fused[:, 6 * 24 :]
        parts = (q, k, v.view(5, 1, 24))
        where = (16, [3, 3, 4, 0, 0], [11, 12, 13, -1, -1])
        yield rotated_sample(make, f"inside a fused projection, {name_of(storage)}", parts, where, storage)


def rotated_sample(
    make: Maker,
    name: str,
    parts: tuple[Tensor, Tensor, Tensor],
    where: tuple[int, Sequence[int], Sequence[int]],
    storage: torch.dtype,
) -> Sample:
    """A call of rotary_kv_write with tables of 32 positions; where: features that turn, positions, slots."""
    q, k, v = parts
    turning, positions, slots = where
    cache = filled_cache(make, 3, k.shape[1], k.shape[2], storage)
    args = (
        q,
        k,
        v,
        *rotation_tables(make, turning),
        make.integers(positions, torch.int64),
        make.integers(slots, torch.int64),
        cache,
    )
    return Sample(name, args, written=(7,), shape=cache_shape(k, q.shape[1]), kv_dtype=name_of(storage))


def rotation_tables(make: Maker, turning: int) -> tuple[Tensor, Tensor]:
    """cos and sin [32, turning / 2]."""
    frequency = 10000.0 ** (-torch.arange(0, turning, 2) / turning)
    angle = torch.arange(32).unsqueeze(1) * frequency
    return angle.cos().to(make.device), angle.sin().to(make.device)


def paged_attention(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    """Entries that no row may see are NaN, so that reading them shows."""
    make = Maker(device, dtype, 5)
    for name, pieces, heads, kv_heads, size in (
        ("no sequences", [], 2, 1, 16),
        ("one decode at the first position", [(1, 1)], 2, 2, 16),
        ("decodes", [(1, 1), (1, 16), (1, 17), (1, 70)], 8, 2, 64),
        ("prefill of new sequences", [(5, 5), (1, 1), (33, 33)], 4, 4, 32),
        ("prefill and decodes", [(7, 40), (1, 12), (20, 20), (1, 33), (2, 18)], 6, 2, 24),
        ("an empty sequence between", [(1, 9), (0, 0), (3, 4)], 4, 1, 80),
        ("a wide group", [(1, 20), (2, 21)], 20, 1, 16),
        ("wide heads", [(3, 19), (1, 40)], 2, 1, 256),
        ("tiny heads", [(4, 30), (1, 5)], 3, 3, 7),
    ):
        for window in (None, 1, 6, 1000):
            yield attention_sample(make, f"{name}, window {window}", pieces, (heads, kv_heads, size), window, dtype)
    pieces = [(9, 50), (1, 31), (1, 16), (4, 4)]
    for storage in storages(dtype)[1:]:
        yield attention_sample(make, f"cache of {name_of(storage)}", pieces, (6, 2, 32), None, storage)
    yield attention_sample(make, "long pieces", [(150, 150), (1, 3), (90, 200)], (4, 2, 16), None, dtype)
    yield attention_sample(make, "long pieces, window 70", [(150, 150), (90, 200)], (4, 2, 16), 70, dtype)
    yield attention_sample(make, "padding rows", pieces, (4, 2, 16), None, dtype, num_padding=5)
    yield attention_sample(make, "only padding rows", [], (4, 2, 16), None, dtype, num_padding=3)
    yield attention_sample(make, "decodes and padding", [(1, 8), (1, 20)], (4, 2, 16), 7, dtype, num_padding=2)
    yield attention_sample(make, "queries inside a fused projection", pieces, (4, 2, 16), None, dtype, fused=True)
    yield attention_sample(make, "blocks of 32", pieces, (4, 2, 16), 20, dtype, block_size=32)
    yield from attention_samples_with_decodes(make, dtype)


def attention_samples_with_decodes(make: Maker, dtype: torch.dtype) -> Iterable[Sample]:
    """Pages that say which sequences have one row: as long as several programs share, or empty as in a fixed batch."""
    heads = (6, 2, 24)
    decodes = [(1, 1), (1, 900), (1, 0), (1, 64), (1, 65), (1, 257)]
    for window in (None, 1, 200):
        name = f"known decodes, window {window}"
        yield attention_sample(make, name, decodes, heads, window, dtype, num_decodes=6, num_padding=2)
    yield attention_sample(make, "one long decode", [(1, 1500)], (8, 1, 64), None, dtype, num_decodes=1)
    yield attention_sample(
        make, "more groups than programs", [(1, 300), (1, 5)], (34, 34, 16), None, dtype, num_decodes=2
    )
    yield attention_sample(make, "wide known decodes", [(1, 400), (1, 33)], (4, 1, 256), None, dtype, num_decodes=2)
    for block_size in (1, 24, 128):
        name = f"known decodes, blocks of {block_size}"
        yield attention_sample(
            make, name, [(1, 300), (1, 17)], (4, 2, 80), None, dtype, num_decodes=2, block_size=block_size, fused=True
        )
    mixed = [(1, 300), (1, 7), (7, 40), (0, 0), (1, 12), (33, 33)]
    for window in (None, 19):
        name = f"known decodes before pieces, window {window}"
        yield attention_sample(make, name, mixed, heads, window, dtype, num_decodes=2, num_padding=3)
    for storage in storages(dtype)[1:]:
        name = f"known decodes, cache of {name_of(storage)}"
        yield attention_sample(make, name, mixed, (8, 2, 128), None, storage, num_decodes=2)
    if make.device.type != "cuda":
        return  # what follows takes a CPU, and Triton's interpreter, minutes
    long = [(1, 40), (1030, 1030), (1030, 1030), (1025, 2049), (30, 2000), (1100, 1110)]
    for group, size in ((1, 64), (3, 128)):
        name = f"pieces of more than a thousand rows, {group} heads"
        yield attention_sample(make, name, long, (group, 1, size), None, dtype, num_decodes=1, num_padding=1)


def attention_sample(
    make: Maker,
    name: str,
    pieces: Sequence[tuple[int, int]],
    heads: tuple[int, int, int],
    window: int | None,
    storage: torch.dtype,
    num_padding: int = 0,
    fused: bool = False,
    block_size: int = BLOCK_SIZE,
    num_decodes: int | None = None,
) -> Sample:
    """A call of paged_attention; pieces: (rows, entries) of each sequence; heads: (query heads, KV heads, size).

    num_decodes: what the pages say of them, and of the pieces after them; None for pages that say nothing.
    """
    num_heads, num_kv_heads, size = heads
    num_rows = sum(rows for rows, _ in pieces)
    width = num_heads + 2 if fused else num_heads
    q = make.normal(num_rows + num_padding, width, size)[:, :num_heads]
    num_blocks = [-(-entries // block_size) for _, entries in pieces]
    free = make.permutation(sum(num_blocks) + 1)
    table = torch.zeros(len(pieces), max([*num_blocks, 1]), dtype=torch.int32)
    shape = (len(free), block_size, num_kv_heads, size)
    cache = {part: torch.full(shape, float("nan"), device=make.device) for part in ("keys", "values")}
    for sequence, (_, entries) in enumerate(pieces):
        own = [free.pop() for _ in range(num_blocks[sequence])]
        table[sequence, : len(own)] = torch.tensor(own, dtype=torch.int32)
        for part in cache.values():
            for position in range(entries):
                part[own[position // block_size], position % block_size] = make.normal(num_kv_heads, size).float()
    starts = [0, *accumulate(rows for rows, _ in pieces)]
    told = len(pieces) if num_decodes is None else num_decodes
    prefills = tuple(Prefill(s, starts[s], *pieces[s]) for s in range(told, len(pieces)))
    args = (
        q,
        {part: saturated(entries, storage) for part, entries in cache.items()},
        Pages(
            query_start=make.integers(starts, torch.int32),
            kv_length=make.integers([entries for _, entries in pieces], torch.int32),
            block_table=table.to(make.device),
            max_query=max([rows for rows, _ in pieces], default=1),
            num_decodes=num_decodes or 0,
            prefills=prefills,
        ),
        size**-0.5,
        window,
    )
    sizes = (("num_heads", num_heads), ("num_kv_heads", num_kv_heads), ("head_size", size))
    return Sample(name, args, shape=sizes, kv_dtype=name_of(storage))


def linear(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    make = Maker(device, dtype, 6)
    for rows, inputs, outputs in ((0, 16, 8), (1, 64, 48), (5, 33, 7), (40, 256, 96), *whole_tiles(device)):
        args = (make.normal(rows, inputs), make.normal(outputs, inputs, scale=inputs**-0.5))
        sizes = (("in_features", inputs), ("out_features", outputs))
        yield Sample(f"{rows} rows, {inputs} to {outputs}", args, shape=sizes)


def norm_linear(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    make = Maker(device, dtype, 11)
    for name, x, outputs in normed_inputs(make):
        for with_bias in (False, True):
            stored, bias, sizes = drawn_layer(make, x.shape[1], outputs, with_bias)
            args = (x, make.normal(x.shape[1]), 1e-5, stored, bias)
            yield Sample(f"{name} to {outputs}{', bias' if with_bias else ''}", args, shape=sizes)


def norm_gated_linear(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    make = Maker(device, dtype, 12)
    for name, x, outputs in normed_inputs(make):
        for with_bias in (False, True):
            stored, bias, sizes = drawn_layer(make, x.shape[1], 2 * outputs, with_bias)
            args = (x, make.normal(x.shape[1]), 1e-5, stored, bias)
            yield Sample(f"{name} to {outputs}{', bias' if with_bias else ''}", args, shape=sizes)


def linear_add(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    make = Maker(device, dtype, 13)
    for name, x, outputs in normed_inputs(make):
        for with_bias in (False, True):
            stored, bias, sizes = drawn_layer(make, x.shape[1], outputs, with_bias)
            args = (x, stored, make.normal(x.shape[0], outputs), bias)
            yield Sample(f"{name} to {outputs}{', bias' if with_bias else ''}", args, spent=(2,), shape=sizes)
    stored, _, sizes = drawn_layer(make, 64, 24, False)
    args = (make.normal(3, 64), stored, make.normal(3, 50)[:, 8:32], None)
    yield Sample("residual in a wider tensor", args, spent=(2,), shape=sizes)


def normed_inputs(make: Maker) -> Iterable[tuple[str, Tensor, int]]:
    """(name, x, output features): rows around those at which providers change their way."""
    for rows, inputs, outputs in (
        (0, 16, 8),
        (1, 64, 48),
        (1, 2080, 5),
        (2, 33, 7),
        (2, 2048, 3),
        (3, 128, 16),
        (4, 96, 2),
        (5, 64, 3),
        (9, 256, 32),
        (16, 72, 40),
        (17, 128, 32),
        *whole_tiles(make.device),
    ):
        yield f"{rows} rows of {inputs}", make.normal(rows, inputs), outputs
    yield "2 rows of a wider tensor", make.normal(2, 100)[:, 10:74], 12
    yield "one row of zeros", make.normal(2, 48) * make.floats([0, 1])[:, None].to(make.dtype), 6


def whole_tiles(device: torch.device) -> Sequence[tuple[int, int, int]]:
    """(rows, input features, output features) for kernels that take inputs by 64 and outputs by 16 or 128.

    On a GPU rows lie at both sides of 16, 64 and 128, and some products have more tiles than it has multiprocessors.
    """
    few = ((8, 192, 48), (33, 192, 128))
    if device.type != "cuda":
        return few  # what follows takes Triton's interpreter minutes
    return (
        *few,
        (1, 320, 32),
        (1, 4160, 1040),
        (1, 64, 4304),
        (2, 128, 4320),
        (2, 16448, 48),
        (7, 4160, 80),
        (9, 64, 4304),
        (16, 192, 64),
        (16, 128, 8512),
        (17, 64, 128),
        (17, 192, 128),
        (17, 64, 17152),
        (32, 128, 256),
        (40, 128, 8576),
        (64, 320, 256),
        (64, 64, 16512),
        (65, 128, 128),
        (100, 64, 8576),
        (128, 192, 128),
        (129, 128, 128),
    )


def drawn_layer(
    make: Maker, inputs: int, outputs: int, with_bias: bool
) -> tuple[dict[str, Tensor], Tensor | None, tuple[tuple[str, int], ...]]:
    """A dense linear layer: what is stored, its bias, and the sizes a model states."""
    stored = {"weight": make.normal(outputs, inputs, scale=inputs**-0.5)}
    sizes = (("in_features", inputs), ("out_features", outputs))
    return (stored, make.normal(outputs), (*sizes, ("bias", 1))) if with_bias else (stored, None, sizes)


def norm_rotary_linear(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    make = Maker(device, dtype, 14)
    for storage in storages(dtype):
        for name, slots, inputs, heads, kv_heads, size, turning, with_bias in (
            ("no tokens", [], 16, 4, 2, 16, 16, False),
            ("one token", [17], 64, 1, 1, 64, 64, False),
            ("only padding", [-1], 32, 2, 1, 16, 16, False),
            ("two tokens, three query heads to a KV head", [20, 3], 72, 6, 2, 8, 8, True),
            ("three tokens, one is padding", [20, -1, 0], 33, 2, 2, 10, 10, False),
            ("partial rotary", [1, 40], 48, 2, 2, 20, 8, True),
            ("four tokens", [44, 45, 2, 9], 128, 3, 1, 32, 32, False),
            ("five tokens", [5, 4, 3, 2, 1], 64, 4, 1, 32, 32, False),
            ("sixteen tokens", [*range(8, 23), -1], 96, 3, 1, 16, 16, True),
            ("seventeen tokens", list(range(30, 47)), 64, 2, 2, 32, 32, False),
            *wide_heads(device),
        ):
            outputs = (heads + 2 * kv_heads) * size
            stored, bias, sizes = drawn_layer(make, inputs, outputs, with_bias)
            cos, sin = rotation_tables(make, turning)
            positions = make.integers([(7 * token + 3) % 32 for token in range(len(slots))], torch.int64)
            cache = filled_cache(make, 9, kv_heads, size, storage)
            x, gain = make.normal(len(slots), inputs), make.normal(inputs)
            where = (cos, sin, positions, make.integers(slots, torch.int64), cache)
            heads_sizes = (("num_heads", heads), ("num_kv_heads", kv_heads), ("head_size", size))
            yield Sample(
                f"{name}, {name_of(storage)}",
                (x, gain, 1e-5, stored, *where, bias),
                written=(8,),
                shape=(*sizes, *heads_sizes, ("rotary_size", turning)),
                kv_dtype=name_of(storage),
            )


def wide_heads(device: torch.device) -> Sequence[tuple[str, list[int], int, int, int, int, int, bool]]:
    """More of what norm_rotary_linear is given, for kernels that take outputs by 128 with both halves of a head."""
    few = (("eight tokens, heads of 64", [*range(40, 47), -1], 320, 3, 1, 64, 64, True),)
    if device.type != "cuda":
        return few  # what follows takes Triton's interpreter minutes
    return (
        *few,
        ("one token, heads of 128", [143], 320, 2, 1, 128, 128, True),
        ("more tiles than multiprocessors, heads of 128", [3, -1, 140], 64, 32, 1, 128, 128, False),
        ("sixteen tokens, heads of 128", [*range(15, 0, -1), -1], 192, 2, 1, 128, 128, True),
        ("seventeen tokens, heads of 128", [*range(31, 47), -1], 192, 2, 1, 128, 128, True),
        ("32 tokens, heads of 128", [-1, *range(7, 38)], 128, 1, 1, 128, 128, False),
        ("60 tokens, 134 heads of 128", [*range(60)], 64, 130, 2, 128, 128, False),
        ("64 tokens, heads of 128", [-1, *range(7, 70)], 192, 1, 1, 128, 128, False),
        ("65 tokens, heads of 128", [*range(65)], 64, 2, 1, 128, 128, False),
        ("128 tokens, heads of 128", [*range(130, 3, -1), -1], 128, 2, 3, 128, 128, True),
        ("129 tokens, heads of 128", [*range(129)], 64, 2, 1, 128, 128, False),
    )


def grouped_linear(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    make = Maker(device, dtype, 7)
    for name, counts, padding, inputs, outputs in (
        ("no rows", [0, 0, 0], 0, 16, 8),
        ("one row", [0, 1, 0], 0, 64, 48),
        ("one group", [7], 0, 32, 16),
        ("empty groups at both ends", [0, 5, 0, 3, 0], 0, 33, 7),
        ("rows of no group", [2, 0, 6], 4, 40, 24),
        ("only rows of no group", [0, 0], 3, 16, 16),
        ("uneven groups", [70, 1, 0, 17, 40, 2, 0, 31], 3, 80, 72),
        ("long groups", [150, 0, 120, 130], 5, 70, 130),
        ("more groups than rows", [1, 0, 1, 1, 0, 0, 0, 1] * 4, 0, 48, 64),
    ):
        x = make.normal(sum(counts) + padding, inputs)
        weight = make.normal(len(counts), outputs, inputs, scale=inputs**-0.5)
        sizes = (("in_features", inputs), ("out_features", outputs), ("groups", len(counts)))
        yield Sample(name, (x, weight, make.integers(list(accumulate(counts)), torch.int32)), shape=sizes)
    x, weight = make.normal(9, 50)[:, 8:40], make.normal(2, 16, 64)[:, :, :32]
    yield Sample("rows of wider tensors", (x, weight, make.integers([4, 9], torch.int32)))


def sample(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    make = Maker(device, dtype, 8)
    off = (1.0, 0, 1.0, 0.0)
    for name, vocabulary, rows in (
        ("no rows", 100, []),
        ("greedy", 100, [(0.0, 0, 1.0, 0.0)] * 3),
        ("one token to choose from", 1, [off, (0.0, 0, 1.0, 0.0)]),
        ("nothing dropped", 333, [off, (0.7, 0, 1.0, 0.0), (1.5, 0, 1.0, 0.0)]),
        ("top k", 130, [(1.0, 1, 1.0, 0.0), (1.0, 5, 1.0, 0.0), (2.0, 130, 1.0, 0.0), (1.0, 1000, 1.0, 0.0)]),
        ("top p", 257, [(1.0, 0, 0.0, 0.0), (1.0, 0, 0.3, 0.0), (1.3, 0, 0.9, 0.0), (0.5, 0, 0.99, 0.0)]),
        ("min p", 200, [(1.0, 0, 1.0, 0.05), (2.0, 0, 1.0, 0.3), (1.0, 0, 1.0, 1.0)]),
        ("all together", 500, [(0.8, 40, 0.95, 0.02), (0.0, 3, 0.5, 0.5), (1.2, 7, 0.8, 0.0), off]),
        ("top p beyond the most probable", 700, [(9.0, 0, 0.95, 0.0), (0.3, 0, 0.9, 0.0), (9.0, 300, 0.99, 0.0), off]),
        ("more than a tile", 9001, [(1.0, 0, 1.0, 0.0), (0.9, 50, 0.9, 0.0), (0.0, 0, 1.0, 0.0)]),
    ):
        logits = make.normal(len(rows), vocabulary, scale=3.0)
        yield sampling_sample(make, name, logits, rows)
    ties = (make.normal(4, 90) * 2).round()
    mixed = [(0.0, 0, 1.0, 0.0), (1.0, 4, 1.0, 0.0), (1.0, 0, 0.45, 0.0), (1.0, 12, 0.7, 0.1)]
    yield sampling_sample(make, "ties", ties, mixed)
    zeros = torch.zeros_like(ties)
    zeros[:, ::2] = -0.0
    yield sampling_sample(make, "zeros of both signs", zeros, mixed)
    banned = make.normal(4, 90)
    banned[:, 1:] = banned[:, 1:].masked_fill(make.normal(4, 89) > 0.2, float("-inf"))
    yield sampling_sample(make, "banned tokens", banned, [(0.0, 0, 1.0, 0.0), (1.0, 80, 1.0, 0.0), off, mixed[3]])
    wide = make.normal(2, 64, scale=1000.0)
    yield sampling_sample(make, "far apart", wide, [off, (0.1, 3, 0.9, 0.0)])
    yield sampling_sample(make, "rows of a padded table", make.normal(4, 128, scale=3.0)[:, :101], mixed)


def sampling_sample(make: Maker, name: str, logits: Tensor, rows: Sequence[tuple[float, int, float, float]]) -> Sample:
    """A call of sample; rows: (temperature, top_k, top_p, min_p); seeds use all 64 bits; each third row has no slot."""
    temperature, top_k, top_p, min_p = ([row[column] for row in rows] for column in range(4))
    seeds = [0x9E3779B97F4A7C15 * (row + 1) % 2**64 - 2**63 for row in range(len(rows))]
    args = (
        logits,
        make.floats(temperature),
        make.integers([int(count) for count in top_k], torch.int32),
        make.floats(top_p),
        make.floats(min_p),
        make.integers(seeds, torch.int64),
        make.integers([3 + row * 2**33 for row in range(len(rows))], torch.int64),
        make.integers([-1 if row % 3 == 2 else len(rows) - row for row in range(len(rows))], torch.int64),
        make.integers([-7] * (len(rows) + 1), torch.int64),
    )
    return Sample(name, args, written=(8,), shape=(("vocab_size", logits.shape[1]),))


def advance(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    make = Maker(device, dtype, 9)
    for name, slots, lengths, width, block_size in (
        ("no rows", [], [4, 0], 3, 16),
        ("one row", [1], [9, 31, 2], 2, 16),
        ("the first token of a block", [2, 0], [15, 3, 16], 2, 16),
        ("the last token of a block", [0, 1], [15, 47], 3, 16),
        ("padding", [3, 0, 1, -1, -1], [7, 100, 2, 35], 8, 16),
        ("only padding", [-1, -1, -1], [7, 1], 1, 16),
        ("blocks of one", [2, 1, 0], [0, 3, 6], 7, 1),
        ("odd blocks", [0, 3, -1, 2], [14, 0, 20, 41], 7, 7),
        ("more blocks than a tile", [1, 0, -1], [0, 9001, 70000], 9100, 1),
    ):
        num_slots = len(lengths)
        args = (
            make.integers(slots, torch.int64),
            make.integers(make.permutation(num_slots), torch.int64) + 2**33,
            make.integers([min(length, width * block_size - 1) for length in lengths], torch.int32),
            make.integers(make.permutation(num_slots), torch.int64),
            make.integers(make.permutation(num_slots * width), torch.int32).view(num_slots, width),
            make.integers(make.permutation((len(slots) + 2) * width), torch.int32).view(-1, width),
            block_size,
        )
        yield Sample(name, args, written=(2, 3, 5))


def storages(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Cache dtypes for activations of a dtype, its own first."""
    others = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
    return (dtype, *(other for other in others if other != dtype))


def filled_cache(
    make: Maker, num_blocks: int, num_kv_heads: int, head_size: int, storage: torch.dtype
) -> dict[str, Tensor]:
    """A cache with entries in it, so that overwriting the wrong ones shows."""
    shape = (num_blocks, BLOCK_SIZE, num_kv_heads, head_size)
    return {part: saturated(make.normal(*shape).float(), storage) for part in ("keys", "values")}


def cache_shape(k: Tensor, num_heads: int = 0) -> tuple[tuple[str, int], ...]:
    """The sizes a model states for ops that write the cache."""
    sizes = (("num_kv_heads", k.shape[1]), ("head_size", k.shape[2]))
    return (("num_heads", num_heads), *sizes) if num_heads else sizes


def name_of(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")
