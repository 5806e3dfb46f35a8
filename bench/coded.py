"""Checks and times products of few rows with coded weights on a GPU: `python bench/coded.py [--check] [--time]`.

Checks hold every format, epilogue and number of rows to float64 of what the kernel means, by cuts in turn. Times are of
chains of a decoder layer's four products, each of which waits for the one before it, over layers that do not fit the
cache: one cut for all, then each product's own.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from itertools import product as every

import torch
from torch import Tensor

from plexor.api import Call, Norm, Rotation, added_call, gated_call, product_call, rotated_call
from plexor_quant.kernels.cuda.coded import Activations, CodedCall, Codes
from plexor_quant.kernels.cuda.layout import HALF, MOST, WHOLE, Cut
from plexor_quant.kernels.cuda.stream_coded import StreamCoded, possible
from plexor_quant.packing import unpack

EPS = 1e-5
DEVICE = torch.device("cuda")
OPS = ("linear", "norm_linear", "linear_add", "norm_gated_linear", "norm_rotary_linear")
LARGEST_ERROR = {torch.bfloat16: 6e-3, torch.float16: 8e-4}
LAYER_BYTES = 1_600_000_000
REPLAYS = 9


@dataclass(frozen=True, slots=True)
class Form:
    """How a weight is kept: bits, e4m3 or not, features that share a scale, and whether zero points are stored."""

    name: str
    group: int = 0
    zeros: bool = False

    def draw(self, outputs: int, inputs: int, generator: torch.Generator) -> Codes:
        """A random weight, whose product with normal numbers is normal."""
        if self.name == "int4":
            weight = torch.randint(
                0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=DEVICE, generator=generator
            )
            groups = inputs // self.group if self.group else 1
            scale = self._scale((outputs, groups), generator) * (inputs**-0.5 / 4.6)
            zero = None
            if self.zeros:
                zero = torch.randint(0, 16, (outputs, groups), dtype=torch.uint8, device=DEVICE, generator=generator)
            return Codes(weight, scale.to(torch.bfloat16), zero, self.group or inputs)
        numbers = torch.randn(outputs, inputs, device=DEVICE, generator=generator)
        scale = self._scale((outputs,), generator) * inputs**-0.5
        if self.name == "int8":
            return Codes((numbers * 40).round().clamp(-128, 127).to(torch.int8), scale / 40, None, inputs)
        return Codes((numbers * 100).clamp(-448, 448).to(torch.float8_e4m3fn), scale / 100, None, inputs)

    def _scale(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return 0.5 + torch.rand(shape, device=DEVICE, generator=generator)


def dense(codes: Codes) -> Tensor:
    """The weight in float64."""
    if not codes.is_packed:
        return codes.weight.double() * codes.scale.double()[:, None]
    numbers = unpack(codes.weight).double() + 8
    spread = codes.num_inputs // codes.num_groups
    zero = 8.0 if codes.zero is None else codes.zero.double().repeat_interleave(spread, dim=1)
    return (numbers - zero) * codes.scale.double().repeat_interleave(spread, dim=1)


FORMS = (
    Form("e4m3"),
    Form("int8"),
    Form("int4", 128),
    Form("int4", 128, zeros=True),
    Form("int4", 64),
    Form("int4", 32, zeros=True),
    Form("int4"),
    Form("int4", zeros=True),
)


@dataclass(frozen=True, slots=True)
class Case:
    """One product that is checked."""

    form: Form
    op: str
    rows: int
    outputs: int
    inputs: int
    dtype: torch.dtype
    turn: int

    def __str__(self) -> str:
        return f"{self.form}, {self.op}, {self.rows} rows, {self.inputs} to {self.outputs}, {self.dtype}"


class Operands:
    """What an op is given besides its weight."""

    def __init__(
        self, op: str, rows: int, outputs: int, inputs: int, dtype: torch.dtype, generator: torch.Generator
    ) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=DEVICE, generator=generator).to(dtype)

        self.op, self.outputs = op, outputs
        self.x, self.gain = normal(rows, inputs), 1 + 0.3 * normal(inputs)
        self.bias: Tensor | None = normal(outputs)
        self.residual = normal(rows, outputs)
        self.size, self.kv_heads = (128, 8) if outputs >= 4096 else (32, 1)
        angle = torch.rand(64, self.size // 2, device=DEVICE, generator=generator) * 6
        self.cos, self.sin = angle.cos(), angle.sin()
        self.positions = torch.randint(0, 64, (rows,), device=DEVICE, generator=generator)
        self.slots = torch.randperm(32, device=DEVICE, generator=generator)[:rows]
        entries = (2, 16, self.kv_heads, self.size)
        self.cache = {part: torch.zeros(entries, dtype=dtype, device=DEVICE) for part in ("keys", "values")}

    def call(self, codes: Codes, x: Tensor | None = None, residual: Tensor | None = None) -> CodedCall:
        """The launch of the op with a weight."""
        x = self.x if x is None else x
        return CodedCall(self._call(codes.weight, x, residual), codes, Activations.AS_THEY_ARE)

    def _call(self, weight: Tensor, x: Tensor, residual: Tensor | None) -> Call:
        norm = Norm(self.gain, EPS)
        if self.op == "linear":
            return product_call(x, weight)
        if self.op == "norm_linear":
            return product_call(x, weight, norm, self.bias)
        if self.op == "linear_add":
            return added_call(x, weight, self.residual if residual is None else residual, self.bias)
        if self.op == "norm_gated_linear":
            return gated_call(x, weight, norm, self.bias)
        rotation = Rotation(self.cos, self.sin, self.positions, self.slots, self.cache)
        made = rotated_call(x, weight, norm, self.bias, rotation)
        assert made is not None
        return made

    def expected(self, codes: Codes) -> Tensor:
        """The result in float64, and behind it what the cache holds."""
        weight, x = dense(codes), self.x.double()
        if self.op.startswith("norm"):
            x = (self.x * self.gain).double() / (x.pow(2).mean(1, keepdim=True) + EPS).sqrt()
        y = x @ weight.T
        if self.op == "linear":
            return y
        y = y if self.bias is None else y + self.bias.double()
        if self.op == "linear_add":
            return y + self.residual.double()
        if self.op == "norm_gated_linear":
            gate, up = y.chunk(2, dim=1)
            return gate * gate.sigmoid() * up
        if self.op == "norm_linear":
            return y
        heads = y.unflatten(1, (-1, self.size))
        cos, sin = (table[self.positions].double()[:, None] for table in (self.cos, self.sin))
        low, high = heads.chunk(2, dim=2)
        turned = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=2)
        num_queries = heads.shape[1] - 2 * self.kv_heads
        keys, values = (torch.zeros_like(part, dtype=torch.float64) for part in self.cache.values())
        keys.flatten(0, 1)[self.slots] = turned[:, num_queries : num_queries + self.kv_heads]
        values.flatten(0, 1)[self.slots] = heads[:, num_queries + self.kv_heads :]
        return torch.cat([part.flatten() for part in (turned[:, :num_queries], keys, values)])

    def result(self, y: Tensor) -> Tensor:
        parts = (y, *self.cache.values()) if self.op == "norm_rotary_linear" else (y,)
        return torch.cat([part.flatten() for part in parts]).double()


def cases() -> Iterator[Case]:
    turn = count()
    for form, op in every(FORMS, OPS):
        for rows, dtype in (
            (1, torch.bfloat16),
            (2, torch.float16),
            (3, torch.bfloat16),
            (8, torch.bfloat16),
            (16, torch.bfloat16),
            (1, torch.float16),
            (9, torch.float16),
        ):
            n = next(turn)
            inputs = (768, 4096, 2304)[n % 3]
            yield Case(form, op, rows, 64 * (3, 41)[n % 2], inputs, dtype, n)


def check(case: Case) -> tuple[str, float]:
    """How it is cut, and how far the result is from float64, as a part of the whole."""
    torch.cuda.set_device(0)
    with torch.cuda.stream(torch.cuda.Stream()):
        generator = torch.Generator(DEVICE).manual_seed(case.turn)
        codes = case.form.draw(case.outputs, case.inputs, generator)
        given = Operands(case.op, case.rows, case.outputs, case.inputs, case.dtype, generator)
        call = given.call(codes)
        call.call.y.fill_(float("nan"))
        cuts = list(possible(call))
        cut = cuts[case.turn * 7 % len(cuts)]
        multiply = StreamCoded(lambda _: cut)
        for _ in range(2):
            multiply(call)
        actual, expected = given.result(call.call.y), given.expected(codes).flatten()
        return str(cut), float((actual - expected).norm() / expected.norm())


def check_all() -> bool:
    wrong = 0
    with ThreadPoolExecutor(12) as executor:
        asked = list(cases())
        worst: dict[torch.dtype, float] = {}
        for case, (cut, error) in zip(asked, executor.map(check, asked), strict=True):
            worst[case.dtype] = max(worst.get(case.dtype, 0.0), error)
            if not error < LARGEST_ERROR[case.dtype]:
                wrong += 1
                if wrong <= 12:
                    print(f"WRONG by {error:.2g}: {case}, {cut}", flush=True)
    print(f"{wrong} of {len(asked)} wrong; largest errors {worst}", flush=True)
    return wrong == 0


@dataclass(frozen=True, slots=True)
class Product:
    op: str
    outputs: int
    inputs: int


LLAMA_8B = (
    Product("norm_rotary_linear", 6144, 4096),
    Product("linear_add", 4096, 4096),
    Product("norm_gated_linear", 28672, 4096),
    Product("linear_add", 4096, 14336),
)


class Chain:
    """Layers of four products, each of which reads what the one before it wrote."""

    def __init__(self, form: Form, rows: int) -> None:
        generator = torch.Generator(DEVICE).manual_seed(rows)
        size = sum(p.outputs * p.inputs for p in LLAMA_8B) // (2 if form.name == "int4" else 1)
        self.bytes = size + sum(p.outputs * (2 * p.inputs // form.group if form.group else 4) for p in LLAMA_8B)
        self.layers = [
            [form.draw(p.outputs, p.inputs, generator) for p in LLAMA_8B] for _ in range(LAYER_BYTES // size)
        ]
        self.given = [Operands(p.op, rows, p.outputs, p.inputs, torch.bfloat16, generator) for p in LLAMA_8B]
        self.x = self.given[0].x
        for given in self.given:
            given.bias = None

    def run(self, cuts: Sequence[Cut]) -> None:
        multiply = [StreamCoded(lambda _, cut=cut: cut) for cut in cuts]
        x = self.x
        for layer in self.layers:
            residual = x
            for place, (given, codes, function) in enumerate(zip(self.given, layer, multiply, strict=True)):
                made = given.call(codes, x.flatten(1), residual)
                y = function(made)
                assert y is not None, f"{made.codes.weight.shape}: {cuts[place]} cannot be"
                x = y
                if given.op == "linear_add":
                    residual = y

    def options(self, place: int) -> list[Cut]:
        return list(possible(self.given[place].call(self.layers[0][place])))

    def seconds(self, cuts: Sequence[Cut]) -> float:
        """Of a layer."""
        return timed(lambda: self.run(cuts)) / len(self.layers)


def timed(run: Callable[[], None]) -> float:
    """Seconds of what is launched, the median of replays of its graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def compile_all(chain: Chain, lists: Sequence[Sequence[Cut]]) -> None:
    def one(job: tuple[int, Cut]) -> None:
        torch.cuda.set_device(0)
        place, cut = job
        StreamCoded(lambda _: cut)(chain.given[place].call(chain.layers[0][place]))

    with ThreadPoolExecutor(12) as executor:
        list(executor.map(one, [(place, cut) for place, cuts in enumerate(lists) for cut in cuts]))
    torch.cuda.synchronize()


