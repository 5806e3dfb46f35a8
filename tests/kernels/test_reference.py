"""The references against plain formulations that share no code with them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from plexor.batch import Pages
from plexor.kernels.reference.grouped_linear import grouped_linear
from plexor.kernels.reference.kv_write import kv_write
from plexor.kernels.reference.paged_attention import paged_attention
from plexor.kernels.reference.rms_norm import rms_norm
from plexor.kernels.reference.rotary_kv_write import rotary_kv_write
from plexor.kernels.reference.silu_mul import silu_mul

EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True)
PIECES = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 40)).map(lambda piece: (piece[0], piece[0] + piece[1])), max_size=4
)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def empty_cache(num_blocks: int, block_size: int, heads: int, size: int) -> dict[str, Tensor]:
    return {part: torch.full((num_blocks, block_size, heads, size), 9.0) for part in ("keys", "values")}


def test_rms_norm_in_float64() -> None:
    x, weight = normal(0, 3, 2, 24), normal(1, 24)
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected.float())


def test_rms_norm_rounds_before_it_scales() -> None:
    x, weight = normal(0, 50, 64).bfloat16(), normal(1, 64).bfloat16()
    wide = x.float()
    unit = (wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).bfloat16()
    assert torch.equal(rms_norm(x, weight, 1e-6), unit * weight)


def test_silu_mul_in_float64() -> None:
    x = normal(2, 5, 14)
    gate, up = x[:, :7].double(), x[:, 7:].double()
    torch.testing.assert_close(silu_mul(x), (gate / (1 + (-gate).exp()) * up).float())


@EXAMPLES
@given(st.permutations(range(12)), st.lists(st.booleans(), max_size=8), st.integers(0, 99))
def test_kv_write_one_by_one(order: list[int], kept: list[bool], seed: int) -> None:
    slots = [order[token] if keep else -1 for token, keep in enumerate(kept)]
    k, v = normal(seed, len(slots), 2, 3), normal(seed + 1, len(slots), 2, 3)
    cache, expected = empty_cache(3, 4, 2, 3), empty_cache(3, 4, 2, 3)
    for token, slot in enumerate(slots):
        if slot >= 0:
            expected["keys"][slot // 4, slot % 4] = k[token]
            expected["values"][slot // 4, slot % 4] = v[token]
    kv_write(k, v, torch.tensor(slots, dtype=torch.int64), cache)
    assert torch.equal(cache["keys"], expected["keys"])
    assert torch.equal(cache["values"], expected["values"])


def test_kv_write_saturates() -> None:
    values = torch.tensor([1e5, -1e5, float("inf"), -float("inf"), 0.0, 448.0]).view(1, 1, 6)
    for storage, limit in ((torch.float8_e4m3fn, 448.0), (torch.float16, 65504.0)):
        cache = {part: torch.zeros(1, 1, 1, 6, dtype=storage) for part in ("keys", "values")}
        kv_write(values, values * float("nan"), torch.tensor([0]), cache)
        assert cache["keys"].float().flatten().tolist() == [limit, -limit, limit, -limit, 0.0, 448.0]
        assert bool(cache["values"].float().isnan().all())


@EXAMPLES
@given(st.sampled_from((2, 4, 8, 10)), st.lists(st.integers(0, 50), min_size=1, max_size=4), st.integers(0, 99))
def test_rotary_is_a_complex_multiplication(turning: int, places: list[int], seed: int) -> None:
    positions = torch.tensor(places)
    q, k, v = (normal(seed + part, len(places), heads, 10) for part, heads in enumerate((4, 2, 2)))
    frequency = 100.0 ** -(torch.arange(turning // 2) / turning)
    angle = torch.arange(51).unsqueeze(1) * frequency
    cache = empty_cache(1, len(places), 2, 10)
    slots = torch.arange(len(places))
    rotated = rotary_kv_write(q, k, v, angle.cos(), angle.sin(), positions, slots, cache)
    turn = torch.polar(torch.ones_like(angle), angle)[positions].unsqueeze(1)
    assert rotated.is_contiguous()
    for original, actual in ((q, rotated), (k, cache["keys"][0])):
        pairs = torch.complex(original[..., : turning // 2], original[..., turning // 2 : turning]) * turn
        expected = torch.cat((pairs.real, pairs.imag, original[..., turning:]), dim=-1)
        torch.testing.assert_close(actual, expected)
    assert torch.equal(cache["values"][0], v)


@EXAMPLES
@given(PIECES, st.sampled_from(((1, 1), (4, 2), (6, 2), (3, 3))), st.sampled_from((None, 1, 5)), st.integers(0, 2))
def test_attention_is_that_of_dense_tensors(
    pieces: list[tuple[int, int]], heads: tuple[int, int], window: int | None, num_padding: int
) -> None:
    num_heads, num_kv_heads = heads
    blocks = [-(-entries // 4) for _, entries in pieces]
    cache = {part: normal(seed, sum(blocks) + 1, 4, num_kv_heads, 5) for seed, part in enumerate(("keys", "values"))}
    table = torch.zeros(len(pieces), max([*blocks, 1]), dtype=torch.int32)
    order = iter(torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(3)).tolist())
    for sequence, count in enumerate(blocks):
        table[sequence, :count] = torch.tensor([next(order) for _ in range(count)], dtype=torch.int32)
    rows = torch.tensor([0] + [count for count, _ in pieces]).cumsum(0).int()
    q = normal(2, int(rows[-1]) + num_padding, num_heads, 5)
    lengths = torch.tensor([entries for _, entries in pieces], dtype=torch.int32)
    longest = max([count for count, _ in pieces], default=1)
    actual = paged_attention(q, cache, Pages(rows, lengths, table, longest), 0.3, window)

    expected = torch.zeros_like(q)
    for sequence, (count, entries) in enumerate(pieces):
        slots = [int(table[sequence, place // 4]) * 4 + place % 4 for place in range(entries)]
        keys, values = (part.reshape(-1, num_kv_heads, 5)[slots].transpose(0, 1) for part in cache.values())
        mask = torch.zeros(count, entries, dtype=torch.bool)
        for row in range(count):
            own = entries - count + row
            mask[row, max(0, own + 1 - (window or entries)) : own + 1] = True
        own_rows = slice(int(rows[sequence]), int(rows[sequence + 1]))
        queries = q[own_rows].transpose(0, 1)
        if count:
            group = num_heads // num_kv_heads
            keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
            attended = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=0.3)
            expected[own_rows] = attended.transpose(0, 1)
    torch.testing.assert_close(actual, expected)


@EXAMPLES
@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.integers(0, 3))
def test_grouped_linear_row_by_row(counts: list[int], num_padding: int) -> None:
    owners = [group for group, count in enumerate(counts) for _ in range(count)]
    x, weight = normal(0, len(owners) + num_padding, 6), normal(1, len(counts), 3, 6)
    ends = torch.tensor(counts).cumsum(0).int()
    expected = torch.zeros(len(x), 3)
    for row, owner in enumerate(owners):
        expected[row] = weight[owner] @ x[row]
    torch.testing.assert_close(grouped_linear(x, weight, ends), expected)
