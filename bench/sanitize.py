"""Every variant of the kernels in CUDA C++, each launched twice on small odd shapes: for compute-sanitizer.

    python bench/sanitize.py                                  # compiles, and says whether the results are right
    compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 9 python bench/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 9 python bench/sanitize.py
    compute-sanitizer --tool synccheck --error-exitcode 9 python bench/sanitize.py

Run it without a tool first: machine code is kept on disk, so the tools find it made. Of errors of the driver's calls
memcheck would name those with which cuda.bindings asks, when it is used first, for functions that the driver lacks
(cuGetProcAddress_v2, 34 of them with CUDA 13.0); a call of Plexor's own that fails ends the run. Results are compared
with the references on the CPU, so nothing but these kernels runs on the GPU. Each tensor is an allocation of its own,
so that memcheck sees its end. `--kernel stream_linear` leaves out the other kernel.

Other kernels have checks of their own to run in its place: `bench/coded.py --check` and `bench/coded_w4.py check` for
coded weights, `bench/decode_attention.py check` for attention. racecheck does not see what the copy engine overwrites:
`tests/gpu/test_replays.py` looks for that.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import product as every
from time import perf_counter

import torch
from torch import Tensor

from plexor.extension import builtin
from plexor.kernels.cuda import call as calls
from plexor.kernels.cuda.choice import Cut, Stream, possible
from plexor.kernels.cuda.stream_linear import StreamLinear
from plexor.kernels.cuda.tiled_layout import TiledCut
from plexor.kernels.cuda.tiled_linear import TiledLinear
from plexor.kernels.reference.kv_write import saturated
from plexor.kernels.reference.rms_norm import rms_norm
from plexor.kernels.samples import name_of
from plexor.kernels.table import KernelTable
from plexor.kernels.tuning import Product

KERNELS = {"stream_linear": Stream, "tiled_linear": TiledCut}
EPS = 1e-5
BLOCK_SIZE = 16
POSITIONS = 64
STREAM_CUTS = tuple(Stream(blocks, depth) for blocks, depth in every((1, 2), (256, 512)))
STREAM_ROWS = (1, 2, 8, 9, 16)
TILED_CUTS = (TiledCut(64), TiledCut(112), TiledCut(224), TiledCut(32, 2), TiledCut(96, 2))
TILED_ROWS = (17, 33, 64, 100, 128, 200)
OPS = ("linear", "norm_linear", "linear_add", "norm_gated_linear", "norm_rotary_linear")
# Rings are filled more than once; what a step or a stage takes does not divide them.
INPUTS, FEW_INPUTS = 3008, 320


@dataclass(frozen=True, slots=True)
class Case:
    """One product. heads: of queries and of keys, and their size; narrow: the cache is of float8_e4m3fn."""

    cut: Cut
    op: str
    rows: int
    outputs: int
    inputs: int
    dtype: torch.dtype = torch.bfloat16
    heads: tuple[int, int, int] | None = None
    narrow: bool = False

    def __str__(self) -> str:
        cache = " into a narrow cache" if self.narrow else ""
        return f"{self.op}{cache}, {self.rows} rows, {self.inputs} to {self.outputs}, {name_of(self.dtype)}, {self.cut}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", choices=[*KERNELS], action="append", help="of this one alone")
    arguments = parser.parse_args()
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # read with the first allocation
    wanted = tuple(KERNELS[name] for name in arguments.kernel or KERNELS)
    started = perf_counter()
    launcher, num_wrong, num_run = Launcher(torch.device("cuda")), 0, 0
    for case in cases(torch.cuda.get_device_properties(0).multi_processor_count):
        if isinstance(case.cut, wanted):
            wrong = launcher.check(case)
            num_run += 1
            num_wrong += wrong is not None
            if wrong is not None:
                print(f"{case}: {wrong}", flush=True)
    print(f"{num_wrong} of {num_run} products are wrong, {perf_counter() - started:.0f} s")
    sys.exit(int(num_wrong > 0))


def cases(num_multiprocessors: int) -> Iterator[Case]:
    """Each epilogue for each cut and number of rows, over few tiles and over more than there are multiprocessors."""
    for cut, rows, op, is_many in every(STREAM_CUTS, STREAM_ROWS, OPS, (False, True)):
        tile, num_tiles = 16 * cut.blocks, num_multiprocessors + 3 if is_many else 3
        yield from sized(Case(cut, op, rows, tile * num_tiles, FEW_INPUTS if is_many else INPUTS), is_many)
    for cut, op in every(STREAM_CUTS, ("norm_linear", "linear_add")):
        yield Case(cut, op, 1, 48 * cut.blocks, cut.depth * 64 + 64)  # one row, but too long to be kept
    for cut, rows, op, is_many in every(TILED_CUTS, TILED_ROWS, OPS, (False, True)):
        if op != "norm_linear":
            num_tiles = num_multiprocessors + 3 if is_many else 3
            case = Case(cut, op, rows, cut.outputs * num_tiles, 192 if is_many else 1600)
            yield from filter(fits, sized(case, is_many))
    for cut, op in every((Stream(2, 256), Stream(1, 512)), OPS):
        for rows in STREAM_ROWS:
            yield from sized(Case(cut, op, rows, 48 * cut.blocks, 448, torch.float16), is_many=False)
    for rows, op in every(TILED_ROWS, OPS):
        if op != "norm_linear":
            yield from filter(fits, sized(Case(TiledCut(64, 2), op, rows, 384, 448, torch.float16), is_many=False))


def fits(case: Case) -> bool:
    """Whether a case of tiled_linear can be cut so."""
    pairs = {"norm_gated_linear": case.outputs // 2, "norm_rotary_linear": case.heads and case.heads[2] // 2}
    product = Product(case.op, case.outputs, case.inputs, name_of(case.dtype))
    return case.cut in possible(product, case.rows, pairs.get(case.op))


def sized(case: Case, is_many: bool) -> Iterator[Case]:
    """A case as it is; for heads, as many as have at least its outputs, once for each kind of cache."""
    if case.op != "norm_rotary_linear":
        yield case
        return
    of_few, of_many = (256, 128) if isinstance(case.cut, TiledCut) else (64, 32)
    size = of_many if is_many else of_few
    num_heads = max(-(-case.outputs // size), 4)
    for narrow in (False, True):
        yield replace(case, outputs=num_heads * size, heads=(num_heads - 2, 1, size), narrow=narrow)


@dataclass(frozen=True, slots=True)
class Operands:
    """What a product is made of, in the order in which the references take it."""

    x: Tensor
    weight: Tensor
    gain: Tensor
    bias: Tensor | None
    residual: Tensor
    cos: Tensor
    sin: Tensor
    positions: Tensor
    slots: Tensor
    cache: Mapping[str, Tensor]

    def on(self, device: torch.device) -> Operands:
        """A copy on a device; rows that lie in a wider tensor do so there."""
        return Operands(
            within(self.x, device),
            self.weight.to(device),
            self.gain.to(device),
            None if self.bias is None else self.bias.to(device),
            within(self.residual, device),
            self.cos.to(device),
            self.sin.to(device),
            self.positions.to(device),
            self.slots.to(device),
            {part: entries.to(device, copy=True) for part, entries in self.cache.items()},
        )


class Launcher:
    """Launches products on one device, twice each, and compares them with the references."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = StreamLinear()
        self._tiled = TiledLinear()
        self._table = KernelTable(builtin.ops(), builtin.kernels())

    def check(self, case: Case) -> str | None:
        """What is wrong with a case, None if nothing is."""
        operands = drawn(case)
        here = operands.on(self._device)
        made = self._launch(case, here)
        relative, absolute = self._table.ops[case.op].tolerance[name_of(case.dtype)]
        expected = self._expected(case, operands)
        for name, tensor in {"result": made, **(here.cache if case.heads else {})}.items():
            wanted, given = expected[name].double(), tensor.cpu().double()
            step = torch.finfo(tensor.dtype).eps
            fits = (wanted - given).abs() <= absolute + max(relative, step) * wanted.abs()
            if not bool(fits.all()):
                where = tuple((~fits).nonzero()[0].tolist())
                count = int((~fits).sum())
                return (
                    f"{count} of {fits.numel()} of {name}, first {given[where]} instead of {wanted[where]} at {where}"
                )
        return None

    def _launch(self, case: Case, here: Operands) -> Tensor:
        """The second launch overlaps the first, and writes what it wrote."""
        normed = case.op.startswith("norm")
        if normed and isinstance(case.cut, TiledCut):  # whose norm is a kernel of its own, which is not looked at here
            here = replace(here, x=rms_norm(here.x.cpu(), here.gain.cpu(), EPS).to(self._device))
        call = described(case, here)
        call.y.copy_(torch.full(call.y.shape, float("nan"), dtype=case.dtype))
        assert call.lies_well()
        assert case.cut in possible(call.product, case.rows, call.pair), f"{case} is not possible"
        for _ in range(2):
            if isinstance(case.cut, Stream):
                self._stream.launch(call, case.cut)
            elif isinstance(case.cut, TiledCut):
                self._tiled.launch(replace(call, norm=None), case.cut)
        torch.cuda.synchronize()
        return call.y

    def _expected(self, case: Case, operands: Operands) -> dict[str, Tensor]:
        o, reference, stored = operands, self._table.reference(case.op), {"weight": operands.weight}
        if case.op == "linear":
            return {"result": reference(o.x, o.weight)}
        if case.op == "linear_add":
            return {"result": reference(o.x, stored, o.residual, o.bias)}
        if case.op != "norm_rotary_linear":
            return {"result": reference(o.x, o.gain, EPS, stored, o.bias)}
        where = (o.cos, o.sin, o.positions, o.slots, o.cache)
        return {"result": reference(o.x, o.gain, EPS, stored, *where, o.bias), **o.cache}


