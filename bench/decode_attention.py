"""Times the attention of decode steps among the products of a layer: `python bench/decode_attention.py [PART ...]`.

What counts is by how much a layer's products take longer with attention between them: kernels overlap. Layers run in
one CUDA graph with weights and caches of their own. Variants are held to the reference first; a wrong one is not timed.
PARTs: check, repeat, few, many, long (all of them without one).
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product as every
from typing import Any

import torch
from torch import Tensor

from plexor.batch import LayerCache, Pages
from plexor.kernels.cuda.attention_choice import Cut, cut_for
from plexor.kernels.cuda.decode_attention import STORAGES as NUMBERED
from plexor.kernels.cuda.decode_attention import DecodeAttention as ClusterAttention
from plexor.kernels.cuda.decode_attention import compiled
from plexor.kernels.cuda.linear_add import LinearAdd
from plexor.kernels.cuda.norm_rotary_linear import NormRotaryLinear
from plexor.kernels.reference.kv_write import saturated
from plexor.kernels.reference.paged_attention import paged_attention
from plexor.kernels.triton.decode_attention import DecodeAttention as SharedAttention
from plexor.kernels.triton.decode_attention import DecodeTuning, decode_tuning

HIDDEN, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 4096, 32, 8, 128
BLOCK_SIZE = 16
LEAST_BLOCKS = 512
"""Width of the block table at least: an engine's is as wide as its longest context."""

REPLAYS = 7
CUDA = torch.device("cuda")
DTYPE = torch.bfloat16
STORAGES = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "int8": torch.int8}
FEW = ((1, 256), (4, 256), (8, 256), (16, 256), (8, 1024))
MANY = ((32, 320), (64, 320), (256, 320))
LONG = ((1, 65536), (8, 65536))
REPEATS = 1500

Attend = Callable[[Tensor, LayerCache, Tensor, Tensor, float, int | None, Tensor], None]


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's weights and cache."""

    gain: Tensor
    qkv: Mapping[str, Tensor]
    out: Mapping[str, Tensor]
    cache: LayerCache


@dataclass(frozen=True, slots=True)
class Step:
    """A decode step of some layers for sequences of the same length."""

    layers: tuple[Layer, ...]
    x: Tensor
    cos: Tensor
    sin: Tensor
    positions: Tensor
    slots: Tensor
    block_table: Tensor
    kv_length: Tensor

    @property
    def cache_bytes(self) -> int:
        """That one layer's attention reads."""
        parts = self.layers[0].cache
        used = int(self.kv_length.sum()) / (parts["keys"].shape[0] * BLOCK_SIZE)
        return int(used * sum(part.nbytes for part in parts.values()))


def main() -> None:
    torch.manual_seed(0)
    parts = sys.argv[1:] or ["check", "repeat", "few", "many", "long"]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {NUM_HEADS}/{NUM_KV_HEADS} heads of {HEAD_SIZE}")
    if "check" in parts:
        check_all()
    if "repeat" in parts:
        for num_rows, length, name in ((1, 300, "bf16"), (8, 256, "bf16"), (8, 33, "e4m3"), (16, 500, "bf16")):
            repeat(num_rows, length, name)
    for part, shapes in (("few", FEW), ("many", MANY), ("long", LONG)):
        if part in parts:
            heads = (NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE)
            rows = {num_rows for num_rows, _ in shapes}
            cuts = [(cut, of) for n, of in every(rows, STORAGES.values()) for cut in all_cuts(n, of).values()]
            compile_all((replace(cut, shifts=1), storage, heads, None) for cut, storage in cuts)
            for shape in shapes:
                time_step(*shape)


def variants(num_rows: int, length: int, storage: torch.dtype) -> dict[str, Attend]:
    """What is timed for so many rows."""
    cuts = all_cuts(num_rows, storage)
    attends: dict[str, Attend] = {"triton": SharedAttention()}
    attends |= {f"cuda {name}": ClusterAttention(_always(cut)) for name, cut in cuts.items()}
    for name, tuning in triton_variants(num_rows, length, storage).items():
        attends[f"triton {name}"] = SharedAttention(_always(tuning))
    return attends


def all_cuts(num_rows: int, storage: torch.dtype) -> dict[str, Cut]:
    chosen = cut_for(num_rows, NUM_KV_HEADS, HEAD_SIZE * storage.itemsize)
    return cluster_variants(chosen, num_rows)


