"""Checks and times products with e4m3 weights in blocks on a GPU: `python bench/fp8_block.py check`, or `time`.

`time` gives microseconds of llama-3.1-8b's four products for each number of rows, in a CUDA graph over layers that do
not fit the cache: of each tile of the kernel, of the widened weight with the library, and of torch's own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from plexor_quant.fp8_block import Fp8BlockFormat
from plexor_quant.kernels.reference.fp8_block_linear import fp8_block_linear as reference
from plexor_quant.kernels.samples import on_grid
from plexor_quant.kernels.torch.fp8_block_grouped_linear import fp8_block_grouped_linear as stack_widened
from plexor_quant.kernels.torch.fp8_block_linear import fp8_block_linear as plain
from plexor_quant.kernels.triton.fp8_block_grouped_linear import multiply as stacked
from plexor_quant.kernels.triton.fp8_block_linear import TILES, Tile, fp8_block_linear, multiply, widened
from plexor_quant.rounding import round_groups_e4m3

DEVICE = torch.device("cuda")
SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
LAYERS = 6
"""1.3 GB of codes, many times the second-level cache."""

ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 2048)
MORE_TILES = (Tile(16, 16, 4, 8), Tile(32, 16, 2, 8), Tile(32, 16, 4, 6), Tile(64, 16, 4, 6), Tile(128, 64, 4, 4))
REPLAYS = 7
Stored = tuple[Tensor, Tensor]
Multiply = Callable[[Tensor, Tensor, Tensor], Tensor]


def check() -> int:
    """How many results are further from the reference than rounding explains; says the largest distance."""
    torch.manual_seed(1)
    wrong, largest = 0, 0.0
    sizes = ((4096, 4096), (513, 400))
    for (out, size), rows, dtype in product(sizes, (1, 3, 16, 17, 64, 100, 256, 300), (torch.bfloat16, torch.float16)):
        weight = torch.randn(out, size, device=DEVICE) / size**0.5
        number_format = Fp8BlockFormat(128 if out % 2 == 0 else 1, 128)
        stored = number_format.convert(weight)
        x = on_grid(torch.randn(rows, size, device=DEVICE).to(dtype), 128)
        args = x, stored["weight"], stored["scale"], number_format.rows, 128
        expected = reference(*args).float()
        error = float(((fp8_block_linear(*args).float() - expected).abs() / (1 + expected.abs())).max())
        largest = max(largest, error)
        wrong += not error < 1.6e-2
    print(f"{wrong} wrong; largest error {largest:.2g}")
    return wrong


def scaled(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """torch's own, rounding x as the op says."""
    codes, input_scale = round_groups_e4m3(x, 128)
    return torch._scaled_mm(
        codes, weight.t(), input_scale.t().contiguous().t(), scale.t(), out_dtype=x.dtype, use_fast_accum=False
    )


def time_layer(multiply_by: Multiply, rows: int, layers: list[list[Stored]]) -> float:
    """Microseconds of one layer."""
    inputs = {size: torch.randn(rows, size, device=DEVICE, dtype=torch.bfloat16) for _, size in SHAPES}

    def run() -> None:
        for layer in layers:
            for weight, scale in layer:
                multiply_by(inputs[weight.shape[1]], weight, scale)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return float(median(times)) * 1000 / len(layers)


def variants(rows: int) -> dict[str, Multiply]:
    """What is timed for so many rows, by name."""
    found: dict[str, Multiply] = {}
    for tile in (*TILES, *MORE_TILES):
        if tile.rows >= min(rows, 128) and (rows > 16 or tile.rows == 16):
            name = f"{tile.outputs}x{tile.rows}/{tile.num_warps}w{tile.num_stages}"
            found[name] = lambda x, weight, scale, tile=tile: multiply(x, weight, scale, 128, 128, tile)  # type: ignore[misc]
    found["widened"] = lambda x, weight, scale: functional.linear(x, widened(weight, scale, 128, 128, x.dtype))
    found["by torch"] = lambda x, weight, scale: plain(x, weight, scale, 128, 128)
    found["_scaled_mm"] = scaled
    return found


def time_all(rows_asked: list[int]) -> None:
    torch.manual_seed(2)
    layers = []
    for _ in range(LAYERS):
        shapes = [torch.randn(shape, device=DEVICE) * 0.02 for shape in SHAPES]
        kept = [Fp8BlockFormat(128, 128).convert(weight) for weight in shapes]
        layers.append([(stored["weight"], stored["scale"]) for stored in kept])
    num_bytes = sum(out * size for out, size in SHAPES)
    print(f"{num_bytes / 1e6:.0f} MB of codes a layer, {num_bytes / 4.8e6:.1f} us at 4.8 TB/s")
    for rows in rows_asked:
        taken = {}
        for name, multiply_by in variants(rows).items():
            try:
                taken[name] = time_layer(multiply_by, rows, layers)
            except RuntimeError as error:
                print(f"  {name}: {str(error).splitlines()[0][:100]}")
        best = sorted(taken.items(), key=lambda item: item[1])
        print(f"{rows} rows, us: " + ", ".join(f"{name} {us:.1f}" for name, us in best))


def time_stack(rows_asked: list[int]) -> None:
    """A stack as qwen3-30b-a3b's, 128 experts of which each token visits 8."""
    torch.manual_seed(3)
    weight = torch.randn(128, 1536, 2048, device=DEVICE) * 0.02
    kept = [Fp8BlockFormat(128, 128).convert(part) for part in weight]
    codes = torch.stack([stored["weight"].view(torch.uint8) for stored in kept]).view(torch.float8_e4m3fn)
    scale = torch.stack([stored["scale"] for stored in kept])
    for rows in rows_asked:
        visits = torch.randint(0, 128, (8 * rows,), device=DEVICE)
        ends = torch.bincount(visits, minlength=128).cumsum(0).int()
        x = torch.randn(8 * rows, 2048, device=DEVICE, dtype=torch.bfloat16)
        for name, by in (("codes", stacked), ("widened", stack_widened)):
            run = partial(by, x, codes, scale, 128, 128, ends)
            run()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(10):
                run()
            end.record()
            end.synchronize()
            print(f"stack, {rows} tokens, {name}: {begin.elapsed_time(end) * 100:.1f} us")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("check", "time"))
    parser.add_argument("--rows", type=int, nargs="*", default=list(ROWS))
    given = parser.parse_args()
    if given.what == "check":
        return 1 if check() else 0
    time_all(given.rows)
    time_stack([1, 16, 128, 256, 512])
    return 0


if __name__ == "__main__":
    sys.exit(main())
