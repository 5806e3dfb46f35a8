"""Checks and times products of 17 rows and more over dense, e4m3 and int8 weights: `coded_wide.py check e4m3 long`.

check compares every epilogue with float64 on fresh random operands. e4m3, int8 and dense print how long a chain of a
layer's products takes with each cut, as in a decode step; the quickest stay while the next product's are tried. long
times what a prompt of 8192 tokens multiplies and rounds. Needs a GPU of compute capability 9.0.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from plexor.api import (
    Call,
    Norm,
    PlexorError,
    Rotation,
    TiledCut,
    TiledLinear,
    TiledScales,
    added_call,
    gated_call,
    product_call,
    rms_norm,
    rotated_call,
    silu_mul,
)
from plexor.kernels.measure import Layer, tune
from plexor.kernels.reference.rotary_kv_write import rotary_kv_write
from plexor.kernels.tuning import Product
from plexor_quant.kernels.triton.round_rows import round_normed, round_rows
from plexor_quant.rounding import round_e4m3, round_int8

CUDA = torch.device("cuda", 0)
E4M3, INT8, DENSE = torch.float8_e4m3fn, torch.int8, torch.bfloat16
ROUND = {E4M3: round_e4m3, INT8: round_int8}
EPS = 1e-5
LAYERS = 6
COMPILERS = 16
PATIENCE = 12
"""Seconds after which no further product is checked."""
Cuts = tuple[TiledCut, ...]


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight [N, K] as it is multiplied, and its scales if it holds codes."""

    numbers: Tensor
    scale: Tensor | None


@dataclass(frozen=True, slots=True)
class Heads:
    """What norm_rotary writes to."""

    rotation: Rotation
    num_heads: int
    size: int


def draw_weight(outputs: int, inputs: int, dtype: torch.dtype) -> Weight:
    dense = torch.randn(outputs, inputs, device=CUDA, dtype=DENSE) / inputs**0.5
    if dtype == DENSE:
        return Weight(dense, None)
    codes, scale = ROUND[dtype](dense)
    return Weight(codes, scale.squeeze(1))


