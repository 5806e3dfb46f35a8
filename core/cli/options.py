"""Options that several commands share, and what they mean as EngineConfig and SamplingParams."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from plexor.config import EngineConfig
from plexor.errors import ConfigError

if TYPE_CHECKING:
    from plexor.runtime.request import SamplingParams


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What to run and how: --model, --precision, --kv, --tp and the sizes."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="DIR|NAME", help="a checkpoint folder, or one that a plugin ships")
    group.add_argument("--precision", default="auto", help="number format of linear layers (default: the stored)")
    group.add_argument("--kv", default="dense", help="storage format of keys and values (default: dense)")
    group.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: the checkpoint's)")
    group.add_argument("--device", default="auto", help="auto, cpu or cuda")
    group.add_argument("--tp", type=int, default=1, metavar="N", help="tensor parallel: ranks that share each layer")
    group.add_argument("--max-length", type=count, metavar="N", help="context, prompt and answer together")
    group.add_argument("--max-sequences", type=count, default=256, metavar="N", help="requests that run at once")
    group.add_argument(
        "--max-step-tokens", type=count, metavar="N", help="token budget of a step (default: 8192 on a GPU, else 2048)"
    )
    group.add_argument("--num-blocks", type=count, metavar="N", help="cache blocks (default: what memory allows)")
    group.add_argument("--block-size", type=count, default=16, metavar="N", help="tokens in a cache block")
    group.add_argument(
        "--memory-fraction", type=float, default=0.9, metavar="F", help="share of the GPU's memory to use"
    )
    group.add_argument("--no-prefix-caching", action="store_true", help="compute every prompt from its start")
    group.add_argument(
        "--kernel", action="append", default=[], metavar="OP=PROVIDER", help="override the kernel of an operation"
    )


def engine_config(arguments: argparse.Namespace) -> EngineConfig:
    """The config that the options of `add_model_options` describe."""
    return EngineConfig(
        model=arguments.model,
        precision=arguments.precision,
        kv=arguments.kv,
        dtype=arguments.dtype,
        device=arguments.device,
        tensor_parallel=arguments.tp,
        max_length=arguments.max_length,
        max_sequences=arguments.max_sequences,
        max_step_tokens=arguments.max_step_tokens,
        num_blocks=arguments.num_blocks,
        block_size=arguments.block_size,
        memory_fraction=arguments.memory_fraction,
        prefix_caching=not arguments.no_prefix_caching,
        kernels=kernel_overrides(arguments.kernel),
        strict_plugins=arguments.strict_plugins,
    )


def kernel_overrides(given: list[str]) -> Mapping[str, str]:
    """["rms_norm=reference"] as a mapping; ConfigError for anything else."""
    overrides = {}
    for text in given:
        op, sign, provider = text.partition("=")
        if not sign or not op or not provider:
            raise ConfigError(f"--kernel is {text!r}: write it as OP=PROVIDER, such as rms_norm=reference")
        overrides[op] = provider
    return overrides


def add_sampling_options(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """How tokens are drawn; what is not given follows the checkpoint's generation_config.json, else greedy."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=count, default=max_tokens, metavar="N", help=f"default: {max_tokens}")
    group.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest token")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--min-p", type=float, metavar="P")
    group.add_argument("--repetition-penalty", type=float, metavar="R")
    group.add_argument("--seed", type=int, metavar="S", help="the same seed draws the same answer")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text")
    group.add_argument("--ignore-end", action="store_true", help="go on after the model's end token")


def sampling_params(arguments: argparse.Namespace, advice: Mapping[str, float]) -> SamplingParams:
    """The options, over the publisher's advice, over greedy."""
    from plexor.runtime.request import SamplingParams

    chosen: dict[str, Any] = {"temperature": 0.0, **advice}
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        value = getattr(arguments, name)
        if value is not None:
            chosen[name] = value
    return SamplingParams(
        temperature=chosen["temperature"],
        top_k=chosen.get("top_k", 0),
        top_p=chosen.get("top_p", 1.0),
        min_p=chosen.get("min_p", 0.0),
        repetition_penalty=chosen.get("repetition_penalty", 1.0),
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
        stop=tuple(arguments.stop),
        ignore_end=arguments.ignore_end,
    )


def human_bytes(num_bytes: float) -> str:
    """In the largest binary unit that leaves at least one whole."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log(num_bytes, 1024)), len(units) - 1) if num_bytes >= 1 else 0
    return f"{num_bytes / 1024**power:.{0 if power == 0 else 2}f} {units[power]}"


def count(text: str) -> int:
    """An option's whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value
