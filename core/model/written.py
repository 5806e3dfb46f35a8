"""What a precision brings so that `plexor quantize` can write checkpoints in it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from plexor.model.decoder import DecoderLayer
from plexor.model.linear import LinearWeight


class WrittenFormat(Protocol):
    """How weights that a LinearFormat keeps lie in a checkpoint; what a precision's `written` target returns."""

    def refuses(self, in_features: int) -> str | None:
        """Why a weight of so many input features cannot be written, and what to do; None if it can."""
        ...

    def tensors(self, stored: Mapping[str, Tensor], in_features: int) -> dict[str, Tensor]:
        """What the format keeps of one matrix -> what lies in place of its "weight", by last name.

        It is also asked with tensors of torch's device "meta", for shapes and dtypes.
        """
        ...

    def quantization(self, ignored: Sequence[str]) -> dict[str, Any]:
        """`quantization_config` of config.json. ignored: the checkpoint's modules whose weight stays dense."""
        ...


class Calibration(Protocol):
    """Rounds a decoder with a text in view, one layer at a time; what a precision's `calibrate` target returns.

    While it is made, the decoder's embeddings hold their weights; after that, only the layer that it is asked for does.
    """

    def round(
        self, layer: DecoderLayer, linears: Collection[LinearWeight]
    ) -> Mapping[LinearWeight, Mapping[str, Tensor]]:
        """What the format keeps of each of these, the linear layers and stacks of the layer that are to be rounded.

        The layer follows the last one asked for, is dense and is changed: weights become what the rounded ones mean,
        and gains of its norms may take up factors, which are then part of the checkpoint.
        """
        ...
