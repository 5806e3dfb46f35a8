"""Checks and times products of many rows over four-bit weights on a GPU: `python bench/coded_w4.py check`, or `time`.

`check` holds every epilogue, group size and way of cutting to the reference, first with one-hot rows, whose products
are the weights themselves. `time` gives microseconds of llama-3.1-8b's products and of a chain of layers; `compile`
makes the kernels that `time` needs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from plexor.api import (
    Call,
    Norm,
    Rotation,
    added_call,
    gated_call,
    product_call,
    rms_norm,
    rotary_kv_write,
    rotated_call,
)
from plexor_quant.kernels.cuda.coded import Activations, CodedCall, Codes
from plexor_quant.kernels.cuda.w4 import Prepared, W4Linear, prepare
from plexor_quant.kernels.cuda.w4_layout import MOST_COLUMNS, W4Cut, lies_well, rule
from plexor_quant.packing import pack, widen
from plexor_quant.rounding import round_e4m3

DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
EPS = 1e-5
HEAD = 128
HEADS, KV_HEADS = 32, 8
HIDDEN, INNER = 4096, 14336
SHAPES = {
    "qkv": ((HEADS + 2 * KV_HEADS) * HEAD, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate_up": (2 * INNER, HIDDEN),
    "down": (HIDDEN, INNER),
}
LAYERS = 8
"""Enough that their weights do not stay in the second-level cache."""

EPILOGUES = ("store", "add", "gated", "rotary")


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix of nibbles: packed, scales, zero points or none, and how many inputs share a scale."""

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    group_size: int

    @classmethod
    def draw(
        cls, outputs: int, inputs: int, group_size: int = 128, *, zero: bool = False, exact: bool = False
    ) -> Weight:
        """exact: scales are powers of two, so that sums of one product need no rounding."""
        groups = -(-inputs // group_size)
        codes = torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8, device=DEVICE)
        scale = torch.rand(outputs, groups, device=DEVICE) + 0.5
        scale = (
            torch.exp2(torch.randint(-3, 4, scale.shape, device=DEVICE).float()) if exact else scale / inputs**0.5 / 4
        )
        zeros = torch.randint(0, 16, (outputs, groups), dtype=torch.uint8, device=DEVICE) if zero else None
        return cls(pack(codes), scale.to(torch.bfloat16), zeros, group_size)

    def dense(self) -> Tensor:
        inputs = 2 * self.packed.shape[1]
        return widen(self.packed, self.scale, inputs, self.group_size, self.zero)

    def coded(self, call: Call | None, rounds: bool) -> CodedCall:
        assert call is not None
        codes = Codes(self.packed, self.scale, self.zero, self.group_size)
        coded = CodedCall(call, codes, Activations.E4M3 if rounds else Activations.AS_THEY_ARE)
        assert coded.lies_well()
        assert lies_well(coded)
        return coded


