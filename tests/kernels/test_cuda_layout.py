"""What is handed to the kernels in CUDA C++ is what their source expects: arguments, constants, shared memory."""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Mapping
from itertools import product as every
from pathlib import Path

import pytest
import torch

from plexor.kernels.cuda import call, choice
from plexor.kernels.cuda.choice import Stream
from plexor.kernels.cuda.layout import STREAM_WARPS, Variant, variant_for
from plexor.kernels.cuda.tiled_layout import TILED_CUTS, TiledCut, tiled_layout
from plexor.kernels.tuning import Product

SOURCES = Path(call.__file__).parent
SHAPES = sorted((Path(__file__).parents[2] / "bench" / "shapes").glob("*.json"))
MOST_BYTES = 227 * 1024
"""Of shared memory for a block of compute capability 9.0, static and dynamic together."""

STREAM_CUTS = [Stream(blocks, depth) for blocks, depth in every((1, 2), (256, 512))]
C_TYPES = {"int": ctypes.c_int, "float": ctypes.c_float, "long long": ctypes.c_longlong}


def source(name: str) -> str:
    """A source file without its comments."""
    return re.sub(r"//[^\n]*", "", (SOURCES / name).read_text(encoding="utf-8"))


def constants(name: str, macros: Mapping[str, int]) -> dict[str, int]:
    """The whole numbers that a source file declares as constexpr, for these macros."""
    known = dict(macros)
    for constant, value in re.findall(r"^constexpr int (\w+) = ([^;]+);", source(name), re.MULTILINE):
        known[constant] = int(eval(as_python(value), {}, known))
    return known


def as_python(expression: str) -> str:
    """A whole-number expression of C: `a / b`, and `a ? b : c` that stands alone or in parentheses."""
    inner = re.compile(r"\(([^()?]*)\?([^()]*):([^()]*)\)")
    found = 1
    expression = f"({expression.replace('/', '//')})"
    while found:
        expression, found = inner.subn(r"((\2) if (\1) else (\3))", expression)
    return expression


def struct_fields(text: str) -> list[tuple[str, type]]:
    """Names and ctypes of the fields of struct Arguments."""
    found = re.search(r"struct Arguments \{(.*?)\};", text, re.DOTALL)
    assert found is not None
    fields: list[tuple[str, type]] = []
    for declaration in filter(None, map(str.strip, found[1].split(";"))):
        parts = re.fullmatch(r"(?:const )?([\w ]+?)\s*(\*?)\s*(\w+)", declaration)
        assert parts is not None, f"{declaration!r} is not understood"
        kind, pointer, name = parts.groups()
        fields.append((name, ctypes.c_void_p if pointer else C_TYPES[kind]))
    return fields


