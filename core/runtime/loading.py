"""From a checkpoint folder to a model on a device: which plugin serves it, its config, its weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plexor.checkpoint.folder import ModelFolder
from plexor.checkpoint.loader import LoadReport, Progress, load_weights, plan_weights
from plexor.checkpoint.random import draw_weights
from plexor.checkpoint.source import TensorSource
from plexor.config import EngineConfig
from plexor.errors import CapacityError, CheckpointError, ConfigError
from plexor.extension.catalog import Catalog
from plexor.extension.specs import Architecture, StoredWeights
from plexor.kernels.table import KernelTable, resolve
from plexor.model.build import Build
from plexor.model.decoder import Model, ModelConfig
from plexor.model.dense import DenseFormat
from plexor.model.format import LinearFormat
from plexor.model.linear import LinearWeight
from plexor.parallel.mesh import Mesh

READERS = 8
"""Threads that read a checkpoint for a GPU: one alone copies cached files more slowly than the bus takes them."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and in which number formats a model is built."""

    device: torch.device
    dtype: torch.dtype
    precision: str = "dense"
    kv: str = "dense"
    mesh: Mesh = Mesh()


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """A model whose tensors have been made (without memory, for a plan) but may not be filled yet."""

    architecture: Architecture
    config: ModelConfig
    model: Model
    build: Build

    @property
    def module(self) -> nn.Module:
        assert isinstance(self.model, nn.Module)
        return self.model


def settle_precision(config: EngineConfig, catalog: Catalog, folder: ModelFolder) -> EngineConfig:
    """The config with "auto" replaced: by the precision that keeps rounded weights as they are stored, else "dense"."""
    if config.precision != "auto":
        return config
    layout = find_layout(folder, catalog)
    chosen = "dense" if layout is None else resolve(layout.precision)(folder.quantization)
    return replace(config, precision=chosen)


def find_layout(folder: ModelFolder, catalog: Catalog) -> StoredWeights | None:
    """How the folder's weights were rounded, None where they are plain; CheckpointError where nobody knows."""
    stated = folder.quantization
    if stated is None:
        return None
    found = [spec for spec in catalog.stored_weights.values() if resolve(spec.recognises)(stated)]
    if len(found) == 1:
        return found[0]
    method = stated.get("quant_method", "an unnamed method")
    names = ", ".join(sorted(spec.name for spec in found or catalog.stored_weights.values())) or "none"
    if found:
        raise CheckpointError(f"{len(found)} layouts claim {folder.path}, stored quantised ({method}): {names}")
    raise CheckpointError(
        f"{folder.path} is stored quantised ({method}), which no installed plugin reads (layouts: {names}): use the "
        "original checkpoint with --precision"
    )


def choose_placement(config: EngineConfig, catalog: Catalog, folder: ModelFolder, mesh: Mesh) -> Placement:
    """Where and how one rank builds its share: on the GPU of its number, or on the CPU."""
    config = settle_precision(config, catalog, folder)
    device = choose_device(config.device)
    if device.type == "cuda":
        device = torch.device("cuda", mesh.rank)
    return Placement(device, choose_dtype(config.dtype, folder.config), config.precision, config.kv, mesh)


def plan_model(config: EngineConfig, catalog: Catalog, table: KernelTable, folder: ModelFolder) -> BuiltModel:
    """Rank 0's model, of tensors that take no memory: its shapes and kernels are those of a run."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # imports torch's compiler, which takes a second or two

    placement = choose_placement(config, catalog, folder, Mesh(0, config.tensor_parallel))
    formats = stored_formats(folder, catalog, placement)
    with FakeTensorMode():
        return build_model(folder, catalog, table, placement, formats)


def stored_formats(folder: ModelFolder, catalog: Catalog, placement: Placement) -> tuple[LinearFormat, ...] | None:
    """The format that keeps each linear layer as the checkpoint stores it, in the order in which layers are made.

    None where all have the placement's precision: the weights are plain, missing, or wanted in another precision than
    the one that the checkpoint was made for.
    """
    layout = find_layout(folder, catalog)
    if layout is None or placement.precision == "dense":
        return None
    if resolve(layout.precision)(folder.quantization) != placement.precision:
        return None
    if not any(resolve(spec.detects)(folder.path) for spec in catalog.checkpoint_formats.values()):
        return None
    with closing(open_source(folder.path, catalog)) as source:
        return _formats_of_layers(folder, catalog, placement, _shown(layout, folder, source))


def _formats_of_layers(
    folder: ModelFolder, catalog: Catalog, placement: Placement, source: TensorSource
) -> tuple[LinearFormat, ...]:
    """Found with a model of tensors that take no memory, whose layers have each a format of its own to be known by."""
    made: list[LinearFormat] = []
    sketch = replace(placement, device=torch.device("meta"), precision="dense")
    built = build_model(folder, catalog, catalog.kernel_table(), sketch, _each_its_own(made))
    rules = resolve(built.architecture.weights)(built.config)
    planned = plan_weights(built.module, rules, source)
    wanted: dict[int, list[tuple[LinearFormat, ...]]] = {}
    for placements in planned.placements.values():
        for one in placements:
            layer = planned.targets[one.target].module
            if isinstance(layer, LinearWeight) and one.piece[2] == "weight":
                wanted.setdefault(id(layer.format), []).append(layer.stored_formats(one.piece, one.view))
    return tuple(_common(wanted.get(id(own), [])) or own for own in made)


def _each_its_own(made: list[LinearFormat]) -> Iterator[LinearFormat]:
    """Dense formats without end, each also appended to `made`."""
    while True:
        made.append(DenseFormat())
        yield made[-1]


def _common(offers: Sequence[tuple[LinearFormat, ...]]) -> LinearFormat | None:
    """The first format that all of a layer's tensors can be kept in; None where they have none in common."""
    return next((one for one in offers[0] if all(one in other for other in offers)), None) if offers else None


