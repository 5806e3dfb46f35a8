"""A run as a whole: what is left out, which figures there are, and what is said of where they come from."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from plexor import Engine, EngineConfig, __version__
from plexor.benchmark import run
from plexor.benchmark.bound import Bound, DeviceRates
from plexor.benchmark.measure import Timing
from plexor.benchmark.run import Labels, Limits, Measured, Memory, find_commit, make_figures, measure
from plexor.benchmark.workloads import Workload
from plexor.errors import PlexorError
from plexor.runtime.ledger import LedgerLine, RunPlan

DECODE = Workload("decode_bs2", "decode", requests=2, prompt_tokens=8, new_tokens=4)
PREFILL = Workload("prefill_1k", "prefill", requests=1, prompt_tokens=30, new_tokens=1)
SERVE = Workload("serve_6_2", "serve", requests=5, prompt_tokens=6, new_tokens=2)
START = Workload("start", "start", requests=1, prompt_tokens=8, new_tokens=1)
LABELS = Labels("any-1b", "dense", "dense", 2, "GPU of a kind", "2026-11-22", "abc")
GIB = 1 << 30


@pytest.fixture
def engine(tiny: Path) -> Iterator[Engine]:
    with Engine(config=EngineConfig(model=str(tiny), device="cpu", num_blocks=16, max_sequences=4)) as engine:
        yield engine


def test_a_workload_that_fails_leaves_the_others(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def once(engine: Engine, workload: Workload, repetition: int) -> Timing:
        if workload is SERVE:
            raise PlexorError("a step needed more memory")
        return Timing(1.0, 2.0)

    monkeypatch.setattr(run, "run_once", once)
    monkeypatch.setattr(run, "run_repeatedly", lambda *given: [once(*given)])
    said: list[str] = []
    measured = measure(engine, (SERVE, DECODE, Workload("big", "decode", 99, 8, 4)), None, said.append)
    assert measured.timings == {DECODE: Timing(1.0, 2.0)}
    assert said == [
        "serve_6_2 is left out: a step needed more memory",
        "decode_bs2: 2.000 s",
        "big is left out: 4 requests run at once: raise --max-sequences",
    ]
    assert measured.memory.peak > 0


def test_a_kind_has_its_own_number_of_repetitions(engine: Engine) -> None:
    said: list[str] = []
    measure(engine, (SERVE, DECODE), None, said.append)
    assert [line.count(",") + 1 for line in said] == [1, 3]
    said.clear()
    measure(engine, (SERVE, DECODE), 2, said.append)
    assert [line.count(",") + 1 for line in said] == [2, 2]


def test_every_figure_stands_beside_its_limit() -> None:
    lines = (LedgerLine("weights", GIB, ""), LedgerLine("KV blocks", 2 * GIB, ""), LedgerLine("left", 9 * GIB, ""))
    plan = RunPlan("GPU of a kind", "bfloat16", 64, 301, (), (), lines, "")
    bounds = {DECODE: Bound(0.1, 0.4), PREFILL: Bound(0.05, 0.05), SERVE: Bound(0.1, 0.5), START: Bound(0.1, 0.1)}
    limits = Limits(DeviceRates(1.0, {torch.bfloat16: 1.0}, 1.0, 8), bounds, plan)
    timings = {
        START: Timing(3.0, 3.0),
        DECODE: Timing(0.2, 0.8),
        PREFILL: Timing(0.1, 0.125),
        SERVE: Timing(0.3, 2.0),
    }
    figures = make_figures(Measured(timings, Memory(GIB, 4 * GIB)), limits, LABELS)
    assert [(each.workload, each.metric, each.value, each.unit, each.limit) for each in figures] == [
        ("start", "time to first token", 3.0, "s", None),
        ("decode_bs2", "time per token", 200.0, "ms", 100.0),
        ("decode_bs2", "time to first token", 200.0, "ms", 100.0),
        ("decode_bs2", "tokens out", 10.0, "tok/s", 20.0),
        ("prefill_1k", "time to first token", 125.0, "ms", 50.0),
        ("serve_6_2", "tokens in and out", 20.0, "tok/s", 80.0),
        ("serve_6_2", "tokens out", 5.0, "tok/s", 20.0),
        ("all", "peak memory", 1.0, "GiB", 3.0),
        ("all", "memory in use on the device", 4.0, "GiB", 3.0),
    ]
    assert {(each.shape, each.gpus, each.gpu, each.date, each.commit) for each in figures} == {
        ("any-1b", 2, "GPU of a kind", "2026-11-22", "abc")
    }


def test_a_changed_checkout_is_told_from_a_clean_one_and_from_none(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"ls-files": "__init__.py", "rev-parse": "abc1234", "status": ""}
    monkeypatch.setattr(run, "_git", lambda folder, verb, *rest: answers[verb])
    assert find_commit() == "abc1234"
    answers["status"] = " M core/batch.py"
    assert find_commit() == "abc1234+"
    answers["ls-files"] = None  # type: ignore[assignment]
    assert find_commit() == f"v{__version__}"
