"""Models without memory for their weights: what loses it, what keeps it, and what gets it back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plexor.model.unfilled import Unfilled, filled


class Built(nn.Module):
    """A parameter and a buffer to be filled, a buffer that fills itself, and room of a kernel's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(30, 50), requires_grad=False)
        self.register_buffer("codes", torch.empty(7, dtype=torch.float8_e4m3fn))
        self.register_buffer("table", torch.empty(9).fill_(3))
        self.register_buffer("made", torch.arange(4))
        self.codes: Tensor
        self.table: Tensor
        self.stored = {"codes": self.codes}
        self.room = torch.empty(11)


def sizes(model: Built) -> list[int]:
    tensors = (model.weight, model.codes, model.table, model.room)
    return [tensor.untyped_storage().nbytes() for tensor in tensors]


def build() -> Built:
    with Unfilled() as unfilled:
        model = Built()
    unfilled.leave_unfilled(model)
    return model


def test_only_weights_lose_their_memory() -> None:
    model = build()
    assert sizes(model) == [0, 0, 36, 44]
    assert model.table.tolist() == [3] * 9
    assert torch.empty(5).untyped_storage().nbytes() == 20, "the mode has been left"


def test_what_refers_to_a_weight_sees_it_while_it_has_memory() -> None:
    model = build()
    for value in (2.0, 5.0):
        with filled(model):
            assert sizes(model) == [6000, 7, 36, 44]
            model.weight.fill_(value)
            model.codes.copy_(torch.arange(7).float())
            assert float(model.weight.sum()) == 1500 * value
            assert model.stored["codes"].float().tolist() == [0, 1, 2, 3, 4, 5, 6]
        assert sizes(model) == [0, 0, 36, 44]


def test_memory_is_given_back_after_an_error() -> None:
    model = build()
    try:
        with filled(model):
            raise RuntimeError
    except RuntimeError:
        pass
    assert sizes(model) == [0, 0, 36, 44]
