"""Fills a model with random numbers, drawn where the model is: the work of a checkpoint without its weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from plexor.checkpoint.loader import LoadReport, find_targets
from plexor.checkpoint.view import WHOLE, TensorView


class RandomView(TensorView):
    """A tensor of normal numbers, of the shape that its place in the model expects.

    The whole tensor is drawn, whichever part of it is read, so that every reading and every rank sees the same one.
    """

    def __init__(self, origin: str, seed: int, dtype: torch.dtype, generator: torch.Generator) -> None:
        self.origin = origin
        self.shape = ()
        self._seed = seed
        self._dtype = dtype
        self._generator = generator

    def read(self, *index: slice) -> Tensor:
        mean, deviation = (1.0, 0.1) if len(self.shape) < 2 else (0.0, 0.02)
        whole = torch.empty(self.shape, dtype=self._dtype, device=self._generator.device)
        whole.normal_(mean, deviation, generator=self._generator.manual_seed(self._seed))
        return whole[index or WHOLE] if self.shape else whole

    def expect(self, shape: tuple[int, ...]) -> None:
        """Takes this shape."""
        self.shape = shape


def draw_weights(model: nn.Module, dtype: torch.dtype, device: torch.device, seed: int) -> LoadReport:
    """Fill every place of the model on its way through the model's number format, as a checkpoint's tensors go.

    Vectors are 1 + 0.1 x normal, all others 0.02 x normal. Memory: the tensor being drawn, beside the model.
    """
    generator = torch.Generator(device)
    places = [(name, target.module, piece) for name, target in find_targets(model).items() for piece in target.ordered]
    num_bytes = 0
    for number, (name, module, piece) in enumerate(places):
        view = RandomView(f"the random tensor for {name}", seed + number, dtype, generator)
        module.load_piece(piece, view)
        num_bytes += math.prod(view.shape) * dtype.itemsize
    return LoadReport(len(places), 0, num_bytes, (str(dtype).removeprefix("torch."),))
