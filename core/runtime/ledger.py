"""The plan of a run before a weight is read: kernels chosen for each op, and where the memory goes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from plexor.checkpoint.folder import ModelFolder
from plexor.config import EngineConfig
from plexor.extension.catalog import Catalog
from plexor.kernels.table import Choice
from plexor.model.linear import LinearWeight
from plexor.runtime.footprint import activation_bytes, table_bytes
from plexor.runtime.graphs import decode_buckets
from plexor.runtime.kv_cache import block_bytes, cpu_cache_bytes, machine_bytes
from plexor.runtime.loading import BuiltModel, plan_model, settle_precision
from plexor.runtime.ranks import captured_bytes, context_length, max_blocks, most_blocks, replays_decodes


@dataclass(frozen=True, slots=True)
class LedgerLine:
    """One use of memory on one rank."""

    name: str
    num_bytes: int
    note: str


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What `plexor explain` prints.

    formats: how linear layers and expert stacks are kept, and how many are.
    """

    device_name: str
    dtype: str
    max_length: int
    vocab_size: int
    formats: tuple[tuple[str, int], ...]
    choices: tuple[Choice, ...]
    lines: tuple[LedgerLine, ...]
    verdict: str

    @property
    def taken(self) -> int:
        """Bytes that the run takes on one rank."""
        return sum(line.num_bytes for line in self.lines[:-1])

    @property
    def left(self) -> int:
        """Bytes that may be used beside it; less than nothing where it does not fit."""
        return self.lines[-1].num_bytes


def make_plan(config: EngineConfig, catalog: Catalog, folder: ModelFolder) -> RunPlan:
    """Build the model from tensors that take no memory, and count."""
    config = settle_precision(config, catalog, folder)
    return count_run(config, plan_model(config, catalog, catalog.kernel_table(config.kernels), folder))


def count_run(config: EngineConfig, built: BuiltModel) -> RunPlan:
    """The plan of a model that has been built so; config.precision is the one that it has."""
    device = built.build.device
    each = block_bytes(built.model, built.build, config.block_size)
    max_length = context_length(config, built)
    total = _device_bytes(device)
    usable = int(total * config.memory_fraction) if device.type == "cuda" else total
    weights = weight_bytes(built)
    num_tokens, num_sequences = config.step_tokens(device.type), config.max_sequences
    tables = table_bytes(num_sequences, max_blocks(config, max_length))
    step = activation_bytes(built, num_tokens, num_sequences) + tables
    replays = replays_decodes(config, device)
    graphs = captured_bytes(config, built) if replays else 0
    left = usable - weights - step - graphs
    budget = left if device.type == "cuda" else min(left, cpu_cache_bytes(config.tensor_parallel))
    num_blocks = config.num_blocks or max(min(budget // each, most_blocks(config, max_length)), 0)
    cached = num_blocks * config.block_size
    lines = (
        LedgerLine("weights", weights, f"precision {config.precision}"),
        LedgerLine("KV blocks", num_blocks * each, f"{num_blocks:,} of {config.block_size} tokens: {cached:,} tokens"),
        LedgerLine("activations", step, f"a step of {num_tokens:,} tokens, an estimate"),
        LedgerLine("graphs", graphs, _graphs_note(num_sequences) if replays else "decode steps are not captured"),
        LedgerLine("left", left - num_blocks * each, f"of {usable:,} bytes usable"),
    )
    return RunPlan(
        _device_name(device),
        str(built.build.dtype).removeprefix("torch."),
        max_length,
        built.config.vocab_size,
        _formats(built),
        built.build.table.choices,
        lines,
        _verdict(left, num_blocks, cached, max_length),
    )


def _formats(built: BuiltModel) -> tuple[tuple[str, int], ...]:
    layers = (module for module in built.module.modules() if isinstance(module, LinearWeight))
    return tuple(Counter(str(layer.format) for layer in layers).most_common())


def _graphs_note(num_sequences: int) -> str:
    count = len(decode_buckets(num_sequences))
    return f"decode steps of up to {num_sequences:,} sequences in {count} sizes, and short prompts, an estimate"


def weight_bytes(built: BuiltModel) -> int:
    """Bytes of all weights and tables of this rank, each storage counted once."""
    tensors = {id(tensor): tensor for tensor in (*built.module.parameters(), *built.module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _verdict(left: int, num_blocks: int, cached: int, max_length: int) -> str:
    if left < 0:
        return f"does not fit: {-left:,} bytes are missing beside weights and activations; use fewer bits or more ranks"
    if num_blocks < 1:
        return "does not fit: no room is left for the cache; use fewer bits or more ranks"
    if cached < max_length:
        return f"fits, but no request may be longer than {cached:,} tokens: the cache holds less than one full context"
    return f"fits: {cached // max_length:,} requests of the full context of {max_length:,} tokens at once"


def _device_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return machine_bytes()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"
