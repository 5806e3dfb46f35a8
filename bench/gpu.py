"""What a GPU gives, and whether it says what the CPU says: `python bench/gpu.py --model demo --model demo-moe`.

For each model: seconds to load, tokens per second at 1 and 16 requests, peak memory beside what `plexor explain`
planned, and greedy tokens on the GPU against those on the CPU. Where the two part, the gap between the two likeliest
tokens is printed: a tie broken by rounding has a gap near zero. `--shape FILE` makes a random checkpoint of a
published shape in a temporary folder first.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from plexor import Completion, Engine, EngineConfig, SamplingParams
from plexor.extension.catalog import Catalog
from plexor.runtime.engine import find_folder
from plexor.runtime.ledger import make_plan
from plexor.testing.checkpoints import write_tokenizer

PROMPT_LENGTHS = (1, 17, 64, 200)
SHARD_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Row:
    """One model in one precision."""

    model: str
    precision: str
    dtype: str
    load_seconds: float
    rates: dict[int, float]
    peak_bytes: int
    planned_bytes: int
    agreement: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", default=[], help="a checkpoint folder or name; several are allowed")
    parser.add_argument(
        "--shape", action="append", default=[], metavar="FILE", help="a config.json of a published shape"
    )
    parser.add_argument("--precision", action="append", default=[], help="several are allowed (default: dense)")
    parser.add_argument("--kv", default="dense")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens for each request")
    parser.add_argument("--compare", type=int, default=24, help="greedy tokens to compare with the CPU, 0 for none")
    arguments = parser.parse_args()
    print("| model | precision | dtype | load s | tok/s at 1 | at 16 | peak | planned | against the CPU |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in [*arguments.model, *arguments.shape]:
        with tempfile.TemporaryDirectory(prefix="plexor-bench-") as temporary:
            folder = name if name in arguments.model else write_random(Path(name), Path(temporary))
            for precision in arguments.precision or ["dense"]:
                print(as_line(measure(folder, Path(name).stem, precision, arguments)), flush=True)


def measure(folder: str, name: str, precision: str, arguments: argparse.Namespace) -> Row:
    """Run one model on the GPU, then the same prompts on the CPU."""
    config = EngineConfig(
        model=folder,
        precision=precision,
        kv=arguments.kv,
        dtype=arguments.dtype,
        device="cuda",
        tensor_parallel=arguments.tp,
        memory_fraction=0.5,
    )
    catalog = Catalog.load(strict=True)
    plan = make_plan(config, catalog, find_folder(config, catalog))
    planned = sum(line.num_bytes for line in plan.lines if line.name != "left")
    started = time.perf_counter()
    with Engine(config=config, catalog=catalog) as engine:
        loaded = time.perf_counter() - started
        torch.cuda.reset_peak_memory_stats()
        answers = answer_prompts(engine, arguments.compare)
        rates = {count: rate(engine, count, arguments.tokens) for count in (1, 16)}
        peak = torch.cuda.max_memory_allocated()
        dtype = str(engine.core._ranks.rank.built.build.dtype).removeprefix("torch.")
    del engine
    gc.collect()
    torch.cuda.empty_cache()
    agreement = compare(answers, folder, precision, arguments) if arguments.compare else "not compared"
    return Row(name, precision, dtype, loaded, rates, peak, planned, agreement)


def answer_prompts(engine: Engine, count: int) -> list[Completion]:
    """Greedy answers to random prompts, with the two likeliest tokens at each position."""
    sampling = SamplingParams(temperature=0, max_tokens=max(count, 1), ignore_end=True, logprobs=2)
    return engine.generate(random_prompts(engine, PROMPT_LENGTHS), sampling)


def random_prompts(engine: Engine, lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    size = engine.core.limits.vocab_size
    return [torch.randint(2, size, (length,), generator=generator).tolist() for length in lengths]


def rate(engine: Engine, count: int, tokens: int) -> float:
    """Tokens per second over whole requests of 128 prompt tokens, the better of two runs after a warm-up."""
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_end=True)
    prompts = random_prompts(engine, (128,) * count)
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        engine.generate(prompts, sampling)
        best = max(best, count * tokens / (time.perf_counter() - started))
    return best


def compare(answers: list[Completion], folder: str, precision: str, arguments: argparse.Namespace) -> str:
    """How many answers are equal, and the gap at the first token where one is not."""
    config = EngineConfig(
        model=folder, precision=precision, kv=arguments.kv, dtype=arguments.dtype, device="cpu", num_blocks=256
    )
    with Engine(config=config) as engine:
        expected = answer_prompts(engine, arguments.compare)
    gaps = [gap for ours, theirs in zip(answers, expected, strict=True) if (gap := first_gap(ours, theirs)) is not None]
    equal = f"{len(answers) - len(gaps)} of {len(answers)} equal"
    return equal + ("" if not gaps else ", parted at gaps of " + ", ".join(f"{gap:.4f}" for gap in gaps))


def first_gap(ours: Completion, theirs: Completion) -> float | None:
    """Distance of the two likeliest log probabilities where the answers part; None if they do not."""
    for index, (a, b) in enumerate(zip(ours.token_ids, theirs.token_ids, strict=True)):
        if a != b:
            (_, best), (_, second) = theirs.logprobs[index].top
            return best - second
    return None


def write_random(shape: Path, folder: Path, device: str = "cuda") -> str:
    """A random checkpoint of a published shape, weights normal with the config's initializer_range."""
    config = transformers.AutoConfig.for_model(**json.loads(shape.read_text()))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    index: dict[str, str] = {}
    number = 0
    for name, parameter in model.named_parameters():
        tensor = torch.randn(parameter.shape, generator=generator, device=device, dtype=torch.bfloat16)
        tensor = 1 + 0.1 * tensor if parameter.dim() == 1 else tensor * 0.02
        shard[name] = tensor.cpu()
        index[name] = f"model-{number:05d}.safetensors"
        if sum(kept.nbytes for kept in shard.values()) > SHARD_BYTES:
            save_file(shard, folder / f"model-{number:05d}.safetensors")
            shard, number = {}, number + 1
    if shard:
        save_file(shard, folder / f"model-{number:05d}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.architectures = [type(model).__name__]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    # Prompts are given in ids, so a small vocabulary of the tokenizer's own will do.
    write_tokenizer(folder, transformers.LlamaConfig(vocab_size=600))
    return str(folder)


def as_line(row: Row) -> str:
    gib = 1 << 30
    return (
        f"| {row.model} | {row.precision} | {row.dtype} | {row.load_seconds:.1f} | {row.rates[1]:.1f} | "
        f"{row.rates[16]:.0f} | {row.peak_bytes / gib:.2f} GiB | {row.planned_bytes / gib:.2f} GiB | {row.agreement} |"
    )


if __name__ == "__main__":
    main()
