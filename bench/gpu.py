"""Whether a GPU says what the CPU says: `python bench/gpu.py --model demo --model demo-moe --precision fp8`.

For each model: greedy tokens on the GPU against those on the CPU. Where the two part, the gap between the two likeliest
tokens is printed: a tie broken by rounding has a gap near zero. `--shape FILE` makes a random checkpoint of a
published shape in a temporary folder first. How fast they are is what `plexor bench` measures.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from plexor import Completion, Engine, EngineConfig, SamplingParams
from plexor.testing.checkpoints import write_tokenizer

PROMPT_LENGTHS = (1, 17, 64, 200)
SHARD_BYTES = 2 << 30


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
    parser.add_argument("--tokens", type=int, default=24, help="greedy tokens of each answer")
    arguments = parser.parse_args()
    print("| model | precision | against the CPU |")
    print("|---|---|---|", flush=True)
    for name in [*arguments.model, *arguments.shape]:
        with tempfile.TemporaryDirectory(prefix="plexor-bench-") as temporary:
            folder = name if name in arguments.model else write_random(Path(name), Path(temporary))
            for precision in arguments.precision or ["dense"]:
                agreement = compare(folder, precision, arguments)
                print(f"| {Path(name).stem} | {precision} | {agreement} |", flush=True)


def compare(folder: str, precision: str, arguments: argparse.Namespace) -> str:
    """How many answers are equal, and the gap at the first token where one is not."""
    shared = {"model": folder, "precision": precision, "kv": arguments.kv, "dtype": arguments.dtype}
    on_gpu = EngineConfig(**shared, device="cuda", tensor_parallel=arguments.tp, memory_fraction=0.5)
    answers = answer_prompts(on_gpu, arguments.tokens)
    gc.collect()
    torch.cuda.empty_cache()
    expected = answer_prompts(EngineConfig(**shared, device="cpu", num_blocks=256), arguments.tokens)
    gaps = [gap for ours, theirs in zip(answers, expected, strict=True) if (gap := first_gap(ours, theirs)) is not None]
    equal = f"{len(answers) - len(gaps)} of {len(answers)} equal"
    return equal + ("" if not gaps else ", parted at gaps of " + ", ".join(f"{gap:.4f}" for gap in gaps))


def answer_prompts(config: EngineConfig, count: int) -> list[Completion]:
    """Greedy answers to random prompts, with the two likeliest tokens at each position."""
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_end=True, logprobs=2)
    with Engine(config=config) as engine:
        generator = torch.Generator().manual_seed(7)
        shapes = [(length,) for length in PROMPT_LENGTHS]
        size = engine.core.limits.vocab_size
        return engine.generate(
            [torch.randint(2, size, shape, generator=generator).tolist() for shape in shapes], sampling
        )


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


if __name__ == "__main__":
    main()