def input_sizes() -> list[tuple[str, int, bool]]:
    """(shape, input features, whether a norm comes before it) of every dense product of the published shapes."""
    sizes = []
    for path in SHAPES:
        raw = json.loads(path.read_text(encoding="utf-8"))
        heads = raw["num_attention_heads"]
        attended = heads * raw.get("head_dim", raw["hidden_size"] // heads)
        sizes += [(path.stem, raw["hidden_size"], True)]
        sizes += [(path.stem, size, False) for size in (attended, raw["intermediate_size"])]
    return sizes


def test_a_struct_is_read_as_c_declares_it() -> None:
    text = "struct Arguments {\n  const void* bias;\n  const long long* slots;\n  long long stride;\n  float eps;\n};"
    pointer = ctypes.c_void_p
    assert struct_fields(text) == [
        ("bias", pointer),
        ("slots", pointer),
        ("stride", ctypes.c_longlong),
        ("eps", ctypes.c_float),
    ]
    assert (
        as_python("(A ? 2 : 3) / (B < 4 ? 1 : C + 1)")
        == "((( 2 ) if (A ) else ( 3)) // (( 1 ) if (B < 4 ) else ( C + 1)))"
    )


def test_arguments_are_those_of_the_header() -> None:
    assert [(name, kind) for name, kind in call.Arguments._fields_] == struct_fields(source("linear.cuh"))


def test_epilogues_are_those_of_the_header() -> None:
    numbers = dict(re.findall(r"#define (STORE|ADD|GATED|ROTARY) (\d)", source("linear.cuh")))
    assert {name: int(number) for name, number in numbers.items()} == {
        epilogue.name: epilogue.value for epilogue in call.Epilogue
    }


@pytest.mark.parametrize(("cut", "num_rows", "norm"), [*every(STREAM_CUTS, (1, 2, 8, 9, 16), (False, True))])
@pytest.mark.parametrize("num_inputs", [64, 320, 4096, 4160, 14336, 32768, 32832])
def test_stream_linear_divides_the_memory_that_it_is_given(
    cut: Stream, num_rows: int, norm: bool, num_inputs: int
) -> None:
    variant = variant_for(cut, num_rows, num_inputs)
    stages, num_bytes = variant.layout(num_rows, num_inputs, norm)
    macros = {
        "COLUMNS": variant.columns,
        "BLOCKS": variant.blocks,
        "DEPTH": variant.depth,
        "RESIDENT": int(variant.resident),
        "X_ROWS": variant.x_rows(num_rows),
        "NORM": int(norm),
    }
    known = constants("stream_linear.cu", macros)
    assert known["WARPS"] == STREAM_WARPS
    steps = -(-num_inputs // variant.depth)
    resident = 0
    if variant.resident:
        assert steps <= known["MOST_STEPS"]
        resident = -(-steps * (known["X_BYTES"] + known["GAIN_BYTES"]) // 1024) * 1024
    sums = known["BUFFERS"] * known["WARPS"] * (known["SUMS"] + (known["COLUMNS"] if norm else 0))
    taken = stages * known["STAGE_BYTES"] + resident + 4 * sums
    barriers = 8 * (2 * known["MOST_STAGES"] + (known["MOST_STEPS"] if variant.resident else 0))
    assert 1 <= stages <= known["MOST_STAGES"]
    assert known["STAGE_BYTES"] % 1024 == 0, "the swizzle counts from multiples of 1024 bytes"
    assert taken <= num_bytes
    assert num_bytes + barriers <= MOST_BYTES


@pytest.mark.parametrize(("shape", "num_inputs", "norm"), input_sizes())
@pytest.mark.parametrize("cut", STREAM_CUTS, ids=str)
def test_a_stage_is_filled_while_another_is_multiplied(shape: str, num_inputs: int, norm: bool, cut: Stream) -> None:
    for num_rows in range(1, choice.STREAM_ROWS + 1):
        stages, num_bytes = variant_for(cut, num_rows, num_inputs).layout(num_rows, num_inputs, norm)
        assert stages >= 2
        assert num_bytes <= MOST_BYTES


def test_one_row_is_kept_unless_it_has_too_many_stages() -> None:
    assert variant_for(Stream(2, 256), 1, 16384) == Variant(8, 2, 256, resident=True)
    assert variant_for(Stream(2, 256), 1, 16448) == Variant(8, 2, 256, resident=False)
    assert variant_for(Stream(1, 512), 9, 64) == Variant(16, 1, 512, resident=False)


@pytest.mark.parametrize("cut", TILED_CUTS, ids=str)
@pytest.mark.parametrize("num_rows", [17, 32, 33, 64, 65, 128, 129, 256])
def test_tiled_linear_divides_the_memory_that_it_is_given(num_rows: int, cut: TiledCut) -> None:
    if not cut.fits(num_rows, 7168, 64, None):
        pytest.skip("this cut is not for so many rows")
    tokens, stages, num_bytes = tiled_layout(num_rows, cut)
    macros = {"TOKENS": tokens, "X_ROWS": tokens, "OUTPUTS": cut.outputs, "SPLIT": cut.split, "SHARE": cut.share}
    known = constants("tiled_linear.cu", macros)
    exchanged = (cut.split - 1) * known["OWN_UNITS"] * 32 * known["CONSUMERS"]
    assert 2 <= stages <= known["MOST_STAGES"]
    assert known["STAGE_BYTES"] % 1024 == 0, "the swizzle counts from multiples of 1024 bytes"
    assert stages * known["STAGE_BYTES"] + exchanged == num_bytes
    assert num_bytes + 8 * (2 * known["MOST_STAGES"] + 1) <= MOST_BYTES


def test_one_gain_and_one_row_of_products_belong_to_one_op() -> None:
    x, weight, gain = torch.zeros(3, 64).half(), torch.zeros(32, 64).half(), torch.ones(64).half()
    norm = call.Norm(gain, 1e-5)
    assert call.product_call(x, weight).product == Product("linear", 32, 64, "float16")
    assert call.product_call(x, weight, norm).product.op == "norm_linear"
    assert call.added_call(x, weight, torch.zeros(3, 32).half(), None).product.op == "linear_add"
    gated = call.gated_call(x, weight, norm, None)
    assert (gated.product.op, gated.pair, gated.y.shape) == ("norm_gated_linear", 16, (3, 16))


def test_operands_that_the_copy_engine_does_not_take() -> None:
    weight = torch.zeros(32, 64).half()
    wide = torch.zeros(3, 128).half()
    assert call.product_call(wide[:, 8:72], weight).lies_well()
    assert not call.product_call(wide[:, 4:68], weight).lies_well(), "the first row starts at no multiple of 16 bytes"
    assert not call.product_call(torch.zeros(3, 100).half()[:, :64], weight).lies_well(), "nor do the others"
    assert not call.product_call(torch.zeros(3, 64), torch.zeros(32, 64)).lies_well()
    assert not call.product_call(torch.zeros(3, 32).half(), torch.zeros(32, 32).half()).lies_well()
    assert not call.product_call(wide[:, :64], torch.zeros(32, 128).half()[:, :64]).lies_well()


def rotated(cache: dict[str, torch.Tensor], turning: int = 32) -> call.Call | None:
    x, weight, gain = torch.zeros(2, 64).half(), torch.zeros(4 * 32, 64).half(), torch.ones(64).half()
    table, numbers = torch.zeros(8, turning // 2), torch.zeros(2, dtype=torch.int64)
    rotation = call.Rotation(table, table, numbers, numbers, cache)
    return call.rotated_call(x, weight, call.Norm(gain, 1e-5), None, rotation)


def test_caches_that_no_kernel_here_writes() -> None:
    keys = torch.zeros(3, 16, 1, 32).half()
    made = rotated({"keys": keys, "values": keys.clone()})
    assert made is not None
    assert (made.y.shape, made.pair, made.narrow) == ((2, 2, 32), 16, False)
    assert (made.arguments.num_heads, made.arguments.num_kv_heads, made.arguments.entry_stride) == (2, 1, 32)
    narrow = keys.to(torch.float8_e4m3fn)
    made = rotated({"keys": narrow, "values": narrow.clone()})
    assert made is not None
    assert made.narrow
    assert rotated({"keys": keys, "values": keys}, turning=16) is None
    assert rotated({"keys": keys.float(), "values": keys.float()}) is None
    apart = torch.zeros(3, 17, 1, 32).half()[:, :16]
    assert rotated({"keys": apart, "values": apart}) is None
    beside = torch.zeros(3, 16, 1, 64).half()[..., :32]
    assert rotated({"keys": beside, "values": beside}) is None
