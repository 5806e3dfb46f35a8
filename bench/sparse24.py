"""Checks and times products with 2:4 weights on a GPU: `python bench/sparse24.py [--part few|many]`.

few: at most 32 rows over streamed weights, checked in float64 and timed as the products of llama-3.1-8b's 32 layers,
one behind the other in one CUDA graph, each layer with weights of its own. many: widening, and the library's sparse
product, which needs cuSPARSELt, beside its dense one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from plexor_quant.kernels.cuda.sparse24_library import product as sparse_product
from plexor_quant.kernels.cuda.sparse24_products import Cut, packed, stream, stream_program, widened
from plexor_quant.rounding import round_e4m3
from plexor_quant.sparse24_layout import compress, prune, widen

BFLOAT16, FLOAT16, E4M3 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
LAYER = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
NUM_LAYERS = 32
ROWS = (1, 2, 8, 16, 32)
CUTS = {
    BFLOAT16: (Cut(1, 8, 1, 2), Cut(1, 8, 2, 2), Cut(1, 8, 1, 3), Cut(1, 8, 2, 3), Cut(2, 8, 1, 2), Cut(1, 16, 1, 1)),
    E4M3: (Cut(1, 8, 2, 2), Cut(1, 8, 2, 3), Cut(1, 8, 4, 2), Cut(2, 8, 2, 2), Cut(1, 16, 2, 1)),
}
# (rows, inputs, outputs, activations, weight): both ways that x is kept, tiles that are not full, chunks that no step
# fills.
CHECKS = (
    (1, 64, 32, BFLOAT16, BFLOAT16),
    (2, 192, 96, BFLOAT16, BFLOAT16),
    (3, 1024, 49, BFLOAT16, BFLOAT16),
    (8, 4096, 6144, BFLOAT16, BFLOAT16),
    (1, 14336, 4096, BFLOAT16, BFLOAT16),
    (8, 14336, 512, BFLOAT16, BFLOAT16),
    (9, 2112, 80, BFLOAT16, BFLOAT16),
    (16, 4096, 1000, BFLOAT16, BFLOAT16),
    (16, 448, 517, FLOAT16, FLOAT16),
    (5, 14400, 33, FLOAT16, FLOAT16),
    (1, 4096, 4096, BFLOAT16, E4M3),
    (7, 832, 9000, BFLOAT16, E4M3),
    (16, 4096, 512, BFLOAT16, E4M3),
    (13, 320, 65, FLOAT16, E4M3),
    (31, 4096, 4200, BFLOAT16, BFLOAT16),
    (17, 192, 65, FLOAT16, E4M3),
)
VALID = (4, 8, 12, 9, 13, 14)


@dataclass(frozen=True, slots=True)
class Weight:
    kept: Tensor
    index: Tensor
    scale: Tensor | None

    @property
    def num_bytes(self) -> int:
        return self.kept.nbytes + self.index.nbytes

    def dense(self) -> Tensor:
        """float64."""
        dense = widen(self.kept, self.index).double()
        return dense if self.scale is None else dense * self.scale.double().unsqueeze(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("few", "many"), help="default: both")
    part = parser.parse_args().part
    torch.manual_seed(24)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuSPARSELt {torch.backends.cusparselt.version()}"
    )
    if part != "many":
        few()
    if part != "few":
        many()


def few() -> None:
    started = time.perf_counter()
    shapes = [(rows, inputs, dtype, kept) for rows, inputs, _, dtype, kept in CHECKS]
    shapes += [(rows, inputs, BFLOAT16, kept) for rows, (_, inputs), kept in product(ROWS, LAYER, CUTS)]
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(_compile, shapes))
    print(f"compiled in {time.perf_counter() - started:.0f} s", flush=True)
    for shape in CHECKS:
        _check(*shape)
    print(f"{len(CHECKS)} shapes are right with every cut", flush=True)
    for kept in CUTS:
        layers = [[_drawn(*shape, kept) for shape in LAYER] for _ in range(NUM_LAYERS)]
        size = sum(weight.num_bytes for layer in layers for weight in layer) / 1e9
        print(f"{_name(kept)}, {size:.2f} GB in {NUM_LAYERS} layers; tiles, warps, chunks, blocks: ms, TB/s")
        for rows in ROWS:
            cells = []
            for cut in _cuts(kept, rows):
                ms = _microseconds(_chain, layers, rows, cut) / 1e3
                cells.append(f"{cut.tiles} {cut.warps} {cut.chunks} {cut.blocks}: {ms:.3f} {size / ms:.2f}")
            print(f"  {rows} rows | {' | '.join(cells)}", flush=True)
        del layers


def many() -> None:
    for outputs, inputs, all_rows in ((8192, 8192, (64, 512, 2048, 8192)), (28672, 4096, (64, 512, 2048))):
        weight = prune(torch.randn(outputs, inputs, device="cuda") / inputs**0.5).to(BFLOAT16)
        kept, index = compress(weight)
        assert torch.equal(widened(kept, index), weight), "a widened weight is not the one that was compressed"
        theirs = torch._cslt_compress(weight)
        assert torch.equal(packed(kept, index).flatten(), theirs.flatten()), "the library's layout is another one"
        ours, library = _microseconds(packed, kept, index), _timed(torch._cslt_compress, weight)
        print(
            f"{outputs} x {inputs}: widened in {_microseconds(widened, kept, index):.0f} us, packed in {ours:.0f} us, "
            f"by the library in {library:.0f} us"
        )
        for rows in all_rows:
            x = torch.randn(rows, inputs, dtype=BFLOAT16, device="cuda")
            started = time.perf_counter()
            found = sparse_product(x, kept, index)  # looks for the best algorithm
            searched = time.perf_counter() - started
            error = (found.double() - x.double() @ weight.double().T).abs().max()
            dense, sparse = _microseconds(torch.mm, x, weight.T), _microseconds(sparse_product, x, kept, index)
            print(
                f"  {rows} rows: dense {dense:.0f} us, sparse with packing {sparse:.0f} us, first call {searched:.2f} "
                f"s, off by {error:.3f}",
                flush=True,
            )
            _print_e4m3(weight, x)


def _print_e4m3(weight: Tensor, x: Tensor) -> None:
    codes, scale = round_e4m3(weight.float())
    codes_x, scale_x = round_e4m3(x)
    library: Any = torch._C._cusparselt
    theirs = torch._cslt_compress(codes)
    best, *_ = library.mm_search(theirs, codes_x.t(), None, None, BFLOAT16, True)
    dense = _microseconds(_scaled, codes_x, codes, scale_x, scale)
    sparse = _microseconds(_sparse, theirs, codes_x, best, BFLOAT16)
    print(f"  {len(x)} rows of e4m3: dense {dense:.0f} us, sparse {sparse:.0f} us by algorithm {best}", flush=True)


def _compile(shape: tuple[int, int, torch.dtype, torch.dtype]) -> None:
    rows, inputs, dtype, kept = shape
    x = torch.zeros(rows, inputs, dtype=dtype, device="cuda")
    torch.cuda.synchronize()  # gives the thread torch's context
    for cut in _cuts(kept, rows):
        stream_program(cut, x, kept)


def _cuts(kept: torch.dtype, rows: int) -> tuple[Cut, ...]:
    """With more than 16 rows sums of more weight rows would not fit."""
    return (
        CUTS[E4M3 if kept == E4M3 else BFLOAT16] if rows <= 16 else (Cut(1, 8, 1, 2), Cut(1, 8, 1, 1), Cut(1, 8, 2, 1))
    )


def _check(rows: int, inputs: int, outputs: int, dtype: torch.dtype, kept_dtype: torch.dtype) -> None:
    pruned = prune(torch.randn(outputs, inputs, device="cuda") / inputs**0.5).to(dtype)
    kept, index = compress(pruned)
    weight = Weight(kept, index, None)
    if kept_dtype == E4M3:
        codes, scale = round_e4m3(kept)
        weight = Weight(codes, index, scale.squeeze(-1).contiguous())
    x = torch.randn(rows, inputs + 64, device="cuda").to(dtype)[:, :inputs]
    expected = x.double() @ weight.dense().T
    for cut in _cuts(kept_dtype, rows):
        found = stream(x, weight.kept, weight.index, weight.scale, cut).double()
        excess = float(((found - expected).abs() - torch.finfo(dtype).eps * expected.abs()).nan_to_num(1e9).max())
        if excess > 1e-4:
            raise SystemExit(f"WRONG by {excess:.3g}: {rows} x {inputs} by {outputs}, {dtype}, {kept_dtype}, {cut}")


def _drawn(outputs: int, inputs: int, dtype: torch.dtype) -> Weight:
    kept = torch.randn(outputs, inputs // 2, dtype=BFLOAT16, device="cuda").mul_((2 / inputs) ** 0.5)
    valid = torch.tensor(VALID, dtype=torch.uint8, device="cuda")
    nibbles = valid[torch.randint(0, len(VALID), (outputs, inputs // 4), device="cuda")]
    index = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    if dtype != E4M3:
        return Weight(kept, index, None)
    codes, scale = round_e4m3(kept)
    return Weight(codes, index, scale.squeeze(-1).contiguous())


def _chain(layers: Sequence[Sequence[Weight]], rows: int, cut: Cut) -> Tensor:
    x = torch.ones(rows, LAYER[0][1], dtype=BFLOAT16, device="cuda")
    for layer in layers:
        for weight in layer:
            x = stream(x[:, : 2 * weight.kept.shape[1]], weight.kept, weight.index, weight.scale, cut)
    return x


def _sparse(weight: Tensor, x: Tensor, algorithm: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch._cslt_sparse_mm(weight, x.t(), out_dtype=dtype, transpose_result=True, alg_id=algorithm)


def _scaled(x: Tensor, weight: Tensor, scale_x: Tensor, scale: Tensor) -> Tensor:
    return torch._scaled_mm(x, weight.t(), scale_x, scale.T, out_dtype=BFLOAT16, use_fast_accum=True)


def _microseconds(run: Callable[..., object], *arguments: object) -> float:
    """Median of replays of a graph of it."""
    run(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(*arguments)
    graph.replay()
    return _timed(graph.replay)


def _timed(run: Callable[..., object], *arguments: object) -> float:
    times = []
    for _ in range(7):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run(*arguments)
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
