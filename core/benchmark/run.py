"""A whole run: workloads on an engine, then the limits of its device, then each figure beside its limit."""

from __future__ import annotations

import gc
import resource
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

import plexor
from plexor.benchmark.bound import Bound, DeviceRates, bound_workload
from plexor.benchmark.cost import count_model
from plexor.benchmark.limits import measure_rates
from plexor.benchmark.measure import Timing, median, run_once, run_repeatedly, seconds_since_start, why_not
from plexor.benchmark.report import Figure
from plexor.benchmark.trace import NUM_STEPS, StepProfiler, TraceSummary, read_trace, steps_before
from plexor.benchmark.workloads import Workload
from plexor.checkpoint.folder import ModelFolder
from plexor.config import EngineConfig
from plexor.errors import PlexorError
from plexor.extension.catalog import Catalog
from plexor.runtime.engine import Engine
from plexor.runtime.ledger import RunPlan, count_run
from plexor.runtime.loading import plan_model

Say = Callable[[str], None]
"""Told of progress, one line at a time."""

GIB = 1 << 30
REPEATS, SERVE_REPEATS = 3, 1


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on rank 0's device at the highest. used: of the whole device, by whomever; None on a CPU."""

    peak: int
    used: int | None


@dataclass(frozen=True, slots=True)
class Measured:
    """What an engine gave. timings: of the workloads that could run, `start` counted from the start of the process."""

    timings: dict[Workload, Timing]
    memory: Memory


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds the figures of a run: the device's rates and the plan that `plexor explain` prints."""

    rates: DeviceRates
    bounds: dict[Workload, Bound]
    plan: RunPlan


@dataclass(frozen=True, slots=True)
class Labels:
    """What all figures of a run have in common; as in Figure."""

    shape: str
    precision: str
    kv: str
    gpus: int
    gpu: str
    date: str
    commit: str


def measure(engine: Engine, workloads: Sequence[Workload], repeats: int | None, say: Say) -> Measured:
    """Run each workload that fits; why another does not is said. repeats: None for each kind's own number."""
    _reset_peak(engine.core.device)
    timings = {}
    for workload in workloads:
        reason = why_not(workload, engine)
        try:
            if reason is None:
                timings[workload] = _time(engine, workload, repeats, say)
        except PlexorError as error:  # such as a step that takes more memory than is left: the others may still fit
            reason = str(error)
        if reason is not None:
            say(f"{workload.name} is left out: {reason}")
    return Measured(timings, _memory(engine.core.device))


def profile_steps(engine: Engine, workload: Workload, folder: Path) -> TraceSummary:
    """Profile a few steps of a workload that has been run before; writes a trace and its summary into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    profiler = StepProfiler(steps_before(workload), NUM_STEPS)
    engine.core.observe(profiler)
    with profiler:
        run_once(engine, workload, -1)
    file = folder / f"{workload.name}.json"
    profiler.write(file)
    summary = read_trace(file)
    (folder / f"{workload.name}.txt").write_text("\n".join([*summary.lines(), ""]), encoding="utf-8")
    return summary


def find_limits(
    config: EngineConfig, catalog: Catalog, folder: ModelFolder, workloads: Sequence[Workload], say: Say
) -> Limits:
    """Measure the device once no engine holds its memory any more."""
    say("measuring what the device can do")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    built = plan_model(config, catalog, catalog.kernel_table(config.kernels), folder)
    cost = count_model(built)
    rates = measure_rates(built.build.device, built.build.dtype, cost)
    bounds = {workload: bound_workload(workload, cost, rates, config.max_sequences) for workload in workloads}
    return Limits(rates, bounds, count_run(config, built))


def make_labels(shape: str, config: EngineConfig, device: torch.device, plan: RunPlan, commit: str | None) -> Labels:
    """commit: None to find it out."""
    gpus = config.tensor_parallel if device.type == "cuda" else 0
    today = datetime.now(UTC).date().isoformat()
    return Labels(shape, config.precision, config.kv, gpus, plan.device_name, today, commit or find_commit())


def make_figures(measured: Measured, limits: Limits, labels: Labels) -> list[Figure]:
    """Every figure of a run beside its limit, in the order of the table."""
    rows = [row for workload, timing in measured.timings.items() for row in _rows(workload, timing, limits.bounds)]
    planned = limits.plan.taken / GIB
    rows.append(("all", "peak memory", measured.memory.peak / GIB, "GiB", planned))
    if measured.memory.used is not None:
        rows.append(("all", "memory in use on the device", measured.memory.used / GIB, "GiB", planned))
    return [
        Figure(
            shape=labels.shape,
            precision=labels.precision,
            kv=labels.kv,
            gpus=labels.gpus,
            workload=workload,
            metric=metric,
            value=value,
            unit=unit,
            limit=limit,
            gpu=labels.gpu,
            date=labels.date,
            commit=labels.commit,
        )
        for workload, metric, value, unit, limit in rows
    ]


def find_commit() -> str:
    """The checkout's commit, "+" behind it where files have been changed; the version where this is no checkout."""
    home = Path(plexor.__file__).resolve().parent
    if _git(home, "ls-files", "--error-unmatch", "__init__.py") is None:
        return f"v{plexor.__version__}"
    commit = _git(home, "rev-parse", "--short", "HEAD") or ""
    return commit + ("+" if _git(home, "status", "--porcelain", "--untracked-files=no") else "")


def _time(engine: Engine, workload: Workload, repeats: int | None, say: Say) -> Timing:
    if workload.kind == "start":
        run_once(engine, workload, 0)
        seconds = seconds_since_start()
        say(f"{workload.name}: {seconds:.2f} s")
        return Timing(seconds, seconds)
    count = repeats or (SERVE_REPEATS if workload.kind == "serve" else REPEATS)
    timings = run_repeatedly(engine, workload, count)
    say(f"{workload.name}: {', '.join(f'{timing.total:.3f}' for timing in timings)} s")
    return median(timings)


def _rows(
    workload: Workload, timing: Timing, bounds: dict[Workload, Bound]
) -> Iterator[tuple[str, str, float, str, float | None]]:
    """(workload, metric, value, unit, limit) of one workload."""
    bound, name, requests = bounds[workload], workload.name, workload.requests
    answered = requests * workload.new_tokens
    if workload.kind == "start":
        yield name, "time to first token", timing.total, "s", None
        return
    if workload.kind == "decode":
        tokens = workload.new_tokens
        yield name, "time per token", timing.total / tokens * 1e3, "ms", bound.total / tokens * 1e3
        yield name, "time to first token", timing.first_tokens * 1e3, "ms", bound.first_tokens * 1e3
    if workload.kind == "prefill":
        yield name, "time to first token", timing.total * 1e3, "ms", bound.total * 1e3
        return
    if workload.kind == "serve":
        every = requests * workload.length
        yield name, "tokens in and out", every / timing.total, "tok/s", every / bound.total
    yield name, "tokens out", answered / timing.total, "tok/s", answered / bound.total


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _memory(device: torch.device) -> Memory:
    if device.type != "cuda":
        return Memory(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, None)
    free, total = torch.cuda.mem_get_info(device)
    return Memory(torch.cuda.max_memory_allocated(device), total - free)


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says, None where it fails or is not there."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
