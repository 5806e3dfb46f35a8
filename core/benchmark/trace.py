"""Profiles a few steps with torch's profiler, and reads from the trace where the GPU's time went.

Each step lies under a mark on the CPU, from the launch of the step before it to its own. A GPU event belongs to the
step whose mark holds the call that launched it; the kernels of a replayed CUDA graph all name one such call.

    CPU   |---- plexor step ----|---- plexor step ----|
               launch 7              launch 8
    GPU             [a 7][b 7]            [a 8][b 8]
                    idle between steps:  ^
"""

from __future__ import annotations

import json
import statistics
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from plexor.benchmark.workloads import Workload
from plexor.runtime.request import Output
from plexor.runtime.stats import StepStats

MARK = "plexor step"
NUM_STEPS = 8
SETTLE_STEPS = 32
"""Steps before the profiled ones in workloads that have as many: by then no prompt is left in most of them."""

_LAUNCHES = frozenset({"cuda_runtime", "cuda_driver"})
_COPIES = frozenset({"gpu_memcpy", "gpu_memset"})


@dataclass(frozen=True, slots=True)
class KernelTime:
    """One kernel over all steps. seconds: of all its calls; where kernels overlap each counts in full."""

    name: str
    seconds: float
    calls: int


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """What the GPU did in the profiled steps; times in seconds.

    span: from the first event to the end of the last. busy: during which at least one event ran. gaps: from the end
    of a step's last kernel to the next step's first, one fewer than there are steps.
    """

    num_steps: int
    span: float
    busy: float
    gaps: tuple[float, ...]
    kernels: tuple[KernelTime, ...]

    def lines(self, most: int = 20) -> list[str]:
        """For a person to read."""
        if not self.num_steps:
            return ["the trace holds no GPU kernels"]
        share = f"{self.busy / self.span:.1%}"
        found = [f"{self.num_steps} steps in {self.span * 1e3:.3f} ms: the GPU was busy {share} of the time"]
        if self.gaps:
            middle, largest = statistics.median(self.gaps) * 1e6, max(self.gaps) * 1e6
            found.append(f"idle between steps: median {middle:.1f} us, most {largest:.1f} us")
        found.append(f"{'us a step':>12}{'calls a step':>14}{'of span':>9}  kernel")
        for kernel in self.kernels[:most]:
            each, calls = kernel.seconds * 1e6 / self.num_steps, kernel.calls / self.num_steps
            found.append(f"{each:12.1f}{calls:14.1f}{kernel.seconds / self.span:9.1%}  {kernel.name[:120]}")
        if len(self.kernels) > most:
            found.append(f"and {len(self.kernels) - most} more")
        return found


class StepProfiler:
    """Profiles the steps of what runs inside the block, once `skip` have been launched; a StepObserver.

    What runs must be over before the block ends. The profiler makes launches slower, not kernels.
    """

    def __init__(self, skip: int, num_steps: int) -> None:
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._profile = profile(activities=kinds)
        self._first, self._last = skip, skip + num_steps
        self._launched = 0
        self._mark: record_function | None = None
        self._runs = False

    def __enter__(self) -> StepProfiler:
        self._advance()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def on_step(self, stats: StepStats) -> None:
        self._launched += 1
        self._advance()

    def on_finish(self, output: Output) -> None:
        pass

    def write(self, file: Path) -> None:
        """The trace, for chrome://tracing or Perfetto."""
        self._profile.export_chrome_trace(str(file))

    def _advance(self) -> None:
        self._close_mark()
        if self._launched == self._first:
            self._profile.start()
            self._runs = True
        if self._first <= self._launched < self._last:
            self._mark = record_function(MARK)
            self._mark.__enter__()
        else:
            self._stop()

    def _stop(self) -> None:
        self._close_mark()
        if self._runs:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._profile.stop()
            self._runs = False

    def _close_mark(self) -> None:
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None


def steps_before(workload: Workload) -> int:
    """How many steps to let pass before the profiled ones."""
    return SETTLE_STEPS if workload.new_tokens > SETTLE_STEPS + NUM_STEPS else 0


def read_trace(file: Path) -> TraceSummary:
    """The summary of a trace that `StepProfiler.write` wrote."""
    return summarise(json.loads(file.read_text(encoding="utf-8"))["traceEvents"])


def summarise(events: Iterable[Mapping[str, Any]]) -> TraceSummary:
    """The events of a Chrome trace, times in microseconds, to a summary; what no marked step launched is left out."""
    listed = [event for event in events if event.get("ph") == "X"]
    marks = sorted(
        _interval(event) for event in listed if (event.get("cat"), event["name"]) == ("user_annotation", MARK)
    )
    launched = {_correlation(event): event["ts"] for event in listed if event.get("cat") in _LAUNCHES}
    steps: dict[int, list[Mapping[str, Any]]] = {}
    for event in listed:
        if event.get("cat") == "kernel" or event.get("cat") in _COPIES:
            step = _holding(marks, launched.get(_correlation(event)))
            if step is not None:
                steps.setdefault(step, []).append(event)
    return _sum_up([steps[number] for number in sorted(steps)])


def _sum_up(steps: Sequence[Sequence[Mapping[str, Any]]]) -> TraceSummary:
    intervals = sorted(_interval(event) for step in steps for event in step)
    kernels = [[event for event in step if event["cat"] == "kernel"] for step in steps]
    ends = [
        (min(starts), max(stops))
        for starts, stops in (zip(*map(_interval, step), strict=True) for step in kernels if step)
    ]
    gaps = tuple(max(after[0] - before[1], 0) / 1e6 for before, after in pairwise(ends))
    span = max((stop for _, stop in intervals), default=0) - (intervals[0][0] if intervals else 0)
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in (event for step in steps for event in step):
        seconds[event["name"]] += event["dur"] / 1e6
        calls[event["name"]] += 1
    times = tuple(KernelTime(name, total, calls[name]) for name, total in seconds.most_common())
    return TraceSummary(len(steps), span / 1e6, _covered(intervals) / 1e6, gaps, times)


def _covered(intervals: Sequence[tuple[float, float]]) -> float:
    """The length of the union of sorted intervals."""
    total, reached = 0.0, float("-inf")
    for start, stop in intervals:
        total += max(stop - max(start, reached), 0)
        reached = max(reached, stop)
    return total


def _holding(marks: Sequence[tuple[float, float]], moment: float | None) -> int | None:
    """The number of the mark that a moment lies in."""
    if moment is None:
        return None
    index = bisect_right(marks, (moment, float("inf"))) - 1
    return index if index >= 0 and moment <= marks[index][1] else None


def _interval(event: Mapping[str, Any]) -> tuple[float, float]:
    return event["ts"], event["ts"] + event["dur"]


def _correlation(event: Mapping[str, Any]) -> object:
    return event.get("args", {}).get("correlation")
