"""What the CPU does for a decode step, beside a device that takes no time: `python bench/host.py`.

Scheduling, packing, what is sent, committing and the engine's own bookkeeping, for as many running requests as asked.
The model is not called, and nothing is copied to a GPU: add the launch of a graph and of one or two copies there.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers

from plexor import Engine, EngineConfig, SamplingParams
from plexor.runtime.capture import DrawnRows
from plexor.runtime.graphs import DecodeSteps
from plexor.runtime.sampler import Settings
from plexor.testing.checkpoints import write_checkpoint

PROMPT_TOKENS = 64
STEPS = 200
WARM_UP = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 64, 256, 512])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| requests | median µs a step | 95th of 100 |")
    print("|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="plexor-bench-") as temporary:
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
        config = transformers.LlamaConfig(vocab_size=600, max_position_embeddings=1024, **sizes)
        folder = write_checkpoint(Path(temporary) / "model", "LlamaForCausalLM", config)
        for count in arguments.requests:
            seconds = measure(str(folder), count)
            tail = statistics.quantiles(seconds, n=20)[-1]
            print(f"| {count} | {statistics.median(seconds) * 1e6:.0f} | {tail * 1e6:.0f} |", flush=True)


def measure(folder: str, count: int) -> list[float]:
    """Seconds of each step while `count` requests decode, one step ahead as on a GPU."""
    blocks = count * ((PROMPT_TOKENS + WARM_UP + STEPS) // 16 + 2)
    config = EngineConfig(device="cpu", num_blocks=blocks, max_sequences=count, max_step_tokens=1 << 16, steps_ahead=1)
    with Engine(folder, config=config) as engine:
        engine.core._ranks.rank.runner._decodes = InstantSteps(engine.core._ranks.rank.runner._decodes, count)
        sampling = SamplingParams(temperature=0, ignore_end=True, max_tokens=STEPS + WARM_UP + 8)
        for index in range(count):
            engine._ask([(index * 31 + place * 7) % 500 + 3 for place in range(PROMPT_TOKENS)], sampling)
        for _ in range(WARM_UP):
            engine.step()
        seconds = []
        for _ in range(STEPS):
            started = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - started)
    return seconds


class InstantSteps:
    """Decode steps whose tokens are there at once."""

    def __init__(self, steps: DecodeSteps, count: int) -> None:
        self.arrays, self.take_rows, self.close = steps.arrays, steps.take_rows, steps.close
        numbers = torch.zeros(count, dtype=torch.int64)
        floats = numbers.float()
        settings = Settings(floats, numbers.int(), floats, floats, numbers)
        self._drawn = DrawnRows(torch.arange(count) % 500 + 3, torch.zeros(count, 600), settings, numbers)

    def run(self, num_rows: int) -> DrawnRows:
        return self._drawn


if __name__ == "__main__":
    main()
