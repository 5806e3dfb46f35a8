"""Tokens per second of Plexor beside transformers' `generate` on a CPU, in one run: `python bench/cpu.py`.

Both get the same prompts in token ids, the same dtype and the same threads; both run greedily for a fixed number of
tokens and are timed as a user calls them, prompts included. The order alternates and the median of the rounds counts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from plexor import Engine, EngineConfig, SamplingParams

PROMPT_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a checkpoint folder or name (default: the shipped one)")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens for each request")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    arguments = parser.parse_args()
    config = EngineConfig(model=arguments.model, device="cpu", dtype=arguments.dtype, prefix_caching=False)
    with Engine(config=config) as engine:
        theirs = _load_theirs(engine.folder.path, getattr(torch, arguments.dtype))
        print(
            f"{engine.folder.path.name}, {arguments.dtype}, {torch.get_num_threads()} threads, "
            f"torch {torch.__version__}, transformers {transformers.__version__}"
        )
        print("| requests | Plexor tok/s | transformers tok/s | ratio | same tokens |")
        print("|---|---|---|---|---|")
        for count in arguments.requests:
            print(_compare(engine, theirs, count, arguments.tokens, arguments.rounds), flush=True)


def _load_theirs(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.generation_config.eos_token_id = None  # both go on for as many tokens as were asked for
    return model


def _compare(engine: Engine, theirs: torch.nn.Module, count: int, tokens: int, rounds: int) -> str:
    generator = torch.Generator().manual_seed(count)
    shape = (count, PROMPT_TOKENS)
    prompts = torch.randint(16, engine.core.limits.vocab_size, shape, generator=generator)
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_end=True)

    def ours() -> list[list[int]]:
        return [answer.token_ids for answer in engine.generate(prompts.tolist(), sampling)]

    @torch.inference_mode()
    def other() -> list[list[int]]:
        made = theirs.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
        return made[:, PROMPT_TOKENS:].tolist()

    seconds: dict[str, list[float]] = {"ours": [], "other": []}
    same = ours() == other()  # also the warm-up
    for index in range(rounds):
        pairs = [("ours", ours), ("other", other)]
        for name, call in pairs if index % 2 == 0 else reversed(pairs):
            seconds[name].append(_timed(call))
    mine, their = (count * tokens / statistics.median(seconds[name]) for name in ("ours", "other"))
    return f"| {count} | {mine:.0f} | {their:.0f} | {mine / their:.2f} | {'yes' if same else 'no'} |"


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
