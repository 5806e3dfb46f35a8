"""Time the variants of products on this GPU: what `plexor tune` writes down and bench/linear.py prints.

Launches are timed in CUDA graphs, one after another as in a decode step, over copies of the weight that together do
not fit the cache. Every variant is first held to the product in float64.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product as iterate

import torch
import triton
from torch import Tensor
from torch.nn import functional

from plexor.kernels.triton.silu_mul import silu_mul
from plexor.kernels.triton.split_linear import Split, compile_ahead, split_gated_linear, split_linear
from plexor.kernels.tuning import Choice, Product

ROWS = (16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of rows that are measured."""

GRAPH_BYTES = 1 << 30
COLD_BYTES = 1 << 28
"""A graph reads this much, over copies of the weight that take this much."""

TILES = ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8), (256, 64, 8))
"""Outputs, inputs and warps of a program."""

MEMORY_RATE, CACHE_RATE, PROCESSOR_RATE, PRODUCT_RATE = 4.5e12, 6e12, 6e10, 6e14
"""Rough bytes a second from memory, from the cache to all processors and to one, and operations a second."""

MOST_CANDIDATES = 12
MOST_OF_A_TILE = 3
REPLAYS = 9
SHARED_BYTES = 226 * 1024
NUM_COMPILERS = 16
MARGIN = 0.99
"""A variant must be this much faster than the library, or its figure may be noise."""

