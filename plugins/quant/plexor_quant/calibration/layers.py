"""A text through a decoder, one layer at a time: every layer is rounded on what the rounded layers before it give.

Beside the model this takes the activations of the text between two layers, one layer's cache and the statistics of one
linear layer or, while factors are searched, of one decoder layer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plexor.api import (
    Batch,
    Build,
    CheckpointError,
    ConfigError,
    Decoder,
    DecoderLayer,
    ForwardContext,
    GroupedLinear,
    LayerCache,
    Linear,
    LinearWeight,
    Pages,
    RequestError,
)
from plexor_quant.calibration.grid import Rounded
from plexor_quant.calibration.scheme import Scheme
from plexor_quant.calibration.smoothing import Search, find_folds, smooth
from plexor_quant.calibration.statistics import InputStatistics

SAMPLED_ROWS = 1024
"""Inputs of a layer on which factors are compared."""

ROWS_AT_ONCE = 4096
BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Windows of the text that run together: their state [T, H] between two layers, and where each row stands."""

    hidden: Tensor
    positions: Tensor
    context: ForwardContext


class TextCalibration:
    """A Calibration: the text on its way through the decoder, which has come as far as the layers that were rounded.

    Weights become what the rounded ones mean, gains of norms take up factors (gain_dtype: in which they will be kept).
    The text is cut into windows of this many tokens; a last one that is shorter is left out.
    """

    def __init__(
        self,
        decoder: Decoder,
        build: Build,
        token_ids: Sequence[int],
        window: int,
        scheme: Scheme,
        gain_dtype: torch.dtype,
    ) -> None:
        if build.mesh.size > 1:
            raise ConfigError(f"calibration runs on one rank, not on {build.mesh.size}: leave --tp out")
        if len(token_ids) < window:
            raise RequestError(
                f"the text has {len(token_ids)} tokens, fewer than a window of {window}: give a longer one"
            )
        self._build = build
        self._scheme = scheme
        self._gain_dtype = gain_dtype
        self._num_layers = len(decoder.layers)
        self._num_done = 0
        self._pieces = _pieces(decoder, build, token_ids, window)

    @torch.no_grad()
    def round(self, layer: DecoderLayer, linears: Collection[LinearWeight]) -> dict[LinearWeight, dict[str, Tensor]]:
        """What the format keeps of each of these linear layers; stacks have a leading axis of groups.

        ConfigError where one runs fused, CheckpointError where the text gives numbers that are not finite.
        """
        run = _LayerRun(layer, self._build, self._num_layers)
        found, self._pieces = _calibrate_layer(run, linears, self._pieces, self._scheme, self._gain_dtype)
        self._num_done += 1
        if not all(bool(piece.hidden.isfinite().all()) for piece in self._pieces):
            raise CheckpointError(
                f"layer {self._num_done} of {self._num_layers} makes NaN or infinity of the calibration text: the "
                "weights are damaged, download the checkpoint again"
            )
        return found


def calibrate(
    model: nn.Module,
    build: Build,
    token_ids: Sequence[int],
    window: int,
    scheme: Scheme,
    *,
    gain_dtype: torch.dtype,
) -> dict[str, dict[str, Tensor]]:
    """Round every linear layer of a model's decoder on a text; what the precision's format keeps, by module name.

    The model is dense, of one rank, and is changed, as TextCalibration says. ConfigError for one without a decoder.
    """
    decoder = next((module for module in model.modules() if isinstance(module, Decoder)), None)
    if decoder is None:
        raise ConfigError(f"{type(model).__name__} has no decoder: calibration does not serve it")
    names = {module: name for name, module in model.named_modules()}
    calibration = TextCalibration(decoder, build, token_ids, window, scheme, gain_dtype)
    kept: dict[str, dict[str, Tensor]] = {}
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        linears = [
            module
            for module in layer.modules()
            if isinstance(module, Linear | GroupedLinear) and module.format is build.format
        ]
        kept.update({names[linear]: stored for linear, stored in calibration.round(layer, linears).items()})
    return kept


