"""What a run is told: the engine's settings, and the environment, which is read here and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from plexor.errors import ConfigError

MAX_COUNT = 2**31 - 1
"""Positions and blocks are 32-bit numbers in the tables that kernels read."""

MAX_SEQUENCES = 2**20
"""Each has a row in the sampler's tables from the start; no machine runs as many at once."""


@dataclass(frozen=True, slots=True)
class Environment:
    """The environment variables that Plexor knows.

    plugins: `PLEXOR_PLUGINS=a,b` loads only these plugins, an empty value loads none; None (unset) loads all.
    debug: `PLEXOR_DEBUG=1` shows tracebacks, as `--debug` does.
    """

    plugins: frozenset[str] | None = None
    debug: bool = False

    @classmethod
    def read(cls, variables: Mapping[str, str] = os.environ) -> Environment:
        """From the process' environment; ConfigError when a value makes no sense."""
        listed = variables.get("PLEXOR_PLUGINS")
        debug = variables.get("PLEXOR_DEBUG", "0")
        if debug not in ("", "0", "1"):
            raise ConfigError(f"PLEXOR_DEBUG is {debug!r}: set it to 1 for tracebacks, or to 0")
        names = None if listed is None else frozenset(name.strip() for name in listed.split(",") if name.strip())
        return cls(plugins=names, debug=debug == "1")


def cache_folder(variables: Mapping[str, str] = os.environ) -> Path:
    """Where Plexor keeps what it can make again: compiled kernels, measured choices."""
    base = variables.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "plexor"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How a model is run; checked once, never changed.

    model: a checkpoint folder or the name of a checkpoint that a plugin ships; None for the default one.
    precision: number format of linear layers and expert stacks; "auto" is dense, or for a checkpoint whose weights are
    rounded already the one that keeps them so. kv: storage format of the paged cache.
    dtype: of weights that are not quantised and of activations; "auto" is the checkpoint's own.
    device: "auto" takes a GPU where there is one. tensor_parallel: ranks that share each layer.
    num_blocks: blocks of the paged cache, None for as many as memory allows. memory_fraction: share of the device's
    memory that weights, cache and activations may take together. max_length: context, None for the model's own.
    max_sequences: requests that run at once. max_step_tokens: token budget of a step, None for 8192 on a GPU and 2048
    on a CPU; chunk: longest prefill piece. weights: "random" draws them on the device instead of reading a checkpoint,
    for benchmarks. decode_graphs: replay decode steps, and short ones with prompts, as captured CUDA graphs; without
    them each kernel is launched. warm_up: compile, plan and capture what a GPU will run before the first request, which
    takes seconds, instead of with the first that needs it.
    steps_ahead: 1 launches a step before the last one has been read, 0 does not; None is 1 on a GPU and 0 on a CPU.
    seed: from which the seeds of requests without one are drawn. kernels: op to provider, over the table's choice.
    """

    model: str | None = None
    precision: str = "auto"
    kv: str = "dense"
    dtype: str = "auto"
    device: str = "auto"
    tensor_parallel: int = 1
    block_size: int = 16
    num_blocks: int | None = None
    memory_fraction: float = 0.9
    max_length: int | None = None
    max_sequences: int = 256
    max_step_tokens: int | None = None
    chunk: int | None = None
    prefix_caching: bool = True
    steps_ahead: int | None = None
    decode_graphs: bool = True
    warm_up: bool = False
    weights: str = "checkpoint"
    seed: int | None = None
    kernels: Mapping[str, str] = field(default_factory=dict)
    strict_plugins: bool = False

    def step_tokens(self, device_type: str) -> int:
        """The token budget of a step, at least one for each sequence that may run."""
        budget = self.max_step_tokens or (8192 if device_type == "cuda" else 2048)
        return max(budget, self.max_sequences)

    def __post_init__(self) -> None:
        _check_choice("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        _check_choice("device", self.device, ("auto", "cpu", "cuda"))
        _check_choice("weights", self.weights, ("checkpoint", "random"))
        _check_choice("steps_ahead", self.steps_ahead, (None, 0, 1))
        _check_count("max_sequences", self.max_sequences, MAX_SEQUENCES)
        for name in ("tensor_parallel", "block_size"):
            _check_count(name, getattr(self, name))
        for name in ("max_step_tokens", "num_blocks", "max_length", "chunk"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        if not 0 < self.memory_fraction <= 1:
            raise ConfigError(f"memory_fraction is {self.memory_fraction}: set it above 0 and at most 1")


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}: choose one of {', '.join(str(choice) for choice in choices)}")


def _check_count(name: str, value: object, most: int = MAX_COUNT) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ConfigError(f"{name} is {value!r}: set it to a whole number from 1 to {most}")