def compile_all(kernels: Iterable[tuple[Cut, torch.dtype, tuple[int, int, int], int | None]]) -> None:
    """With all cores at once."""

    def compile_one(kernel: tuple[Cut, torch.dtype, tuple[int, int, int], int | None]) -> None:
        cut, storage, (num_heads, num_kv_heads, size), window = kernel
        torch.cuda.set_device(0)
        sizes = (size, num_heads // num_kv_heads, BLOCK_SIZE)
        compiled(0, replace(cut, shifts=1), sizes, NUMBERED.get(storage, 0), False, window is not None)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(compile_one, dict.fromkeys(kernels)))


def cluster_variants(chosen: Cut, num_rows: int) -> dict[str, Cut]:
    """By name: blocks of a cluster, warps of a block, clusters of a KV head, registers."""
    n, half = num_rows, -(-num_rows // 2)
    shapes: tuple[tuple[int, int, int, int], ...]
    if num_rows > 16:
        shapes = ((4, 8, 16, 152), (2, 8, 32, 152), (2, 4, 32, 152))
    elif num_rows == 1:
        shapes = ((8, 8, 1, 136), (8, 4, 1, 152), (16, 4, 1, 152))
    else:
        shapes = ((8, 8, half, 128), (4, 4, half, 152), (2, 8, n, 152), (1, 8, n, 152))
    others = {
        f"c{cluster} w{warps} s{shifts} r{registers}": replace(
            chosen, cluster=cluster, warps=warps, shifts=max(shifts, -(-num_rows // 32)), registers=registers
        )
        for cluster, warps, shifts, registers in shapes
    }
    return {"as chosen": chosen, **others}


def triton_variants(num_rows: int, length: int, storage: torch.dtype) -> dict[str, DecodeTuning]:
    """None for few rows of few positions."""
    if num_rows * length < 1 << 13:
        return {}
    chosen = decode_tuning(64, HEAD_SIZE, storage.itemsize)
    few = {"many's": chosen} if num_rows <= 16 else {}
    if storage == torch.bfloat16:
        return {**few, "p5": replace(chosen, programs=5, registers=96)}
    found = {**few, "t64": replace(chosen, tile=64), "t64 s2": replace(chosen, tile=64, stages=2)}
    if storage == torch.float8_e4m3fn:
        found["t64 w2 p8"] = replace(chosen, tile=64, warps=2, programs=8, stages=2)
        found["t32 w1 p8"] = replace(chosen, tile=32, warps=1, programs=8, registers=255)
        found["t128 s2"] = replace(chosen, tile=128, stages=2, programs=3, registers=168)
        found["t32 w2 p8"] = replace(chosen, tile=32, warps=2, programs=8)
    return found


def _always(choice: Any) -> Callable[..., Any]:
    return lambda *sizes: choice


def time_step(num_rows: int, length: int) -> None:
    for name, storage in STORAGES.items():
        num_layers = max(2, min(8, (24 << 30) // (2 * num_rows * length * NUM_KV_HEADS * HEAD_SIZE * 2) // 2))
        step = make_step(num_rows, length, storage, num_layers)
        plain = timed(step, None)
        expected = None
        cells = []
        for variant, attend in variants(num_rows, length, storage).items():
            y = run(step, attend)
            expected = y if expected is None else expected
            if not agree(y, expected):
                cells.append(f"{variant} WRONG by {float((y - expected).abs().max()):.3g}")
                continue
            seconds = timed(step, attend) - plain
            cells.append(f"{variant} {seconds * 1e6:.1f} ({step.cache_bytes / seconds / 1e12:.2f})")
        print(f"{num_rows} x {length} {name}: products {plain * 1e6:.1f} us; + " + ", ".join(cells), flush=True)


def repeat(num_rows: int, length: int, name: str) -> None:
    """Say how often a captured step differs from what its launches give one at a time, in any row.

    The newest entries are spoiled before each time, so that one that is read too early shows.
    """
    step = make_step(num_rows, length, STORAGES[name], 3)
    report = []
    attends: dict[str, Attend | None] = {"products": None, **variants(num_rows, length, STORAGES[name])}
    for variant, attend in attends.items():
        expected = run(step, attend, ("project", "attend", "add"))
        graph, y = captured(step, attend)
        wrong = torch.zeros((), dtype=torch.int64, device=CUDA)
        for _ in range(REPEATS):
            spoil(step)
            graph.replay()
            wrong += (y != expected).any()
        report.append(f"{variant} {int(wrong)}")
    print(f"repeat {num_rows} x {length} {name}, wrong of {REPEATS}: " + ", ".join(report), flush=True)


def spoil(step: Step) -> None:
    """Overwrite the newest entries, which the step writes."""
    for layer in step.layers:
        if "key_scales" not in layer.cache:
            for part in layer.cache.values():
                part.view(torch.uint8).flatten(0, 1)[step.slots] = 0x45


def make_step(num_rows: int, length: int, storage: torch.dtype, num_layers: int) -> Step:
    """Blocks lie anywhere in the cache; the newest entry of each sequence is written by the step."""
    used = -(-length // BLOCK_SIZE)
    table = torch.zeros(num_rows, max(used, LEAST_BLOCKS), dtype=torch.int32, device=CUDA)
    table[:, :used] = torch.randperm(num_rows * used, device=CUDA).view(num_rows, used)
    layers = tuple(make_layer(num_rows * used, storage) for _ in range(num_layers))
    newest = table[:, (length - 1) // BLOCK_SIZE].long() * BLOCK_SIZE + (length - 1) % BLOCK_SIZE
    angles = torch.rand(length, HEAD_SIZE // 2, device=CUDA)
    return Step(
        layers,
        torch.randn(num_rows, HIDDEN, dtype=DTYPE, device=CUDA),
        angles.cos(),
        angles.sin(),
        torch.full((num_rows,), length - 1, device=CUDA),
        newest,
        table,
        torch.full((num_rows,), length, dtype=torch.int32, device=CUDA),
    )


def make_layer(num_blocks: int, storage: torch.dtype) -> Layer:
    outputs = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_SIZE
    return Layer(
        1 + 0.1 * torch.randn(HIDDEN, dtype=DTYPE, device=CUDA),
        {"weight": torch.randn(outputs, HIDDEN, dtype=DTYPE, device=CUDA) * HIDDEN**-0.5},
        {"weight": torch.randn(HIDDEN, NUM_HEADS * HEAD_SIZE, dtype=DTYPE, device=CUDA) * HIDDEN**-0.5},
        make_cache((num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_SIZE), storage),
    )


def make_cache(shape: tuple[int, int, int, int], storage: torch.dtype) -> LayerCache:
    """Of random entries; of int8 with a scale for each position and head."""
    parts: dict[str, Tensor] = {}
    for name in ("keys", "values"):
        if storage == torch.int8:
            parts[name] = torch.randint(-127, 128, shape, dtype=torch.int8, device=CUDA)
            parts[f"{name[:-1]}_scales"] = (0.5 + torch.rand(shape[:3], device=CUDA)) / 64
        elif storage == torch.float8_e4m3fn:
            parts[name] = torch.empty(shape, dtype=storage, device=CUDA)
            for block in parts[name].split(4096):
                block.copy_(saturated(torch.randn(block.shape, dtype=DTYPE, device=CUDA), storage))
        else:
            parts[name] = torch.randn(shape, dtype=storage, device=CUDA)
    return parts


def run(step: Step, attend: Attend | None, apart: Sequence[str] = ()) -> Tensor:
    """The step's result; without attention the queries take its place. apart: launches that are waited for."""
    project, add = NormRotaryLinear(), LinearAdd()
    spare = make_cache((2, BLOCK_SIZE, NUM_KV_HEADS, HEAD_SIZE), DTYPE)
    x = step.x
    for layer in step.layers:
        # Another kernel writes integers: where they are read, this one writes elsewhere.
        elsewhere = "key_scales" in layer.cache
        cache, slots = (spare, step.slots % BLOCK_SIZE) if elsewhere else (layer.cache, step.slots)
        q = project(x, layer.gain, 1e-5, layer.qkv, step.cos, step.sin, step.positions, slots, cache)
        if "project" in apart:
            torch.cuda.synchronize()
        out = q
        if attend is not None:
            out = torch.empty_like(q)
            attend(q, layer.cache, step.block_table, step.kv_length, HEAD_SIZE**-0.5, None, out)
        if "attend" in apart:
            torch.cuda.synchronize()
        x = add(out.flatten(1), layer.out, x)
        if "add" in apart:
            torch.cuda.synchronize()
    return x


def captured(step: Step, attend: Attend | None) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    run(step, attend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(step, attend)
    return graph, y


def timed(step: Step, attend: Attend | None) -> float:
    """Seconds of one layer, the median of replays."""
    graph, _ = captured(step, attend)
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(started.elapsed_time(ended) / 1e3 / len(step.layers))
    seconds: float = statistics.median(times)
    return seconds


def agree(y: Tensor, expected: Tensor) -> bool:
    return bool(((y.float() - expected.float()).abs() <= 0.03 + 0.03 * expected.float().abs()).all())


def check_all() -> None:
    """Every cut against the reference, over lengths at the borders of tiles; stops at the first that is wrong."""
    lengths = (0, 1, 15, 16, 17, 31, 33, 255, 256, 257, 5000)
    cuts = (
        Cut(8, 16, 1, 1, 152),
        Cut(4, 8, 2, 2, 152),
        Cut(8, 4, 3, 1, 128),
        Cut(8, 1, 2, 2, 255),
    )
    heads = ((32, 8, 128), (7, 1, 128), (6, 6, 64), (16, 2, 64))
    kinds = tuple(every(STORAGES.items(), heads, (None, 100)))
    cases = []
    for index, (kind, sizes, window) in enumerate(kinds):
        for cut in cuts if index < 3 else cuts[index % 4 : index % 4 + 1]:
            spread = max(1, 256 // (sizes[2] * kind[1].itemsize)) if index % 2 else cut.spread
            cases.append((replace(cut, spread=spread), *kind, sizes, window))
    compile_all((cut, storage, sizes, window) for cut, _, storage, sizes, window in cases)
    for cut, name, storage, sizes, window in cases:
        for rows in (lengths, (257,), (300,) * 20):
            error = worst(cut, storage, sizes, window, rows)
            if error > 1:
                sys.exit(f"WRONG {name} {sizes} window {window} {rows} {cut}: {error:.3g} of what is allowed")
    print(f"check: {len(cases)} kinds of cache, heads and cuts agree with the reference", flush=True)


def worst(
    cut: Cut, storage: torch.dtype, sizes: tuple[int, int, int], window: int | None, lengths: Sequence[int]
) -> float:
    """Largest error of the kernel in parts of what is allowed; entries that no row may see are NaN."""
    num_heads, num_kv_heads, size = sizes
    used = [-(-length // BLOCK_SIZE) for length in lengths]
    ids = torch.randperm(sum(used) + 1, device=CUDA).int()
    table = torch.full((len(lengths), max(used)), int(ids[-1]), dtype=torch.int32, device=CUDA)
    cache = dict(make_cache((sum(used) + 1, BLOCK_SIZE, num_kv_heads, size), storage))
    poisoned = ("key_scales", "value_scales") if storage == torch.int8 else ("keys", "values")
    first = 0
    for row, count in enumerate(used):
        table[row, :count] = ids[first : first + count]
        first += count
        if lengths[row] % BLOCK_SIZE:
            for name in poisoned:
                cache[name][int(table[row, count - 1]), lengths[row] % BLOCK_SIZE :] = float("nan")
    for name in poisoned:
        cache[name][int(ids[-1])] = float("nan")
    q = 2 * torch.randn(len(lengths), num_heads, size, dtype=DTYPE, device=CUDA)
    kv_length = torch.tensor(lengths, dtype=torch.int32, device=CUDA)
    wide = {name: cache[name].float() for name in ("keys", "values")}
    if storage == torch.int8:
        wide = {name: wide[name] * cache[f"{name[:-1]}_scales"].unsqueeze(-1) for name in wide}
    pages = Pages(torch.arange(len(lengths) + 1, device=CUDA), kv_length, table, 1)
    expected = paged_attention(q.float(), wide, pages, size**-0.5, window)
    kernel = ClusterAttention(_always(cut))
    most = 0.0
    for _ in range(3):
        out = torch.full_like(q, float("nan"))
        kernel(q, cache, table, kv_length, size**-0.5, window, out)
        error = (out.float() - expected).abs() / (1e-2 + 1.6e-2 * expected.abs())
        most = max(most, float(error.nan_to_num(nan=1e9).max()))
    return most


if __name__ == "__main__":
    main()