def _pieces(decoder: Decoder, build: Build, token_ids: Sequence[int], window: int) -> list[Piece]:
    together = max(1, ROWS_AT_ONCE // window)
    windows = torch.tensor(token_ids[: len(token_ids) // window * window], device=build.device).view(-1, window)
    pieces = []
    for rows in windows.split(together):
        positions = torch.arange(window, device=build.device).repeat(len(rows))
        hidden = decoder.embed(Batch(rows.flatten(), positions))
        pieces.append(Piece(hidden, positions, _context(len(rows), window, build.device)))
    return pieces


def _context(num_windows: int, window: int, device: torch.device) -> ForwardContext:
    """Each window is a sequence of its own in consecutive blocks; the caches are put in for each layer."""
    blocks = -(-window // BLOCK_SIZE)
    table = torch.arange(num_windows * blocks, dtype=torch.int32, device=device).view(num_windows, blocks)
    starts = torch.arange(num_windows + 1, dtype=torch.int32, device=device) * window
    lengths = torch.full((num_windows,), window, dtype=torch.int32, device=device)
    first = torch.arange(num_windows, device=device).unsqueeze(1) * blocks * BLOCK_SIZE
    slots = (first + torch.arange(window, device=device)).flatten()
    return ForwardContext(Pages(starts, lengths, table, window), slots, None, ())


@dataclass(frozen=True, slots=True, eq=False)
class _LayerRun:
    """One layer over all pieces of the text."""

    layer: DecoderLayer
    build: Build
    num_layers: int

    def __call__(self, pieces: Sequence[Piece]) -> Iterator[Tensor]:
        blocks = max(piece.context.pages.block_table.numel() for piece in pieces)
        shape = self.layer.attention.kv_shape(blocks, BLOCK_SIZE)
        device = self.build.device
        cache: LayerCache = {
            kept.name: torch.zeros(kept.shape, dtype=kept.dtype, device=device) for kept in self.build.kv_storage(shape)
        }
        for piece in pieces:
            pages, slots = piece.context.pages, piece.context.slots
            # Only this layer runs, so its cache may stand at every layer's place.
            context = ForwardContext(pages, slots, None, (cache,) * self.num_layers)
            yield self.layer(piece.hidden.clone(), piece.positions, context)


def _calibrate_layer(
    run: _LayerRun,
    chosen: Collection[LinearWeight],
    pieces: list[Piece],
    scheme: Scheme,
    gain_dtype: torch.dtype,
) -> tuple[dict[LinearWeight, dict[str, Tensor]], list[Piece]]:
    """What is kept of the layer's linear layers, and the pieces as the rounded layer leaves them."""
    linears = _in_order(run, chosen, pieces)
    _smooth_layer(run, linears, pieces, scheme, gain_dtype)
    kept: dict[LinearWeight, dict[str, Tensor]] = {}
    with _rounded_inputs(linears, scheme) as rounding:
        for linear in linears:
            statistics = _collect(run, pieces, [linear])[linear]
            kept[linear] = _round(linear, statistics, scheme)
            rounding.add(linear)
        outputs = list(run(pieces))
    return kept, [Piece(x, piece.positions, piece.context) for x, piece in zip(outputs, pieces, strict=True)]


def _smooth_layer(
    run: _LayerRun, linears: Sequence[LinearWeight], pieces: list[Piece], scheme: Scheme, gain_dtype: torch.dtype
) -> None:
    """Folds touch only what will be written anew: layers that are rounded, and norms."""
    if scheme.factors is None:
        return
    found = find_folds(run.layer, gain_dtype)
    folds = [fold for fold in found if fold.linear in linears and fold.producer in (None, *linears)]
    statistics = _collect(run, pieces, [fold.linear for fold in folds])
    for fold in folds:
        smooth(fold, statistics[fold.linear][0], scheme.factors, scheme.grid, Search(scheme.search, scheme.round_input))


def _in_order(
    run: _LayerRun, chosen: Collection[LinearWeight], pieces: Sequence[Piece]
) -> list[Linear | GroupedLinear]:
    """These linear layers as they are first called; ConfigError if one is not."""
    linears = [module for module in chosen if isinstance(module, Linear | GroupedLinear)]
    called: dict[nn.Module, None] = {}
    hooks = [linear.register_forward_pre_hook(lambda module, _: called.setdefault(module)) for linear in linears]
    next(run(pieces[:1]))
    for hook in hooks:
        hook.remove()
    if len(called) < len(linears):
        raise ConfigError(
            f"{len(linears) - len(called)} of {len(linears)} linear layers run inside other kernels, where their "
            "inputs cannot be read: calibrate on a CPU"
        )
    order = list(called)
    return sorted(linears, key=order.index)


def _collect(
    run: _LayerRun, pieces: list[Piece], linears: Sequence[Linear | GroupedLinear]
) -> dict[nn.Module, list[InputStatistics]]:
    """Of each layer's inputs; of a stack for each group."""
    stride = max(1, sum(len(piece.hidden) for piece in pieces) // SAMPLED_ROWS)
    found: dict[nn.Module, list[InputStatistics]] = {
        linear: [InputStatistics(linear.in_features, run.build.device, stride) for _ in range(linear.groups)]
        for linear in linears
    }

    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, Linear):
            found[module][0].add(inputs[0])
            return
        start = 0
        for statistics, end in zip(found[module], inputs[1].tolist(), strict=True):
            statistics.add(inputs[0][start:end])
            start = end

    hooks = [linear.register_forward_pre_hook(add) for linear in linears]
    for _ in run(pieces):
        pass
    for hook in hooks:
        hook.remove()
    return found


def _round(linear: Linear | GroupedLinear, statistics: Sequence[InputStatistics], scheme: Scheme) -> dict[str, Tensor]:
    """Round the layer's weight, put what it means in its place, and return what the format keeps."""
    weight = linear.stored["weight"]
    stack = weight if linear.groups > 1 else weight.unsqueeze(0)
    rounded: list[Rounded] = []
    for dense, seen in zip(stack, statistics, strict=True):
        rounded.append(scheme.rounding(dense, seen.gram, scheme.grid))
        dense.copy_(rounded[-1].dense())
    kept = [scheme.keep(one) for one in rounded]
    if linear.groups == 1:
        return kept[0]
    return {name: torch.stack([one[name] for one in kept]) for name in kept[0]}


@contextmanager
def _rounded_inputs(linears: Sequence[nn.Module], scheme: Scheme) -> Iterator[set[nn.Module]]:
    """While open, the inputs of the layers in the yielded set are rounded as the precision rounds them."""
    chosen: set[nn.Module] = set()

    def through(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (scheme.round_input(inputs[0]), *inputs[1:]) if module in chosen else inputs

    hooks = [linear.register_forward_pre_hook(through) for linear in linears]
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()
