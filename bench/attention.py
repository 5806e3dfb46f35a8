"""Times attention on a GPU: `python bench/attention.py [--decode] [--prefill] [--sweep]`.

Launches run in CUDA graphs, one after another as the layers of a model, over caches that together do not fit the
device's own cache. Decodes are given in microseconds and TB/s of keys and values, prefills in TFLOP/s of what rows
see. Providers are held to the reference first. `--sweep` tries variants of the Triton kernels and prints the best.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from operator import itemgetter

import torch
from torch import Tensor

from plexor.batch import LayerCache, Pages, Prefill
from plexor.extension import builtin
from plexor.extension.specs import Kernel
from plexor.kernels.reference.kv_write import saturated
from plexor.kernels.reference.paged_attention import paged_attention
from plexor.kernels.table import KernelTable, bound
from plexor.kernels.triton.decode_attention import DecodeAttention, DecodeTuning, decode_tuning
from plexor.kernels.triton.paged_attention import after_decodes
from plexor.kernels.triton.prefill_attention import PrefillTuning, prefill_attention, prefill_tuning

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 32, 8, 128
BLOCK_SIZE = 16
REPLAYS = 9
CUDA = torch.device("cuda")
DTYPE = torch.bfloat16
STORAGES = (torch.bfloat16, torch.float8_e4m3fn)

DECODES = (
    (1, 256),
    (1, 1024),
    (1, 8192),
    (1, 65536),
    (8, 256),
    (64, 256),
    (256, 256),
    (256, 640),
    (32, 4096),
)
"""(sequences, positions of each)."""

SWEPT_DECODES = ((1, 256), (1, 1024), (1, 8192), (1, 65536), (8, 256), (64, 256), (256, 640), (32, 4096))

PREFILLS = (
    ("1 x 8k", ((8192, 8192),)),
    ("8 x 1k", ((1024, 1024),) * 8),
    ("64 x 128", ((128, 128),) * 64),
    ("2k after 6k", ((2048, 8192),)),
    ("1 x 32k", ((32768, 32768),)),
)
"""(rows, positions) of each piece."""

Attend = Callable[[Tensor, LayerCache, Pages], Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """Queries, as many caches as there are launches in a graph, and where the sequences lie in each of them."""

    q: Tensor
    caches: tuple[LayerCache, ...]
    pages: Pages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--decode", action="store_true", help="only decodes")
    parser.add_argument("--prefill", action="store_true", help="only prefills")
    parser.add_argument("--sweep", action="store_true", help="try variants of the Triton kernels")
    arguments = parser.parse_args()
    both = arguments.decode == arguments.prefill
    torch.manual_seed(0)
    table = KernelTable(builtin.ops(), builtin.kernels())
    for kernel in providers(table):
        check(bind(kernel))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {NUM_HEADS}/{NUM_KV_HEADS} heads of {HEAD_SIZE}")
    if arguments.decode or both:
        (sweep_decodes if arguments.sweep else time_decodes)()
    if arguments.prefill or both:
        (sweep_prefills if arguments.sweep else time_prefills)()


def time_decodes() -> None:
    for storage in STORAGES:
        for num_sequences, length in DECODES:
            case = decode_case(num_sequences, length, storage)
            seconds = timed(case, attend_decodes(decode_tuning))
            print(f"decode {num_sequences} x {length:<6} {as_rate(case, seconds)}", flush=True)


def sweep_decodes() -> None:
    for storage in STORAGES:
        chosen = [decode_tuning(num_rows, HEAD_SIZE, storage.itemsize) for num_rows in (1, 64)]
        variants = tuple(dict.fromkeys(variant for tuning in chosen for variant in decode_variants(tuning)))
        for num_sequences, length in SWEPT_DECODES:
            case = decode_case(num_sequences, length, storage)
            expected = attend_decodes(decode_tuning)(case.q, case.caches[0], case.pages)
            times = {}
            for variant in variants:
                attend = attend_decodes(partial(_chosen, variant))
                torch.testing.assert_close(attend(case.q, case.caches[0], case.pages), expected, rtol=2e-2, atol=1e-2)
                times[variant] = timed(case, attend)
            print(f"decode {num_sequences} x {length}, {storage}")
            for variant, seconds in sorted(times.items(), key=itemgetter(1))[:6]:
                print(f"    {as_rate(case, seconds)}  {variant}", flush=True)
            now = decode_tuning(num_sequences, HEAD_SIZE, storage.itemsize)
            print(f"    {as_rate(case, times[now])}  as chosen now", flush=True)


def decode_variants(chosen: DecodeTuning) -> Iterator[DecodeTuning]:
    """The one that is chosen now first. Only tiles, stages and registers are compiled anew."""
    yield chosen
    for tile, stages, registers in (
        (32, 3, 128),
        (32, 4, 128),
        (64, 3, 128),
        (64, 3, 168),
        (64, 4, 168),
        (128, 2, 168),
        (128, 3, 168),
    ):
        for programs in (2, 3, 4):
            for least in (128, 256):
                variant = DecodeTuning(tile, 4, stages, registers, programs, least, chosen.most)
                if variant != chosen:
                    yield variant
    for most in (8, 16, 64):
        yield replace(chosen, most=most)


def time_prefills() -> None:
    table = KernelTable(builtin.ops(), builtin.kernels())
    for name, pieces in PREFILLS:
        case = prefill_case(pieces)
        for kernel in providers(table):
            attend = bind(kernel)
            started = time.perf_counter()
            attend(case.q, case.caches[0], case.pages)
            torch.cuda.synchronize()
            first = time.perf_counter() - started
            print(
                f"prefill {name:<12} {kernel.provider:<7} {as_work(pieces, timed(case, attend))}  first {first:.2f} s",
                flush=True,
            )


def sweep_prefills() -> None:
    for name, pieces in PREFILLS:
        case = prefill_case(pieces)
        chosen = prefill_tuning(max(rows for rows, _ in pieces) * NUM_HEADS // NUM_KV_HEADS, HEAD_SIZE, DTYPE)
        variants = (
            chosen,
            PrefillTuning(128, 32, 8, 3, 128),
            PrefillTuning(128, 32, 8, 4, 128),
            PrefillTuning(128, 64, 8, 2),
            PrefillTuning(128, 64, 8, 2, 128),
            PrefillTuning(128, 64, 8, 3),
            PrefillTuning(128, 64, 8, 4),
            PrefillTuning(128, 128, 8, 3),
            PrefillTuning(128, 64, 4, 2),
            PrefillTuning(64, 64, 4, 2),
            PrefillTuning(64, 64, 4, 3),
            PrefillTuning(64, 128, 4, 2),
        )
        expected = attend_prefills(chosen)(case.q, case.caches[0], case.pages)
        times = {}
        for variant in variants:
            attend = attend_prefills(variant)
            torch.testing.assert_close(attend(case.q, case.caches[0], case.pages), expected, rtol=2e-2, atol=1e-2)
            times[variant] = timed(case, attend)
        print(f"prefill {name}")
        for variant, seconds in sorted(times.items(), key=itemgetter(1)):
            mark = "  as chosen now" if variant == chosen else ""
            print(f"    {as_work(pieces, seconds)}  {variant}{mark}", flush=True)


def decode_case(num_sequences: int, length: int, storage: torch.dtype) -> Case:
    """One row of each sequence, all of the same length."""
    case = make_case(((1, length),) * num_sequences, storage, 1 << 30)
    return replace(case, pages=replace(case.pages, num_decodes=num_sequences, prefills=()))


def prefill_case(pieces: Sequence[tuple[int, int]]) -> Case:
    return make_case(pieces, DTYPE, 1 << 27)


def make_case(pieces: Sequence[tuple[int, int]], storage: torch.dtype, least_bytes: int) -> Case:
    """Blocks lie anywhere in a cache; a graph reads at least `least_bytes`."""
    widest = max(-(-length // BLOCK_SIZE) for _, length in pieces)
    num_blocks = widest * len(pieces)
    shape = (num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_SIZE)
    bytes_each = 2 * num_blocks * BLOCK_SIZE * NUM_KV_HEADS * HEAD_SIZE * storage.itemsize
    caches = []
    for _ in range(max(4, least_bytes // bytes_each)):
        parts = (torch.randn(shape, dtype=DTYPE, device=CUDA) for _ in range(2))
        keys, values = (part if storage == DTYPE else saturated(part.float(), storage) for part in parts)
        caches.append({"keys": keys, "values": values})
    starts = [0, *accumulate(rows for rows, _ in pieces)]
    pages = Pages(
        query_start=torch.tensor(starts, dtype=torch.int32, device=CUDA),
        kv_length=torch.tensor([length for _, length in pieces], dtype=torch.int32, device=CUDA),
        block_table=torch.randperm(num_blocks, device=CUDA).to(torch.int32).view(len(pieces), widest),
        max_query=max(rows for rows, _ in pieces),
        prefills=tuple(Prefill(s, starts[s], *piece) for s, piece in enumerate(pieces)),
    )
    return Case(torch.randn(starts[-1], NUM_HEADS, HEAD_SIZE, dtype=DTYPE, device=CUDA), tuple(caches), pages)


def providers(table: KernelTable) -> list[Kernel]:
    return [kernel for kernel in table.kernels("paged_attention") if "cuda" in kernel.devices]


def check(attend: Attend) -> None:
    """Decodes and pieces together agree with the reference; AssertionError where they do not."""
    pieces = ((1, 1), (1, 5000), (1, 300), (1100, 1100), (40, 90), (1030, 2054))
    case = make_case(pieces, DTYPE, 0)
    pages = replace(case.pages, num_decodes=3, prefills=case.pages.prefills[3:])
    expected = paged_attention(case.q, case.caches[0], pages, HEAD_SIZE**-0.5, None)
    torch.testing.assert_close(attend(case.q, case.caches[0], pages), expected, rtol=2e-2, atol=1e-2)


def bind(kernel: Kernel) -> Attend:
    function = bound(kernel)
    return lambda q, cache, pages: function(q, cache, pages, HEAD_SIZE**-0.5, None)


def attend_decodes(tuning: Callable[[int, int, int], DecodeTuning]) -> Attend:
    kernel = DecodeAttention(tuning)

    def attend(q: Tensor, cache: LayerCache, pages: Pages) -> Tensor:
        out = torch.empty_like(q)
        kernel(q, cache, pages.block_table, pages.kv_length, HEAD_SIZE**-0.5, None, out)
        return out

    return attend


def attend_prefills(tuning: PrefillTuning) -> Attend:
    def attend(q: Tensor, cache: LayerCache, pages: Pages) -> Tensor:
        out = torch.empty_like(q)
        prefill_attention(q, cache, after_decodes(pages, q.shape[0]), HEAD_SIZE**-0.5, None, out, tuning)
        return out

    return attend


def timed(case: Case, attend: Attend) -> float:
    """Seconds of one launch, the median of replays of a graph with one for each cache."""
    attend(case.q, case.caches[0], case.pages)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for cache in case.caches:
            attend(case.q, cache, case.pages)
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(started.elapsed_time(ended) / 1e3 / len(case.caches))
    seconds: float = statistics.median(times)
    return seconds


def _chosen(variant: DecodeTuning, num_rows: int, size: int, element_bytes: int) -> DecodeTuning:
    return variant


def as_rate(case: Case, seconds: float) -> str:
    cache = case.caches[0]["keys"]
    num_bytes = 2 * cache.numel() * cache.element_size()
    return (
        f"{str(cache.dtype).removeprefix('torch.'):<13} {seconds * 1e6:8.1f} us {num_bytes / seconds / 1e12:5.2f} TB/s"
    )


def as_work(pieces: Sequence[tuple[int, int]], seconds: float) -> str:
    seen = sum(rows * (length - rows) + rows * (rows + 1) // 2 for rows, length in pieces)
    operations = 4 * NUM_HEADS * HEAD_SIZE * seen
    return f"{seconds * 1e6:9.1f} us {operations / seconds / 1e12:6.1f} TFLOP/s"


if __name__ == "__main__":
    main()
