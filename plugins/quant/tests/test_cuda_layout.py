"""What is handed to the kernel of few rows and coded weights is what its source expects."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from itertools import product as every
from pathlib import Path

import pytest
import torch

from plexor.api import Call, Norm, added_call, product_call
from plexor_quant.kernels.cuda import layout as layouts
from plexor_quant.kernels.cuda.coded import Activations, CodedCall, Codes
from plexor_quant.kernels.cuda.layout import HALF, MOST, WHOLE, Cut

SOURCE = re.sub(r"//[^\n]*", "", Path(layouts.__file__).with_name("stream_coded.cu").read_text(encoding="utf-8"))
MOST_BYTES = 227 * 1024
"""Of shared memory for a block of compute capability 9.0, static and dynamic together."""

STATIC_BYTES, OWN_BYTES = 1024, 1024
"""Of a block besides what it asks for: its barriers, and what the system takes."""

MULTIPROCESSOR = 228 * 1024
CUTS = [
    Cut(blocks, slices, room, resident, warps)
    for blocks, slices, room, resident, warps in every((1, 2, 4), (1, 2), (HALF, MOST, WHOLE), (True, False), (8, 16))
]


def as_python(expression: str) -> str:
    """A whole-number expression of C, `a ? b : c` without parentheses around it included."""
    condition, mark, rest = expression.partition("?")
    if not mark:
        return expression
    depth = 0
    for place, letter in enumerate(rest):
        depth += (letter == "?") - (letter == ":")
        if depth < 0:
            return f"({as_python(rest[:place])}) if ({as_python(condition)}) else ({as_python(rest[place + 1 :])})"
    raise AssertionError(f"{expression!r} is not understood")


def constants(macros: Mapping[str, int]) -> dict[str, int]:
    """The whole numbers that the source declares as constexpr, for these macros."""
    known = {"E4M3": 0, "INT8": 1, "INT4": 2, **macros}
    for name, value in re.findall(r"^constexpr int (\w+) = ([^;]+);", SOURCE, re.MULTILINE):
        inner = re.sub(r"\(([^()]*\?[^()]*)\)", lambda found: f"({as_python(found[1])})", value)
        known[name] = int(eval(as_python(inner).replace("/", "//").replace("&&", " and "), {}, known))
    return known


def codes(kind: int, inputs: int, group: int, zeros: bool) -> Codes:
    """A weight of 192 rows."""
    if kind == layouts.INT4:
        groups = inputs // group if group else 1
        scale = torch.empty(192, groups, dtype=torch.bfloat16)
        zero = torch.empty(192, groups, dtype=torch.uint8) if zeros else None
        return Codes(torch.empty(192, inputs // 2, dtype=torch.uint8), scale, zero, group or inputs)
    dtype = torch.int8 if kind == layouts.INT8 else torch.float8_e4m3fn
    return Codes(torch.empty(192, inputs, dtype=dtype), torch.empty(192), None, inputs)


def call(rows: int, weight: Codes, norm: bool) -> CodedCall:
    x = torch.empty(rows, weight.num_inputs, dtype=torch.bfloat16)
    made: Call
    if norm:
        made = product_call(x, weight.weight, Norm(torch.empty(weight.num_inputs, dtype=torch.bfloat16), 1e-5))
    else:
        made = added_call(x, weight.weight, torch.empty(rows, 192, dtype=torch.bfloat16), None)
    return CodedCall(made, weight, Activations.AS_THEY_ARE)


@pytest.mark.parametrize(
    ("kind", "group", "zeros"),
    [(0, 0, False), (1, 0, False), (2, 128, False), (2, 128, True), (2, 32, True), (2, 0, True)],
)
@pytest.mark.parametrize("inputs", [256, 768, 4096, 4352, 14336])
def test_shared_memory_is_divided_as_the_source_does(kind: int, group: int, zeros: bool, inputs: int) -> None:
    weight = codes(kind, inputs, group, zeros)
    num_possible = 0
    for rows, norm, cut in every((1, 2, 3, 8, 9, 16), (False, True), CUTS):
        coded = call(rows, weight, norm)
        made = layouts.layout(coded, cut)
        if made is None:
            continue
        num_possible += 1
        depth = layouts.depth(weight, cut)
        macros = {
            "WARPS": cut.warps,
            "CODE": kind,
            "GROUP": layouts.group_of(weight),
            "COLUMNS": layouts.columns(rows),
            "BLOCKS": cut.blocks,
            "DEPTH": depth,
            "RESIDENT": int(cut.resident),
            "X_ROWS": layouts.x_rows(rows, cut),
            "NORM": int(norm),
            "HALF": 0,
        }
        known = constants(macros)
        assert known["SLICES"] == cut.slices
        assert known["STAGE_BYTES"] % 1024 == 0, "the swizzle counts from multiples of 1024 bytes"
        steps = -(-inputs // depth)
        taken = made.stages * known["STAGE_BYTES"] + (steps * known["X_BYTES"] if cut.resident else 0)
        if macros["GROUP"]:
            taken += made.buffers * 2 * known["ROWS"] * weight.num_groups * (3 if zeros else 2)
            assert 1 <= made.buffers <= known["MOST_BUFFERS"]
        taken += 4 * known["BUFFERS"] * known["WARPS"] * (known["SUMS"] + (known["COLUMNS"] if norm else 0))
        assert 2 <= made.stages <= known["MOST_STAGES"]
        assert taken <= made.num_bytes <= MOST_BYTES - STATIC_BYTES
        assert known["SUMS"] // 2 <= known["WARPS"] * 32
    assert num_possible > 20


def test_blocks_of_two_products_share_a_multiprocessor_and_two_behind_a_norm_do_not() -> None:
    weight = codes(layouts.E4M3, 4096, 0, False)
    sizes = []
    for norm in (True, False):
        made = layouts.layout(call(1, weight, norm), Cut(2, 1, HALF))
        assert made is not None
        sizes.append(made.num_bytes + STATIC_BYTES + OWN_BYTES)
    normed, other = sizes
    assert 2 * normed > MULTIPROCESSOR
    assert normed + other <= MULTIPROCESSOR
    assert normed + 1024 * HALF + STATIC_BYTES + OWN_BYTES <= MULTIPROCESSOR


def test_what_a_cut_cannot_be() -> None:
    for group, inputs in ((96, 768), (16, 768)):
        assert layouts.layout(call(1, codes(layouts.INT4, inputs, group, False), False), Cut(2)) is None
    assert layouts.layout(call(1, codes(layouts.INT8, 256, 0, False), False), Cut(4)) is not None
    assert layouts.layout(call(9, codes(layouts.INT8, 256, 0, False), False), Cut(4)) is None, "too many sums"


def test_fields_of_the_codes_are_those_of_the_source() -> None:
    pytest.importorskip("cuda.bindings")
    from plexor_quant.kernels.cuda.stream_coded import CodeArguments

    found = re.search(r"struct Codes \{(.*?)\};", SOURCE, re.DOTALL)
    assert found is not None
    kinds = {"int": ctypes.c_int, "long long": ctypes.c_longlong}
    fields = []
    for declaration in filter(None, map(str.strip, found[1].split(";"))):
        parts = re.fullmatch(r"(?:const )?([\w ]+?)\s*(\*?)\s*(\w+)", declaration)
        assert parts is not None
        fields.append((parts[3], ctypes.c_void_p if parts[2] else kinds[parts[1]]))
    assert [(name, kind) for name, kind in CodeArguments._fields_] == fields
