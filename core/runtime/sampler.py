"""From logits to tokens: the draw, then what few rows ask for: penalties, bias, bans, log probabilities.

Settings lie on the host in a table by slot, written when a sequence is admitted, and travel with the rows of a step
that need them. Every row is drawn from the logits as they are; rows that change their logits first are drawn again
from a changed copy, which leaves the common case, and captured graphs of it, free of them. Counts for penalties are
kept on the device, so that a step can be launched before the last one's tokens have been read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from plexor.model.build import Build
from plexor.runtime.packer import NewSequence
from plexor.runtime.request import SamplingParams
from plexor.runtime.state import Array, send

COLDEST = 1e-5
"""Below this temperature logits would overflow when divided by it; the draw is then the likeliest token, its limit."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How each row is drawn, as the op `sample` takes it."""

    temperature: Tensor  # [R] float32
    top_k: Tensor  # [R] int32
    top_p: Tensor  # [R] float32
    min_p: Tensor  # [R] float32
    seeds: Tensor  # [R] int64

    def __getitem__(self, rows: slice | Tensor) -> Settings:
        return Settings(self.temperature[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows], self.seeds[rows])


@dataclass(frozen=True, slots=True)
class LogprobRows:
    """Log probabilities of the rows that asked for them.

    rows [n]: which rows of the step. most [n]: how many of the likeliest each wants. drawn [n], rank [n]: of the drawn
    token. values, token_ids [n, k]: the likeliest, best first.
    """

    rows: list[int]
    most: list[int]
    drawn: Tensor
    rank: Tensor
    values: Tensor
    token_ids: Tensor


class Sampler:
    """Holds the settings of every slot and draws the tokens of a step.

    tokens [N] int64: where each slot's last drawn token is kept.
    """

    def __init__(self, build: Build, vocab_size: int, tokens: Tensor) -> None:
        num_slots = tokens.shape[0]
        self._device = build.device
        self._tokens = tokens
        self._vocab_size = vocab_size
        self._num_slots = num_slots
        self._sample: Callable[..., Tensor] = build.bind("sample", vocab_size=vocab_size)
        self._temperature = numpy.zeros(num_slots + 1, dtype=numpy.float32)
        self._top_k = numpy.zeros(num_slots + 1, dtype=numpy.int32)
        self._top_p = numpy.ones(num_slots + 1, dtype=numpy.float32)
        self._min_p = numpy.zeros(num_slots + 1, dtype=numpy.float32)
        self._seeds = numpy.zeros(num_slots + 1, dtype=numpy.int64)
        self._special: dict[int, _Special] = {}
        self._history: _History | None = None

    def admit(self, new: NewSequence) -> None:
        """Take over a slot for a sequence that starts, or starts again after preemption."""
        slot, params = new.slot, new.sampling
        self._temperature[slot] = params.temperature if params.temperature >= COLDEST else 0.0
        self._top_k[slot] = max(params.top_k, 0)
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._seeds[slot] = new.seed
        special = _Special.of(new, self._vocab_size)
        self._special.pop(slot, None)
        if special is not None:
            self._special[slot] = special
            if special.is_penalised:
                self._history = self._history or _History(self._num_slots, self._vocab_size, self._device)
                self._history.start(new)

    def settings(self, slots: NDArray[numpy.int64]) -> list[Array]:
        """The settings of slots [R] in the order of `Settings`; a padding row, slot -1, is greedy."""
        tables = (self._temperature, self._top_k, self._top_p, self._min_p, self._seeds)
        return [table[slots] for table in tables]

    def draw(self, logits: Tensor, settings: Settings, steps: Tensor, slots: Tensor) -> Tensor:
        """A token for each row: logits [R, V], steps [R] int64 (which token of its answer) -> ids [R] int64.

        They are also kept in the rows' slots [R] int64, -1 for padding.
        """
        chosen = (settings.temperature, settings.top_k, settings.top_p, settings.min_p, settings.seeds)
        return self._sample(logits, *chosen, steps, slots, self._tokens)

    def changed_rows(self, slots: Sequence[int]) -> list[int]:
        """Rows to be drawn again by `redraw`."""
        if not self._special:
            return []
        return [row for row, slot in enumerate(slots) if slot in self._special and self._special[slot].changes_logits]

    def redraw(
        self, logits: Tensor, rows: Sequence[int], slots: Sequence[int], settings: Settings, steps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Draw rows [n] of the step again, from logits that are changed as they ask.

        logits [R, V], slots [R], settings and steps [R] are the whole step's. Gives the rows' places [n] and the drawn
        ids [n], on the device.
        """
        chosen = [slots[row] for row in rows]
        special = [self._special[slot] for slot in chosen]
        changes = _Changes.of(special)
        host = [numpy.array(rows, dtype=numpy.int64), numpy.array(chosen, dtype=numpy.int64), *changes.arrays()]
        _, (places, places_of_slots, *arrays) = send(host, self._device)
        adjusted = logits[places].float()
        if self._history is not None:
            self._history.penalise(adjusted, places_of_slots, *arrays[:3])
        bias_rows, bias_ids, bias, ban_rows, ban_ids = arrays[3:]
        adjusted[bias_rows, bias_ids] += bias
        adjusted[ban_rows, ban_ids] = float("-inf")
        ids = self.draw(adjusted, settings[places], steps[places], places_of_slots)
        if self._history is not None:
            self._history.add(places_of_slots, ids)
        for one in special:
            one.num_drawn += 1
        return places, ids

    def logprobs(self, logits: Tensor, ids: Tensor, slots: Sequence[int]) -> LogprobRows | None:
        """Of the model's own distribution, before temperature, penalties and cuts; None where no row wants any."""
        if not self._special:
            return None
        most = {row: self._special[slot].num_logprobs for row, slot in enumerate(slots) if slot in self._special}
        wanted = {row: count for row, count in most.items() if count is not None}
        if not wanted:
            return None
        _, (index,) = send([numpy.array(list(wanted), dtype=numpy.int64)], self._device)
        values = logits[index].float().log_softmax(dim=-1)
        drawn = values.gather(1, ids[index].unsqueeze(1))
        rank = (values >= drawn).sum(dim=1)
        top = values.topk(min(max(wanted.values()), self._vocab_size), dim=1)
        return LogprobRows(list(wanted), list(wanted.values()), drawn.squeeze(1), rank, top.values, top.indices)


@dataclass(slots=True)
class _Special:
    """What a sequence asks for besides the draw itself. num_drawn: tokens drawn so far."""

    params: SamplingParams
    is_penalised: bool
    bias: tuple[tuple[int, float], ...]
    bans: tuple[int, ...]
    num_drawn: int

    @classmethod
    def of(cls, new: NewSequence, vocab_size: int) -> _Special | None:
        params = new.sampling
        banned = (*params.stop_token_ids, *(() if params.ignore_end else new.end_ids)) if params.min_tokens else ()
        special = cls(
            params=params,
            is_penalised=_penalises(params),
            bias=tuple(params.logit_bias.items()),
            bans=tuple(token_id for token_id in banned if token_id < vocab_size),  # a checkpoint may name others
            num_drawn=len(new.generated_ids),
        )
        return special if special.changes_logits or params.logprobs is not None else None

    @property
    def changes_logits(self) -> bool:
        return self.is_penalised or bool(self.bias) or self.is_banning

    @property
    def is_banning(self) -> bool:
        return bool(self.bans) and self.num_drawn < self.params.min_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.params.logprobs


@dataclass(frozen=True, slots=True)
class _Changes:
    """What is done to the logits of n rows: penalties of each, and places (row, token) with a bias or a ban."""

    penalties: list[tuple[float, float, float]]
    bias: list[tuple[int, int, float]]
    bans: list[tuple[int, int]]

    @classmethod
    def of(cls, special: Sequence[_Special]) -> _Changes:
        rows = list(enumerate(special))
        return cls(
            [
                (one.params.repetition_penalty, one.params.frequency_penalty, one.params.presence_penalty)
                for one in special
            ],
            [(row, token_id, bias) for row, one in rows for token_id, bias in one.bias],
            [(row, token_id) for row, one in rows if one.is_banning for token_id in one.bans],
        )

    def arrays(self) -> list[Array]:
        """repetition, frequency, presence [n]; rows, tokens and values of biases; rows and tokens of bans."""
        penalties = numpy.array(self.penalties, dtype=numpy.float32)
        bias = numpy.array([entry[:2] for entry in self.bias], dtype=numpy.int64).reshape(-1, 2)
        values = numpy.array([entry[2] for entry in self.bias], dtype=numpy.float32)
        bans = numpy.array(self.bans, dtype=numpy.int64).reshape(-1, 2)
        integers = [numpy.ascontiguousarray(column) for column in (*bias.T, *bans.T)]
        return [*(numpy.ascontiguousarray(column) for column in penalties.T), *integers[:2], values, *integers[2:]]


class _History:
    """What penalised sequences have seen and said, by slot: seen [N, V] bool, said [N, V] float32, how often."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._seen = torch.zeros(num_slots, vocab_size, dtype=torch.bool, device=device)
        self._said = torch.zeros(num_slots, vocab_size, device=device)

    def start(self, new: NewSequence) -> None:
        """A sequence with the tokens that it has so far; its slot forgets another one's."""
        seen = numpy.array([*new.prompt_ids, *new.generated_ids], dtype=numpy.int64)
        said = numpy.array(new.generated_ids, dtype=numpy.int64)
        _, (seen_ids, said_ids) = send([seen, said], self._device)
        self._seen[new.slot].zero_().index_fill_(0, seen_ids, 1)
        ones = torch.ones_like(said_ids, dtype=torch.float32)
        self._said[new.slot].zero_().index_add_(0, said_ids, ones)

    def add(self, slots: Tensor, ids: Tensor) -> None:
        """One more token for each of these slots [n]."""
        self._seen[slots, ids] = True
        self._said[slots, ids] += 1

    def penalise(self, logits: Tensor, slots: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor) -> None:
        """Repetition (Keskar et al., 2019) over prompt and answer; presence and frequency over the answer alone."""
        factor = repetition.unsqueeze(1)
        scaled = torch.where(logits > 0, logits / factor, logits * factor)
        torch.where(self._seen[slots], scaled, logits, out=logits)
        said = self._said[slots]
        logits -= frequency.unsqueeze(1) * said + presence.unsqueeze(1) * (said > 0)


def _penalises(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
