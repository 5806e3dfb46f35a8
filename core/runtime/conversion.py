"""Rounds a checkpoint into another one, a layer at a time.

The model is built without memory for its weights. Each layer of its decoder in turn is read, rounded and written; then
its memory is free again. What a precision does not round is copied as it is stored.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from plexor.checkpoint.folder import CONFIG_FILE, ModelFolder
from plexor.checkpoint.loader import WeightPlan, plan_weights
from plexor.checkpoint.source import TensorSource
from plexor.checkpoint.tokenizer import load_tokenizer
from plexor.checkpoint.writer import SafetensorsWriter, write_error
from plexor.errors import CheckpointError, ConfigError, RequestError
from plexor.extension.catalog import Catalog
from plexor.extension.specs import Precision, Target
from plexor.kernels.table import resolve
from plexor.model.decoder import Decoder, DecoderLayer
from plexor.model.dense import DenseFormat
from plexor.model.format import LinearFormat
from plexor.model.linear import LinearWeight
from plexor.model.norm import RMSNorm
from plexor.model.unfilled import Unfilled, filled
from plexor.model.written import Calibration, WrittenFormat
from plexor.runtime.layout import Layout, LayoutPlanner, Matrix, Stored, find_decoder
from plexor.runtime.loading import BuiltModel, Placement, build_model, choose_device, choose_dtype, open_source

WEIGHT_SUFFIXES: Final = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".h5", ".msgpack", ".onnx"}
)
"""Of files that hold weights, which are not copied; nor are their indices."""

STEPWISE: Final = ("linear", "grouped_linear", *DenseFormat.fused.values())
"""Ops that calibration takes as they are defined: the inputs of each product can be read and are not narrowed to tensor
cores, and no provider keeps a copy of a weight in a layout of its own, since layers come and go."""

Progress = Callable[[int, int], None]
"""(layers done, layers in all)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What is to be done. dtype: in which the model is to run. text: to calibrate on, None for plain rounding.

    dense: patterns of modules of the checkpoint that are not to be rounded.
    window: tokens of the text that run together, the model's context at most; windows: how many at most.
    """

    folder: ModelFolder
    precision: str
    out: Path
    device: str = "auto"
    dtype: str = "auto"
    text: str | None = None
    dense: tuple[str, ...] = ()
    windows: int = 64
    window: int = 512

    @property
    def run_dtype(self) -> torch.dtype:
        """The dtype in which the model is to run, and in which gains of norms are kept that change."""
        return choose_dtype(self.dtype, self.folder.config)


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What was written: files with tensors, their bytes, weights that were rounded, modules that stayed dense."""

    num_files: int
    num_bytes: int
    num_rounded: int
    ignored: tuple[str, ...]


def convert(conversion: Conversion, catalog: Catalog, progress: Progress | None = None) -> ConversionReport:
    """Write the rounded checkpoint; the folder appears when it is complete, or not at all.

    ConfigError for a precision that is not written or a folder that has something in it, CheckpointError for weights
    that cannot be rounded or written, RequestError for a text that cannot be used, CapacityError for a full disk.
    """
    text = conversion.text
    spec = find_written(conversion.precision, catalog, calibrated=text is not None)
    check_out(conversion.out)
    _check_folder(conversion.folder)
    built = _build(conversion, catalog)
    rules = resolve(built.architecture.weights)(built.config)
    format: LinearFormat = resolve(spec.format)()
    written: WrittenFormat = resolve(spec.written)()
    with closing(open_source(conversion.folder.path, catalog)) as source, torch.no_grad():
        plan = plan_weights(built.module, rules, source)
        planner = LayoutPlanner(built, plan, source, format, written, conversion.dense)
        layout = planner.lay_out(None if text is None else conversion.run_dtype)
        num_bytes = sum(planned.num_bytes for planned in layout.planned)
        with _new_folder(conversion.out, num_bytes) as folder:
            with SafetensorsWriter(folder, layout.planned) as writer:
                run = _Run(conversion, built, plan, source, layout, format, written, writer)
                run.write(spec.calibrate if text is not None else None, progress)
                num_files = len(writer.close())
            with _said_of_writing(folder, num_bytes):
                _copy_files(conversion.folder.path, folder)
                _write_config(conversion.folder, folder, written.quantization(layout.ignored))
    return ConversionReport(num_files, num_bytes, len(layout.matrices), layout.ignored)


