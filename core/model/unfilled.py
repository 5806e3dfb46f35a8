"""Models whose weights take memory only while they are needed: built without, filled and emptied a part at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Unfilled(TorchFunctionMode):
    """While entered, new tensors of `torch.empty` that nobody writes to lose their memory again.

    A tensor keeps it until the next one is made, so that a constructor may fill its own. Modules, parameters and
    whatever else refers to the tensors stay valid; `filled` lends a module's tensors their memory for a while.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not torch.empty:
            return func(*args, **(kwargs or {}))
        self._empty_last()
        made = func(*args, **(kwargs or {}))
        self._made.append(made)
        return made

    def leave_unfilled(self, model: nn.Module) -> None:
        """Called last: memory comes back for all but parameters and buffers of the model, such as kernels' own room."""
        self._empty_last()
        kept = {tensor.untyped_storage()._cdata for tensor in _tensors(model)}
        for tensor in self._made:
            if tensor.untyped_storage()._cdata not in kept:
                _fill(tensor)
        self._made.clear()

    def _empty_last(self) -> None:
        if self._made and self._made[-1]._version == 0:
            self._made[-1].untyped_storage().resize_(0)


@contextmanager
def filled(*modules: nn.Module) -> Iterator[None]:
    """While open, the modules' emptied tensors have memory, which holds anything at first."""
    emptied = [tensor for module in modules for tensor in _tensors(module) if _is_empty(tensor)]
    try:
        for tensor in emptied:
            _fill(tensor)
        yield
    finally:
        for tensor in emptied:
            tensor.untyped_storage().resize_(0)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _is_empty(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


def _fill(tensor: Tensor) -> None:
    if _is_empty(tensor):
        tensor.untyped_storage().resize_(tensor.numel() * tensor.itemsize)
