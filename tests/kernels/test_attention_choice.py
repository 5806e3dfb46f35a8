"""What clusters of blocks are given for one-row sequences is what their source expects, and fits beside a product."""

from __future__ import annotations

import ctypes
import re
from itertools import product as every
from pathlib import Path

import pytest

from plexor.extension.specs import Facts
from plexor.kernels.cuda import attention_choice
from plexor.kernels.cuda.attention_choice import HEAD_SIZES, MOST_GROUP, MOST_ROWS, Cut, cut_for, refuses

SOURCE = re.sub(
    r"//[^\n]*", "", Path(attention_choice.__file__).with_name("decode_attention.cu").read_text(encoding="utf-8")
)
BESIDE = 228 * 1024 - 184 * 1024 - 1024
"""Bytes of shared memory for a block that starts while a product streams its weights: plexor.kernels.cuda.layout."""


def field_names() -> list[tuple[str, str]]:
    """(type, name) of the fields of the kernel's arguments."""
    (body,) = re.findall(r"struct Decodes \{(.*?)\};", SOURCE, re.DOTALL)
    return re.findall(r"((?:const )?\w+(?: long)?\s?\*?) (\w+);", body)


def test_arguments_are_those_of_the_source() -> None:
    pytest.importorskip("cuda.bindings")
    from plexor.kernels.cuda.decode_attention import Decodes

    kinds = {"int": ctypes.c_int, "float": ctypes.c_float, "long long": ctypes.c_longlong}
    expected = [(name, ctypes.c_void_p if kind.endswith("*") else kinds[kind.strip()]) for kind, name in field_names()]
    assert list(Decodes._fields_) == expected


def test_the_source_has_arguments() -> None:
    assert len(field_names()) == 18


@pytest.mark.parametrize(("num_rows", "num_kv_heads"), list(every((1, 2, 3, 8, 16, 33, 256), (1, 4, 8, 32, 40))))
@pytest.mark.parametrize("entry_bytes", [64, 128, 256])
def test_every_row_has_a_lane_and_every_block_adds_up_as_much(
    num_rows: int, num_kv_heads: int, entry_bytes: int
) -> None:
    cut = cut_for(num_rows, num_kv_heads, entry_bytes)
    assert 1 <= cut.shifts <= num_rows
    assert -(-num_rows // cut.shifts) <= MOST_ROWS
    assert cut.cluster in (1, 2, 4, 8, 16)
    assert 16 * cut.spread * entry_bytes <= 8 * 1024
    for head_size, group in every(HEAD_SIZES, range(1, MOST_GROUP + 1)):
        assert head_size * group % (4 * cut.cluster) == 0


@pytest.mark.parametrize("num_rows", [1, 4, 8, 16])
def test_a_block_leaves_room_for_a_product(num_rows: int) -> None:
    assert cut_for(num_rows, 8, 256).shared_bytes(128, 4) <= BESIDE


def test_is_cut_as_was_measured() -> None:
    measured = {1: (8, 8, 1), 4: (4, 8, 2), 8: (4, 8, 4), 16: (4, 4, 8)}
    assert {rows: cut_for(rows, 8, 256) for rows in measured} == {n: Cut(*cut, 1, 152) for n, cut in measured.items()}
    assert cut_for(8, 32, 128) == Cut(4, 2, 4, 2, 152)


def test_shared_memory_is_that_of_the_source() -> None:
    """parts, sums of four numbers with a mark each, two for each block, marks, a barrier up to 16 bytes."""
    assert Cut(8, 16, 1, 1, 128).shared_bytes(128, 4) == 8 * 512 * 4 + 2 * 128 * (16 + 8) + 8 * 4 * 8 + 16
    (body,) = re.findall(r"struct Shared \{(.*?)\};", SOURCE, re.DOTALL)
    assert re.findall(r"\w+ (\w+)[\[;]", body) == ["parts", "sums", "sum_marks", "marks", "arrived"]


def test_says_why_it_cannot_serve() -> None:
    def reason(capability: tuple[int, int], **sizes: int) -> str:
        return refuses(Facts("cpu", "bfloat16", capability, None, sizes)) or ""

    assert reason((9, 0), head_size=128, num_heads=32, num_kv_heads=8) == ""
    assert "8.0" in reason((8, 0), head_size=128)
    assert "96" in reason((9, 0), head_size=96)
    assert "12" in reason((9, 0), head_size=64, num_heads=48, num_kv_heads=4)
