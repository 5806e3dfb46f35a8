"""The summary of a trace made by hand, and the profiler around steps that run nowhere."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from plexor.benchmark.trace import MARK, StepProfiler, read_trace, steps_before, summarise
from plexor.benchmark.workloads import Workload
from plexor.runtime.stats import StepStats

Event = dict[str, Any]
STATS = StepStats(
    num_tokens=1,
    num_sampled=1,
    num_running=1,
    num_waiting=0,
    num_preempted=0,
    free_blocks=0,
    total_blocks=1,
    prefix_queries=0,
    prefix_hits=0,
)


def event(cat: str, name: str, ts: float, dur: float, correlation: int | None = None) -> Event:
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}


# Two steps, each one graph launch with kernels a and b; b overlaps a in the second, which also copies its tokens.
TRACE = [
    {"ph": "M", "name": "process_name", "args": {"name": "python"}},
    event("kernel", "earlier", 0, 50, 1),
    event("cuda_runtime", "cudaLaunchKernel", 5, 3, 1),
    event("user_annotation", MARK, 100, 100),
    event("cuda_runtime", "cudaGraphLaunch", 110, 5, 7),
    event("user_annotation", MARK, 200, 100),
    event("cuda_driver", "cuGraphLaunch", 210, 5, 8),
    event("kernel", "a", 120, 30, 7),
    event("kernel", "b", 150, 60, 7),
    event("kernel", "a", 230, 40, 8),
    event("kernel", "b", 260, 20, 8),
    event("gpu_memcpy", "copy", 300, 10, 8),
    event("gpu_user_annotation", MARK, 120, 90),
    event("cpu_op", "aten::add", 105, 90),
]


def test_events_belong_to_the_step_that_launched_them() -> None:
    summary = summarise(TRACE)
    assert summary.num_steps == 2
    assert [(kernel.name, round(kernel.seconds * 1e6), kernel.calls) for kernel in summary.kernels] == [
        ("b", 80, 2),
        ("a", 70, 2),
        ("copy", 10, 1),
    ]


def test_time_that_kernels_share_is_busy_once() -> None:
    summary = summarise(TRACE)
    assert summary.span * 1e6 == pytest.approx(310 - 120)
    assert summary.busy * 1e6 == pytest.approx(90 + 50 + 10)


def test_idle_between_steps_lies_between_kernels() -> None:
    assert summarise(TRACE).gaps == (pytest.approx(20e-6),)
    third = [event("user_annotation", MARK, 300, 100), event("cuda_runtime", "cudaLaunchKernel", 320, 5, 9)]
    overlapping = [*TRACE, *third, event("kernel", "a", 275, 30, 9)]
    assert summarise(overlapping).gaps == (pytest.approx(20e-6), 0)


def test_the_lines_say_it_for_one_step() -> None:
    lines = summarise(TRACE).lines(most=2)
    assert lines[0] == "2 steps in 0.190 ms: the GPU was busy 78.9% of the time"
    assert lines[1] == "idle between steps: median 20.0 us, most 20.0 us"
    assert lines[3].split() == ["40.0", "1.0", "42.1%", "b"]
    assert lines[-1] == "and 1 more"


def test_a_trace_without_a_gpu_says_so() -> None:
    assert summarise([event("cpu_op", "aten::add", 0, 5)]).lines() == ["the trace holds no GPU kernels"]


def test_the_profiler_marks_the_steps_it_was_told_to(tmp_path: Path) -> None:
    with StepProfiler(skip=2, num_steps=3) as profiler:
        for number in range(8):
            torch.ones(number + 1)
            profiler.on_step(STATS)
    profiler.on_step(STATS)  # an engine that runs on goes on telling
    file = tmp_path / "trace.json"
    profiler.write(file)
    events = json.loads(file.read_text())["traceEvents"]
    marks = [event for event in events if event["name"] == MARK and event["cat"] == "user_annotation"]
    assert len(marks) == 3
    assert read_trace(file).num_steps == 0


def test_the_profiler_marks_a_step_that_is_the_only_one(tmp_path: Path) -> None:
    with StepProfiler(skip=0, num_steps=8) as profiler:
        profiler.on_step(STATS)
    file = tmp_path / "trace.json"
    profiler.write(file)
    names = [event["name"] for event in json.loads(file.read_text())["traceEvents"]]
    assert names.count(MARK) >= 1


def test_prompts_are_let_pass_where_there_are_steps_after_them() -> None:
    assert steps_before(Workload("", "decode", 4, 128, 256)) > 0
    assert steps_before(Workload("", "prefill", 1, 8192, 1)) == 0