def build_model(
    folder: ModelFolder,
    catalog: Catalog,
    table: KernelTable,
    placement: Placement,
    formats: Iterable[LinearFormat] | None = None,
) -> BuiltModel:
    """The model that the folder's config.json describes, its tensors allocated and not read.

    formats: as from `stored_formats`; without them every layer has the placement's precision.
    """
    architecture = catalog.architecture(folder.architecture)
    config: ModelConfig = resolve(architecture.config)(folder.config)
    build = make_build(catalog, table, placement, formats)
    try:
        with torch.no_grad():
            model: Model = resolve(architecture.model)(config, build)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        raise CapacityError(
            f"{folder.path} does not fit in the memory of {placement.device}: use fewer bits or more ranks, or see "
            "what it takes with `plexor explain`"
        ) from error
    return BuiltModel(architecture, config, model, build)


def load_model(
    folder: ModelFolder, catalog: Catalog, table: KernelTable, placement: Placement, progress: Progress | None = None
) -> tuple[BuiltModel, LoadReport]:
    """Build the model and stream this rank's share of the weights into it."""
    layout = find_layout(folder, catalog)
    show = None if layout is None else partial(_shown, layout, folder)
    built = build_model(folder, catalog, table, placement, stored_formats(folder, catalog, placement))
    rules = resolve(built.architecture.weights)(built.config)
    readers = 1 if placement.device.type == "cpu" else READERS
    with closing(open_source(folder.path, catalog)) as source:
        report = load_weights(
            built.module, rules, source, progress, device=placement.device, readers=readers, show=show
        )
    return built, report


def draw_model(
    folder: ModelFolder, catalog: Catalog, table: KernelTable, placement: Placement
) -> tuple[BuiltModel, LoadReport]:
    """Build the model and fill it with random weights; the folder needs none."""
    built = build_model(folder, catalog, table, placement, stored_formats(folder, catalog, placement))
    return built, draw_weights(built.module, placement.dtype, placement.device, seed=0)


def open_source(path: Path, catalog: Catalog) -> TensorSource:
    """The folder's tensors, through the one checkpoint format that knows it."""
    found = [spec for spec in catalog.checkpoint_formats.values() if resolve(spec.detects)(path)]
    names = ", ".join(sorted(spec.name for spec in found or catalog.checkpoint_formats.values()))
    if not found:
        raise CheckpointError(
            f"{path} holds no weights in a format that is installed ({names}): finish the download, or convert them"
        )
    if len(found) > 1:
        raise CheckpointError(
            f"{len(found)} checkpoint formats claim the weights in {path} ({names}): keep the files of one format"
        )
    source: TensorSource = resolve(found[0].open)(path)
    return source


def make_build(
    catalog: Catalog, table: KernelTable, placement: Placement, formats: Iterable[LinearFormat] | None = None
) -> Build:
    """The explicit argument that model code gets; formats, as in `build_model`, take the place of the placement's."""
    dense = _format(catalog, "dense")
    return Build(
        catalog=catalog,
        table=table,
        mesh=placement.mesh,
        dtype=placement.dtype,
        device=placement.device,
        format=_format(catalog, placement.precision) if formats is None else dense,
        dense=dense,
        kv_format=catalog.kv_format(placement.kv),
        formats=None if formats is None else iter(formats),
    )


def choose_device(name: str) -> torch.device:
    """ "auto" is a GPU where there is one."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError(
            "device is 'cuda', but torch sees no GPU: check the driver with nvidia-smi, or use --device cpu"
        )
    return torch.device("cuda", 0) if available and name != "cpu" else torch.device("cpu")


def choose_dtype(name: str, config: Mapping[str, Any]) -> torch.dtype:
    """ "auto" is what config.json states (in text_config for a model of several halves), float32 if it says nothing."""
    nested = config.get("text_config")
    parts = (config, nested) if isinstance(nested, Mapping) else (config,)
    stated = [part.get(key) for part in parts for key in ("dtype", "torch_dtype")]
    chosen = name if name != "auto" else next((str(value) for value in stated if value), "float32")
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if chosen not in known:
        raise CheckpointError(f"config.json states the dtype {chosen!r}: choose one with --dtype ({', '.join(known)})")
    return known[chosen]


def _shown(layout: StoredWeights, folder: ModelFolder, source: TensorSource) -> TensorSource:
    shown: TensorSource = resolve(layout.open)(source, folder.quantization)
    return shown


def _is_out_of_memory(error: RuntimeError) -> bool:
    """torch has a class of its own for a GPU's memory, but for a CPU's only this sentence."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _format(catalog: Catalog, name: str) -> LinearFormat:
    made: LinearFormat = resolve(catalog.precision(name).format)()
    return made