Multiply = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one product for one number of rows. library and variants: seconds of a launch; others: by name."""

    product: Product
    num_rows: int
    library: float
    variants: dict[Split, float]
    others: dict[str, float]

    @property
    def best(self) -> Split:
        return min(self.variants, key=self.variants.__getitem__)

    @property
    def choice(self) -> Choice:
        """What a table says for these rows."""
        return asdict(self.best) if self.variants[self.best] < MARGIN * self.library else None

    def bandwidth(self, seconds: float) -> float:
        """Bytes of the weight for each second."""
        return 2 * self.product.outputs * self.product.inputs / seconds


def is_gated(product: Product) -> bool:
    return product.op == "gated_linear"


def measure(
    products: Sequence[Product], rows: Sequence[int], device: torch.device, others: dict[str, Multiply] | None = None
) -> Iterator[Timing]:
    """A timing for each product and number of rows. others: by name, what else is timed on products of op "linear"."""
    compile_variants(products, rows, device)
    for product in products:
        weights = make_weights(product, device)
        x = torch.randn(max(rows), product.inputs, dtype=weights[0].dtype, device=device)
        exact = exact_product(product, x, weights[0])
        for num_rows in rows:
            yield time_rows(product, x[:num_rows], weights, exact[:num_rows], {} if is_gated(product) else others or {})
        del weights, x, exact
        torch.cuda.empty_cache()


def time_rows(
    product: Product, x: Tensor, weights: Sequence[Tensor], exact: Tensor, others: dict[str, Multiply]
) -> Timing:
    """The library and each variant on one number of rows; AssertionError where one is wrong."""
    variants = {split: variant(product, split) for split in candidates(product, x.shape[0], num_processors(x.device))}
    for multiply in (*variants.values(), *others.values()):
        check(product, multiply(x, weights[0]), exact)
    return Timing(
        product,
        x.shape[0],
        time_launch(gated_by_library if is_gated(product) else functional.linear, x, weights),
        {split: time_launch(multiply, x, weights) for split, multiply in variants.items()},
        {name: time_launch(multiply, x, weights) for name, multiply in others.items()},
    )


def gated_by_library(x: Tensor, weight: Tensor) -> Tensor:
    return silu_mul(functional.linear(x, weight))


def variant(product: Product, split: Split) -> Multiply:
    if is_gated(product):
        return lambda x, weight: split_gated_linear(x, weight, None, split)
    return lambda x, weight: split_linear(x, weight, None, None, split)


def num_processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def candidates(product: Product, num_rows: int, processors: int) -> list[Split]:
    """The variants that ought to be fastest, of several kinds of tiles, each as deep as shared memory allows."""
    gated = is_gated(product)
    padded = max(16, triton.next_power_of_2(num_rows))
    estimates: dict[Split, float] = {}
    for rows in sorted({min(padded, 128), min(padded, 256)}):
        for outputs, inputs, warps in TILES:
            tile_outputs = outputs * (2 if gated else 1)
            if tile_outputs * rows > 128 * 32 * warps:
                continue  # more sums than registers
            for resident, splits in iterate((1, 2, 3), range(1, 9)):
                stages = min(8, (SHARED_BYTES // resident - 1024) // (2 * inputs * (rows + tile_outputs)))
                if stages >= 3 and (splits == 1 or product.inputs // inputs // splits >= stages):
                    split = Split(rows, outputs, inputs, splits, warps, stages)
                    seconds = estimate(product, num_rows, split, resident, processors)
                    estimates[split] = min(seconds, estimates.get(split, seconds))
    chosen: list[Split] = []
    for split in sorted(estimates, key=estimates.__getitem__):
        alike = [other for other in chosen if replace(other, splits=0, stages=0) == replace(split, splits=0, stages=0)]
        if len(alike) < MOST_OF_A_TILE and len(chosen) < MOST_CANDIDATES:
            chosen.append(split)
    return chosen


def estimate(product: Product, num_rows: int, split: Split, resident: int, processors: int) -> float:
    """About how many seconds a variant takes, to leave out those that cannot be the fastest."""
    outputs = product.outputs // 2 if is_gated(product) else product.outputs
    num_row_tiles = -(-num_rows // split.rows)
    num_tiles = -(-outputs // split.outputs) * num_row_tiles
    weight = 2 * product.outputs * product.inputs
    x = num_tiles * 2 * split.rows * product.inputs
    parts = 0 if split.splits == 1 else 8 * num_rows * product.outputs * split.splits
    reading = max(weight / MEMORY_RATE, (weight * num_row_tiles + x + parts) / CACHE_RATE)
    multiplying = 2 * num_row_tiles * split.rows * product.outputs * product.inputs / PRODUCT_RATE
    # Programs share the memory, so an uneven rest costs less than its share.
    programs = num_tiles * split.splits / processors
    unevenness = 1 + 0.5 * (math.ceil(programs / resident) * resident / programs - 1)
    tile = 4 * split.outputs * split.rows * (product.outputs // outputs)
    ending = split.splits * tile / PROCESSOR_RATE if split.splits > 1 else 0.0
    return max(reading, multiplying) * unevenness + ending


def compile_variants(products: Sequence[Product], rows: Sequence[int], device: torch.device) -> None:
    """Compile everything that will be measured, in several threads; what is compiled is kept on disk."""
    with ThreadPoolExecutor(NUM_COMPILERS) as executor, triton.AsyncCompileMode(executor):
        for product in products:
            dtype = getattr(torch, product.dtype)
            weight = torch.empty(product.outputs, product.inputs, dtype=dtype, device=device)
            for num_rows in rows:
                x = torch.empty(num_rows, product.inputs, dtype=dtype, device=device)
                for split in candidates(product, num_rows, num_processors(device)):
                    compile_ahead(x, weight, split, is_gated(product))


def make_weights(product: Product, device: torch.device) -> list[Tensor]:
    """Random copies that together do not fit the cache."""
    size = 2 * product.outputs * product.inputs
    weights = [
        torch.randn(product.outputs, product.inputs, dtype=getattr(torch, product.dtype), device=device)
        for _ in range(-(-COLD_BYTES // size))
    ]
    for weight in weights:
        weight *= product.inputs**-0.5
    return weights


def exact_product(product: Product, x: Tensor, weight: Tensor) -> Tensor:
    """In float64, a part of the outputs at a time."""
    parts = [x.double() @ part.double().t() for part in weight.split(1 << 15)]
    exact = torch.cat(parts, dim=1)
    if is_gated(product):
        gate, up = exact.chunk(2, dim=1)
        exact = functional.silu(gate) * up
    return exact


def check(product: Product, actual: Tensor, exact: Tensor) -> None:
    """AssertionError where more than the rounding of the result, some 2e-3 in bfloat16, is off."""
    error = float((actual.double() - exact).norm() / exact.norm())
    assert error < 5e-3, f"{product}, {actual.shape[0]} rows: off by {error:.2g} of the whole"


def time_launch(multiply: Multiply, x: Tensor, weights: Sequence[Tensor]) -> float:
    """Seconds of one launch, the median over replays of a graph of many."""
    num_launches = max(4, -(-GRAPH_BYTES // (2 * weights[0].numel())))
    multiply(x, weights[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in range(num_launches):
            multiply(x, weights[launch % len(weights)])
    times = [_replay(graph) for _ in range(REPLAYS + 2)][2:]
    return statistics.median(times) / num_launches


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3