class Inputs:
    """What epilogues need besides a product, for so many rows."""

    def __init__(
        self, rows: int, hidden: int, kv_heads: int, dtype: torch.dtype = DTYPE, head_size: int = HEAD
    ) -> None:
        half = head_size // 2
        angle = torch.arange(rows + 9, device=DEVICE).unsqueeze(1) * 10000.0 ** (
            -torch.arange(half, device=DEVICE) / half
        )
        slots = torch.randperm(2 * rows, device=DEVICE)[:rows]
        slots[::7] = -1
        entries = (-(-2 * rows // 16), 16, kv_heads, head_size)
        self.cache = {part: torch.zeros(entries, dtype=dtype, device=DEVICE) for part in ("keys", "values")}
        self.rotation = Rotation(angle.cos(), angle.sin(), torch.arange(rows, device=DEVICE) + 9, slots, self.cache)
        self.norm = Norm((1 + 0.1 * torch.randn(hidden, device=DEVICE)).to(dtype), EPS)

    def call(
        self, epilogue: str, x: Tensor, weight: Tensor, residual: Tensor | None, *, normed: bool = True
    ) -> Call | None:
        norm = self.norm if normed else None
        if epilogue == "add":
            assert residual is not None
            return added_call(x, weight, residual, None)
        if epilogue == "gated":
            return gated_call(x, weight, self.norm, None)
        if epilogue == "rotary":
            return rotated_call(x, weight, self.norm, None, self.rotation)
        return product_call(x, weight, norm)


def product(x: Tensor, weight: Weight, rounds: bool) -> Tensor:
    """The reference's product, in float32."""
    if not rounds:
        return x.float() @ weight.dense().T
    codes, scale = round_e4m3(x)
    return codes.float() @ weight.dense().T * scale


def expected(
    epilogue: str, inputs: Inputs, x: Tensor, weight: Weight, residual: Tensor, rounds: bool
) -> tuple[Tensor, ...]:
    normed = x if epilogue == "add" else rms_norm(x, inputs.norm.gain, EPS)
    y = product(normed, weight, rounds)
    if epilogue == "add":
        return (residual + y.to(x.dtype),)
    if epilogue == "gated":
        first, second = y.to(x.dtype).float().chunk(2, dim=1)
        return ((functional.silu(first) * second).to(x.dtype),)
    if epilogue == "store":
        return (y.to(x.dtype),)
    kv_heads, head_size = inputs.cache["keys"].shape[2:]
    heads = y.to(x.dtype).unflatten(1, (-1, head_size))
    q, k, v = heads.split((heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    where = inputs.rotation
    for entries in inputs.cache.values():
        entries.zero_()
    y = rotary_kv_write(q, k, v, where.cos, where.sin, where.positions, where.slots, inputs.cache)
    return (y.reshape(x.shape[0], -1), *(entries.clone() for entries in inputs.cache.values()))


def check_case(
    rows: int,
    outputs: int,
    inputs: int,
    epilogue: str,
    cut: W4Cut | None,
    rounds: bool,
    weight: Weight,
    dtype: torch.dtype,
    head_size: int = HEAD,
) -> None:
    """AssertionError where the kernels do not agree with the reference."""
    x = torch.randn(rows, inputs + 8, device=DEVICE).to(dtype)[:, :inputs]
    x[0] = 0
    x[-1, inputs // 2] = 60
    kv_heads = outputs // head_size // 4
    around = Inputs(rows, inputs, kv_heads, dtype, head_size)
    residual = torch.randn(rows, outputs, device=DEVICE).to(dtype)
    wanted = expected(epilogue, around, x, weight, residual, rounds)
    for entries in around.cache.values():
        entries.zero_()
    call = weight.coded(around.call(epilogue, x, weight.packed, residual), rounds)
    linear = W4Linear()
    for _ in range(2):
        linear.launch(call, cut or rule(call))
    got = [call.call.y.reshape(rows, -1)]
    if epilogue == "rotary":
        got += list(around.cache.values())
    tolerance = 1.6e-2 if dtype == torch.bfloat16 else 6e-3
    for ours, theirs in zip(got, wanted, strict=True):
        # A norm's last bit may move a number of x to the next e4m3, and the largest one all numbers of a row.
        off = (ours.float() - theirs.float()).abs()
        share = 1 - float((off <= tolerance * (1 + theirs.float().abs())).float().mean())
        assert share < 1e-3, f"{share:.2%} of the numbers are off, by {float(off.max()):.3g} at most"


def check_one_hot(group_size: int, rounds: bool, cut: W4Cut, inputs: int) -> None:
    """Rows of x with a single one give the columns of the weight, exactly."""
    weight = Weight.draw(256, inputs, group_size, exact=True)
    x = torch.eye(inputs, dtype=DTYPE, device=DEVICE)
    call = weight.coded(product_call(x, weight.packed), rounds)
    W4Linear().launch(call, cut)
    wanted = weight.dense().T.to(DTYPE)
    if not torch.equal(call.call.y, wanted):
        wrong = (call.call.y != wanted).nonzero()
        first = [(int(m), int(n), float(call.call.y[m, n]), float(wanted[m, n])) for m, n in wrong[:6]]
        print("WRONG one-hot, (input, output, ours, wanted):", first, f"{len(wrong)} of {wanted.numel()}")
        print(
            "wrong inputs", sorted({int(m) for m, _ in wrong})[:40], "outputs", sorted({int(n) for _, n in wrong})[:40]
        )
        raise AssertionError


def check_rounding(rows: int, inputs: int, dtype: torch.dtype) -> None:
    """Rows are rounded as the reference rounds them, but for their order and the last bit of few quotients."""
    x = torch.randn(rows, inputs, device=DEVICE).to(dtype)
    x[0] = 0
    codes, scale = round_e4m3(x)
    ready = prepare(x, None, True, None, MOST_COLUMNS)
    assert ready.scale is not None
    assert torch.equal(ready.scale, scale.flatten()), "scales differ"
    # Of 32 features: place 16 h + 4 t + i holds feature 8 t + 4 h + i.
    ordered = codes.float().reshape(rows, -1, 4, 2, 4).transpose(2, 3).reshape(rows, inputs)
    share = float((ready.x.float() != ordered).float().mean())
    assert share < 1e-5, f"{share:.2%} of the codes differ"


def check() -> None:
    bf16, fp16 = torch.bfloat16, torch.float16
    one_hot = (
        (128, True, W4Cut(128), 512),
        (128, True, W4Cut(128), 640),
        (128, True, W4Cut(32, 2), 512),
        (64, True, W4Cut(64), 512),
        (32, True, W4Cut(64), 288),
        (128, False, W4Cut(64), 512),
        (32, False, W4Cut(32), 544),
    )
    failures = attempt("rounding of bf16", partial(check_rounding, 300, 14336, bf16))
    failures += attempt("rounding of fp16", partial(check_rounding, 17, 288, fp16))
    for group_size, rounds, cut, inputs in one_hot:
        label = f"one-hot {inputs} inputs, groups of {group_size}, {'e4m3' if rounds else 'bf16'}, {cut}"
        failures += attempt(label, partial(check_one_hot, group_size, rounds, cut, inputs))
    # rows, outputs, inputs, epilogue, cut, rounds, group size, zero points, dtype
    cases: tuple[tuple[int, int, int, str, W4Cut | None, bool, int, bool, torch.dtype], ...] = (
        (17, 1024, 1024, "store", W4Cut(32), True, 128, False, bf16),
        (33, 1024, 1152, "add", W4Cut(64, 2), True, 128, False, bf16),
        (64, 1536, 4096, "rotary", W4Cut(64, 2), True, 128, False, bf16),
        (100, 2048, 1024, "gated", W4Cut(128, 2), True, 128, False, bf16),
        (128, 1536, 512, "rotary", W4Cut(128), True, 128, True, bf16),
        (256, 1024, 1024, "add", W4Cut(128, 2), True, 128, False, bf16),
        (300, 2048, 1024, "gated", W4Cut(128), True, 128, True, bf16),
        (2048, 6144, 4096, "rotary", W4Cut(128), True, 128, False, bf16),
        (2048, 28672, 1024, "gated", W4Cut(128), True, 128, False, bf16),
        (1500, 4096, 896, "add", W4Cut(128), True, 64, False, bf16),
        (100, 1024, 1056, "store", W4Cut(64), True, 32, True, bf16),
        (100, 1024, 1056, "gated", W4Cut(64), True, 4096, True, fp16),
        (64, 1536, 1024, "rotary", W4Cut(64, 2), False, 128, False, bf16),
        (200, 1024, 1024, "add", W4Cut(128), False, 64, True, bf16),
        (33, 1024, 1024, "gated", W4Cut(64, 2), False, 32, False, fp16),
        (256, 4096, 14336, "add", None, True, 128, False, bf16),
    )
    for rows, outputs, inputs, epilogue, chosen, rounds, group_size, zero, dtype in cases:
        weight = Weight.draw(outputs, inputs, group_size, zero=zero)
        label = f"{rows} rows {outputs} x {inputs} {epilogue} groups of {group_size} zero {zero} e4m3 {rounds} {chosen}"
        case = partial(check_case, rows, outputs, inputs, epilogue, chosen, rounds, weight, dtype)
        failures += attempt(label, case)
    small_heads = Weight.draw(1536, 1024)
    for rows in (17, 200):
        case = partial(check_case, rows, 1536, 1024, "rotary", None, True, small_heads, bf16, 64)
        failures += attempt(f"{rows} rows, heads of 64", case)
    print(f"{failures} of {4 + len(one_hot) + len(cases)} checks failed", flush=True)
    if failures:
        sys.exit(1)


def attempt(label: str, run: Callable[[], None]) -> int:
    """1 if it fails, said in a line."""
    try:
        run()
        torch.cuda.synchronize()
    except AssertionError as error:
        print("WRONG", label, "|", " ".join(str(error).split())[:200], flush=True)
        return 1
    return 0


def time_graph(run: Callable[[], object], rounds: int = 7) -> float:
    """Microseconds of a replay, median."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    times: list[float] = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return median(times)


def cuts(rows: int, inputs: int) -> Sequence[W4Cut]:
    """What is worth timing."""
    if rows > 128:
        found = [W4Cut(128), W4Cut(128, 2)]
    elif rows > 64:
        found = [W4Cut(128), W4Cut(128, 2), W4Cut(64), W4Cut(64, 2)]
    else:
        found = [W4Cut(64), W4Cut(64, 2), W4Cut(32), W4Cut(32, 2)]
    return [cut for cut in found if cut.fits(inputs)]


class Timer:
    """Products of so many rows, each over the weights of several layers."""

    def __init__(self, weights: Mapping[str, Sequence[Weight]], rows: int, rounds: bool) -> None:
        self._weights = weights
        self._rows = rows
        self._rounds = rounds
        self._repeats = LAYERS if rows <= 512 else 2
        self._around = Inputs(rows, HIDDEN, KV_HEADS)
        self._residual = torch.randn(rows, HIDDEN, device=DEVICE).to(DTYPE)
        self._linears = {name: [W4Linear() for _ in range(LAYERS)] for name in SHAPES}
        self._best: dict[str, W4Cut] = {}

    def time(self, names: Sequence[str]) -> None:
        """The products of these names, and a chain of layers if they are all."""
        for name in names:
            print(self._time_product(name), flush=True)
        if set(names) != set(SHAPES):
            return
        microseconds = time_graph(self._run_layers) / self._repeats
        print(f"T {self._rows} a layer in a chain, prepared and multiplied: {microseconds:.1f} us", flush=True)

    def compile(self, names: Sequence[str]) -> None:
        """Make what is timed, so that several processes can do so at once."""
        for name in names:
            _, inputs = SHAPES[name]
            x = torch.zeros(self._rows, inputs, dtype=DTYPE, device=DEVICE)
            call = self._call(name, self._weights[name][0], x, self._residual)
            for cut in cuts(self._rows, inputs):
                self._linears[name][0].launch(call, cut)

    def _time_product(self, name: str) -> str:
        outputs, inputs = SHAPES[name]
        x = torch.randn(self._rows, inputs, device=DEVICE).to(DTYPE)
        calls = [self._call(name, weight, x, self._residual) for weight in self._weights[name][: self._repeats]]
        figures = []
        for cut in cuts(self._rows, inputs):
            ready = prepare(x, calls[0].call.norm, self._rounds, None, cut.columns)

            def run(ready: Prepared = ready, cut: W4Cut = cut) -> None:
                for linear, call in zip(self._linears[name], calls, strict=False):
                    linear.multiply(call, ready, cut)

            figures.append((time_graph(run) / self._repeats, cut))
        figures.sort(key=lambda figure: figure[0])
        quickest, self._best[name] = figures[0]

        def run_prepare() -> None:
            for _ in range(self._repeats):
                prepare(x, calls[0].call.norm, self._rounds, None, MOST_COLUMNS)

        before = time_graph(run_prepare) / self._repeats
        shown = "  ".join(f"{c.columns}/{c.split} {t:.1f}" for t, c in figures)
        return (
            f"T {self._rows} {name:<8} {2 * self._rows * outputs * inputs / quickest / 1e6:.0f} TFLOP/s "
            f"{outputs * inputs * 0.516 / quickest / 1e6:.2f} TB/s | prepare {before:.1f} "
            f"| us: {shown} | rule {rule(calls[0])}"
        )

    def _run_layers(self) -> None:
        x = self._residual
        for layer in range(self._repeats):
            for first, second in (("qkv", "o"), ("gate_up", "down")):
                inner = self._launch(first, layer, x, x)
                x = self._launch(second, layer, inner.flatten(1), x)

    def _launch(self, name: str, layer: int, x: Tensor, residual: Tensor) -> Tensor:
        call = self._call(name, self._weights[name][layer], x, residual)
        self._linears[name][layer].launch(call, self._best[name])
        return call.call.y

    def _call(self, name: str, weight: Weight, x: Tensor, residual: Tensor) -> CodedCall:
        epilogue = {"qkv": "rotary", "gate_up": "gated"}.get(name, "add")
        return weight.coded(self._around.call(epilogue, x, weight.packed, residual), self._rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("check", "time", "compile"))
    parser.add_argument("--rows", nargs="+", type=int, default=(64, 128, 256, 8192))
    parser.add_argument("--products", nargs="+", choices=tuple(SHAPES), default=tuple(SHAPES))
    parser.add_argument("--kept", action="store_true", help="x is multiplied as it is, not rounded to e4m3")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    if arguments.what == "check":
        torch.manual_seed(1)
        check()
    else:
        torch.manual_seed(0)
        weights = {
            name: [Weight.draw(*sizes) for _ in range(LAYERS)]
            for name, sizes in SHAPES.items()
            if name in arguments.products
        }
        for rows in arguments.rows:
            timer = Timer(weights, rows, not arguments.kept)
            (timer.time if arguments.what == "time" else timer.compile)(arguments.products)


if __name__ == "__main__":
    main()
