"""The processes that serve one model together: rank 0 here, the others started from here, a pipe of bytes to each."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from plexor.checkpoint.folder import ModelFolder, open_folder
from plexor.checkpoint.loader import LoadReport, Progress
from plexor.config import EngineConfig
from plexor.errors import ConfigError, PlexorError
from plexor.extension.catalog import Catalog
from plexor.parallel.mesh import Mesh
from plexor.runtime.footprint import activation_bytes, check_tables, graph_bytes, table_bytes
from plexor.runtime.graphs import decode_buckets
from plexor.runtime.kv_cache import allocate, block_bytes, check_blocks, cpu_cache_bytes, fit_blocks, unused_bytes
from plexor.runtime.loading import BuiltModel, choose_device, choose_placement, draw_model, load_model, plan_model
from plexor.runtime.packer import StepInput
from plexor.runtime.pieces import ROWS
from plexor.runtime.runner import Pending, Runner

PATIENCE = timedelta(minutes=5)
"""How long a rank waits for the others in one exchange before it gives up."""

_STOP = b""


@dataclass(frozen=True, slots=True)
class _Word:
    """What a rank tells rank 0 while it starts. num_blocks: how many cache blocks it has room for, once it has loaded.

    error: why it gives up, in the words that rank 0 then says; a rank prints nothing of its own.
    """

    num_blocks: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class Rank:
    """What one process has made ready."""

    runner: Runner
    built: BuiltModel
    report: LoadReport
    num_blocks: int
    max_length: int


def make_rank(
    config: EngineConfig,
    catalog: Catalog,
    folder: ModelFolder,
    mesh: Mesh,
    agree: Callable[[int], int],
    progress: Progress | None = None,
) -> Rank:
    """Load this rank's share of the model and give it its cache.

    agree: from the number of blocks that fit on this rank to the number that all ranks use.
    """
    placement = choose_placement(config, catalog, folder, mesh)
    if placement.device.type == "cuda":
        torch.cuda.set_device(placement.device)
    table = catalog.kernel_table(config.kernels)
    if config.weights == "random":
        built, report = draw_model(folder, catalog, table, placement)
    else:
        built, report = load_model(folder, catalog, table, placement, progress)
    max_length = context_length(config, built)
    check_tables(config.max_sequences, max_blocks(config, max_length), unused_bytes(built.build.device))
    num_blocks = agree(_fitting_blocks(config, built, max_length))
    cache = allocate(built.model, built.build, num_blocks, config.block_size)
    runner = Runner(
        built,
        cache,
        num_slots=config.max_sequences,
        max_blocks=max_blocks(config, max_length),
        block_size=config.block_size,
        buckets=decode_buckets(config.max_sequences) if replays_decodes(config, placement.device) else (),
    )
    if config.warm_up and placement.device.type == "cuda":
        runner.warm_up(config.step_tokens(placement.device.type))
    return Rank(runner, built, report, num_blocks, max_length)


def replays_decodes(config: EngineConfig, device: torch.device) -> bool:
    """Whether decode steps are captured as CUDA graphs."""
    return config.decode_graphs and device.type == "cuda"


def context_length(config: EngineConfig, built: BuiltModel) -> int:
    """The context in force; ConfigError for more than the model has positions."""
    if config.max_length is not None and config.max_length > built.config.max_positions:
        raise ConfigError(
            f"max_length is {config.max_length}, but the model has {built.config.max_positions} positions: lower it"
        )
    return config.max_length or built.config.max_positions


def _fitting_blocks(config: EngineConfig, built: BuiltModel, max_length: int) -> int:
    each = block_bytes(built.model, built.build, config.block_size)
    if config.num_blocks is not None:
        check_blocks(config.num_blocks, each, unused_bytes(built.build.device))
        return config.num_blocks
    return fit_blocks(_free_bytes(config, built, max_length), each, most_blocks(config, max_length))


def most_blocks(config: EngineConfig, max_length: int) -> int:
    """What as many requests as may run at once can fill, each of the full context."""
    return config.max_sequences * max_blocks(config, max_length)


def max_blocks(config: EngineConfig, max_length: int) -> int:
    """Blocks of a full context."""
    return -(-max_length // config.block_size)


def _free_bytes(config: EngineConfig, built: BuiltModel, max_length: int) -> int:
    """Memory for the cache: what is left beside the weights, less what a step needs."""
    device = built.build.device
    if device.type == "cpu":
        return cpu_cache_bytes(built.build.mesh.size)
    total = torch.cuda.get_device_properties(device).total_memory
    keep_clear = int(total * (1 - config.memory_fraction))
    return unused_bytes(device) - keep_clear - step_bytes(config, built, max_length)


def step_bytes(config: EngineConfig, built: BuiltModel, max_length: int) -> int:
    """Memory for what is neither a weight nor the cache, captured graphs included."""
    device = built.build.device
    tables = table_bytes(config.max_sequences, max_blocks(config, max_length))
    graphs = captured_bytes(config, built) if replays_decodes(config, device) else 0
    return activation_bytes(built, config.step_tokens(device.type), config.max_sequences) + tables + graphs


def captured_bytes(config: EngineConfig, built: BuiltModel) -> int:
    """Memory for captured steps: decodes of all sequences, and the longest steps with pieces that are padded."""
    return graph_bytes(built, max(config.max_sequences, ROWS[-1]), config.max_sequences)


class Ranks:
    """Rank 0 and its helpers. `launch` reaches all of them; each draws the same tokens from the same logits."""

    def __init__(
        self, config: EngineConfig, catalog: Catalog, folder: ModelFolder, progress: Progress | None = None
    ) -> None:
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        self._folder = tempfile.TemporaryDirectory(prefix="plexor-")
        self.size = config.tensor_parallel
        try:
            if self.size > 1:
                self._start_others(config, catalog, folder)
                _try_out(config, catalog, folder)
                self._meet(config)
            self.rank = make_rank(config, catalog, folder, Mesh(0, self.size), self._agree, progress)
        except BaseException:
            for process in self._processes:
                process.kill()
            self.close()
            raise

    def launch(self, step: StepInput) -> Pending:
        """Queue a step on every rank."""
        if self._pipes:
            data = msgspec.msgpack.encode(step)
            for index, pipe in enumerate(self._pipes):
                self._send(index, pipe, data)
        try:
            return self.rank.runner.launch(step)
        except RuntimeError as error:
            for index, process in enumerate(self._processes):
                if not process.is_alive():
                    raise _died(index + 1) from error
            raise

    def close(self) -> None:
        """End the other ranks; safe to call twice."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # one that has died needs no telling
                pipe.send_bytes(_STOP)
            pipe.close()
        for process in self._processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
        if self._pipes and dist.is_initialized():
            dist.destroy_process_group()
        self._pipes, self._processes = [], []
        self._folder.cleanup()

    def _send(self, index: int, pipe: Connection, data: bytes) -> None:
        try:
            pipe.send_bytes(data)
        except OSError as error:
            raise _died(index + 1) from error

    def _hear(self) -> list[_Word]:
        """The next word of every other rank; PlexorError if one gives up or has died."""
        words = []
        for index, pipe in enumerate(self._pipes):
            try:
                word = msgspec.msgpack.decode(pipe.recv_bytes(), type=_Word)
            except (EOFError, OSError) as error:
                raise _died(index + 1) from error
            if word.error:
                raise PlexorError(f"rank {index + 1}: {word.error}")
            words.append(word)
        return words

    def _agree(self, num_blocks: int) -> int:
        """The least that any rank has room for, which is told to all."""
        least = min([num_blocks, *(word.num_blocks for word in self._hear())])
        for index, pipe in enumerate(self._pipes):
            self._send(index, pipe, msgspec.msgpack.encode(_Word(least)))
        return least

    def _start_others(self, config: EngineConfig, catalog: Catalog, folder: ModelFolder) -> None:
        size = self.size
        device = choose_device(config.device)
        if device.type == "cuda" and torch.cuda.device_count() < size:
            raise ConfigError(
                f"tensor parallel {size} needs {size} GPUs, but torch sees {torch.cuda.device_count()}: lower --tp"
            )
        context = multiprocessing.get_context("spawn")
        job = msgspec.json.encode((config, str(folder.path), self._store, catalog.identity))
        for rank in range(1, size):
            here, there = context.Pipe()
            process = context.Process(target=_serve_rank, args=(there, rank, size, job), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def _meet(self, config: EngineConfig) -> None:
        """Wait until every rank is there, and join them in one group."""
        self._hear()
        _join(self._store, 0, self.size, choose_device(config.device).type)

    @property
    def _store(self) -> str:
        """The file over which the ranks find each other."""
        return str(Path(self._folder.name) / "ranks")


def _join(store: str, rank: int, size: int, device_type: str) -> None:
    dist.init_process_group(
        "nccl" if device_type == "cuda" else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=PATIENCE,
    )


def _try_out(config: EngineConfig, catalog: Catalog, folder: ModelFolder) -> None:
    """Build this rank's model without memory: what cannot be shared out is refused while the others still start."""
    context_length(config, plan_model(config, catalog, catalog.kernel_table(config.kernels), folder))


def _died(rank: int) -> PlexorError:
    return PlexorError(f"rank {rank} has died: what it said stands above, if it could say anything; start again")


def _serve_rank(pipe: Connection, rank: int, size: int, job: bytes) -> None:
    """The life of a process of rank 1 and up: two words to rank 0 (it is there, it has loaded), then steps."""
    try:
        made = _load(pipe, rank, size, job)
    except PlexorError as error:
        pipe.send_bytes(msgspec.msgpack.encode(_Word(error=str(error))))
        sys.exit(1)
    except (EOFError, KeyboardInterrupt):  # rank 0 has gone
        return
    _run_steps(pipe, made.runner.launch)
    made.runner.close()
    dist.destroy_process_group()


def _load(pipe: Connection, rank: int, size: int, job: bytes) -> Rank:
    def agree(num_blocks: int) -> int:
        pipe.send_bytes(msgspec.msgpack.encode(_Word(num_blocks)))
        return msgspec.msgpack.decode(pipe.recv_bytes(), type=_Word).num_blocks

    config, path, store, identity = msgspec.json.decode(
        job, type=tuple[EngineConfig, str, str, tuple[tuple[str, str], ...]]
    )
    catalog = Catalog.load(strict=config.strict_plugins)
    if catalog.identity != identity:
        raise ConfigError(f"found the plugins {catalog.identity}, rank 0 {identity}: start again")
    torch.set_num_threads(max(torch.get_num_threads() // size, 1))
    device_type = choose_device(config.device).type
    if device_type == "cuda":
        torch.cuda.set_device(rank)
    pipe.send_bytes(msgspec.msgpack.encode(_Word()))
    _join(store, rank, size, device_type)
    return make_rank(config, catalog, open_folder(Path(path)), Mesh(rank, size), agree)


def _run_steps(pipe: Connection, launch: Callable[[StepInput], Pending]) -> None:
    while True:
        try:
            data = pipe.recv_bytes()
        except (EOFError, KeyboardInterrupt):
            return
        if data == _STOP:
            return
        launch(msgspec.msgpack.decode(data, type=StepInput))
