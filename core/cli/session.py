"""An engine at the terminal: a progress bar while it loads, text as it comes, and figures after each answer."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from plexor.cli.options import human_bytes
from plexor.errors import PlexorError
from plexor.runtime.startup import import_engine

if TYPE_CHECKING:
    import torch

    from plexor.checkpoint.loader import Progress
    from plexor.config import EngineConfig
    from plexor.extension.catalog import Catalog
    from plexor.runtime.engine import Completion, Engine
    from plexor.runtime.prompts import Prompt
    from plexor.runtime.request import SamplingParams


@contextmanager
def open_engine(config: EngineConfig, catalog: Catalog) -> Iterator[tuple[Engine, float]]:
    """The engine and the seconds that loading took."""
    import_engine(config.device)
    from plexor.runtime.engine import Engine

    started = time.perf_counter()
    with _loading_bar() as progress:
        engine = Engine(config=config, catalog=catalog, progress=progress)
    with engine:
        yield engine, time.perf_counter() - started


@contextmanager
def _loading_bar() -> Iterator[Progress | None]:
    """A bar on standard error, if that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

    bar = Progress(
        TextColumn("loading weights"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        console=Console(file=sys.stderr),
        transient=True,
    )
    with bar:
        task = bar.add_task("loading")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def stream_answer(engine: Engine, prompt: Prompt, sampling: SamplingParams, out: TextIO) -> Completion:
    """Print an answer as it comes; PlexorError if it ended in an error."""
    from plexor.runtime.engine import Completion

    answer = Completion(prompt.token_ids)
    for so_far, delta in engine.stream(prompt, sampling):
        answer = so_far
        out.write(delta.text)
        out.flush()
    if answer.error is not None:
        raise PlexorError(answer.error)
    return answer


def figures(answer: Completion, device: torch.device) -> str:
    """tok/s over the whole answer, time to first token, peak memory, in one line."""
    count = len(answer.token_ids)
    return (
        f"{count} tokens in {answer.total_seconds:.2f} s: {tokens_per_second(answer):.1f} tok/s, first token after "
        f"{answer.first_token_seconds * 1000:.0f} ms, peak memory {human_bytes(peak_memory(device))}"
    )


def tokens_per_second(answer: Completion) -> float:
    """Generated tokens over the time from the request to the last of them."""
    return len(answer.token_ids) / answer.total_seconds if answer.total_seconds else 0.0


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest: of the GPU's allocator, or of this process on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
