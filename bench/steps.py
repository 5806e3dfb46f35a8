"""Where a workload's time goes, step by step: `python bench/steps.py serve_1024_128 --shape FILE --requests 128`.

The GPU's clock is read after each step that was launched, so a step's time is from the end of the step before it to its
own end, idle time included. Steps are put together by how many rows they compute and how many tokens they draw.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch

from plexor import Engine, EngineConfig
from plexor.benchmark.measure import run_once
from plexor.benchmark.shape import shape_folder
from plexor.benchmark.workloads import Workload, parse_workloads
from plexor.runtime.request import Output
from plexor.runtime.stats import StepStats


class StepClock:
    """An observer that marks the end of every step on the GPU, and when the CPU had launched it."""

    def __init__(self) -> None:
        self.steps: list[tuple[StepStats, torch.cuda.Event, float]] = []

    def on_step(self, stats: StepStats) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.steps.append((stats, event, perf_counter()))

    def on_finish(self, output: Output) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", help="names as plexor bench takes them, with commas between")
    parser.add_argument("--shape", required=True, metavar="FILE", help="a config.json")
    parser.add_argument("--requests", type=int, help="of a workload, instead of its own number")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--precision", default="dense")
    parser.add_argument("--kv", default="dense")
    parser.add_argument("--max-sequences", type=int, default=512)
    parser.add_argument("--max-step-tokens", type=int)
    chosen = parser.parse_args()
    with shape_folder(Path(chosen.shape)) as folder:
        config = EngineConfig(
            model=str(folder),
            weights="random",
            precision=chosen.precision,
            kv=chosen.kv,
            max_sequences=chosen.max_sequences,
            max_step_tokens=chosen.max_step_tokens,
            warm_up=True,
        )
        with Engine(config=config) as engine:
            clock = StepClock()
            engine.core.observe(clock)
            for workload in parse_workloads(chosen.workloads):
                if chosen.requests is not None:
                    workload = replace(workload, requests=chosen.requests)
                for number in range(chosen.rounds):
                    measure(engine, clock, workload, number)


def measure(engine: Engine, clock: StepClock, workload: Workload, number: int) -> None:
    """Run a workload once, and print its steps."""
    clock.steps.clear()
    torch.cuda.synchronize()
    timing = run_once(engine, workload, number)
    torch.cuda.synchronize()
    rate = workload.requests * workload.length / timing.total
    print(
        f"\n{workload.name}, {workload.requests} requests, round {number}: {timing.total:.3f} s, {rate:,.0f} tok/s, ",
        end="",
    )
    print(f"first tokens after {timing.first_tokens * 1e3:.1f} ms, {len(clock.steps)} steps")
    print("| rows | drawn | steps | median ms | longest ms | together s | median ms between launches |")
    print("|---|---|---|---|---|---|---|")
    for (rows, drawn), times in grouped(clock).items():
        on_gpu, on_cpu = ([pair[place] for pair in times] for place in (0, 1))
        print(
            f"| {rows} | {drawn} | {len(times)} | {statistics.median(on_gpu):.2f} | {max(on_gpu):.2f} "
            f"| {sum(on_gpu) / 1e3:.3f} | {statistics.median(on_cpu):.2f} |",
            flush=True,
        )


def grouped(clock: StepClock) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Milliseconds of each step but the first, on the GPU and between launches, by its rows and what it draws."""
    groups: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for (_, before, earlier), (stats, event, now) in zip(clock.steps, clock.steps[1:], strict=False):
        alone = stats.num_tokens == stats.num_sampled
        key = (span(stats.num_tokens), "all" if alone else span(stats.num_sampled))
        groups[key].append((before.elapsed_time(event), (now - earlier) * 1e3))
    return dict(sorted(groups.items(), key=lambda item: -sum(pair[0] for pair in item[1])))


def span(count: int, edges: Sequence[int] = (1, 8, 64, 128, 256, 384, 511, 512, 1024, 2048, 4096, 8191, 8192)) -> str:
    """The numbers that are counted as one with this one."""
    return next((f"to {edge}" for edge in edges if count <= edge), f"over {edges[-1]}")


if __name__ == "__main__":
    main()