def draw_heads(num_rows: int, num_heads: int, num_kv_heads: int, size: int, cache: torch.dtype = DENSE) -> Heads:
    blocks = num_rows // 16 + 2
    keys, values = (torch.zeros(blocks, 16, num_kv_heads, size, device=CUDA).to(cache) for _ in range(2))
    angles = torch.rand(4096, size // 2, device=CUDA) * 6
    positions = torch.randint(0, 4096, (num_rows,), device=CUDA)
    slots = torch.randperm(blocks * 16, device=CUDA)[:num_rows]
    slots[::7] = -1
    rotation = Rotation(angles.cos(), angles.sin(), positions, slots, {"keys": keys, "values": values})
    return Heads(rotation, num_heads, size)


def prepare(x: Tensor, gain: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """What is multiplied for x, normed where there is a gain, and the scales of its rows."""
    if dtype == DENSE:
        return (x if gain is None else rms_norm(x, gain, EPS)), None
    return round_rows(x, dtype) if gain is None else round_normed(x, gain, EPS, dtype)


def launch(tiled: TiledLinear, call: Call, weight: Weight, gain: Tensor | None, cut: TiledCut) -> Tensor:
    x, token_scale = prepare(call.x, gain, weight.numbers.dtype)
    scales = None
    if token_scale is not None and weight.scale is not None:
        scales = TiledScales(token_scale, weight.scale)
    tiled.launch(replace(call, x=x, norm=None), cut, scales)
    return call.y


# --- check


def check() -> None:
    torch.manual_seed(0)
    check_rounding()
    cuts = [(rows, cut) for rows, some in CHECKED.items() for cut in some]
    cases = [
        (dtype, *case, epilogue)
        for dtype, shown in ((E4M3, cuts), (INT8, cuts[::2]), (DENSE, cuts[1::2]))
        for case in shown
        for epilogue in ("store", "add", "gated", "rotary")
    ]
    random.Random(0).shuffle(cases)
    began = time.perf_counter()

    def error_of(case: tuple[torch.dtype, int, TiledCut, str]) -> float | None:
        return worst(*case) if time.perf_counter() - began < PATIENCE else None

    with ThreadPoolExecutor(COMPILERS) as pool:
        errors = list(pool.map(error_of, cases))
    wrong = [(case, error) for case, error in zip(cases, errors, strict=True) if error is not None and not error < 6e-3]
    for case, error in wrong[:20]:
        print(f"WRONG: {case}: {error}")
    if wrong:
        raise SystemExit(f"{len(wrong)} of {len(cases)} products are wrong")
    took = time.perf_counter() - began
    print(f"{len(errors) - errors.count(None)} products agree with float64 to 6e-3 of the whole, {took:.0f} s")


CHECKED = {
    17: (TiledCut(64), TiledCut(96, 2), TiledCut(64, 1, 2)),
    31: (TiledCut(128, 4), TiledCut(32, 2, 2)),
    64: (TiledCut(224), TiledCut(128, 2, 2), TiledCut(256, 1, 2), TiledCut(32, 1, 4)),
    100: (TiledCut(112), TiledCut(96, 2), TiledCut(256), TiledCut(64, 2, 2)),
    256: (TiledCut(112, 1, 2), TiledCut(64, 3), TiledCut(64, 2, 2), TiledCut(128, 1, 4)),
    300: (TiledCut(128, 1, 2), TiledCut(96)),
    2100: (TiledCut(128, 1, 2), TiledCut(64)),
}


def worst(dtype: torch.dtype, rows: int, cut: TiledCut, epilogue: str) -> float | None:
    """The error of a product's result, as a part of the result's size; None for a cut that does not fit."""
    inputs, heads = 1152, (draw_heads(rows, 5, 2, 128, E4M3 if rows % 2 else DENSE) if epilogue == "rotary" else None)
    outputs = {"store": 1040, "add": 1072, "gated": 2 * 672, "rotary": 9 * 128}[epilogue]
    weight = draw_weight(outputs, inputs, dtype)
    x = torch.randn(rows, inputs + 8, device=CUDA, dtype=DENSE)[:, :inputs]
    gain = torch.randn(inputs, device=CUDA, dtype=DENSE) if epilogue in ("gated", "rotary") else None
    bias = torch.randn(outputs, device=CUDA, dtype=DENSE) if rows % 4 == 0 else None
    residual = torch.randn(rows, outputs, device=CUDA, dtype=DENSE)
    call = make_call(epilogue, x, weight, bias, residual, gain, heads)
    if not cut.fits(rows, outputs, inputs * weight.numbers.element_size() // 128, call.pair):
        return None
    call.y.fill_(float("nan"))
    got = [launch(TiledLinear(), call, weight, gain, cut)]
    multiplied, token_scale = prepare(x, gain, dtype)
    whole = multiplied.double() @ weight.numbers.double().T
    if token_scale is not None and weight.scale is not None:
        whole = whole * token_scale.double() * weight.scale.double()
    whole = whole if bias is None else whole + bias.double()
    if epilogue == "add":
        want = [whole + residual.double()]
    elif epilogue == "gated":
        gate, up = whole.chunk(2, dim=1)
        want = [functional.silu(gate) * up]
    elif heads is not None:
        want = turned(whole, heads)
        kept = heads.rotation.slots >= 0
        places = heads.rotation.slots[kept]
        for name in ("keys", "values"):
            entries = heads.rotation.cache[name].flatten(0, 1)
            got.append(entries.view(torch.uint8)[places].view(E4M3) if entries.dtype == E4M3 else entries[places])
    else:
        want = [whole]
    torch.cuda.synchronize()
    narrow = [entry.to(E4M3).double() if g.dtype == E4M3 else entry for g, entry in zip(got, want, strict=True)]
    errors = [((g.double() - w).norm() / w.norm()).item() for g, w in zip(got, narrow, strict=True)]
    # A number on the border between two of e4m3 may fall to either side.
    return max(error / (8 if g.dtype == E4M3 else 1) for g, error in zip(got, errors, strict=True))


def turned(whole: Tensor, heads: Heads) -> list[Tensor]:
    """Queries, and the keys and values of the rows that have a slot, by the reference."""
    rotation, num_rows = heads.rotation, whole.shape[0]
    num_kv_heads = rotation.cache["keys"].shape[2]
    q, k, v = whole.to(DENSE).unflatten(1, (-1, heads.size)).split((heads.num_heads, num_kv_heads, num_kv_heads), dim=1)
    cache = {
        name: torch.zeros(num_rows, 1, num_kv_heads, heads.size, device=CUDA, dtype=DENSE)
        for name in ("keys", "values")
    }
    slots = torch.arange(num_rows, device=CUDA)
    queries = rotary_kv_write(q, k, v, rotation.cos, rotation.sin, rotation.positions, slots, cache)
    kept = rotation.slots >= 0
    return [queries.double(), *(cache[name].flatten(0, 1)[kept].double() for name in ("keys", "values"))]


def make_call(
    epilogue: str,
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    residual: Tensor,
    gain: Tensor | None,
    heads: Heads | None,
) -> Call:
    norm = None if gain is None else Norm(gain, EPS)
    if epilogue == "add":
        return added_call(x, weight.numbers, residual, bias)
    if epilogue == "gated" and norm is not None:
        return gated_call(x, weight.numbers, norm, bias)
    if heads is not None and norm is not None:
        call = rotated_call(x, weight.numbers, norm, bias, heads.rotation)
        assert call is not None
        return call
    return product_call(x, weight.numbers, norm, bias)


def check_rounding() -> None:
    for dtype, by_torch in ROUND.items():
        for size in (128, 1000, 14336):
            x = torch.randn(33, 2 * size, device=CUDA, dtype=DENSE) * torch.rand(33, 1, device=CUDA, dtype=DENSE)
            x[3] = 0
            gain = torch.randn(2 * size, device=CUDA, dtype=DENSE)
            for name, got, dense in (
                ("rows", round_rows(x, dtype), x),
                ("normed", round_normed(x, gain, EPS, dtype), rms_norm(x, gain, EPS)),
            ):
                want = [part.to(CUDA) for part in by_torch(dense.cpu())]  # where a division is one
                off = (got[0].float() != want[0].float()).double().mean().item()
                apart = (got[1] / want[1] - 1).abs().max().item()
                if off > 1e-2 or apart > 1e-2:
                    raise SystemExit(f"WRONG: {name} {size} {dtype}: {off:.1e} of the codes, scales by {apart:.1e}")
                if off:
                    print(f"{name} {size} {dtype}: {off:.1e} of the codes differ, scales by {apart:.1e}")


# --- time

NARROW = ((64, 2, 1), (64, 2, 2), (128, 4, 1), (128, 3, 1), (128, 4, 2), (96, 3, 1), (32, 1, 4))
CANDIDATES = {
    "qkv": ((96, 2, 1), (96, 2, 2), (128, 2, 1), (128, 2, 2), (64, 1, 2), (64, 1, 1)),
    "o": NARROW,
    "gate_up": ((224, 1, 1), (224, 1, 2), (112, 1, 1), (112, 1, 2), (112, 1, 4), (128, 1, 1), (128, 1, 2), (256, 1, 1)),
    "down": NARROW,
}
NAMES = tuple(CANDIDATES)
SIZES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
PAIRS = {"qkv": 64, "o": None, "gate_up": 14336, "down": None}
EPILOGUES = {"qkv": "rotary", "o": "add", "gate_up": "gated", "down": "add"}


class Chain:
    """The products of some layers of llama-3.1-8b, each with what comes before it."""

    def __init__(self, dtype: torch.dtype, num_rows: int, weights: Sequence[dict[str, Weight]]) -> None:
        self.num_rows, self._dtype, self._weights = num_rows, dtype, weights
        self._heads = draw_heads(num_rows, 32, 8, 128)
        self._gain = torch.ones(4096, device=CUDA, dtype=DENSE)
        self._x = torch.randn(num_rows, 4096, device=CUDA, dtype=DENSE)
        self._tiled = [{name: TiledLinear() for name in NAMES} for _ in weights]

    def possible(self, name: str) -> list[TiledCut]:
        outputs, inputs = SIZES[name]
        boxes = inputs * torch.empty(0, dtype=self._dtype).element_size() // 128
        cuts = [TiledCut(*cut) for cut in CANDIDATES[name]]
        return [cut for cut in cuts if cut.fits(self.num_rows, outputs, boxes, PAIRS[name])]

    def run(self, cuts: dict[str, TiledCut]) -> Tensor:
        x = self._x
        for weights, tiled in zip(self._weights, self._tiled, strict=True):
            q = self._product("qkv", x, x, weights, tiled, cuts)
            x = self._product("o", q.flatten(1), x, weights, tiled, cuts)
            y = self._product("gate_up", x, x, weights, tiled, cuts)
            x = self._product("down", y, x, weights, tiled, cuts)
        return x

    def _product(
        self,
        name: str,
        x: Tensor,
        residual: Tensor,
        weights: dict[str, Weight],
        tiled: dict[str, TiledLinear],
        cuts: dict[str, TiledCut],
    ) -> Tensor:
        gain = self._gain if name in ("qkv", "gate_up") else None
        heads = self._heads if name == "qkv" else None
        call = make_call(EPILOGUES[name], x, weights[name], None, residual, gain, heads)
        return launch(tiled[name], call, weights[name], gain, cuts[name])

    def compile(self) -> None:
        """All cuts at once, in threads; what a cut needs is kept by the programs' cache."""
        jobs = [(name, cut) for name in NAMES for cut in self.possible(name)]

        def make(job: tuple[str, TiledCut]) -> None:
            name, cut = job
            x = torch.randn(self.num_rows, SIZES[name][1], device=CUDA, dtype=DENSE)
            try:
                self._product(name, x, self._x, self._weights[0], self._tiled[0], {name: cut})
            except PlexorError as error:
                print(f"{name} {cut}: {error}")

        make(jobs[0])  # Triton's kernels too, which threads would compile several times
        with ThreadPoolExecutor(COMPILERS) as pool:
            list(pool.map(make, jobs))
        torch.cuda.synchronize()


def time_chains(dtype: torch.dtype, row_counts: Sequence[int]) -> None:
    weights = [{name: draw_weight(*SIZES[name], dtype) for name in NAMES} for _ in range(LAYERS)]
    for num_rows in row_counts:
        chain = Chain(dtype, num_rows, weights)
        chain.compile()
        descend(chain, str(dtype).removeprefix("torch."))


def tune_dense() -> None:
    """As `plexor tune` for the layers of llama-3.1-8b; the library is among what is tried."""
    ops = {"qkv": "norm_rotary_linear", "o": "linear_add", "gate_up": "norm_gated_linear", "down": "linear_add"}
    heads = {"qkv": (128, 8)}
    layers = [Layer(Product(ops[name], *SIZES[name], "bfloat16"), *heads.get(name, ())) for name in NAMES]
    for tuned in tune(layers, (64, 256), CUDA):
        print(tuned, flush=True)


def descend(chain: Chain, title: str) -> None:
    cuts = {name: chain.possible(name)[0] for name in NAMES}
    best = seconds(lambda: chain.run(cuts)) / LAYERS
    print(f"{title} {chain.num_rows} rows: begins with {best * 1e6:.1f} us a layer", flush=True)
    for name in NAMES:
        tried = {cuts[name]: best}
        for cut in chain.possible(name)[1:]:
            try:
                tried[cut] = seconds(partial(chain.run, {**cuts, name: cut})) / LAYERS
            except PlexorError:
                continue
        cuts[name] = min(tried, key=lambda cut: tried[cut])
        best = tried[cuts[name]]
        shown = " ".join(f"{c.outputs}/{c.split}/{c.share}={s * 1e6:.1f}" for c, s in tried.items())
        print(f"  {name}: {shown}", flush=True)
    print(f"  ends with {best * 1e6:.1f} us a layer, {differing(chain, cuts)} of 100 replays differ", flush=True)


def differing(chain: Chain, cuts: dict[str, TiledCut]) -> int:
    """Replays of a graph, whose kernels overlap, that give other results than the first time it ran."""
    results: list[Tensor] = []
    chain.run(cuts)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results.append(chain.run(cuts))
    graph.replay()
    expected, count = results[0].clone(), 0
    for _ in range(100):
        results[0].fill_(float("nan"))
        graph.replay()
        count += int(not torch.equal(results[0], expected))
    return count


def seconds(run: Callable[[], object], replays: int = 9) -> float:
    """Median of a graph's replays."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(replays + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[2:])


# --- long


def time_long() -> None:
    num_rows, repeats = 8192, 4
    one = torch.ones((), device=CUDA)
    for name, (outputs, inputs) in SIZES.items():
        x = torch.randn(num_rows, inputs, device=CUDA, dtype=DENSE)
        work = 2 * num_rows * outputs * inputs / 1e12
        variants: dict[str, Callable[[], object]] = {}
        dense = draw_weight(outputs, inputs, DENSE)
        residual = torch.randn(num_rows, outputs, device=CUDA, dtype=DENSE)
        heads = draw_heads(num_rows, 32, 8, 128) if name == "qkv" else None
        variants["bf16 library"] = lambda x=x, dense=dense: functional.linear(x, dense.numbers)
        for dtype in (DENSE, E4M3, INT8):
            weight = dense if dtype == DENSE else draw_weight(outputs, inputs, dtype)
            gain = torch.ones(inputs, device=CUDA, dtype=DENSE) if name in ("qkv", "gate_up") else None
            codes, token_scale = prepare(x, gain, dtype)
            call = make_call(EPILOGUES[name], x, weight, None, residual, gain, heads)
            scales = (
                TiledScales(token_scale, weight.scale) if token_scale is not None and weight.scale is not None else None
            )
            tiled, ready = TiledLinear(), replace(call, x=codes, norm=None)
            for cut in (TiledCut(128, 1, 2),) if dtype == DENSE else (TiledCut(128), TiledCut(128, 1, 2)):
                variants[f"{str(dtype)[6:10]} own/{cut.share}"] = (
                    lambda tiled=tiled, ready=ready, cut=cut, scales=scales: tiled.launch(ready, cut, scales)
                )
            if dtype == E4M3 and scales is not None:
                for fast in (True, False):
                    variants[f"rowwise {'fast' if fast else 'slow'}"] = lambda c=codes, w=weight, s=scales, f=fast: (
                        torch._scaled_mm(c, w.numbers.t(), s.tokens, s.outputs[None], out_dtype=DENSE, use_fast_accum=f)
                    )
                variants["tensorwise"] = lambda c=codes, w=weight: torch._scaled_mm(
                    c, w.numbers.t(), one, one, out_dtype=DENSE, use_fast_accum=True
                )
            if dtype == INT8:
                variants["int_mm"] = lambda c=codes, w=weight: torch._int_mm(c, w.numbers.t())
        with ThreadPoolExecutor(COMPILERS, initializer=torch.cuda.set_device, initargs=(CUDA,)) as pool:
            list(pool.map(lambda run: run(), [run for title, run in variants.items() if " own/" in title]))
        shown = []
        for title, run in variants.items():
            try:
                took = seconds(lambda run=run: [run() for _ in range(repeats)], 5) / repeats
            except (PlexorError, RuntimeError) as error:
                shown.append(f"{title} {type(error).__name__}")
                continue
            shown.append(f"{title} {took * 1e6:.0f}us {work / took:.0f}T")
        print(f"{name}: " + ", ".join(shown), flush=True)
    rows = torch.randn(num_rows, 28672, device=CUDA, dtype=DENSE)
    gain = torch.ones(4096, device=CUDA, dtype=DENSE)
    for dtype in (E4M3, INT8):
        for title, run, size in (
            ("rows of 4096", lambda d=dtype: round_rows(rows[:, :4096], d), 3 * 4096),
            ("rows of 14336", lambda d=dtype: round_rows(rows[:, :14336], d), 3 * 14336),
            ("normed 4096", lambda d=dtype: round_normed(rows[:, :4096], gain, EPS, d), 3 * 4096),
        ):
            took = seconds(lambda run=run: [run() for _ in range(repeats)], 5) / repeats
            print(f"{dtype} {title}: {took * 1e6:.1f} us, {num_rows * size / took / 1e12:.2f} TB/s")
    took = seconds(lambda: silu_mul(rows), 5)
    print(f"gate alone: {took * 1e6:.1f} us")


PARTS: dict[str, Callable[[], None]] = {
    "check": check,
    "e4m3": lambda: time_chains(E4M3, (64, 256, 128)),
    "int8": lambda: time_chains(INT8, (64, 256)),
    "dense": tune_dense,
    "long": time_long,
}

if __name__ == "__main__":
    for part in sys.argv[1:]:
        began = time.perf_counter()
        PARTS[part]()
        print(f"{part}: {time.perf_counter() - began:.0f} s", flush=True)
