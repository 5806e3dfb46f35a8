"""Find the quickest cut of each product on this GPU: what `plexor tune` and bench/linear.py write down.

Products are timed in a chain, as in a decode step, where each begins while the one before it ends: alone they mislead.

    layer 1: qkv  o  gate_up  down     layer 2: qkv  o  gate_up  down     ...     one CUDA graph

A chain has so many layers that their weights do not fit the cache. One product's cut at a time is changed in all of
them, and the quickest kept. Attention is left out. Every cut's results are first compared with the op's reference.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from itertools import product as every
from typing import Any

import torch
from torch import Tensor

from plexor.errors import PlexorError
from plexor.extension import builtin
from plexor.kernels import table, tuning
from plexor.kernels.cuda.choice import Cut, as_choice, possible, rule
from plexor.kernels.table import resolve
from plexor.kernels.tuning import Product

ROWS = (1, 8, 16, 32, 64, 128, 256)
"""Numbers of rows that are measured; those between take the choice of the next larger one."""

PROVIDER = "cuda"
CHAIN_BYTES = 800_000_000
"""Of weights, many times what the second-level cache holds."""

MOST_COPIES = 256
"""Of the layers: a chain of smaller ones would take longest to launch."""

MARGIN = 0.998
"""A chain must take at most this part of the time for a change to be kept, or it may be noise."""

LARGEST_ERROR = 1e-2
"""Of the whole: twice what the reference's roundings to bfloat16 make of it, and less than one wrong tile does."""

REPLAYS = 9
NUM_COMPILERS = 16
EPS = 1e-5