def described(case: Case, here: Operands) -> calls.Call:
    """The launch of a case."""
    norm = calls.Norm(here.gain, EPS)
    if case.op == "linear":
        return calls.product_call(here.x, here.weight)
    if case.op == "norm_linear":
        return calls.product_call(here.x, here.weight, norm, here.bias)
    if case.op == "linear_add":
        return calls.added_call(here.x, here.weight, here.residual, here.bias)
    if case.op == "norm_gated_linear":
        return calls.gated_call(here.x, here.weight, norm, here.bias)
    rotation = calls.Rotation(here.cos, here.sin, here.positions, here.slots, here.cache)
    made = calls.rotated_call(here.x, here.weight, norm, here.bias, rotation)
    assert made is not None, f"{case}: no kernel writes this cache"
    return made


def drawn(case: Case) -> Operands:
    """Random operands on the CPU; few inputs have no bias, and rows that lie one behind the other."""
    generator = torch.Generator().manual_seed(case.rows * case.inputs + case.outputs)
    plain = case.inputs in (FEW_INPUTS, 192)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(case.dtype)

    def rows(size: int) -> Tensor:
        return normal(case.rows, size) if plain else normal(case.rows, size + 128)[:, 64 : 64 + size]

    _, kv_heads, size = case.heads or (0, 1, 2)
    angle = torch.arange(POSITIONS).unsqueeze(1) * 100.0 ** (-torch.arange(0, size, 2) / size)
    entries = (-(-case.rows // BLOCK_SIZE) + 1, BLOCK_SIZE, kv_heads, size)
    storage = torch.float8_e4m3fn if case.narrow else case.dtype
    slots = torch.randperm(entries[0] * BLOCK_SIZE, generator=generator)[: case.rows]
    slots[1::5] = -1
    return Operands(
        x=rows(case.inputs),
        weight=weight(case.outputs, case.inputs, case.dtype),
        gain=1 + 0.3 * normal(case.inputs),
        bias=None if plain else normal(case.outputs),
        residual=rows(case.outputs),
        cos=angle.cos(),
        sin=angle.sin(),
        positions=torch.randint(0, POSITIONS, (case.rows,), generator=generator),
        slots=slots,
        cache={part: saturated(normal(*entries).float(), storage) for part in ("keys", "values")},
    )


@cache
def weight(num_outputs: int, num_inputs: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(num_outputs + num_inputs)
    return torch.randn(num_outputs, num_inputs, generator=generator).mul_(num_inputs**-0.5).to(dtype)


def within(rows: Tensor, device: torch.device) -> Tensor:
    """A copy of rows with as much beside each of them as there is."""
    if rows.is_contiguous():
        return rows.to(device, copy=True)
    whole = torch.full((rows.shape[0], rows.stride(0)), float("nan"), dtype=rows.dtype)
    first = rows.storage_offset()
    whole[:, first : first + rows.shape[1]] = rows
    return whole.to(device)[:, first : first + rows.shape[1]]


if __name__ == "__main__":
    main()