def time_chain(form: Form, rows: int, uniform: Sequence[Cut], descend: bool) -> None:
    chain = Chain(form, rows)
    lists = [[cut for cut in uniform if cut in chain.options(place)] for place in range(4)]
    compile_all(chain, lists)
    results: dict[tuple[Cut, ...], float] = {}
    for cut in uniform:
        cuts = tuple(cut if cut in options else options[0] for options in lists)
        if cuts not in results:
            results[cuts] = chain.seconds(cuts)
    best = min(results, key=results.__getitem__)
    line = ", ".join(f"{short(cuts[0])} {seconds * 1e6:.1f}" for cuts, seconds in results.items())
    print(f"{form.name} {form.group} {rows} rows, us a layer: {line}", flush=True)
    seconds = results[best]
    if descend:
        for place, options in enumerate(lists):
            for cut in options:
                trial = (*best[:place], cut, *best[place + 1 :])
                if trial != best and (taken := chain.seconds(trial)) < 0.998 * seconds:
                    best, seconds = trial, taken
    rate = chain.bytes / seconds / 1e12
    print(
        f"  best {seconds * 1e6:.1f} us = {seconds * 32e3:.3f} ms, {rate:.2f} TB/s: {' | '.join(map(short, best))}",
        flush=True,
    )


