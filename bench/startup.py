"""Where the time from a command to its first token goes: `python bench/startup.py --shape FILE`.

Each round is a process of its own. The stages are those of one engine, in their order; the device is waited for after
each, so they take a little longer than in `plexor bench --workloads start`, which gives the figure that counts. With
`--model` weights are read from a checkpoint, and the rate is printed; `--write DIR` makes a random one of the shape.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from plexor.config import EngineConfig
from plexor.extension.catalog import Catalog

STAGES = (
    ("plexor.runtime.engine", "find_folder", "folder"),
    ("plexor.runtime.engine", "PromptDesk", "tokenizer"),
    ("plexor.runtime.ranks", "choose_placement", "device"),
    ("plexor.runtime.loading", "build_model", "model without weights"),
    ("plexor.runtime.loading", "draw_weights", "random weights"),
    ("plexor.runtime.loading", "load_weights", "weights from files"),
    ("plexor.runtime.ranks", "_fitting_blocks", "count of cache blocks"),
    ("plexor.runtime.ranks", "allocate", "cache"),
    ("plexor.runtime.ranks", "Runner", "runner"),
)
"""Module and name of what is timed, and what it is called in the table."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", metavar="DIR", help="read this checkpoint")
    parser.add_argument("--shape", type=Path, metavar="FILE", help="draw weights of this config.json on the device")
    parser.add_argument(
        "--write", type=Path, metavar="DIR", help="write a checkpoint of the shape, and do nothing else"
    )
    parser.add_argument("--precision", default="dense")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--readers", type=int, help="threads that read a checkpoint for a GPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="say what Python does, for one round in this process")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child or arguments.profile:
        run(arguments)
    elif arguments.write:
        from gpu import write_random

        arguments.write.mkdir(parents=True)
        write_random(arguments.shape, arguments.write)
    elif arguments.model:
        print_rounds(arguments, arguments.model)
    else:
        from plexor.benchmark.shape import shape_folder

        with shape_folder(arguments.shape) as folder:
            print_rounds(arguments, str(folder))


def print_rounds(arguments: argparse.Namespace, folder: str) -> None:
    """The median of every stage over the rounds, and the fastest."""
    command = [sys.executable, __file__, "--child", "--model", folder, "--precision", arguments.precision]
    command += ["--device", arguments.device]
    command += ["--shape", str(arguments.shape)] if arguments.shape else []
    command += ["--readers", str(arguments.readers)] if arguments.readers else []
    rounds: list[dict[str, float]] = []
    for _ in range(arguments.rounds):
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rounds.append(json.loads(output.splitlines()[-1]))
    print("| stage | median | fastest |\n|---|---|---|")
    for stage in rounds[0]:
        times = [found[stage] for found in rounds]
        unit = "GB/s" if stage.startswith("rate") else "s"
        best = max(times) if unit == "GB/s" else min(times)
        print(f"| {stage} | {statistics.median(times):.3f} {unit} | {best:.3f} {unit} |")


def run(arguments: argparse.Namespace) -> None:
    """One engine from nothing to two first tokens; prints the stages as JSON, or the profile."""
    times = {"until this function": 0.0}
    entered = time.perf_counter()
    startup = import_module("plexor.runtime.startup")
    watch(times, startup, "_open_gpu", "beside the import: open the GPU")
    timed(times, "import", startup.import_engine)(arguments.device)
    import torch

    from plexor.benchmark.measure import seconds_since_start

    times["until this function"] = seconds_since_start() - (time.perf_counter() - entered)
    catalog = timed(times, "catalog", Catalog.load)()

    wait = torch.cuda.synchronize if torch.cuda.is_available() and arguments.device != "cpu" else None
    for module, name, stage in STAGES:
        watch(times, import_module(module), name, stage, wait)
    if arguments.readers:
        import_module("plexor.runtime.loading").READERS = arguments.readers
    weights = "random" if arguments.shape else "checkpoint"
    config = EngineConfig(
        model=arguments.model, precision=arguments.precision, device=arguments.device, weights=weights
    )
    profile = cProfile.Profile() if arguments.profile else None
    if profile:
        profile.enable()
    answer(times, config, catalog)
    if profile:
        profile.disable()
        pstats.Stats(profile).sort_stats("cumulative").print_stats(60)
    print(json.dumps(times))


def answer(times: dict[str, float], config: EngineConfig, catalog: Catalog) -> None:
    """Make the engine and ask it twice: what the second time does not take was brought up by the first."""
    from plexor import Engine, SamplingParams
    from plexor.benchmark.measure import seconds_since_start

    sampling = SamplingParams(temperature=0, max_tokens=1, ignore_end=True)
    with timed(times, "engine, all of the above", Engine)(config=config, catalog=catalog) as engine:
        for which in ("first", "second"):
            prompt = [len(which) + number for number in range(128)]
            timed(times, f"{which} token", engine.generate)(prompt, sampling)
            times.setdefault("until the first token", seconds_since_start())
        if "weights from files" in times:
            times["rate of weights from files"] = engine.core.report.num_bytes / times["weights from files"] / 1e9


def watch(times: dict[str, float], module: Any, name: str, stage: str, wait: Callable[[], None] | None = None) -> None:
    """Time what a module calls by this name."""
    setattr(module, name, timed(times, stage, getattr(module, name), wait))


def timed(
    times: dict[str, float], stage: str, call: Callable[..., Any], wait: Callable[[], None] | None = None
) -> Callable[..., Any]:
    """The call, which adds its seconds to a stage."""

    def and_time(*given: Any, **named: Any) -> Any:
        started = time.perf_counter()
        result = call(*given, **named)
        if wait is not None:
            wait()
        times[stage] = times.get(stage, 0.0) + time.perf_counter() - started
        return result

    return and_time


if __name__ == "__main__":
    main()