def find_written(name: str, catalog: Catalog, *, calibrated: bool) -> Precision:
    """The precision; ConfigError if checkpoints are not written in it, or it is not calibrated."""
    spec = catalog.precision(name)
    if spec.written and (spec.calibrate or not calibrated):
        return spec
    known = [each.name for each in catalog.precisions.values() if each.written and (each.calibrate or not calibrated)]
    choices = f"choose one of {', '.join(known)}" if known else "install a plugin that does it"
    what = "calibrated" if spec.written else "written as a checkpoint"
    raise ConfigError(f"the precision {name!r} cannot be {what}: {choices}")


def check_out(out: Path) -> None:
    """ConfigError unless a folder can be made at this path."""
    if out.is_dir():
        found = next(out.iterdir(), None)
        if found is not None:
            raise ConfigError(f"{out} has something in it already ({found.name}): name a folder that is new or empty")
    elif out.exists():
        raise ConfigError(f"{out} is a file: name a folder that is new or empty")
    elif not out.absolute().parent.is_dir():
        raise ConfigError(f"there is no folder {out.absolute().parent} to make {out.name!r} in: make it first")


def spread_windows(token_ids: Sequence[int], window: int, most: int) -> list[int]:
    """The tokens of at most so many windows, evenly spread; RequestError if there are too few for one."""
    whole = len(token_ids) // window
    if not whole:
        raise RequestError(
            f"the calibration text has {len(token_ids)} tokens, fewer than one window of {window}: give a longer one"
        )
    count = min(whole, most)
    starts = [index * whole // count * window for index in range(count)]
    return [token for start in starts for token in token_ids[start : start + window]]


def _check_folder(folder: ModelFolder) -> None:
    if folder.quantization is not None:
        method = folder.quantization.get("quant_method", "an unnamed method")
        raise CheckpointError(
            f"{folder.path} is stored quantised already ({method}), and rounding it again would lose more: use the "
            "checkpoint that it was made from"
        )


def _build(conversion: Conversion, catalog: Catalog) -> BuiltModel:
    """The dense model without its weights: in the dtype that is to run or, for calibration, in float32."""
    device = choose_device(conversion.device)
    dtype = conversion.run_dtype if conversion.text is None else torch.float32
    table = catalog.kernel_table(dict.fromkeys(STEPWISE, "reference"))
    with Unfilled() as unfilled:
        built = build_model(conversion.folder, catalog, table, Placement(device, dtype))
    unfilled.leave_unfilled(built.module)
    return built


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """Everything on its way from the source to the writer."""

    conversion: Conversion
    built: BuiltModel
    plan: WeightPlan
    source: TensorSource
    layout: Layout
    format: LinearFormat
    written: WrittenFormat
    writer: SafetensorsWriter

    def write(self, calibrate: Target | None, progress: Progress | None) -> None:
        """All planned tensors: layer by layer, by calibration if its target is given, then the others."""
        decoder = find_decoder(self.built.module)
        names = {module: name for name, module in self.built.module.named_modules()}
        layers = [] if decoder is None else [(names[layer], layer) for layer in decoder.layers]
        calibration = None if calibrate is None else self._calibration(calibrate, decoder, names)
        matrices = {f"{prefix}.": self._inside(f"{prefix}.") for prefix, _ in layers}
        for number, (prefix, layer) in enumerate(layers, start=1):
            if calibration is None:
                self._write_plain(matrices[f"{prefix}."])
            else:
                assert isinstance(layer, DecoderLayer)
                self._write_calibrated(f"{prefix}.", layer, matrices[f"{prefix}."], calibration)
            if progress is not None:
                progress(number, len(layers))
        inside = {matrix for group in matrices.values() for matrix in group}
        self._write_plain([matrix for matrix in self.layout.matrices if matrix not in inside])
        for name in self.layout.copied:
            self.writer.write(name, self.source.read(name))

    def _inside(self, prefix: str) -> list[Matrix]:
        return [matrix for matrix in self.layout.matrices if matrix.pieces[0].target.startswith(prefix)]

    def _calibration(self, target: Target, decoder: Decoder | None, names: Mapping[nn.Module, str]) -> Calibration:
        """The precision's calibration, with the text embedded."""
        text = self.conversion.text
        assert text is not None
        if decoder is None:
            raise ConfigError(
                f"{self.built.architecture.name} has no decoder, which is what a text calibrates: leave --calibrate out"
            )
        places = (decoder.embedding, decoder.positions, decoder.project_in)
        embeddings = [module for module in places if module is not None]
        window = min(self.conversion.window, self.built.config.max_positions)
        token_ids = load_tokenizer(self.conversion.folder.path).encode(text, add_special_tokens=False)
        chosen = spread_windows(token_ids, window, self.conversion.windows)
        with filled(*embeddings):
            for module in embeddings:
                self._load(names[module])
            made: Calibration = resolve(target)(decoder, self.built.build, chosen, window, self.conversion.run_dtype)
        return made

    def _write_plain(self, matrices: Iterable[Matrix]) -> None:
        build = self.built.build
        for matrix in matrices:
            dense = matrix.view.read_as(build.dtype, *(slice(0, size) for size in matrix.view.shape))
            self._write_matrix(matrix, self.format.convert(dense.to(build.device)))

    def _write_calibrated(
        self, prefix: str, layer: DecoderLayer, matrices: Iterable[Matrix], calibration: Calibration
    ) -> None:
        modules = dict(self.built.module.named_modules())
        names = {module: name for name, module in modules.items()}
        with filled(layer):
            self._load(prefix)
            targets = {piece.target: modules[piece.target] for matrix in matrices for piece in matrix.pieces}
            linears = [module for module in targets.values() if isinstance(module, LinearWeight)]
            kept = {names[module]: stored for module, stored in calibration.round(layer, linears).items()}
            for gain in self.layout.gains:
                if gain.target.startswith(prefix):
                    norm = modules[gain.target]
                    assert isinstance(norm, RMSNorm)
                    self.writer.write(gain.name, norm.weight.to(gain.dtype, copy=True))
        for matrix in matrices:
            self._write_matrix(matrix, matrix.assembled(kept))

    def _write_matrix(self, matrix: Matrix, stored: Stored) -> None:
        for last, tensor in self.written.tensors(stored, matrix.view.shape[1]).items():
            self.writer.write(f"{matrix.name}.{last}", tensor)

    def _load(self, prefix: str) -> None:
        """Fill the modules whose names begin so."""
        for placements in self.plan.placements.values():
            for placement in placements:
                if placement.target.startswith(prefix):
                    self.plan.targets[placement.target].module.load_piece(placement.piece, placement.view)


@contextmanager
def _new_folder(out: Path, num_bytes: int) -> Iterator[Path]:
    """A folder beside `out` that takes its place in the end, and is removed if anything fails before."""
    folder = out.absolute().with_name(f".{out.name}.unfinished-{os.getpid()}")
    with _said_of_writing(folder, num_bytes):
        folder.mkdir()
    try:
        yield folder
        with _said_of_writing(folder, num_bytes):
            folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _said_of_writing(path: Path, num_bytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise write_error(path, error, num_bytes) from error


def _copy_files(source: Path, target: Path) -> None:
    """What lies beside the weights: tokenizer, chat template, licence. Folders in the folder are left out."""
    for path in sorted(source.iterdir()):
        is_weights = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        if path.is_file() and not is_weights and not path.name.startswith(".") and path.name != CONFIG_FILE:
            shutil.copyfile(path, target / path.name)


def _write_config(folder: ModelFolder, target: Path, quantization: Mapping[str, Any]) -> None:
    content = {**folder.config, "quantization_config": quantization}
    (target / CONFIG_FILE).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