def short(cut: Cut) -> str:
    """blocks/slices/room, with s where x is streamed and w for 16 warps."""
    return f"{cut.blocks}/{cut.slices}/{cut.room}{'' if cut.resident else 's'}{'w' if cut.warps == 16 else ''}"


def time_one(form: Form, outputs: int, inputs: int, cuts: Sequence[Cut]) -> None:
    generator = torch.Generator(DEVICE).manual_seed(1)
    copies = [form.draw(outputs, inputs, generator) for _ in range(4)]
    given = Operands("linear", 1, outputs, inputs, torch.bfloat16, generator)
    found = []
    for cut in cuts:
        multiply = StreamCoded(lambda _, cut=cut: cut)
        seconds = timed(lambda m=multiply: [m(given.call(codes)) for codes in copies * 4]) / 16
        size = (
            copies[0].weight.numel() * copies[0].weight.element_size()
            + copies[0].scale.numel() * copies[0].scale.element_size()
        )
        found.append(f"{short(cut)} {seconds * 1e6:.1f} us {size / seconds / 1e12:.2f} TB/s")
    print(f"{form.name} {outputs} x {inputs}: {', '.join(found)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--time", nargs="*", choices=("e4m3", "int8", "int4"))
    arguments = parser.parse_args()
    if arguments.check and not check_all():
        sys.exit(1)
    for name in arguments.time or ():
        form = Form(name, 128 if name == "int4" else 0)
        sizes = ((2, 1, HALF), (1, 2, HALF), (2, 1, MOST), (1, 2, MOST), (2, 2, MOST), (4, 1, MOST), (2, 1, WHOLE))
        cuts = [Cut(*size) for size in sizes] + [Cut(blocks, 1, MOST, True, 16) for blocks in (1, 2, 4)]
        time_chain(form, 1, cuts, descend=True)
        for rows in (8, 16):
            few = [Cut(blocks, 1, room) for blocks, room in ((2, HALF), (2, WHOLE), (1, WHOLE))]
            time_chain(form, rows, [*few, Cut(2, 1, WHOLE, False), Cut(1, 1, WHOLE, False)], descend=False)
        if name == "int4":
            time_one(form, 73728, 12288, [Cut(blocks, 1, room) for blocks, room in every((2, 4), (MOST, WHOLE))])


if __name__ == "__main__":
    main()