Multiply = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Layer:
    """A product, and the heads that norm_rotary_linear makes of it."""

    product: Product
    head_size: int = 0
    num_kv_heads: int = 0

    @property
    def pair(self) -> int | None:
        """Distance of the weight rows that belong together."""
        pairs = {"norm_gated_linear": self.product.outputs // 2, "norm_rotary_linear": self.head_size // 2}
        return pairs.get(self.product.op)

    @property
    def num_bytes(self) -> int:
        return self.product.outputs * self.product.inputs * _dtype(self.product.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Tuned:
    """The cuts that were found for a chain's layers, and its seconds by the rules and with them."""

    layers: tuple[Layer, ...]
    num_rows: int
    cuts: tuple[Cut, ...]
    before: float
    after: float

    def __str__(self) -> str:
        cuts = ", ".join(
            f"{layer.product} {'library' if cut is None else cut}"
            for layer, cut in zip(self.layers, self.cuts, strict=True)
        )
        return f"{self.num_rows} rows: {self.before * 1e6:.1f} us by the rules, {self.after * 1e6:.1f} us with {cuts}"


def chains_of(choices: Iterable[table.Choice]) -> tuple[tuple[Layer, ...], ...]:
    """The layers among the choices of a model's plan that kernels with variants serve: in one chain those that do more
    than multiply, in the order of the first layer, and each other product, such as the head's, in one of its own.
    """
    found = {
        _layer(choice): None
        for choice in choices
        if choice.winner == PROVIDER and choice.op in _providers() and _turns_whole_heads(choice)
    }
    fused = tuple(layer for layer in found if layer.product.op != "linear")
    sizes = {(layer.product.outputs, layer.product.inputs) for layer in fused}
    alone = [layer for layer in found if (layer.product.outputs, layer.product.inputs) not in sizes]
    return tuple(chain for chain in (fused, *((layer,) for layer in alone)) if chain)


def _layer(choice: table.Choice) -> Layer:
    shape = choice.facts.shape
    return Layer(
        Product(choice.op, shape["out_features"], shape["in_features"], choice.facts.dtype),
        shape.get("head_size", 0),
        shape.get("num_kv_heads", 0),
    )


def _turns_whole_heads(choice: table.Choice) -> bool:
    shape = choice.facts.shape
    return shape.get("rotary_size") == shape.get("head_size")


def tune(layers: Sequence[Layer], rows: Sequence[int], device: torch.device) -> Iterator[Tuned]:
    """The quickest cuts of a chain for each number of rows; PlexorError where a kernel multiplies wrongly."""
    check_all(layers, rows, device)
    num_copies = min(-(-CHAIN_BYTES // sum(layer.num_bytes for layer in layers)), MOST_COPIES)
    weights = [[draw(layer, device) for layer in layers] for _ in range(num_copies)]
    num_multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    for num_rows in rows:
        operands = [Operands(layer, num_rows, device) for layer in layers]

        def seconds(cuts: Sequence[Cut], operands: Sequence[Operands] = operands) -> float:
            return time_chain(operands, weights, cuts)

        start = tuple(rule(layer.product, num_rows, layer.pair, num_multiprocessors) for layer in layers)
        options = [possible(layer.product, num_rows, layer.pair) for layer in layers]
        yield Tuned(tuple(layers), num_rows, *descend(start, options, seconds))


def choices_of(results: Iterable[Tuned]) -> dict[str, dict[int, tuning.Choice]]:
    """As a table of measured choices holds them."""
    choices: dict[str, dict[int, tuning.Choice]] = {}
    for result in results:
        for layer, cut in zip(result.layers, result.cuts, strict=True):
            choices.setdefault(str(layer.product), {})[result.num_rows] = as_choice(cut)
    return choices


def descend(
    start: tuple[Cut, ...], options: Sequence[Sequence[Cut]], seconds: Callable[[tuple[Cut, ...]], float]
) -> tuple[tuple[Cut, ...], float, float]:
    """The quickest cuts found by changing one after the other, once; the seconds of the start and of them."""
    best = start
    before = after = seconds(start)
    for place, cuts in enumerate(options):
        for cut in cuts:
            trial = (*best[:place], cut, *best[place + 1 :])
            if cut != start[place] and (taken := seconds(trial)) < MARGIN * after:
                best, after = trial, taken
    return best, before, after


class Operands:
    """What an op is given besides its weight, for so many rows."""

    def __init__(self, layer: Layer, num_rows: int, device: torch.device) -> None:
        self.layer = layer
        product, dtype = layer.product, _dtype(layer.product.dtype)
        self.x = torch.randn(num_rows, product.inputs, device=device).to(dtype)
        self.cache: dict[str, Tensor] = {}
        self._others: tuple[Any, ...] = ()
        if product.op == "linear_add":
            self._others = (torch.randn(num_rows, product.outputs, device=device).to(dtype),)
        if product.op == "norm_rotary_linear":
            angle = torch.rand(num_rows, layer.head_size // 2, device=device) * 6
            place = torch.arange(num_rows, device=device)
            entries = (1, num_rows, layer.num_kv_heads, layer.head_size)
            for part in ("keys", "values"):
                self.cache[part] = torch.zeros(entries, dtype=dtype, device=device)
            self._others = (angle.cos(), angle.sin(), place, place, self.cache)
        self._norm = ((1 + 0.1 * torch.randn(product.inputs, device=device)).to(dtype), EPS)

    def call(self, multiply: Multiply, weight: Tensor) -> Tensor:
        """The op's result; a residual is given up to it."""
        op = self.layer.product.op
        if op == "linear":
            return multiply(self.x, weight)
        norm = self._norm if op.startswith("norm") else ()
        return multiply(self.x, *norm, {"weight": weight}, *self._others)


def check_all(layers: Sequence[Layer], rows: Sequence[int], device: torch.device) -> None:
    """Compare each cut with the reference, many at a time, since compiling them takes longest; what is compiled is kept
    on disk. The library goes first, so that the small kernels that come with it are compiled once.
    """
    weights = {layer: draw(layer, device) for layer in layers}
    cases = [
        (layer, num_rows, cut)
        for layer, num_rows in every(layers, rows)
        for cut in possible(layer.product, num_rows, layer.pair)
    ]

    def check_case(layer: Layer, num_rows: int, cut: Cut) -> None:
        torch.cuda.set_device(device)  # a thread begins without
        check(layer, num_rows, provider(layer, cut), weights[layer], f" {cut}")

    for case in cases:
        if case[2] is None:
            check_case(*case)
    with ThreadPoolExecutor(NUM_COMPILERS) as executor:
        for done in [executor.submit(check_case, *case) for case in cases if case[2] is not None]:
            done.result()


def check(layer: Layer, num_rows: int, multiply: Multiply, weight: Tensor, how: str = "") -> None:
    """PlexorError where an op's result, or what it stores, is further from the reference than rounding takes it."""
    reference = resolve(next(op.reference for op in builtin.ops() if op.name == layer.product.op))
    operands = Operands(layer, num_rows, weight.device)
    results = []
    for function in (multiply, reference):
        given = deepcopy(operands)
        y = given.call(function, weight)
        results.append(torch.cat([part.flatten().float() for part in (y, *given.cache.values())]))
    actual, expected = results
    error = float((actual - expected).norm() / expected.norm())
    if not error < LARGEST_ERROR:
        raise PlexorError(
            f"{layer.product}, {num_rows} rows{how}: off by {error:.2g} of the whole, so nothing was written down; "
            f"report it, and choose another provider with --kernel {layer.product.op}=NAME"
        )


def provider(layer: Layer, cut: Cut) -> Multiply:
    """The op's function for one layer, cut so."""
    make = resolve(_providers()[layer.product.op])
    multiply: Multiply = make(lambda call: cut)
    return multiply


def _providers() -> Mapping[str, str]:
    """Of the ops that multiply."""
    kernels = (kernel for kernel in builtin.kernels() if kernel.provider == PROVIDER)
    return {kernel.op: kernel.load for kernel in kernels if kernel.op.endswith("linear") or kernel.op == "linear_add"}


def draw(layer: Layer, device: torch.device) -> Tensor:
    """A random weight, whose product with normal numbers is normal again."""
    product = layer.product
    weight = torch.randn(product.outputs, product.inputs, dtype=_dtype(product.dtype), device=device)
    return weight.mul_(product.inputs**-0.5)


def time_chain(operands: Sequence[Operands], weights: Sequence[Sequence[Tensor]], cuts: Sequence[Cut]) -> float:
    """Seconds of a layer, the median over replays of a graph of all."""
    functions = [provider(given.layer, cut) for given, cut in zip(operands, cuts, strict=True)]

    def run() -> None:
        for own in weights:
            for given, function, weight in zip(operands, functions, own, strict=True):
                given.call(function, weight)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = [_replay(graph) for _ in range(REPLAYS + 2)][2:]
    return statistics.median(times) / len(weights)


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype
