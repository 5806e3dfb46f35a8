"""The hooks: each is called once for each plugin while the catalog is built, never inside a step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from plexor.extension.markers import hookspec
from plexor.extension.specs import (
    Architecture,
    Checkpoint,
    CheckpointFormat,
    InputProcessor,
    Kernel,
    KVFormat,
    Layer,
    Observer,
    Op,
    Precision,
    StoredWeights,
)

if TYPE_CHECKING:
    import argparse

    import fastapi


@hookspec
def architectures() -> Iterable[Architecture]:  # type: ignore[empty-body]
    """Models that can be served, keyed by name. Called in every process."""


@hookspec
def layers() -> Iterable[Layer]:  # type: ignore[empty-body]
    """Building blocks for other plugins' models, keyed by (slot, name). Called in every process."""


@hookspec
def ops() -> Iterable[Op]:  # type: ignore[empty-body]
    """Operations with a torch reference, keyed by name. Called in every process."""


@hookspec
def kernels() -> Iterable[Kernel]:  # type: ignore[empty-body]
    """Providers of ops, keyed by (op, provider). Called in every process."""


@hookspec
def precisions() -> Iterable[Precision]:  # type: ignore[empty-body]
    """Number formats of linear layers and expert stacks, keyed by name. Called in every process."""


@hookspec
def kv_formats() -> Iterable[KVFormat]:  # type: ignore[empty-body]
    """Storage formats of the paged cache, keyed by name. Called in every process."""


@hookspec
def checkpoint_formats() -> Iterable[CheckpointFormat]:  # type: ignore[empty-body]
    """Ways that checkpoints lie on disk, keyed by name. Called in every process."""


@hookspec
def stored_weights() -> Iterable[StoredWeights]:  # type: ignore[empty-body]
    """Layouts of checkpoints that hold rounded weights, keyed by name. Called in every process."""


@hookspec
def input_processors() -> Iterable[InputProcessor]:  # type: ignore[empty-body]
    """Media to tokens, keyed by (architecture, kind). Called in the process that takes requests."""


@hookspec
def checkpoints() -> Iterable[Checkpoint]:  # type: ignore[empty-body]
    """Checkpoints that the plugin ships, keyed by name. Called where a model name is resolved."""


@hookspec
def observers() -> Iterable[Observer]:  # type: ignore[empty-body]
    """Listeners to steps and finished requests, keyed by name. Called in the process that schedules."""


@hookspec
def commands(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add commands to the command line; each parser sets `run`, a function `(argparse.Namespace) -> int`."""


@hookspec
def routes(app: fastapi.FastAPI, engine: Any) -> None:
    """Add HTTP routes; off unless the server is told the plugin's name with `--enable-routes NAME`."""
